"""What every refusal must be: exit code 2, one message, no traceback, and nothing written or changed."""

from __future__ import annotations

import hashlib
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import rankwise


def files(folder: Path) -> dict[str, str]:
    """Every file and folder below a folder, with a hash of what it holds."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder"
        for p in sorted(folder.rglob("*"))
    }


def one_message(result: subprocess.CompletedProcess[str], *says: str, code: int = 2) -> str:
    """Check that a process ended in one plain message that says all of these, and return the message."""
    said = result.stderr
    assert result.returncode == code, said + result.stdout
    assert "Traceback" not in said + result.stdout
    first, *others = said.splitlines()
    assert first.startswith("rankwise: "), said
    assert all(line.startswith("  ") for line in others), f"more than one message:\n{said}"
    assert said.replace("\n", "").isprintable(), "the terminal would obey what stands in this message"
    for text in says:
        assert text in said, f"{text!r} is not said in:\n{said}"
    return said


def refused(*arguments: object, cwd: Path, says: tuple[str, ...] | list[str] = (), **env: str) -> str:
    """Run the command line, check that it refuses and leaves every file as it was; return the message."""
    before = files(cwd)
    said = one_message(rankwise(*arguments, cwd=cwd, **env), *says)
    assert files(cwd) == before, "a refused command has written something"
    return said


def limited(*arguments: object, cwd: Path, largest: int, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command line where no file may grow beyond so many bytes, as on a disk that is full."""
    return subprocess.run(
        [sys.executable, "-m", "rankwise", *map(str, arguments)],
        cwd=cwd, text=True, capture_output=True, timeout=300, check=False,
        env={**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1", **env},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest)),
    )  # fmt: skip


class Disk:
    """A small disk of its own, which can be made larger or read-only."""

    def __init__(self, folder: Path, size: str) -> None:
        self.folder = folder
        folder.mkdir()
        self._mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs")

    def _mount(self, *options: str) -> None:
        done = subprocess.run(["mount", *options, self.folder], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")

    def change(self, options: str) -> None:
        """Remount with other options, such as `ro` or `size=1m`."""
        self._mount("-o", f"remount,{options}")

    def remove(self) -> None:
        """Unmount."""
        subprocess.run(["umount", "-l", self.folder], check=False)
