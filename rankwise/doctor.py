"""System validation: what this machine is, what it can reach, and whether rankwise computes rightly on it.

Every check is a function that returns a `Finding`; what one raises becomes a failed check. Imports stand
inside the checks, so that a package which is missing or broken is reported and does not end the doctor.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import statistics
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.console import Console
from rich.text import Text

Level = Literal["ok", "warning", "failed"]
T = TypeVar("T")

REPORT = "report this, with the output of `rankwise doctor --json`"
ANSWER_SECONDS, REACH_SECONDS = 4.0, 5.0  # for one place to answer, and for all of them together
WARN_FREE, FAIL_FREE = 2e9, 200e6  # bytes
HASH_AT_ONCE = 1e9  # bytes; a larger file of a study is looked for, and hashed only when the study opens it
PRODUCT = (2048, 576, 1536)  # rows, in and out features: the largest product of SmolLM2-135M's blocks
PROBE_SECONDS = 0.4
MARKS = {"ok": "green", "warning": "yellow", "failed": "bold red"}
INDENT = 24

# What the earlier study's formulas give on DialoGPT-medium (24 layers, base 16, min 4, max 32).
DECAY = (16, 15, 14, 14, 13, 13, 12, 12, 11, 11, 10, 10, 9, 9, 8, 8, 7, 7, 6, 6, 5, 5, 4, 4)
EMPIRICAL = (9,) * 7 + (19,) * 10 + (16,) * 7
VECTORS: dict[str, Callable[[Any], int]] = {
    "linear_decay": lambda module: DECAY[module.layer],
    "empirical": lambda module: EMPIRICAL[module.layer],
    "attention_heavy": lambda module: 16 if module.path.startswith("attn.") else 8,
}
BASE_PARAMETERS = 354_823_168
UNIFORM_PARAMETERS = {"r=16": 6_291_456, "r=8": 3_145_728}


class Finding(NamedTuple):
    """What a check found; anything but "ok" comes with its remedy."""

    level: Level
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Check:
    """One line of the doctor's report."""

    name: str
    level: Level
    found: str
    remedy: str
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether rankwise can work: a warning is no failure."""
        return self.level != "failed"

    def as_dict(self) -> dict[str, Any]:
        """Return the row of `--json`."""
        return {
            "name": self.name, "level": self.level, "ok": self.ok, "found": self.found,
            "remedy": self.remedy, "seconds": round(self.seconds, 3),
        }  # fmt: skip

    def text(self) -> Text:
        """Return mark, name and what was found, with lines that continue below their column."""
        room = max(30, shutil.get_terminal_size().columns - INDENT)
        lines = _wrapped(self.found, room) + (_wrapped(f"remedy: {self.remedy}", room) if self.remedy else [])
        text = Text(f"{self.level:8}", style=MARKS[self.level])
        text.append(f"{self.name:{INDENT - 8}}", style="default")
        return text.append(("\n" + " " * INDENT).join(lines), style="default not bold")


@dataclass(frozen=True)
class Probe:
    """A check to be made. With `late` it asks the network, and becomes `late` when its time is up."""

    run: Callable[[], Finding]
    late: Finding | None = None


def run_checks(results: Path, study: Path | None = None) -> list[Check]:
    """Make every check; none raises.

    Args:
        results: the folder that records go to.
        study: a study file whose model and data are looked for too.

    Cost: about 5 s on 2 cores once the packages are imported; at most 5 s more where places do not answer.
    """
    with Console(stderr=True).status("checking: places to fetch from") as status:
        probes = probes_for(results, study)
        checks = _ask_all({name: probe for name, probe in probes.items() if probe.late})
        for name, probe in probes.items():
            if name not in checks:
                status.update(f"checking: {name}")
                checks[name] = perform(name, probe.run)
    return [checks[name] for name in probes]


def probes_for(results: Path, study: Path | None = None) -> dict[str, Probe]:
    """Return every check by its name, in the order of the report; only a study file is read yet."""
    index_late = Finding(
        # a study's own lines say whether what it needs can be had
        "warning" if study else "failed", f"no answer in {REACH_SECONDS:g} s", INDEX_REMEDY,
    )  # fmt: skip
    hub_late = Finding("warning", f"no answer in {REACH_SECONDS:g} s", HUB_REMEDY)
    return {
        "python": Probe(python_version),
        "packages": Probe(package_versions),
        "processor": Probe(processor),
        "accelerator": Probe(accelerator),
        "matrix products": Probe(matrix_products),
        "package index": Probe(partial(package_index, index_late.level), index_late),
        "hub": Probe(hub, hub_late),
        **(_study_probes(study) if study else {}),
        "cache folder": Probe(_cache_folder),
        "results folder": Probe(
            partial(folder, results, "choose another folder with --results or RANKWISE_RESULTS")
        ),
        "strategies": Probe(strategies),
        "training": Probe(training),
    }


def perform(name: str, run: Callable[[], Finding]) -> Check:
    """Make one check and time it; whatever it raises is a failure."""
    begun = time.perf_counter()
    try:
        finding = run()
    except Exception as error:  # a doctor that falls over helps nobody
        finding = _unexpected(error)
    return Check(name, *finding, seconds=time.perf_counter() - begun)


def _unexpected(error: Exception) -> Finding:
    if isinstance(error, ImportError):
        return Finding("failed", f"an import fails: {error}", "reinstall that package; see also `packages`")
    return Finding("failed", f"{type(error).__name__}: {error}", REPORT)


def _wrapped(text: str, width: int) -> list[str]:
    """Return lines of printable characters: text from outside may hold escape sequences."""
    plain = "".join(c if c.isprintable() else " " for c in text)
    return textwrap.wrap(" ".join(plain.split()), width, break_on_hyphens=False)


# --- versions ------------------------------------------------------------------------------------


def python_version() -> Finding:
    """Compare the interpreter with the range that the installed distribution states."""
    wanted = importlib.metadata.metadata("rankwise")["Requires-Python"]
    found = f"{platform.python_version()}, {wanted} is needed"
    if SpecifierSet(wanted).contains(platform.python_version(), prereleases=True):
        return Finding("ok", f"{found}; rankwise {importlib.metadata.version('rankwise')}")
    return Finding("failed", found, f"install rankwise under a Python {wanted}")


def package_versions() -> Finding:
    """Compare the installed packages with the ranges that the installed distribution states."""
    requirements = [Requirement(text) for text in importlib.metadata.requires("rankwise") or ()]
    needed = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    installed = {r.name: _installed(r.name) for r in needed}
    wrong = [r for r in needed if not r.specifier.contains(installed[r.name] or "", prereleases=True)]
    if wrong:
        found = "; ".join(f"{r.name} {installed[r.name] or 'is absent'}, {r.specifier} needed" for r in wrong)
        return Finding("failed", found, "pip install " + " ".join(f'"{r.name}{r.specifier}"' for r in wrong))
    first = ", ".join(f"{name} {version}" for name, version in list(installed.items())[:3])
    return Finding("ok", f"{len(needed)} in their ranges: {first}, ...")


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


# --- the machine ---------------------------------------------------------------------------------


def processor() -> Finding:
    """Name the processor, the cores that runs may use, and the memory."""
    import psutil

    from rankwise import machine

    memory = psutil.virtual_memory()
    with _run_threads() as cores:
        native = "bf16 in hardware" if machine.bf16_native("cpu") else "no bf16 in hardware"
        return Finding(
            "ok",
            f"{machine.processor()}, {cores} cores for runs, {native}, memory {memory.total / 1e9:.1f} GB "
            f"({memory.available / 1e9:.1f} free)",
        )


def accelerator() -> Finding:
    """Name the CUDA devices and use the first; say so plainly when there is none."""
    import torch

    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        names = "; ".join(f"{card.name}, {card.total_memory / 1e9:.0f} GB" for card in cards)
        try:
            torch.ones(2, device="cuda").sum().item()
        except RuntimeError as error:
            remedy = "look at `nvidia-smi`, and give studies `train.device: cpu` until it works"
            return Finding("failed", f"{names}: does not compute ({str(error).splitlines()[0]})", remedy)
        return Finding("ok", f"{names}" + ("; runs use the first" if len(cards) > 1 else ""))
    if Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi"):
        built = "was built without CUDA" if torch.version.cuda is None else "cannot use it"
        remedy = "install the PyTorch build for this driver's CUDA (pytorch.org/get-started)"
        return Finding("warning", f"an NVIDIA driver is here, but PyTorch {built}: runs use the CPU", remedy)
    return Finding("ok", "no accelerator: runs use the CPU")


def matrix_products() -> Finding:
    """Time products of a real size in both precisions, where and with as many threads as runs do."""
    from rankwise import machine
    from rankwise.config import TrainConfig

    train = TrainConfig(step_tokens=1024, learning_rates=(1e-3,))
    device = machine.device_for(train)
    chosen = machine.dtype_for(train, device)
    with _run_threads() as threads:
        speed = {name: _gflops(device, name) for name in ("fp32", "bf16")}
    where = "the GPU" if device == "cuda" else f"{threads} thread{'s' if threads > 1 else ''}"
    found = ", ".join(f"{name} {value:,.0f}" for name, value in speed.items()) + f" GFLOP/s on {where}"
    other = "fp32" if chosen == "bf16" else "bf16"
    if speed[other] > 1.5 * speed[chosen]:
        remedy = f"give studies `train.dtype: {other}` (results then differ in the last bits)"
        return Finding("warning", f"{found}; runs use {chosen}, the slower one", remedy)
    return Finding("ok", f"{found}; runs use {chosen}")


def _gflops(device: str, dtype: str) -> float:
    """Return the median speed of y = x @ w.T, in 1e9 floating-point operations per second."""
    import torch

    from rankwise.machine import torch_dtype

    rows, inputs, outputs = PRODUCT
    x = torch.ones(rows, inputs, dtype=torch_dtype(dtype), device=device)
    w = torch.ones(outputs, inputs, dtype=torch_dtype(dtype), device=device)
    repeats = 100 if device == "cuda" else 1  # one product there is shorter than what starts and times it
    times: list[float] = []
    while len(times) < 2 or sum(times) < PROBE_SECONDS:
        begun = time.perf_counter()
        for _ in range(repeats):
            torch.nn.functional.linear(x, w)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return 2 * rows * inputs * outputs * repeats / statistics.median(times[1:]) / 1e9  # the first warms up


@contextmanager
def _run_threads() -> Iterator[int]:
    """Set the threads that a run would use, for a while."""
    import torch

    from rankwise import machine
    from rankwise.config import TrainConfig

    before = torch.get_num_threads()
    try:
        yield machine.threads_for(TrainConfig(step_tokens=1024, learning_rates=(1e-3,)))
    finally:
        torch.set_num_threads(before)


# --- places to fetch from ------------------------------------------------------------------------

INDEX_REMEDY = (
    "name a mirror (pip config set global.index-url URL, or PIP_INDEX_URL), or set PIP_FIND_LINKS to a "
    "folder of archives; hf: and file: sources and what is in the cache work without"
)
HUB_REMEDY = "none is needed for pypi: and file: sources; for hf: ones set HF_ENDPOINT to a mirror"
SOURCE_REMEDY = "see `package index` and `hub`, or download the file elsewhere and name it with file:path"


def _ask_all(probes: Mapping[str, Probe]) -> dict[str, Check]:
    """Make the checks that ask the network, all at once and within their time."""
    with suppress(Exception):  # the checks say what is wrong; imports in several threads at once may clash
        from huggingface_hub import HfApi, snapshot_download  # noqa: F401

        from rankwise.package_index import Index

        Index()  # starts pip for its settings, once for all
    runs = {name: partial(perform, name, probe.run) for name, probe in probes.items()}
    answers = _within(REACH_SECONDS, runs)
    late = {n: Check(n, *probe.late, seconds=REACH_SECONDS) for n, probe in probes.items() if probe.late}
    return late | answers


def _within(seconds: float, calls: Mapping[str, Callable[[], T]]) -> dict[str, T]:
    """Call all at once, each in a thread that the process does not wait for; return what ended in time."""
    answers: dict[str, T] = {}

    def answer(name: str) -> None:
        answers[name] = calls[name]()

    threads = [threading.Thread(target=answer, args=(name,), daemon=True) for name in calls]
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return dict(answers)


def package_index(unreachable: Level = "failed") -> Finding:
    """Ask every place that pip is configured with; `unreachable` is the level when none answers."""
    from rankwise.errors import RankwiseError
    from rankwise.package_index import Index, as_path, shown

    def ask(place: str, is_index: bool) -> list[str]:
        local, index = as_path(place), Index()
        if local is not None:
            return [] if local.exists() else [f"{place} (there is no such folder)"]
        index.links([(place, is_index)], "pip", "0")  # any name would do: a place without it answers too
        return index.unreachable

    try:
        places = Index().places()
    except RankwiseError as error:
        return Finding(unreachable, str(error).partition(". ")[0], INDEX_REMEDY)
    answers = _within(ANSWER_SECONDS, {place: partial(ask, place, kind) for place, kind in places})
    late = f"no answer in {ANSWER_SECONDS:g} s"
    bad = [text for place, _ in places for text in answers.get(place, [f"{shown(place)} ({late})"])]
    good = [shown(place) for place, _ in places if answers.get(place) == []]
    if bad:
        found = "not reached: " + ", ".join(bad) + (f"; reached: {', '.join(good)}" if good else "")
        return Finding("warning" if good else unreachable, found, INDEX_REMEDY)
    return Finding("ok", ", ".join(good))


def hub() -> Finding:
    """Ask the model hub; without it the other sources work."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    from rankwise.package_index import shown

    try:
        status = get_session().head(constants.ENDPOINT, timeout=ANSWER_SECONDS).status_code
    except Exception as error:  # which HTTP library's errors come through differs between versions
        found = f"{shown(constants.ENDPOINT)} is not reached ({type(error).__name__})"
        return Finding("warning", found, HUB_REMEDY)
    if status >= 500:
        return Finding("warning", f"{shown(constants.ENDPOINT)} answers with status {status}", HUB_REMEDY)
    return Finding("ok", shown(constants.ENDPOINT))


def _study_probes(path: Path) -> dict[str, Probe]:
    """Read the study file; return a check of it, and of its two sources if it can be read."""
    try:
        from rankwise.study import read_study

        config = read_study(path).config
    except Exception as error:
        known = type(error).__name__ == "RankwiseError"
        finding = Finding("failed", str(error), "mend the study file") if known else _unexpected(error)
        return {"study file": Probe(lambda: finding)}
    late = Finding("failed", f"no answer in {REACH_SECONDS:g} s", SOURCE_REMEDY)
    said = Finding("ok", f"{path}: {len(config.arms)} arms")
    return {
        "study file": Probe(lambda: said),
        "study model": Probe(partial(source, config.model, "model", path.parent), late),
        "study data": Probe(partial(source, config.data.source, "data", path.parent), late),
    }


def source(text: str, kind: Literal["data", "model"], relative_to: Path) -> Finding:
    """Find a study's source in the cache or on this disk, or else at the place that it would come from."""
    from rankwise import sources
    from rankwise.errors import RankwiseError

    try:
        parsed = sources.parse(text, relative_to)
        if parsed.scheme == "hf":
            return _hub_source(parsed, kind)
        if parsed.scheme == "pypi":
            return _index_source(parsed)
        path = Path(parsed.path or "")
        if path.exists() and sum(p.stat().st_size for p in [path, *path.rglob("*")]) > HASH_AT_ONCE:
            return Finding("ok", f"{path} is there")
        return Finding("ok", f"{sources.fetch(text, kind=kind, relative_to=relative_to).path} is there")
    except RankwiseError as error:
        found, _, remedy = str(error).partition(". ")
        return Finding("failed", found, remedy or "correct it in the study file")
