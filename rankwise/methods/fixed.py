"""Ranks that are settled before training: attach, train, done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rankwise.methods.session import Outcome, Session, adapted
from rankwise.train import train_adapters


@contextmanager
def fixed(session: Session) -> Iterator[tuple[Any, Outcome]]:
    """Train the plan as it is (see `session.Method`)."""
    with adapted(session, session.plan) as model:
        trained = train_adapters(
            model,
            session.steps,
            session.config,
            rate=session.rate,
            seed=session.seed,
            folder=session.folder,
            engine=session.engine,
            checkpoint_seconds=session.checkpoint_seconds,
            on_step=session.on_step,
            b_ratio=session.b_ratio,
        )
        yield model, Outcome(trained, session.plan, session.plan.parameters)
