"""The training loop, top to bottom: steps, gradients, clipping, AdamW, checkpoints, divergence."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rankwise.adapters import adapter_tensors
from rankwise.config import TrainConfig
from rankwise.data import Example
from rankwise.engine.batches import label_count
from rankwise.engine.paths import Path as EnginePath
from rankwise.engine.paths import Plain
from rankwise.engine.plain import first_not_finite
from rankwise.seeds import derive


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
) -> Trained:
    """Train the model's trainable parameters through all steps, resuming from `folder`.

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
        after_step: for methods that act during training; called with (model, steps done).

    Raises:
        Diverged: at the first loss or gradient that is not finite.
    """
    engine = engine or Plain()
    parameters = adapter_tensors(model)
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=rate, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )
    log = StepLog(folder / "metrics.jsonl")
    checkpoint = Checkpoint(folder / "checkpoint.safetensors", parameters, optimizer)
    done, spent = checkpoint.restore()
    log.keep(done)
    model.train()
    begun = saved = time.perf_counter()
    for step in range(done, len(steps)):
        for group in optimizer.param_groups:
            group["lr"] = rate * rate_factor(config, step, len(steps))
        torch.manual_seed(derive(seed, "dropout", step))
        started = time.perf_counter()
        entry = _one_step(model, steps[step], parameters, optimizer, config, engine, step, log.last)
        entry["seconds"] = time.perf_counter() - started
        if after_step is not None:
            after_step(model, step + 1)
        log.append(entry)
        on_step(entry)
        if time.perf_counter() - saved >= checkpoint_seconds or step == len(steps) - 1:
            saved = time.perf_counter()
            checkpoint.save(step + 1, spent + saved - begun)
    log.close()
    rows = [row for step in steps for row in step]
    tokens = sum(len(row.input_ids) for row in rows)
    seconds = spent + time.perf_counter() - begun
    return Trained(len(steps), tokens, label_count(rows), seconds, log.last["loss"] if log.last else math.nan)


def _one_step(
    model: Any,
    rows: Sequence[Example],
    parameters: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    engine: EnginePath,
    step: int,
    last: dict[str, Any] | None,
) -> dict[str, Any]:
    """Take one optimizer step and return its log entry."""
    labels = label_count(rows)
    total = 0.0
    optimizer.zero_grad(set_to_none=True)
    for batch in engine.batches(rows, config.micro_tokens):
        loss = engine.score(model, batch).nll.sum() / labels
        value = loss.item()
        if not math.isfinite(value):
            where = first_not_finite(model, batch, engine.score)
            raise Diverged(step, f"the loss is {value}; the first bad output is of {where}", last)
        loss.backward()
        del loss  # else its graph would live on beside the next one
        total += value
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


class Checkpoint:
    """Adapters and optimizer moments in one safetensors file, replaced atomically."""

    def __init__(
        self, path: Path, parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> None:
        self.path, self.parameters, self.optimizer = path, parameters, optimizer

    def save(self, step: int, seconds: float) -> None:
        """Write the state after `step` steps; a reader sees the old file or the new one."""
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in self.parameters.items():
            state = self.optimizer.state[parameter]
            tensors |= {f"value.{name}": parameter.detach(), f"step.{name}": state["step"].reshape(1)}
            tensors |= {f"{key}.{name}": state[key] for key in ("exp_avg", "exp_avg_sq")}
        aside = self.path.with_name(f".{self.path.name}")
        save_file(
            {k: v.contiguous() for k, v in tensors.items()},
            aside,
            {"step": str(step), "seconds": repr(seconds)},
        )
        aside.replace(self.path)

    def restore(self) -> tuple[int, float]:
        """Load the file if there is one; return (steps done, seconds spent)."""
        if not self.path.exists():
            return 0, 0.0
        with safe_open(self.path, "pt") as file, torch.no_grad():
            about = file.metadata()
            for name, parameter in self.parameters.items():
                parameter.copy_(file.get_tensor(f"value.{name}"))
                state = {key: file.get_tensor(f"{key}.{name}") for key in ("exp_avg", "exp_avg_sq")}
                state = {key: value.to(parameter.device) for key, value in state.items()}
                state["step"] = file.get_tensor(f"step.{name}").reshape(())
                self.optimizer.state[parameter] = state
        return int(about["step"]), float(about["seconds"])
