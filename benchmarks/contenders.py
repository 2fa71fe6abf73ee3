"""The contenders: each trains the same adapters on the same rows, and says when every step ended.

All of them get a PEFT model from `rankwise.adapters.attach` (plain PEFT: same ranks, scales and initial
values), the token ids and labels of `rankwise.data`, fused AdamW without weight decay, one rate under the
same schedule, gradients clipped at 1, all cores. Rows come in the order of `optimizer_steps`, 8 to a step,
except where a contender's point is to group them otherwise.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rankwise.config import TrainConfig
from rankwise.data import Example

IGNORE = -100


@dataclass
class Progress:
    """The clock of a training loop: when it began, and for every step its end, tokens, labels and loss."""

    began: float = 0.0
    ended: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def begin(self) -> None:
        """Start the clock."""
        self.began = time.perf_counter()

    def step(self, tokens: int, labels: int, loss: float) -> None:
        """Note the end of an optimizer step."""
        self.ended.append(time.perf_counter())
        self.tokens.append(tokens)
        self.labels.append(labels)
        self.losses.append(loss)

    @property
    def seconds(self) -> float:
        """From the start to the end of the last step."""
        return self.ended[-1] - self.began


def rankwise_engine(model: Any, wanted: str) -> Any:
    """Return rankwise's way through a base model without adapters: "auto" (a user's), or "plain"."""
    from rankwise.engine import proof

    return proof.choose(model, wanted)


def train_rankwise(
    model: Any,
    steps: Sequence[Sequence[Example]],
    config: TrainConfig,
    progress: Progress,
    *,
    engine: Any,
    seed: int = 0,
) -> None:
    """Train with rankwise: the one place where the benchmarks call its loop.

    Args:
        model: a PEFT model on rankwise's base.
        steps: the rows of every optimizer step.
        config: its first learning rate is used.
        progress: hears every step; the clock starts before the engine is installed.
        engine: of `rankwise_engine`.
        seed: of the run.
    """
    from rankwise.train import train_adapters

    with tempfile.TemporaryDirectory() as folder:
        progress.begin()
        with engine.installed(model):
            train_adapters(
                model, steps, config, rate=config.learning_rates[0], seed=seed, folder=Path(folder),
                engine=engine, checkpoint_seconds=float("inf"),
                on_step=lambda e: progress.step(e["tokens"], e["label_tokens"], e["loss"]),
            )  # fmt: skip


def padded(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad rows to the longest, as every tutorial's collator does."""
    longest = max(len(row["input_ids"]) for row in rows)
    ids = np.zeros((len(rows), longest), dtype=np.int64)
    mask, labels = np.zeros_like(ids), np.full_like(ids, IGNORE)
    for i, row in enumerate(rows):
        n = len(row["input_ids"])
        ids[i, :n], mask[i, :n], labels[i, :n] = row["input_ids"], 1, row["labels"]
    arrays = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def as_dicts(rows: Sequence[Example]) -> list[dict[str, Any]]:
    """Return the rows as a trainer's dataset: token ids and labels."""
    return [{"input_ids": row.input_ids.tolist(), "labels": row.labels.tolist()} for row in rows]


def train_trainer(
    model: Any,
    rows: Sequence[Example],
    config: TrainConfig,
    progress: Progress,
    *,
    batch: int = 8,
    bf16: bool = False,
    grouped: bool = False,
    seed: int = 0,
) -> Any:
    """Train with Transformers' `Trainer`, padding to the longest row of a batch; return the trainer.

    `grouped` batches rows of like length (`train_sampling_strategy="group_by_length"`, which was
    `group_by_length=True` before transformers 5); otherwise the given order is kept.
    """
    from transformers import Trainer, TrainingArguments

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            **_common_arguments(config, folder, seed),
            bf16=bf16,
            per_device_train_batch_size=batch,
            train_sampling_strategy="group_by_length" if grouped else "sequential",
        )
        trainer = _clocked(Trainer, progress)(
            model=model, args=arguments, train_dataset=as_dicts(rows), data_collator=padded,
            optimizers=_optimizer(model, config, config.epochs * -(-len(rows) // batch)),
        )  # fmt: skip
        trainer.train()
    return trainer


TRL_SETTINGS: dict[str, dict[str, Any]] = {
    "padding-free 1x8": {"padding_free": True, "batch": 1, "accumulate": 8},
    "padding-free 2x4": {"padding_free": True, "batch": 2, "accumulate": 4},
    "padding-free 8x1": {"padding_free": True, "batch": 8, "accumulate": 1},
    "by length 2x4": {"batch": 2, "accumulate": 4, "grouped": True},
    "packing bfd 512 1x3": {"packing": "bfd", "batch": 1, "accumulate": 3},
}
"""What `throughput --probe-trl` tries: rows computed at once x accumulation, about 8 rows to a step."""

TRL_BEST: dict[str, dict[str, Any]] = {
    "cpu": TRL_SETTINGS["padding-free 1x8"] | {"bf16": False},
    "cuda": TRL_SETTINGS["padding-free 8x1"] | {"bf16": True},
}
"""The setting of (c), by device.

cpu: tried on 2 Xeon cores without bf16 instructions, 16 rows, fp32, tokens/s: padding-free 1x8 193, 192 and
192, 2x4 193 and 186, 4x2 159, 8x1 120; padded 1x8 186; padded by length 2x4 182, 8x1 75; packs of 512 tokens
(bfd) 1x3 169; and 1x8 under bf16 autocast 66. Large batches lose by memory that is given back to the system
and faulted in again (with the allocator told to keep it, 8x1 gives 148 and 2x4 213), and by a block-diagonal
mask over all rows. Every setting in the rows' own order has the losses of (a) to 4 digits: no row sees
another one, on a CPU too. bfd keeps rows apart but puts others into a step. "wrapped" packs (173) are not
fair: rows attend to those before them, some are cut in two, and the training loss differs (1.97, not 2.12).
cuda: not tried, the usual choice.
"""


def train_trl(
    model: Any,
    rows: Sequence[Example],
    config: TrainConfig,
    progress: Progress,
    *,
    tokenizer: Any,
    batch: int,
    accumulate: int,
    bf16: bool,
    padding_free: bool = False,
    packing: str | None = None,
    pack_length: int = 512,
    grouped: bool = False,
    seed: int = 0,
) -> Any:
    """Train with TRL's `SFTTrainer`; return the trainer.

    Its dataset brings `input_ids` and `labels`, which SFTTrainer keeps as they are, so the labels are
    completion-only as everyone's. With `padding_free` (and packing "bfd", which implies it) the batch is one
    long row whose position ids restart, and Transformers makes SDPA's mask block-diagonal from them, so rows
    stay apart on a CPU too. A batch of one row needs neither mask nor padding.
    """
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            **_common_arguments(config, folder, seed),
            bf16=bf16,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
            train_sampling_strategy="group_by_length" if grouped else "sequential",
            max_length=pack_length if packing else None,
            packing=packing is not None,
            packing_strategy=packing or "bfd",
            padding_free=padding_free,
            gradient_checkpointing=False,  # TRL's default is on: less memory, every forward done twice
        )
        # SFTTrainer packs the rows itself, so the number of steps is known once it stands
        trainer = _clocked(SFTTrainer, progress)(
            model=model, args=arguments, train_dataset=Dataset.from_list(as_dicts(rows)),
            processing_class=tokenizer,
        )  # fmt: skip
        steps = config.epochs * -(-len(trainer.train_dataset) // (batch * accumulate))
        trainer.optimizer, trainer.lr_scheduler = _optimizer(model, config, steps)
        trainer.train()
    return trainer


def _common_arguments(config: TrainConfig, folder: str, seed: int) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "num_train_epochs": config.epochs,
        "max_grad_norm": config.clip,
        "seed": seed,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": not torch.cuda.is_available(),
    }


def _optimizer(model: Any, config: TrainConfig, steps: int) -> tuple[Any, Any]:
    """Return rankwise's optimizer and schedule for a trainer: what is learned must not differ by them."""
    from rankwise.train import rate_factor

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rates[0], betas=config.betas, weight_decay=config.weight_decay,
        fused=True,
    )  # fmt: skip
    schedule: Callable[[int], float] = lambda step: rate_factor(config, min(step, steps - 1), steps)  # noqa: E731
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)


def _clocked(kind: Any, progress: Progress) -> Any:
    """Return a trainer class that tells `progress` what each optimizer step held; it changes nothing else."""
    from transformers import TrainerCallback

    seen = {"tokens": 0, "labels": 0, "loss": 0.0}

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            progress.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            progress.step(int(seen["tokens"]), int(seen["labels"]), seen["loss"])
            seen.update(tokens=0, labels=0, loss=0.0)

    class Clocked(kind):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.add_callback(Clock())

        def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            mask = inputs.get("attention_mask")
            seen["tokens"] += int(inputs["input_ids"].numel() if mask is None else mask.sum())
            seen["labels"] += int((inputs["labels"][:, 1:] != IGNORE).sum())
            loss = super().training_step(model, inputs, *args, **kwargs)
            seen["loss"] += float(loss)  # already divided by the labels of the whole step
            return loss

    return Clocked
