"""Rows laid end to end: no padding, and what all rows begin with (a chat template's head) computed once.

The layout is `[common beginning][rest of row 0][rest of row 1] ...`. A row's tokens keep the positions that
they have in the row, and see the beginning and their own row alone, so that every number is the one that the
row would have by itself; only the work is shared.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from rankwise.data import Example

IGNORE = -100
SHORTEST_SHARED = 8
"""A common beginning below this many tokens is not worth its extra span."""

ALIGNED = 16
"""Numbers that a row of a mask is filled up to."""


@dataclass(frozen=True)
class Span:
    """Tokens that follow each other: where they start in the pack, how many, and how many are seen before."""

    start: int
    length: int
    before: int

    @property
    def own(self) -> slice:
        """Return the span's place in the pack."""
        return slice(self.start, self.start + self.length)

    @property
    def seen(self) -> int:
        """Return how many tokens the span's last one sees, itself included."""
        return self.before + self.length


@dataclass(frozen=True)
class Pack:
    """Rows of one forward pass. N tokens, P label positions.

    Attributes:
        ids: token ids, (1, N).
        positions: position of each token in its row, (1, N).
        spans: the common beginning if there is one, then the rest of each row.
        shared: length of the common beginning; 0 if none is shared.
        where: pack positions whose next token is a label, (P,); one may stand for several rows.
        targets: the label tokens, (P,).
        rows: which row each label belongs to, (P,).
    """

    ids: torch.Tensor
    positions: torch.Tensor
    spans: tuple[Span, ...]
    shared: int
    where: torch.Tensor
    targets: torch.Tensor
    rows: torch.Tensor
    _masks: dict[Any, torch.Tensor] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Return N."""
        return self.ids.shape[1]

    def seen_by_all(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """Return what each span sees, one after the other: N along `dim` becomes M."""
        return tensor.index_select(dim, self._index[0]) if self.shared else tensor

    def gathered(self, gradient: torch.Tensor, dim: int) -> torch.Tensor:
        """Return the transpose of `seen_by_all`: M along `dim` becomes N, the beginning summed over spans."""
        if not self.shared:
            return gradient
        _, own, beginnings = self._index
        total = gradient.index_select(dim, own)
        copies = gradient.index_select(dim, beginnings).unflatten(dim, (-1, self.shared))
        total.narrow(dim, 0, self.shared).add_(copies.sum(dim))
        return total

    @functools.cached_property
    def _index(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Where in N each of M comes from; where in M each of N is; where in M the copies begin and run."""
        ends = np.cumsum([span.seen for span in self.spans])
        seen = [np.r_[0 : s.before, s.start : s.start + s.length] for s in self.spans]
        own = [np.arange(end - s.length, end) for s, end in zip(self.spans, ends, strict=True)]
        copies = [np.arange(end - s.seen, end - s.length) for s, end in zip(self.spans, ends, strict=True)]
        found = (torch.from_numpy(np.concatenate(part)).to(self.ids.device) for part in (seen, own, copies))
        return tuple(found)  # type: ignore[return-value]

    def mask(self, span: Span, window: int | None) -> torch.Tensor:
        """Return 0 where a span's token sees and -inf where it does not, (n, m), fp32; made once a pack."""
        key = (span.length, span.before, window)
        if key not in self._masks:
            device = self.ids.device
            token = torch.arange(span.before, span.seen, device=device)[:, None]
            other = torch.arange(span.seen, device=device)[None, :]
            hidden = other > token
            if window is not None:
                hidden |= other <= token - window
            self._masks[key] = torch.zeros(hidden.shape, device=device).masked_fill_(hidden, float("-inf"))
        return self._masks[key]

    def mask_of_all(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """Return 0 where a token sees and -inf where it does not, (N, N); made once a pack.

        Rows of the tensor are aligned to `ALIGNED` numbers, else GPU kernels copy it at every call.
        """
        key = (window, dtype)
        if key not in self._masks:
            lengths = torch.tensor([span.length for span in self.spans])
            owner = torch.repeat_interleave(lengths).to(self.ids.device)  # 0, 0, 0, 1, 1, 2, ...
            position = self.positions[0]
            sees = owner[:, None] == owner[None, :]
            if self.shared:
                sees |= owner[None, :] == 0
            sees &= position[None, :] <= position[:, None]
            if window is not None:
                sees &= position[None, :] > position[:, None] - window
            room = -(-self.tokens // ALIGNED) * ALIGNED
            mask = torch.full((self.tokens, room), float("-inf"), dtype=dtype, device=self.ids.device)
            self._masks[key] = mask[:, : self.tokens].masked_fill_(sees, 0.0)
        return self._masks[key]


def pack(rows: Sequence[Example], device: torch.device | str = "cpu", share: bool = True) -> Pack:
    """Lay rows end to end.

    Args:
        rows: at least one row; each of at least one token.
        device: where the tensors go.
        share: compute what all rows begin with once (exact without dropout; never with it).

    Cost: linear in the tokens.
    """
    shared = common_beginning(rows) if share else 0
    if shared < SHORTEST_SHARED:
        shared = 0
    ids = [rows[0].input_ids[:shared], *(row.input_ids[shared:] for row in rows)]
    spans = [Span(0, shared, 0)] if shared else []
    where, targets, owner = [], [], []
    start = shared
    for index, row in enumerate(rows):
        length = len(row.input_ids) - shared
        spans.append(Span(start, length, shared))
        labelled = np.flatnonzero(row.labels[1:] != IGNORE)  # the label of position t is token t+1
        where.append(np.where(labelled < shared, labelled, labelled - shared + start))
        targets.append(row.labels[1:][labelled])
        owner.append(np.full(len(labelled), index))
        start += length
    positions = [np.arange(s.before, s.seen) for s in spans]

    def tensor(parts: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(device)

    return Pack(
        ids=tensor(ids)[None],
        positions=tensor(positions)[None],
        spans=tuple(spans),
        shared=shared,
        where=tensor(where),
        targets=tensor(targets),
        rows=tensor(owner),
    )


def common_beginning(rows: Sequence[Example]) -> int:
    """Return how many first tokens all rows share; each row keeps at least one token of its own."""
    if len(rows) < 2:
        return 0
    shortest = min(len(row.input_ids) for row in rows) - 1
    block = np.stack([row.input_ids[:shortest] for row in rows])
    differs = (block != block[0]).any(axis=0)
    return int(differs.argmax()) if differs.any() else shortest
