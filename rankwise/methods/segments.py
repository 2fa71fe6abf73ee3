"""Training in segments: between two of them the ranks change, and values and AdamW moments come along.

A segment ends in a checkpoint. The method looks at it and names other ranks; the state is pruned, then grown
(never over the budget in between), written back, and training goes on with the same schedule. A killed run
finds in the checkpoint which ranks it holds and which moves are behind it, so it resumes bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from rankwise import checkpoint
from rankwise.adapters import adapter_tensors
from rankwise.checkpoint import Saved
from rankwise.methods.resize import factors, resize
from rankwise.methods.session import Outcome, Session, adapted, replanned
from rankwise.plans import PlanModule, RankPlan
from rankwise.train import CHECKPOINT, Trained


@dataclass(frozen=True)
class Decision:
    """What a method wants at a boundary.

    Attributes:
        ranks: module name -> new rank.
        notes: the method's own account of why, as JSON; part of the move's record.
        memory: what it wants to be told at the next boundary, as JSON.
    """

    ranks: Mapping[str, int]
    notes: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)


Decide = Callable[[RankPlan, Saved, dict[str, Any]], Decision]
"""(present plan, state at the boundary, memory of the last decision) -> decision. A pure function."""


@contextmanager
def in_segments(
    session: Session, start: RankPlan, boundaries: Sequence[int], decide: Decide
) -> Iterator[tuple[Any, Outcome]]:
    """Train, asking `decide` at every boundary (see `session.Method`).

    Args:
        session: the run's training.
        start: the plan of the first segment; it may be over the budget, in the open (shrink).
        boundaries: optimizer steps, rising, after which the ranks may change.
        decide: names the new ranks.

    `Outcome.details` holds `moves`: for each boundary the step, `changes` (module -> rank before, after),
    `parameters` and mean `loss` per label token on the rows of the step just taken (forward only, without
    dropout, nothing learned) `before`, when `pruned` and when `grown`; `loss_jump`, from before to pruned, in
    nats; `seconds`, which count as training time; the method's notes. `changes` is empty where nothing moved.
    Growing changes the loss by rounding alone: below 1e-5 in fp32; on a bf16 engine a B that takes up a new
    scale is rounded anew (7e-4 nats seen on SmolLM2 under rslora).

    Cost of a boundary: three attachments and three forward passes over the rows of one step; less where
    nothing is pruned or nothing grows.
    """
    path = session.folder / CHECKPOINT
    while True:
        about = _about(path, start)
        plan = replanned(session.plan, about["ranks"])
        passed = {move["step"] for move in about["moves"]}
        boundary = next((step for step in boundaries if step not in passed), None)
        with adapted(session, plan) as model:
            trained = session.train(model, until=boundary, about=about)
            if boundary is None:
                yield model, _outcome(start, plan, about["moves"], trained)
                return
            began = time.perf_counter()
            loss = session.loss(model, boundary)
        _cross(session, plan, decide, loss, began)


def importance(saved: Saved, modules: Sequence[PlanModule], beta: float) -> dict[str, float]:
    """Return |<m, B>| of every adapted module, in nats per label token: what losing its update would cost.

    m is AdamW's bias-corrected running mean of dL/dB. As <dL/dB, B> = <G, s B A>, this is the first-order
    change of the loss when the module's whole update is set to zero (Taylor pruning: Molchanov et al., arXiv
    1611.06440, eq. 7, of a module in place of a channel). It takes no token beyond those trained on. First
    order: it says little of a module whose gradient has died down.
    """
    found = {}
    for module in modules:
        held = factors(saved, module.name)
        if held is not None:
            # the sum of many small products: float64, so that the order of summation cannot matter
            total = (held.b["exp_avg"].double() * held.b["value"].double()).sum().abs().item()
            found[module.name] = total / (1 - beta ** max(1.0, held.b["step"].item()))
    return found


def prior(module: PlanModule, known: Mapping[str, float], modules: Sequence[PlanModule]) -> float:
    """Return the value for a module that has none: the mean of its part's (`q_proj`, ...), else of all."""
    alike = [known[m.name] for m in modules if m.part == module.part and m.name in known]
    values = alike or list(known.values())
    return sum(values) / len(values) if values else 0.0


def _about(path: Path, start: RankPlan) -> dict[str, Any]:
    """Return where the run stands: the present ranks, the moves so far, the method's memory."""
    saved = checkpoint.read(path)
    return {"ranks": start.ranks, "moves": [], "memory": {}} if saved is None else saved.about


def _cross(session: Session, plan: RankPlan, decide: Decide, loss: float, began: float) -> None:
    """Let the method change the ranks at a boundary, and write the state to go on from."""
    path = session.folder / CHECKPOINT
    saved = checkpoint.read(path)
    assert saved is not None, "a segment ends in a checkpoint"
    about = saved.about
    decision = decide(plan, saved, about["memory"])
    after = replanned(session.plan, decision.ranks)
    assert after.budget == session.plan.budget, "ranks after a boundary keep to the budget"
    both = {name: [plan.ranks[name], rank] for name, rank in after.ranks.items()}
    changes = {name: pair for name, pair in both.items() if pair[0] != pair[1]}
    saved, measured = _moved(session, plan, after, saved, loss)
    seconds = time.perf_counter() - began
    move = {"step": saved.step, "changes": changes, **measured, **decision.notes, "seconds": seconds}
    about = {"ranks": after.ranks, "moves": [*about["moves"], move], "memory": decision.memory}
    checkpoint.write(path, replace(saved, about=about, seconds=saved.seconds + seconds))


def _moved(
    session: Session, before: RankPlan, after: RankPlan, saved: Saved, loss: float
) -> tuple[Saved, dict[str, Any]]:
    """Return the state under another plan, pruned first and then grown, and what that did to the loss."""
    lower = {name: min(rank, after.ranks[name]) for name, rank in before.ranks.items()}
    plan, parameters, losses = before, {"before": before.parameters}, {"before": loss}
    for name, other in (("pruned", replanned(session.plan, lower)), ("grown", after)):
        if other.ranks != plan.ranks:
            saved = resize(saved, plan, other, session.seed, session.directions)
            loss = _loss_of(session, other, saved)
        plan, parameters[name], losses[name] = other, other.parameters, loss
    jump = losses["pruned"] - losses["before"]
    return saved, {"parameters": parameters, "loss": losses, "loss_jump": jump}


@torch.no_grad()
def _loss_of(session: Session, plan: RankPlan, saved: Saved) -> float:
    """Return the loss of a state that no model holds yet."""
    if not plan.parameters:  # PEFT builds no adapter of no module
        with session.engine.installed(session.model):
            return session.loss(session.model, saved.step)
    with adapted(session, plan) as model:
        for name, parameter in adapter_tensors(model).items():
            parameter.copy_(saved.parameters[name]["value"])
        return session.loss(model, saved.step)


def _outcome(
    start: RankPlan, plan: RankPlan, moves: Sequence[Mapping[str, Any]], trained: Trained
) -> Outcome:
    most = max([start.parameters, *(move["parameters"]["grown"] for move in moves)])
    changed = sum(bool(move["changes"]) for move in moves)
    final = replanned(plan, plan.ranks, moves=changed, most_trained_parameters=most)
    return Outcome(trained, final, most, {"start": start.ranks, "moves": list(moves)})
