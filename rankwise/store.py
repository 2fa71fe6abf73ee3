"""The records on disk: claim a run, write it aside, rename it into place, read it back.

    results/<study>/runs/<run_id>/    a finished run (done or failed), complete by construction
    results/.partial/<run_id>/        a run under way: its checkpoint and its step log
    results/.locks/<run_id>.lock      held by the process that works on the run, freed by its death

Run names are content hashes, so locks and partial runs are shared by all studies of a results folder.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from rankwise.aside import replacing
from rankwise.errors import RankwiseError

FORMAT = 1
"""Layout of the results folder; another number means that another version wrote it."""

State = Literal["pending", "running", "done", "failed"]


class Store:
    """The runs of one study in a results folder, with sight of the other studies' runs."""

    def __init__(self, results: Path, study: str) -> None:
        self.results = results
        self.folder = results / study
        self.runs = self.folder / "runs"
        self._check_format()

    def _check_format(self) -> None:
        marker = self.folder / "store.json"
        there = next((place for place in (self.folder, *self.folder.parents) if place.exists()), None)
        if there is not None and not there.is_dir():
            raise RankwiseError(
                f"no results can lie in {self.folder}: {there} is a file. Choose another with --results."
            )
        if not marker.exists():
            if self.runs.is_dir() and any(self.runs.iterdir()):
                raise RankwiseError(
                    f"{self.runs} holds runs but no store.json, so another program or version wrote it; "
                    "move the folder away or choose another with --results."
                )
            return
        try:
            found = json.loads(marker.read_text()).get("format")
        except (ValueError, AttributeError):
            found = "unreadable"
        if found != FORMAT:
            raise RankwiseError(
                f"{self.folder} was written in format {found}; this rankwise reads format {FORMAT}. "
                "Move the folder away, choose another with --results, or use the version that wrote it."
            )

    def open(self) -> None:
        """Create the folders and the format marker; drop what a killed process left of finished runs."""
        self.runs.mkdir(parents=True, exist_ok=True)
        for name in (".partial", ".locks"):
            (self.results / name).mkdir(exist_ok=True)
        if not (self.folder / "store.json").exists():
            write_json(self.folder / "store.json", {"format": FORMAT})
        self._sweep()

    def _sweep(self) -> None:
        """Remove the partial folders of runs that are finished and in nobody's hands."""
        for folder in (self.results / ".partial").iterdir():
            run_id = folder.name.partition(".")[0]
            if self.has(run_id):
                with self.claim(run_id) as free:
                    if free:
                        shutil.rmtree(folder, ignore_errors=True)

    # --- one run ---------------------------------------------------------------------------

    def path(self, run_id: str) -> Path:
        """Return where this study's record of the run is, or will be."""
        return self.runs / run_id

    def has(self, run_id: str) -> bool:
        """Whether this study's folder holds a finished record of the run, done or failed."""
        return self.path(run_id).is_dir()

    def partial(self, run_id: str) -> Path:
        """Return the folder of a run under way."""
        return self.results / ".partial" / run_id

    @contextmanager
    def claim(self, run_id: str) -> Iterator[bool]:
        """Yield whether this process now owns the run; the claim dies with the process."""
        lock = FileLock(self.results / ".locks" / f"{run_id}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            yield True
        except Exception as error:
            error.add_note(f"run {run_id} in {self.partial(run_id)}")
            raise
        finally:
            lock.release()

    def state(self, run_id: str) -> State:
        """Return the run's state; "running" means that a living process holds its claim."""
        if self.path(run_id).is_dir():
            return self.record(run_id)["status"]
        if not (self.results / ".locks" / f"{run_id}.lock").exists():
            return "pending"
        try:
            with self.claim(run_id) as free:
                return "pending" if free else "running"
        except OSError:  # nobody works on records that cannot be written
            return "pending"

    def record(self, run_id: str) -> dict[str, Any]:
        """Return a finished run's `result.json`.

        Raises:
            RankwiseError: when the record cannot be read (it was edited or damaged by hand).
        """
        return self._part(run_id, "result.json", ("status", "train_info"))

    def config(self, run_id: str) -> dict[str, Any] | None:
        """Return a finished run's `config.json`, or None where there is none.

        Raises:
            RankwiseError: when it cannot be read.
        """
        there = (self.path(run_id) / "config.json").exists()
        return self._part(run_id, "config.json", ()) if there else None

    def plan(self, run_id: str) -> dict[str, Any] | None:
        """Return a finished run's `plan.json`, or None where there is none (the untouched model).

        Raises:
            RankwiseError: when it cannot be read.
        """
        there = (self.path(run_id) / "plan.json").exists()
        return self._part(run_id, "plan.json", ("ranks",)) if there else None

    def table(self, run_id: str, name: str) -> Any:
        """Return a finished run's Parquet file as an Arrow table.

        Raises:
            RankwiseError: when it is missing or cannot be read.
        """
        import pyarrow.parquet as pq

        path = self.path(run_id) / name
        try:
            return pq.read_table(path)
        except (OSError, ValueError) as error:  # Arrow's own errors are ValueErrors
            remedy = f"Delete the folder {path.parent} to run it again."
            raise RankwiseError(f"{path} cannot be read ({type(error).__name__}). {remedy}") from None

    def steps(self, run_id: str) -> list[dict[str, Any]]:
        """Return a finished run's step log; empty where it has none."""
        path = self.path(run_id) / "metrics.jsonl"
        if not path.exists():
            return []
        try:
            return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
        except ValueError as error:
            remedy = f"Delete the folder {path.parent} to run it again."
            raise RankwiseError(f"{path} cannot be read ({error}). {remedy}") from None

    def _part(self, run_id: str, name: str, keys: tuple[str, ...]) -> dict[str, Any]:
        folder = self.path(run_id)
        return read_json(folder / name, keys, f"Delete the folder {folder} to run it again.")

    def adopt(self, run_id: str, *, failed: bool = True) -> bool:
        """Copy the record from another study of this results folder, if one has it.

        With `failed=False` a failed record is left, to be tried again.
        """
        for other in sorted(self.results.glob(f"*/runs/{run_id}/result.json")):
            status = read_json(other, ("status",), f"Delete the folder {other.parent}.")["status"]
            if status != "done" and not failed:
                continue
            aside = self.partial(f"{run_id}.adopt-{os.getpid()}")
            try:
                shutil.copytree(other.parent, aside, dirs_exist_ok=True)
                aside.rename(self.path(run_id))
            except OSError:
                if not self.has(run_id):  # else another process was first, and its copy is equal
                    raise
            finally:
                shutil.rmtree(aside, ignore_errors=True)
            return True
        return False

    def finish(self, run_id: str, staged: Path) -> None:
        """Put a complete record in place with one rename, then drop the run's partial folder."""
        for file in staged.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        staged.rename(self.path(run_id))
        shutil.rmtree(self.partial(run_id), ignore_errors=True)

    def stage(self, run_id: str) -> Path:
        """Return a fresh folder inside the partial run, in which a record is written before its rename."""
        folder = self.partial(run_id) / "record"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def discard(self, run_id: str) -> None:
        """Remove a record in one step, so that the run is pending again; the caller holds its claim."""
        aside = self.partial(f"{run_id}.discard-{os.getpid()}")
        self.path(run_id).rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def read_json(path: Path, keys: tuple[str, ...], remedy: str) -> dict[str, Any]:
    """Return a JSON object that rankwise wrote, with at least these keys.

    Raises:
        RankwiseError: when it was edited or damaged by hand; the text ends in the remedy.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RankwiseError(f"{path} cannot be read ({error}). {remedy}") from None
    if missing := [key for key in keys if not isinstance(found, dict) or key not in found]:
        raise RankwiseError(f"{path} is damaged: it holds no {' and no '.join(missing)}. {remedy}")
    return found


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: a reader sees the old file or the new one, never a part."""
    try:
        with replacing(path) as aside:
            aside.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        error.filename = str(path)  # a full disk has no name of its own
        raise
