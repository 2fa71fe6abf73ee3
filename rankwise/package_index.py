"""Which archives of a distribution the package indexes list, asked as pip is configured.

It reads pip's settings (indexes, find-links, certificates, proxy, credentials) and the pages that they
lead to; what cannot be reached is kept for the message, without credentials.
"""

from __future__ import annotations

import ast
import functools
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit
from urllib.request import url2pathname

import requests
import urllib3
from packaging.utils import parse_sdist_filename, parse_wheel_filename
from packaging.version import Version

from rankwise.errors import RankwiseError

TIMEOUT = (10, 60)  # seconds to connect, and between two pieces
_ARCHIVE = (".whl", ".tar.gz", ".zip")


@dataclass(frozen=True)
class Link:
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
    listing = subprocess.run(command, capture_output=True, text=True, check=False, env=loud).stdout
    settings: dict[str, str] = {}
    for section in ("global", "install", "download"):
        for key, value in re.findall(rf"^{section}\.([\w-]+)=(.*)$", listing, re.MULTILINE):
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


class Index:
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
        """Return (location, whether it is an index or else find-links).

        Raises:
            RankwiseError: there is none.
        """
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

    def links(self, places: list[tuple[str, bool]], name: str, version: str) -> list[Link]:
        """Return the version's archives in these places, pure wheels first, one place per file name."""
        found: dict[str, Link] = {}
        for place, is_index in places:
            try:
                entries = self._entries(place, is_index, name)
            except (OSError, ValueError, LookupError, AttributeError) as exc:  # not an index page
                self.unreachable.append(f"{shown(place)} ({reason(exc)})")
                continue
            for url, filename, sha in entries:
                if link := as_link(name, url, filename, sha):
                    self.versions.add(link.version)
                    if link.version == Version(version):
                        found.setdefault(link.filename, link)
        return sorted(found.values(), key=lambda link: (link.rank, link.filename))

    def _entries(self, place: str, is_index: bool, name: str) -> list[tuple[str, str, str | None]]:
        """Return (url, file name, sha256) of all that one place lists for the distribution."""
        local = as_path(place)
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
        return [(_with_login(url, place), name, sha) for url, name, sha in entries if as_path(url) is None]


def _default_index() -> str | None:
    try:
        from pip._internal.models.index import PyPI
    except ImportError:
        return None
    return str(PyPI.simple_url)


def as_path(place: str) -> Path | None:
    """Return the path of a place on this disk, or None if the place is elsewhere."""
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


def as_link(name: str, url: str, filename: str, sha: str | None) -> Link | None:
    """Return the archive that a file name stands for, or None if it is no archive of this distribution."""
    # requires-python is not looked at: nothing will be installed
    try:
        if filename.endswith(".whl"):
            found, version, _, tags = parse_wheel_filename(filename)
            rank = 0 if all(tag.abi == "none" and tag.platform == "any" for tag in tags) else 2
        else:
            (found, version), rank = parse_sdist_filename(filename), 1
    except ValueError:  # not an archive's name
        return None
    return Link(filename, url, sha, version, rank) if found == name else None


def _with_login(url: str, index: str) -> str:
    """Give a link on the index's own host the index's credentials, as pip does."""
    login, at, host = urlsplit(index).netloc.rpartition("@")
    parts = urlsplit(url)
    return parts._replace(netloc=f"{login}@{host}").geturl() if at and parts.netloc == host else url


def shown(url: str) -> str:
    """Return a URL without credentials, neither before the host nor in the query."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")
    return parts._replace(netloc=("***@" if host[1] else "") + host[2], query="", fragment="").geturl()


def reason(exc: Exception) -> str:
    """Say what went wrong, never in the exception's own text, which may hold the URL with its password."""
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


def no_network(unreachable: list[str], wanted: str, more: str = "") -> RankwiseError:
    """Return the error for places that do not answer, with the other ways to get what was wanted."""
    return RankwiseError(
        f"Could not reach {', '.join(unreachable)}, to fetch {wanted}.{more} Instead: name a mirror "
        "(pip config set global.index-url URL, or PIP_INDEX_URL), put the archive into a folder and set "
        "PIP_FIND_LINKS to it, or download the file elsewhere and name it with file:path."
    )
