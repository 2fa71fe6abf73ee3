"""Rows become token arrays with labels, and token arrays become fixed splits.

Legend: T is the tokens of one example. `input_ids` (T,) and `labels` (T,) stand side by side: `labels[t]`
is `input_ids[t]` where that token counts in the loss and -100 where it does not; whoever trains shifts by
one. An example ends with its last label: what would follow (the newline after an end-of-turn token)
could teach nothing.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import jinja2
import numpy as np
from numpy.typing import NDArray

from rankwise.errors import RankwiseError, one_of
from rankwise.rows import Rejected, RejectRow, Row, RowsRead, Turns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_LOSS = -100
BATCH = 256  # rows tokenised at a time: their offsets are Python tuples, so not all rows at once
DATE = "26 Jul 2024"  # for templates that write today's: a run must not depend on the day
NAMES = {"system": "System", "user": "Human", "assistant": "Assistant"}


@dataclass(frozen=True, eq=False)
class Example:
    """One row as tokens.

    Attributes:
        row_hash: Names the row; see `rows.Row.hash`.
        input_ids: (T,) int32, T <= max_length.
        labels: (T,) int32, -100 where there is no loss.
        prompt_tokens: Tokens without a label, so that prompt_tokens + response_tokens = T.
        response_tokens: Tokens with a label.
        cut_tokens: Response tokens lost to max_length.
        response_bytes: UTF-8 bytes of the text that the labels cover, end-of-turn tokens left out.
    """

    row_hash: str
    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    prompt_tokens: int
    response_tokens: int
    cut_tokens: int
    response_bytes: int


@dataclass(frozen=True, eq=False)
class Splits:
    """Disjoint sets of examples, each in the order of its rows' hashed questions."""

    reserved: tuple[Example, ...]
    test: tuple[Example, ...]
    validation: tuple[Example, ...]
    pool: tuple[Example, ...]


@dataclass(frozen=True, eq=False)
class Prepared:
    """Everything that `prepare` found and made."""

    splits: Splits
    fingerprint: str  # SHA-256 over row hashes, tokens, labels and split sizes
    rejected: list[Rejected]  # in reading or here, by line
    duplicates: list[tuple[int, int]]  # (line, line of the first row with that question), by line
    rows_read: int  # kept + rejected + duplicates
    prompt_form: str  # chat, human, or raw where every row is plain text
    notices: tuple[str, ...]
    source: str
    max_length: int  # tokens
    train: int  # rows that one draw takes from the pool
    with_input: int  # kept rows that carry an input beside their instruction


@dataclass(frozen=True)
class _Rendered:
    """The text of a row, and which characters of it are responses."""

    row: Row
    text: str
    spans: tuple[tuple[int, int], ...]
    raw: bool  # not from a chat template, so a begin-of-text token may be due
    partial: bool = False  # only the last of several assistant turns is marked


def prepare(
    read: RowsRead,
    tokenizer: PreTrainedTokenizerBase,
    *,
    train: int,
    validation: int,
    test: int,
    reserved: int = 250,
    max_length: int,
    prompt: Literal["auto", "chat", "human"] = "auto",
    source: str = "",
) -> Prepared:
    """Drop near-duplicates, tokenise with exact labels, and split by the hash of the question.

    The splits do not depend on the order of the file. `train`, `validation`, `test` and `reserved` count
    rows; which rows are reserved depends on no other size. `max_length` counts tokens: a response is cut
    there, and a prompt that fills it rejects its row. `prompt` is `chat` (the tokenizer's template),
    `human` (`Human: ... Assistant: ...`), or `auto`: chat if there is a template. `source` names the rows.

    Returns:
        The splits, their fingerprint, and an account of every row that is not in them.

    Raises:
        RankwiseError: A slow tokenizer, a size or prompt form that makes no sense, a template whose
            responses cannot be located, or too few rows left.

    Cost: about 0.5 ms a row on one core; 8 bytes per token stay in memory.
    """
    sizes = {"reserved": reserved, "test": test, "validation": validation, "train": train}
    _check(tokenizer, sizes, max_length, prompt)
    rows, duplicates = _drop_duplicates(read.rows)
    rows.sort(key=lambda row: hashlib.sha256(f"split:{row.key}".encode()).digest())
    form = "chat" if tokenizer.chat_template and prompt != "human" else "human"
    writer = _Writer(tokenizer, form, max_length)
    made: list[tuple[Row, Example]] = []
    rejected = list(read.rejected)
    for start in range(0, len(rows), BATCH):
        good, bad = writer.examples(rows[start : start + BATCH])
        made += good
        rejected += bad
    rejected.sort(key=lambda reject: reject.line)
    # Counted twice: every row that was read is in exactly one of the three.
    assert read.total == len(made) + len(rejected) + len(duplicates)
    if len(made) < sum(sizes.values()):
        raise RankwiseError(_too_few(sizes, read.total, rejected, duplicates, len(made), source))
    examples = [example for _, example in made]
    cuts = np.cumsum([0, reserved, test, validation]).tolist()
    splits = Splits(*(tuple(examples[a:b]) for a, b in zip(cuts, [*cuts[1:], None], strict=True)))
    return Prepared(
        splits=splits,
        fingerprint=_fingerprint(splits),
        rejected=rejected,
        duplicates=duplicates,
        rows_read=read.total,
        prompt_form=form if any(row.turns for row, _ in made) else "raw",
        notices=writer.notices(),
        source=source,
        max_length=max_length,
        train=train,
        with_input=sum(bool(row.context) for row, _ in made),
    )


def training_rows(prepared: Prepared, seed: int, count: int) -> list[Example]:
    """Draw `count` training rows from the pool without replacement, in the order of the draw.

    Equal seeds give equal draws, and the first n of a larger draw are the draw of n.

    Raises:
        RankwiseError: The pool holds fewer than `count` rows.
    """
    pool = prepared.splits.pool
    if not 0 <= count <= len(pool):
        raise RankwiseError(f"A draw takes 0 to {len(pool)} rows, what the pool holds; got {count}.")
    entropy = int.from_bytes(hashlib.sha256(f"{seed}:train rows".encode()).digest()[:16], "little")
    # numpy promises that a bit generator's raw stream stays the same from version to version; it does
    # not promise that of Generator.permutation.
    order = np.argsort(np.random.PCG64(entropy).random_raw(len(pool)), kind="stable")
    return [pool[i] for i in order[:count]]


def _check(tokenizer: PreTrainedTokenizerBase, sizes: dict[str, int], max_length: int, prompt: str) -> None:
    name = f"{tokenizer.name_or_path or 'the tokenizer'} ({type(tokenizer).__name__})"
    if not tokenizer.is_fast:
        raise RankwiseError(f"A tokenizer must be a fast one (with a tokenizer.json): only those tell where "
                            f"in the text a token stands; {name} is slow.")  # fmt: skip
    if prompt not in ("auto", "chat", "human"):
        raise RankwiseError(one_of("prompt", prompt, ("auto", "chat", "human")))
    if prompt == "chat" and not tokenizer.chat_template:
        raise RankwiseError(f"prompt is chat, but {name} has no chat template; use auto or human.")
    for what, least, value in [
        *((what, 0, size) for what, size in sizes.items()),
        ("max_length", 2, max_length),
    ]:
        if value < least:
            raise RankwiseError(f"{what} must be {least} or more; got {value}.")


def _drop_duplicates(rows: list[Row]) -> tuple[list[Row], list[tuple[int, int]]]:
    first: dict[str, Row] = {}
    repeated = [row for row in rows if first.setdefault(row.key, row) is not row]
    return list(first.values()), [(row.line, first[row.key].line) for row in repeated]


def _too_few(
    sizes: dict[str, int], total: int, rejected: list[Rejected], duplicates: list[tuple[int, int]], left: int,
    source: str,
) -> str:  # fmt: skip
    asked = " + ".join(f"{size} {what}" for what, size in sizes.items())
    reasons = "; ".join(f"line {reject.line}: {reject.reason}" for reject in rejected[:3])
    more = f"; and {len(rejected) - 3} more" if len(rejected) > 3 else ""
    return (
        f"Too few rows in {source or 'the data'}: {asked} = {sum(sizes.values())} are asked for, {left} are "
        f"left of {total} read ({len(duplicates)} near-duplicates dropped, {len(rejected)} rejected"
        f"{': ' if reasons else ''}{reasons}{more}). Ask for fewer, or give more rows."
    )


class _Writer:
    """Writes rows as text and tokens, and counts what deserves a notice."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, form: str, max_length: int) -> None:
        self.tokenizer, self.form, self.max_length = tokenizer, form, max_length
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        strings = sorted({*tokenizer.all_special_tokens, *special} - {""}, key=lambda s: (-len(s), s))
        # (?!) matches nothing, for a tokenizer without control tokens.
        self.control = re.compile("|".join(map(re.escape, strings)) or "(?!)")
        # A token for unknown words stands for data; GPT-2's is its end-of-text token as well.
        unknown = {tokenizer.unk_token} - {tokenizer.eos_token}
        self.control_ids = tokenizer.convert_tokens_to_ids([s for s in strings if s not in unknown])
        self.template = tokenizer.get_chat_template() if form == "chat" else ""
        self.dated = "strftime_now" in self.template or "date_string" in self.template
        if "strftime_now" in self.template:
            # A function cannot be handed to a template, a macro that goes by the function's name can.
            self.template = f"{{% macro strftime_now(f) %}}{DATE}{{% endmacro %}}{self.template}"
        bos, given = tokenizer.bos_token_id, tokenizer("a").input_ids
        plain = tokenizer("a", add_special_tokens=False).input_ids
        self.bos = bos if bos is not None and given[:1] == [bos] != plain[:1] else None
        self.eos = tokenizer.eos_token or ""
        if self.eos and tokenizer(self.eos, add_special_tokens=False).input_ids != [tokenizer.eos_token_id]:
            raise RankwiseError(
                f"The tokenizer does not read its end-of-text token {self.eos!r} as one token."
            )
        self.counts: Counter[str] = Counter()

    def examples(self, rows: list[Row]) -> tuple[list[tuple[Row, Example]], list[Rejected]]:
        """Turn rows into examples, in order, and say which cannot be."""
        made: list[tuple[Row, Example]] = []
        rejected, rendered = [], []
        for row in rows:
            try:
                rendered.append(self.render(row))
            except RejectRow as reject:
                rejected.append(Rejected(row.line, str(reject)))
        if not rendered:
            return made, rejected
        texts = [item.text for item in rendered]
        encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False,
                                 truncation=False, padding=False)  # fmt: skip
        for item, ids, offsets in zip(rendered, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            try:
                made.append((item.row, self.label(item, ids, offsets)))
            except RejectRow as reject:
                rejected.append(Rejected(item.row.line, str(reject)))
        return made, rejected

    def render(self, row: Row) -> _Rendered:
        """Write a row as text and mark its responses."""
        # Once written into a template, data that spells a control token cannot be told from the token.
        written = [text for _, text in row.turns] or [row.prompt + row.response]
        found = next(filter(None, map(self.control.search, written)), None)
        if found:
            raise RejectRow(f"contains the control token {found[0]}")
        if not row.turns:
            text = row.prompt + row.response + self.eos
            return _Rendered(row, text, ((len(row.prompt), len(text)),), raw=True)
        last = max(i for i, (role, _) in enumerate(row.turns) if role == "assistant")
        turns = row.turns[: last + 1]
        return self._chat(row, turns) if self.form == "chat" else self._human(row, turns)

    def _human(self, row: Row, turns: Turns) -> _Rendered:
        text, spans = "", []
        for role, content in turns:
            text += ("\n\n" if text else "") + f"{NAMES[role]}:"
            start = len(text)  # before the space: most tokenizers write a word with the one before it
            text += " " + (
                f"{row.prompt}\n\nContext: {row.context}" if row.context and role == "user" else content
            )
            if role == "assistant":
                text += self.eos
                spans.append((start, len(text)))
        return _Rendered(row, text, tuple(spans), raw=True)

    def _chat(self, row: Row, turns: Turns) -> _Rendered:
        messages = [{"role": role, "content": content} for role, content in turns]
        full = self._write(messages, False)
        spans, lost = [], False
        for i, (role, content) in enumerate(turns):
            if role != "assistant":
                continue
            prefix, through = self._write(messages[:i], True), self._write(messages[: i + 1], False)
            end = self._turn_end(through, len(prefix), content)
            if through.startswith(prefix) and full.startswith(through[:end]) and end > len(prefix):
                spans.append((len(prefix), end))
            elif i + 1 < len(turns):
                lost = True
            else:
                raise RankwiseError(
                    "A chat template must continue its own generation prompt, or no response can be found; "
                    f"that of {self.tokenizer.name_or_path} does not (line {row.line}). Use prompt: human."
                )
        return _Rendered(row, full, tuple(spans[-1:] if lost else spans), raw=False, partial=lost)

    def _write(self, messages: list[dict[str, str]], open_turn: bool) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, tokenize=False, add_generation_prompt=open_turn,
                date_string=DATE,
            ))  # fmt: skip
        except jinja2.TemplateError as error:
            # The template's own words may be shown; anything else might be data text.
            why = f": {error.message}" if error.message and error.message in self.template else ""
            raise RejectRow(f"the chat template refuses the row{why}") from error

    def _turn_end(self, through: str, start: int, content: str) -> int:
        # Searched from the content's end, as Phi-3 writes an end-of-text token after the last turn's end.
        at = through.find(content.strip(), start)
        mark = self.control.search(through, at + len(content.strip())) if at >= 0 else None
        return mark.end() if mark else len(through.rstrip())

    def label(self, item: _Rendered, tokens: list[int], offsets: list[tuple[int, int]]) -> Example:
        """Label the tokens that lie in the spans, and cut to max_length."""
        ids = np.array(tokens, dtype=np.int32)
        begin, end = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
        learn, straddles = _inside(item, begin, end)
        if item.raw and self.bos is not None:
            ids = np.insert(ids, 0, self.bos)
            begin, end, learn = np.insert(begin, 0, 0), np.insert(end, 0, 0), np.insert(learn, 0, False)
        learn[:1] = False  # nothing stands before it
        where = np.flatnonzero(learn)
        if not where.size:
            raise RejectRow("no token of the response can be trained")
        keep = min(int(where[-1]) + 1, self.max_length)
        # A character of several tokens is kept or cut as a whole, so that bytes can be counted.
        while 0 < keep < len(ids) and begin[keep] < end[keep - 1]:
            keep -= 1
        kept = where[where < keep]
        if not kept.size:
            raise RejectRow(f"the prompt alone takes {where[0]} tokens and max_length is {self.max_length}, "
                            "so no token of the response is left")  # fmt: skip
        keep, cut = int(kept[-1]) + 1, len(where) - len(kept)
        text, size = kept[~np.isin(ids[kept], self.control_ids)], 0
        for start, stop in item.spans:
            at = text[(end[text] > start) & (end[text] <= stop)]
            size += len(item.text[begin[at[0]] : end[at[-1]]].encode()) if at.size else 0
        flags = {"raw": item.raw, "partial": item.partial, "straddling": straddles, "cut": cut > 0}
        self.counts.update(rows=1, **{name: int(flag) for name, flag in flags.items()})
        labels = np.where(learn, ids, NO_LOSS)[:keep].astype(np.int32)
        return Example(item.row.hash, ids[:keep].copy(), labels, keep - len(kept), len(kept), cut, size)

    def notices(self) -> tuple[str, ...]:
        """Say once what happened to the rows so far."""
        rows, counts = self.counts["rows"], self.counts
        said = [
            (counts["partial"], f"{counts['partial']} of {rows} rows: the chat template rewrites earlier "
             "turns, so only the last assistant turn is trained."),
            (counts["straddling"], f"{counts['straddling']} of {rows} rows: a response's first token begins "
             "in the prompt and is not trained."),
            (counts["cut"] * 10 > rows, f"{counts['cut']} of {rows} rows are cut at max_length."),
            (counts["raw"] and not self.eos, "The tokenizer has no end-of-text token: no row teaches one."),
            (self.dated, f"The chat template writes a date; it is given {DATE}."),
        ]  # fmt: skip
        return tuple(sentence for applies, sentence in said if applies)


def _inside(
    item: _Rendered, begin: NDArray[np.int64], end: NDArray[np.int64]
) -> tuple[NDArray[np.bool_], bool]:
    """Mark the tokens that lie in the spans; say whether one that straddles a start was left out."""
    learn, straddles = np.zeros(len(begin), dtype=bool), False
    for start, stop in item.spans:
        # `end > start` leaves out a prompt's last space where a tokenizer trims it to no width.
        learn |= (begin >= start) & (end > start) & (end <= stop)
        for i in np.flatnonzero((begin < start) & (end > start)):
            # The same for a completion whose prompt ends in a space: of "is " and "Paris" the first token
            # of the completion is " Paris".
            closing_space = item.raw and not item.text[begin[i] : start].strip(" ")
            learn[i] |= closing_space
            straddles |= not closing_space
    return learn, straddles


def _fingerprint(splits: Splits) -> str:
    digest = hashlib.sha256()
    for name, examples in vars(splits).items():
        digest.update(f"{name} {len(examples)}\n".encode())
        for example in examples:
            digest.update(f"{example.row_hash} {len(example.input_ids)}\n".encode())
            digest.update(example.input_ids.astype("<i4").tobytes() + example.labels.astype("<i4").tobytes())
    return digest.hexdigest()
