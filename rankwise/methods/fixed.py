"""Ranks that are settled before training: attach, train, done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rankwise.methods.session import Outcome, Session, adapted


@contextmanager
def fixed(session: Session) -> Iterator[tuple[Any, Outcome]]:
    """Train the plan as it is (see `session.Method`)."""
    with adapted(session, session.plan) as model:
        yield model, Outcome(session.train(model), session.plan, session.plan.parameters)
