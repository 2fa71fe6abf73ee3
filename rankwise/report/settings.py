"""Methods, settings, and everything that is needed to run a study again, as rows of text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import yaml

from rankwise.config import NUMERICS, ArmConfig, StudyConfig
from rankwise.tables import Results

Pair = tuple[str, str]
MACHINE = ("system", "processor", "capability", "cores", "threads", "device")
METHODS = (
    "A seed redraws everything that would vary: training rows, calibration rows, random plans, the adapters' "
    "start and the order of rows. Within a seed all arms share those draws, so arms are compared in pairs.",
    "The test rows are common to all seeds; training, validation and test rows never meet. The last step is "
    "evaluated: there is no early stopping.",
    "Where learning rates are tuned, they are chosen per arm on validation rows, with seeds that are not "
    "reporting seeds.",
    "Paired t-intervals decide, with p-values adjusted by Holm over the declared contrasts; the exact "
    "sign-flip test, and a bootstrap that draws seeds and test rows crosswise, are shown beside them. "
    "Equivalence is two one-sided paired t-tests against the study's margin. A contrast with a failed run "
    "gets no verdict.",
    "A ladder's recommendation is the cheapest plan that one-sided paired t-tests show to lose less than the "
    "margin against each other plan of its ladder, going down from the largest; all ladders share 5 %.",
    "A loss is in nats per response token. A loss's 95 % interval is the t-interval over the seeds.",
)


def settings(results: Results) -> list[Pair]:
    """Return every setting of the study but its arms, as (path of keys, value)."""
    dump = results.config.model_dump(mode="json")
    return _flat({name: value for name, value in dump.items() if name != "arms"}, "")


def _flat(value: Any, path: str) -> list[Pair]:
    if isinstance(value, Mapping) and value:
        return [pair for k, v in value.items() for pair in _flat(v, f"{path}.{k}" if path else str(k))]
    if isinstance(value, list | tuple):
        return [(path, ", ".join(map(_word, value)) or "none")]
    return [(path, _word(value) if value != {} else "none")]


def _word(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def resolved(results: Results) -> list[Pair]:
    """Return what the study's open settings came to on the machine that ran it."""
    names = {"model": "model fingerprint", "data": "data fingerprint"}
    found = [(names.get(k, k), _word(v)) for k, v in results.index["resolved"].items() if k != "notices"]
    return [*found, ("numerics (rankwise's number of its results)", _of_runs(results) or str(NUMERICS))]


def _of_runs(results: Results) -> str:
    for run_id in results.records:
        if (run := results.store.config(run_id)) is not None:
            return str(run.get("numerics", ""))
    return ""


def machines(results: Results) -> list[tuple[str, list[Pair]]]:
    """Return the different machines and package versions of the records, each with how many runs it did."""
    seen: dict[tuple[Pair, ...], int] = defaultdict(int)
    for record in results.records.values():
        meta = record.get("meta_info") or {}
        system = meta.get("system_info") or {}
        pairs = [(name, _word(system[name])) for name in MACHINE if name in system]
        pairs += [(name, _word(version)) for name, version in (meta.get("package_info") or {}).items()]
        seen[tuple(pairs)] += 1
    return [(f"{runs:,} run{'' if runs == 1 else 's'}", list(pairs)) for pairs, runs in seen.items() if pairs]


def study_yaml(config: StudyConfig) -> str:
    """Return the study as a YAML file that rankwise reads back as the same study."""
    whole = config.model_dump(mode="json")
    arms = {name: _own(arm) for name, arm in config.arms.items()}
    return yaml.safe_dump({**whole, "arms": arms}, sort_keys=False, allow_unicode=True, width=100)


def _own(arm: ArmConfig) -> dict[str, Any]:
    """Return what an arm sets; a rule of scaling in full, as it says nothing without its value."""
    given = {"strategy": arm.strategy, **arm.model_dump(mode="json", exclude_defaults=True)}
    return given if arm.scale is None else {**given, "scale": arm.scale.model_dump(mode="json")}


def commands(results: Results) -> str:
    """Return the commands that do the study again and show its results."""
    return "\n".join(
        [
            "# the file is the study above, saved as study.yaml; finished runs are not done twice",
            "rankwise study run study.yaml",
            "rankwise study status study.yaml",
            "rankwise report study.yaml",
        ]
    )
