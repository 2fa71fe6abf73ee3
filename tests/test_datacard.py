"""The data card, and the files that stand before it: reading, and what is refused in reading."""

from __future__ import annotations

import hashlib
import json

import matplotlib
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.datacard import card, markdown, write_card
from rankwise.errors import RankwiseError
from rankwise.rows import read_rows
from tests.test_data import alpaca, prepared, tiny_tokenizer, write

SECRETS = ("zebracrossing", "quixotic marmalade", "tell no one")
NASTY = "<script>alert(1)</script> | `rm` [x](javascript:y) ![i](z) *b*\n# head"


def secret_rows() -> list:
    odd = [
        {"instruction": SECRETS[0], "output": SECRETS[1], "input": SECRETS[2]},
        {"instruction": SECRETS[0].upper(), "output": SECRETS[1]},
        {"instruction": SECRETS[1], "output": 5},
        '{"instruction": "' + SECRETS[2],
        {"instruction": SECRETS[2] + " <|im_end|>", "output": SECRETS[1]},
        {"instruction": SECRETS[1] * 200, "output": SECRETS[0]},
    ]
    return [*alpaca(30), *odd]


def made(folder, name="nasty", source="file:rows", rows=None, **options):
    tokenizer = tiny_tokenizer()
    options = {"reserved": 5, "test": 4, "validation": 3, "train": 6, "max_length": 40} | options
    data = prepared(read_rows(write(folder, rows or secret_rows())), tokenizer, **options)
    facts = {"name": name, "source": source, "sha256": "ab" * 32, "max_length": options["max_length"]}
    return data, facts | {"tokenizer": tokenizer}


def test_a_card_accounts_for_every_row_and_token(tmp_path):
    data, named = made(tmp_path)
    facts = card(data, **named)
    assert (
        facts["rows"]["read"]
        == 36
        == facts["rows"]["kept"] + len(facts["duplicates"]) + len(facts["rejected"])
    )
    assert facts["duplicates"] == [[32, 31]]
    assert [line for line, _ in facts["rejected"]] == [33, 34, 35, 36]
    assert [split["rows"] for split in facts["splits"]] == [5, 4, 3, 19]
    assert facts["rows"]["with_input"] == 1 and facts["rows"]["share_with_input"] == round(1 / 31, 6)
    examples = [example for split in vars(data.splits).values() for example in split]
    assert sum(split["tokens"] for split in facts["splits"]) == sum(len(e.input_ids) for e in examples)
    lost = sum(example.cut_tokens for example in examples)
    assert facts["cut"]["tokens"] == lost > 0
    kept = sum(example.response_tokens for example in examples)
    assert facts["cut"]["share_of_response_tokens"] == round(lost / (lost + kept), 6)
    seen = {token for example in examples for token in example.input_ids.tolist()}
    assert facts["vocabulary"]["seen"] == len(seen) and facts["vocabulary"]["unknown_share"] is None
    stats = dict(facts["tokens"])
    assert stats["row, kept"]["max"] == 40 and stats["prompt"]["min"] == min(
        e.prompt_tokens for e in examples
    )
    for part in ("prompt", "response"):
        assert sum(facts["histogram"][part]) == 31
    fits = dict(zip(facts["fits"]["length"], facts["fits"]["share"], strict=True))
    assert fits[40] == pytest.approx(1 - facts["cut"]["share_of_rows"], abs=1e-5)


def test_a_card_holds_no_data_text(tmp_path):
    data, named = made(tmp_path)
    path = write_card(data, folder=tmp_path / "card", **named)
    for file in path.parent.iterdir():
        content = file.read_bytes().lower()
        assert not any(secret.encode() in content for secret in (*SECRETS, "colour", "is blue"))


def test_the_card_is_the_same_bytes_each_time_and_leaves_nothing_aside(tmp_path):
    data, named = made(tmp_path)
    folders = [tmp_path / "a", tmp_path / "b"]
    write_card(data, folder=folders[0], **named)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red"}):
        write_card(data, folder=folders[1], **named)
    write_card(data, folder=folders[1], **named)
    digests = [
        {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()} for folder in folders
    ]
    assert digests[0] == digests[1]
    assert sorted(digests[0]) == ["card.json", "card.md", "token_lengths.png"]
    assert (folders[0] / "token_lengths.png").read_bytes().startswith(b"\x89PNG")
    loaded = json.loads((folders[0] / "card.json").read_text(encoding="utf-8"))
    assert loaded == card(data, **named) and str(tmp_path) not in json.dumps(loaded)


def test_names_cannot_be_markup(tmp_path):
    data, named = made(tmp_path, name=NASTY, source=NASTY + "\u202e\x1b[0m")
    text = markdown(card(data, **named))
    assert "<script" not in text and "\u202e" not in text and "\x1b" not in text
    assert "\n# head" not in text
    row = next(line for line in text.splitlines() if line.startswith("| Source"))
    assert row.replace("\\|", "").count("|") == 3
    assert "\\`rm\\`" in row and "[x\\](javascript:y)" in row.replace("\\[", "[")  # no link without its `]`


def test_long_lists_are_cut_in_markdown_only(tmp_path):
    rows = [*alpaca(20), *({"text": 1} for _ in range(70)), *alpaca(20)[:9]]
    data, named = made(tmp_path, rows=rows)
    facts = card(data, **named)
    assert len(facts["rejected"]) == 70 and len(facts["duplicates"]) == 9
    text = markdown(facts)
    assert "| 70 |" in text and "| 71 |" not in text and "and 20 more; all are in card.json" in text


@pytest.mark.parametrize(("source", "said"), [
    ("pypi:llamafactory==0.9.5/data/alpaca_en_demo.json#sha256=bc", True), ("file:rows.json", False),
    ("pypi:llamafactory==0.9.5/data/c4_demo.jsonl", False),
])  # fmt: skip
def test_the_licence_of_alpaca_rows_is_said(tmp_path, source, said):
    data, named = made(tmp_path, source=source)
    assert ("for non-commercial use" in markdown(card(data, **named))) is said


def test_a_local_tokenizer_does_not_name_this_machine(tmp_path):
    data, named = made(tmp_path)
    for path, shown in (("/home/ann/models/smol", "smol"), ("org/model", "org/model"), ("", "Tokenizer")):
        named["tokenizer"].name_or_path = path
        assert shown in card(data, **named)["tokenizer"] and "ann" not in card(data, **named)["tokenizer"]


def test_a_card_of_plain_text_and_one_of_nothing(tmp_path):
    for rows, sizes in (([{"text": "The quick fox"}], {}), ([{"text": 1}], {})):
        sizes = dict.fromkeys(("reserved", "test", "validation", "train"), 0)
        data, named = made(tmp_path, rows=rows, **sizes)
        assert data.prompt_form == "raw"
        assert write_card(data, folder=tmp_path / "card", **named).is_file()


def test_errors_of_the_card(tmp_path):
    data, named = made(tmp_path)
    with pytest.raises(RankwiseError, match="cut at 40 tokens; got max_length 41"):
        card(data, **(named | {"max_length": 41}))
    (tmp_path / "taken").write_text("")
    with pytest.raises(RankwiseError, match="cannot be written"):
        write_card(data, folder=tmp_path / "taken", **named)


# --- reading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("row", "reason"), [
    ({"instruction": "a"}, "missing or null field: output; found: 'instruction'"),
    ({"instruction": "a", "output": None}, "missing or null field: output"),
    ({"prompt": "a", "input": "b"}, "missing or null field: response; found: 'prompt', 'input'"),
    ({"foo": 1}, "no known fields; found: 'foo'"), ({}, "no known fields; found: none"),
    ({"instruction": "a", "output": 3}, "output must be a string; found a number"),
    ({"instruction": "a", "output": "b", "input": []}, "input must be a string; found a list"),
    ({"instruction": " \n", "output": "b"}, "instruction is empty or only white space"),
    ({"instruction": "a", "output": "\t"}, "output is empty or only white space"),
    ({"text": ""}, "text is empty"),
    ([1], "must be an object with fields; found a list"), ("7", "with fields; found a number"),
    ('{"text": "a"', "not valid JSON: Expecting ',' delimiter at column 13"),
    pytest.param('{"text": ' + "[" * 200_000, "nested too deep", id="deep"),
    pytest.param('{"text": ' + "9" * 5000 + "}", "a number is too long", id="long number"),
    ('{"text": "a\\ud83d"}', "half of a surrogate pair (U+D83D at character 2)"),
    ({"messages": []}, "found an empty list"), ({"messages": "hi"}, "found a string"),
    ({"messages": [{"role": "user", "content": "a"}]}, "no assistant turn"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, "before any user turn"),
    ({"messages": [{"role": "bot", "content": "a"}]}, "messages[0].role must be one of system, user"),
    ({"messages": [{"role": "user"}]}, "missing or null field: messages[0].content"),
    ({"messages": [{"role": "user", "content": [1]}]}, "messages[0].content must be a string; found a list"),
    ({"messages": ["a"]}, "messages[0] must be an object"),
])  # fmt: skip
def test_each_rejection_has_its_line_and_reason(tmp_path, row, reason):
    read = read_rows(write(tmp_path, ["", {"text": "fine"}, row]))
    assert read.total == 2 and [r.line for r in read.rows] == [2]
    assert read.rejected[0].line == 3 and reason in read.rejected[0].reason


def test_reasons_hold_no_data(tmp_path):
    secret = "the secret sentence of this file"
    message = {"role": secret, "content": secret}
    rows = [{secret: 1}, {"messages": [message]}, {"instruction": secret}, '{"' + secret]
    rejected = read_rows(write(tmp_path, rows)).rejected
    assert len(rejected) == 4
    assert not any("secret" in reject.reason for reject in rejected)


@pytest.mark.parametrize("empty", ["", None])
def test_an_empty_or_null_input_is_none(tmp_path, empty):
    rows = [{"instruction": "a", "input": empty, "output": "b"}, {"instruction": "a", "output": "b"}]
    first, second = read_rows(write(tmp_path, rows)).rows
    assert first.context == "" and first.hash == second.hash and len(first.hash) == 64


def test_array_rows_know_their_lines(tmp_path):
    for text in ('[\n  {"text": "a"},\n\n {"text":\n "b"}, {"x": 1},\n  7\n]\n', '\ufeff\n[{"text": "a"}]'):
        path = tmp_path / "rows.json"
        path.write_text(text, encoding="utf-8")
        read = read_rows(path)
        assert [row.line for row in read.rows] == ([2, 4] if len(text) > 30 else [2])
        assert [reject.line for reject in read.rejected] == ([5, 6] if len(text) > 30 else [])


@pytest.mark.parametrize(("text", "where"), [
    ('[\n {"text": "a"},\n {"text" "b"}\n]', "line 3, column 10"),
    ('[{"text": "a"},]', "line 1, column 16: a comma"),
    ('[{"text": "a"}', "line 1, column 15: a comma or ]"), ('[{"text": "a"}] x', "column 17: text after"),
    pytest.param("[" * 200_000, "nested too deep", id="deep"),
    ("[]", "holds none"), ("[", "line 1, column 2"),
])  # fmt: skip
def test_a_broken_array_is_an_error_with_its_place(tmp_path, text, where):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(RankwiseError) as error:
        read_rows(path)
    assert where in str(error.value)


@pytest.mark.parametrize(("data", "text"), [
    (b"", "is empty"), (b" \n", "is empty"), (b"\xef\xbb\xbf\n", "only white space"),
    (b'{"text": "a\x00b"}', "NUL at byte offset 11"), (b'{"text": "\xff"}', "byte 0xff at byte offset 10"),
    ('{"text": "a"}'.encode("utf-16"), "UTF-16"), (b"id,text\n1,a\n", "starts with 'i'"),
    (b"PAR1oops", "Parquet"),
])  # fmt: skip
def test_a_file_that_cannot_be_used_is_an_error(tmp_path, data, text):
    path = tmp_path / "rows.data"
    path.write_bytes(data)
    with pytest.raises(RankwiseError, match=text):
        read_rows(path)
    with pytest.raises(RankwiseError, match="cannot be read"):
        read_rows(tmp_path / "missing.json")
    with pytest.raises(RankwiseError, match="cannot be read"):
        read_rows(tmp_path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.data", "rows"])
def test_lines_are_found_by_content_and_bom_is_accepted(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b'\xef\xbb\xbf{"text": "a\xe2\x80\xa8b"}\r\n{"text": "c"}\r\n')
    assert [(row.line, row.response) for row in read_rows(path).rows] == [(1, "a\u2028b"), (2, "c")]
    path.write_text('{\n "text": "a"\n}')
    if not name.endswith("l"):
        assert [row.line for row in read_rows(path).rows] == [1]
    path.write_text('[\n{"text": "a"}]')
    assert [row.line for row in read_rows(path).rows] == [2]


def test_text_files_are_paragraphs_or_lines(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_bytes(b"\r\none\r\nstill one\r\n \r\n\r\ntwo\r\n\r\n")
    assert [(r.line, r.response, r.form) for r in read_rows(path).rows] == [
        (2, "one\nstill one", "text"), (6, "two", "text")
    ]  # fmt: skip
    path.write_text("\none\ntwo\n")
    assert [(r.line, r.response) for r in read_rows(path).rows] == [(2, "one"), (3, "two")]


def test_parquet_rows_equal_json_rows(tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [*alpaca(3), {"instruction": "z", "output": None}, {"messages": turns}]
    path = tmp_path / "rows.parquet"
    columns = dict.fromkeys(("instruction", "output", "messages"))
    pq.write_table(pa.Table.from_pylist([columns | row for row in rows]), path)
    read, lines = read_rows(path), read_rows(write(tmp_path, rows))
    assert [row.hash for row in read.rows] == [row.hash for row in lines.rows]
    assert [row.line for row in read.rows] == [1, 2, 3, 5]
    assert [reject.line for reject in read.rejected] == [4]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(RankwiseError, match=r"Parquet file .* cannot be read"):
        read_rows(path)


@given(st.binary(max_size=80) | st.text(max_size=60).map(lambda s: s.encode("utf-8", "surrogatepass")))
@settings(max_examples=150, deadline=None)
def test_no_file_ends_in_a_traceback(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("any")
    for name in ("a.json", "a.jsonl", "a.txt", "a.parquet", "a"):
        (folder / name).write_bytes(data)
        try:
            read = read_rows(folder / name)
        except RankwiseError:
            continue
        assert read.total == len(read.rows) + len(read.rejected)
