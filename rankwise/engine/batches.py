"""Which rows form an optimizer step, and which rows are computed at once.

A *step* is part of what is learned: it is set by the study and the seed alone. A *micro-batch* only
bounds memory: the loss of a step is the mean over all its label tokens, however it is cut.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rankwise.config import TrainConfig
from rankwise.data import Example
from rankwise.seeds import generator


def optimizer_steps(examples: Sequence[Example], train: TrainConfig, seed: int) -> list[list[Example]]:
    """Return the rows of every optimizer step of a run, in order.

    Each epoch visits the rows in an order of its own, drawn from (seed, epoch). With `step_tokens`, rows
    are added while they fit; a row longer than the limit is a step by itself. With `step_examples`, the
    last step of an epoch may be short.
    """
    steps: list[list[Example]] = []
    for epoch in range(train.epochs):
        order = generator(seed, "order", epoch).permutation(len(examples))
        steps.extend(_cut([examples[i] for i in order], train))
    return steps[: train.max_steps]


def _cut(examples: list[Example], train: TrainConfig) -> list[list[Example]]:
    if train.step_examples is not None:
        size = train.step_examples
        return [examples[i : i + size] for i in range(0, len(examples), size)]
    steps: list[list[Example]] = []
    room = 0
    for example in examples:
        length = len(example.input_ids)
        if length > room or not steps:
            steps.append([])
            room = train.step_tokens or 0
        steps[-1].append(example)
        room -= length
    return steps


def micro_batches(examples: Sequence[Example], micro_tokens: int) -> list[list[Example]]:
    """Group rows of like length so that rows x longest stays within `micro_tokens` (one row at least)."""
    batches: list[list[Example]] = []
    for example in sorted(examples, key=lambda e: (-len(e.input_ids), e.row_hash)):
        if not batches or (len(batches[-1]) + 1) * len(batches[-1][0].input_ids) > micro_tokens:
            batches.append([])
        batches[-1].append(example)
    return batches


def packs(examples: Sequence[Example], micro_tokens: int) -> list[list[Example]]:
    """Group rows within `micro_tokens` tokens (one row at least): the longest first, each where it fits."""
    bins: list[list[Example]] = []
    room: list[int] = []
    for example in sorted(examples, key=lambda e: (-len(e.input_ids), e.row_hash)):
        length = len(example.input_ids)
        fits = next((i for i, left in enumerate(room) if length <= left), None)
        if fits is None:
            fits = len(bins)
            bins.append([])
            room.append(micro_tokens)
        bins[fits].append(example)
        room[fits] -= length
    return bins


def label_count(examples: Sequence[Example]) -> int:
    """Return the number of tokens that the loss is taken over."""
    return int(sum(np.count_nonzero(e.labels[1:] != -100) for e in examples))
