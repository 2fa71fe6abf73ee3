"""The page: a study's tables, pictures and settings put into one HTML file that asks nobody for anything.

Its policy (Content-Security-Policy) forbids every connection and every script but the three that are written
here, named by their hashes: a word of the data that slipped through as markup would still not run.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from rankwise.advice import Recommendation
from rankwise.aside import replacing
from rankwise.errors import RankwiseError, visible
from rankwise.figuretables import strategy_of
from rankwise.recommend import recommend
from rankwise.report import opening, settings
from rankwise.report.columns import Column, runs_table
from rankwise.report.details import arm_details, budget_of
from rankwise.report.marks import DASHES, known, outline, palette
from rankwise.report.pictures import pictures
from rankwise.report.results import contrast_lines, ladder_lines, result_lines
from rankwise.report.traces import Picture
from rankwise.tables import Results

TEMPLATES = Path(__file__).parent.parent / "templates"
DASH_ARRAYS = {"solid": "", "dash": "5 3", "dot": "1.5 2.5", "dashdot": "6 2 1.5 2", "longdash": "10 3"}


def write_report(
    results: Results,
    out: Path,
    *,
    data_text: Mapping[str, tuple[str, str]] | None = None,
    by_size: Mapping[int, Results] | None = None,
    settled: Sequence[str] = (),
) -> Path:
    """Write a study's report, one self-contained HTML file, in one step.

    Args:
        results: The study, finished or not.
        out: The file; its folder is made if it is missing.
        data_text: Row hash -> (prompt, response), for a report that stays on one's own machine; without it
            row hashes alone appear.
        by_size: Training rows -> the study with so many of them, for curves over the amount of data.
        settled: What `datasizes.sentences` says of `by_size`: the answer, then its account.

    Returns:
        `out`.

    Raises:
        RankwiseError: the file cannot be written.

    Cost: about 5 MB, nearly all of it plotly.js; some 20 ms per finished run, for its plan and its rows.
    """
    text = page(results, data_text=data_text, by_size=by_size, settled=settled)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as aside:
            aside.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise RankwiseError(f"the report cannot be written to {out}: {error.strerror or error}.") from error
    return out


def page(
    results: Results,
    *,
    data_text: Mapping[str, tuple[str, str]] | None = None,
    by_size: Mapping[int, Results] | None = None,
    settled: Sequence[str] = (),
) -> str:
    """Return the report's HTML; arguments are those of `write_report`."""
    drawn = pictures(results, by_size)
    answer = recommend(results) if results.config.ladders else None
    scripts = {"plotly": _plotly(), "program": _template_text("report.js")}
    context = {
        "config": results.config,
        "verdict": _verdict(results, answer, settled),
        "state": opening.state(results),
        "newest": _newest(results),
        "result": result_lines(results),
        "notes": opening.notes(results),
        "contrasts": contrast_lines(results),
        "ladders": None if answer is None else ladder_lines(answer),
        "account": [] if answer is None else answer.sentences()[1:],
        "order": list(settled[1:]),
        "pictures": drawn,
        "filters": _filters(results),
        "variants": _variants(results),
        "warnings": opening.warnings(results),
        "methods": settings.METHODS,
        "settings": settings.settings(results),
        "resolved": settings.resolved(results),
        "machines": settings.machines(results),
        "yaml": settings.study_yaml(results.config),
        "commands": settings.commands(results),
        "runs": _runs(results),
        "own_eyes": data_text is not None,
        "style": _template_text("report.css"),
        "policy": _policy(scripts.values()),
        "payload": _embedded(_payload(results, drawn, data_text)),
        **scripts,
    }
    return _environment().get_template("report.html.j2").render(context)


def _verdict(results: Results, answer: Recommendation | None, settled: Sequence[str]) -> list[str]:
    """Return one sentence for each question that the study asks: a ladder, sizes of data, contrasts.

    What each rests on has a section of its own, so that the table is not far below.
    """
    found = [*([] if answer is None else [answer.sentence()]), *settled[:1]]
    return found if found and not results.config.contrasts else [*found, opening.opening(results)]


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=_shown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _shown(value: Any) -> Any:
    """Write out control characters of text, line breaks aside, before it is escaped."""
    return "\n".join(map(visible, value.split("\n"))) if type(value) is str else value


def _template_text(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _plotly() -> str:
    """Return plotly.js so that neither an end of script nor a comment in it ends the element."""
    from plotly.offline import get_plotlyjs

    text = get_plotlyjs().replace("\r\n", "\n").replace("\r", "\n")
    return re.sub(r"<(?=/script|!--)", r"\\x3c", text, flags=re.IGNORECASE)


def _policy(scripts: Any) -> str:
    hashes = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts)
    sources = " ".join(f"'sha256-{name}'" for name in hashes)
    return (
        f"default-src 'none'; script-src {sources}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def _embedded(value: Any) -> str:
    """Return JSON that an HTML parser cannot mistake for markup."""
    # In ASCII, as half a surrogate pair, which JSON data may hold, has no UTF-8.
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.translate({ord(c): f"\\u{ord(c):04x}" for c in "<>&"})


def _payload(
    results: Results, drawn: Sequence[Picture], data_text: Mapping[str, tuple[str, str]] | None
) -> dict[str, Any]:
    return {
        "palette": palette(),
        "baseline": results.config.baseline,
        "arms": [_written_out(arm, leave=("texts",)) for arm in arm_details(results, data_text)],
        "pictures": [{"key": p.key, "traces": p.traces, "layout": p.layout, "lines": p.lines} for p in drawn],
    }


def _written_out(value: Any, leave: Sequence[str] = ()) -> Any:
    """Return the value with control characters of its texts written out, those under `leave` aside."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, Mapping):
        return {k: v if k in leave else _written_out(v) for k, v in value.items()}
    return [_written_out(v) for v in value] if isinstance(value, list | tuple) else value


def _newest(results: Results) -> str:
    """Return when the newest record was made; a page says so in place of the time it was written at."""
    times = ((r.get("run_info") or {}).get("created_at") for r in results.records.values())
    newest = max((time for time in times if time), default="")
    return newest[:16].replace("T", " ") + (" UTC" if newest.endswith(("+0000", "Z")) else "")


def _filters(results: Results) -> list[dict[str, Any]]:
    """Return the groups of boxes: strategies with their markers, budgets with their dashes."""
    strategies = dict.fromkeys(strategy_of(results, arm) for arm in results.config.arms)
    budgets = dict.fromkeys(budget_of(results, arm) for arm in results.config.arms)
    marks = [{"name": s, "look": known(s), "path": outline(s)} for s in strategies]
    lines = [{"name": b, "dash": DASH_ARRAYS[DASHES[i % len(DASHES)]]} for i, b in enumerate(budgets)]
    return [{"key": "strategy", "title": "Strategy", "choices": marks},
            {"key": "budget", "title": "Budget", "choices": lines}]  # fmt: skip


def _variants(results: Results) -> list[str]:
    """Return the sentences that tell which markers are hollow."""
    looks = ("hollow", "hollow with a dot", "full with a dot")
    scales = list(dict.fromkeys(str(a.scale) for a in results.config.arms.values() if a.scale is not None))
    return [
        f"{look}: scale {' or '.join(scales[i :: len(looks)])}" for i, look in enumerate(looks[: len(scales)])
    ]


def _runs(results: Results) -> tuple[list[Column], list[list[str]]]:
    names = ("run_id", "arm", "role", "seed", "rate", "state")
    table = runs_table(results)
    places = [i for i, column in enumerate(table.columns) if column.name in names]
    columns = [table.columns[i] for i in places]
    return columns, [[c.shown(row[i]) for c, i in zip(columns, places, strict=True)] for row in table.rows]
