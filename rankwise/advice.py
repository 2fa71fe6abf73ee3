"""A study's answer about its ladders, and its words. What it rests on is computed in `recommend`."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from rankwise import contrasts
from rankwise import ladder as ladders
from rankwise.errors import RankwiseError, one_of, visible
from rankwise.ladder import Decision
from rankwise.plans import RankPlan
from rankwise.savings import Savings, count, done, percent
from rankwise.tables import SAME, Results


@dataclass(frozen=True)
class Rung:
    """One plan of a ladder; None where there is nothing to show.

    Attributes:
        arm: its name.
        parameters: trained, the mean over seeds, rounded.
        losses: of the finished reporting runs, in the order of the seeds.
        loss: their mean.
        difference: mean loss minus that of the ladder's largest plan, over their common seeds.
        common: how many those are.
        bound: the one-sided upper bound of that difference at `level`.
        rival: the plan that this one is hardest to call no worse than.
        rival_bound: the upper bound of the difference to it; below the margin exactly when passed.
        level, p, passed: of the test against every other plan; None where it was not reached.
    """

    arm: str
    parameters: int | None
    losses: tuple[float, ...]
    loss: float | None
    difference: float | None
    common: int = 0
    bound: float | None = None
    rival: str | None = None
    rival_bound: float | None = None
    level: float | None = None
    p: float | None = None
    passed: bool | None = None


@dataclass(frozen=True)
class LadderResult:
    """One ladder's answer.

    Attributes:
        name: as declared.
        rungs: its plans, fewest parameters first.
        decision: of `ladder.decide`; None where there is no verdict.
        faults: why there is none, in clauses; empty with a decision.
        savings: of the chosen plan against the ladder's largest plan and against the study's baseline.
    """

    name: str
    rungs: tuple[Rung, ...]
    decision: Decision | None
    faults: tuple[str, ...]
    savings: tuple[Savings, ...]

    @property
    def arms(self) -> list[str]:
        """The plans' names, fewest parameters first."""
        return [rung.arm for rung in self.rungs]

    @property
    def pick(self) -> Rung | None:
        """The chosen plan."""
        chosen = None if self.decision is None else self.decision.chosen
        return None if chosen is None else self.rungs[chosen]

    @property
    def chosen(self) -> str | None:
        """The chosen plan's name."""
        return None if self.pick is None else self.pick.arm

    @cached_property
    def settling(self) -> ladders.Settling | None:
        """What it may take to settle the next plan down; None where nothing is open or decided."""
        return None if self.decision is None else self.decision.settling()

    def outlook(self) -> str:
        """Return in a clause what is not shown below the chosen plan, and what would settle it."""
        found = self.settling
        if self.decision is None or found is None:
            return f"no plan of ladder {self.name!r} is smaller"
        step = next(step for step in self.decision.steps if step.rung == found.rung)
        test, rival = step.tests[step.hardest], self.arms[step.rivals[step.hardest]]
        said = f"{self.arms[found.rung]} is not shown: against {rival} it may lose up to {test.bound:.4f}"
        if found.more_if_equal is None:
            return f"{said}, a margin that no number of seeds could show"
        if found.more is None:
            return f"{said} and looks worse by the margin or more"
        seeds = self.decision.seeds + found.more
        return f"{said}, and a new study of about {seeds:,} seeds would settle it"

    def account(self) -> list[str]:
        """Return this ladder's full account in sentences."""
        if self.decision is not None:
            reasons = ladders.reasons(self.decision, self.arms)
            return [
                *reasons,
                *(f"{s.arm} against {s.against}: {s.text()}{s.spread()}." for s in self.savings),
            ]
        largest = self.arms[-1]
        return [f"no verdict: {'; '.join(self.faults)}."] + [
            f"{rung.arm}: mean loss {rung.loss:.4f}, {rung.difference:+.4f} against {largest} over "
            f"{count(rung.common, 'seed')}."
            for rung in self.rungs[:-1]
            if rung.loss is not None and rung.difference is not None
        ]


@dataclass(frozen=True)
class Recommendation:
    """The answer of a study, with all that it rests on.

    Attributes:
        study: its name.
        ladders: as declared.
        baseline, share, margin: the margin is this share of what the baseline gains; None without records.
        alpha: of all ladders together.
        seeds: reporting seeds.
        exploratory: whether the study was changed after its first run.
        cautions: what must be read with the answer, in sentences.
        results: the records that it was made from.
    """

    study: str
    ladders: tuple[LadderResult, ...]
    baseline: str
    share: float
    margin: float | None
    alpha: float
    seeds: int
    exploratory: bool
    cautions: tuple[str, ...]
    results: Results = field(repr=False, compare=False)

    @property
    def decided(self) -> bool:
        """Whether some ladder could be tested; it may still be that no plan passed."""
        return any(found.decision is not None for found in self.ladders)

    @property
    def best(self) -> LadderResult | None:
        """The ladder whose plan is recommended: the fewest parameters, of equal ones the first declared."""
        found = [one for one in self.ladders if one.pick is not None]
        counts = [one.pick.parameters or 0 for one in found if one.pick is not None]
        return next((one for one, c in zip(found, counts, strict=True) if c <= SAME * min(counts)), None)

    @property
    def chosen(self) -> str | None:
        """The recommended arm; None where nothing is shown."""
        return None if self.best is None else self.best.chosen

    def sentence(self) -> str:
        """Return the answer in one sentence that a person can act on."""
        lead = "Exploratory, as the study was changed after its first run: " if self.exploratory else ""
        if not self.decided:
            whys = list(dict.fromkeys("; ".join(found.faults) for found in self.ladders))
            return f"{lead}No verdict: {'; '.join(whys)}."
        best = self.best
        parts = [self._advice(best) if best else self._nothing()]
        parts += [best.outlook()] if best else []
        parts += [self._beside(found, best) for found in self.ladders if found is not best]
        return lead + "; ".join(filter(None, parts)) + "."

    def _advice(self, best: LadderResult) -> str:
        of_largest = [s for s in best.savings if s.against == best.arms[-1]]
        saves = f"at {of_largest[0].text()} against {best.arms[-1]}" if of_largest else "the largest of them"
        return (
            f"Use {best.chosen}: with {self.seeds} seeds it is shown at the {percent(self.alpha)} level to "
            f"lose less than {self._margin()} against every plan of ladder {best.name!r}, {saves}"
        )

    def _margin(self) -> str:
        return f"{self.margin:.4f} ({percent(self.share)} of what {self.baseline} gains)"

    def _nothing(self) -> str:
        return (
            f"No plan is shown, with {self.seeds} seeds, to lose less than {self._margin()} against every "
            "plan of its ladder"
        )

    def _beside(self, found: LadderResult, best: LadderResult | None) -> str:
        """Return the clause of a ladder other than the one whose plan is recommended."""
        if found.decision is None:
            return f"ladder {found.name!r} has no verdict: {'; '.join(found.faults)}"
        if found.pick is None:
            said = "" if best is None else f"no plan of ladder {found.name!r} is shown: "
            return said + found.outlook()
        if found.chosen == self.chosen:
            return f"ladder {found.name!r} names it too"
        apart = statistics.fmean(contrasts.differences(self.results, str(found.chosen), str(self.chosen)))
        return (
            f"of ladder {found.name!r} {found.chosen} is shown, at {found.pick.parameters:,} parameters and "
            f"an observed {apart:+.4f} of loss, not tested against {self.chosen}"
        )

    def sentences(self) -> list[str]:
        """Return the full account: the answer, each ladder's tests and savings, the plan, the cautions."""
        lines = [self.sentence()]
        for found in self.ladders:
            lines += [f"ladder {found.name!r}: {line}" for line in found.account()]
        if len(self.ladders) > 1:
            each = percent(self.alpha / len(self.ladders))
            lines.append(
                f"The {len(self.ladders)} ladders share the {percent(self.alpha)}: each is tested at {each}."
            )
        return lines + self._between() + self._plan_note() + list(self.cautions)

    def _between(self) -> list[str]:
        """Say that the recommended plan was not tested against the other ladders' plans."""
        others = [found.chosen for found in self.ladders if found is not self.best and found.chosen]
        lines = []
        for other in others:
            if other == self.chosen:
                continue
            found = contrasts.differences(self.results, str(self.chosen), other)
            lines.append(
                f"{self.chosen} is recommended before {other}: it has fewer parameters, or as many (within "
                f"{percent(SAME - 1)}) and stands in the ladder declared first. The two were not tested "
                f"against each other (observed difference {statistics.fmean(found):+.4f})."
            )
        return lines

    def _plan_note(self) -> list[str]:
        """Say whether the plan is the same for every seed, and if not, how far plans differ."""
        if self.chosen is None:
            return []
        plans = self._plans(self.chosen)
        if not plans:
            return []
        (first, plan), *others = plans.items()
        moved = [
            statistics.fmean(plan["ranks"][n] != other["ranks"].get(n) for n in plan["ranks"])
            for _, other in others
        ]
        if not any(moved):
            return [f"The plan of {self.chosen} is the same for every seed."]
        return [
            f"The plan of {self.chosen} differs by seed: against that of seed {first}, which is handed out, "
            f"{percent(statistics.fmean(moved))} of the modules have another rank in the mean of the other "
            f"seeds (at most {percent(max(moved))}); the verdict is about the strategy, not about one plan."
        ]

    def _plans(self, arm: str) -> dict[int, dict[str, Any]]:
        runs = {seed: record["run_id"] for seed, record in sorted(done(self.results, arm).items())}
        found = {seed: self.results.store.plan(run_id) for seed, run_id in runs.items()}
        return {seed: plan for seed, plan in found.items() if plan is not None}

    def plan_of(self, seed: int | None = None) -> RankPlan:
        """Return the recommended plan, ready to use; by default that of the lowest reporting seed.

        Raises:
            RankwiseError: nothing is recommended, or the arm has no finished run of that seed.
        """
        if self.chosen is None:
            raise RankwiseError(f"there is no plan to hand out. {self.sentence()}")
        runs = {s: record["run_id"] for s, record in sorted(done(self.results, self.chosen).items())}
        wanted = next(iter(runs)) if seed is None else seed
        if wanted not in runs:
            raise RankwiseError(one_of("seed", wanted, map(str, runs)))
        return RankPlan.load(self.results.store.path(runs[wanted]) / "plan.json")

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        own = ("study", "baseline", "share", "margin", "alpha", "seeds", "exploratory")
        return {
            "decided": self.decided,
            "chosen": self.chosen,
            "ladder": None if self.best is None else self.best.name,
            "sentence": self.sentence(),
            "sentences": self.sentences(),
            **{name: getattr(self, name) for name in own},
            "cautions": list(self.cautions),
            "ladders": [_ladder_dict(found) for found in self.ladders],
        }

    def table(self) -> Table:
        """Return every ladder's plans: what they cost, what they lose, and how the tests went."""
        table = Table(title=escape(visible(f"{self.study}: ladders")), box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("plan", overflow="fold")
        for heading in ("parameters", "loss", "to largest", "at most", "hardest rival", "at most", "level"):
            table.add_column(heading, justify="right", overflow="fold")
        table.add_column("shown", no_wrap=True)
        for found in self.ladders:
            table.add_section()
            for rung in found.rungs:
                mark = " <" if rung.arm == found.chosen else ""
                table.add_row(*(escape(visible(cell)) for cell in _cells(rung, mark)))
        margin = contrasts.margin_words(self.results) or "the margin is not known yet"
        lines = [f"{margin}; <: the cheapest that is shown to be within it of every plan of its ladder"]
        lines += [
            f"ladder {one.name!r}: no verdict: {'; '.join(one.faults)}" for one in self.ladders if one.faults
        ]
        table.caption = escape(visible(lines[0])) + "".join(
            "\n" + escape(visible(line)) for line in lines[1:]
        )
        table.caption_justify = "left"
        return table


def _ladder_dict(found: LadderResult) -> dict[str, Any]:
    settling = found.settling
    return {
        "name": found.name,
        "chosen": found.chosen,
        "faults": list(found.faults),
        "alpha": None if found.decision is None else found.decision.alpha,
        "plans": [asdict(rung) | {"losses": list(rung.losses)} for rung in found.rungs],
        "savings": [
            asdict(s) | {"seconds_range": list(s.seconds_range or ()) or None} for s in found.savings
        ],
        "settling": None if settling is None else asdict(settling) | {"rung": found.arms[settling.rung]},
    }


def _cells(rung: Rung, mark: str) -> list[str]:
    rival = "-" if rung.rival is None else rung.rival
    words = {True: "yes", False: "no", None: "not tested"}
    return [
        rung.arm + mark,
        "-" if rung.parameters is None else f"{rung.parameters:,}",
        _number(rung.loss, ".4f"),
        _number(rung.difference, "+.4f"),
        _number(rung.bound, "+.4f"),
        rival,
        _number(rung.rival_bound, "+.4f"),
        _number(rung.level, ".2%"),
        words[rung.passed],
    ]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
