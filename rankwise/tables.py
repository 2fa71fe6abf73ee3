"""From a study's index and records to the tables that people read. No torch; nothing is typed in by hand."""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from rankwise import stats
from rankwise.config import SCREENING_BELOW, StudyConfig
from rankwise.errors import RankwiseError
from rankwise.power import RESERVE, design_answers, provable_margin
from rankwise.store import Store, read_json

SAME = 1.05
"""Arms of one budget differ by what whole ranks leave over; within 5 % their parameters count as equal."""

QUARTER = 4
"""The training loss that an arm ends with is the mean over this share of its steps (a quarter)."""


@dataclass(frozen=True)
class ArmRow:
    """One arm's line in the result table; None where there is nothing to show yet."""

    arm: str
    ranks: tuple[int, int] | None  # lowest and highest over modules and seeds
    scale: str
    parameters: tuple[int, int] | None  # fewest and most over the seeds
    most_trained: int | None  # the most that were trained at any step, where that is more
    equal_budget: bool
    rate: float | None
    rate_how: str
    done: int
    failed: int
    wanted: int
    loss: float | None
    loss_sd: float | None
    perplexity: float | None
    gain: float | None
    token_accuracy: float | None
    bits_per_byte: float | None
    tokens_per_second: float | None
    peak_bytes: int | None
    forgetting: float | None = None  # loss on general text, minus the untouched model's
    rouge_l: float | None = None
    chrf: float | None = None
    rank_used: float | None = None  # share of the allotted units that hold 90 % of the update's energy
    seconds_to_baseline: float | None = None  # of training, until its loss is what the baseline's ends with
    adapter_bytes: int | None = None

    @property
    def other_budget(self) -> bool:
        """Whether it trained other parameters than the baseline's budget; not known before its first run."""
        return self.parameters is not None and not self.equal_budget


class Results:
    """A study's index with the records that it names, as far as they exist."""

    def __init__(self, store: Store) -> None:
        path = store.folder / "study.json"
        if not path.exists():
            raise RankwiseError(f"no results yet at {path}: run the study first (`rankwise study run`).")
        remedy = "It is written anew by `rankwise study run`; no finished run is lost."
        self.index = read_json(path, ("config", "resolved", "exploratory", "rates", "runs"), remedy)
        try:
            self.config = StudyConfig.model_validate(self.index["config"])
        except ValidationError as error:
            raise RankwiseError(
                f"{path} holds no sound study ({error.error_count()} faults). {remedy}"
            ) from None
        self.store = store
        self._plans: dict[str, list[dict[str, Any]]] = {}
        self._rows: dict[str, dict[str, tuple[float, int]]] = {}
        self.records = {
            run["run_id"]: store.record(run["run_id"])
            for run in self.index["runs"]
            if store.has(run["run_id"])
        }

    def of(self, arm: str, role: str = "reporting") -> dict[int, dict[str, Any]]:
        """Return seed -> record of an arm's finished runs, the failed ones included."""
        runs = (r for r in self.index["runs"] if r["arm"] == arm and r["role"] == role)
        return {r["seed"]: self.records[r["run_id"]] for r in runs if r["run_id"] in self.records}

    def losses(self, arm: str) -> dict[int, float]:
        """Return seed -> primary metric of the runs that are done."""
        metric = self.config.primary
        return {
            s: r["train_info"]["metrics"][metric] for s, r in self.of(arm).items() if r["status"] == "done"
        }

    def steps(self, arm: str) -> dict[int, list[dict[str, Any]]]:
        """Return seed -> step log of the arm's runs that are done and have one."""
        return {
            seed: found
            for seed, record in self.of(arm).items()
            if record["status"] == "done" and (found := self.store.steps(record["run_id"]))
        }

    def rows(self, arm: str, seed: int) -> dict[str, tuple[float, int]]:
        """Return row hash -> (loss in nats summed over its label tokens, label tokens) of a reporting run."""
        run_id = self.of(arm)[seed]["run_id"]
        if run_id not in self._rows:
            table = self.store.table(run_id, "examples.parquet")
            columns = (table.column(name).to_pylist() for name in ("row_hash", "nll", "tokens"))
            self._rows[run_id] = {row: (nll, tokens) for row, nll, tokens in zip(*columns, strict=True)}
        return self._rows[run_id]

    def untouched(self) -> float | None:
        """Return the primary metric of the model without adapters."""
        return self.untouched_metrics().get(self.config.primary)

    def untouched_metrics(self) -> dict[str, float]:
        """Return all metrics of the model without adapters; empty before it was measured."""
        record = self.of("untouched", "untouched").get(0)
        return {} if record is None or record["status"] != "done" else record["train_info"]["metrics"]

    def plans(self, arm: str) -> list[dict[str, Any]]:
        """Return the plans of the arm's finished runs; a seed may have its own."""
        if arm not in self._plans:  # each is 80 kB of JSON, and a table asks several times
            found = (self.store.plan(record["run_id"]) for record in self.of(arm).values())
            self._plans[arm] = [plan for plan in found if plan is not None]
        return self._plans[arm]

    def lost(self) -> int:
        """Count the failed reporting runs and hopeless arms; a rate that diverged in tuning is a finding."""
        roles = {r["run_id"]: r["role"] for r in self.index["runs"]}
        failed = [i for i, r in self.records.items() if r["status"] == "failed" and roles[i] != "tuning"]
        return len(failed) + sum(hopeless(choice) for choice in self.index["rates"].values())

    def failures(self) -> list[str]:
        """Return one sentence for every failed run."""
        arms = {r["run_id"]: r for r in self.index["runs"]}
        return [
            f"{arms[i]['arm']} ({arms[i]['role']}, seed {arms[i]['seed']}{_rate(arms[i]['rate'])}) failed"
            f" at step {r['failure']['step']}: {r['failure']['reason']}"
            for i, r in self.records.items()
            if r["status"] == "failed"
        ]


def arm_rows(results: Results) -> list[ArmRow]:
    """Return the result table, arms in the study's order."""
    return [_arm_row(results, arm) for arm in results.config.arms]


def _arm_row(results: Results, arm: str) -> ArmRow:
    wanted = results.config.arms[arm]
    records = results.of(arm)
    done = [r["train_info"] for r in records.values() if r["status"] == "done"]
    losses = list(results.losses(arm).values())
    loss = statistics.fmean(losses) if losses else None
    untouched = results.untouched()
    plans = results.plans(arm)
    baseline = results.config.baseline or next(iter(results.config.arms))
    choice = results.index["rates"][arm]
    return ArmRow(
        arm=arm,
        ranks=_ends([rank for plan in plans for rank in plan["ranks"].values()]),
        scale=str(wanted.scale or results.config.scale),
        parameters=_ends([d["num_trainable_params"] for d in done]),
        most_trained=_more_trained(done),
        equal_budget=_budget(results, arm) is not None
        and _budget(results, arm) == _budget(results, baseline),
        rate=choice["rate"],
        rate_how=choice["how"] + (" at the edge of the grid" if choice.get("at_edge") else ""),
        done=len(done),
        failed=len(records) - len(done),
        wanted=results.config.seeds.reporting,
        loss=loss,
        loss_sd=statistics.stdev(losses) if len(losses) > 1 else None,
        perplexity=stats.perplexity(loss) if loss is not None else None,
        gain=untouched - loss if loss is not None and untouched is not None else None,
        token_accuracy=_mean([d["metrics"]["test_token_accuracy"] for d in done]),
        bits_per_byte=_mean([d["metrics"]["test_bits_per_byte"] for d in done]),
        tokens_per_second=_mean([d["tokens_per_second"] for d in done]),
        peak_bytes=max((d.get("device_peak_bytes", d["process_peak_bytes"]) for d in done), default=None),
        forgetting=_forgetting(results, done),
        rouge_l=_mean(_metric(done, "generation_rouge_l")),
        chrf=_mean(_metric(done, "generation_chrf")),
        rank_used=_mean([d["rank_use"]["units_share"] for d in done if d.get("rank_use")]),
        seconds_to_baseline=_seconds_to_baseline(results, arm, baseline),
        adapter_bytes=max((d["file_size"] for d in done), default=None),
    )


def _metric(done: list[dict[str, Any]], name: str) -> list[float]:
    return [d["metrics"][name] for d in done if name in d["metrics"]]


def _forgetting(results: Results, done: list[dict[str, Any]]) -> float | None:
    """Return how much more loss general text has than before training, in nats per token."""
    before, after = results.untouched_metrics().get("general_loss"), _metric(done, "general_loss")
    return statistics.fmean(after) - before if before is not None and after else None


def _seconds_to_baseline(results: Results, arm: str, baseline: str) -> float | None:
    """Return the mean training time until the arm's loss is down to what the baseline's ends with.

    Both are running means over a quarter of the steps, on the rows that a seed's arms share. None where no
    seed has both, or where the arm does not get there in some seed: a mean without those would flatter it.
    """
    mine, theirs = results.steps(arm), results.steps(baseline)
    times = []
    for seed in mine.keys() & theirs.keys():
        goal = _running(theirs[seed])[-1][1]
        reached = [seconds for seconds, loss in _running(mine[seed]) if loss <= goal]
        if not reached:
            return None
        times.append(reached[0])
    return _mean(times)


def _running(steps: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """Return (seconds so far, mean loss of the last quarter of the run's length) from when that is full."""
    window = max(1, len(steps) // QUARTER)
    losses, seconds, found = [s["loss"] for s in steps], 0.0, []
    for place, step in enumerate(steps):
        seconds += step["seconds"]
        if place + 1 >= window:
            found.append((seconds, statistics.fmean(losses[place + 1 - window : place + 1])))
    return found


def _more_trained(done: list[dict[str, Any]]) -> int | None:
    """Return the most parameters trained at any step, if more than the arm ends with."""
    most = max((d.get("most_trainable_params", 0) for d in done), default=0)
    return most if most > max((d["num_trainable_params"] for d in done), default=0) else None


def _probe_line(results: Results) -> list[str]:
    """Return what the probes took, the mean over the runs that used them."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for record in results.records.values():
        for probe in record["train_info"].get("probes") or ():
            seconds[probe["kind"]].append(probe["cost"]["seconds"])
    told = ", ".join(f"{kind} {statistics.fmean(found):.1f} s" for kind, found in seconds.items())
    return [f"probes, once per seed: {told}"] if told else []


def _rate(rate: float | None) -> str:
    return "" if rate is None else f", rate {rate:g}"


def _ends(values: list[int]) -> tuple[int, int] | None:
    return (min(values), max(values)) if values else None


def _budget(results: Results, arm: str) -> int | None:
    """Return the parameters that the arm was given; None for its own ranks in any seed, or before a run."""
    found = {plan["budget"] for plan in results.plans(arm)}
    return found.pop() if len(found) == 1 else None


def _mean(values: list[float]) -> float | None:
    return statistics.fmean(values) if values else None


def count_of_seeds(count: int) -> str:
    """Return "1 seed" or "3 seeds"."""
    return f"{count} seed{'s' if count != 1 else ''}"


def captions(results: Results) -> list[str]:
    """Return what must be read with the table: how rates were set, seeds, failures, the base's nature."""
    config = results.config
    rows = arm_rows(results)
    seeds = config.seeds.reporting
    rate = "rate tuned per arm on validation" if config.tuned else "rate not tuned"
    lines = [f"{rate}, {count_of_seeds(seeds)}" + (": no verdict" if seeds < SCREENING_BELOW else "")]
    if results.index["exploratory"]:
        lines.append("exploratory: the study was changed after its first run")
    missing = sum(row.wanted - row.done - row.failed for row in rows if row.rate is not None)
    if missing or results.index["tuning_unfinished"]:
        lines.append(f"unfinished: {missing} reporting runs missing" + _tuning_note(results))
    if any(row.other_budget for row in rows):
        lines.append("* other parameters than the baseline's budget: outside the equal-budget comparison")
    if config.tuned:
        lines += [f"{row.arm}: rate {row.rate_how}" for row in rows if row.rate_how != "tuned"]
    lines += [
        f"{row.arm}: up to {row.most_trained:,} parameters were trained" for row in rows if row.most_trained
    ]
    lines += _probe_line(results)
    lines += [
        f"{arm}: every rate diverged" for arm, choice in results.index["rates"].items() if hopeless(choice)
    ]
    return lines + results.failures() + results.index["resolved"]["notices"]


def _tuning_note(results: Results) -> str:
    return ", learning rates still being tuned" if results.index["tuning_unfinished"] else ""


def hopeless(choice: dict[str, Any]) -> bool:
    """Whether every rate of an arm's grid diverged (`choice` is its entry in the index's `rates`)."""
    return (
        choice["rate"] is None
        and bool(choice.get("grid"))
        and all(g["losses"] and None in g["losses"] for g in choice["grid"])
    )


def state_counts(results: Results) -> dict[str, dict[str, int]]:
    """Return "arm (role)" -> state -> number of runs."""
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for run in results.index["runs"]:
        counts[f"{run['arm']} ({run['role']})"][results.store.state(run["run_id"])] += 1
    return {label: dict(states) for label, states in counts.items()}


def design_warnings(config: StudyConfig) -> list[str]:
    """Return what the study's design cannot answer, said before anything runs."""
    seeds = config.seeds.reporting
    if not seeds:
        return ["no reporting seeds: rates are tried on validation rows, and nothing is compared."]
    found = design_answers(seeds, len(config.contrasts))
    if seeds < SCREENING_BELOW:
        found.insert(0, f"a study of {count_of_seeds(seeds)} screens: verdicts need {SCREENING_BELOW}.")
    if not config.tuned:
        found.append(
            "learning rates are declared, not tuned: a difference may be the rate's, not the ranks'."
        )
    for name, arms in config.ladders.items():
        found.append(_ladder_warning(name, len(arms), seeds, 1 / len(config.ladders)))
    if config.confirmatory and not config.seeds.first:
        found.append(
            "seeds from 0 on are those that other studies begin with: give seeds.first, so that a "
            "confirmatory study has draws of its own."
        )
    if not config.contrasts and not config.ladders:
        found.append("no contrasts are declared: the study describes and decides nothing.")
    return found


def _ladder_warning(name: str, plans: int, seeds: int, share: float) -> str:
    """Return how a ladder is decided, and what one of its comparisons can show: less than a pair's alone."""
    text = (
        f"ladder {name!r} of {plans} plans is decided at {5 * share:.2g} %: the cheapest that is shown to "
        "lose less than the margin against each of the others"
    )
    if seeds < SCREENING_BELOW:
        return f"{text}."
    level = 0.05 * share * (1 - RESERVE)
    sds = provable_margin(seeds, alpha=level, two_sided=False)
    return (
        f"{text}. Of its largest plan, tested at {100 * level:.2g} %, one such comparison is shown from "
        f"margins of {sds:.2f} SDs of the seed-to-seed differences (80 % power), all {plans - 1} together "
        "from wider ones."
    )
