"""Answers to test rows by greedy decoding, and how near they come to the references.

The metrics are those of libraries: ROUGE-L by rouge-score (Lin 2004), chrF by sacrebleu (Popovic 2015). They
compare words and characters, not truth: read them beside the loss, never instead of it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import regex
import torch
from transformers import GenerationConfig

from rankwise.data import NO_LOSS, Example
from rankwise.engine.plain import unwrapped

BATCH = 16
"""Rows that are decoded together."""

_WORD = regex.compile(
    r"[\p{Han}\p{Hiragana}\p{Katakana}]|(?:(?![\p{Han}\p{Hiragana}\p{Katakana}])[\p{L}\p{M}\p{N}'])+"
)


class _Words:
    """Words of any script, in lower case; Chinese and Japanese by the character.

    rouge-score's own tokenizer keeps a-z and 0-9 alone, so that every other script would score 0.
    """

    def tokenize(self, text: str) -> list[str]:
        """Return the words of a text."""
        return _WORD.findall(unicodedata.normalize("NFC", text).lower())


def askable(rows: Sequence[Example], count: int) -> list[Example]:
    """Return the first `count` rows that have a prompt, the same for every arm and seed."""
    # the first token of plain text has no label, and is no question
    return [row for row in rows if len(_prompt(row)) > 1][:count]


@torch.no_grad()
def answers(model: Any, tokenizer: Any, rows: Sequence[Example], *, tokens: int) -> list[str]:
    """Return the model's greedy answer to each row's first question.

    Args:
        model: a causal language model, with or without adapters, on its own (plain) forward pass.
        tokenizer: the model's.
        rows: with a prompt each (`askable`).
        tokens: of an answer, at most.

    Cost: `tokens` forward passes of a batch of 16 rows, keys and values cached.
    """
    was_training = model.training
    model.eval()
    found: list[str] = []
    try:
        for start in range(0, len(rows), BATCH):
            found += _decode(model, tokenizer, [_prompt(row) for row in rows[start : start + BATCH]], tokens)
    finally:
        model.train(was_training)
    return found


def references(tokenizer: Any, rows: Sequence[Example], *, tokens: int) -> list[str]:
    """Return what each row gives as its first answer, cut as the model's is."""
    return [tokenizer.decode(_answer(row)[:tokens], skip_special_tokens=True).strip() for row in rows]


def quality(found: Sequence[str], wanted: Sequence[str]) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Return the metrics of all answers, and each row's own.

    Returns:
        rouge_l: mean F1 of the longest common subsequence of words, 0 to 1.
        chrf: chrF2 of all answers together, 0 to 100.
    """
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import CHRF

    scorer, chrf = RougeScorer(["rougeL"], tokenizer=_Words()), CHRF()
    rouge = [scorer.score(ref, hyp)["rougeL"].fmeasure for hyp, ref in zip(found, wanted, strict=True)]
    each = [chrf.sentence_score(hyp, [ref]).score for hyp, ref in zip(found, wanted, strict=True)]
    whole = chrf.corpus_score(list(found), [list(wanted)]).score
    return {"rouge_l": sum(rouge) / len(rouge), "chrf": whole}, {"rouge_l": rouge, "chrf": each}


def _first_answer(row: Example) -> tuple[int, int]:
    """Return where the first answer begins and ends."""
    labelled = (row.labels != NO_LOSS).tolist()
    begin = labelled.index(True)
    return begin, next((i for i in range(begin, len(labelled)) if not labelled[i]), len(labelled))


def _prompt(row: Example) -> list[int]:
    return row.input_ids[: _first_answer(row)[0]].tolist()


def _answer(row: Example) -> list[int]:
    begin, end = _first_answer(row)
    return row.input_ids[begin:end].tolist()


def _decode(model: Any, tokenizer: Any, prompts: list[list[int]], tokens: int) -> list[str]:
    longest = max(map(len, prompts))
    stops = getattr(model.generation_config, "eos_token_id", None)
    stops = {*(stops if isinstance(stops, list) else [stops]), tokenizer.eos_token_id} - {None}
    pad = next((i for i in (tokenizer.pad_token_id, *sorted(stops)) if i is not None), 0)
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    config = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=tokens, use_cache=True,
        pad_token_id=pad, eos_token_id=sorted(stops) or None,
    )  # fmt: skip
    with _alone(unwrapped(model), config):
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    return [tokenizer.decode(o[longest:], skip_special_tokens=True).strip() for o in out]


@contextmanager
def _alone(root: Any, config: GenerationConfig) -> Iterator[None]:
    """Put these settings in place of the model's own, which Transformers would fill gaps from.

    A repetition penalty that a model ships would change the answers, and not be greedy decoding.
    """
    before = root.generation_config
    root.generation_config = config
    try:
        yield
    finally:
        root.generation_config = before
