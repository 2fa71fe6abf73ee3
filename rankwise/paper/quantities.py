"""The numbers of arms and studies as macros."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rankwise.contrasts import margin
from rankwise.figuretables import cost_rows, loss_points
from rankwise.paper.groups import difference
from rankwise.paper.macros import Macro
from rankwise.paper.names import macro_name
from rankwise.paper.repeats import apart
from rankwise.paper.studies import Told
from rankwise.paper.typeset import NOT_YET, ends, escaped, name, number
from rankwise.report.opening import missing_runs
from rankwise.report.settings import machines
from rankwise.savings import parameters
from rankwise.tables import ArmRow, Results, arm_rows, hopeless

Taken = Callable[[ArmRow], float | None]
ARM: dict[str, tuple[str, str, Taken]] = {
    "TestLoss": (".4f", "nats per response token, mean over seeds", lambda row: row.loss),
    "TestLossSd": (".4f", "nats per response token, SD over seeds", lambda row: row.loss_sd),
    "Gain": (".4f", "nats per response token below the untouched model", lambda row: row.gain),
    "Perplexity": (".3f", "", lambda row: row.perplexity),
    "TokenAccuracy": (".1f", "%", lambda row: _times(row.token_accuracy, 100)),
    "BitsPerByte": (".4f", "bits per byte", lambda row: row.bits_per_byte),
    "Rate": ("g", "learning rate", lambda row: row.rate),
    "Seeds": ("d", "reporting seeds done", lambda row: row.done),
    "TokensPerSecond": (".0f", "tokens/s", lambda row: row.tokens_per_second),
    "PeakMemory": (".1f", "GB", lambda row: _times(row.peak_bytes, 1e-9)),
    "FileSize": (".1f", "MB", lambda row: _times(row.adapter_bytes, 1e-6)),
    "Forgetting": ("+.4f", "nats per token of general text", lambda row: row.forgetting),
    "RougeL": (".3f", "ROUGE-L of greedy answers", lambda row: row.rouge_l),
    "Chrf": (".1f", "chrF of greedy answers", lambda row: row.chrf),
    "RankUsed": (".0f", "%", lambda row: _times(row.rank_used, 100)),
}  # fmt: skip
"""Quantity -> precision, unit, value."""


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def arm_macros(study: Told) -> Iterator[Macro]:
    """Yield every arm's numbers."""
    if study.config is None:
        return
    results = study.results
    rows = {} if results is None else {row.arm: row for row in arm_rows(results)}
    points = {} if results is None else {point.arm: point for point in loss_points(results)}
    costs = {} if results is None else {row.arm: row for row in cost_rows(results)}
    for arm in study.config.arms:
        row, point, cost = rows.get(arm), points.get(arm), costs.get(arm)
        numbers: dict[str, tuple[str, str, float | None]] = {
            quantity: (form, unit, None if row is None else take(row))
            for quantity, (form, unit, take) in ARM.items()
        }
        numbers["Low"] = (".4f", "95 % t-interval of the mean loss", point.low if point else None)
        numbers["High"] = (".4f", "95 % t-interval of the mean loss", point.high if point else None)
        numbers["ProbeTime"] = (".1f", "s", cost.probe_seconds if cost else None)
        numbers["TrainTime"] = (".1f", "s", cost.train_seconds if cost else None)
        trained = None if results is None else parameters(results, arm)
        numbers["Parameters"] = (",.0f", "trainable, mean over seeds", trained)
        below = None if results is None else difference(results, arm)
        numbers["MinusUniform"] = ("+.4f", "nats per token minus the uniform arm of its budget", below)
        for quantity, (form, unit, value) in numbers.items():
            yield study.number(value, form, unit, arm, quantity)
        yield study.text(ends(row.ranks) if row else None, arm, "Ranks")


def study_macros(study: Told) -> Iterator[Macro]:
    """Yield what a study declares, what it took, and what its records say as a whole."""
    yield from _design(study)
    yield from _records(study)
    yield from _told(study)


def _design(study: Told) -> Iterator[Macro]:
    config = study.config
    data, train = (None, None) if config is None else (config.data, config.train)
    whole: dict[str, tuple[int | float | None, str, str]] = {
        "Arms": (len(config.arms) if config else None, ",d", "arms"),
        "Contrasts": (len(config.contrasts) if config else None, ",d", "declared contrasts"),
        "Ladders": (len(config.ladders) if config else None, ",d", "declared ladders"),
        "Seeds": (config.seeds.reporting if config else None, ",d", "reporting seeds"),
        "TuningSeeds": (config.seeds.tuning if config else None, ",d", "tuning seeds"),
        "TrainRows": (data.train if data else None, ",d", "rows"),
        "ValidationRows": (data.validation if data else None, ",d", "rows"),
        "TestRows": (data.test if data else None, ",d", "rows"),
        "ReservedRows": (data.reserved if data else None, ",d", "rows"),
        "CalibrationRows": (data.calibration if data else None, ",d", "rows"),
        "MaxLength": (data.max_length if data else None, ",d", "tokens"),
        "Epochs": (train.epochs if train else None, ",d", "passes"),
        "StepTokens": (train.step_tokens if train else None, ",d", "tokens per step"),
        "MarginShare": (100 * config.margin if config else None, "g", "%"),
        "ScaleValue": (config.scale.value if config else None, "g", ""),
    }
    for quantity, (value, form, unit) in whole.items():
        yield study.number(value, form, unit, quantity)
    rates = None if train is None else ", ".join(f"{rate:g}" for rate in train.learning_rates)
    texts = {
        "Rates": rates,
        "Baseline": name(config.baseline) if config and config.baseline else None,
        "Model": escaped(_file_of(config.model)) if config else None,
        "ModelSource": name(config.model.partition("#")[0]) if config else None,
        "DataSource": name(config.data.source.partition("#")[0]) if config else None,
        "Name": name(study.name),
    }
    for quantity, text in texts.items():
        yield study.text(text, quantity)


def _file_of(source: str) -> str:
    """Return the model's own name: the last part of its source, without what only files have."""
    last = source.partition("#")[0].rsplit("/", 1)[-1]
    return last.removesuffix(".gguf").rsplit(".Q", 1)[0]


def _records(study: Told) -> Iterator[Macro]:
    results = study.results
    missing, wanted = (None, None) if results is None else missing_runs(results)
    failed = diverged = hours = edge = None
    if results is not None:
        roles = {run["run_id"]: run["role"] for run in results.index["runs"]}
        lost = [roles[i] for i, record in results.records.items() if record["status"] == "failed"]
        diverged, failed = lost.count("tuning"), len(lost) - lost.count("tuning")
        edge = sum(bool(choice.get("at_edge")) for choice in results.index["rates"].values())
        hours = sum(_seconds(record) for record in results.records.values()) / 3600
    numbers: dict[str, tuple[float | None, str, str]] = {
        "UntouchedLoss": (results.untouched() if results else None, ".4f", "nats per response token"),
        "Margin": (margin(results) if results else None, ".4f", "nats per token, of equivalence"),
        "RunsDone": (len(results.records) if results else None, ",d", "runs"),
        "RunsWanted": (wanted, ",d", "runs"),
        "RunsMissing": (missing, ",d", "runs"),
        "RunsFailed": (failed, ",d", "failed runs that are no tuning runs"),
        "RunsDiverged": (diverged, ",d", "tuning runs that failed"),
        "RatesAtEdge": (edge, ",d", "arms whose rate lies at the edge of the grid"),
        "Hours": (hours, ".1f", "h"),
    }
    for quantity, (value, form, unit) in numbers.items():
        yield study.number(value, form, unit, quantity)


def _seconds(record: dict[str, Any]) -> float:
    return float((record.get("run_info") or {}).get("total_time") or 0.0)


def _told(study: Told) -> Iterator[Macro]:
    results = study.results
    texts: dict[str, str | None] = dict.fromkeys(("Machine", "Notices", "Failures", "Hopeless", "Resolved"))
    if results is not None:
        resolved = results.index["resolved"]
        lost = [arm for arm, choice in results.index["rates"].items() if hopeless(choice)]
        texts = {
            "Machine": _machines([results]),
            "Notices": escaped("; ".join(text.rstrip(".") for text in resolved["notices"]) or "none"),
            "Failures": escaped("; ".join(results.failures()) or "none"),
            "Hopeless": ", ".join(map(name, lost)) or "none",
            "Resolved": escaped(
                f"{resolved['dtype']} on {resolved['device']}, the {resolved['engine']} path"
            ),
        }
    for quantity, text in texts.items():
        yield study.text(text, quantity)


def _machines(studies: Sequence[Results]) -> str:
    """Return the machines, each with its share of the runs; package versions are told elsewhere."""
    keys = ("device", "processor", "capability", "cores", "threads")
    found: dict[str, int] = {}
    for runs, pairs in (one for results in studies for one in machines(results)):
        told = dict(pairs)
        if told.get("device") == "cpu":
            del told["device"]  # the processor's name says it
        text = ", ".join(_counted(told[key], key) for key in keys if key in told)
        found[text] = found.get(text, 0) + int(runs.split()[0].replace(",", ""))
    return escaped("; ".join(f"{count:,} runs on {text}" for text, count in found.items())) or "not recorded"


def _counted(text: str, key: str) -> str:
    if key not in ("cores", "threads"):
        return text
    return f"{text} {key[:-1] if text == '1' else key}"


def _versions(found: Counter[str]) -> str:
    """Return the version, or all of them with their numbers of runs."""
    if len(found) == 1:
        return next(iter(found))
    return " and ".join(f"{version} ({runs:,} runs)" for version, runs in found.most_common())


def overall_macros(studies: Sequence[Told]) -> Iterator[Macro]:
    """Yield the sums over the studies that the paper names: the prefix is `paper`."""
    with_records = [study for study in studies if study.results is not None]
    records = [r for s in with_records if s.results for r in s.results.records.values()]
    packages: dict[str, Counter[str]] = defaultdict(Counter)
    for record in records:
        for package, version in ((record.get("meta_info") or {}).get("package_info") or {}).items():
            packages[package][str(version)] += 1
    yield Macro(macro_name("paper", "Runs"), f"{len(records):,}", "runs of all studies", "runs", ",d")
    places = _machines([study.results for study in with_records if study.results])
    yield Macro(macro_name("paper", "Machines"), places, "machines of all runs")
    hours = sum(map(_seconds, records)) / 3600
    yield Macro(macro_name("paper", "Hours"), number(hours, ".1f", "h"), "runs of all studies", "h", ".1f")
    listed = ", ".join(f"{package} {_versions(found)}" for package, found in packages.items())
    yield Macro(macro_name("paper", "Packages"), escaped(listed) or "none recorded", "packages of the runs")
    twice = apart([study.results for study in with_records if study.results])
    yield Macro(
        macro_name("paper", "TwiceRuns"), f"{len(twice):,}", "runs made on two kinds of device", "runs", ",d"
    )
    largest = number(max(twice), ".5f") if twice else NOT_YET
    yield Macro(macro_name("paper", "TwiceApart"), largest, "largest difference of their test losses",
                "nats per token", ".5f")  # fmt: skip
    names = ", ".join(name(study.name) for study in with_records) or "none"
    yield Macro(macro_name("paper", "StudiesRun"), names, "studies with records")
    waiting = [study for study in studies if study.results is None]
    yield Macro(macro_name("paper", "StudiesWaiting"), ", ".join(name(s.name) for s in waiting) or "none",
                "studies without records")  # fmt: skip
