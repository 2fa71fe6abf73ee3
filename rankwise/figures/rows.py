"""The tidy rows that the figures draw. Every number in a picture stands in one of these, computed before.

A loss is in nats per label token. An interval is (low, high), both None where there is none to show.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LossPoint:
    """An arm's loss at its trainable parameters.

    Attributes:
        variant: what sets the arm apart from others of its strategy, such as its scale rule; "" for none.
        frontier: no arm at no greater cost has a lower mean loss.
        failed: failed runs of the arm; they are in no mean.
    """

    arm: str
    strategy: str
    parameters: int
    loss: float
    low: float | None = None
    high: float | None = None
    frontier: bool = False
    failed: int = 0
    variant: str = ""


@dataclass(frozen=True)
class Difference:
    """A paired difference of losses, arm minus `against`; mean None where too few runs are done.

    Attributes:
        margin: of equivalence, to both sides of zero; None where there is none, or none is known.
        decided: whether the verdict is one; if not, the point is drawn hollow.
    """

    arm: str
    against: str
    strategy: str
    mean: float | None
    low: float | None
    high: float | None
    margin: float | None
    verdict: str
    decided: bool


@dataclass(frozen=True)
class HeatCell:
    """The rank of a layer's module; `text` shows a range where several modules share the place."""

    layer: int
    part: str
    rank: float
    text: str


@dataclass(frozen=True)
class SeriesPoint:
    """A point of a curve: at `x`, the mean over seeds and its band.

    `x` is the step, the number of training rows, or the learning rate. `group`, such as the budget,
    sets the line's dashes; `variant`, such as a scale rule, the marker's fill. `failed` counts the arm's
    failed reporting runs, with so many training rows where `x` is that.
    """

    arm: str
    strategy: str
    x: float
    mean: float
    low: float | None = None
    high: float | None = None
    group: str = ""
    variant: str = ""
    failed: int = 0


@dataclass(frozen=True)
class RatePoint(SeriesPoint):
    """A learning rate that was tried; mean is None where a run diverged, `chosen` marks the winner."""

    mean: float | None = None  # type: ignore[assignment]
    chosen: bool = False


@dataclass(frozen=True)
class RankUse:
    """How much of its allotted rank a module's trained update uses (stable rank, or another measure).

    `failed` counts the arm's failed runs; they are in no mean.
    """

    arm: str
    strategy: str
    module: str
    allotted: int
    used: float
    failed: int = 0


@dataclass(frozen=True)
class Cost:
    """An arm's median seconds of a run, by what they went to, and its highest peak of memory in bytes.

    `failed` counts its failed runs; they are in no median and no peak.
    """

    arm: str
    strategy: str
    probe_seconds: float
    train_seconds: float
    evaluation_seconds: float
    peak_bytes: int
    failed: int = 0


@dataclass(frozen=True)
class ExampleDifferences:
    """Losses of two arms on the same test rows, arm minus `against`, from the greatest gain to the loss.

    Attributes:
        differences: one per row, ascending; below zero the arm predicts the row better.
        better, worse: how many rows are below and above zero.
        seeds: that each difference is the mean of.
    """

    arm: str
    against: str
    differences: tuple[float, ...]
    better: int
    worse: int
    seeds: int
