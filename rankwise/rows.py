"""A data file becomes rows: JSON, JSONL, Parquet or plain text in, `Row` and `Rejected` out.

Nothing here knows of tokens. A row that cannot be used is handed back with its line and the reason; a
file that cannot be used is a `RankwiseError`. Reasons name fields and types, never their contents,
because they are stored and data text is not.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rankwise.errors import RankwiseError

Turns = tuple[tuple[str, str], ...]

ROLES = ("system", "user", "assistant")
LINE_SUFFIXES = (".jsonl", ".ndjson")
PARQUET_SUFFIXES = (".parquet", ".pq")


@dataclass(frozen=True)
class Row:
    """One usable row.

    Attributes:
        line: 1-based line on which the row starts (the row's number in a Parquet file).
        turns: (role, content) pairs; empty for `text` and `completion`, which take no template.
        prompt: What is shown; empty for `messages` and `text`.
        response: What is completed, or the whole of a `text` row; empty for `messages`.
        context: Alpaca's `input`; empty where there is none.
        form: `instruction`, `prompt`, `messages`, `text` or `completion`.
        key: The normalised question; rows with equal keys are near-duplicates.
        hash: SHA-256 of the content in canonical JSON, hexadecimal; the row's name everywhere.
    """

    line: int
    turns: Turns
    prompt: str
    response: str
    context: str
    form: str
    key: str
    hash: str


@dataclass(frozen=True)
class Rejected:
    """A row that was left out: where it stands, and why."""

    line: int
    reason: str


@dataclass(frozen=True)
class RowsRead:
    """What a file held: `total` rows, each of them in `rows` or in `rejected`."""

    rows: list[Row]
    rejected: list[Rejected]
    total: int


class Shape(NamedTuple):
    """One accepted set of fields."""

    form: str
    prompt: str
    response: str
    context: str = ""

    @property
    def required(self) -> tuple[str, ...]:
        """Names of the fields that a row of this shape must have."""
        return tuple(name for name in (self.prompt, self.response) if name)


# In order of preference: tatsu-lab/alpaca has `text` beside its instruction, UltraChat has `prompt`
# beside its messages, and in both the richer form is the one that is meant.
SHAPES = (
    Shape("messages", "", "messages"),
    Shape("instruction", "instruction", "output", "input"),
    Shape("prompt", "prompt", "response"),
    Shape("prompt", "question", "answer"),
    Shape("completion", "prompt", "completion"),
    Shape("text", "", "text"),
)


class RejectRow(Exception):
    """Carries the reason out of the parsing of one row, or stands for a value that could not be read."""


def read_rows(path: Path) -> RowsRead:
    """Read every row of a JSON, JSONL, Parquet or `.txt` file, in file order.

    A known extension decides the format; otherwise the content does.

    Raises:
        RankwiseError: The file as a whole cannot be used: missing, empty, not UTF-8, a JSON array that
            does not parse, an unreadable Parquet file, or an unknown format.

    Cost: the file is held in memory once as bytes and once as text; about 1 s per 50 MB.
    """
    found = usable(_values(path))
    if not found.total:
        raise RankwiseError(f"A data file must hold at least one row; {path} holds none.")
    return found


def usable(values: Iterable[tuple[int, Any]]) -> RowsRead:
    """Sort (line, value) pairs into usable rows and rejected ones; a value is usable as a dict."""
    rows, rejected = list[Row](), list[Rejected]()
    for line, value in values:
        try:
            rows.append(_row(line, value))
        except RejectRow as reject:
            rejected.append(Rejected(line, str(reject)))
    return RowsRead(rows, rejected, len(rows) + len(rejected))


def normalise(text: str) -> str:
    """Return the form of a question under which near-duplicates are equal.

    NFKC and case folding; punctuation becomes a space (an apostrophe vanishes), but not between two
    digits, so that 3.5 and 35, or 7-2 and 7/2, stay apart; runs of white space become one space. A
    question of punctuation alone keeps it, or all such questions would be one.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    parts = _BETWEEN_DIGITS.split(folded)
    stripped = "".join(part if i % 2 else part.translate(_PUNCTUATION) for i, part in enumerate(parts))
    return " ".join(stripped.split()) or " ".join(folded.split())


class _Punctuation(dict[int, str]):
    """A translation table that looks at a character when it first occurs."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        mark = unicodedata.category(char).startswith("P")
        self[code] = ("" if char in "'\u2019" else " ") if mark else char
        return self[code]


_PUNCTUATION = _Punctuation()
_BETWEEN_DIGITS = re.compile(r"(?<=\d)([^\w\s])(?=\d)")


def _row(line: int, value: Any) -> Row:
    if isinstance(value, RejectRow):
        raise value
    if not isinstance(value, dict):
        hint = " (an array of rows belongs in a .json file)" if isinstance(value, list) else ""
        raise RejectRow(f"the row must be an object with fields; found {_kind(value)}{hint}")
    shape = _shape(value)
    if shape.form == "messages":
        messages = _messages(value["messages"])
        return _finish(line, "messages", next(text for role, text in messages if role == "user"), messages)
    response = _text(value, shape.response)
    if shape.form == "text":
        return _finish(line, "text", response, response=response)
    prompt = _text(value, shape.prompt)
    context = _text(value, shape.context, may_be_empty=True) if shape.context else ""
    asked = f"{prompt}\n\n{context}" if context else prompt
    turns = () if shape.form == "completion" else (("user", asked), ("assistant", response))
    return _finish(line, shape.form, prompt, turns, prompt=prompt, response=response, context=context)


def _shape(value: dict[str, Any]) -> Shape:
    # A Parquet file gives every row every column, so a null field counts as absent.
    present = {name for name, field in value.items() if field is not None}
    for shape in SHAPES:
        if present.issuperset(shape.required):
            return shape
    found = ", ".join(_shown(name) for name in list(value)[:8]) or "none"
    if len(value) > 8:
        found += f" and {len(value) - 8} more"
    nearest = max(SHAPES, key=lambda shape: len(present.intersection(shape.required)))
    if present.intersection(nearest.required):
        missing = ", ".join(name for name in nearest.required if name not in present)
        raise RejectRow(f"missing or null field: {missing}; found: {found}")
    known = ", ".join("/".join(shape.required) for shape in SHAPES)
    raise RejectRow(f"no known fields; found: {found}; one of these is needed: {known}")


def _messages(value: Any) -> Turns:
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else _kind(value)
        raise RejectRow(f"messages must be a list of {{role, content}}; found {found}")
    turns = []
    for i, message in enumerate(value):
        where = f"messages[{i}]"
        if not isinstance(message, dict):
            raise RejectRow(f"{where} must be an object with role and content; found {_kind(message)}")
        missing = [name for name in ("role", "content") if message.get(name) is None]
        if missing:
            raise RejectRow(f"missing or null field: {', '.join(f'{where}.{name}' for name in missing)}")
        role = _text(message, "role", where=f"{where}.")
        if role not in ROLES:
            raise RejectRow(f"{where}.role must be one of {', '.join(ROLES)}; found {_shown(role)}")
        turns.append((role, _text(message, "content", where=f"{where}.", may_be_empty=role == "system")))
    roles = [role for role, _ in turns]
    if "assistant" not in roles:
        raise RejectRow("messages hold no assistant turn, so there is nothing to learn")
    if "user" not in roles[: roles.index("assistant")]:
        raise RejectRow("messages: an assistant turn stands before any user turn")
    return tuple(turns)


def _text(value: dict[str, Any], name: str, *, where: str = "", may_be_empty: bool = False) -> str:
    text = value.get(name)
    if text is None and may_be_empty:
        return ""
    if not isinstance(text, str):
        raise RejectRow(f"{where}{name} must be a string; found {_kind(text)}")
    if not text.strip():
        if may_be_empty:
            return ""
        raise RejectRow(f"{where}{name} is empty or only white space")
    lone = _SURROGATE.search(text)
    if lone:
        which = f"U+{ord(lone[0]):04X} at character {lone.start() + 1}"
        raise RejectRow(f"{where}{name} holds half of a surrogate pair ({which}), which is not text")
    return text


_SURROGATE = re.compile(r"[\ud800-\udfff]")


def _finish(line: int, form: str, asked: str, turns: Turns = (), **texts: str) -> Row:
    content = {"prompt": "", "response": "", "context": "", **texts}
    named = {"form": form, "turns": turns, **content}
    canonical = json.dumps(named, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    return Row(line, turns, form=form, key=normalise(asked), hash=digest, **content)


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def _shown(name: str) -> str:
    # A name that does not look like one may be data text, which must not leave with the reason.
    return repr(name) if re.fullmatch(r"[\w .-]{1,24}", name) else f"a name of {len(name)} characters"


def _values(path: Path) -> Iterator[tuple[int, Any]]:
    suffix = path.suffix.lower()
    data = _bytes(path)
    if suffix in PARQUET_SUFFIXES or data[:4] == b"PAR1":
        return _parquet(path)
    text = _decode(path, data)
    if suffix == ".txt":
        return _paragraphs(text)
    opening = text.lstrip()[:1]
    if suffix in LINE_SUFFIXES:
        first_line = _load(text.strip().split("\n", 1)[0])
        spread_out = opening == "[" and isinstance(first_line, RejectRow)
        return _array(path, text) if spread_out else _lines(text)
    if opening == "[":
        return _array(path, text)
    if opening == "{":
        return _single(text) or _lines(text)
    raise RankwiseError(
        f"A data file must be .parquet or .txt, or start with [ (JSON array) or {{ (JSONL); the extension of "
        f"{path} is {suffix or 'missing'} and it starts with {opening!r}."
    )


def _bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RankwiseError(f"The data file {path} cannot be read: {error.strerror or error}.") from error
    if not data.strip():
        raise RankwiseError(f"A data file must hold at least one row; {path} is empty ({len(data)} bytes).")
    return data


def _decode(path: Path, data: bytes) -> str:
    rule = f"A data file must be UTF-8 text; {path} is"
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise RankwiseError(f"{rule} UTF-16 (its mark is at byte offset 0).")
    nul = data.find(0)
    if nul >= 0:
        raise RankwiseError(f"{rule} binary (a NUL at byte offset {nul}).")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"byte 0x{data[error.start]:02x} at byte offset {error.start}"
        raise RankwiseError(f"{rule} not ({where}).") from error
    text = text.removeprefix("\ufeff")
    if not text.strip():
        raise RankwiseError(f"A data file must hold at least one row; {path} holds only white space.")
    return text


def _load(text: str) -> Any:
    # ValueError also covers a number too long for Python; RecursionError, brackets nested too deep.
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        return RejectRow(f"not valid JSON: {error.msg.removesuffix(' at')} at column {error.colno}")
    except RecursionError:
        return RejectRow("not readable JSON: nested too deep")
    except ValueError:
        return RejectRow("not readable JSON: a number is too long")


def _lines(text: str) -> Iterator[tuple[int, Any]]:
    # Not splitlines(): U+2028 and its kin may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, _load(line.rstrip("\r"))


def _single(text: str) -> Iterator[tuple[int, Any]] | None:
    value = _load(text)
    start = len(text) - len(text.lstrip())
    return iter([(1 + text.count("\n", 0, start), value)]) if isinstance(value, dict) else None


def _array(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    decoder = json.JSONDecoder()
    at = _skip(text, text.index("[") + 1)
    counted, line = 0, 1
    try:
        while text[at : at + 1] != "]":
            line += text.count("\n", counted, at)
            counted = at
            value, at = decoder.raw_decode(text, at)
            yield line, value
            at = _skip(text, at)
            if text[at : at + 1] == ",":
                at = _skip(text, at + 1)
                if text[at : at + 1] == "]":
                    raise json.JSONDecodeError("a comma after the last row", text, at)
            elif text[at : at + 1] != "]":
                raise json.JSONDecodeError("a comma or ] is missing after a row", text, at)
        if text[at + 1 :].strip():
            raise json.JSONDecodeError("text after the closing ]", text, _skip(text, at + 1))
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}: {error.msg.removesuffix(' at')}"
        raise RankwiseError(f"The JSON array in {path} does not parse at {where}.") from error
    except (RecursionError, ValueError) as error:
        why = "nested too deep" if isinstance(error, RecursionError) else "a number is too long"
        raise RankwiseError(f"The JSON array in {path} does not parse at line {line}: {why}.") from error


_SPACE = re.compile(r"[ \t\r\n]*")


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _paragraphs(text: str) -> Iterator[tuple[int, Any]]:
    lines = text.replace("\r\n", "\n").rstrip().split("\n")
    first = next(i for i, line in enumerate(lines) if line.strip())
    if all(line.strip() for line in lines[first:]):
        yield from ((i + 1, {"text": line}) for i, line in enumerate(lines[first:], start=first))
        return
    start = first
    for i, line in enumerate([*lines, ""]):
        if not line.strip():
            if start < i:
                yield start + 1, {"text": "\n".join(lines[start:i])}
            start = i + 1


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for i in range(batch.num_rows):
                    number += 1
                    yield number, _cells(batch, i)
    except (pyarrow.ArrowException, OSError) as error:
        why = str(error).split("\n")[0][:200]
        raise RankwiseError(f"The Parquet file {path} cannot be read: {why}") from error


def _cells(batch: Any, i: int) -> Any:
    try:
        return {name: batch.column(j)[i].as_py() for j, name in enumerate(batch.schema.names)}
    except UnicodeDecodeError:
        return RejectRow("a string is not UTF-8")
