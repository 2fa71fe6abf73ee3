"""The training loop, top to bottom: steps, gradients, clipping, AdamW, checkpoints, divergence."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rankwise import checkpoint
from rankwise.adapters import adapter_tensors
from rankwise.config import TrainConfig
from rankwise.data import Example
from rankwise.engine.batches import label_count
from rankwise.engine.paths import Path as EnginePath
from rankwise.engine.paths import Plain
from rankwise.engine.plain import first_not_finite
from rankwise.seeds import derive

CHECKPOINT = "checkpoint.safetensors"


class Diverged(Exception):
    """A loss or gradient was not finite: the run has failed, and is never a number."""

    def __init__(self, step: int, reason: str, last: dict[str, Any] | None) -> None:
        super().__init__(f"step {step}: {reason}")
        self.step, self.reason, self.last = step, reason, last


@dataclass(frozen=True)
class Trained:
    """What training cost. `seconds` is summed over all sittings of a resumed run."""

    steps: int
    tokens: int
    label_tokens: int
    seconds: float
    final_loss: float


def rate_factor(train: TrainConfig, step: int, steps: int) -> float:
    """Return the share of the learning rate for a 0-based step: linear warm-up, then the schedule.

    No step is wasted on a rate of zero: warm-up starts at 1/w and the last step stays above 0.
    """
    warm = round(train.warmup * steps)
    if step < warm:
        return (step + 1) / (warm + 1)
    progress = (step - warm) / max(1, steps - warm)
    return {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}[
        train.schedule
    ]


def train_adapters(
    model: Any,
    steps: Sequence[Sequence[Example]],
    config: TrainConfig,
    *,
    rate: float,
    seed: int,
    folder: Path,
    engine: EnginePath | None = None,
    checkpoint_seconds: float = 30.0,
    on_step: Callable[[dict[str, Any]], None] = lambda entry: None,
    after_step: Callable[[Any, int], None] | None = None,
    until: int | None = None,
    penalty: Callable[[Any], torch.Tensor] | None = None,
    b_ratio: float = 1.0,
    extra: Mapping[str, torch.Tensor] | None = None,
    about: Mapping[str, Any] | None = None,
) -> Trained:
    """Train the model's trainable parameters through the steps, resuming from `folder`.

    The loss of a step is the mean over its label tokens, whatever the micro-batches. Dropout is drawn
    from (seed, step), so a resumed run equals an uninterrupted one.

    Args:
        model: a PEFT model; only its trainable parameters change.
        steps: the rows of every optimizer step.
        config: optimizer, schedule, clipping, micro-batch size.
        rate: peak learning rate.
        seed: the run's seed.
        engine: the way through the model, already installed on it; the plain path unless given.
        folder: holds `checkpoint.safetensors` and `metrics.jsonl`.
        checkpoint_seconds: time between checkpoints; the last step always writes one.
        on_step: hears each step's log entry.
        after_step: for methods that act during training; called with (model, steps done) after the
            optimizer's step, while the gradients are still there.
        until: stop after this many steps; the schedule stays that of all.
        penalty: a term that is added to every step's loss, once; a function of the model.
        b_ratio: learning rate of B over that of A (LoRA+, arXiv 2402.12354).
        extra: a method's own tensors, kept with every checkpoint; restored in place on resume.
        about: a method's own JSON, kept with every checkpoint.

    Raises:
        Diverged: at the first loss or gradient that is not finite.
    """
    engine = engine or Plain()
    parameters = adapter_tensors(model)
    optimizer = _adamw(parameters, config, b_ratio)
    log = StepLog(folder / "metrics.jsonl")
    keep = Keep(folder / CHECKPOINT, parameters, optimizer, extra or {}, about or {})
    done, spent = keep.restore()
    log.keep(done)
    model.train()
    stop = len(steps) if until is None else until
    begun = saved = time.perf_counter()
    for step in range(done, stop):
        for group in optimizer.param_groups:
            group["lr"] = rate * group["ratio"] * rate_factor(config, step, len(steps))
        torch.manual_seed(derive(seed, "dropout", step))
        started = time.perf_counter()
        entry = _one_step(model, steps[step], parameters, optimizer, config, engine, step, log.last, penalty)
        if after_step is not None:
            after_step(model, step + 1)
        entry["seconds"] = time.perf_counter() - started
        log.append(entry)
        on_step(entry)
        if time.perf_counter() - saved >= checkpoint_seconds or step == stop - 1:
            saved = time.perf_counter()
            keep.save(step + 1, spent + saved - begun)
    log.close()
    return _trained(steps[:stop], spent + time.perf_counter() - begun, log.last)


def _trained(steps: Sequence[Sequence[Example]], seconds: float, last: dict[str, Any] | None) -> Trained:
    rows = [row for step in steps for row in step]
    tokens = sum(len(row.input_ids) for row in rows)
    return Trained(len(steps), tokens, label_count(rows), seconds, last["loss"] if last else math.nan)


def _adamw(
    parameters: Mapping[str, torch.nn.Parameter], config: TrainConfig, b_ratio: float
) -> torch.optim.AdamW:
    """Return the optimizer; with a ratio other than 1, B's factors form a group of their own."""
    groups = [{"params": list(parameters.values()), "ratio": 1.0}]
    if b_ratio != 1:
        b = [p for name, p in parameters.items() if ".lora_B." in name]
        rest = [p for name, p in parameters.items() if ".lora_B." not in name]
        groups = [{"params": rest, "ratio": 1.0}, {"params": b, "ratio": b_ratio}]
    return torch.optim.AdamW(groups, betas=config.betas, weight_decay=config.weight_decay, fused=True)


def _one_step(
    model: Any,
    rows: Sequence[Example],
    parameters: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    engine: EnginePath,
    step: int,
    last: dict[str, Any] | None,
    penalty: Callable[[Any], torch.Tensor] | None,
) -> dict[str, Any]:
    """Take one optimizer step and return its log entry."""
    labels = label_count(rows)
    total = 0.0
    optimizer.zero_grad(set_to_none=True)
    for batch in engine.batches(rows, config.micro_tokens):
        loss = engine.score(model, batch).nll.sum() / labels
        loss.backward()
        value = loss.item()  # after the backward: reading it makes a GPU wait
        if not math.isfinite(value):
            where = first_not_finite(model, batch, engine.score)
            raise Diverged(step, f"the loss is {value}; the first bad output is of {where}", last)
        del loss  # else its graph would live on beside the next one
        total += value
    if penalty is not None:
        penalty(model).backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters.values(), config.clip or math.inf).item()
    if not math.isfinite(norm):
        raise Diverged(step, f"the gradient of {_first_bad(parameters)} is not finite", last)
    rate = optimizer.param_groups[0]["lr"]
    optimizer.step()
    tokens = sum(len(row.input_ids) for row in rows)
    return {
        "step": step, "loss": total, "grad_norm": norm, "learning_rate": rate,
        "tokens": tokens, "label_tokens": labels,
    }  # fmt: skip


def _first_bad(parameters: dict[str, torch.nn.Parameter]) -> str:
    """Name the module whose gradient went first: backward runs from the last module to the first."""
    for name, parameter in reversed(parameters.items()):
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            return name
    return "no single module (their joint norm overflows)"


class StepLog:
    """`metrics.jsonl`: one line per step, appended; cut back to the checkpoint on resume."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last: dict[str, Any] | None = None
        self._file: Any = None

    def keep(self, steps: int) -> None:
        """Drop the lines past the last checkpoint (and a half-written one), then open for appending."""
        lines = self.path.read_text().splitlines()[:steps] if self.path.exists() else []
        aside = self.path.with_name(f".{self.path.name}")  # a kill here must not lose the earlier steps
        aside.write_text("".join(line + "\n" for line in lines))
        aside.replace(self.path)
        self.last = json.loads(lines[-1]) if lines else None
        self._file = self.path.open("a")

    def append(self, entry: dict[str, Any]) -> None:
        """Write one step and flush it."""
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        self.last = entry

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Keep:
    """The run's checkpoint file, with the parameters and the optimizer whose state it keeps."""

    def __init__(
        self, path: Path, parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer,
        extra: Mapping[str, torch.Tensor], about: Mapping[str, Any],
    ) -> None:  # fmt: skip
        self.path, self.parameters, self.optimizer = path, parameters, optimizer
        self.extra, self.about = extra, about

    def save(self, step: int, seconds: float) -> None:
        """Write the state after `step` steps."""
        state = checkpoint.gather(self.parameters, self.optimizer)
        checkpoint.write(
            self.path, checkpoint.Saved(step, seconds, state, dict(self.extra), dict(self.about))
        )

    def restore(self) -> tuple[int, float]:
        """Load the file if there is one; return (steps done, seconds spent)."""
        saved = checkpoint.read(self.path)
        if saved is None:
            return 0, 0.0
        checkpoint.restore(saved, self.parameters, self.optimizer)
        for name, tensor in self.extra.items():
            tensor.copy_(saved.extra[name])
        return saved.step, saved.seconds
