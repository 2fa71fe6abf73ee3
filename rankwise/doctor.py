"""System validation: what this machine is, what it can reach, and whether rankwise computes rightly on it.

What a check raises becomes a failure, a broken PyTorch too: what needs it is imported inside the checks.
"""

from __future__ import annotations

import copy
import importlib.metadata
import os
import platform
import shutil
import statistics
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import psutil
from filelock import FileLock
from packaging.requirements import Requirement
from rich.console import Console
from rich.text import Text

from rankwise import sources
from rankwise.cached import cache_dir, cached_sha256
from rankwise.config import TrainConfig
from rankwise.errors import RankwiseError, visible
from rankwise.package_index import Index, as_path, shown

Level = Literal["ok", "warning", "failed"]
Finding = tuple[Level, str, str]  # what was found, and a remedy unless all is well

STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red"}
INDENT = 24  # columns before what was found
REACH_SECONDS = 5.0  # for a place to answer
WARN_FREE, FAIL_FREE = 2e9, 200e6  # bytes
TRAIN = TrainConfig(step_examples=2, learning_rates=(1e-2,))  # for device, precision and threads too

REPORT = "report this, with the output of `rankwise doctor --json`"
INDEX_REMEDY = (
    "name a mirror (PIP_INDEX_URL, or pip config set global.index-url URL) or a folder of archives "
    "(PIP_FIND_LINKS); hf: and file: sources and what is in the cache need neither"
)
HUB_REMEDY = "pypi: and file: sources work without it; for hf: ones set HF_ENDPOINT to a mirror"
SOURCE_REMEDY = "see `package index` and `hub`; or download it elsewhere and name it with file:path"

# What the earlier study's formulas give on DialoGPT-medium (24 layers, base 16, min 4, max 32).
DECAY = (16, 15, 14, 14, 13, 13, 12, 12, 11, 11, 10, 10, 9, 9, 8, 8, 7, 7, 6, 6, 5, 5, 4, 4)
EMPIRICAL = (9,) * 7 + (19,) * 10 + (16,) * 7
VECTORS: dict[str, Callable[[Any], int]] = {
    "linear_decay": lambda module: DECAY[module.layer],
    "empirical": lambda module: EMPIRICAL[module.layer],
    "attention_heavy": lambda module: 16 if module.path.startswith("attn.") else 8,
}
COUNTS = {"base": 354_823_168, "r=16": 6_291_456, "r=8": 3_145_728}


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
        return asdict(self) | {"ok": self.ok}

    def text(self) -> Text:
        """Return mark, name and what was found, wrapped so that its lines stay in their column."""
        room = max(30, shutil.get_terminal_size().columns - INDENT)
        lines = _wrapped(self.found, room) + _wrapped(self.remedy and f"remedy: {self.remedy}", room)
        name = f"{self.name:{INDENT - 8}}"
        return Text.assemble((f"{self.level:8}", STYLES[self.level]), name, ("\n" + " " * INDENT).join(lines))


def run_checks(results: Path, study: Path | None = None) -> list[Check]:
    """Make every check of this system, and look for what a study names; none raises.

    Cost: about 5 s on 2 cores once the packages are imported, and up to 5 s where places do not answer.
    """
    with suppress(Exception):  # here, because imports that refer to each other may clash between threads
        huggingface_hub.HfApi, huggingface_hub.snapshot_download, Index()
    checks: dict[str, Callable[[], Finding]] = {
        "python": python_version,
        "packages": package_versions,
        # with a study, its own lines say whether what it needs can be had
        "package index": _asking(package_index, "warning" if study else "failed", INDEX_REMEDY),
        "hub": _asking(hub, "warning", HUB_REMEDY),
        **(_study_checks(study) if study else {}),
        "processor": processor,
        "accelerator": accelerator,
        "matrix products": matrix_products,
        "cache folder": partial(folder, None, "set RANKWISE_CACHE to another folder"),
        "results folder": partial(folder, results, "choose another with --results or RANKWISE_RESULTS"),
        "strategies": strategies,
        "training": training,
    }
    with Console(stderr=True).status("checking this system"):
        return [perform(name, check) for name, check in checks.items()]


def perform(name: str, check: Callable[[], Finding]) -> Check:
    """Make one check and time it; whatever it raises is a failure."""
    begun = time.perf_counter()
    try:
        finding = check()
    except RankwiseError as error:  # its first sentence states the fault
        found, _, remedy = str(error).partition(". ")
        finding = "failed", found, remedy or f"mend what it names; if that is not it, {REPORT}"
    except Exception as error:  # a doctor that falls over helps nobody
        remedy = "reinstall that package; see `packages`" if isinstance(error, ImportError) else REPORT
        finding = "failed", f"unexpected {type(error).__name__}: {error}", remedy
    return Check(name, *finding, seconds=round(time.perf_counter() - begun, 3))


def _wrapped(text: str, width: int) -> list[str]:
    """Return lines that fit, without the escape sequences that text from outside may hold."""
    lines = [visible(line) for line in text.splitlines()]
    return [part for line in lines for part in textwrap.wrap(line, width, break_on_hyphens=False)]


def python_version() -> Finding:
    """Compare the interpreter with the range that the installed distribution states."""
    version, wanted = platform.python_version(), importlib.metadata.metadata("rankwise")["Requires-Python"]
    if not Requirement(f"python{wanted}").specifier.contains(version, prereleases=True):
        return "failed", f"{version}, {wanted} needed", f"install rankwise under a Python {wanted}"
    return "ok", f"{version}, {wanted} needed; rankwise {importlib.metadata.version('rankwise')}", ""


def package_versions() -> Finding:
    """Compare the installed packages with the ranges that the installed distribution states."""
    stated = map(Requirement, importlib.metadata.requires("rankwise") or ())
    needed = [r for r in stated if not r.marker or r.marker.evaluate({"extra": ""})]  # of no extra
    have = {r: next(iter(importlib.metadata.distributions(name=r.name)), None) for r in needed}
    right = [r for r, its in have.items() if its and r.specifier.contains(its.version, prereleases=True)]
    if wrong := [r for r in needed if r not in right]:
        found = (f"{r.name} {getattr(have[r], 'version', 'is absent')}, {r.specifier} needed" for r in wrong)
        return (
            "failed",
            "; ".join(found),
            "pip install " + " ".join(f'"{r.name}{r.specifier}"' for r in wrong),
        )
    first = ", ".join(f"{r.name} {getattr(have[r], 'version', '')}" for r in needed[:3])
    return "ok", f"{len(needed)} in their ranges; {first}", ""


def _asking(check: Callable[[], Finding], worst: Level, remedy: str) -> Callable[[], Finding]:
    """Begin a check in a thread that the process never waits for; return a function that has its answer."""
    answers: list[Check] = []
    thread = threading.Thread(target=lambda: answers.append(perform("", check)), daemon=True)
    thread.start()
    deadline = time.monotonic() + REACH_SECONDS

    def finding() -> Finding:
        thread.join(max(0.0, deadline - time.monotonic()))
        if not answers:
            return worst, f"no answer in {REACH_SECONDS:g} s", remedy
        return answers[0].level if answers[0].ok else worst, answers[0].found, answers[0].remedy

    return finding


def package_index() -> Finding:
    """Ask every place that pip is configured with; it is a failure when none answers."""
    index, good = Index(), list[str]()
    for place, is_index in index.places():
        bad, local = len(index.unreachable), as_path(place)
        if local is None:
            index.links([(place, is_index)], "pip", "0")  # any name: a place that lacks it answers too
        elif not local.exists():
            index.unreachable.append(f"{place} (no such folder)")
        good += [shown(place)] if len(index.unreachable) == bad else []
    if not index.unreachable:
        return "ok", ", ".join(good), ""
    missed = ", ".join(index.unreachable) + (f"; reached: {', '.join(good)}" if good else "")
    return "warning" if good else "failed", f"not reached: {missed}", INDEX_REMEDY


def hub() -> Finding:
    """Ask the model hub; other sources work without it."""
    place = huggingface_hub.constants.ENDPOINT
    try:
        huggingface_hub.utils.get_session().head(place, timeout=REACH_SECONDS)
    except Exception as error:  # which HTTP library's errors come through differs between versions
        return "warning", f"not reached: {shown(place)} ({type(error).__name__})", HUB_REMEDY
    return "ok", shown(place), ""


def _study_checks(path: Path) -> dict[str, Callable[[], Finding]]:
    """Read the study file; return a check of it and, if it can be read, of its two sources."""
    said: Finding
    try:
        from rankwise.study import read_study

        config = read_study(path).config
    except Exception as error:
        said = "failed", str(error), "mend the file" if isinstance(error, RankwiseError) else REPORT
        return {"study file": lambda: said}
    said = "ok", f"{path} (arms: {len(config.arms)})", ""
    model, data, here = config.model, config.data.source, path.parent
    return {
        "study file": lambda: said,
        "study model": _asking(partial(source, model, "model", here), "failed", SOURCE_REMEDY),
        "study data": _asking(partial(source, data, "data", here), "failed", SOURCE_REMEDY),
    }


def source(text: str, kind: Literal["data", "model"], relative_to: Path) -> Finding:
    """Find a study's source in the cache or on this disk, or else at the place that it would come from."""
    wanted = sources.parse(text, relative_to)
    if wanted.scheme != "file":
        return _hub_source(wanted, kind) if wanted.scheme == "hf" else _index_source(wanted)
    if not Path(str(wanted.path)).is_dir():  # a folder of weights takes too long to hash here
        sources.fetch(text, kind=kind, relative_to=relative_to)
    return "ok", str(wanted.path), ""


def _index_source(wanted: sources.Source) -> Finding:
    label = f"{wanted.name}-{wanted.version}"
    if cached_sha256(cache_dir() / "files" / label / str(wanted.path), wanted.sha256):
        return "ok", f"in the cache: {Path(str(wanted.path)).name}", ""
    index = Index()
    kept = (str(cache_dir() / "downloads"), False)  # archives that the cache still holds
    if links := index.links([*index.places(), kept], str(wanted.name), str(wanted.version)):
        return "ok", f"listed, to be fetched on first use: {links[0].filename}", ""
    missed = f" (not reached: {', '.join(index.unreachable)})" if index.unreachable else ""
    return "failed", f"{label} is not listed{missed}", SOURCE_REMEDY


def _hub_source(wanted: sources.Source, kind: str) -> Finding:
    name, revision, repo_type = str(wanted.name), wanted.version, "dataset" if kind == "data" else "model"
    repo: dict[str, Any] = {"repo_id": name, "revision": revision, "repo_type": repo_type}
    with suppress(Exception):  # it is not in the hub's cache
        root = huggingface_hub.snapshot_download(**repo, local_files_only=True)
        if any(Path(root).glob(wanted.path or ("*.safetensors" if kind == "model" else "*"))):
            return "ok", f"in the hub's cache: {name}", ""
    try:
        huggingface_hub.HfApi().repo_info(**repo, timeout=REACH_SECONDS)
    except Exception as error:  # as in `hub`
        remedy = "check its name and revision; `hf auth login` if it is private; " + SOURCE_REMEDY
        return "failed", f"hf:{name} ({type(error).__name__})", remedy
    return "ok", f"found, to be fetched on first use: hf:{name}", ""


def processor() -> Finding:
    """Name the processor, the cores that runs may use, and the memory."""
    from rankwise import machine

    memory = psutil.virtual_memory()
    size = f"{memory.total / 1e9:.1f} GB memory ({memory.available / 1e9:.1f} GB free)"
    bf16 = "bf16 in hardware" if machine.bf16_native("cpu") else "no bf16 in hardware"
    return "ok", f"{machine.processor()}, {machine.threads_for(TRAIN)} cores for runs, {bf16}, {size}", ""


def accelerator() -> Finding:
    """Name the CUDA devices; say so plainly when there is none."""
    import torch

    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        names = "; ".join(f"{card.name}, {card.total_memory / 1e9:.0f} GB" for card in cards)
        return "ok", names + ("; runs use the first" if len(cards) > 1 else ""), ""
    if Path("/proc/driver/nvidia/version").exists():
        remedy = "install the PyTorch build for this driver's CUDA (pytorch.org/get-started)"
        return "warning", "an NVIDIA driver is here, but PyTorch cannot use it: runs use the CPU", remedy
    return "ok", "no accelerator: runs use the CPU", ""


def matrix_products() -> Finding:
    """Time products of a real size in both precisions, where and with as many threads as runs do."""
    from rankwise import machine

    device, threads = machine.device_for(TRAIN), machine.threads_for(TRAIN)
    used = machine.dtype_for(TRAIN, device)
    speed = {name: _gflops(device, machine.torch_dtype(name)) for name in ("fp32", "bf16")}
    found = ", ".join(f"{name} {value:,.0f} GFLOP/s" for name, value in speed.items())
    found += f" {'on the GPU' if device == 'cuda' else f'with {threads} threads'}; runs use {used}"
    other = "fp32" if used == "bf16" else "bf16"
    if speed[other] > 1.5 * speed[used]:  # more than a busy machine explains
        return "warning", f"{found}, the slower", f"give studies `train.dtype: {other}`"
    return "ok", found, ""


def _gflops(device: str, dtype: Any) -> float:
    """Return the median speed of x @ w.T, in 1e9 floating-point operations per second."""
    import torch

    rows, inputs, outputs = 2048, 576, 1536  # the largest linear map of SmolLM2-135M
    x = torch.ones(rows, inputs, dtype=dtype, device=device)
    w = torch.ones(outputs, inputs, dtype=dtype, device=device)
    repeats = 100 if device == "cuda" else 1  # there, one product is shorter than starting and timing it
    times: list[float] = []
    while len(times) < 2 or sum(times) < 0.4:
        begun = time.perf_counter()
        for _ in range(repeats):
            torch.nn.functional.linear(x, w)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return 2e-9 * rows * inputs * outputs * repeats / statistics.median(times[1:])  # the first warms up


def folder(path: Path | None, remedy: str) -> Finding:
    """Check that a folder (None: the cache), or where it will be made, takes files and locks and has room."""
    path = (path or cache_dir()).expanduser().absolute()
    place = next(p for p in (path, *path.parents) if os.path.lexists(p))
    if not place.is_dir():
        return "failed", f"{path}: {place} is no folder", remedy
    try:
        with tempfile.TemporaryDirectory(prefix=".rankwise-doctor-", dir=place) as aside:
            Path(aside, "a").write_bytes(bytes(4096))
            with FileLock(Path(aside, "lock"), timeout=1):
                pass  # some network drives take files and no locks
    except (OSError, NotImplementedError) as error:
        return "failed", f"{path} cannot be written: {getattr(error, 'strerror', '') or error}", remedy
    free = shutil.disk_usage(place).free
    found = f"{path}{'' if place == path else ' (to be made)'}, {free / 1e9:,.1f} GB free"
    if free >= WARN_FREE:
        return "ok", found, ""
    return "warning" if free >= FAIL_FREE else "failed", found, f"make room, or {remedy}"


def strategies() -> Finding:
    """Compare ranks and counts with the earlier study's, on its model's shapes (on the meta device)."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from rankwise.inventory import inventory
    from rankwise.strategies import allocate

    with torch.device("meta"):
        modules = inventory(GPT2LMHeadModel(GPT2Config(n_embd=1024, n_layer=24, n_head=16)))
    counts = {b: allocate(modules, strategy="uniform", budget=b).parameters for b in ("r=16", "r=8")}
    counts["base"] = modules.base_parameters
    wrong = [f"{b}: {counts[b]:,} parameters, not {n:,}" for b, n in COUNTS.items() if counts[b] != n]
    for name, wanted in VECTORS.items():
        ranks = allocate(modules, strategy=name, match="none").ranks
        differ = [m for m in modules if ranks[m.name] != wanted(m)]
        wrong += [f"{name}: {m.name} has rank {ranks[m.name]}, not {wanted(m)}" for m in differ]
    if wrong:
        return "failed", f"{len(wrong)} differ: {'; '.join(wrong[:3])}", f"reinstall rankwise, or {REPORT}"
    return "ok", f"{len(VECTORS)} formulas and {len(COUNTS)} parameter counts as in the earlier study", ""


def training() -> Finding:
    """Train mixed ranks on a tiny random model, save them, reload them with plain PEFT, take them off."""
    import torch
    from peft import PeftModel
    from transformers import LlamaConfig, LlamaForCausalLM

    from rankwise import adapters, machine
    from rankwise.data import Example
    from rankwise.inventory import inventory
    from rankwise.strategies import allocate
    from rankwise.train import train_adapters

    torch.manual_seed(0)
    torch.set_num_threads(1)  # on a busy machine, threads that wait for each other take longer than this does
    shape = LlamaConfig(vocab_size=64, hidden_size=32, num_attention_heads=4, num_hidden_layers=2)
    base: Any = LlamaForCausalLM(shape)
    base.to(machine.device_for(TRAIN))
    untouched, other = copy.deepcopy(base), copy.deepcopy(base)
    ranks = {"q_proj": 5, "layers.0.mlp.down_proj": 3, "v_proj": 1}  # all others 0
    plan = allocate(inventory(base), strategy="custom", match="none", options={"ranks": ranks})
    tokens = torch.arange(64, dtype=torch.int32).reshape(2, 32)
    rows = [Example(str(i), ids, ids, 0, 32, 0, 32) for i, ids in enumerate(tokens.numpy())]
    adapted = adapters.attach(base, plan, seed=0)
    with tempfile.TemporaryDirectory() as made:
        train_adapters(adapted, [rows] * 3, TRAIN, rate=1e-2, seed=0, folder=Path(made))
        adapters.save(adapted, Path(made, "adapter"))
        reloaded = PeftModel.from_pretrained(other, Path(made, "adapter"))
    with torch.no_grad():
        ids = tokens.long().to(base.device)
        trained, again, before = (m.eval()(ids).logits for m in (adapted, reloaded, untouched))
    weights = adapters.detach(adapted).state_dict()
    changed = [name for name, t in untouched.state_dict().items() if not torch.equal(t, weights[name])]
    gap, moved = ((trained - x).abs().max().item() for x in (again, before))
    found = f"3 steps on ranks 1, 3 and 5, saved, reloaded by PEFT: logits within {gap:.1g}"
    if gap <= 1e-5 and moved > 1e-3 and not changed:
        return "ok", f"{found}; base weights as before", ""
    found += f"; moved by {moved:.1g}, {len(changed)} base tensors changed"
    return "failed", found, f"try another version of peft; if that does not help, {REPORT}"
