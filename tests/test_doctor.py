"""The doctor: every check passes here, and each can fail and then says how to mend it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from rich.console import Console

from rankwise import adapters, cached, doctor, machine, train
from rankwise.doctor import Check
from rankwise.strategies import STRATEGIES
from tests.conftest import alpaca_rows, rankwise, write_study

NAMES = [
    "python", "packages", "package index", "hub", "study file", "study model", "study data", "processor",
    "accelerator", "matrix products", "cache folder", "results folder", "strategies", "training",
]  # fmt: skip


def look(check: Callable[[], doctor.Finding]) -> Check:
    """One check, made as the doctor makes it; whatever is not well has its remedy."""
    threads, made = torch.get_num_threads(), doctor.perform("it", check)
    torch.set_num_threads(threads)  # which a check may change
    assert made.level == "ok" or made.remedy
    return made


@pytest.fixture
def closed() -> str:
    """An address on this machine where nobody listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{held.getsockname()[1]}"


@pytest.fixture
def no_pip(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Pip without any settings but those that a test makes."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return monkeypatch


def test_this_system_passes(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(alpaca_rows(9)))
    study = {"name": "tiny", "model": f"file:{tiny_model}", "data": {"source": "file:rows.json", "train": 4}}
    study |= {"train": {"step_tokens": 200, "learning_rates": [1e-2]}, "seeds": {"tuning": 0}}
    path = write_study(tmp_path, study | {"arms": {"u": {"strategy": "uniform", "budget": "r=2"}}})
    cache = tmp_path / "cache"
    done = rankwise("doctor", "--json", "--study", path, cwd=tmp_path, RANKWISE_CACHE=str(cache))
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    rows = json.loads(done.stdout)
    assert [row["name"] for row in rows] == NAMES
    for row in rows:
        assert set(row) == {"name", "level", "ok", "found", "remedy", "seconds"}
        assert row["ok"] and row["found"]
        assert bool(row["remedy"]) == (row["level"] == "warning")
    found = {row["name"]: row["found"] for row in rows}
    assert torch.__version__ in found["packages"] and importlib.metadata.version("peft") in found["packages"]
    assert re.search(
        r"fp32 [\d,]+ GFLOP/s, bf16 [\d,]+ GFLOP/s (with \d+ threads|on the GPU)", found["matrix products"]
    )
    assert "GB free" in found["cache folder"] and "GB free" in found["results folder"]
    assert found["study file"].endswith("study.yaml (arms: 1)")
    left = {path.name for path in tmp_path.iterdir()} - {"cache"}
    assert left == {"rows.json", "study.yaml"}  # no results folder, no probe files


def test_cache_below_a_file_fails_with_its_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    places = {"RANKWISE_CACHE": str(tmp_path / "file" / "cache"), "PIP_FIND_LINKS": str(tmp_path)}
    done = rankwise("doctor", "--json", cwd=tmp_path, **places)
    assert done.returncode == 1, done.stderr
    (failed,) = [row for row in json.loads(done.stdout) if not row["ok"]]
    assert failed["name"] == "cache folder" and failed["level"] == "failed"
    assert str(tmp_path / "file") in failed["found"] and "RANKWISE_CACHE" in failed["remedy"]


def test_without_pytorch_the_rest_is_still_reported(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from pathlib import Path; from rankwise import doctor\n"
        "for c in doctor.run_checks(Path('results')): print(c.name, c.level, c.remedy, sep='|')"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr
    rows = {name: (level, remedy) for name, level, remedy in (r.split("|") for r in done.stdout.splitlines())}
    assert list(rows) == [name for name in NAMES if not name.startswith("study")]
    assert {name for name, (level, _) in rows.items() if level == "failed"} >= {"accelerator", "training"}
    assert rows["packages"][0] == rows["results folder"][0] == "ok"
    assert "reinstall" in rows["training"][1]


def printed(check: Check, width: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(width))
    console = Console(file=io.StringIO(), width=width, highlight=False, force_terminal=False)
    console.print(check.text())
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [80, 120])
def test_lines_fit_and_keep_their_column(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check = Check("results folder", "failed", "word " * 40, "mend " * 40, 0.1)
    first, *others = printed(check, width, monkeypatch)
    assert first.startswith("failed  results folder  word")
    assert all(line.startswith(" " * doctor.INDENT) and line[doctor.INDENT] != " " for line in others)
    assert all(len(line) <= width for line in others) and max(map(len, others)) > width - 10
    assert sum("remedy: mend" in line for line in others) == 1


def test_text_from_outside_is_only_text(monkeypatch: pytest.MonkeyPatch) -> None:
    check = Check("hub", "warning", "[bold]a[/bold] [/] \x1b[31mb\x07\u202e\nsecond", "", 0.0)
    first, second = printed(check, 80, monkeypatch)
    assert first.endswith(r"[bold]a[/bold] [/] \x1b[31mb\x07\u202e") and second.split() == ["second"]


def test_what_a_check_raises_becomes_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken() -> doctor.Finding:
        raise ZeroDivisionError("of all things")

    for name in ("python_version", "package_versions", "package_index", "hub", "processor", "accelerator",
                 "matrix_products", "strategies", "training"):  # fmt: skip
        monkeypatch.setattr(doctor, name, broken)
    checks = {check.name: check for check in doctor.run_checks(tmp_path)}
    assert checks["cache folder"].ok and checks["results folder"].ok
    for check in [c for name, c in checks.items() if not name.endswith("folder")]:
        assert check.level == ("warning" if check.name == "hub" else "failed")
        assert "ZeroDivisionError: of all things" in check.found and "report this" in check.remedy


def test_a_check_that_does_not_answer_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "REACH_SECONDS", 0.2)
    never = threading.Event()
    waiting = doctor._asking(lambda: ("ok", str(never.wait(60)), ""), "warning", "a mirror")
    begun = time.perf_counter()
    assert waiting() == ("warning", "no answer in 0.2 s", "a mirror")
    assert time.perf_counter() - begun < 5
    never.set()
    assert doctor._asking(lambda: ("ok", "here", ""), "warning", "a mirror")() == ("ok", "here", "")


def test_packages_out_of_range_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    assert look(doctor.package_versions).level == "ok"
    stated = ["torch>=99,<100", "numpy>=1", "no-such-dist>=2", 'not-wanted-here>=1; extra == "dev"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: {"rankwise": stated}[name])
    check = look(doctor.package_versions)
    assert check.level == "failed"
    assert f"torch {torch.__version__}, <100,>=99 needed" in check.found
    assert "no-such-dist is absent" in check.found
    assert check.remedy == 'pip install "torch<100,>=99" "no-such-dist>=2"'


def test_python_out_of_range_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    assert look(doctor.python_version).level == "ok"
    monkeypatch.setattr(importlib.metadata, "metadata", lambda name: {"Requires-Python": ">=3.99"})
    check = look(doctor.python_version)
    assert check.level == "failed" and ">=3.99" in check.found and ">=3.99" in check.remedy


def test_index_that_nobody_answers_fails(no_pip: pytest.MonkeyPatch, closed: str, tmp_path: Path) -> None:
    no_pip.setenv("PIP_INDEX_URL", f"http://me:secret@{closed}/simple")
    check = look(doctor.package_index)
    assert check.level == "failed" and f"{closed}/simple (no connection)" in check.found
    assert "PIP_INDEX_URL" in check.remedy and "secret" not in check.found
    no_pip.setenv("PIP_FIND_LINKS", str(tmp_path))
    check = look(doctor.package_index)
    assert check.level == "warning" and check.found.endswith(f"reached: {tmp_path}")
    no_pip.setenv("PIP_NO_INDEX", "1")
    assert doctor.package_index() == ("ok", str(tmp_path), "")
    no_pip.setenv("PIP_FIND_LINKS", str(tmp_path / "gone"))
    assert look(doctor.package_index).found == f"not reached: {tmp_path / 'gone'} (no such folder)"
    no_pip.delenv("PIP_FIND_LINKS")
    check = look(doctor.package_index)
    assert check.level == "failed" and check.found.startswith("No package index is configured")
    assert "PIP_FIND_LINKS" in check.remedy


def test_with_a_study_a_silent_index_only_warns(
    no_pip: pytest.MonkeyPatch, closed: str, tmp_path: Path, study_dict: dict
) -> None:
    no_pip.setenv("PIP_INDEX_URL", f"http://{closed}/simple")
    for name in ("matrix_products", "strategies", "training"):
        no_pip.setattr(doctor, name, lambda: ("ok", "", ""))
    (tmp_path / "rows.json").write_text("[]")
    study = write_study(tmp_path, study_dict)
    levels = {check.name: check.level for check in doctor.run_checks(tmp_path, study)}
    assert levels["package index"] == "warning" and levels["study data"] == levels["study model"] == "ok"
    levels = {check.name: check.level for check in doctor.run_checks(tmp_path)}
    assert levels["package index"] == "failed"


def test_hub_is_a_warning_at_worst(monkeypatch: pytest.MonkeyPatch, closed: str) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://me:secret@{closed}")
    check = look(doctor.hub)
    assert check.level == "warning" and check.ok and "HF_ENDPOINT" in check.remedy
    assert closed in check.found and "secret" not in check.found
    answering = SimpleNamespace(head=lambda place, timeout: None)
    monkeypatch.setattr(huggingface_hub.utils, "get_session", lambda: answering)
    assert doctor.hub() == ("ok", f"http://***@{closed}", "")


def test_study_file_with_faults(tmp_path: Path, study_dict: dict) -> None:
    study_dict["arms"]["uniform"]["strategy"] = "unifrom"
    path = write_study(tmp_path, study_dict)
    ((name, check),) = doctor._study_checks(path).items()
    assert name == "study file" and look(check).level == "failed"
    assert "unifrom" in look(check).found and look(check).remedy == "mend the file"
    assert "no study file" in look(doctor._study_checks(tmp_path / "gone.yaml")["study file"]).found


def test_files_of_a_study(tmp_path: Path) -> None:
    def sourced(text: str) -> Check:
        return look(lambda: doctor.source(text, "data", tmp_path))

    (tmp_path / "rows.json").write_text("[]")
    assert sourced("file:rows.json").found == str(tmp_path / "rows.json")
    assert sourced("file:rows.jsn").level == "failed" and "rows.json" in sourced("file:rows.jsn").remedy
    pinned = sourced("file:rows.json#sha256=" + "0" * 64)
    assert pinned.level == "failed" and "sha256" in pinned.found
    assert sourced("pypi:dist/x.json").level == "failed"


def test_archives_of_a_study(no_pip: pytest.MonkeyPatch, closed: str, tmp_path: Path) -> None:
    def sourced() -> Check:
        return look(lambda: doctor.source("pypi:dist==1.0/data/x.json", "data", tmp_path))

    no_pip.setenv("RANKWISE_CACHE", str(tmp_path / "cache"))
    no_pip.setenv("PIP_INDEX_URL", f"http://{closed}/simple")
    assert sourced().level == "failed" and closed in sourced().found
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "dist-1.0-py3-none-any.whl").write_bytes(b"")
    no_pip.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    assert sourced().level == "ok" and "to be fetched" in sourced().found
    kept = tmp_path / "cache" / "files" / "dist-1.0" / "data" / "x.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("[]")
    assert "to be fetched" in sourced().found  # nobody has vouched for this file
    cached.note(kept, cached.digest(kept))
    assert sourced().found == "in the cache: x.json"


def test_repositories_of_a_study(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def repo_info(self: Any, repo_id: str, repo_type: str, revision: str, timeout: float) -> None:
        assert (repo_id, repo_type, timeout) == ("a/b", "model", doctor.REACH_SECONDS)
        if revision == "gone":
            raise RuntimeError("no such revision")

    def snapshot(local_files_only: bool, **wanted: Any) -> str:
        assert local_files_only
        return str(tmp_path)

    def sourced(text: str) -> Check:
        return look(lambda: doctor.source(text, "model", tmp_path))

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", repo_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert "to be fetched" in sourced("hf:a/b@main").found  # the hub's cache holds no weights
    assert sourced("hf:a/b@gone").level == "failed" and "hf auth login" in sourced("hf:a/b@gone").remedy
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert sourced("hf:a/b@gone").found == "in the hub's cache: a/b"


def test_accelerators_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if not Path("/proc/driver/nvidia/version").exists():
        assert look(doctor.accelerator).found == "no accelerator: runs use the CPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    card = SimpleNamespace(name="A100", total_memory=80e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    assert look(doctor.accelerator).found == "A100, 80 GB; A100, 80 GB; runs use the first"


@pytest.mark.parametrize(("bf16", "level"), [(250.0, "ok"), (70.0, "ok"), (50.0, "warning")])
def test_a_precision_that_is_slower_is_told(bf16: float, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "bf16_native", lambda device: True)
    monkeypatch.setattr(doctor, "_gflops", lambda d, dtype: bf16 if dtype == torch.bfloat16 else 100.0)
    check = look(doctor.matrix_products)
    assert check.level == level and f"fp32 100 GFLOP/s, bf16 {bf16:.0f} GFLOP/s" in check.found
    assert "runs use bf16" in check.found and ("train.dtype: fp32" in check.remedy) == (level == "warning")


def test_products_are_timed_in_their_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(x: torch.Tensor, w: torch.Tensor) -> None:
        assert x.dtype == w.dtype == torch.bfloat16
        time.sleep(0.05)

    monkeypatch.setattr(torch.nn.functional, "linear", slow)
    assert 0.5 < doctor._gflops("cpu", torch.bfloat16) / (2 * 2048 * 576 * 1536 / 0.05 / 1e9) <= 1.0


def test_folders_have_room_and_can_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def levels(path: Path) -> str:
        return look(lambda: doctor.folder(path, "choose another")).level

    free = SimpleNamespace(free=3e9)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: free)
    assert levels(tmp_path) == levels(tmp_path / "new" / "deep") == "ok"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    assert levels(tmp_path / "link" / "below") == "failed"
    free.free = 1.9e9
    assert levels(tmp_path) == "warning"
    free.free = 0.19e9
    assert levels(tmp_path) == "failed"


@pytest.mark.parametrize("fault", [PermissionError(13, "not allowed"), NotImplementedError("no flock")])
def test_folders_that_refuse_fail(fault: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise fault

    monkeypatch.setattr(doctor, "FileLock", refuse)
    check = look(lambda: doctor.folder(tmp_path, "choose another"))
    assert check.level == "failed" and check.remedy == "choose another"
    assert check.found == f"{tmp_path} cannot be written: {fault.args[-1]}" and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", list(doctor.VECTORS))
def test_a_formula_that_changed_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = STRATEGIES[name]

    def changed(inventory: Any, probe: Any, options: Any) -> dict[str, Any]:
        values = dict(one.function(inventory, probe, options))
        values[inventory.names[-1]] += 1
        return values

    monkeypatch.setitem(STRATEGIES, name, dataclasses.replace(one, function=changed))
    check = look(doctor.strategies)
    assert check.level == "failed" and check.found.startswith(
        f"1 differ: {name}: transformer.h.23.mlp.c_proj"
    )
    assert "reinstall" in check.remedy


@pytest.mark.parametrize("name", list(doctor.COUNTS))
def test_a_count_that_changed_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert look(doctor.strategies).level == "ok"
    monkeypatch.setitem(doctor.COUNTS, name, doctor.COUNTS[name] + 1)
    assert look(doctor.strategies).found.startswith(f"1 differ: {name}: {doctor.COUNTS[name] - 1:,} param")


def test_vectors_are_the_earlier_studys() -> None:
    assert doctor.DECAY == tuple(16 + -12 * i // 23 for i in range(24))
    assert len(doctor.EMPIRICAL) == 24 and sum(doctor.EMPIRICAL) == 7 * 9 + 10 * 19 + 7 * 16


def changing(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spoil one step of the round trip."""
    real_save, real_detach = adapters.save, adapters.detach

    @torch.no_grad()
    def save(adapted: Any, folder: Path) -> int:
        *_, last = (p for p in adapted.parameters() if p.requires_grad)
        last.mul_(1.5)
        size = real_save(adapted, folder)
        last.div_(1.5)
        return size

    @torch.no_grad()
    def detach(adapted: Any) -> Any:
        base = real_detach(adapted)
        base.lm_head.weight[0, 0] += 1e-4
        return base

    spoiled = {"adapter": (adapters, "save", save), "base": (adapters, "detach", detach)}
    spoiled["nothing"] = (train, "train_adapters", lambda *args, **options: None)
    monkeypatch.setattr(*spoiled[what])


@pytest.mark.parametrize("what", ["adapter", "base", "nothing"])
def test_a_spoiled_round_trip_fails(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changing(what, monkeypatch)
    check = look(doctor.training)
    assert check.level == "failed" and "peft" in check.remedy
    numbers = re.search(r"within (\S+); moved by (\S+), (\d+) base tensors", check.found)
    assert numbers
    gap, moved, changed = map(float, numbers.groups())
    wrong = {"adapter": gap > 1e-5, "base": changed == 1, "nothing": moved < 1e-3}
    assert [name for name, fault in wrong.items() if fault] == [what]
