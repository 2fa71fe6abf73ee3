"""A request for a plan is met: rows are drawn, the probe measures on a model that is lent for the while."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from rankwise import calibration
from rankwise.agreement import Agreement, agreement
from rankwise.config import ScaleRule
from rankwise.errors import RankwiseError
from rankwise.evidence import Evidence, Kind, stand_in
from rankwise.plans import RankPlan
from rankwise.rows import RowsRead
from rankwise.seeds import derive
from rankwise.strategies import STRATEGIES, allocate, evidence_of, resolve

if TYPE_CHECKING:
    from rankwise.inventory import Inventory


@dataclass(frozen=True)
class Request:
    """What is asked of a plan, whatever the model and the rows come from: `planning.plan`'s arguments."""

    strategy: str
    budget: str | int | None
    match: Literal["budget", "none"] = "budget"
    targets: str | Sequence[str] = "all"
    scale: ScaleRule = field(default_factory=ScaleRule)
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    calibration: int = 32
    max_length: int = 256
    micro_tokens: int = 1024
    accept_unreachable: bool = False

    def __post_init__(self) -> None:
        """Refuse numbers that no plan can be made with.

        Raises:
            RankwiseError: naming the argument, its rule and its value.
        """
        for name, least in (("seed", 0), ("calibration", 1), ("max_length", 8), ("micro_tokens", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise RankwiseError(f"{name} must be a whole number of {least} or more; got {value!r}.")
        if not isinstance(self.targets, str | list | tuple):
            raise RankwiseError(
                f"targets must be all, a kind, a suffix, a regular expression or a list of those; got "
                f"{self.targets!r}."
            )

    def kind(self) -> Kind | None:
        """Return the probe that the strategy reads, None for none.

        Raises:
            RankwiseError: an unknown strategy or option, or a strategy that has no plan before training.
        """
        one, settings = resolve(self.strategy, self.options, self.seed)
        if one.kind == "trained":
            before = ", ".join(name for name, other in STRATEGIES.items() if other.kind != "trained")
            raise RankwiseError(
                f"Strategy {self.strategy} chooses its ranks while the adapters train, so it has no plan "
                f"before that: make it an arm of a study (`rankwise train STUDY.yaml --arm A --seed N`); "
                f"its run leaves the plan and the adapter. Strategies with a plan before training: {before}."
            )
        return evidence_of(self.strategy, settings)

    def reads_rows(self) -> bool:
        """Whether the strategy looks at data; the weights alone are not data."""
        return self.kind() not in (None, "weights")

    def allocate(self, modules: Inventory, model: str, probe: Evidence | None) -> RankPlan:
        """Return the plan on the target modules."""
        return allocate(
            modules, strategy=self.strategy, budget=self.budget, match=self.match, scale=self.scale,
            options=self.options, seed=self.seed, model=model, probe=probe,
        )  # fmt: skip


@dataclass(frozen=True)
class Found:
    """A plan, and what its reader must know.

    Attributes:
        plan: the plan; the first of several.
        notices: sentences.
        probes: what measuring cost, a sentence for every set of rows.
        agreement: how the plans of several sets of rows agree; None for one set.
    """

    plan: RankPlan
    notices: tuple[str, ...]
    probes: tuple[str, ...] = ()
    agreement: Agreement | None = None


def needed_rows(request: Request, data: Any, sets: int | None) -> RowsRead | None:
    """Read the calibration rows that a strategy needs; None where it needs none."""
    if not request.reads_rows():
        if sets is not None:
            raise RankwiseError(
                f"Strategy {request.strategy} looks at no data: every set of calibration rows would give the "
                "same plan, so there is no stability to measure."
            )
        return None
    if sets is not None and (isinstance(sets, bool) or not isinstance(sets, int) or sets < 2):
        raise RankwiseError(f"Stability compares 2 sets of calibration rows or more; got {sets!r}.")
    if data is None:
        raise RankwiseError(
            f"Strategy {request.strategy} looks at data: it needs calibration rows (`--data` on the command "
            "line, `data=` in Python)."
        )
    read = calibration.read(data)
    if sets is not None:
        calibration.need(sets, request.calibration, len({row.key for row in read.rows}), read.total)
    return read


def meet(
    model: Any,
    request: Request,
    name: str,
    read: RowsRead | None = None,
    tokenizer: Any = None,
    sets: int | None = None,
    *,
    engine: Any = None,
    fingerprint: str | None = None,
) -> Found:
    """Plan on every set of rows, on a model that is lent for the while."""
    from rankwise.borrowed import borrowed
    from rankwise.inventory import inventory

    modules = inventory(model, accept_unreachable=request.accept_unreachable).select(request.targets)  # type: ignore[arg-type]
    kind = request.kind()
    if kind is None:
        made = request.allocate(modules, name, None)
        return Found(made, tuple(made.provenance["notices"]))
    shapes = {module.name: (module.in_features, module.out_features) for module in modules}
    request.allocate(modules, name, stand_in(kind, shapes))  # what is refused is refused before measuring
    drawn = calibration.Calibration(((),), ())
    if read is not None:
        drawn = calibration.draw(
            read, tokenizer, count=request.calibration, sets=sets or 1, seed=request.seed,
            max_length=request.max_length,
        )  # fmt: skip
    with borrowed(model), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", category=FutureWarning, module="transformers|peft"
        )  # theirs to mend
        found = [*_evidence(model, modules, kind, request, drawn.sets, engine, fingerprint)]
    plans = [_noted(request.allocate(modules, name, evidence), drawn.notices) for evidence, _ in found]
    return Found(
        plans[0], tuple(plans[0].provenance["notices"]), tuple(cost for _, cost in found),
        None if sets is None else agreement(plans),
    )  # fmt: skip


def _evidence(
    model: Any,
    modules: Inventory,
    kind: Kind,
    request: Request,
    sets: Sequence[Sequence[Any]],
    engine: Any,
    fingerprint: str | None,
) -> Iterator[tuple[Evidence, str]]:
    """Yield what was measured on each set of rows, and a sentence on its cost."""
    from rankwise import probes
    from rankwise.engine.paths import Plain

    path = Plain() if kind == "weights" else engine(model)
    with _progress(f"{request.strategy}: measuring {kind}", len(sets)) as heard:
        for index, rows in enumerate(sets):
            begun = heard.calls
            evidence = probes.evidence(
                kind, model, modules, rows, engine=path, micro_tokens=request.micro_tokens,
                fingerprint=fingerprint, on_progress=heard.of(index),
                seed=derive(request.seed, "stability", index) if index else request.seed,
            )  # fmt: skip
            of = f" of {len(rows)} rows" if rows else ""
            cached = "; from the cache" if heard.calls == begun else ""
            yield evidence, f"{kind} probe{of}: {evidence.cost}{cached}"


def _noted(made: RankPlan, notices: Sequence[str]) -> RankPlan:
    """Return the plan with further notices in its provenance."""
    together = [*made.provenance["notices"], *notices]
    return made.model_copy(update={"provenance": made.provenance | {"notices": together}})


class _Heard:
    """Hears how far a probe is, and passes it on to a bar."""

    def __init__(self, advance: Callable[[float], None]) -> None:
        self.calls, self.advance = 0, advance

    def of(self, index: int) -> Callable[[int, int], None]:
        """Return what the probe of one set of rows calls with (done, total)."""

        def told(done: int, total: int) -> None:
            self.calls += 1
            self.advance(index + done / max(1, total))

        return told


@contextmanager
def _progress(words: str, sets: int) -> Iterator[_Heard]:
    """Show a bar on stderr while a probe measures, where stderr is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(words, total=sets)
        yield _Heard(lambda done: bar.update(task, completed=done))
