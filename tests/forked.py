"""The command line as a process that need not import anything: forked from one that has imported it all.

Importing PyTorch, Transformers and PEFT takes a processor 4 to 10 seconds, and the tests start some hundred
commands. What is forked has its own process, arguments, environment, folder and output, and is killed as any
other. What depends on the import itself (variables read there, moments within it) needs a fresh process.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parent.parent
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.warm"])


class Forked:
    """A command line at work; a small `subprocess.Popen`."""

    def __init__(self, arguments: Sequence[str], cwd: Path, env: dict[str, str]) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.out, self.err = (Path(self.folder.name) / name for name in ("out", "err"))
        self.out.touch()
        self.err.touch()
        given = (list(arguments), str(cwd), env, str(self.out), str(self.err))
        self.process = CONTEXT.Process(target=_run, args=given)
        # Read once, as the server starts, wherever the test at hand stands by then.
        with mock.patch.dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)):
            self.process.start()

    def poll(self) -> int | None:
        return self.process.exitcode

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end and return what it wrote."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f"still at work after {timeout} s: {self.err.read_text()}")
        return self.out.read_text(), self.err.read_text()


def _run(arguments: list[str], cwd: str, env: dict[str, str], out: str, err: str) -> None:
    """Be the command line; runs in the forked process."""
    assert "tests.warm" in sys.modules, "the server has not imported what it was to import"
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["rankwise", *arguments]
    from rankwise.cli import main

    try:
        main()
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves without them
