"""Squared gradients of single examples (the diagonal of the empirical Fisher information, averaged).

Shapes: N tokens of a row, x (N, in), g (N, out), G = g^T x (out, in).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

import torch

from rankwise.data import Example
from rankwise.engine.batches import label_count
from rankwise.errors import RankwiseError
from rankwise.evidence import Cost, Evidence
from rankwise.probes.gradients import by_quantity
from rankwise.probes.watch import Setting, labelled, still, sweep, token_count, watching


def measure_fisher(setting: Setting) -> Evidence:
    """Return each module's mean squared gradient (of an example's mean loss), over examples and weights.

    Exact, one row at a time (`micro_tokens` does not matter); nothing is drawn (nor does `seed`).

    Raises:
        RankwiseError: any option, no row with labels, a loss that is not finite.

    Cost: a forward and a backward pass; for each module and row, the cheaper of N^2·(in + out) and N·in·out.
    """
    if setting.options:
        raise RankwiseError(f"The fisher probe takes no options; got {', '.join(sorted(setting.options))}.")
    began = time.perf_counter()
    model, engine, rows = setting.model, setting.engine, labelled(setting.rows)
    tokens, done = token_count(rows), 0
    squares = _Squares()

    def on_batch(batch: Sequence[Example]) -> None:
        nonlocal done
        squares.close()
        done += token_count(batch)
        setting.on_progress(done, tokens)

    with still(model), engine.installed(model):
        with watching(model, setting.inventory.names, squares.add, squares.called):
            sweep(model, engine, [[row] for row in rows], [label_count([row]) for row in rows], on_batch)
    values = {
        m.name: {
            "mean_square": torch.tensor(squares.sums[m.name] / (len(rows) * m.in_features * m.out_features))
        }
        for m in setting.inventory
    }
    cost = Cost(tokens, tokens, 1, time.perf_counter() - began)
    about = {"rows": len(rows), "tokens": tokens, "label_tokens": label_count(rows)}
    return Evidence("fisher", by_quantity(values), cost, about)


class _Squares:
    """Sums of ||G||_F^2 over rows; a module that is called several times in a row waits for its last call."""

    def __init__(self) -> None:
        self.sums: Counter[str] = Counter()  # floats
        self._awaited: Counter[str] = Counter()
        self._parts: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def called(self, name: str) -> None:
        self._awaited[name] += 1

    def add(self, name: str, x: torch.Tensor, g: torch.Tensor) -> None:
        self._parts.setdefault(name, []).append((x, g))
        if len(self._parts[name]) == self._awaited[name]:
            self._reduce(name)

    def close(self) -> None:
        """End a row: calls whose output the loss does not depend on were never heard of again."""
        for name in list(self._parts):
            self._reduce(name)
        self._awaited.clear()

    def _reduce(self, name: str) -> None:
        xs, gs = zip(*self._parts.pop(name), strict=True)
        self.sums[name] += square_norm(_joined(xs), _joined(gs))  # type: ignore[assignment]


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0].float() if len(parts) == 1 else torch.cat([part.float() for part in parts])


def square_norm(x: torch.Tensor, g: torch.Tensor) -> float:
    """Return ||g^T x||_F^2, as sum((g g^T) * (x x^T)) where that is cheaper: G is then never formed."""
    tokens, (i, o) = len(x), (x.shape[1], g.shape[1])
    if tokens * (i + o) < i * o:
        return float(((g @ g.t()) * (x @ x.t())).sum(dtype=torch.float64))
    return float(torch.linalg.vector_norm(g.t() @ x, dtype=torch.float64) ** 2)
