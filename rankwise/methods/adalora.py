"""AdaLoRA (arXiv 2303.10512): starts with spare rank and masks the least important triplets while it trains.

PEFT's own layers, importance and schedule of ranks (`peft.tuners.adalora`); only the loop is ours, so:

- the orthogonality term, which PEFT adds where the model returns a loss, is added once per optimizer step;
- importance reads the gradients after clipping, and after the optimizer has moved the weights, as PEFT's does
  where `update_and_allocate` stands behind `optimizer.step()`;
- a triplet is a row of A, an entry of E and a column of B; W + s B diag(E) A.

PEFT's schedule counts ranks, not parameters: the final plan has the plan's number of ranks, which may cost
more than its budget (it is then a plan without one) or less.

The scale s is the plan's rule at the initial rank. PEFT keeps it while triplets fall; under `constant` it is
that of every other arm, under `alpha` and `rslora` that of an arm whose ranks are all the initial one.

At the end E, and what s differs from the rule at the final rank, fold into B: the result is plain LoRA. In
half precision PEFT's AdaLoRA computes its update in fp32 and the packed path LoRA's in half precision, so
there the loss may move by rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import AdaLoraConfig, get_peft_model

from rankwise import adapters, checkpoint
from rankwise.adapters import ADAPTER
from rankwise.errors import RankwiseError
from rankwise.lowrank import truncate
from rankwise.methods.session import Outcome, Session, adapted, ready, replanned
from rankwise.plans import RankPlan
from rankwise.seeds import generator
from rankwise.train import CHECKPOINT, Trained

BETA = 0.85
"""Of both moving averages: the paper's, and PEFT's default."""

ORTHOGONALITY = 0.5
"""Weight of the orthogonality term: PEFT's default (`orth_reg_weight`)."""

SPREAD = 0.02
"""Standard deviation that A and B start with: PEFT's."""

LEAST_STEPS = 3
"""One to measure importance, one to mask by it, one to train what is left."""

SAME = 1e-5
"""Largest relative difference that the conversion to plain LoRA may make."""

AVERAGES = ("exp_avg_ipt", "exp_avg_unc")
"""What PEFT's allocator remembers of every weight: smoothed importance, and its uncertainty."""

Pattern = Mapping[str, list[bool]]
Update = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Schedule:
    """When rank falls, in optimizer steps, and from where to where, in ranks.

    Attributes:
        target_r: the plan's mean rank.
        init_r: rank of every module at the start.
        tinit: steps before the first triplet is masked.
        tfinal: steps after the last one is, with the ranks then fixed.
        delta_t: steps between two maskings.
        total_step: the run's steps.
    """

    target_r: float
    init_r: int
    tinit: int
    tfinal: int
    delta_t: int
    total_step: int


def schedule(plan: RankPlan, steps: int) -> Schedule:
    """Return the schedule of a run.

    The first tenth of the steps keeps all ranks, the last three tenths (one step at least) the final ones.
    init_r is the option `factor` times the plan's mean rank, rounded half up, and more than that mean.

    Args:
        plan: what training starts from.
        steps: of the optimizer.

    Raises:
        RankwiseError: fewer steps than `LEAST_STEPS`.
    """
    if steps < LEAST_STEPS:
        raise RankwiseError(
            f"adalora needs {LEAST_STEPS} optimizer steps or more, to measure, mask and go on; this run has "
            f"{steps}. Give it more rows or epochs, or smaller steps."
        )
    mean = sum(plan.ranks.values()) / len(plan.ranks)
    init = max(_half_up(plan.options["factor"] * mean), math.floor(mean) + 1)
    last = max(1, _half_up(0.3 * steps))
    return Schedule(mean, init, _half_up(0.1 * steps), last, plan.options["every"], steps)


@contextmanager
def adalora(session: Session) -> Iterator[tuple[Any, Outcome]]:
    """Train PEFT's AdaLoRA, then yield it as plain LoRA of the final ranks (see `session.Method`).

    Raises:
        RankwiseError: A is to start along directions; too few steps; PEFT adapted other modules than the
            plan's; the conversion changed the update or, in fp32, the loss.
    """
    if session.directions:
        raise RankwiseError(
            "init does not apply to adalora, whose A and B start as PEFT draws them: use `init: default`."
        )
    timing = schedule(session.plan, len(session.steps))
    tuned = attach(session, timing)
    layers = _layers(tuned)
    with ready(session, tuned):
        most = adapters.trainable_parameters(tuned)
        trained, pattern, masked = _train(session, tuned)
        unfused = len(session.engine.unfused)
        before = session.loss(tuned, len(session.steps))
    plan, updates = _converted(session.plan, layers, pattern)
    with adapted(session, plan) as model:
        _load(model, plan, updates)
        _prove_updates(model, layers, plan)
        after = session.loss(model, len(session.steps))
        _prove_loss(session, before, after)
        details = {
            "schedule": asdict(timing) | {"beta1": BETA, "beta2": BETA, "orth_reg_weight": ORTHOGONALITY},
            "scale": session.plan.scale.scaling(timing.init_r),
            "trained_parameters": most,
            "final_parameters": plan.parameters,
            "ranks": _spread(plan),
            "masked": masked,
            "conversion": {"loss_before": before, "loss_after": after},
            "unfused_in_training": unfused,
        }
        yield model, Outcome(trained, plan, most, details)


def attach(session: Session, timing: Schedule) -> Any:
    """Put PEFT's AdaLoRA on every module of the plan, at the initial rank.

    A and B are normal with deviation 0.02, as PEFT's, but drawn from (seed, module name); E is 0. Adapters
    are fp32.

    Raises:
        RankwiseError: PEFT adapted other modules, or trains other parameters, than A, B and E of the plan's.
    """
    plan = session.plan
    scale = plan.scale.scaling(timing.init_r)
    config = AdaLoraConfig(
        task_type="CAUSAL_LM",
        init_r=timing.init_r,
        target_r=max(1, round(timing.target_r)),
        tinit=timing.tinit,
        tfinal=timing.tfinal,
        deltaT=timing.delta_t,
        total_step=timing.total_step,
        beta1=BETA,
        beta2=BETA,
        orth_reg_weight=ORTHOGONALITY,
        lora_alpha=scale * (timing.init_r + 1e-5),  # type: ignore[arg-type]  # the layer divides by this
        lora_dropout=session.config.dropout,
        target_modules=list(plan.ranks),
        exclude_modules=list(plan.exclude) or None,
        fan_in_fan_out=all(module.conv1d for module in plan.modules),
    )
    model: Any = get_peft_model(session.model, config, autocast_adapter_dtype=True)
    # exact where the mean rank is not whole, which `target_r` must be
    model.base_model.rankallocator.target_bgt = sum(plan.ranks.values())
    for name, layer in _layers(model).items():
        _initialise(layer, name, session.seed)
    built = _layers(model).keys()
    wanted = sum(timing.init_r * (module.cost + 1) for module in plan.modules)
    counted = adapters.trainable_parameters(model)
    if built != plan.ranks.keys() or counted != wanted:
        adapters.detach(model)
        raise RankwiseError(
            f"PEFT's AdaLoRA adapted {len(built)} modules with {counted:,} parameters; the plan has "
            f"{len(plan.ranks)} with {wanted:,} at rank {timing.init_r}."
        )
    return model


@torch.no_grad()
def _initialise(layer: Any, name: str, seed: int) -> None:
    a, b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
    rows = generator(seed, "adalora_A", name).normal(0, SPREAD, tuple(a.shape))
    columns = generator(seed, "adalora_B", name).normal(0, SPREAD, tuple(b.t().shape))
    a.copy_(torch.from_numpy(rows))
    b.copy_(torch.from_numpy(columns).t())
    layer.lora_E[ADAPTER].zero_()
    # on half-precision models PEFT casts this divisor into a parameter that would be trained
    layer.ranknum[ADAPTER].requires_grad_(False)


def orthogonality(model: Any) -> torch.Tensor:
    """Return PEFT's term: the weight times the mean over all A and B of ||A A' - I||_F, ||B' B - I||_F.

    The paper (eq. 4) has squares and a sum; this is what `AdaLoraModel.forward` adds to the model's loss.
    """
    gaps = []
    for layer in _layers(model).values():
        a, b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
        gaps += [_gap(a @ a.T), _gap(b.T @ b)]
    return ORTHOGONALITY * torch.stack(gaps).mean()


def _gap(products: torch.Tensor) -> torch.Tensor:
    return torch.linalg.matrix_norm(products - torch.eye(len(products), device=products.device))


def _train(session: Session, tuned: Any) -> tuple[Trained, Pattern, list[list[int]]]:
    """Return what training cost, the triplets that are left, and (step, triplets) after each masking."""
    drive = _Drive(tuned)
    saved = checkpoint.read(session.folder / CHECKPOINT)
    if saved is not None:
        drive.remember(saved.about)
    trained = session.train(
        tuned, after_step=drive.after_step, penalty=orthogonality, extra=drive.tensors, about=drive.about
    )
    return trained, drive.about["rank_pattern"], drive.about["masked"]


class _Drive:
    """Calls PEFT's allocator after every step, its state held where checkpoints keep it.

    Attributes:
        tensors: both moving averages of every weight's importance, by "average.parameter name".
        about: PEFT's rank pattern as of the last masking, and what each masking left.
    """

    def __init__(self, tuned: Any) -> None:
        self.tuner = tuned.base_model
        self.allocator = self.tuner.rankallocator
        weights = {n: p for n, p in self.tuner.model.named_parameters() if p.requires_grad}
        self.tensors = {f"{kind}.{n}": torch.zeros_like(p) for kind in AVERAGES for n, p in weights.items()}
        self.about: dict[str, Any] = {"rank_pattern": None, "masked": []}

    def remember(self, about: Mapping[str, Any]) -> None:
        """Take up the patterns of a checkpoint; `train_adapters` restores the tensors."""
        self.about.update(about)
        self.tuner.peft_config[ADAPTER].rank_pattern = about["rank_pattern"]

    def after_step(self, model: Any, done: int) -> None:
        """Update importance and mask, after the optimizer's step (1-based) and before `zero_grad`."""
        for kind in AVERAGES:  # PEFT makes new tensors at every step: hand over, then copy back in place
            held = {n.partition(".")[2]: t for n, t in self.tensors.items() if n.startswith(f"{kind}.")}
            setattr(self.allocator, kind, held)
        self.allocator.ipt = dict(self.allocator.exp_avg_ipt)  # else PEFT starts its averages anew
        config = self.tuner.peft_config[ADAPTER]
        last = config.rank_pattern
        self.tuner.update_and_allocate(done)
        for kind in AVERAGES:
            for name, tensor in getattr(self.allocator, kind).items():
                self.tensors[f"{kind}.{name}"].copy_(tensor)
        if config.rank_pattern is not last:
            left = sum(map(sum, config.rank_pattern.values()))
            self.about["rank_pattern"] = config.rank_pattern
            self.about["masked"] = [*self.about["masked"], [done, left]]


def final_ranks(plan: RankPlan, pattern: Pattern) -> dict[str, int]:
    """Return the ranks that a pattern leaves, at most full rank.

    An adapter without any rank cannot be written. If nothing is left (every importance equal), the cheapest
    module gets rank 1, whose update is zero.

    Args:
        plan: for the modules.
        pattern: PEFT's: "module.lora_E.default" -> whether each triplet is kept.
    """
    kept = {m.name: min(sum(pattern[_key(m.name)]), m.max_rank) for m in plan.modules}
    if not any(kept.values()):
        kept[min(plan.modules, key=lambda module: module.cost).name] = 1
    return kept


def _key(name: str) -> str:
    return f"{name}.lora_E.{ADAPTER}"


@torch.no_grad()
def _converted(
    start: RankPlan, layers: Mapping[str, Any], pattern: Pattern
) -> tuple[RankPlan, dict[str, Update]]:
    """Return the final plan, and every module's update as plain factors A and s B diag(E) of its rank."""
    ranks = final_ranks(start, pattern)
    updates = {}
    for name, rank in ranks.items():
        layer, kept = layers[name], torch.tensor(pattern[_key(name)])
        a, b, e = (f[ADAPTER].detach() for f in (layer.lora_A, layer.lora_B, layer.lora_E))
        kept = kept.to(a.device)
        a, b = a[kept], effective_scale(layer) * b[:, kept] * e[kept, 0]
        if len(a) > rank:
            a, b = truncate(a, b, rank)  # more triplets than full rank: nothing is lost
        elif len(a) < rank:
            a, b = a.new_zeros(rank, a.shape[1]), b.new_zeros(len(b), rank)
        updates[name] = (a.clone(), b)
    return replanned(start, ranks, counted="ranks, not parameters, as PEFT's AdaLoRA does"), updates


def effective_scale(layer: Any) -> float:
    """Return the factor in front of B diag(E) A in the forward pass of PEFT's layer."""
    return float(layer.scaling[ADAPTER] / (layer.ranknum[ADAPTER] + 1e-5))


@torch.no_grad()
def _load(model: Any, plan: RankPlan, updates: Mapping[str, Update]) -> None:
    for name, layer in _layers(model).items():
        a, b = updates[name]
        layer.lora_A[ADAPTER].weight.copy_(a)
        layer.lora_B[ADAPTER].weight.copy_(b / plan.scale.scaling(plan.ranks[name]))


@torch.no_grad()
def _prove_updates(model: Any, before: Mapping[str, Any], plan: RankPlan) -> None:
    """Compare the updates of the weights, as PEFT computes them for AdaLoRA and for LoRA, one at a time."""
    after = _layers(model)
    for name in plan.ranks:
        wanted = before[name].get_delta_weight(ADAPTER)
        gap = wanted - after[name].get_delta_weight(ADAPTER) if name in after else wanted
        if not gap.norm() <= SAME * wanted.norm():
            raise RankwiseError(
                f"{name}: its update as plain LoRA is {gap.norm():.2g} from AdaLoRA's, of norm "
                f"{wanted.norm():.2g}."
            )


def _prove_loss(session: Session, before: float, after: float) -> None:
    """Compare the losses where rounding is too fine to move them."""
    whole = all(p.dtype == torch.float32 for p in session.model.parameters() if p.is_floating_point())
    if whole and not abs(after - before) <= SAME * max(1.0, abs(before)):
        raise RankwiseError(f"The loss was {before} as AdaLoRA and is {after} as plain LoRA.")


def _spread(plan: RankPlan) -> dict[str, Any]:
    ranks = list(plan.ranks.values())
    return {
        "lowest": min(ranks), "highest": max(ranks), "mean": sum(ranks) / len(ranks), "zero": ranks.count(0),
    }  # fmt: skip


def _layers(model: Any) -> Mapping[str, Any]:
    """Return the adapted layers by module name; PEFT's types know nothing of AdaLoRA's E."""
    return adapters.lora_layers(model)


def _half_up(value: float) -> int:
    return math.floor(value + 0.5)
