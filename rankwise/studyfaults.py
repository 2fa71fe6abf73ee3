"""The faults of a study file that show without its model and data, all of them at once.

A misspelt key is a fault, and the rest is then checked as if it had been spelt right; a value that is
refused is a fault, and the rest is checked with a harmless one in its place.
"""

from __future__ import annotations

import copy
import re
import reprlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import BaseModel, ValidationError

from rankwise.budget import parse_budget
from rankwise.config import (
    OPTIONS,
    ArmConfig,
    DataConfig,
    Fault,
    ScaleRule,
    SeedsConfig,
    StudyConfig,
    TrainConfig,
    cross_faults,
)
from rankwise.errors import RankwiseError, did_you_mean, nearest, one_of
from rankwise.strategies import STRATEGIES, resolve

KeyPath = tuple[str | int, ...]

GROUPS: dict[str, type[BaseModel]] = {
    "data": DataConfig, "train": TrainConfig, "seeds": SeedsConfig, "scale": ScaleRule,
}  # fmt: skip
BOUNDLESS = 10**200  # the full rank of a module on which a budget can only fail by its own text

STAND_INS: dict[KeyPath, Any] = {
    ("name",): "x",
    ("model",): "x",
    ("data",): {"source": "x", "train": 1},
    ("data", "source"): "x",
    ("data", "train"): 1,
    ("train",): {"learning_rates": [1.0], "step_tokens": 1},
    ("train", "learning_rates"): [1.0],
    ("train", "step_tokens"): 1,
    ("train", "step_examples"): 1,
    ("arms", "*"): {"strategy": "x", "match": "none"},
    ("arms", "*", "strategy"): "x",
    ("arms", "*", "budget"): "r=1",
}
"""What takes the place of a refused value where leaving it out would be a fault of its own."""

RULES = {
    "model_type": "must be a group of keys",
    "model_attributes_type": "must be a group of keys",
    "dict_type": "must be a group of keys",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "string_type": "must be text",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
}
"""Kinds of pydantic's errors -> our words for the rule; its own words serve for the others."""

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 3, 80, 80, 40


@contextmanager
def gather(faults: list[Fault], *path: str | int) -> Iterator[None]:
    """Note an error as a fault at this key path and go on, so that further ones are found as well."""
    try:
        yield
    except RankwiseError as error:
        faults.append(Fault(path, str(error)))


def check(tree: dict[str, Any]) -> tuple[StudyConfig | None, list[Fault]]:
    """Return the study of a raw mapping and its faults; None where it has faults within its fields."""
    faults, meant, moved = _unknown_keys(tree)
    within = strategy_faults(meant)
    config: StudyConfig | None = None
    try:
        config = StudyConfig.model_validate(meant)
        within += cross_faults(config)
    except ValidationError as error:
        within += list(_field_faults(error, meant))
        within += _faults_between(meant, error)
    return config, faults + [Fault(_as_written(f.path, moved), f.message) for f in within]


def strategy_faults(tree: dict[str, Any]) -> list[Fault]:
    """Return the faults of the arms' strategies, options and budgets that no model is needed for."""
    arms = tree.get("arms")
    faults: list[Fault] = []
    for name, arm in arms.items() if isinstance(arms, dict) else ():
        if not isinstance(arm, dict):
            continue  # the schema says so
        strategy, budget = arm.get("strategy"), arm.get("budget")
        if isinstance(strategy, str) and strategy not in STRATEGIES:
            rule = one_of("the strategy", strategy, STRATEGIES)
            faults.append(Fault(("arms", name, "strategy"), rule))
        elif isinstance(strategy, str) and isinstance(arm.get("of"), str | None):
            with gather(faults, "arms", name):
                resolve(strategy, {k: arm[k] for k in OPTIONS if arm.get(k) is not None})
        if isinstance(budget, str | int) and not isinstance(budget, bool):
            with gather(faults, "arms", name, "budget"):
                check_form(budget)
    return faults


def check_form(budget: str | int) -> None:
    """Refuse a budget that no model could make sense of.

    Raises:
        RankwiseError: not one of the forms, zero or negative.
    """
    parse_budget(budget, costs={"": 1}, max_ranks={"": BOUNDLESS}, base_parameters=10**40)


def _unknown_keys(tree: dict[str, Any]) -> tuple[list[Fault], dict[str, Any], dict[KeyPath, KeyPath]]:
    """Return a fault for every unknown key, the tree without them, and what was taken for what.

    A key that is near one which is absent is taken for that one.
    """
    meant, faults = copy.deepcopy(tree), list[Fault]()
    moved: dict[KeyPath, KeyPath] = {}
    while unknown := _paths_of("extra_forbidden", meant):
        for path in unknown:
            group, choices = _at(meant, path[:-1]), _fields_at(path[:-1])
            hint = did_you_mean(str(path[-1]), choices)
            rule = f"unknown key; the keys here are {', '.join(choices)}.{hint}"
            faults.append(Fault(_as_written(path, moved), rule))
            value, near = group.pop(path[-1]), nearest(str(path[-1]), choices)
            if near is not None and near not in group:
                group[near] = value
                moved[*path[:-1], near] = _as_written(path, moved)
    return faults, meant, moved


def _paths_of(kind: str, tree: dict[str, Any]) -> list[KeyPath]:
    try:
        StudyConfig.model_validate(tree)
    except ValidationError as error:
        return [_clean_path(e, tree) for e in error.errors() if e["type"] == kind]
    return []


def _as_written(path: KeyPath, moved: dict[KeyPath, KeyPath]) -> KeyPath:
    """Return the path as the file spells it."""
    ends = (end for end in range(len(path), 0, -1) if path[:end] in moved)
    end = next(ends, 0)
    return moved[path[:end]] + path[end:] if end else path


def _at(tree: Any, path: KeyPath) -> Any:
    for part in path:
        tree = tree[part]
    return tree


def _faults_between(tree: dict[str, Any], error: ValidationError) -> list[Fault]:
    """Return the faults between fields of a file that has faults within fields, as far as can be told."""
    rest = copy.deepcopy(tree)
    paths = sorted({_clean_path(fault, tree) for fault in error.errors()}, key=len)
    if ("arms",) in paths:
        rest = {k: v for k, v in rest.items() if k not in ("arms", "baseline", "contrasts")}
        rest["arms"] = {"x": STAND_INS["arms", "*"]}
    for path in paths:
        if path != ("arms",):
            _replace(rest, path)
    try:
        return cross_faults(StudyConfig.model_validate(rest))
    except ValidationError:
        return []


def _replace(tree: dict[str, Any], path: KeyPath) -> None:
    """Put the stand-in of a path in its place, or leave it out; in a list, that of the whole list."""
    group: Any = tree
    for depth, part in enumerate(path):
        inner = group.get(part)
        if depth == len(path) - 1 or not isinstance(inner, dict):
            here = path[: depth + 1]
            general = ("arms", "*", *here[2:]) if here[0] == "arms" and len(here) > 1 else here
            group.pop(part, None)
            if general in STAND_INS:
                group[part] = copy.deepcopy(STAND_INS[general])
            return
        group = inner


def _field_faults(error: ValidationError, tree: dict[str, Any]) -> Iterator[Fault]:
    """Yield one fault for each place: rule, value received, nearest choice."""
    places: dict[KeyPath, list[Any]] = defaultdict(list)
    for one in error.errors():
        places[_clean_path(one, tree)].append(one)
    for path, found in places.items():
        # A value may be of several types. Where one of them fits and fails further in, that is the fault.
        further = any(other[: len(path)] == path for other in places if len(other) > len(path))
        if not (further and all(one["type"].endswith("_type") for one in found)):
            yield Fault(path, _sentence(found))


def _sentence(errors: list[Any]) -> str:
    first = errors[0]
    if first["type"] == "missing":
        return "this key is required and is missing."
    rules = list(dict.fromkeys(map(_rule, errors)))
    hint = ""
    if first["type"] == "literal_error":
        choices = re.findall(r"'([^']+)'", str(first.get("ctx", {}).get("expected", "")))
        hint = did_you_mean(str(first.get("input")), choices)
    shared = "must be " if all(rule.startswith("must be ") for rule in rules) else ""
    rule = shared + " or ".join(rule.removeprefix(shared) for rule in rules)
    return f"{rule}; got {_SHORT.repr(first.get('input')):.120}.{hint}"


def _rule(error: Any) -> str:
    text = error["msg"].removeprefix("Value error, ")
    text = re.sub(r"^(Input|String|Tuple|List|Dictionary) should", "must", text)
    return RULES.get(error["type"], text[0].lower() + text[1:])


def _clean_path(error: Any, tree: Any) -> KeyPath:
    """Drop the parts that pydantic adds for unions, so that the path is the one in the file."""
    path: list[str | int] = []
    for part in error["loc"]:
        if isinstance(tree, dict) and part in tree:
            tree = tree[part]
        elif isinstance(tree, list) and isinstance(part, int) and part < len(tree):
            tree = tree[part]
        else:
            continue
        path.append(part)
    return (*path, error["loc"][-1]) if error["type"] == "missing" else tuple(path)


def _fields_at(path: KeyPath) -> Iterable[str]:
    """Return the keys that the schema knows at a path."""
    if not path:
        return list(StudyConfig.model_fields)
    arm = path[0] == "arms"
    model = ArmConfig if arm and len(path) == 2 else GROUPS[str(path[2 if arm else 0])]
    return list(model.model_fields)
