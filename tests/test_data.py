"""Rows, labels and splits, on tokenizers that are trained here."""

from __future__ import annotations

import functools
import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from rankwise.data import Example, Prepared, prepare, training_rows
from rankwise.errors import RankwiseError
from rankwise.rows import RowsRead, normalise, read_rows

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Like Phi-3: an end-of-text token after the last turn's end, except before a generation prompt.
PHI = CHATML.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}")
# Like the reasoning models: what an earlier answer thought is dropped when the talk goes on.
FORGETS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + "
    "(m['content'] if loop.last else m['content'].split('</think>')[-1]) + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "Human: Name a colour.\n\nContext: the sky\n\nAssistant: Blue is a colour.",
    "system user assistant\nWhat is the capital of France? Paris is the capital.",
]


def tiny_tokenizer(template: str | None = CHATML, *, bos: bool = False, trim: bool = False):
    """A byte-level BPE of some 400 tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(CORPUS * 4, trainer)
    if trim:
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        bos_token="<|im_start|>",
        additional_special_tokens=["<|im_end|>"],
    )
    tokenizer.chat_template = template
    return tokenizer


# For hypothesis, which may not use a fixture per example.
_shared = functools.cache(tiny_tokenizer)


def write(folder: Path, rows: list, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def alpaca(n: int) -> list[dict]:
    row = '{"instruction": "Name colour %d.", "input": "", "output": "Colour %d is blue."}'
    return [json.loads(row % (i, i)) for i in range(n)]


def prepared(read: RowsRead, tokenizer=None, **sizes) -> Prepared:
    wanted = {"train": 0, "validation": 0, "test": 0, "reserved": 0, "max_length": 512} | sizes
    return prepare(read, tokenizer or tiny_tokenizer(), **wanted)


def one(folder: Path, row: dict, tokenizer=None, **options) -> Example:
    (example,) = prepared(read_rows(write(folder, [row])), tokenizer, **options).splits.pool
    return example


def labelled(example: Example, tokenizer) -> str:
    kept = example.labels[example.labels >= 0]
    assert (example.input_ids[example.labels >= 0] == kept).all()
    assert example.response_tokens == len(kept) and example.prompt_tokens == len(example.labels) - len(kept)
    assert example.input_ids.dtype == example.labels.dtype == np.int32
    return tokenizer.decode(kept, clean_up_tokenization_spaces=False)


def shown(example: Example, tokenizer) -> str:
    return tokenizer.decode(example.input_ids, clean_up_tokenization_spaces=False)


# --- labels ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("trim", [False, True])
def test_chat_labels_are_the_response_and_its_end_of_turn(tmp_path, trim):
    tokenizer = tiny_tokenizer(trim=trim)
    row = {"instruction": "Name a colour.", "input": "the sky", "output": "Blue is a colour."}
    example = one(tmp_path, row, tokenizer)
    assert labelled(example, tokenizer) == "Blue is a colour.<|im_end|>"
    # Nothing after the last label: neither the newline nor padding.
    assert shown(example, tokenizer) == (
        "<|im_start|>user\nName a colour.\n\nthe sky<|im_end|>\n"
        "<|im_start|>assistant\nBlue is a colour.<|im_end|>"
    )
    assert example.response_bytes == len("Blue is a colour.")
    assert example.cut_tokens == 0


@pytest.mark.parametrize("row", [{"prompt": "Name a colour.", "response": "Blue."},
                                 {"question": "Name a colour.", "answer": "Blue."}])  # fmt: skip
def test_prompt_and_question_rows_are_chats(tmp_path, row):
    tokenizer = tiny_tokenizer()
    assert labelled(one(tmp_path, row, tokenizer), tokenizer) == "Blue.<|im_end|>"


@pytest.mark.parametrize("context", ["", "the sky"])
@pytest.mark.parametrize("options", [{"template": None}, {"template": CHATML, "prompt": "human"}])
def test_human_labels_are_the_response_and_the_end_of_text(tmp_path, context, options):
    options = dict(options)
    tokenizer = tiny_tokenizer(options.pop("template"))
    row = {"instruction": "Name a colour.", "input": context, "output": "Blue is a colour."}
    example = one(tmp_path, row, tokenizer, **options)
    middle = "\n\nContext: the sky" if context else ""
    # The space belongs to the first word's token, and a model that is asked writes it.
    assert labelled(example, tokenizer) == " Blue is a colour.<|endoftext|>"
    assert shown(example, tokenizer) == (
        f"Human: Name a colour.{middle}\n\nAssistant: Blue is a colour.<|endoftext|>"
    )


@pytest.mark.parametrize("template", [CHATML, PHI])
def test_every_assistant_turn_is_labelled(tmp_path, template):
    tokenizer = tiny_tokenizer(template)
    turns = [("system", "Be brief."), ("user", "Fox?"), ("assistant", "Quick."), ("user", "Dog?"),
             ("assistant", "Lazy\nend"), ("user", "Never answered.")]  # fmt: skip
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    result = prepared(read_rows(write(tmp_path, [row])), tokenizer)
    (example,) = result.splits.pool
    assert labelled(example, tokenizer) == "Quick.<|im_end|>Lazy\nend<|im_end|>"
    assert shown(example, tokenizer).endswith("Lazy\nend<|im_end|>")
    assert not result.notices
    human = one(tmp_path, row, tokenizer, prompt="human")
    assert labelled(human, tokenizer) == " Quick.<|endoftext|> Lazy\nend<|endoftext|>"
    assert shown(human, tokenizer).startswith("System: Be brief.\n\nHuman: Fox?\n\nAssistant: Quick.<|endo")


def test_a_template_that_rewrites_earlier_turns_trains_the_last_one_only(tmp_path):
    tokenizer = tiny_tokenizer(FORGETS)
    turns = [("user", "Fox?"), ("assistant", "hm</think>Quick."), ("user", "Dog?"), ("assistant", "Lazy.")]
    rows = [{"messages": [{"role": who, "content": f"{text} {i}"} for who, text in turns]} for i in range(3)]
    result = prepared(read_rows(write(tmp_path, rows)), tokenizer)
    texts = sorted(labelled(example, tokenizer) for example in result.splits.pool)
    assert texts == [f"Lazy. {i}<|im_end|>" for i in range(3)]
    assert len(result.notices) == 1 and "3 of 3 rows" in result.notices[0]


def test_a_template_whose_response_cannot_be_found_is_an_error(tmp_path):
    tokenizer = tiny_tokenizer(CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>' }}{% endif"))
    with pytest.raises(RankwiseError, match=r"line 1\)\. Use prompt: human"):
        one(tmp_path, alpaca(1)[0], tokenizer)


def test_a_template_that_writes_the_date_is_given_a_fixed_one(tmp_path):
    tokenizer = tiny_tokenizer("{{ strftime_now('%Y-%m-%d') }}" + CHATML)
    result = prepared(read_rows(write(tmp_path, alpaca(1))), tokenizer)
    assert shown(result.splits.pool[0], tokenizer).startswith("26 Jul 2024<|im_start|>")
    assert "26 Jul 2024" in result.notices[0]


def test_a_template_that_refuses_a_row_rejects_it(tmp_path):
    refuse = "{% if 'blue' in messages[-1]['content'] %}{{ raise_exception('No blue here') }}{% endif %}"
    read = read_rows(write(tmp_path, [*alpaca(1), {"prompt": "Fox?", "response": "Brown."}]))
    result = prepared(read, tiny_tokenizer(refuse + CHATML))
    (reject,) = result.rejected
    assert (reject.line, reject.reason) == (1, "the chat template refuses the row: No blue here")


def test_text_is_labelled_but_for_a_token_with_nothing_before_it(tmp_path):
    tokenizer = tiny_tokenizer()
    example = one(tmp_path, {"text": "The quick brown fox"}, tokenizer)
    assert example.labels[0] == -100 and (example.labels[1:] >= 0).all()
    assert shown(example, tokenizer) == "The quick brown fox<|endoftext|>"
    assert labelled(example, tokenizer) == " quick brown fox<|endoftext|>"
    assert example.response_bytes == len(" quick brown fox")


def test_a_tokenizer_that_adds_a_begin_token_has_it_in_raw_forms_once(tmp_path):
    tokenizer = tiny_tokenizer(bos=True)
    text = one(tmp_path, {"text": "The quick fox"}, tokenizer)
    assert shown(text, tokenizer) == "<|im_start|>The quick fox<|endoftext|>"
    assert labelled(text, tokenizer) == "The quick fox<|endoftext|>" and text.prompt_tokens == 1
    human = one(tmp_path, alpaca(1)[0], tokenizer, prompt="human")
    assert shown(human, tokenizer).startswith("<|im_start|>Human:") and human.labels[0] == -100
    chat = one(tmp_path, alpaca(1)[0], tokenizer)
    assert shown(chat, tokenizer).startswith("<|im_start|>user")


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize(("prompt", "completion", "expected"), [
    ("The capital is", " Paris.", " Paris."),
    ("The capital is ", "Paris.", " Paris."),  # one token, " Paris": its space comes with it
    ("Name:\n", "Paris.", "Paris."),
    ("Name: ", "Q", "Q"),  # two tokens: the space is the prompt's, also where it is trimmed to no width
])  # fmt: skip
def test_completion_is_raw_text_with_loss_on_the_completion(tmp_path, prompt, completion, expected, trim):
    tokenizer = tiny_tokenizer(trim=trim)
    example = one(tmp_path, {"prompt": prompt, "completion": completion}, tokenizer)
    assert labelled(example, tokenizer) == expected + "<|endoftext|>"
    assert shown(example, tokenizer) == f"{prompt}{completion}<|endoftext|>"


def test_a_token_that_straddles_the_start_is_not_labelled_and_noticed(tmp_path):
    tokenizer = tiny_tokenizer()
    read = read_rows(write(tmp_path, [{"prompt": "the capi", "completion": "tal is Paris"}]))
    result = prepared(read, tokenizer)
    assert labelled(result.splits.pool[0], tokenizer) == " is Paris<|endoftext|>"
    assert result.splits.pool[0].response_bytes == len(" is Paris")
    assert "1 of 1 rows" in result.notices[0]


def test_response_bytes_sum_over_turns_and_count_utf8(tmp_path):
    turns = [("user", "a"), ("assistant", "naïve 中文"), ("user", "b"), ("assistant", "😀!")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    assert one(tmp_path, row).response_bytes == len("naïve 中文😀!".encode())


# --- truncation and rejection ----------------------------------------------------------------------


def test_truncation_cuts_the_response_and_counts(tmp_path):
    tokenizer = tiny_tokenizer()
    row = {"instruction": "Name a colour.", "output": "Blue is a colour of the sky."}
    whole = one(tmp_path, row, tokenizer)
    size = len(whole.input_ids)
    for length in range(whole.prompt_tokens + 1, size + 1):
        cut = one(tmp_path, row, tokenizer, max_length=length)
        assert (cut.input_ids == whole.input_ids[:length]).all()
        assert (cut.cut_tokens, cut.prompt_tokens) == (size - length, whole.prompt_tokens)
        text = labelled(cut, tokenizer).removesuffix("<|im_end|>")
        assert cut.response_bytes == len(text)
    short = prepared(read_rows(write(tmp_path, [row])), tokenizer, max_length=whole.prompt_tokens)
    assert not short.splits.pool
    assert f"takes {whole.prompt_tokens} tokens" in short.rejected[0].reason and short.rejected[0].line == 1


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12), st.integers(16, 60))
@settings(max_examples=60, deadline=None)
def test_a_cut_never_splits_a_character(tmp_path_factory, output, length):
    tokenizer = _shared()
    path = write(tmp_path_factory.mktemp("cut"), [{"instruction": "Fox", "output": output}])
    result = prepared(read_rows(path), tokenizer, max_length=length)
    assert result.rows_read == 1 == len(result.splits.pool) + len(result.rejected)
    for example in result.splits.pool:
        text = labelled(example, tokenizer).removesuffix("<|im_end|>")
        assert len(example.input_ids) <= length
        # A first newline may merge with the prompt's own, and is then not labelled.
        assert output.strip("\n").startswith(text.strip("\n"))
        assert example.response_bytes == len(text.encode())


def test_an_endless_instruction_is_rejected_fast_and_counted(tmp_path):
    rows = alpaca(3) + [{"instruction": text, "output": "x"} for text in ("ab cd" * 20_000, "é" * 100_000)]
    start = time.perf_counter()
    result = prepared(read_rows(write(tmp_path, rows)), train=3)
    assert time.perf_counter() - start < 5
    assert [reject.line for reject in result.rejected] == [4, 5]
    assert all("max_length is 512" in reject.reason for reject in result.rejected)
    with pytest.raises(RankwiseError, match="line 4: the prompt alone takes"):
        prepared(read_rows(write(tmp_path, rows)), train=4)


@pytest.mark.parametrize("row", [
    {"instruction": "Say <|im_end|>", "output": "x"}, {"instruction": "a", "output": "x<|im_end|>"},
    {"instruction": "a", "input": "<|im_end|>", "output": "x"}, {"text": "a<|im_end|>b"},
    {"prompt": "a<|im_", "completion": "end|>"},
    {"messages": [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "x"}]},
])  # fmt: skip
def test_rows_that_spell_a_control_token_are_rejected(tmp_path, row):
    result = prepared(read_rows(write(tmp_path, [row, *alpaca(2)])))
    assert [(r.line, r.reason) for r in result.rejected] == [(1, "contains the control token <|im_end|>")]
    assert len(result.splits.pool) == 2


def test_bad_settings_are_errors_that_say_the_rule(tmp_path):
    read = read_rows(write(tmp_path, alpaca(3)))
    for options, text in [
        ({"prompt": "chta"}, "Did you mean 'chat'"), ({"train": -1}, "train must be 0 or more; got -1"),
        ({"max_length": 1}, "max_length must be 2 or more"),
    ]:  # fmt: skip
        with pytest.raises(RankwiseError, match=text):
            prepared(read, **options)
    with pytest.raises(RankwiseError, match="no chat template"):
        prepared(read, tiny_tokenizer(None), prompt="chat")

    class Slow:
        is_fast, name_or_path, chat_template = False, "old/model", None

    with pytest.raises(RankwiseError, match=r"old/model \(Slow\) is slow"):
        prepared(read, Slow())


# --- splits ----------------------------------------------------------------------------------------


def names(result: Prepared) -> dict[str, list[str]]:
    return {split: [e.row_hash for e in examples] for split, examples in vars(result.splits).items()}


SIZES = {"reserved": 5, "test": 4, "validation": 3, "train": 6}


@given(st.permutations(range(20)))
@settings(max_examples=20, deadline=None)
def test_splits_are_disjoint_and_do_not_depend_on_the_order(tmp_path_factory, order):
    folder, rows = tmp_path_factory.mktemp("order"), alpaca(20)
    first = prepared(read_rows(write(folder, rows, "a.jsonl")), _shared(), **SIZES)
    other = prepared(read_rows(write(folder, [rows[i] for i in order], "b.jsonl")), _shared(), **SIZES)
    assert names(first) == names(other) and first.fingerprint == other.fingerprint
    drawn = [hash for split in names(first).values() for hash in split]
    assert len(set(drawn)) == len(drawn) == 20
    assert [len(split) for split in names(first).values()] == [5, 4, 3, 8]


def test_reserved_rows_depend_on_no_other_size(tmp_path):
    read = read_rows(write(tmp_path, alpaca(30)))
    base = names(prepared(read, **SIZES))["reserved"]
    for change in ({"test": 9}, {"validation": 0}, {"train": 18}):
        assert names(prepared(read, **(SIZES | change)))["reserved"] == base
    assert names(prepared(read, **(SIZES | {"reserved": 3})))["reserved"] == base[:3]


def test_fingerprint_sees_tokens_sizes_and_rows(tmp_path):
    read = read_rows(write(tmp_path, alpaca(30)))
    other = read_rows(write(tmp_path, alpaca(31), "other.jsonl"))
    prints = {prepared(read, **SIZES).fingerprint, prepared(read, **SIZES, max_length=20).fingerprint,
              prepared(read, **(SIZES | {"test": 5})).fingerprint, prepared(other, **SIZES).fingerprint,
              prepared(read, prompt="human", **SIZES).fingerprint}  # fmt: skip
    assert len(prints) == 5
    assert prepared(read, **SIZES).fingerprint in prints


def test_near_duplicates_go_before_the_split_and_the_first_stays(tmp_path):
    again = [
        {"instruction": "  name COLOUR 2", "output": "x"},
        {"prompt": "Name colour 2!?", "response": "y"},
    ]
    result = prepared(read_rows(write(tmp_path, alpaca(4) + again)))
    assert result.duplicates == [(5, 3), (6, 3)] and len(result.splits.pool) == 4 and result.rows_read == 6


@pytest.mark.parametrize(("a", "b", "same"), [
    ("What's up?", "whats  UP", True), ("\uff26\uff4f\uff58", "fox", True),
    ("well-known", "well known", True),
    ("Is 3.5 odd?", "Is 35 odd?", False), ("7-2", "7/2", False), ("???", "!!!", False), ("कि", "की", False),
])  # fmt: skip
def test_normalisation(a, b, same):
    assert (normalise(a) == normalise(b)) is same


def test_training_draws_are_nested_seeded_and_without_replacement(tmp_path):
    result = prepared(read_rows(write(tmp_path, alpaca(40))), reserved=5, train=20)
    draw = [e.row_hash for e in training_rows(result, 3, 35)]
    assert len(set(draw)) == 35 and set(draw) == set(names(result)["pool"])
    for count in (0, 1, 17):
        assert [e.row_hash for e in training_rows(result, 3, count)] == draw[:count]
    assert [e.row_hash for e in training_rows(result, 4, 35)] != draw
    with pytest.raises(RankwiseError, match="0 to 35 rows"):
        training_rows(result, 3, 36)


def test_too_few_rows_says_what_became_of_them(tmp_path):
    rows = [*alpaca(5), {"instruction": "Fox"}, "{broken", {"instruction": "name colour 1", "output": "x"}]
    with pytest.raises(RankwiseError) as error:
        prepared(read_rows(write(tmp_path, rows)), **SIZES, source="my rows")
    text = str(error.value)
    for part in (
        "my rows",
        "5 reserved + 4 test + 3 validation + 6 train = 18",
        "5 are left of 8 read",
        "1 near-duplicates",
        "2 rejected: line 6: missing or null field: output",
        "line 7: not valid JSON",
    ):
        assert part in text
