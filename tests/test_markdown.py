"""Text that Markdown shows as it is, judged by a Markdown parser: the text is seen, and nothing acts."""

from __future__ import annotations

import re

import pytest
from markdown_it import MarkdownIt

from rankwise.markdown import code, line, prose

HOSTILE = "x ![y](http://evil.example/i.png) <script>a()</script> `z` | *b* & \\\n\n# head\u202e"
WORDS = [
    "http://a.example", "HTTPS://a.example/b_c", "see www.a.example", "mail a@b.example",
    "mailto:a@b.example",
    "a_b __c__", "_a_", "*x*", "<b>", "&amp;", "[a](b)", "![a](b)", "a\\`b", "~~a~~", "a|b", "$x$", "a#b",
    "uniform@r1 is *not* <shown>, see https://a.example/b_c: (www.a.example) 95 % [a](b) `c`.", HOSTILE,
]  # fmt: skip


@pytest.mark.parametrize("text", WORDS)
def test_prose_reads_as_it_was_written_and_does_nothing(text: str):
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    children = parser.parse(f"a {prose(text)} b")[1].children or []
    assert {child.type for child in children} <= {"text", "text_special", "code_inline"}
    assert "".join(child.content for child in children) == f"a {line(text)} b"
    bare = "".join(child.content for child in children if child.type != "code_inline")
    assert not re.search(r"://|www\.|mailto:|@", bare, re.IGNORECASE), "GitHub would make a link of it"


@pytest.mark.parametrize("text", [HOSTILE, "a|b", "_x_ | y"])
def test_prose_and_code_stay_in_their_cell(text: str):
    for shown in (prose(text), code(text)):
        tokens = MarkdownIt("commonmark").enable("table").parse(f"| h | i |\n|---|---|\n| {shown} | end |")
        cells = [token.content for token in tokens if token.type == "inline"]
        assert len(cells) == 4 and cells[3] == "end"


@pytest.mark.parametrize("text", ["`", "``", "a`b", "` a", "", "  ", "a\nb", HOSTILE, "x" * 1000])
def test_a_code_span_holds_any_text(text: str):
    children = MarkdownIt("commonmark").parse(f"a {code(text)} b")[1].children or []
    assert [child.type for child in children] == ["text", "code_inline", "text"]
    assert len(children[1].content) <= 301
    if text in ("`", "``", "a`b", "` a"):
        assert children[1].content.strip() == text.strip()


def test_no_line_ends_and_no_direction_turns():
    assert line("one\r\ntwo\u2028three\x1b[31m") == "one two three [31m"
    assert line("a\u202eb\u200b") == "a\ufffdb\ufffd"
    assert prose("a_b, x.y (2 - 1)") == "a_b, x.y (2 - 1)"  # readable in the source
