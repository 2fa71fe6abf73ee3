"""What a training method is given, what it gives back, and the model with a plan's adapters on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rankwise import adapters
from rankwise.config import TrainConfig
from rankwise.data import Example
from rankwise.engine.paths import Path as EnginePath
from rankwise.evaluate import evaluate
from rankwise.inventory import Inventory
from rankwise.plans import RankPlan
from rankwise.train import Trained, train_adapters


@dataclass(frozen=True)
class Session:
    """One run's training, as far as a method decides it.

    Attributes:
        model: the base model, frozen, without adapters.
        inventory: the modules that may get ranks (the arm's targets).
        plan: what training starts from; its budget and scale rule are the arm's.
        engine: the way through the model, not yet installed.
        steps: the rows of every optimizer step; every token counts, whatever a method does with it.
        config: optimizer, schedule, micro-batches.
        rate: peak learning rate.
        seed: the run's.
        folder: holds the checkpoint and the step log while the run lasts; a killed run finds them there.
        directions: module name -> (k, in_features), along which A's rows start; empty for PEFT's default.
        b_ratio: learning rate of B over that of A.
        checkpoint_seconds: time between checkpoints.
        on_step: hears each step's log entry.
    """

    model: Any
    inventory: Inventory
    plan: RankPlan
    engine: EnginePath
    steps: Sequence[Sequence[Example]]
    config: TrainConfig
    rate: float
    seed: int
    folder: Path
    directions: Mapping[str, np.ndarray] = field(default_factory=dict)
    b_ratio: float = 1.0
    checkpoint_seconds: float = 30.0
    on_step: Callable[[dict[str, Any]], None] = lambda entry: None

    def train(self, model: Any, **more: Any) -> Trained:
        """Train an adapted model, ready on the session's engine; `more` goes to `train_adapters`."""
        return train_adapters(
            model, self.steps, self.config, rate=self.rate, seed=self.seed, folder=self.folder,
            engine=self.engine, checkpoint_seconds=self.checkpoint_seconds, on_step=self.on_step,
            b_ratio=self.b_ratio, **more,
        )  # fmt: skip

    def loss(self, model: Any, step: int) -> float:
        """Return the mean loss per label token on the rows of the last of `step` steps, without dropout.

        Raises:
            FloatingPointError: it is not finite.

        Cost: a forward pass over those rows; nothing is learned.
        """
        rows, micro_tokens = self.steps[step - 1], self.config.micro_tokens
        return float(evaluate(model, rows, micro_tokens=micro_tokens, engine=self.engine).metrics["loss"])


@dataclass(frozen=True)
class Outcome:
    """What training ended in.

    Attributes:
        trained: steps, tokens, seconds, final loss.
        plan: the final ranks, as the model has them.
        trained_parameters: the most adapter parameters that were trained at any step.
        details: the method's own account (moves, losses around them, ...), as JSON.
    """

    trained: Trained
    plan: RankPlan
    trained_parameters: int
    details: dict[str, Any] = field(default_factory=dict)


Method = Callable[[Session], AbstractContextManager[tuple[Any, Outcome]]]
"""Trains and yields the adapted model, installed on the session's engine and ready to be scored, and the
outcome; takes everything off the base model again at the end, whatever happens."""


@contextmanager
def adapted(session: Session, plan: RankPlan) -> Iterator[Any]:
    """Yield the base model with a plan's adapters, ready to train; then take them off it again."""
    dropout, directions = session.config.dropout, session.directions
    model = adapters.attach(session.model, plan, seed=session.seed, dropout=dropout, directions=directions)
    with ready(session, model):
        yield model


@contextmanager
def ready(session: Session, model: Any) -> Iterator[None]:
    """Make a PEFT model ready to train on the session's engine; then take the adapters off its base."""
    config, was_training = session.config, session.model.training
    try:
        if config.gradient_checkpointing:
            # not reentrant, so that the frozen input needs no gradient; Transformers asks for it regardless
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.disable_input_require_grads()  # else backward would reach below the lowest adapter
        with session.engine.installed(model):
            yield
    finally:
        if config.gradient_checkpointing:
            model.gradient_checkpointing_disable()
        adapters.detach(model).train(was_training)


def replanned(plan: RankPlan, ranks: Mapping[str, int], **provenance: Any) -> RankPlan:
    """Return the plan with other ranks, its provenance completed.

    A plan whose ranks cost more than its budget becomes one without a budget (`match: none`), so that tables
    set it outside the equal-budget comparison.
    """
    fields = plan.model_dump()
    fields["ranks"] = {name: int(ranks.get(name, 0)) for name in plan.ranks}
    costs = {module.name: module.cost for module in plan.modules}
    if plan.budget is not None and sum(costs[n] * r for n, r in fields["ranks"].items()) > plan.budget:
        fields |= {"match": "none", "budget": None}
    fields["provenance"] = plan.provenance | provenance
    return RankPlan.model_validate(fields)
