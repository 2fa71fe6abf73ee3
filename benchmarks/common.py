"""What the benchmarks share: fresh processes, interleaving, medians, tables, one JSON per invocation.

A measurement is a *job*, a small dictionary. It runs in a process of its own (`python -m MODULE --job FILE`),
which reads the job from FILE and writes its answer beside it, so that no contender inherits another one's
memory, threads or caches.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
STUDY = ROOT / "studies" / "quickstart.yaml"
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}
console = Console(width=None if sys.stdout.isatty() else 150)


class Failed(Exception):
    """A measuring process ended badly; the message holds the end of what it wrote."""


def fresh(module: str, job: dict[str, Any], timeout: float = 3600.0) -> dict[str, Any]:
    """Run one job in a process of its own and return its answer, with the wall time of the whole process.

    Raises:
        Failed: with the last lines that the process wrote, when it fails or gives no answer.
    """
    with tempfile.TemporaryDirectory(prefix="rankwise-bench-") as folder:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(job))
        command = [sys.executable, "-m", module, "--job", str(path)]
        answer, seconds = path.with_suffix(".answer"), -time.perf_counter()
        with (Path(folder) / "output").open("w+") as output:
            status = run_process(command, output, timeout, {"HF_DATASETS_CACHE": folder})
            seconds += time.perf_counter()
            output.seek(0)
            tail = "\n".join(output.read().splitlines()[-25:])
        if status != 0 or not answer.exists():
            raise Failed(f"{' '.join(command[1:3])} {json.dumps(job)} ended with {status}:\n{tail}")
        return json.loads(answer.read_text()) | {"process_seconds": seconds}


def run_process(command: Sequence[str], output: Any, timeout: float, env: dict[str, str]) -> int | str:
    """Run a command in the repository's root and return its exit status (or why there is none)."""
    try:
        ended = subprocess.run(
            command, cwd=ROOT, env=os.environ | QUIET | env, stdout=output, stderr=subprocess.STDOUT,
            timeout=timeout, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"no answer within {timeout:.0f} s"
    return ended.returncode


def answer_job(path: Path, work: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Do the job of a file and write the answer beside it: the whole life of a measuring process."""
    path.with_suffix(".answer").write_text(json.dumps(work(json.loads(path.read_text()))))


def interleaved(names: Sequence[str], repetitions: int) -> list[tuple[int, str]]:
    """Return (round, name) in the order A B C, A B C, ...: a slow minute then hurts everyone alike."""
    return [(turn, name) for turn in range(repetitions) for name in names]


def collect(
    module: str, jobs: dict[str, dict[str, Any]], repetitions: int
) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """Measure every job `repetitions` times, interleaved; return answers by name, and what failed.

    A failure is printed at once and the others go on: hours of measurements are not lost to one peer.
    """
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in jobs}
    failures: list[str] = []
    order = interleaved(list(jobs), repetitions)
    for number, (turn, name) in enumerate(order, 1):
        try:
            answer = fresh(module, jobs[name])
        except Failed as error:
            failures.append(f"{name}, round {turn + 1}: {error}")
            console.print(failures[-1], style="red", markup=False, highlight=False)
            continue
        answers[name].append(answer)
        took = f"{answer['process_seconds']:.0f} s"
        console.print(f"{number}/{len(order)}  {name}  {took}", style="dim", markup=False, highlight=False)
    return answers, failures


def spread(values: Iterable[float]) -> dict[str, float]:
    """Return the median with the smallest and the largest of some repetitions."""
    listed = list(values)
    return {"median": statistics.median(listed), "min": min(listed), "max": max(listed)}


def shown(value: dict[str, float], form: str = ".0f") -> str:
    """Write a spread as `median (min-max)`."""
    return f"{value['median']:{form}} ({value['min']:{form}}-{value['max']:{form}})"


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table: the first column is text, the others are numbers."""
    made = Table(title=title, title_justify="left", header_style="bold")
    for index, name in enumerate(columns):
        made.add_column(name, justify="left" if index == 0 else "right")
    for row in rows:
        made.add_row(*row)
    console.print(made)


def write(out: Path, content: dict[str, Any]) -> None:
    """Write one invocation's results as JSON."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1) + "\n")
    console.print(f"written: {out}", markup=False, highlight=False)


def finish(failures: list[str]) -> int:
    """Repeat what failed below the tables, where it is seen, and return the exit status."""
    for failure in failures:
        console.print(f"FAILED  {failure}", style="red", markup=False, highlight=False)
    return 1 if failures else 0


def machine_description() -> dict[str, Any]:
    """Describe this machine (see `rankwise.machine`), with the versions of the peers beside it."""
    import importlib.metadata

    from rankwise import machine
    from rankwise.config import TrainConfig

    train = TrainConfig(learning_rates=(1e-3,))
    device = machine.device_for(train)
    described = machine.describe(device, machine.threads_for(train))
    described["bf16_native"] = machine.bf16_native(device)
    for peer in ("trl", "accelerate", "datasets"):
        try:
            described["packages"][peer] = importlib.metadata.version(peer)
        except importlib.metadata.PackageNotFoundError:
            pass  # the extra `bench` is not installed, and that peer will say so
    return described


def default_out(what: str) -> Path:
    """Return the place of a benchmark's JSON: named by the day, so that earlier ones stay."""
    return RESULTS / f"{what}-{time.strftime('%Y-%m-%d')}.json"


def parser(doc: str | None, what: str) -> argparse.ArgumentParser:
    """Return a parser with what every benchmark takes: --full, --out, and the jobs' own --job."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--full", action="store_true", help="the size whose figures are reported")
    made.add_argument("--out", type=Path, default=default_out(what), help="JSON file [%(default)s]")
    made.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    return made
