"""The report in Chromium: it draws, filters and opens, asks nobody, runs no data, and all can use it."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from rankwise.observer import Observer
from rankwise.report import write_report
from rankwise.store import Store
from rankwise.study import open_study, run_study
from rankwise.tables import Results
from tests.conftest import alpaca_rows, byte_tokenizer
from tests.made_up import DATA_TEXT, EVIL, ROOT, TEX, made_up

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER), reason="needs chromium and chromedriver on the PATH"
)
AXE = "axe-core@4.14.1"
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
REAL = ("adalora_rate", "strategies")
PHONE, DESK = (375, 800), (1280, 900)
COUNT_ALERTS = "window.alerts = []; window.alert = (text) => window.alerts.push(text);"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(CHROMEDRIVER))
    found.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": COUNT_ALERTS})
    yield found
    found.quit()


def quickstart(folder: Path) -> Results:
    """The quickstart's own file, run whole, on a tiny model and few rows (its records are in no checkout)."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=264, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, eos_token_id=257, pad_token_id=258,
        )
    )  # fmt: skip
    model.save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    (folder / "rows.json").write_text(json.dumps(alpaca_rows(60)))
    small = ("train=8", "validation=4", "test=6", "reserved=4", "max_length=128")
    overrides = [f"model=file:{folder / 'model'}", f"data.source=file:{folder / 'rows.json'}"]
    overrides += [*(f"data.{size}" for size in small), "train.threads=1", "train.dtype=fp32"]
    study = open_study(ROOT / "studies" / "quickstart.yaml", folder / "results", tuple(overrides))
    run_study(study, Observer())
    return Results(study.store)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Reports of committed records, of the quickstart, and of a study whose names are code elsewhere."""
    folder = tmp_path_factory.mktemp("pages")
    found = {
        name: write_report(Results(Store(ROOT / "results", name)), folder / f"{name}.html") for name in REAL
    }
    found["quickstart"] = write_report(quickstart(folder), folder / "quickstart.html")
    made = made_up(
        folder, failed={TEX: 2}, ladders={"uniform": ["uniform", "spectral"], EVIL: ["spectral", TEX]}
    )
    settled, out = ("The order settles.", "From 4 rows on it is the same."), folder / "made-up.html"
    found["made-up"] = write_report(made, out, data_text=DATA_TEXT, settled=settled)
    return found


def opened(browser: Any, page: Path, size: tuple[int, int] = DESK, mode: str = "light") -> Any:
    """Open a page at a size and in a mode, and wait until it has drawn everything."""
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size is PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": mode}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get(page.as_uri())
    ready = "return document.documentElement.dataset.ready === 'yes'"
    WebDriverWait(browser, 60).until(lambda b: b.execute_script(ready))
    return browser


def faults(browser: Any) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def requests(browser: Any) -> list[str]:
    """Every address that the page asked for, since it was opened."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]


def shown_rows(browser: Any) -> list[str]:
    script = """return Array.from(document.querySelectorAll('[aria-label="Result table"] tr[data-arm]'))
        .filter((row) => row.getBoundingClientRect().height > 0)
        .map((row) => row.querySelector('button').textContent)"""
    return browser.execute_script(script)


def marks(browser: Any, plot: str) -> int:
    """How many drawn marks of a picture have a box: points, lines, bars, heatmaps, words."""
    script = """return Array.from(document.querySelectorAll(arguments[0] +
        ' :is(.points path, path.js-line, .bars path, image, .textpoint text)'))
        .map((mark) => mark.getBoundingClientRect())
        .filter((box) => box.width + box.height > 0).length"""
    return browser.execute_script(script, f"#plot-{plot}")


def colours(browser: Any, plot: str) -> int:
    """How many colours the picture's screenshot has."""
    from PIL import Image

    node = browser.find_element(By.ID, f"plot-{plot}")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", node)
    image = Image.open(io.BytesIO(base64.b64decode(node.screenshot_as_base64))).convert("RGB")
    return len(image.getcolors(maxcolors=1 << 24))


def plots(browser: Any) -> list[str]:
    script = "return Array.from(document.querySelectorAll('figure .plot'), (p) => p.id.slice(5))"
    return browser.execute_script(script)


def open_arm(browser: Any, place: int) -> None:
    browser.execute_script(
        "document.querySelector('#result [data-open=\"' + arguments[0] + '\"]').click()", place
    )
    assert browser.execute_script("return document.getElementById('arm').open")


# --- every report ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*REAL, "quickstart", "made-up"])
@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_it_opens_without_a_fault_or_a_request_and_draws(
    name: str, size: tuple[int, int], browser: Any, pages: dict[str, Path]
):
    opened(browser, pages[name], size)
    drawn = plots(browser)
    wanted = "losses" if name == "quickstart" else "rates"  # it has one rate, which is not tuned
    assert wanted in drawn and all(marks(browser, plot) for plot in drawn)
    assert all(colours(browser, plot) > 20 for plot in drawn)
    open_arm(browser, 0)
    assert marks(browser, "plan") == 1 and colours(browser, "plan") > 20
    page_wide, window_wide = browser.execute_script(
        "return [document.documentElement.scrollWidth, innerWidth]"
    )
    assert page_wide <= window_wide == size[0]
    asked = requests(browser)
    assert asked and all(address.startswith(("file:", "data:", "blob:")) for address in asked)
    assert faults(browser) == [] and browser.execute_script("return window.alerts") == []


@pytest.mark.parametrize(
    ("mode", "name"),  # strategies has 42 arms, half a minute; the dark colours are seen on the others
    [("light", "strategies"), *product(("light", "dark"), ("adalora_rate", "quickstart", "made-up"))],
)
def test_axe_finds_no_serious_fault(name: str, mode: str, browser: Any, pages: dict[str, Path], axe: str):
    for size in (PHONE, DESK):
        opened(browser, pages[name], size, mode)
        script = "document.querySelectorAll('details').forEach((one) => { one.open = true; })"
        browser.execute_script(script)
        for place in ("the page", "an arm"):
            if place == "an arm":
                open_arm(browser, 1)
            assert serious(browser, axe) == [], place


def serious(browser: Any, axe: str) -> list[str]:
    browser.execute_script(axe)
    found = browser.execute_async_script(
        "axe.run().then(arguments[0], (why) => arguments[0]({error: String(why)}))"
    )
    assert "error" not in found and len(found["passes"]) > 15, found
    return [
        f"{fault['id']}: {node['html'][:150]} {node['failureSummary'][:200]}"
        for fault in found["violations"]
        if fault["impact"] in ("serious", "critical")
        for node in fault["nodes"]
    ]


@pytest.fixture(scope="session")
def axe() -> str:
    """axe-core's program, fetched once by npm into a cache outside the repository."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rankwise-tests"
    packed = folder / (AXE.replace("@", "-") + ".tgz")
    if not packed.exists():
        npm = shutil.which("npm")
        if npm is None:
            pytest.skip("needs npm, to fetch axe-core")
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run([npm, "pack", AXE], cwd=folder, capture_output=True, text=True, timeout=120)
        if done.returncode or not packed.exists():
            pytest.skip(f"npm cannot fetch {AXE}: {done.stderr[-200:]}")
    with tarfile.open(packed) as archive:
        program = archive.extractfile("package/axe.min.js")
        assert program is not None
        return program.read().decode()


def test_dark_and_light_are_followed_while_the_page_is_open(browser: Any, pages: dict[str, Path]):
    opened(browser, pages["made-up"])
    paper = (
        "return [getComputedStyle(document.body).backgroundColor,"
        " getComputedStyle(document.querySelector('#plot-losses .main-svg')).backgroundColor]"
    )
    assert browser.execute_script(paper) == ["rgb(255, 255, 255)"] * 2
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    WebDriverWait(browser, 10).until(lambda b: b.execute_script(paper) == ["rgb(23, 26, 31)"] * 2)
    # On paper it is light again, and as wide as paper.
    browser.execute_script("window.dispatchEvent(new Event('beforeprint'))")
    assert browser.execute_script(paper)[1] == "rgb(255, 255, 255)"
    wide = "return document.querySelector('#plot-losses .main-svg').getBoundingClientRect().width"
    assert browser.execute_script(wide) == 690
    browser.execute_script("window.dispatchEvent(new Event('afterprint'))")
    assert browser.execute_script(paper)[1] == "rgb(23, 26, 31)"


# --- filters and clicks ----------------------------------------------------------------------------


def tick(browser: Any, group: str, value: str) -> None:
    boxes = browser.find_elements(By.CSS_SELECTOR, f'[data-filter="{group}"] input')
    next(box for box in boxes if box.get_attribute("value") == value).click()


def test_the_filters_act_on_table_and_pictures(browser: Any, pages: dict[str, Path]):
    opened(browser, pages["strategies"])
    everyone = shown_rows(browser)
    assert len(everyone) == 42
    before = marks(browser, "rates")
    tick(browser, "budget", "r=4")
    assert len(shown_rows(browser)) == 21 and browser.find_element(By.ID, "shown").text == "21 of 42"
    assert 0 < marks(browser, "rates") < before
    tick(browser, "strategy", "spectral")
    assert len(shown_rows(browser)) == 18  # spectral under three scale rules
    browser.find_element(By.CSS_SELECTOR, '[data-filter="strategy"] [data-all="no"]').click()
    assert shown_rows(browser) == [] and not browser.find_element(By.ID, "plot-rates").is_displayed()
    assert browser.find_element(By.ID, "none-rates").is_displayed()
    for group in ("strategy", "budget"):
        browser.find_element(By.CSS_SELECTOR, f'[data-filter="{group}"] [data-all="yes"]').click()
    assert shown_rows(browser) == everyone and marks(browser, "rates") == before
    assert faults(browser) == []


def column(browser: Any, heading: str) -> list[str]:
    """The shown cells of the arms' table below this heading."""
    return browser.execute_script(
        """
        const table = document.querySelector("tr[data-arm]").closest("table");
        const at = [...table.tHead.rows[0].cells].findIndex((cell) => cell.textContent === arguments[0]);
        const shown = [...table.tBodies[0].rows].filter((row) => !row.hidden);
        return shown.map((row) => row.cells[at].textContent.trim());
        """,
        heading,
    )


def test_a_click_on_a_heading_sorts_the_table(browser: Any, pages: dict[str, Path]):
    opened(browser, pages["strategies"])
    table = browser.find_element(By.CSS_SELECTOR, "tr[data-arm]").find_element(By.XPATH, "ancestor::table")
    first = column(browser, "loss")
    button = next(b for b in table.find_elements(By.CSS_SELECTOR, "button.sort") if b.text == "loss")
    heading = button.find_element(By.XPATH, "..")
    orders = []
    for told in ("ascending", "descending", None):
        button.send_keys(Keys.ENTER)
        assert heading.get_attribute("aria-sort") == told
        orders.append([float(loss) for loss in column(browser, "loss")])
    assert orders[0] == sorted(orders[0]) and orders[1] == orders[0][::-1] != orders[0]
    assert column(browser, "loss") == first
    arm = next(b for b in table.find_elements(By.CSS_SELECTOR, "button.sort") if b.text == "arm")
    arm.click()
    names = column(browser, "arm")
    assert names == sorted(names)
    tick(browser, "budget", "r=4")
    assert column(browser, "arm") == [name for name in names if "@r4" not in name]


def test_a_click_on_a_point_or_a_row_opens_the_arm(browser: Any, pages: dict[str, Path]):
    opened(browser, pages["made-up"])
    title = browser.find_element(By.ID, "arm-title")
    point = browser.find_elements(By.CSS_SELECTOR, "#plot-losses .points path")[1]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", point)
    webdriver.ActionChains(browser).move_to_element(point).pause(0.3).click().perform()
    WebDriverWait(browser, 10).until(lambda _: title.is_displayed())
    assert title.text == "spectral"
    for plot in ("plan", "curve", "allotted", "examples"):
        assert marks(browser, plot) and colours(browser, plot) > 20, plot
    assert browser.find_elements(By.CSS_SELECTOR, "#examples tbody tr")
    browser.find_element(By.ID, "arm-close").click()
    assert not title.is_displayed()
    row = browser.find_element(By.CSS_SELECTOR, '#result tr[data-arm="3"] td')
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", row)
    row.click()
    assert title.text == TEX
    browser.find_element(By.ID, "arm-next").click()
    assert title.text == "uniform" and "is the baseline" in browser.find_element(By.ID, "examples-about").text


def test_everything_can_be_done_by_keyboard(browser: Any, pages: dict[str, Path]):
    opened(browser, pages["made-up"])
    dialog, title = browser.find_element(By.ID, "arm"), browser.find_element(By.ID, "arm-title")
    picture = browser.find_element(By.ID, "plot-losses")
    picture.send_keys(Keys.ARROW_RIGHT)
    told = browser.find_element(By.ID, "told")
    assert told.get_attribute("textContent").startswith("uniform, ")
    picture.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert told.get_attribute("textContent").startswith(EVIL)
    picture.send_keys(Keys.ENTER)
    assert dialog.get_attribute("open") and title.text == EVIL
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not dialog.get_attribute("open") and browser.switch_to.active_element == picture
    name = browser.find_element(By.CSS_SELECTOR, '#result [data-open="1"]')
    name.send_keys(Keys.ENTER)
    assert dialog.get_attribute("open") and title.text == "spectral"
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert browser.switch_to.active_element == name
    box = browser.find_element(By.CSS_SELECTOR, '[data-filter="strategy"] input')
    box.send_keys(Keys.SPACE)
    assert len(shown_rows(browser)) == 3
    outline = "return getComputedStyle(document.activeElement).outlineStyle"
    assert browser.execute_script(outline) == "solid"


# --- data are text ---------------------------------------------------------------------------------


def test_data_and_names_that_are_code_elsewhere_show_as_text(browser: Any, pages: dict[str, Path]):
    opened(browser, pages["made-up"])
    assert [EVIL, TEX] == shown_rows(browser)[2:]
    labels = browser.execute_script(
        "return Array.from(document.querySelectorAll('#plot-baseline .ytick text'), (t) => t.textContent)"
    )
    assert any(EVIL in label for label in labels)
    assert any("$x^2$" in label for label in labels)
    open_arm(browser, 1)
    cells = browser.find_elements(By.CSS_SELECTOR, "#examples td.text")
    found = {cell.get_attribute("textContent") for cell in cells}
    assert found == {text for pair in DATA_TEXT.values() for text in pair}
    assert cells[0].text.startswith(EVIL)
    parts = browser.execute_script(
        "return Array.from(document.querySelectorAll('#plot-plan .ytick text'), (t) => t.textContent)"
    )
    assert set(parts) == {"q", "v<b>"}
    assert browser.execute_script("return document.scripts.length") == 3
    assert browser.execute_script("return window.alerts") == [] and faults(browser) == []


def test_the_ladders_account_lies_below_the_table(browser: Any, pages: dict[str, Path]):
    opened(browser, pages["made-up"], PHONE)
    lies = "return document.querySelector(arguments[0]).getBoundingClientRect().top"
    order = "header .verdict|nav|#result table|#ladders table|#ladders li|#order|#pictures".split("|")
    tops = [browser.execute_script(lies, place) for place in order]
    assert tops == sorted(tops)
    browser.find_element(By.LINK_TEXT, "Recommendation").click()
    assert abs(browser.execute_script(lies, "#ladders")) < 2
    tick(browser, "strategy", "spectral")  # the filter acts on its table too
    rows = browser.find_elements(By.CSS_SELECTOR, "#ladders tbody tr")
    plans = [row.get_attribute("textContent").split()[0] for row in rows]
    assert [row.is_displayed() for row in rows] == [plan != "spectral" for plan in plans]
    assert plans.count("spectral") == 2
    browser.find_element(By.CSS_SELECTOR, '#ladders [data-open="0"]').click()
    assert browser.find_element(By.ID, "arm-title").text == "uniform"
    assert EVIL in browser.find_element(By.ID, "ladders").get_attribute("textContent")
    assert browser.execute_script("return window.alerts") == [] and faults(browser) == []


def test_the_policy_stops_a_script_and_a_connection_that_got_in(browser: Any, pages: dict[str, Path]):
    opened(browser, pages["made-up"])
    browser.execute_script(
        "const s = document.createElement('script'); s.textContent = 'alert(3)'; document.body.append(s);"
        "const i = document.createElement('img'); i.src = 'https://example.org/x'; document.body.append(i);"
    )
    assert browser.execute_script("return window.alerts") == []
    refused = browser.execute_async_script(
        "fetch('https://example.org/').then(() => arguments[0](false), () => arguments[0](true))"
    )
    assert refused and any("Content Security Policy" in fault for fault in faults(browser))
