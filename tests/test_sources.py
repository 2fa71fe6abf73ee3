"""Sources: what a person would miss if it broke. The index here is a small server on 127.0.0.1."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import multiprocessing
import os
import tarfile
import threading
import time
import zipfile
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from rankwise import cached, downloads, sources
from rankwise.errors import RankwiseError
from rankwise.sources import fetch, parse

ROWS = b'[{"instruction": "say hello"}]' + bytes(range(256)) * 4000  # 1 MB, so that a break falls inside it
PIN = hashlib.sha256(ROWS).hexdigest()
ALPACA = "pypi:llamafactory==0.9.5/data/alpaca_en_demo.json#sha256=" + (
    "bcc37c64db1a739a0789a1b81f251146fcf4459f903474bc9e3c21bbb5628318"
)


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def wheel(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        for name, content in members.items():
            packed.writestr(name, content)
    return buffer.getvalue()


def sdist(members: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as tape:
        for name, content in members.items():
            item = tarfile.TarInfo(name)
            item.size = len(content)
            tape.addfile(item, io.BytesIO(content))
        for name, target in (links or {}).items():
            item = tarfile.TarInfo(name)
            item.type, item.linkname = tarfile.SYMTYPE, target
            tape.addfile(item)
    return buffer.getvalue()


WHEEL = "toy_rows-1.0-py3-none-any.whl"
SDIST = "toy_rows-1.0.tar.gz"


class Mirror:
    """A package index that can break off, forget Range, ask for a login, or lie about a hash."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, str | None]] = []  # (path, Range)
        self.break_after: int | None = None  # bytes of the first file download, then the line drops
        self.resumable, self.as_json, self.delay = True, True, 0.0
        self.login: str | None = None
        self.stated: dict[str, str] = {}  # hashes that the index states, where they are lies
        mirror = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                mirror.answer(self)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=partial(self.server.serve_forever, 0.01), daemon=True).start()
        self.host = f"127.0.0.1:{self.server.server_port}"
        self.url = f"http://{self.host}/simple"

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        self.asked.append((request.path, request.headers.get("Range")))
        if self.login and request.headers.get("Authorization") != self.login:
            return request.send_error(401)
        if request.path.startswith("/files/"):
            return self.send_file(request, self.files[request.path.removeprefix("/files/")])
        if request.path != "/simple/toy-rows/":
            return request.send_error(404)
        stated = {name: self.stated.get(name, sha(content)) for name, content in self.files.items()}
        if self.as_json:
            files = [
                {"filename": name, "url": f"http://{self.host}/files/{name}", "hashes": {"sha256": digest}}
                for name, digest in stated.items()
            ]
            kind, page = "application/vnd.pypi.simple.v1+json", json.dumps({"files": files})
        else:
            anchors = [f'<a href="../../files/{name}#sha256={stated[name]}">{name}</a>' for name in stated]
            kind, page = "text/html", "<html><body>" + "\n".join(anchors)
        request.send_response(200)
        request.send_header("Content-Type", kind)
        request.end_headers()
        request.wfile.write(page.encode())

    def send_file(self, request: BaseHTTPRequestHandler, content: bytes) -> None:
        time.sleep(self.delay)
        wanted = request.headers.get("Range")
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.resumable else 0
        if wanted and self.resumable and start >= len(content):
            return request.send_error(416)
        request.send_response(206 if start else 200)
        request.send_header("Content-Length", str(len(content) - start))
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        request.end_headers()
        stop, self.break_after = self.break_after, None
        request.wfile.write(content[start:] if stop is None else content[start : start + stop])

    def downloads(self) -> list[tuple[str, str | None]]:
        return [(path.removeprefix("/files/"), wanted) for path, wanted in self.asked if "/files/" in path]


@pytest.fixture
def mirror():
    server = Mirror()
    yield server
    server.server.shutdown()
    server.server.server_close()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("RANKWISE_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    return cache


@pytest.fixture
def pip(monkeypatch, mirror):
    """Pip configured with the mirror alone; returns a function that sets further PIP_ variables."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)

    def configure(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(f"PIP_{name}", value)

    configure(INDEX_URL=mirror.url)
    return configure


def get(text: str, kind: str = "data", **more: object) -> Path:
    return fetch(text, kind=kind, progress=False, **more).path  # type: ignore[arg-type]


def leftovers(cache: Path) -> list[str]:
    kept = [p for folder in ("files", "downloads") for p in (cache / folder).rglob("*") if p.is_file()]
    return sorted(p.name for p in kept)


# --- parse -----------------------------------------------------------------------------------------


def test_parse_reads_every_form(tmp_path):
    found = parse("hf:org/some.name@refs%2Fpr%2F1/data/a b.json#sha256=" + "AB" * 32)
    assert (found.scheme, found.name, found.version) == ("hf", "org/some.name", "refs/pr/1")
    assert (found.path, found.sha256) == ("data/a b.json", "ab" * 32)
    assert parse("hf:org/name").version is None and parse("hf:org/name").path is None
    found = parse("pypi:Toy_Rows==1.0.0post1/data/rows.json")
    assert (found.name, found.version, found.path) == ("toy-rows", "1.0.0.post1", "data/rows.json")
    assert parse("file:rows#1.json", tmp_path / "study").path == str(tmp_path / "study" / "rows#1.json")
    assert parse(f"file://{tmp_path}/a%20b").path == str(tmp_path / "a b")


def test_a_relative_path_is_the_study_files_neighbour_before_the_working_directory(tmp_path):
    (tmp_path / "study").mkdir()
    (tmp_path / "rows.json").write_text("cwd")
    assert get("rows.json", relative_to=tmp_path / "study").read_text() == "cwd"
    (tmp_path / "study" / "rows.json").write_text("study")
    assert get("rows.json", relative_to=tmp_path / "study").read_text() == "study"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("pip:a==1/b", "Did you mean 'pypi'"),
        ("https://host/rows.json", "Download it"),
        ("tatsu-lab/alpaca", "Did you mean 'hf:tatsu-lab/alpaca'"),
        ("toy==1.0/rows.json", "Did you mean 'pypi:toy==1.0/rows.json'"),
        ("pypi:toy/rows.json", "exact version is required"),
        ("pypi:toy==1.*/rows.json", "not an exact version"),
        ("pypi:toy==1.0", "Accepted"),
        ("pypi:toy==1.0/../../etc/passwd", "must be relative"),
        ("pypi:toy==1.0//etc/passwd", "must be relative"),
        ("hf:org/name/../../x", "must be relative"),
        ("hf:name", "Accepted"),
        ("rows.json#sha256=b179c952…", "64 hex digits"),
        ("hf:org/name#b179", "64 hex digits"),
        ("pypi:toy==1.0/rows.json#b179", "64 hex digits"),
        ("", "empty"),
    ],
)
def test_a_malformed_source_is_refused_with_what_would_do(text, says):
    with pytest.raises(RankwiseError, match="(?s)" + says.replace("*", r"\*")):
        parse(text)


# --- file ------------------------------------------------------------------------------------------


def test_a_file_is_hashed_and_a_wrong_pin_shows_both_hashes(tmp_path):
    (tmp_path / "rows.json").write_bytes(ROWS)
    assert fetch(f"rows.json#sha256={PIN.upper()}", kind="data").sha256 == PIN
    with pytest.raises(RankwiseError) as error:
        get("rows.json#sha256=" + "0" * 64)
    assert "0" * 64 in str(error.value) and PIN in str(error.value) and "Nothing was kept" in str(error.value)


def test_a_changed_file_is_hashed_again_even_if_its_size_and_time_are_forged(tmp_path):
    rows = tmp_path / "rows.json"
    rows.write_bytes(b"one")
    before = rows.stat()
    assert fetch("rows.json", kind="data").sha256 == sha(b"one")
    rows.write_bytes(b"two")
    os.utime(rows, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert fetch("rows.json", kind="data").sha256 == sha(b"two")


def test_an_unchanged_file_is_not_read_again(tmp_path, monkeypatch):
    (tmp_path / "rows.json").write_bytes(ROWS)
    get("rows.json")
    monkeypatch.setattr(cached, "digest", lambda path: pytest.fail("read again"))
    assert fetch("rows.json", kind="data").sha256 == PIN


def test_a_model_folder_is_known_by_its_content_not_its_place_or_times(tmp_path):
    hashes = []
    for name in ("one", "two", "three", "four"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / f"{'renamed' if name == 'four' else 'config'}.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_text("other" if name == "three" else "same")
        hashes.append(fetch(f"./{name}", kind="model").sha256)
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3


def test_a_missing_file_or_the_wrong_kind_of_path_is_named(tmp_path):
    (tmp_path / "rows.json").write_text("[]")
    (tmp_path / "folder").mkdir()
    for text, kind, says in [
        ("file:row.json", "data", "Did you mean 'rows.json'"),
        ("file:gone/row.json", "data", "nor is its folder"),
        ("file:folder", "data", "is a folder"),
        ("file:rows.json/", "data", "is not a folder"),
        ("file:rows.json", "model", "one .gguf file"),
        ("file:folder", "model", "holds no files"),
    ]:
        with pytest.raises(RankwiseError, match=says):
            get(text, kind)


# --- pypi ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_json", [True, False])
def test_the_pure_wheel_is_preferred_and_the_sdist_is_the_fallback(mirror, pip, own_cache, as_json):
    mirror.as_json = as_json
    mirror.files = {
        "toy_rows-1.0-cp311-cp311-win_amd64.whl": wheel({"data/rows.json": b"platform"}),
        SDIST: sdist({"toy-rows-1.0/data/rows.json": b"sdist", "toy-rows-1.0/data/more.json": b"more"}),
        WHEEL: wheel({"data/rows.json": b"wheel"}),
        "toy_rows-2.0-py3-none-any.whl": wheel({"data/rows.json": b"newer"}),
    }
    assert get("pypi:toy-rows==1.0/data/rows.json").read_bytes() == b"wheel"
    assert mirror.downloads() == [(WHEEL, None)]
    assert get("pypi:Toy.Rows==1.0/data/more.json").read_bytes() == b"more"
    assert mirror.downloads() == [(WHEEL, None), (SDIST, None)]  # the small wheel was kept
    asked = len(mirror.asked)
    assert get("pypi:toy-rows==1.0/data/more.json").read_bytes() == b"more"
    assert len(mirror.asked) == asked  # from the cache, without a question


def test_nothing_of_an_sdist_is_run(mirror, pip, tmp_path):
    harm = f"open({str(tmp_path / 'ran')!r}, 'w')".encode()
    mirror.files = {SDIST: sdist({"toy-rows-1.0/setup.py": harm, "toy-rows-1.0/rows.json": ROWS})}
    assert get("pypi:toy-rows==1.0/rows.json").read_bytes() == ROWS
    assert not (tmp_path / "ran").exists()


def test_a_broken_download_goes_on_where_it_stopped(mirror, pip, own_cache):
    mirror.files = {WHEEL: wheel({"rows.json": ROWS})}
    mirror.break_after = 300_000
    assert get(f"pypi:toy-rows==1.0/rows.json#sha256={PIN}").read_bytes() == ROWS
    (_, first), (_, second) = mirror.downloads()
    assert first is None and second is not None and 0 < int(second[6:-1]) <= 300_000
    assert leftovers(own_cache) == ["rows.json", WHEEL]


@pytest.mark.parametrize("resumable", [True, False])
@pytest.mark.parametrize("stale", [False, True])
def test_what_an_earlier_process_left_is_used_if_it_fits_and_thrown_away_if_not(
    mirror, pip, own_cache, resumable, stale
):
    mirror.files = {WHEEL: wheel({"rows.json": ROWS})}
    mirror.resumable = resumable
    (own_cache / "downloads").mkdir(parents=True)
    part = b"x" * 1000 if stale else mirror.files[WHEEL][:1000]
    (own_cache / "downloads" / (WHEEL + ".part")).write_bytes(part)
    assert get("pypi:toy-rows==1.0/rows.json").read_bytes() == ROWS
    again = [(WHEEL, None)] if stale and resumable else []
    assert mirror.downloads() == [(WHEEL, "bytes=1000-"), *again]


def test_a_whole_part_is_not_downloaded_again(mirror, pip, own_cache):
    mirror.files = {WHEEL: wheel({"rows.json": ROWS})}
    (own_cache / "downloads").mkdir(parents=True)
    (own_cache / "downloads" / (WHEEL + ".part")).write_bytes(mirror.files[WHEEL])
    assert get("pypi:toy-rows==1.0/rows.json").read_bytes() == ROWS
    assert [wanted for _, wanted in mirror.downloads()] == [f"bytes={len(mirror.files[WHEEL])}-"]


def test_a_file_that_is_not_the_pinned_one_is_not_kept(mirror, pip, own_cache):
    mirror.files = {WHEEL: wheel({"rows.json": b"changed"})}
    with pytest.raises(RankwiseError) as error:
        get(f"pypi:toy-rows==1.0/rows.json#sha256={PIN}")
    assert PIN in str(error.value) and sha(b"changed") in str(error.value)
    assert leftovers(own_cache) == []


def test_an_archive_that_is_not_the_one_the_index_promised_is_not_opened(mirror, pip, own_cache):
    mirror.files, mirror.stated = {WHEEL: wheel({"rows.json": ROWS})}, {WHEEL: "0" * 64}
    with pytest.raises(RankwiseError, match=r"0{64}"):
        get(f"pypi:toy-rows==1.0/rows.json#sha256={PIN}")
    assert leftovers(own_cache) == [] and len(mirror.downloads()) == 1


@pytest.mark.parametrize("pin", ["", f"#sha256={PIN}"])
def test_a_damaged_copy_in_the_cache_is_fetched_again(mirror, pip, pin):
    mirror.files = {WHEEL: wheel({"rows.json": ROWS})}
    path = get("pypi:toy-rows==1.0/rows.json" + pin)
    path.write_bytes(b"damage")
    assert get("pypi:toy-rows==1.0/rows.json" + pin).read_bytes() == ROWS


def test_a_large_archive_goes_once_its_member_is_out(mirror, pip, own_cache, monkeypatch):
    mirror.files = {WHEEL: wheel({"rows.json": ROWS})}
    monkeypatch.setattr(sources, "KEEP_ARCHIVE", 1_000_000)
    get("pypi:toy-rows==1.0/rows.json")
    assert leftovers(own_cache) == ["rows.json"]


def fetch_in_a_process(queue) -> None:
    queue.put(str(get(f"pypi:toy-rows==1.0/rows.json#sha256={PIN}")))


def test_two_processes_at_once_download_once(mirror, pip):
    mirror.files, mirror.delay = {WHEEL: wheel({"rows.json": ROWS})}, 0.5
    fork = multiprocessing.get_context("fork")  # the mirror lives in a thread of this process
    queue = fork.Queue()
    workers = [fork.Process(target=fetch_in_a_process, args=(queue,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    paths = {queue.get(timeout=20) for _ in workers}
    for worker in workers:
        worker.join()
    assert len(paths) == 1 and Path(paths.pop()).read_bytes() == ROWS
    assert len(mirror.downloads()) == 1


@pytest.mark.parametrize("where", ["folder", "url", "index"])
def test_a_local_folder_serves_without_a_network(mirror, pip, tmp_path, own_cache, where):
    shop = tmp_path / "shop" / "toy-rows"
    shop.mkdir(parents=True)
    content = wheel({"rows.json": ROWS})
    (shop / WHEEL).write_bytes(content)
    (shop / "index.html").write_text(f"<a href='{WHEEL}#sha256={sha(content)}'>{WHEEL}</a>")
    if where == "index":
        pip(EXTRA_INDEX_URL=f"{shop.parent.as_uri()} file:///nowhere/simple")
    else:
        pip(FIND_LINKS=f"/nowhere {shop if where == 'folder' else shop.as_uri()}")
    assert get("pypi:toy-rows==1.0/rows.json").read_bytes() == ROWS
    assert mirror.asked == [] and (shop / WHEEL).exists()
    assert leftovers(own_cache) == ["rows.json"]  # the person's own archive is read where it lies


def test_settings_in_pips_file_are_honoured(mirror, pip, tmp_path, monkeypatch):
    mirror.files = {WHEEL: wheel({"rows.json": ROWS})}
    (tmp_path / "pip.conf").write_text(f"[global]\nindex-url = {mirror.url}\nfind-links =\n  /a\n  /b\n")
    monkeypatch.delenv("PIP_INDEX_URL")
    pip(CONFIG_FILE=str(tmp_path / "pip.conf"), QUIET="3")
    (tmp_path / "pip.py").write_text("raise SystemExit('not the real pip')")  # in the working directory
    assert get("pypi:toy-rows==1.0/rows.json").read_bytes() == ROWS


def test_credentials_reach_the_index_and_its_files_but_no_message(mirror, pip):
    mirror.files = {WHEEL: wheel({"rows.json": ROWS})}
    mirror.login = "Basic dXNlcjpzZWNyZXQ="  # user:secret
    pip(INDEX_URL=f"http://user:wrong@{mirror.host}/simple?token=hidden")
    with pytest.raises(RankwiseError, match="401") as error:
        get("pypi:toy-rows==1.0/rows.json")
    assert (
        "wrong" not in str(error.value) and "hidden" not in str(error.value) and "***@127" in str(error.value)
    )
    pip(INDEX_URL=f"http://user:secret@{mirror.host}/simple")
    assert get("pypi:toy-rows==1.0/rows.json").read_bytes() == ROWS


def test_no_network_names_the_index_and_the_other_ways(mirror, pip):
    pip(INDEX_URL="http://127.0.0.1:9/simple")
    with pytest.raises(RankwiseError) as error:
        get("pypi:toy-rows==1.0/rows.json")
    for part in ("http://127.0.0.1:9/simple", "PIP_INDEX_URL", "PIP_FIND_LINKS", "file:"):
        assert part in str(error.value)
    pip(NO_INDEX="1")
    with pytest.raises(RankwiseError, match="No package index is configured"):
        get("pypi:toy-rows==1.0/rows.json")


def test_offline_the_cache_serves_members_and_kept_archives(mirror, pip, own_cache):
    mirror.files = {SDIST: sdist({"t/a.json": b"a", "t/b.json": b"b", "t/c.json": b"c"})}
    get("pypi:toy-rows==1.0/a.json")
    pip(INDEX_URL="http://127.0.0.1:9/simple")
    assert get("pypi:toy-rows==1.0/a.json").read_bytes() == b"a"
    assert get("pypi:toy-rows==1.0/b.json").read_bytes() == b"b"
    with (own_cache / "downloads" / SDIST).open("ab") as archive:
        archive.write(b"tampered")
    with pytest.raises(RankwiseError, match="Could not reach"):
        get("pypi:toy-rows==1.0/c.json")


def test_what_is_not_there_is_answered_with_what_is_near(mirror, pip):
    members = {"data/alpaca_en_demo.json": b"", "data/alpaca_zh_demo.json": b"", "other/x.bin": b""}
    mirror.files = {WHEEL: wheel(members), "toy_rows-1.1.tar.gz": sdist({})}
    for text, says in [
        ("pypi:toy-rows==1.0/data/alpaca_en.json", "Did you mean 'data/alpaca_en_demo.json'"),
        ("pypi:toy-rows==1.0/alpaca_zh_demo.json", "Did you mean 'data/alpaca_zh_demo.json'"),
        ("pypi:toy-rows==1.0/data", "is a folder.*data/alpaca_en_demo.json"),
        ("pypi:toy-rows==1.2/rows.json", "1.0, 1.1"),
        ("pypi:toy-row==1.0/rows.json", "no distribution 'toy-row'"),
    ]:
        with pytest.raises(RankwiseError, match=says):
            get(text)


def test_links_and_pickles_are_refused_and_members_stay_in_the_cache(mirror, pip, tmp_path, own_cache):
    members = {"t/../../../escaped": b"out", "/absolute": b"out", "t/ok.json": b"ok", "t/w.pt": b"pickle"}
    mirror.files = {SDIST: sdist(members, links={"t/rows.json": "/etc/passwd"})}
    assert get("pypi:toy-rows==1.0/ok.json").read_bytes() == b"ok"
    assert not list(tmp_path.rglob("escaped")) and not Path("/absolute").exists()
    for text, says in [
        ("rows.json", "is a link"),
        ("../escaped", "must be relative"),
        ("w.pt", "may run code"),
    ]:
        with pytest.raises(RankwiseError, match=says):
            get(f"pypi:toy-rows==1.0/{text}")


def test_an_index_elsewhere_cannot_point_at_files_on_this_disk(mirror, pip, tmp_path):
    (tmp_path / WHEEL).write_bytes(wheel({"rows.json": b"private"}))
    mirror.as_json, mirror.files = False, {WHEEL: b""}
    mirror.answer = lambda request: (  # type: ignore[method-assign]
        request.send_response(200),
        request.send_header("Content-Type", "text/html"),
        request.end_headers(),
        request.wfile.write(f"<a href='{(tmp_path / WHEEL).as_uri()}'>x</a>".encode()),
    )
    with pytest.raises(RankwiseError, match="no distribution"):
        get("pypi:toy-rows==1.0/rows.json")


def test_a_damaged_archive_is_said_to_be_damaged(mirror, pip, own_cache):
    for name, content in [(WHEEL, b"PK no zip"), (SDIST, sdist({"t/rows.json": ROWS})[:-30_000])]:
        mirror.files = {name: content}
        with pytest.raises(RankwiseError, match="is damaged"):
            get("pypi:toy-rows==1.0/rows.json")
        assert leftovers(own_cache) == []


def test_a_cache_that_cannot_be_written_names_the_remedy(mirror, pip, own_cache):
    mirror.files = {WHEEL: wheel({"rows.json": ROWS})}
    own_cache.write_text("a file where the folder should be")
    with pytest.raises(RankwiseError, match="RANKWISE_CACHE"):
        get("pypi:toy-rows==1.0/rows.json")


def test_a_full_disk_is_said_to_be_full(mirror, pip, own_cache, monkeypatch):
    mirror.files = {WHEEL: wheel({"rows.json": ROWS})}

    def full(source, target, length=0):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(downloads.shutil, "copyfileobj", full)
    with pytest.raises(RankwiseError, match=r"disk is full.*RANKWISE_CACHE"):
        get("pypi:toy-rows==1.0/rows.json")
    assert leftovers(own_cache) == [WHEEL]


def test_a_download_is_announced_in_one_plain_line(mirror, pip, capfd):
    mirror.files = {WHEEL: wheel({"rows.json": ROWS})}
    fetch("pypi:toy-rows==1.0/rows.json", kind="data")
    out, err = capfd.readouterr()
    assert out == "" and err == f"fetching {WHEEL} (1.02 MB)\n"


# --- hub -------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub's cache with no network behind it; returns a function that puts a repository into it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def put(folder: str, files: list[str]) -> None:
        root = tmp_path / "hub" / folder
        (root / "refs").mkdir(parents=True)
        (root / "refs" / "main").write_text("c0ffee")
        for name in files:
            path = root / "snapshots" / "c0ffee" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)

    return put


def test_a_cached_hub_model_works_offline_and_a_pickled_one_is_refused(hub):
    hub("models--org--good", ["config.json", "model.safetensors"])
    hub("models--org--old", ["config.json", "pytorch_model.bin"])
    found = fetch("hf:org/good", kind="model")
    assert found.sha256 == "hf-commit:c0ffee" and (found.path / "model.safetensors").is_file()
    with pytest.raises(RankwiseError, match="no safetensors"):
        get("hf:org/old", "model")
    with pytest.raises(RankwiseError, match="may run code"):
        get("hf:org/old/pytorch_model.bin", "model")
    with pytest.raises(RankwiseError, match="HF_ENDPOINT"):
        get("hf:org/good", "data")  # as a dataset it is another repository


def test_a_file_in_a_hub_dataset_is_hashed_and_pinned(hub):
    hub("datasets--org--rows", ["data/train.json"])
    pin = sha(b"data/train.json")
    assert fetch(f"hf:org/rows@main/data/train.json#sha256={pin}", kind="data").sha256 == pin
    with pytest.raises(RankwiseError, match=r"0{64}"):
        get("hf:org/rows/data/train.json#sha256=" + "0" * 64)
    with pytest.raises(RankwiseError, match=r"holds no data/test.json"):
        get("hf:org/rows/data/test.json")


def test_a_pin_on_a_hub_folder_ignores_files_that_were_not_asked_for(hub, tmp_path):
    hub("models--org--good", ["config.json", "model.safetensors"])
    with pytest.raises(RankwiseError) as error:
        get("hf:org/good#sha256=" + "0" * 64, "model")
    pin = str(error.value).partition("actual ")[2][:64]
    (tmp_path / "hub/models--org--good/snapshots/c0ffee/pytorch_model.bin").write_text(
        "fetched by another program"
    )
    assert fetch(f"hf:org/good#sha256={pin}", kind="model").sha256 == pin


# --- the real thing --------------------------------------------------------------------------------


@pytest.mark.network
def test_the_alpaca_rows_come_out_of_the_real_sdist_with_their_licence_notice(capfd):
    rows = json.loads(get(ALPACA).read_text())
    assert len(rows) == 999 and set(rows[0]) >= {"instruction", "input", "output"}
    assert "non-commercial" in capfd.readouterr().err
    get(ALPACA)
    assert "non-commercial" not in capfd.readouterr().err
