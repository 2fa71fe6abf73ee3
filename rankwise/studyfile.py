"""Reading a study file: YAML with the line of every key, so that each fault names its place."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rankwise.config import Fault, StudyConfig
from rankwise.errors import RankwiseError, did_you_mean, one_of, visible
from rankwise.sources import parse
from rankwise.studyfaults import KeyPath, check, gather

GIVEN = 0
"""Stands for a line where `--set` gave the value."""


@dataclass(frozen=True)
class StudyFile:
    """A study as read: the configuration, and the line of every key for messages about it."""

    path: Path
    config: StudyConfig
    lines: dict[KeyPath, int]

    def refuse(self, faults: list[Fault]) -> None:
        """Raise one error for all these faults, if there are any."""
        if faults:
            raise faults_error(self.path, self.lines, faults)

    @contextmanager
    def at(self, *path: str | int) -> Iterator[None]:
        """Put the file's line before what goes wrong because of this key."""
        faults: list[Fault] = []
        with gather(faults, *path):
            yield
        self.refuse(faults)

    def need_arm(self, name: str) -> None:
        """Raise unless the study has an arm of this name, which came from the command line."""
        if name not in self.config.arms:
            raise RankwiseError(one_of("--arm", name, self.config.arms))


def read_study(path: str | Path, overrides: tuple[str, ...] = ()) -> StudyFile:
    """Read, check and freeze a study file: everything that needs neither its model nor its data.

    Args:
        path: of the YAML file.
        overrides: dotted `key=value` texts, which replace what the file says.

    Raises:
        RankwiseError: all faults of the file at once, each with its line.
    """
    path = Path(path)
    tree, lines, faults = _read_yaml(path)
    for text in overrides:
        key = _override(tree, text)
        lines = {k: v for k, v in lines.items() if k[: len(key)] != key} | {key: GIVEN}
    _inline_rank_files(tree, path.parent, faults)
    _check_sources(tree, path.parent, faults)
    config, found = check(tree)
    if config is None or found or faults:
        raise faults_error(path, lines, faults + found)
    return StudyFile(path, config, lines)


def faults_error(path: Path, lines: dict[KeyPath, int], faults: list[Fault]) -> RankwiseError:
    """Return one error that lists every fault as `file:line: key: rule`, in the file's order."""
    rows = sorted({(_line(lines, f.path), ".".join(map(str, f.path)), f.message) for f in faults})
    text = []
    for line, key, message in rows:
        place = "--set" if line == GIVEN else f"{path}:{line}:"
        text.append(visible(f"{place} {key + ': ' if key else ''}{message}"))
    head = [f"{len(rows)} faults in {path}"] if len(rows) > 1 else []
    return RankwiseError("\n  ".join(head + text))


def _line(lines: dict[KeyPath, int], path: KeyPath) -> int:
    """Return the line of a key path, or of its nearest ancestor, or the first."""
    return next((lines[path[:end]] for end in range(len(path), 0, -1) if path[:end] in lines), 1)


class _Loader(yaml.SafeLoader):
    """YAML's safe loader; keys are text as they are written, so that an arm may be called 8 or yes."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping with its merges (`<<`) resolved."""
        if isinstance(node, yaml.MappingNode):
            self.flatten_mapping(node)
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode):
                    key.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep)

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """Return a value; one that only looks like a date or a number keeps its line in the error."""
        try:
            return super().construct_object(node, deep)
        except ValueError as error:
            problem = f"{error}; quotes make it text"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[KeyPath, int], list[Fault]]:
    """Return the file's mapping, the line of each key path, and a fault for each key that stands twice."""
    text = _text(path)
    lines: dict[KeyPath, int] = {}
    faults: list[Fault] = []
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            found = "it is empty" if node is None else "this one holds something else"
            raise RankwiseError(
                f"{path}:1: a study file is a mapping of keys (name, model, data, train, arms, ...) to "
                f"values; {found}. `rankwise study schema` prints the keys."
            )
        _find_lines(node, (), lines, faults, set())
        return loader.construct_document(node), lines, faults
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RankwiseError(f"{path}:{line}: not text: it holds {chr(int(error.character))!r}.") from None
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise RankwiseError(f"{where}: not valid YAML: {problem or str(error).splitlines()[0]}.") from None
    except RecursionError:
        raise RankwiseError(f"{path}: nested too deep, or within itself, to be a study file.") from None


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        near = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise RankwiseError(f"no study file at {path}.{did_you_mean(path.name, near)}") from None
    except IsADirectoryError:
        raise RankwiseError(f"a study is a YAML file; {path} is a folder.") from None
    except (OSError, ValueError) as error:
        raise RankwiseError(f"the study file {path} cannot be read: {error}.") from None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RankwiseError(
            f"{path}:{line}: a study is a YAML file in UTF-8; byte {error.start} is not text."
        ) from None


def _find_lines(
    node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], faults: list[Fault], seen: set[int]
) -> None:
    """Fill in the line of every key path below a node; what an alias repeats is looked at once."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            here = (*path, key.value)
            if here in lines and key.value != "<<":
                line = key.start_mark.line + 1
                faults.append(Fault(here, f"this key stands twice, again on line {line}; keep one of them."))
                continue
            lines[here] = key.start_mark.line + 1
            _find_lines(value, here, lines, faults, seen)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*path, index)] = value.start_mark.line + 1
            _find_lines(value, (*path, index), lines, faults, seen)


def _override(tree: dict[str, Any], text: str) -> KeyPath:
    """Apply one `--set a.b=value` in place and return its key path; the value is read as YAML."""
    key, equals, value = text.partition("=")
    parts = tuple(key.strip().split("."))
    if not equals or not all(parts):
        raise RankwiseError(f"--set takes key=value, such as data.train=100; got {text!r}.")
    parsed = yaml_value(f"--set {key}", value)
    for part in parts[:-1]:
        inner = tree.setdefault(part, {})
        if not isinstance(inner, dict):
            raise RankwiseError(f"--set {key}: {part!r} is not a group of keys; it is {inner!r:.60}.")
        tree = inner
    tree[parts[-1]] = parsed
    return parts


def yaml_value(what: str, text: str) -> Any:
    """Return a value that was given on the command line, read as YAML."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError):
        raise RankwiseError(f"{what}: the value {text!r} is not valid YAML; quotes may be missing.") from None


def _check_sources(tree: dict[str, Any], folder: Path, faults: list[Fault]) -> None:
    """Note sources of a form that is none; whether they can be had is seen when they are fetched."""
    data = tree.get("data")
    measure = tree.get("measure")
    inner = data.get("source") if isinstance(data, dict) else None
    general = measure.get("general_text") if isinstance(measure, dict) else None
    named = {("model",): tree.get("model"), ("data", "source"): inner, ("measure", "general_text"): general}
    for path, text in named.items():
        if isinstance(text, str):
            with gather(faults, *path):
                parse(text, folder)


def _inline_rank_files(tree: dict[str, Any], folder: Path, faults: list[Fault]) -> None:
    """Replace `ranks: file.json` by the file's content, so that a run's name covers its ranks."""
    arms = tree.get("arms")
    for name, arm in arms.items() if isinstance(arms, dict) else ():
        if isinstance(arm, dict) and isinstance(arm.get("ranks"), str):
            with gather(faults, "arms", name, "ranks"):
                arm["ranks"] = read_ranks(folder / arm["ranks"])


def read_ranks(path: Path) -> Any:
    """Return the JSON content of a custom rank file: ranks by layer, kind or module, or a list by layer.

    Raises:
        RankwiseError: no such file, not JSON, or neither a mapping nor a list.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RankwiseError(f"the rank file {path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        why = "nested too deep" if isinstance(error, RecursionError) else error
        raise RankwiseError(f"the rank file {path} is not JSON: {why}.") from None
    if not isinstance(found, dict | list):
        raise RankwiseError(
            f"the rank file {path} must hold a mapping or a list of ranks; got {found!r:.60}."
        )
    return found
