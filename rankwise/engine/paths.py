"""The two ways through a model: rows padded to the longest (plain), or laid end to end (packed).

Both score the same rows with the same numbers. `choose` takes the packed one only for a model on which it was
proven (`engine/proof.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import nn

from rankwise.data import Example
from rankwise.engine import attention, batches, elementwise, lora, loss, packing, plain
from rankwise.engine.plain import Scores, unwrapped


class Path(Protocol):
    """What training and evaluation ask of a path.

    Attributes:
        name: recorded with every run.
        notice: what a reader of results must know, if anything.
        unfused: adapted modules that keep PEFT's own forward though others run fused; set by `installed`.
    """

    name: str
    notice: str | None
    unfused: list[str]

    def installed(self, model: Any) -> AbstractContextManager[None]:
        """Make the model ready for this path, and put everything back at the end."""

    def batches(self, rows: Sequence[Example], micro_tokens: int) -> list[list[Example]]:
        """Group rows that are computed at once."""

    def score(self, model: Any, rows: Sequence[Example]) -> Scores:
        """Return the loss of each row."""


class Plain:
    """Padded rows, the model's own code: right for every architecture."""

    name = "plain"

    def __init__(self, notice: str | None = None) -> None:
        self.notice = notice
        self.unfused: list[str] = []  # nothing here is ever fused

    def installed(self, model: Any) -> AbstractContextManager[None]:
        """Nothing has to be made ready."""
        return nullcontext()

    def batches(self, rows: Sequence[Example], micro_tokens: int) -> list[list[Example]]:
        """Group rows of like length within `micro_tokens` padded tokens."""
        return batches.micro_batches(rows, micro_tokens)

    def score(self, model: Any, rows: Sequence[Example]) -> Scores:
        """Return the loss of each row (`engine.plain.score`)."""
        return plain.score(model, rows)


class Packed:
    """Rows laid end to end, fused LoRA, chunked loss; for models on which that was proven.

    Args:
        groups: names of modules that read the same input (`lora.same_input_groups`).
    """

    name = "packed"
    notice: str | None = None

    def __init__(self, groups: Sequence[Sequence[str]] = ()) -> None:
        self.groups = groups
        self.unfused: list[str] = []

    @contextmanager
    def installed(self, model: Any) -> Iterator[None]:
        """Set attention, LoRA forward and elementwise parts for a while; the weights are not touched."""
        root = unwrapped(model)
        before = root.config._attn_implementation
        with ExitStack() as stack:
            stack.callback(setattr, root.config, "_attn_implementation", before)
            root.config._attn_implementation = attention.NAME
            stack.enter_context(elementwise.lean(root))
            self.unfused = stack.enter_context(lora.fused(model, self.groups))
            yield

    def batches(self, rows: Sequence[Example], micro_tokens: int) -> list[list[Example]]:
        """Group rows within `micro_tokens` tokens."""
        return batches.packs(rows, micro_tokens)

    def score(self, model: Any, rows: Sequence[Example]) -> Scores:
        """Return the loss of each row; the model must be `installed`."""
        root = unwrapped(model)
        device = root.get_input_embeddings().weight.device
        pack = packing.pack(rows, device, share=not (model.training and _drops(root)))
        hidden = hidden_states(root, pack).index_select(0, pack.where)
        losses, right = loss.chunked_loss(hidden, loss.head_of(root), pack.targets)
        total = torch.zeros(len(rows), device=device)
        return Scores(
            total.index_add(0, pack.rows, losses),
            torch.bincount(pack.rows, minlength=len(rows)),
            total.index_add(0, pack.rows, right.float()).long(),
        )


def hidden_states(root: Any, pack: packing.Pack) -> torch.Tensor:
    """Return the last hidden states of a pack's tokens, (N, d), of a model that is `installed`."""
    attention.use(pack)
    trunk = getattr(root, root.base_model_prefix)
    return trunk(input_ids=pack.ids, position_ids=pack.positions, use_cache=False).last_hidden_state[0]


def _drops(root: Any) -> bool:
    """Whether training draws dropout anywhere: a shared beginning would then share its draws."""
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in root.modules()):
        return True  # the adapters' own among them
    fields = root.config.to_dict().items()  # models also call functional.dropout with what their config says
    return any("drop" in name and isinstance(value, float) and value > 0 for name, value in fields)
