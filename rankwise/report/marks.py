"""Colours, markers and dashes of `figures.look` for pictures that plotly draws, in light and in dark.

In a picture a colour is a name, such as "@s:uniform"; the page puts in the one of its mode.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from rankwise.figures import LOOKS
from rankwise.figures.look import STRANGER

SYMBOLS: dict[str, tuple[str, int]] = {
    "uniform": ("circle", 0),
    "random": ("x", 0),
    "reversed": ("cross", 0),
    "weight_spectrum": ("pentagon", 180),
    "custom": ("octagon", 0),
    "linear_decay": ("triangle-down", 0),
    "linear_growth": ("triangle-up", 0),
    "attention_heavy": ("triangle-left", 0),
    "attention_only": ("triangle-right", 0),
    "mlp_only": ("hexagon2", 0),
    "empirical": ("hexagon", 0),
    "spectral": ("square", 0),
    "eva": ("diamond", 0),
    "gora": ("pentagon", 0),
    "fisher": ("star", 0),
    "lora_drop": ("diamond-tall", 0),
    "adalora": ("star-diamond", 0),
    "sensitivity": ("star-triangle-up", 0),
    "grow_prune": ("hexagram", 0),
    "shrink": ("star-square", 0),
}
"""Strategy -> plotly's name of the marker that `figures.look.LOOKS` has, and its turn in degrees."""

STRANGER_SYMBOL = ("circle-dot", 0)
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
"""As `figures.look.DASHES`, one per budget."""
FILLS = ("-open", "-open-dot", "-dot")
"""One per variant, such as a scale rule; none is full."""

SURFACES: dict[str, tuple[str, str]] = {
    "ink": ("#1b1f24", "#e6e8eb"),
    "muted": ("#59616b", "#a3abb5"),
    "paper": ("#ffffff", "#171a1f"),
    "grid": ("#e4e4e4", "#333941"),
    "band": ("#e3e6ea", "#2c333c"),
    "edge": ("#b4bac2", "#566070"),
    "probe": ("#56B4E9", "#56B4E9"),
    "train": ("#6b7280", "#8b93a1"),
    "evaluation": ("#d0d4da", "#454d59"),
    "gain": ("#0072B2", "#4aa3dd"),
    "loss": ("#D55E00", "#e8762c"),
}
"""Name -> colour in light and in dark."""


def palette() -> dict[str, dict[str, str]]:
    """Return {"light": {name: colour}, "dark": …}: the surfaces, and "s:" and "b:" (a band) of strategies."""
    found: dict[str, dict[str, str]] = {"light": {}, "dark": {}}
    for name, (light, dark) in SURFACES.items():
        found["light"][name], found["dark"][name] = light, dark
    for strategy, (colour, _) in {**LOOKS, "": STRANGER}.items():
        for mode, shade in (("light", colour), ("dark", _in_dark(colour))):
            found[mode][f"s:{strategy}"] = shade
            red, green, blue = (int(shade[i : i + 2], 16) for i in (1, 3, 5))
            found[mode][f"b:{strategy}"] = f"rgba({red},{green},{blue},0.16)"
    return found


def _in_dark(colour: str) -> str:
    """Return a colour that is seen on dark ground: greys are mirrored, the blue is lightened."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    if red == green == blue:
        grey = 255 - red if red < 0x60 else max(red, 0x8C)
        return f"#{grey:02X}{grey:02X}{grey:02X}"
    return {"#0072B2": "#2F8FD0"}.get(colour, colour)


def known(strategy: str) -> str:
    """Return the strategy if it has a look of its own, else ""."""
    return strategy if strategy in LOOKS else ""


def colour(strategy: str, kind: str = "s") -> str:
    """Return the name of a strategy's colour, or with "b" of its band's."""
    return f"@{kind}:{known(strategy)}"


def dashes(groups: Iterable[str]) -> dict[str, str]:
    """Return group -> plotly's name of its dashes, in the order given."""
    return {group: DASHES[i % len(DASHES)] for i, group in enumerate(dict.fromkeys(groups))}


def fills(variants: Iterable[str]) -> dict[str, str]:
    """Return variant -> what is put behind the marker's name; nothing for none."""
    named = [variant for variant in dict.fromkeys(variants) if variant]
    return {"": ""} | {variant: FILLS[i % len(FILLS)] for i, variant in enumerate(named)}


def marker(strategy: str, fill: str = "", size: int = 9, **more: Any) -> dict[str, Any]:
    """Return plotly's marker of a strategy."""
    symbol, angle = SYMBOLS.get(strategy, STRANGER_SYMBOL)
    turned: Mapping[str, Any] = {"angle": angle} if angle else {}
    return {"symbol": symbol + fill, "size": size, "color": colour(strategy), **turned, **more}


def outline(strategy: str) -> str:
    """Return the path of a strategy's marker in an SVG whose view box is -1 -1 2 2."""
    from matplotlib.markers import MarkerStyle

    style = MarkerStyle(LOOKS.get(strategy, STRANGER)[1])
    path = style.get_path().transformed(style.get_transform())
    size = max(float(np.abs(np.asarray(path.vertices)).max()), 1e-9) / 0.9
    return " ".join(_step(points, int(code), size) for points, code in path.iter_segments(curves=False))


def _step(points: Any, code: int, size: float) -> str:
    if code == 79:  # matplotlib's CLOSEPOLY
        return "Z"
    x, y = points[-2] / size, -points[-1] / size
    return f"{'M' if code == 1 else 'L'}{x:.3f} {y:.3f}"
