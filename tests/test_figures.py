"""Pictures: the same bytes from the same rows, the rows' own numbers, readable text whatever the names."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from rankwise import figures
from rankwise.errors import RankwiseError
from rankwise.figures.look import LOOKS, canvas, shown
from rankwise.figures.rows import (
    Cost,
    Difference,
    ExampleDifferences,
    HeatCell,
    LossPoint,
    RankUse,
    RatePoint,
    SeriesPoint,
)
from rankwise.strategies import STRATEGIES

NAMES = ["uniform@r1", "spectral@r1", "eva@r4"]
HOSTILE = [
    "<script>alert(1)</script>", r"$\alpha_{", "_hidden", "long" * 60, "naïve Ω 中文 🚀", "%s {x} & \"q\"",
    "two\nlines \x1b[31m", "",
]  # fmt: skip
SVG = "{http://www.w3.org/2000/svg}"


def rows_of(names: list[str]) -> dict[str, tuple[Any, Any]]:
    """Every drawing function with rows of these arms; strategies go round."""
    known = ["uniform", "spectral", "eva", "random", "unheard-of"]
    arms = list(zip(names, itertools.cycle(known)))
    losses = [
        LossPoint(a, s, 305_280 * (1 + 3 * (i % 2)), 2 - i / 64, 1.97 - i / 64, 2.03 - i / 64, i == 1, i)
        for i, (a, s) in enumerate(arms)
    ]
    differences = [
        Difference(a, names[0], s, i / 100, i / 100 - 0.02, i / 100 + 0.02, 0.015, a, i % 2 == 0)
        for i, (a, s) in enumerate(arms)
    ]
    differences.append(
        Difference("gone", names[0], "gora", None, None, None, 0.015, "no verdict: a run failed", False)
    )
    curves = [
        SeriesPoint(a, s, x, 2 - i / 10 - x / 99, 1.9 - i / 10 - x / 99, 2.1 - i / 10 - x / 99, f"r={i % 2}")
        for i, (a, s) in enumerate(arms)
        for x in range(1, 12)
    ]
    rates = [
        RatePoint(a, s, rate, None if i and rate > 0.01 else 1.9 + i / 50 + rate, chosen=rate == 0.003)
        for i, (a, s) in enumerate(arms)
        for rate in (0.001, 0.003, 0.03)
    ]
    return {
        "losses": (figures.loss_against_parameters, losses),
        "differences": (figures.paired_differences, differences),
        "curves": (figures.training_curves, curves),
        "sizes": (figures.data_size, curves),
        "rates": (figures.learning_rates, rates),
        "heat": (figures.rank_heatmap, [HeatCell(i, a, i + 0.5, f"{i}") for i, a in enumerate(names)]),
        "use": (figures.rank_use, [RankUse(a, s, a, 4 + i, 2.5 + i) for i, (a, s) in enumerate(arms)]),
        "costs": (
            (figures.times, figures.memory),
            [Cost(a, s, 1.5, 60.25, 3.0, (i + 1) * 2**30) for i, (a, s) in enumerate(arms)],
        ),
        "examples": (
            figures.example_differences,
            ExampleDifferences(names[0], names[-1], (-0.3, -0.1, 0.0, 0.25), 2, 1, 3),
        ),
    }


KINDS = list(rows_of(NAMES))
IN_PDF = ("losses", "differences", "heat")  # writing one takes half a second


def drawn(kind: str, names: list[str] = NAMES, width: Any = "double") -> tuple[Figure, Any]:
    function, rows = rows_of(names)[kind]
    return figures.picture(function, rows, width), rows


def words(figure: Figure) -> list[str]:
    """The texts of a figure as drawn."""
    figure.draw_without_rendering()
    return [found.get_text() for found in figure.findobj(Text) if found.get_visible()]


def line(figure: Figure, label: str) -> Any:
    """The line that carries an arm's points."""
    return next(found for ax in figure.axes for found in ax.lines if found.get_label() == label)


# --- the same bytes --------------------------------------------------------------------------


DRAW_ALL = (
    "import sys; from pathlib import Path\n"
    "from rankwise.figures import picture, save\n"
    "from tests.test_figures import IN_PDF, NAMES, rows_of\n"
    "for kind, (draw, rows) in rows_of(NAMES).items():\n"
    "    formats = ['pdf', 'svg', 'png'] if kind in IN_PDF else ['svg', 'png']\n"
    "    save(picture(draw, rows), Path(sys.argv[1]) / kind, formats)\n"
    "assert 'matplotlib.pyplot' not in sys.modules\n"
)


def test_equal_rows_give_equal_bytes_in_fresh_processes(tmp_path: Path):
    for place, settings in (
        ("one", {"PYTHONHASHSEED": "1"}),
        ("two", {"PYTHONHASHSEED": "2", "TZ": "Asia/Tokyo"}),
    ):
        (tmp_path / place).mkdir()
        command = [sys.executable, "-c", DRAW_ALL, str(tmp_path / place)]
        root = Path(__file__).parent.parent
        subprocess.run(command, check=True, cwd=root, env={**os.environ, **settings})
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    kinds = [*itertools.product(KINDS, ("svg", "png")), *itertools.product(IN_PDF, ("pdf",))]
    assert files == sorted(f"{kind}.{format}" for kind, format in kinds)
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_the_users_own_settings_change_no_byte_and_stay(tmp_path: Path):
    figures.save(drawn("losses")[0], tmp_path / "losses", ["png"])
    plain = (tmp_path / "losses.png").read_bytes()
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red", "savefig.bbox": "tight"}):
        figures.save(drawn("losses")[0], tmp_path / "losses", ["png"])
        assert matplotlib.rcParams["font.size"] == 20
    assert (tmp_path / "losses.png").read_bytes() == plain


def test_saving_leaves_whole_files_or_says_why_not(tmp_path: Path):
    figure, _ = drawn("heat")
    assert figures.save(figure, tmp_path / "a.b", ["svg"]) == [tmp_path / "a.b.svg"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.b.svg"]
    with pytest.raises(RankwiseError, match="cannot be written"):
        figures.save(figure, tmp_path / "nowhere" / "heat")
    with pytest.raises(RankwiseError, match="format must be one of pdf, svg, png; got 'gif'"):
        figures.save(figure, tmp_path / "heat", ["gif"])
    with pytest.raises(RankwiseError, match="width must be one of single, double"):
        canvas("triple")  # type: ignore[arg-type]


# --- the rows' own numbers ---------------------------------------------------------------------


def test_losses_and_intervals_are_the_rows(tmp_path: Path):
    figure, rows = drawn("losses")
    ax = figure.axes[0]
    spans = [list(found.get_ydata()) for found in ax.lines]
    for row in rows:
        assert line(figure, row.arm).get_xydata().tolist() == [[row.parameters, row.loss]]
        assert [row.low, row.high] in spans
        assert ax.get_ylim()[0] < row.low < row.high < ax.get_ylim()[1]
    best = [[row.parameters, row.loss] for row in rows if row.frontier]
    assert line(figure, "frontier").get_xydata().tolist() == best
    assert {"1 failed", "2 failed"} <= set(words(figure))


def test_arms_of_equal_parameters_are_drawn_side_by_side():
    rows = [LossPoint(f"arm{i}", "eva", 1000, 2.0) for i in range(5)]
    figure = figures.picture(figures.loss_against_parameters, rows)
    figure.draw_without_rendering()
    places = [line(figure, row.arm).get_transform().transform((1000, 2.0))[0] for row in rows]
    inside = figure.axes[0].get_window_extent()
    assert min(np.diff(sorted(places))) * 72 / figure.dpi > 5  # points: a marker's width
    assert inside.x0 < min(places) and max(places) < inside.x1


@pytest.mark.parametrize("budgets", [1, 2, 3, 5])
def test_the_words_at_the_fewest_parameters_do_not_cross_the_axis(budgets: int):
    rows = [LossPoint("spectral@r1", "spectral", 305_280, 1.99, 1.95, 2.03, True)]
    rows += [LossPoint(f"uniform@{i}", "uniform", 305_280 * 2**i, 2 - i / 90) for i in range(budgets)]
    figure = figures.picture(figures.loss_against_parameters, rows, width="double")
    figure.draw_without_rendering()
    (label,) = (text for text in figure.findobj(Text) if text.get_text() == "spectral@r1")
    assert label.get_window_extent().x0 > figure.axes[0].get_window_extent().x0


def test_differences_are_the_rows_and_undecided_ones_are_hollow():
    figure, rows = drawn("differences")
    for place, row in enumerate(rows[:-1]):
        point = line(figure, row.arm)
        assert point.get_xydata().tolist() == [[row.mean, place]]
        assert (to_rgb(point.get_markerfacecolor()) == (1, 1, 1)) is not row.decided
    spans = [list(found.get_xdata()) for found in figure.axes[0].lines]
    assert all([row.low, row.high] in spans for row in rows[:-1])
    assert "gone" not in {found.get_label() for found in figure.axes[0].lines}
    assert {"gone", "no verdict: a run failed"} <= set(words(figure))
    (band,) = [p for p in figure.axes[0].patches if p.get_width() == pytest.approx(0.03)]
    assert (band.get_x(), band.get_x() + band.get_width()) == pytest.approx((-0.015, 0.015))


def test_without_a_margin_there_is_no_band():
    rows = [Difference("a", "b", "eva", 0.1, 0.05, 0.15, None, "no difference shown", True)]
    figure = figures.picture(figures.paired_differences, rows)
    assert not figure.axes[0].patches and not any("margin" in text for text in words(figure))


@pytest.mark.parametrize("width", ["single", "double"])
def test_failed_runs_are_told_beside_the_arm(width: Any):
    costs = [Cost(name, "eva", 1.0, 2.0, 3.0, 2**30, i) for i, name in enumerate(("whole", "long" * 20))]
    figure = figures.picture((figures.times, figures.memory), costs, width)
    figure.draw_without_rendering()
    whole, lost = (tick.get_text() for tick in figure.axes[0].get_yticklabels())
    assert whole == "whole" and lost.startswith("longlong") and lost.endswith("(1 failed)")
    curve = [SeriesPoint("a", "eva", x, 2.0 - x / 9, failed=2) for x in range(3)]
    use = [RankUse("a", "eva", "m", 4, 2.5, failed=2)]
    for draw, rows in ((figures.training_curves, curve), (figures.rank_use, use)):
        assert "a (2 failed)" in words(figures.picture(draw, rows, width))
    sizes = [SeriesPoint("a", "eva", x, 2.0, failed=int(x == 200)) for x in (100, 200)]
    figure = figures.picture(figures.data_size, sizes, width)
    (note,) = [text for text in figure.axes[0].texts if text.get_text() == "1 failed"]
    assert note.xy == (200, 2.0) and "a" in words(figure)  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["curves", "sizes", "rates"])
def test_curves_are_the_rows(kind: str):
    figure, rows = drawn(kind)
    for arm in NAMES:
        points = [[row.x, row.mean] for row in rows if row.arm == arm and row.mean is not None]
        assert line(figure, arm).get_xydata().tolist() == points
    if kind == "rates":
        crosses = [found for found in figure.axes[0].lines if found.get_marker() == "x"]
        assert [list(found.get_xdata()) for found in crosses] == [[0.03], [0.03]]
        assert "diverged" in words(figure)
        assert figure.axes[0].get_xlim()[1] > 0.03
    else:
        edges = {tuple(v) for band in figure.axes[0].collections for v in band.get_paths()[0].vertices}
        assert {(r.x, e) for r in rows for e in (r.low, r.high)} <= edges


def test_cells_bars_and_points_are_the_rows():
    figure, rows = drawn("heat")
    grid = figure.axes[0].images[0].get_array()
    assert [grid[i, i] for i in range(3)] == [row.rank for row in rows]
    assert np.ma.count(grid) == 3  # what the plan does not name stays empty
    figure, rows = drawn("use")
    assert [line(figure, r.arm).get_xydata().tolist() for r in rows] == [[[r.allotted, r.used]] for r in rows]
    figure, rows = drawn("costs")
    widths = [bar.get_width() for bar in figure.axes[0].patches]
    assert widths == [1.5] * 3 + [60.25] * 3 + [3.0] * 3
    assert [line(figure, row.arm).get_xdata()[0] for row in rows] == [1, 2, 3]  # GiB
    figure, rows = drawn("examples")
    assert tuple(bar.get_height() for bar in figure.axes[0].patches) == rows.differences
    assert {"2 rows better, mean of 3 seeds", "1 rows worse, mean of 3 seeds"} <= set(words(figure))


# --- to be read ------------------------------------------------------------------------------


def test_every_strategy_has_a_look_of_its_own():
    assert set(LOOKS) == set(STRATEGIES)
    assert len({marker for _, marker in LOOKS.values()}) == len(LOOKS)  # so black and white will do
    for control in ("uniform", "random", "reversed", "weight_spectrum"):
        assert len(set(to_rgb(LOOKS[control][0]))) == 1  # grey


@pytest.mark.parametrize("width", ["single", "double"])
@pytest.mark.parametrize("kind", KINDS)
def test_pictures_have_their_size_are_not_blank_and_clip_no_text(kind: str, width: Any, tmp_path: Path):
    figure, _ = drawn(kind, width=width)
    (path,) = figures.save(figure, tmp_path / kind, ["png"])
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("L"), dtype=float)
    assert pixels.shape[1] == {"single": 670, "double": 1380}[width]
    assert pixels.std() > 5
    assert all(ax.xaxis.label.get_text() or ax.yaxis.label.get_text() for ax in figure.axes)
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert (edge == 255).all()


@pytest.mark.parametrize("width", ["single", "double"])
def test_names_of_46_arms_do_not_touch(width: Any):
    names = [f"a-rather-long-name-of-an-arm-{i}@r4" for i in range(46)]
    for kind in ("differences", "costs"):
        figure, _ = drawn(kind, names, width)
        figure.draw_without_rendering()
        boxes = sorted((t.get_window_extent() for t in figure.axes[0].get_yticklabels()), key=lambda b: b.y0)
        assert len(boxes) >= 46
        assert all(a.y1 <= b.y0 + 0.5 for a, b in itertools.pairwise(boxes)), kind
    figure, _ = drawn("curves", names, width)
    figure.draw_without_rendering()
    (key,) = figure.legends or [figure.axes[0].get_legend()]
    box = key.get_window_extent()
    assert len(key.get_texts()) >= 46
    assert box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    plot = figure.axes[0].get_window_extent()
    assert plot.height / figure.dpi > 1.2 and plot.width / figure.dpi > 1.2


def test_pdf_embeds_truetype_and_carries_no_date(tmp_path: Path):
    (path,) = figures.save(drawn("differences")[0], tmp_path / "differences", ["pdf"])
    content = path.read_bytes()
    assert b"/FontFile2" in content and b"/CIDFontType2" in content  # Type 42: TrueType as it is
    assert b"/Type3" not in content and b"/CreationDate" not in content
    width, height = (float(x) for x in re.search(rb"/MediaBox \[ ?0 0 (\S+) (\S+)", content).groups())  # type: ignore[union-attr]
    assert width == pytest.approx(6.9 * 72, abs=0.1) and height > 72


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_names_are_drawn_as_text(kind: str, tmp_path: Path):
    figure, _ = drawn(kind, HOSTILE)
    _, path, _ = figures.save(figure, tmp_path / kind)
    drawn_texts = [text for text in figure.findobj(Text) if text.get_text()]
    assert len(drawn_texts) > 5 and not any(text.get_parse_math() for text in drawn_texts)
    root = ElementTree.parse(path).getroot()  # is XML, whatever the names held
    assert not [tag for tag in root.iter() if "script" in tag.tag]
    text = " ".join("".join(tag.itertext()).strip() for tag in root.iter(f"{SVG}text"))
    wanted = {"losses": ["$\\alpha_{"], "examples": ["<script>"]}.get(
        kind, ["<script>al", "$\\alpha_{", "_hidden"]
    )
    assert all(part in text for part in wanted)


def test_long_names_keep_both_ends_and_control_characters_are_written_out():
    assert shown("short@r1") == "short@r1"
    assert shown("x\ny\x1b") == r"x\ny\x1b"
    long = shown("begin-" + "x" * 200 + "-end@r4", 20, 2)
    assert long.startswith("begin-") and long.endswith("-end@r4") and "…" in long
    for name in (*HOSTILE, "words that break " * 9, "a" * 41):
        pieces = shown(name, 20, 2).split("\n")
        assert len(pieces) <= 2 and all(0 < len(piece) <= 20 for piece in pieces)
