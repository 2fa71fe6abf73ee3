"""What a probe measured on a model and some calibration rows: arrays per module, and what they cost.

Made by `probes/`, read by strategies and initialisations. No torch here: strategies need none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from rankwise.errors import RankwiseError

Kind = Literal["gradients", "importance", "fisher", "inputs", "weights", "outputs"]
QUANTITIES: dict[Kind, dict[str, tuple[int, ...]]] = {
    "gradients": {"singular_values": (1,), "right_vectors": (1, 0), "norm": ()},
    "importance": {"mean_absolute": ()},
    "fisher": {"mean_square": ()},
    "inputs": {"explained_variance_ratio": (1,), "components": (1, 0)},
    "weights": {"singular_values": (1,), "norm": ()},
    "outputs": {"mean_square": ()},
}
"""Kind -> quantity -> axes of each module's array: () a number, (1,) one value per unit of rank, (1, 0) one
direction of the module's input, of in_features, per unit of rank. Units stop at the probe's own limit.

gradients: of the mean loss per label token by the frozen weight, G (out, in): its largest singular values,
the right singular vectors that belong to them, ||G||_F. importance: mean|W * G|. fisher: mean over examples
and weights of the squared gradient of an example's mean loss. inputs: of the module's inputs at label
tokens, principal components as PEFT's EVA has them. weights: of W: its largest singular values, ||W||_F.
outputs: mean over label tokens of ||s B A x||^2 after a brief training.
"""


@dataclass(frozen=True)
class Cost:
    """What a probe took: tokens passed forward and backward, whole passes over the rows, seconds."""

    forward_tokens: int = 0
    backward_tokens: int = 0
    passes: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        passes = "1 pass" if self.passes == 1 else f"{self.passes} passes"
        return (
            f"{passes}, {self.forward_tokens:,} tokens forward and {self.backward_tokens:,} backward, "
            f"{self.seconds:.1f} s"
        )


class Unmeasurable(RankwiseError):
    """A probe met numbers that are not finite: a finding about model, rows and precision."""


@dataclass(frozen=True, eq=False)
class Evidence:
    """Arrays per module, of one kind of probe.

    Attributes:
        kind: see `QUANTITIES`, which names the quantities of each kind.
        values: quantity -> module name -> float32 array.
        cost: what measuring took when it was measured, also where it now comes from the cache.
        about: how it was measured (rows, method, ...), for the record.
    """

    kind: Kind
    values: Mapping[str, Mapping[str, np.ndarray]]
    cost: Cost = Cost()
    about: Mapping[str, Any] = field(default_factory=dict)

    def of(self, quantity: str) -> Mapping[str, np.ndarray]:
        """Return module name -> array of one quantity.

        Raises:
            RankwiseError: the probe did not measure it.
        """
        if quantity not in self.values:
            raise RankwiseError(f"The {self.kind} probe measured {', '.join(self.values)}, not {quantity}.")
        return self.values[quantity]

    def summary(self) -> dict[str, Any]:
        """Return what a record keeps of it: kind, cost, how it was measured."""
        return {"kind": self.kind, "cost": asdict(self.cost), **self.about}


def stand_in(kind: Kind, shapes: Mapping[str, tuple[int, int]]) -> Evidence:
    """Return evidence of the right shape that says nothing: all ones, falling with the rank.

    For checking options and budgets before anything is measured.

    Args:
        kind: of the probe.
        shapes: module name -> (in_features, out_features).
    """
    values = {
        quantity: {name: _falling(shape, *sizes) for name, sizes in shapes.items()}
        for quantity, shape in QUANTITIES[kind].items()
    }
    return Evidence(kind, values)


def _falling(shape: tuple[int, ...], in_features: int, out_features: int) -> np.ndarray:
    """Return ones, each divided by its 1-based place; no longer than full rank."""
    if not shape:
        return np.ones((), dtype=np.float32)
    length = min(in_features, out_features)
    fall = (1.0 / np.arange(1, length + 1)).astype(np.float32)
    return fall if len(shape) == 1 else np.broadcast_to(fall[:, None], (length, in_features))
