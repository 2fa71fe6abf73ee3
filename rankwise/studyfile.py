"""Reading a study file: YAML with the line of every key, so that each fault names its place."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from rankwise.config import (
    ArmConfig,
    DataConfig,
    Fault,
    ScaleRule,
    SeedsConfig,
    StudyConfig,
    TrainConfig,
    cross_faults,
)
from rankwise.errors import RankwiseError, did_you_mean


@dataclass(frozen=True)
class StudyFile:
    """A study as read: the configuration, and the line of every key for messages about it."""

    path: Path
    config: StudyConfig
    lines: dict[tuple[str | int, ...], int]

    def line(self, path: tuple[str | int, ...]) -> int | None:
        """Return the 1-based line of a key path, or of its nearest ancestor."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.lines:
                return self.lines[path[:end]]
        return None


def load_study(
    path: str | Path,
    overrides: tuple[str, ...] = (),
    *,
    check: Callable[[dict[str, Any]], list[Fault]] = lambda tree: [],
) -> StudyFile:
    """Read, check and freeze a study file; `overrides` are dotted `key=value` texts.

    `check` adds the faults of rooms that this one may not import (the strategies' own options).

    Raises:
        RankwiseError: all faults of the file at once, each with its line.
    """
    path = Path(path)
    tree, lines = _read_yaml(path)
    for text in overrides:
        _override(tree, text)
        key = tuple(text.partition("=")[0].strip().split("."))
        lines = {k: v for k, v in lines.items() if k[: len(key)] != key}
    tree = _inline_rank_files(tree, path.parent)
    faults = check(tree)
    try:
        config = StudyConfig.model_validate(tree)
    except ValidationError as error:
        faults += [_pydantic_fault(e, tree) for e in error.errors()]
        faults += _remaining_faults(tree, error)
        raise faults_error(path, lines, faults) from None
    study = StudyFile(path, config, lines)
    if faults := faults + cross_faults(config):
        raise faults_error(path, lines, faults)
    return study


def _remaining_faults(tree: dict[str, Any], error: ValidationError) -> list[Fault]:
    """Return the faults between fields of a file that has faults within fields, as far as can be told.

    The faulty keys are left out, so that their defaults stand in for them.
    """
    rest = copy.deepcopy(tree)
    for fault in error.errors():
        *parents, last = _clean_path(fault["loc"], tree) or ("",)
        group: Any = rest
        for part in parents:
            group = group[part] if isinstance(group, dict) else {}
        if isinstance(group, dict):
            group.pop(last, None)
    try:
        return cross_faults(StudyConfig.model_validate(rest))
    except ValidationError:
        return []  # a required key is missing: nothing can be said of its partners


def faults_error(path: Path, lines: dict[tuple[str | int, ...], int], faults: list[Fault]) -> RankwiseError:
    """Return one error that lists every fault as `file:line: key: rule`, in the file's order."""
    finder = StudyFile(path, None, lines)  # type: ignore[arg-type]
    rows = sorted({(finder.line(f.path) or 0, ".".join(str(p) for p in f.path), f.message) for f in faults})
    text = [f"{path}:{line or '?'}: {key + ': ' if key else ''}{message}" for line, key, message in rows]
    head = f"{len(rows)} fault{'s' if len(rows) > 1 else ''} in {path}"
    return RankwiseError("\n  ".join([head, *text]))


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[tuple[str | int, ...], int]]:
    """Return the file's mapping and the line of each key path."""
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        near = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise RankwiseError(f"no study file at {path}.{did_you_mean(path.name, near)}") from None
    except IsADirectoryError:
        raise RankwiseError(f"a study is a YAML file; {path} is a folder.") from None
    except UnicodeDecodeError as error:
        raise RankwiseError(f"{path} is not UTF-8 text (byte {error.start}).") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if not isinstance(node, yaml.MappingNode):
            raise RankwiseError(f"{path}: a study file is a mapping of keys to values; this one holds none.")
        lines = _lines(node, path)
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RankwiseError(f"{where}: not valid YAML: {problem}.") from None
    return tree, lines


def _lines(node: yaml.Node, file: Path, path: tuple[str | int, ...] = ()) -> dict[tuple[str | int, ...], int]:
    found: dict[tuple[str | int, ...], int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, key.value)
            line = key.start_mark.line + 1
            if here in found:
                raise RankwiseError(
                    f"{file}:{line}: the key {key.value!r} stands twice (first on line {found[here]})."
                )
            found[here] = line
            found.update(_lines(value, file, here))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            found[(*path, index)] = value.start_mark.line + 1
            found.update(_lines(value, file, (*path, index)))
    return found


def _override(tree: dict[str, Any], text: str) -> None:
    """Apply one `--set a.b=value` in place; the value is read as YAML."""
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise RankwiseError(f"--set takes key=value, such as data.train=100; got {text!r}.")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise RankwiseError(f"--set {key}: the value {value!r} is not valid YAML.") from None
    for part in parts[:-1]:
        inner = tree.setdefault(part, {})
        if not isinstance(inner, dict):
            raise RankwiseError(f"--set {key}: {part!r} is not a group of keys.")
        tree = inner
    tree[parts[-1]] = parsed


def _inline_rank_files(tree: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Replace `ranks: file.json` by the file's content, so that a run's name covers its ranks."""
    arms = tree.get("arms")
    for name, arm in arms.items() if isinstance(arms, dict) else ():
        ranks = arm.get("ranks") if isinstance(arm, dict) else None
        if isinstance(ranks, str):
            arm["ranks"] = read_ranks(folder / ranks, f"arms.{name}.ranks")
        elif isinstance(ranks, dict):
            arm["ranks"] = {str(k): v for k, v in ranks.items()}
    return tree


def read_ranks(path: Path, where: str) -> Any:
    """Return the JSON content of a custom rank file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RankwiseError(f"{where}: cannot read {path}: {error.strerror}.") from None
    except ValueError as error:
        raise RankwiseError(f"{where}: {path} is not JSON: {error}.") from None


def _pydantic_fault(error: Any, tree: dict[str, Any]) -> Fault:
    """Translate one pydantic error to our sentence: rule, value received, nearest choice."""
    path = _clean_path(error["loc"], tree)
    if error["type"] == "extra_forbidden":
        choices = _fields_at(path[:-1])
        text = f"unknown key; the keys here are {', '.join(choices)}.{did_you_mean(str(path[-1]), choices)}"
        return Fault(path, text)
    if error["type"] == "missing":
        return Fault(path, "this key is required and is missing.")
    value = repr(error.get("input"))
    value = value if len(value) <= 80 else value[:77] + "..."
    rule = error["msg"].removeprefix("Value error, ")
    hint = ""
    if error["type"] == "literal_error":
        choices = re.findall(r"'([^']+)'", str(error.get("ctx", {}).get("expected", "")))
        hint = did_you_mean(str(error.get("input")), choices)
    return Fault(path, f"{rule[0].lower() + rule[1:]}; got {value}.{hint}")


def _clean_path(loc: tuple[str | int, ...], tree: Any) -> tuple[str | int, ...]:
    """Drop the parts that pydantic adds for unions, so that the path is the one in the file."""
    path: list[str | int] = []
    for position, part in enumerate(loc):
        if isinstance(tree, dict) and part in tree:
            tree = tree[part]
        elif isinstance(tree, list) and isinstance(part, int) and part < len(tree):
            tree = tree[part]
        elif position < len(loc) - 1 or not isinstance(tree, dict):
            continue
        path.append(part)
    return tuple(path)


def _fields_at(path: tuple[str | int, ...]) -> list[str]:
    """Return the keys that the schema knows at a path."""
    groups: dict[str, type[BaseModel]] = {
        "data": DataConfig, "train": TrainConfig, "seeds": SeedsConfig, "scale": ScaleRule,
    }  # fmt: skip
    if not path:
        return list(StudyConfig.model_fields)
    model = groups.get(str(path[-1])) or (ArmConfig if path[0] == "arms" else StudyConfig)
    return list(model.model_fields)
