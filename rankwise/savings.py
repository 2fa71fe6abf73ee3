"""What one arm takes relative to another: parameters, time, memory, size. Records in, words out."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rankwise.store import read_json
from rankwise.tables import Results


@dataclass(frozen=True)
class Savings:
    """What a plan takes relative to another arm; a ratio below 1 is saved. None where it was not recorded.

    Attributes:
        arm, against: which two.
        parameters: ratio of the mean trained parameters.
        fewer: parameters, the other arm's minus this one's.
        seconds: of training; the median over seeds of the paired ratio, as other work may slow single runs.
        seconds_range: the lowest and the highest of those ratios.
        peak: of memory, the mean of the ratios: the device's where recorded, else the process's, the model
            included.
        file: bytes of the saved adapter, likewise.
    """

    arm: str
    against: str
    parameters: float
    fewer: int
    seconds: float | None
    seconds_range: tuple[float, float] | None
    peak: float | None
    file: float | None

    def text(self) -> str:
        """Return it in words: "12 % of the parameters (61,056 fewer), 8 % less training time, ..."."""
        moved = f"{abs(self.fewer):,} {'fewer' if self.fewer >= 0 else 'more'}"
        ratios = ((self.seconds, "training time"), (self.peak, "peak memory"), (self.file, "disk space"))
        told = [change(ratio, what) for ratio, what in ratios if ratio is not None]
        return ", ".join([f"{percent(self.parameters)} of the parameters ({moved})", *told])

    def spread(self) -> str:
        """Return how far the ratio of training times varies over the seeds, as the end of a sentence."""
        if self.seconds_range is None:
            return ""
        low, high = self.seconds_range
        return f"; the ratio of training times is {low:.2f} to {high:.2f} over the seeds"


def savings_of(results: Results, arm: str, against: str) -> Savings | None:
    """Return what an arm takes relative to another, over the seeds that both have finished, or None."""
    mine, theirs = done(results, arm), done(results, against)
    pairs = [(mine[seed], theirs[seed]) for seed in sorted(mine.keys() & theirs.keys())]
    own, other = parameters(results, arm), parameters(results, against)
    if not pairs or not own or not other:
        return None
    seconds = _ratios(pairs, "train_time")
    return Savings(
        arm=arm,
        against=against,
        parameters=own / other,
        fewer=round(other - own),
        seconds=statistics.median(seconds) if seconds else None,
        seconds_range=(min(seconds), max(seconds)) if seconds else None,
        peak=_mean(_ratios(pairs, "device_peak_bytes") or _ratios(pairs, "process_peak_bytes")),
        file=_mean(_ratios(pairs, "file_size")),
    )


def done(results: Results, arm: str) -> dict[int, dict[str, Any]]:
    """Return seed -> record of the arm's reporting runs that are done, in the order of the seeds."""
    return {s: record for s, record in sorted(results.of(arm).items()) if record["status"] == "done"}


def parameters(results: Results, arm: str) -> float | None:
    """Return the arm's trained parameters, the mean over its seeds; None before the first is done."""
    return _mean([record["train_info"]["num_trainable_params"] for record in done(results, arm).values()])


def _ratios(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]], name: str) -> list[float]:
    """Return the first record's value over the second's, where every record has one."""
    values = [[record["train_info"].get(name) for record in pair] for pair in pairs]
    return [a / b for a, b in values] if all(a and b for a, b in values) else []


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def timing_cautions(results: Results, arms: Sequence[str]) -> list[str]:
    """Return in sentences why the recorded times and memory of these arms may not compare."""
    keys = ("host", "processor", "device", "threads")
    records = [record for arm in arms for record in done(results, arm).values()]
    systems = [record.get("meta_info", {}).get("system_info", {}) for record in records]
    kinds = len({tuple(system.get(key) for key in keys) for system in systems})
    lines = []
    if kinds > 1:
        lines.append(
            f"The runs come from {kinds} machines or numbers of threads: times and memory may not compare."
        )
    path = results.store.folder / "execution.json"
    remedy = "Delete it to have processes and threads chosen anew."
    found = read_json(path, ("processes",), remedy) if path.exists() else {"processes": 1}
    processes = found.get("most_processes", found["processes"])  # of any sitting; older files have a choice
    if processes > 1:
        lines.append(
            f"Up to {processes} runs at a time shared this machine and slowed each other: times, and what is "
            "saved of them, are rough."
        )
    return lines


def percent(share: float) -> str:
    """Return a share in words, two digits: "12 %", "0.36 %"."""
    return f"{100 * share:.0f} %" if share >= 0.0995 else f"{100 * share:.2g} %"


def change(ratio: float, what: str) -> str:
    """Return "8 % less time", "3 % more time", or "the same time" within half a percent."""
    if abs(ratio - 1) < 0.005:
        return f"the same {what}"
    return f"{percent(abs(ratio - 1))} {'less' if ratio < 1 else 'more'} {what}"


def count(number: int, what: str) -> str:
    """Return "1 seed" or "3 seeds"."""
    return f"{number} {what}{'s' if number != 1 else ''}"
