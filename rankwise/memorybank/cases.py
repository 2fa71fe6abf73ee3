"""What is asked and what came of it: study files beside their records. Nothing is run, no model is loaded."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from rankwise.config import SCREENING_BELOW, StudyConfig
from rankwise.datasizes import read_begun
from rankwise.errors import RankwiseError
from rankwise.memorybank.text import Marked, named
from rankwise.report.opening import missing_runs, opening
from rankwise.store import read_json
from rankwise.studyfile import read_study
from rankwise.tables import ArmRow, Results, arm_rows

State = Literal["not begun", "tuning", "unfinished", "whole"]
ROLES = ("untouched", "tuning", "reporting")
SENTENCE = re.compile(r"(.*?[.?!])(?:\s|$)")
HUB = "hf:"


@dataclass(frozen=True)
class Case:
    """A study at one number of training rows, with the records that it has so far.

    Attributes:
        path: of the study file.
        config: what the file says now.
        results: the records; None before its first run.
        rows: of training, where the study asks over several numbers; else None.
    """

    path: Path
    config: StudyConfig
    results: Results | None
    rows: int | None = None

    @property
    def name(self) -> str:
        """The study's name; its records lie in a folder of that name."""
        return self.config.name

    @property
    def screens(self) -> bool:
        """Whether it has too few seeds for a verdict."""
        return self.config.seeds.reporting < SCREENING_BELOW

    @property
    def changed(self) -> bool:
        """Whether the file says something else than when the study last ran."""
        return self.results is not None and self.results.config != self.config

    @cached_property
    def records(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """(place in the study, record) of the finished runs, in the study's order, each run once."""
        if self.results is None:
            return []
        places = {run["run_id"]: run for run in reversed(self.results.index["runs"])}
        return [(places[run_id], record) for run_id, record in self.results.records.items()]

    @cached_property
    def runs(self) -> tuple[int, int]:
        """(runs missing, runs wanted), as far as that is known: tuning may add some."""
        if self.results is not None:
            return missing_runs(self.results)
        config = self.config
        tuned = [arm for arm in config.arms.values() if config.tuned and arm.learning_rate is None]
        wanted = 1 + len(tuned) * len(config.train.learning_rates) * config.seeds.tuning
        wanted += len(config.arms) * config.seeds.reporting
        return wanted, wanted

    @property
    def state(self) -> State:
        """How far it is."""
        if self.results is None:
            return "not begun"
        if self.results.index.get("tuning_unfinished"):
            return "tuning"
        return "unfinished" if self.runs[0] else "whole"

    @cached_property
    def arms(self) -> list[ArmRow]:
        """The result table; empty before the first run."""
        return [] if self.results is None else arm_rows(self.results)

    @property
    def reported(self) -> bool:
        """Whether some reporting run is done."""
        return any(row.done for row in self.arms)

    @cached_property
    def said(self) -> str:
        """The report's first sentence; empty before the first run."""
        return "" if self.results is None else opening(self.results)

    def told(self, sentence: str) -> Marked:
        """Return a sentence about this study with its arms' names as code."""
        return named(sentence, self.config.arms)

    @property
    def failed(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Failed runs that cost a result; a rate that diverges in tuning is a finding."""
        return [(run, r) for run, r in self.records if r["status"] == "failed" and run["role"] != "tuning"]

    @property
    def diverged(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Tuning runs that failed."""
        return [(run, r) for run, r in self.records if r["status"] == "failed" and run["role"] == "tuning"]

    def seconds(self, *, role: str = "") -> list[float]:
        """Return the seconds that each finished run took, of one role or of all."""
        times = ((r.get("run_info") or {}).get("total_time") for run, r in self.records
                 if role in ("", run["role"]))  # fmt: skip
        return [float(time) for time in times if time is not None]

    @property
    def hours_left(self) -> float | None:
        """Hours of one process for what is missing, at the median of its finished runs; None before those."""
        times = self.seconds(role="reporting") or self.seconds(role="tuning")
        return statistics.median(times) * self.runs[0] / 3600 if times else None

    @property
    def hub(self) -> list[str]:
        """The sources that only a hub has."""
        named = (self.config.model, self.config.data.source, self.config.measure.general_text)
        return [source for source in named if source and source.startswith(HUB)]


@dataclass(frozen=True)
class Asked:
    """A study file: one case, or one for each number of training rows.

    Attributes:
        path: of the file.
        about: the first sentence of the comment that it begins with, or nothing.
        config: as the file has it.
        cases: fewest training rows first.
    """

    path: Path
    about: str
    config: StudyConfig
    cases: tuple[Case, ...]

    @property
    def by_size(self) -> dict[int, Results]:
        """Training rows -> records, where the study asks over several and has begun."""
        if not self.config.train_examples:
            return {}
        return {case.config.data.train: case.results for case in self.cases if case.results is not None}


def read_asked(studies: Sequence[Path], results: Path) -> list[Asked]:
    """Return the studies with what has come of them, ordered by name.

    Raises:
        RankwiseError: a file has faults, records are damaged, or two files are the same study by name.
    """
    found: dict[str, Asked] = {}
    for path in studies:
        asked = _read(path, results)
        if other := found.get(asked.config.name):
            if other.path.resolve() == path.resolve():
                continue
            raise RankwiseError(
                f"{other.path} and {path} are both named {asked.config.name!r}, so their records would lie "
                "in one folder: give each study a name of its own."
            )
        found[asked.config.name] = asked
    return [found[name] for name in sorted(found)]


def _read(path: Path, results: Path) -> Asked:
    config = read_study(path).config
    cases = tuple(
        Case(path, one, records, one.data.train if config.train_examples else None)
        for one, records in read_begun(path, results)
    )
    return Asked(path, _about(path), config, cases)


def _about(path: Path) -> str:
    """Return the first sentence of the comment at the top of a study file."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("#").strip())
    text = " ".join(lines).strip()
    match = SENTENCE.match(text)
    return match[1] if match else text


def all_cases(asked: Sequence[Asked]) -> Iterator[Case]:
    """Yield every case of every study."""
    for one in asked:
        yield from one.cases


def machines(cases: Sequence[Case]) -> list[tuple[str, str, int, int]]:
    """Return (device, processor, cores, runs) of the records, most runs first."""
    seen: Counter[tuple[str, str, int]] = Counter()
    for case in cases:
        for _, record in case.records:
            about = (record.get("meta_info") or {}).get("system_info") or {}
            if "device" in about:
                key = (str(about["device"]), str(about.get("processor", "")), int(about.get("cores") or 0))
                seen[key] += 1
    return sorted(((*key, runs) for key, runs in seen.items()), key=lambda one: (-one[3], one[:3]))


def newest(cases: Sequence[Case]) -> str:
    """Return when the newest record was made, to the minute; empty where no record says so."""
    times = ((r.get("run_info") or {}).get("created_at") for case in cases for _, r in case.records)
    last = max((str(time) for time in times if time), default="")
    return last[:16].replace("T", " ") + (" UTC" if last.endswith(("+0000", "Z")) else "")


def opened_by(results: Path) -> list[str]:
    """Return the confirmatory studies that have opened reserved rows (see `study`)."""
    remedy = "It notes which study has seen the reserved rows: restore it."
    return [
        str(read_json(path, ("study",), remedy)["study"]) for path in sorted(results.glob("reserved-*.json"))
    ]
