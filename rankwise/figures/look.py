"""How every figure looks: fonts, widths, one colour and marker per strategy; and how it is saved.

Colours are those of Okabe and Ito, "Color Universal Design" (2008), https://jfly.uni-koeln.de/color/,
without the yellow, which is too pale for a thin line on white. Controls are grey. Strategies that share a
colour differ in the marker, and no marker is used twice, so that pictures can be read in black and white.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text

from rankwise.aside import replacing
from rankwise.errors import RankwiseError, one_of, visible

P = ParamSpec("P")
R = TypeVar("R")

Width = Literal["single", "double"]
WIDTHS: dict[Width, float] = {"single": 3.35, "double": 6.9}
"""Inches: one and two columns of a paper."""

FORMATS = ("pdf", "svg", "png")

ORANGE, SKY, GREEN, BLUE = "#E69F00", "#56B4E9", "#009E73", "#0072B2"
VERMILLION, PURPLE, BLACK, GREY = "#D55E00", "#CC79A7", "#000000", "#767676"
Look = tuple[str, Any]
LOOKS: dict[str, Look] = {
    "uniform": ("#404040", "o"),
    "random": ("#767676", "X"),
    "reversed": ("#8C8C8C", "P"),
    "weight_spectrum": ("#9E9E9E", (5, 0, 180)),
    "custom": (BLACK, "8"),
    "linear_decay": (ORANGE, "v"),
    "linear_growth": (SKY, "^"),
    "attention_heavy": (GREEN, "<"),
    "attention_only": (PURPLE, ">"),
    "mlp_only": (VERMILLION, "H"),
    "empirical": (BLUE, "h"),
    "spectral": (BLUE, "s"),
    "eva": (VERMILLION, "D"),
    "gora": (GREEN, "p"),
    "fisher": (PURPLE, "*"),
    "lora_drop": (ORANGE, "d"),
    "adalora": (SKY, (4, 1, 0)),
    "sensitivity": (ORANGE, (3, 1, 0)),
    "grow_prune": (BLUE, (6, 1, 0)),
    "shrink": (VERMILLION, (4, 1, 45)),
}
"""Strategy -> colour and marker, the same in every picture. One that is not named here is a grey dot."""

STRANGER: Look = (GREY, ".")
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.2, 1, 1.2)), (0, (8, 2)))
FILLS = ("none", "left", "bottom", "right", "top")
KEY_WIDTH = 25
"""Characters of a line of the key: two columns of them fit a narrow figure."""
LINE = 0.17
"""Inches of height that one line of a list takes."""

RC: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 7,
    "axes.titlesize": 7.5,
    "axes.labelsize": 7,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "legend.fontsize": 6.5,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "legend.labelspacing": 0.35,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.0,
    "lines.markersize": 4.5,
    "hatch.linewidth": 0.4,
    "axes.formatter.useoffset": False,
    # Names come from people and files: a $ in one is a $, never mathematics or TeX.
    "text.parse_math": False,
    "text.usetex": False,
    "axes.formatter.use_mathtext": False,
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
    "svg.fonttype": "none",
    "savefig.dpi": 200,
    "savefig.facecolor": "white",
}


@contextmanager
def style() -> Iterator[None]:
    """Draw in rankwise's style within this context, whatever the user's own settings; then restore them."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(RC)
        yield


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Return the function, run in `style()`."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> R:
        with style():
            return draw(*args, **kwargs)

    return drawn


def look_of(strategy: str) -> dict[str, Any]:
    """Return the strategy's colour and marker as arguments of `Axes.plot`."""
    colour, marker = LOOKS.get(strategy, STRANGER)
    return {"color": colour, "marker": marker, "markeredgewidth": 0.7}


def hollow(look: dict[str, Any]) -> dict[str, Any]:
    """Return the look with a white inside."""
    return {**look, "markerfacecolor": "white"}


@styled
def canvas(width: Width = "double", height: float = 2.6, panels: int = 1) -> tuple[Figure, list[Axes]]:
    """Return an empty figure (height in inches) and its panels, side by side with one vertical axis."""
    if width not in WIDTHS:
        raise RankwiseError(one_of("width", width, WIDTHS))
    figure = Figure(figsize=(WIDTHS[width], height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, sharey=panels > 1, squeeze=False)
    return figure, list(axes[0])


def narrow(ax: Axes) -> bool:
    """Whether the axes' figure has one column's width."""
    return float(ax.get_figure(root=True).get_size_inches()[0]) < 5  # type: ignore[union-attr]


def shown(name: str, width: int = 34, lines: int = 2) -> str:
    """Return a name as it is drawn: control characters written out, wrapped, its middle left out if long.

    `width` is in characters of a line; there are at most `lines`.
    """
    text = " ".join(visible(name).split(" "))
    room = width * lines
    if len(text) > room:
        text = f"{text[: room // 2]}…{text[len(text) - room // 2 + 1 :]}"
    wrapped = textwrap.wrap(text, width, break_on_hyphens=False)
    if len(wrapped) > lines:  # the words break badly, so it is cut where the line ends
        wrapped = [text[i : i + width] for i in range(0, len(text), width)]
    return "\n".join(wrapped) or "(no name)"


def marked(arm: str, failed: int) -> str:
    """Return an arm's name as a picture shows it: with its failed runs, where it has some."""
    return f"{arm} ({failed} failed)" if failed else arm


def fills(variants: Iterable[str]) -> dict[str, str]:
    """Return variant -> the marker's fill: full for none, else hollow or half full, in the order given."""
    named = [variant for variant in dict.fromkeys(variants) if variant]
    return {"": "full"} | {variant: FILLS[i % len(FILLS)] for i, variant in enumerate(named)}


def key(ax: Axes, entries: Sequence[tuple[Any, str]], title: str | None = None) -> None:
    """Draw the legend: right of wide axes, below narrow ones, so that it hides no point."""
    handles, names = [e[0] for e in entries], [shown(e[1], KEY_WIDTH) for e in entries]
    # A label that begins with _ is left out of legends, so the names are put in afterwards.
    stand_ins = [str(i) for i in range(len(names))]
    common: dict[str, Any] = {"title": title, "alignment": "left", "borderaxespad": 0.2}
    if narrow(ax):
        figure = ax.get_figure(root=True)
        assert figure is not None
        legend = figure.legend(handles, stand_ins, loc="outside lower left", ncols=2, **common)
    else:
        columns = 1 if len(names) <= 26 else 2
        place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.02, 1.0), "ncols": columns}
        legend = ax.legend(handles, stand_ins, **place, **common)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(name)


def sample(strategy: str, line: Any = "none", **changes: Any) -> Line2D:
    """Return a strategy's marker, with a line of these dashes or none, for `key`."""
    return Line2D([], [], linestyle=line, **{**look_of(strategy), **changes})


def note(ax: Axes, x: float, y: float, text: str, **settings: Any) -> Text:
    """Write text at a place in the axes' data."""
    return ax.annotate(text, (x, y), **{"fontsize": 6, "parse_math": False, **settings})


def save(figure: Figure, stem: str | Path, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Write stem.pdf, stem.svg, stem.png, each in one step; equal figures give equal bytes.

    Fonts are embedded in the PDF (Type 42); text in the SVG is text, in the reader's DejaVu Sans or
    sans-serif; the PNG has 200 pixels per inch. A character that DejaVu Sans lacks is a box in PDF and PNG.

    Raises:
        RankwiseError: an unknown format, or a place that cannot be written.
    """
    stem = Path(stem)
    if unknown := [f for f in formats if f not in FORMATS]:
        raise RankwiseError(one_of("format", unknown[0], FORMATS))
    return [_save(figure, stem.with_name(f"{stem.name}.{format}"), format) for format in formats]


METADATA: dict[str, dict[str, None]] = {
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    "svg": {"Date": None, "Creator": None},
    "png": {"Software": None},
}
"""Dates and versions are left out, so that the bytes depend on the picture alone."""


def _save(figure: Figure, path: Path, format: str) -> Path:
    with style(), warnings.catch_warnings(), matplotlib.rc_context({"svg.hashsalt": path.stem}):
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*")  # told in the docstring of `save`
        try:
            with replacing(path) as aside:
                figure.savefig(aside, format=format, metadata=METADATA[format])
        except OSError as error:
            raise RankwiseError(
                f"The figure cannot be written to {path}: {error.strerror or error}."
            ) from None
    return path
