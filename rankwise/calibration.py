"""Rows to measure on: from whatever a person has them in, drawn by a seed, as tokens."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise import data, rows, sources
from rankwise.errors import RankwiseError
from rankwise.rows import RowsRead

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST = 100_000
"""Rows read at most from something that does not say how many it has: a stream may have no end."""

FORMS = (
    "a list of dicts, a datasets.Dataset or another iterable of mappings, the path of a .json, .jsonl, "
    ".parquet or .txt file, or a source such as 'pypi:...', 'hf:...', 'file:...'"
)


@dataclass(frozen=True)
class Calibration:
    """Rows as tokens, in disjoint sets, and what their reader must know."""

    sets: tuple[tuple[data.Example, ...], ...]
    notices: tuple[str, ...]


def read(given: Any) -> RowsRead:
    """Read rows from any of `FORMS`; every row form of `rankwise.rows` is known.

    Raises:
        RankwiseError: it is none of them, cannot be read, or holds no row.
    """
    if isinstance(given, str | Path):
        return rows.read_rows(_file(given))
    if isinstance(given, Mapping):
        inside = ", ".join(map(str, list(given)[:5]))
        raise RankwiseError(
            f"Calibration data is {FORMS}; got a {type(given).__name__} of {inside}. Give one of its parts, "
            "such as data['train'], or rows."
        )
    if not isinstance(given, Iterable):
        raise RankwiseError(f"Calibration data is {FORMS}; got {type(given).__name__}.")
    values = itertools.islice(given, None if hasattr(given, "__len__") else MOST)
    plain = (dict(value) if isinstance(value, Mapping) else value for value in values)
    found = rows.usable(enumerate(plain, start=1))
    if not found.total:
        raise RankwiseError(
            f"Calibration data must hold at least one row; this {type(given).__name__} is empty."
        )
    return found


def _file(given: str | Path) -> Path:
    if isinstance(given, Path) or not re.match(r"(hf|pypi|file):", given):
        path = Path(given)
        if not path.exists():
            raise RankwiseError(f"Calibration data is {FORMS}; there is no file {str(given)!r}.")
        return path
    return sources.fetch(given, kind="data").path


def draw(
    found: RowsRead,
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int,
    sets: int = 1,
    seed: int = 0,
    max_length: int = 256,
) -> Calibration:
    """Draw `sets` disjoint sets of `count` rows and write them as tokens.

    Near-duplicates count once, so no question is in two sets. The order of the draw depends on the seed and
    the rows' contents alone: a smaller draw is the beginning of a larger one. A single set takes what there
    is where there are fewer rows, and says so.

    Args:
        found: the rows.
        tokenizer: a fast one.
        count: rows of a set.
        sets: how many.
        seed: of the draw.
        max_length: tokens of a row; a response is cut there, and a prompt that fills it rejects its row.

    Raises:
        RankwiseError: several sets need more rows than there are; no row can be used; or a slow tokenizer.

    Cost: about 0.5 ms for every row drawn.
    """
    for what, least, value in (("calibration", 1, count), ("stability", 1, sets)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise RankwiseError(f"{what} must be a whole number of {least} or more; got {value!r}.")
    wanted = count * sets
    drawn = sorted(found.rows, key=lambda row: hashlib.sha256(f"{seed}:{row.hash}".encode()).digest())
    taken = 2 * wanted  # tokenising all of a large file for a few rows would take longer than measuring
    while True:
        examples, _ = _examples(RowsRead(drawn[:taken], [], len(drawn[:taken])), tokenizer, max_length)
        if len(examples) >= wanted or taken >= len(drawn):
            break
        taken *= 2
    if not examples:
        _examples(found, tokenizer, max_length, least=1)  # its error names the reasons
    names = {example.row_hash for example in examples[:wanted]}
    used = [row for row in drawn if row.hash in names]
    _, notices = _examples(RowsRead(used, [], len(used)), tokenizer, max_length)  # of these rows alone
    if sets > 1:
        need(sets, count, len(examples), found.total)
    if len(examples) < wanted:
        notices += (f"measured on {len(examples)} rows, all that there are; {count} were asked for",)
    chunks = [examples[i * count : (i + 1) * count] for i in range(sets)]
    return Calibration(tuple(map(tuple, chunks)), notices)


def need(sets: int, count: int, usable: int, total: int) -> None:
    """Refuse several sets of more rows than there are; a cheap check before tokens are made, and one after.

    Raises:
        RankwiseError: `sets` x `count` is more than `usable`.
    """
    if sets * count > usable:
        raise RankwiseError(
            f"{sets} disjoint sets of {count} calibration rows need {sets * count} rows, near-duplicates "
            f"counted once; {usable} of {total} can be used. Ask for fewer sets or smaller ones."
        )


def _examples(
    read: RowsRead, tokenizer: PreTrainedTokenizerBase, max_length: int, least: int = 0
) -> tuple[list[data.Example], tuple[str, ...]]:
    """Return the rows that can be used as tokens, in their order and each once, and notices."""
    prepared = data.prepare(
        read, tokenizer, train=least, validation=0, test=0, reserved=0, max_length=max_length,
        source="the calibration data",
    )  # fmt: skip
    by_hash = {example.row_hash: example for example in prepared.splits.pool}
    order = dict.fromkeys(row.hash for row in read.rows)
    return [by_hash[name] for name in order if name in by_hash], prepared.notices
