"""The rows that a study names: fetched and read first, which needs no model, then tokenised and split."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from rankwise import data, rows, sources
from rankwise.studyfile import StudyFile

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class StudyRows(NamedTuple):
    """The rows of a study's data file, and the file's hash."""

    read: rows.RowsRead
    sha256: str


def read_data(file: StudyFile) -> StudyRows:
    """Fetch and read the study's rows.

    Raises:
        RankwiseError: the source cannot be had, or the file as a whole cannot be used.
    """
    found = sources.fetch(file.config.data.source, kind="data", relative_to=file.path.parent)
    return StudyRows(rows.read_rows(found.path), found.sha256)


def prepare_data(file: StudyFile, found: StudyRows, tokenizer: PreTrainedTokenizerBase) -> data.Prepared:
    """Tokenise and split the study's rows.

    Raises:
        RankwiseError: too few rows are left, or the tokenizer cannot be used.
    """
    wanted = file.config.data
    return data.prepare(
        found.read,
        tokenizer,
        train=wanted.train,
        validation=wanted.validation,
        test=wanted.test,
        reserved=wanted.reserved,
        max_length=wanted.max_length,
        prompt=wanted.prompt,
        source=wanted.source,
    )


def general_rows(file: StudyFile, tokenizer: PreTrainedTokenizerBase) -> tuple[data.Example, ...]:
    """Return the general text on which forgetting is measured, as rows; none where the study asks for none.

    The rows are the first by their hash, cut at `data.max_length`, the same for every arm and seed.

    Raises:
        RankwiseError: the source cannot be had or holds no usable row.
    """
    wanted = file.config.measure
    if wanted.general_text is None:
        return ()
    found = sources.fetch(wanted.general_text, kind="data", relative_to=file.path.parent)
    read = rows.read_rows(found.path)
    first = sorted(read.rows, key=lambda row: row.hash)[: 2 * wanted.general_rows]  # some may be rejected
    prepared = data.prepare(
        rows.RowsRead(first, [], len(first)), tokenizer, train=1, validation=0, test=0, reserved=0,
        max_length=file.config.data.max_length, prompt=file.config.data.prompt, source=wanted.general_text,
    )  # fmt: skip
    return prepared.splits.pool[: wanted.general_rows]
