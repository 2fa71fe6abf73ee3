"""The command's side of several processes on one study: starting, measuring, hearing and ending them.

The command works on runs too; its workers claim theirs from the same store. A worker that dies frees its
claim, so that another takes its run over from the checkpoint: nothing has to be handed back.
"""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from filelock import FileLock

from rankwise import execution
from rankwise.grid import Grid, Planned, Study, grid
from rankwise.observer import Observer
from rankwise.speed import NoSpeed, Speed, measure
from rankwise.store import Store
from rankwise.study import prepare, work_through, write_index
from rankwise.worker import identity, packed, unpacked

PATIENCE = 120.0
"""Seconds that a worker may take to load or to measure before the command goes on without it."""

GOODBYE = 15.0
"""Seconds that workers may take to see that nothing is pending; at most a second is usual."""

Message = dict[str, Any]


class Worker:
    """A process beside this one. It ends when its input is closed, and so with this process at the latest."""

    def __init__(self, number: int, heard: queue.Queue[tuple[Worker, Message]]) -> None:
        self.number, self.heard = number, heard
        self.said = tempfile.TemporaryFile()
        self.fault = ""
        self.loaded = False
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rankwise.worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said, text=True,
        )  # fmt: skip
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()

    def _listen(self) -> None:
        """Pass on what the worker tells, and at last that it has ended."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            try:
                told = json.loads(line)
            except ValueError:
                break  # cut short by whatever ended the process
            self.loaded = self.loaded or told["event"] == "open"
            self.heard.put((self, told))
        self.process.wait()
        self.heard.put((self, {"event": "ended"}))

    def order(self, do: str, **about: Any) -> None:
        """Send an order."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **about}) + "\n")
            self.process.stdin.flush()
        except (OSError, ValueError):
            pass  # it has ended, which is heard in its turn

    def end(self) -> None:
        """End the process now."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.close()
        except OSError:
            pass  # it has ended, with an order still on its way
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.listener.join()
        self.said.close()

    def last_words(self) -> str:
        """Return how a process that went wrong ended: its error, or the signal that killed it."""
        if self.fault:
            return self.fault
        self.said.seek(0)
        lines = self.said.read().decode(errors="replace").strip().splitlines()
        code = self.process.returncode
        if code is not None and code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return lines[-1].strip() if lines else f"exit code {code}"


class Crew:
    """The workers of a command."""

    def __init__(self, study: Study, overrides: Sequence[str], observer: Observer) -> None:
        self.study, self.overrides, self.observer = study, overrides, observer
        self.members: list[Worker] = []
        self.heard: queue.Queue[tuple[Worker, Message]] = queue.Queue()

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.resize(0)

    def resize(self, count: int) -> None:
        """Start or end workers, so that there are this many."""
        while len(self.members) > count:
            self.members.pop().end()
        while len(self.members) < count:
            worker = Worker(len(self.members) + 2, self.heard)  # the command itself is the first process
            self.members.append(worker)
            worker.order(
                "open", path=str(self.study.file.path), results=str(self.study.store.results),
                overrides=list(self.overrides), identity=identity(self.study),
            )  # fmt: skip

    def measure(self, planned: Planned, processes: int, threads: int, steps: int) -> Speed:
        """Return the speed of this process and workers, all training the same steps at the same time.

        Raises:
            NoSpeed: when a worker ends or does not answer.
        """
        try:
            return self._measure(planned, processes, threads, steps)
        except NoSpeed:
            self.resize(0)  # those that are left wait for an order that will not come
            raise

    def _measure(self, planned: Planned, processes: int, threads: int, steps: int) -> Speed:
        ready = len(self.members)
        self.resize(processes - 1)
        self._await("open", self.members[ready:])
        for worker in self.members:
            worker.order("measure", threads=threads, run=packed(planned))

        def all_warm(rate: float) -> int:
            self._await("warm", self.members)
            for worker in self.members:
                worker.order("go", steps=steps)
            return steps

        mine = measure(execution.with_threads(self.study, threads), planned, all_warm)
        found = [mine] + [_speed(told) for told in self._await("speed", self.members)]
        total = sum(speed.tokens_per_second for speed in found)
        return Speed(processes, threads, total, max(speed.peak_bytes for speed in found))

    def _await(self, event: str, workers: Sequence[Worker]) -> list[Message]:
        """Return what each of these workers tells with this event."""
        told: dict[Worker, Message] = {}
        until = time.monotonic() + PATIENCE
        while len(told) < len(workers):
            try:
                worker, message = self.heard.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                raise NoSpeed(f"a worker process gave no answer for {PATIENCE:.0f} s") from None
            if worker not in self.members:
                continue  # it has been ended; this was on its way
            if message["event"] == event:
                told[worker] = message
            elif message["event"] == "fault":
                worker.fault = message["text"]
            elif message["event"] == "ended":
                raise NoSpeed(f"worker process {worker.number} ended: {worker.last_words()}")
        return [told[worker] for worker in workers]

    def work(self, processes: int, threads: int, checkpoint_seconds: float, retry_failed: bool) -> None:
        """Let this many processes, this one included, work on what is pending."""
        self.resize(processes - 1)
        for worker in self.members:
            worker.order(
                "work", threads=threads, arms=self.study.only, checkpoint_seconds=checkpoint_seconds,
                retry_failed=retry_failed,
            )  # fmt: skip

    def hear(self) -> None:
        """Pass on what the workers told since the last time."""
        while not self.heard.empty():
            self._pass_on(*self.heard.get())

    def _pass_on(self, worker: Worker, told: Message) -> None:
        run = unpacked(told["run"]) if "run" in told else None
        if told["event"] == "fault":
            worker.fault = told["text"]
        elif told["event"] == "ended" and worker in self.members:
            self.members.remove(worker)
            if worker.process.returncode:
                self.observer.note(
                    f"worker process {worker.number} ended: {worker.last_words()}; its run is taken over"
                )
            worker.end()
        elif run is not None and told["event"] == "started":
            self.observer.started(run, told["work"])
        elif run is not None and told["event"] == "work":
            self.observer.work(run, told["units"])
        elif run is not None and told["event"] == "finished":
            self.observer.finished(run, told["status"])

    def finish(self) -> None:
        """Hear the workers out, once nothing is pending; those that are still loading come too late."""
        for worker in [worker for worker in self.members if not worker.loaded]:
            self.members.remove(worker)
            worker.end()
        until = time.monotonic() + GOODBYE
        while self.members and time.monotonic() < until:
            try:
                self._pass_on(*self.heard.get(timeout=0.1))
            except queue.Empty:
                continue


def _speed(told: Message) -> Speed:
    return Speed(**{name: value for name, value in told.items() if name != "event"})


class Listener(Observer):
    """Hears this process's runs, and the workers' in between, so that an observer hears one at a time."""

    def __init__(self, crew: Crew) -> None:
        self.crew, self.observer = crew, crew.observer

    def grid(self, grid: Grid, store: Store, work: dict[str, int]) -> None:
        """Pass on the list of runs."""
        self.crew.hear()
        self.observer.grid(grid, store, work)

    def started(self, planned: Planned, work: int) -> None:
        """Pass on that a run begins."""
        self.crew.hear()
        self.observer.started(planned, work)

    def work(self, planned: Planned, units: int) -> None:
        """Pass on that work is done."""
        self.crew.hear()
        self.observer.work(planned, units)

    def finished(self, planned: Planned, status: str) -> None:
        """Pass on that a run has ended."""
        self.crew.hear()
        self.observer.finished(planned, status)

    def waiting(self, runs: int) -> None:
        """Pass on that the rest is in other hands."""
        self.crew.hear()
        self.observer.waiting(runs)


def run_together(
    study: Study,
    observer: Observer,
    *,
    overrides: Sequence[str] = (),
    processes: int | None = None,
    checkpoint_seconds: float = 30.0,
    retry_failed: bool = False,
) -> dict[str, Any]:
    """Do every pending run of the study in one process or several, and return its index.

    Args:
        study: opened in this process; workers open it again from its file.
        observer: hears the runs of all processes.
        overrides: what the study was opened with.
        processes: how many; None lets `execution.choose` decide.
        checkpoint_seconds: time between checkpoints of a run.
        retry_failed: run failed runs again.
    """
    prepare(study, retry_failed=retry_failed)
    settings: dict[str, Any] = {"checkpoint_seconds": checkpoint_seconds, "retry_failed": retry_failed}
    with Crew(study, overrides, observer) as crew:
        with FileLock(study.store.results / ".locks" / f"execution-{study.config.name}.lock"):
            choice = settle(study, processes, crew)  # one command chooses, others that start now follow
        study = execution.with_threads(study, choice.threads)
        crew.work(choice.processes, choice.threads, **settings)
        work_through(study, Listener(crew), **settings)
        crew.finish()
    return write_index(study, grid(study))


def settle(study: Study, asked: int | None, crew: Crew) -> execution.Choice:
    """Return the choice for this sitting, and keep it with the study where it is a new one.

    Kept in any case: the most processes of any sitting, as times tell less where runs shared the machine.
    """
    before = execution.kept(study.store)
    choice = execution.choose(study, asked, crew.measure)
    if choice.processes > 1 or choice.compared:
        crew.observer.note(str(choice))
    pending = len(grid(execution.with_threads(study, choice.threads)).of(study.only).pending(study.store))
    processes = max(1, min(choice.processes, pending))
    most = processes if before is None else max(processes, before.most_processes)
    if before is None or before.threads != choice.threads or len(choice.measured) > len(before.measured):
        execution.keep(study, replace(choice, most_processes=most))
    elif most > before.most_processes:
        execution.keep_most(study.store, most)
    return replace(choice, processes=processes)
