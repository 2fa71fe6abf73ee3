"""The records on disk, with real processes and real kills."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rankwise.errors import RankwiseError
from rankwise.store import FORMAT, Store, write_json

HOLD = """
import sys, time
from pathlib import Path
from rankwise.store import Store
with Store(Path(sys.argv[1]), "one").claim("abc") as mine:
    print(mine, flush=True)
    time.sleep(60)
"""
WORK = """
import os, sys
from pathlib import Path
from rankwise.store import Store, write_json
store = Store(Path(sys.argv[1]), "one")
for _ in range(3):
    for run_id in [f"run{i}" for i in range(40)]:
        with store.claim(run_id) as mine:
            if mine and not store.has(run_id):
                folder = store.stage(run_id)
                write_json(folder / "result.json", {"status": "done", "train_info": {}, "by": os.getpid()})
                print(run_id, flush=True)
                store.finish(run_id, folder)
"""


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], text=True, stdout=-1)


def opened(results: Path, study: str = "one") -> Store:
    store = Store(results, study)
    store.open()
    return store


def put(store: Store, run_id: str, status: str = "done", **more: object) -> None:
    folder = store.stage(run_id)
    (folder / "adapter").mkdir()
    (folder / "adapter" / "weights").write_bytes(b"\0\1")
    write_json(folder / "result.json", {"status": status, "train_info": {}, **more})
    store.finish(run_id, folder)


def test_a_claim_is_exclusive_and_dies_with_its_process(tmp_path: Path):
    store = opened(tmp_path)
    holder = python(HOLD, tmp_path)
    assert holder.stdout is not None and holder.stdout.readline() == "True\n"
    with store.claim("abc") as mine, store.claim("other") as free:
        assert not mine and free
        assert (store.state("abc"), store.state("other"), store.state("never")) == (
            "running",
            "running",
            "pending",
        )
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert store.state("abc") == "pending"
    with store.claim("abc") as mine:
        assert mine


def test_a_claim_is_freed_when_the_work_fails(tmp_path: Path):
    store = opened(tmp_path)
    with pytest.raises(ZeroDivisionError), store.claim("abc"):
        raise ZeroDivisionError
    with store.claim("abc") as mine:
        assert mine


def test_many_processes_do_each_run_once(tmp_path: Path):
    opened(tmp_path)
    workers = [python(WORK, tmp_path) for _ in range(4)]
    lines = [worker.communicate()[0].split() for worker in workers]
    assert sorted(name for done in lines for name in done) == sorted(f"run{i}" for i in range(40))
    store = Store(tmp_path, "one")
    owners = {name: worker.pid for worker, done in zip(workers, lines, strict=True) for name in done}
    assert {name: store.record(name)["by"] for name in owners} == owners
    assert not list((tmp_path / ".partial").iterdir())


def test_states_of_a_run(tmp_path: Path):
    store = opened(tmp_path)
    assert store.state("a") == "pending" and not store.has("a")
    folder = store.stage("a")
    (folder / "leftover").touch()
    assert store.stage("a") == folder and not list(folder.iterdir())
    assert store.state("a") == "pending" and not store.has("a"), "what is staged does not count"
    put(store, "a")
    put(store, "b", status="failed")
    assert (store.state("a"), store.state("b")) == ("done", "failed")
    assert (store.path("a") / "adapter" / "weights").read_bytes() == b"\0\1"
    assert not store.partial("a").exists()
    store.discard("b")
    assert store.state("b") == "pending"


def test_adopt_copies_another_studys_record(tmp_path: Path):
    one, two = opened(tmp_path, "one"), opened(tmp_path, "two")
    put(one, "abc", loss=1.25)
    assert not two.adopt("missing") and not two.has("abc")
    assert two.adopt("abc") and two.record("abc") == one.record("abc")
    assert (two.path("abc") / "adapter" / "weights").read_bytes() == b"\0\1"
    inode = (two.path("abc") / "result.json").stat().st_ino
    assert inode != (one.path("abc") / "result.json").stat().st_ino, "a copy: either study may be deleted"
    assert two.adopt("abc") and (two.path("abc") / "result.json").stat().st_ino == inode
    assert not list((tmp_path / ".partial").iterdir())


def test_a_failed_record_is_adopted_unless_it_is_to_be_tried_again(tmp_path: Path):
    one, two = opened(tmp_path, "one"), opened(tmp_path, "two")
    put(one, "abc", status="failed")
    assert not two.adopt("abc", failed=False) and not two.has("abc")
    assert two.adopt("abc") and two.record("abc")["status"] == "failed"
    two.discard("abc")
    assert not two.has("abc") and one.has("abc") and not list((tmp_path / ".partial").iterdir())


@pytest.mark.parametrize(
    ("content", "shown"),
    [('{"format": 99}', "format 99"), ("{}", "format None"), ("[1]", "unreadable"), ("{", "unreadable")],
)
def test_another_format_is_refused(tmp_path: Path, content: str, shown: str):
    store = opened(tmp_path)
    put(store, "abc")
    (store.folder / "store.json").write_text(content)
    with pytest.raises(RankwiseError, match=f"{shown}.*reads format {FORMAT}"):
        Store(tmp_path, "one")
    assert (store.folder / "store.json").read_text() == content


def test_runs_without_a_marker_are_refused(tmp_path: Path):
    store = opened(tmp_path)
    put(store, "abc")
    (store.folder / "store.json").unlink()
    with pytest.raises(RankwiseError, match=r"no store\.json"):
        Store(tmp_path, "one")
    store.discard("abc")
    Store(tmp_path, "one").open()
    (tmp_path / "file").touch()
    with pytest.raises(RankwiseError, match="is a file"):
        Store(tmp_path, "file")


def test_opening_again_touches_nothing(tmp_path: Path):
    store = opened(tmp_path)
    put(store, "abc")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    opened(tmp_path)
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if ".locks" not in path.parts}
    assert after == {path: time for path, time in before.items() if ".locks" not in path.parts}


@pytest.mark.parametrize("damage", ["", "{", '"text"', '{"status": "done"}'])
def test_a_damaged_record_is_an_error_and_not_a_number(tmp_path: Path, damage: str):
    store = opened(tmp_path)
    put(store, "abc")
    (store.path("abc") / "result.json").write_text(damage)
    with pytest.raises(RankwiseError, match=r"abc/result\.json.*[Dd]elete the folder"):
        store.record("abc")


def test_write_json_is_atomic(tmp_path: Path):
    path = tmp_path / "index.json"
    write_json(path, [0] * 5000)
    code = (
        "import sys; from pathlib import Path; from rankwise.store import write_json\n"
        "for i in range(200): write_json(Path(sys.argv[1]), [i] * 5000)"
    )
    writers, seen = [python(code, path) for _ in range(2)], set()
    while any(writer.poll() is None for writer in writers):
        value = json.loads(path.read_text())
        assert len(value) == 5000 and len(set(value)) == 1
        seen.add(value[0])
    assert [writer.returncode for writer in writers] == [0, 0] and len(seen) > 10
    assert [file.name for file in tmp_path.iterdir()] == ["index.json"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, {"a": {1, 2}}])
def test_what_is_no_json_leaves_the_old_file(tmp_path: Path, bad: object):
    path = tmp_path / "index.json"
    write_json(path, {"a": 1})
    with pytest.raises((ValueError, TypeError)):
        write_json(path, {"a": bad})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["index.json"]
