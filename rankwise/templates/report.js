"use strict";
// The report's program. It filters and shows; every number was made by rankwise before the page was written.
// Text from the study or the data goes in by textContent alone.
(function () {
  const data = JSON.parse(document.getElementById("data").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const coarse = window.matchMedia("(pointer: coarse)");
  const calm = window.matchMedia("(prefers-reduced-motion: reduce)");
  const COLOURED = new Set(["color", "fillcolor", "bgcolor", "bordercolor", "gridcolor", "linecolor",
    "zerolinecolor", "tickcolor", "activecolor", "paper_bgcolor", "plot_bgcolor", "colorscale", "outlinecolor"]);
  const PRINT_WIDTH = 690; // pixels: the narrower of A4 and Letter, less margins
  const LINE = 22; // pixels of a line of a list
  const byId = (id) => document.getElementById(id);
  let printing = false;
  let on = new Set(data.arms.keys());
  let opened = null;

  // --- looks ---------------------------------------------------------------------------------

  const colours = () => data.palette[dark.matches && !printing ? "dark" : "light"];

  function painted(value, key) {
    if (typeof value === "string") {
      return COLOURED.has(key) && value[0] === "@" ? colours()[value.slice(1)] : value;
    }
    if (Array.isArray(value)) return value.map((one) => painted(one, key));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, painted(v, k)]));
  }

  function axis(own) {
    return Object.assign({ gridcolor: "@grid", linecolor: "@edge", zeroline: false, automargin: true }, own);
  }

  function dressed(layout, width) {
    const narrow = width < 560;
    const base = {
      paper_bgcolor: "@paper", plot_bgcolor: "@paper", showlegend: false,
      dragmode: coarse.matches ? false : "zoom", // a finger that scrolls the page must not zoom a picture
      font: { color: "@ink", size: narrow ? 11 : 12, family: "system-ui, -apple-system, Segoe UI, sans-serif" },
      margin: { l: narrow ? 44 : 60, r: 14, t: narrow && layout.showlegend ? 72 : 30, b: 46 },
      hoverlabel: { align: "left", bgcolor: "@paper", bordercolor: "@edge", font: { color: "@ink", size: 12 } },
      modebar: { color: "@muted", activecolor: "@ink", bgcolor: "rgba(0,0,0,0)" },
      legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom" }, width: width,
    };
    const whole = Object.assign(base, layout);
    whole.xaxis = axis(layout.xaxis);
    whole.yaxis = axis(layout.yaxis);
    return painted(whole);
  }

  const CONFIG = {
    displaylogo: false, showSendToCloud: false, plotlyServerURL: "", responsive: false,
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
  };

  function widthOf(node) {
    return printing ? PRINT_WIDTH : Math.max(240, Math.floor(node.getBoundingClientRect().width));
  }

  function put(node, traces, layout) {
    Plotly.react(node, painted(traces), dressed(layout, widthOf(node)), CONFIG);
  }

  // --- the page's pictures -------------------------------------------------------------------

  const shownLine = (line) => line.arm === null || on.has(line.arm);
  const ofArm = (trace) => trace.arm !== undefined && trace.arm !== null;

  function draw(picture) {
    const node = byId("plot-" + picture.key);
    const traces = picture.traces.filter((trace) => !ofArm(trace) || on.has(trace.arm)).map((t) => ({ ...t }));
    const empty = !traces.some(ofArm);
    byId("none-" + picture.key).hidden = !empty;
    node.hidden = empty;
    if (empty) return;
    const seen = new Set(); // one entry of the legend per group
    for (const trace of traces) {
      if (trace.legendgroup === undefined) continue;
      trace.showlegend = !seen.has(trace.legendgroup);
      seen.add(trace.legendgroup);
    }
    const layout = { ...picture.layout };
    if (picture.lines) {
      const lines = picture.lines.filter(shownLine);
      const keys = lines.map((line) => line.key);
      const tall = lines.length * (lines.some((line) => line.label.includes("<br>")) ? 1.5 * LINE : LINE);
      layout.yaxis = {
        type: "category", categoryorder: "array", categoryarray: keys, tickvals: keys, ticks: "",
        ticktext: lines.map((line) => line.label), range: [keys.length - 0.4, -0.6], fixedrange: true,
      };
      layout.height = 80 + Math.max(2 * LINE, tall);
    } else {
      layout.height = printing || widthOf(node) < 560 ? 340 : 430;
    }
    put(node, traces, layout);
    if (node.dataset.ready) return;
    node.dataset.ready = "yes";
    node.on("plotly_click", (event) => open(event.points[0].data.arm));
    node.addEventListener("keydown", (event) => walk(event, node));
  }

  // By keyboard: the arrows go from arm to arm, Enter opens the one that is shown.
  function walk(event, node) {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const told = node.data.flatMap((t, i) => (ofArm(t) && t.hoverinfo === "text" && t.x[0] !== null ? [i] : []));
    if (event.target !== node || !told.length) return;
    const at = told.indexOf(Number(node.dataset.at ?? -1));
    if (event.key === "Enter" && at >= 0) {
      open(node.data[told[at]].arm);
    } else if (event.key === "Escape") {
      Plotly.Fx.unhover(node);
    } else if (step) {
      const next = told[(at + step + told.length + (at < 0 && step < 0 ? 1 : 0)) % told.length];
      const last = node.data[next].x.length - 1;
      node.dataset.at = next;
      Plotly.Fx.hover(node, [{ curveNumber: next, pointNumber: last }]);
      byId("told").textContent = plain([].concat(node.data[next].hovertext)[last]);
    } else {
      return;
    }
    event.preventDefault();
  }

  function plain(text) {
    return text.replace(/<br>/g, ", ").replace(/<\/?b>/g, "")
      .replace(/&lt;/g, "<").replace(/&gt;/g, ">").replace(/&amp;/g, "&");
  }

  function redraw() {
    data.pictures.forEach(draw);
    if (opened !== null) drawArm();
    for (const mark of document.querySelectorAll("svg[data-look]")) {
      mark.style.color = colours()["s:" + mark.dataset.look];
    }
  }

  // --- the filter ----------------------------------------------------------------------------

  function ticked(group) {
    const boxes = document.querySelectorAll('[data-filter="' + group + '"] input:checked');
    return new Set(Array.from(boxes, (box) => box.value));
  }

  function filter() {
    const strategies = ticked("strategy"), budgets = ticked("budget");
    on = new Set();
    data.arms.forEach((arm, i) => {
      if (strategies.has(arm.strategy) && budgets.has(arm.budget)) on.add(i);
    });
    for (const row of document.querySelectorAll("tr[data-arm]")) row.hidden = !on.has(Number(row.dataset.arm));
    byId("shown").textContent = on.size + " of " + data.arms.length;
    redraw();
  }

  // --- one arm -------------------------------------------------------------------------------

  function element(name, text, parent, attributes) {
    const made = document.createElement(name);
    if (text !== null) made.textContent = text;
    for (const [key, value] of Object.entries(attributes || {})) made.setAttribute(key, value);
    if (parent) parent.append(made);
    return made;
  }

  function open(place) {
    if (place === undefined || place === null) return;
    const dialog = byId("arm");
    opened = place;
    if (!dialog.open) dialog.showModal();
    fill(data.arms[place]);
    drawArm();
    dialog.scrollTop = 0;
  }

  function move(step) {
    const places = Array.from(on.has(opened) ? on : new Set([...on, opened])).sort((a, b) => a - b);
    open(places[(places.indexOf(opened) + step + places.length) % places.length]);
    byId("told").textContent = data.arms[opened].name;
  }

  function fill(arm) {
    byId("arm-title").textContent = arm.name;
    const facts = byId("arm-facts");
    facts.replaceChildren();
    for (const [name, value] of arm.facts) {
      const pair = element("div", null, facts);
      element("dt", name, pair);
      element("dd", value, pair);
    }
    const choice = byId("plan-of");
    choice.replaceChildren(...arm.plans.map((plan, i) => element("option", plan.whose, null, { value: i })));
    byId("plan-choice").hidden = arm.plans.length < 2;
    fillExamples(arm);
  }

  function drawArm() {
    const arm = data.arms[opened];
    drawPlan(arm, arm.plans[Number(byId("plan-of").value) || 0]);
    drawCurve(arm);
    byId("use-part").hidden = !arm.use.length;
    if (arm.use.length) drawUse(arm);
    byId("plot-examples").hidden = !arm.differences;
    if (arm.differences) drawExamples(arm);
  }

  const turned = (rows) => rows[0].map((_, i) => rows.map((row) => row[i]));

  function drawPlan(arm, plan) {
    const node = byId("plot-plan");
    node.hidden = byId("plan-details").hidden = !plan;
    if (!plan) {
      byId("plan-about").textContent = "No finished run has left a plan yet.";
      return;
    }
    byId("plan-about").textContent = "Ranks of " + plan.whose +
      ", layers by modules. A rank of 0 is no adapter, and has no colour.";
    const words = plan.z.map((row, i) => row.map((rank, j) => plan.texts[i + "," + j] ?? (rank === null ? "" : String(rank))));
    const width = widthOf(node), across = width >= 620;
    const layers = plan.layers.map(String), parts = plan.parts.map(escaped);
    const room = across ? (width - 150) / layers.length : 99;
    const trace = {
      type: "heatmap", z: across ? plan.z : turned(plan.z), x: across ? layers : parts, y: across ? parts : layers,
      text: across ? words : turned(words), texttemplate: room > 15 ? "%{text}" : "", textfont: { size: room > 22 ? 11 : 9 },
      hovertemplate: (across ? "layer %{x}, %{y}" : "layer %{y}, %{x}") + ": rank %{text}<extra></extra>",
      colorscale: plan.scale, zmin: 0, zmax: plan.highest, xgap: 1, ygap: 1,
      colorbar: { title: { text: "rank" }, thickness: 10, dtick: plan.step, outlinecolor: "@edge", tickcolor: "@edge" },
    };
    const category = { type: "category", showgrid: false, ticks: "" };
    const names = across ? { title: { text: "layer" } } : { tickangle: -60 };
    put(node, [trace], {
      height: across ? 110 + 30 * parts.length : 120 + 20 * layers.length,
      xaxis: { ...category, ...names },
      yaxis: { ...category, autorange: "reversed", ...(across ? {} : { title: { text: "layer" } }) },
    });
    planTable(plan, words);
  }

  const escaped = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

  function planTable(plan, words) {
    const table = document.createElement("table");
    element("caption", "Ranks of " + plan.whose, table);
    const head = element("tr", null, element("thead", null, table));
    element("th", "layer", head, { scope: "col" });
    plan.parts.forEach((part) => element("th", part, head, { scope: "col", class: "n" }));
    const body = element("tbody", null, table);
    plan.layers.forEach((layer, j) => {
      const row = element("tr", null, body);
      element("th", String(layer), row, { scope: "row" });
      plan.parts.forEach((_, i) => element("td", words[i][j], row, { class: "n" }));
    });
    byId("plan-table").replaceChildren(table);
  }

  function drawCurve(arm) {
    const node = byId("plot-curve"), curve = arm.curve;
    node.hidden = !curve;
    if (!curve) {
      byId("curve-about").textContent = "No reporting run has finished yet.";
      return;
    }
    const base = data.arms.find((other) => other.name === data.baseline && other !== arm && other.curve);
    byId("curve-about").textContent = "Training loss by optimizer step, mean over the seeds" +
      (curve.bx ? "; the band is their range" : "") + (base ? ". Dashed: the baseline, " + base.name : "") + ".";
    const traces = [];
    if (curve.bx) {
      traces.push({ type: "scatter", mode: "lines", fill: "toself", fillcolor: "@b:" + arm.look, line: { width: 0 },
        x: curve.bx.concat(curve.bx.slice().reverse()), y: curve.high.concat(curve.low.slice().reverse()), hoverinfo: "skip" });
    }
    if (base) {
      traces.push({ type: "scatter", mode: "lines", x: base.curve.x, y: base.curve.mean, name: "baseline",
        line: { color: "@muted", width: 1.4, dash: "dash" }, hovertemplate: "step %{x}: %{y:.4f}<extra>baseline</extra>" });
    }
    traces.push({ type: "scatter", mode: "lines+markers", x: curve.x, y: curve.mean, marker: { size: 4, color: "@s:" + arm.look },
      line: { color: "@s:" + arm.look, width: 2 }, hovertemplate: "step %{x}: %{y:.4f}<extra></extra>" });
    put(node, traces, { height: 300, xaxis: { title: { text: "optimizer step" } },
      yaxis: { title: { text: "training loss" } } });
  }

  function drawUse(arm) {
    const most = Math.max(...arm.use.map((row) => row[1]));
    put(byId("plot-allotted"), [
      { type: "scatter", mode: "lines", x: [0, most], y: [0, most], hoverinfo: "skip", line: { color: "@muted", dash: "dash", width: 1 } },
      { type: "scatter", mode: "markers", x: arm.use.map((row) => row[1]), y: arm.use.map((row) => row[2]), hoverinfo: "text",
        hovertext: arm.use.map((row) => escaped(row[0]) + "<br>allotted " + row[1] + ", used " + row[2]),
        marker: { color: "@s:" + arm.look, size: 6, opacity: 0.6 } },
    ], { height: 320, xaxis: { title: { text: "rank allotted" } }, yaxis: { title: { text: "rank used (stable rank)" } } });
  }

  function drawExamples(arm) {
    const rows = arm.differences;
    put(byId("plot-examples"), [{
      type: "bar", x: rows.map((_, i) => i + 1), y: rows, hovertemplate: "%{y:+.4f}<extra></extra>",
      marker: { color: rows.map((value) => (value < 0 ? "@gain" : "@loss")), line: { width: 0 } },
    }], { height: 260, bargap: 0, xaxis: { title: { text: "test rows, from the greatest gain to the greatest loss" } },
      yaxis: { title: { text: "difference of loss" }, zeroline: true, zerolinecolor: "@ink" } });
  }

  function fillExamples(arm) {
    byId("examples-about").textContent = arm.why || arm.told;
    const place = byId("examples");
    place.replaceChildren();
    for (const [title, rows] of [["Rows won most", arm.won], ["Rows lost most", arm.lost]]) {
      if (rows && rows.length) place.append(exampleTable(title, rows, arm.texts));
    }
  }

  function exampleTable(title, rows, texts) {
    const wide = element("div", null, null, { class: "wide", role: "region", tabindex: "0", "aria-label": title });
    const table = element("table", null, wide, { class: "examples" });
    element("caption", title + ": loss per token, arm minus baseline", table);
    const head = element("tr", null, element("thead", null, table));
    const told = rows.some(([hash]) => texts[hash]);
    for (const name of told ? ["row", "difference", "prompt", "response"] : ["row", "difference"]) {
      element("th", name, head, { scope: "col" });
    }
    const body = element("tbody", null, table);
    for (const [hash, value] of rows) {
      const row = element("tr", null, body);
      element("th", told ? hash.slice(0, 12) : hash, row, { scope: "row", title: hash, class: "hash" });
      element("td", (value > 0 ? "+" : "−") + Math.abs(value).toFixed(4), row, { class: "n" });
      for (const text of told ? texts[hash] || ["", ""] : []) element("td", text, row, { class: "text", dir: "auto" });
    }
    return wide;
  }

  // --- tables in another order ---------------------------------------------------------------

  const TURNS = { none: "ascending", ascending: "descending", descending: "none" };

  function valueOf(row, place) {
    const text = row.cells[place].textContent.trim();
    const number = text.replace(/−/g, "-").replace(/,/g, "").match(/^[+-]?\d+(\.\d+)?(e[+-]?\d+)?(?![-\w])/i);
    return number ? Number(number[0]) : text;
  }

  // Numbers before words; what has no value stays last in both directions.
  function compare(a, b) {
    if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
    return typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true });
  }

  function sort(heading) {
    const table = heading.closest("table"), body = table.tBodies[0], place = heading.cellIndex;
    const turn = TURNS[heading.getAttribute("aria-sort") || "none"];
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    const rows = Array.from(body.rows, (row, i) => {
      row.dataset.place = row.dataset.place ?? i;
      return { row, first: Number(row.dataset.place), value: valueOf(row, place) };
    });
    const sign = turn === "descending" ? -1 : 1;
    rows.sort((a, b) => {
      if (turn === "none") return a.first - b.first;
      const empty = (a.value === "") - (b.value === "");
      return empty || sign * compare(a.value, b.value) || a.first - b.first;
    });
    if (turn !== "none") heading.setAttribute("aria-sort", turn);
    body.append(...rows.map((one) => one.row));
  }

  for (const heading of document.querySelectorAll("table.sortable thead th")) {
    const words = heading.textContent;
    heading.replaceChildren();
    element("button", words, heading, { type: "button", class: "sort" });
  }

  // --- what a reader does --------------------------------------------------------------------

  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-all]");
    const row = event.target.closest("tr[data-arm]");
    const heading = event.target.closest("button.sort");
    if (heading) {
      sort(heading.parentElement);
    } else if (button) {
      for (const box of button.closest("fieldset").querySelectorAll("input")) box.checked = button.dataset.all === "yes";
      filter();
    } else if (row && !String(window.getSelection())) {
      open(Number(row.dataset.arm));
    }
  });
  for (const box of document.querySelectorAll("[data-filter] input")) box.addEventListener("change", filter);
  byId("plan-of").addEventListener("change", drawArm);
  byId("arm-close").addEventListener("click", () => byId("arm").close());
  byId("arm-previous").addEventListener("click", () => move(-1));
  byId("arm-next").addEventListener("click", () => move(1));
  byId("arm").addEventListener("click", (event) => {
    if (event.target === byId("arm")) byId("arm").close(); // the ground beside the dialog
  });
  byId("arm").addEventListener("close", () => { opened = null; });

  let waiting = 0, width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (printing || window.innerWidth === width) return;
    width = window.innerWidth;
    window.clearTimeout(waiting);
    waiting = window.setTimeout(redraw, calm.matches ? 0 : 120);
  });
  dark.addEventListener("change", redraw);
  window.addEventListener("beforeprint", () => { printing = true; redraw(); });
  window.addEventListener("afterprint", () => { printing = false; redraw(); });
  filter(); // a reload may have kept boxes as they were
  document.documentElement.dataset.ready = "yes";
})();
