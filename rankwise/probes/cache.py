"""Evidence on disk: one safetensors file per probe, named by a digest of all that decides its numbers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rankwise.aside import replacing
from rankwise.cached import cache_dir, disk_faults
from rankwise.data import Example
from rankwise.evidence import QUANTITIES, Cost, Evidence, Kind

FORMAT = 1
"""Raised by hand when a probe measures something else under the same name."""


def rows_digest(rows: Iterable[Example]) -> str:
    """Return a digest over the rows' hashes, tokens and labels, in their order."""
    found = hashlib.sha256()
    for row in rows:
        found.update(f"{row.row_hash}\0{len(row.input_ids)}\0".encode())
        found.update(np.ascontiguousarray(row.input_ids, dtype="<i4").tobytes())
        found.update(np.ascontiguousarray(row.labels, dtype="<i4").tobytes())
    return found.hexdigest()


def key(**parts: Any) -> str:
    """Return the digest of named JSON values."""
    text = json.dumps({"format": FORMAT, **parts}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def kept(digest: str, kind: Kind, names: Iterable[str], measure: Callable[[], Evidence]) -> Evidence:
    """Return the evidence of that digest from the cache, or measure and keep it.

    Of several processes that ask at once, one measures and the others wait for it.

    Args:
        digest: of `key`.
        kind: what it must be.
        names: the modules that it must speak of.
        measure: how to get it anew.

    Raises:
        RankwiseError: the cache cannot be written.
    """
    path = cache_dir() / "probes" / f"{digest}.safetensors"
    with disk_faults():
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_suffix(".lock"))
        lock.acquire()
    try:
        found = _read(path, kind, frozenset(names))
        if found is None:
            found = measure()
            with disk_faults():
                _write(path, found)
        return found
    finally:
        lock.release()


def _read(path: Path, kind: Kind, names: frozenset[str]) -> Evidence | None:
    """Return what a file holds; None if it is absent, damaged, or holds something else."""
    try:
        with safe_open(path, "np") as file:
            told = file.metadata()
            arrays = {name: file.get_tensor(name) for name in file.keys()}
        if told["sha256"] != _arrays_digest(arrays) or told["kind"] != kind:
            return None
        cost, about = Cost(**json.loads(told["cost"])), json.loads(told["about"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
    values: dict[str, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        quantity, _, module = name.partition("/")
        values.setdefault(quantity, {})[module] = array
    whole = set(values) == set(QUANTITIES[kind]) and all(set(found) == names for found in values.values())
    return Evidence(kind, values, cost, about) if whole else None


def _write(path: Path, evidence: Evidence) -> None:
    """Write a file aside, then put it in its place: a reader sees all of it or none."""
    arrays = {
        f"{quantity}/{module}": np.asarray(array, dtype=np.float32, order="C")
        for quantity, found in evidence.values.items()
        for module, array in found.items()
    }
    about = {
        "kind": evidence.kind,
        "cost": json.dumps(asdict(evidence.cost)),
        "about": json.dumps(dict(evidence.about), default=str),
        "sha256": _arrays_digest(arrays),
    }
    with replacing(path) as aside:
        save_file(arrays, aside, about)


def _arrays_digest(arrays: Mapping[str, np.ndarray]) -> str:
    found = hashlib.sha256()
    for name in sorted(arrays):
        found.update(f"{name}\0{arrays[name].shape}\0".encode())
        found.update(np.ascontiguousarray(arrays[name]).tobytes())
    return found.hexdigest()
