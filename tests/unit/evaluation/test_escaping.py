"""Whatever a user or a model wrote, the report shows it as that text, and nothing else comes of it."""

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from finetune_trainer.evaluation.escaping import WIDTH, block, code, inline

READER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
HOSTILE = [
    "<script>alert(1)</script>",
    '<img src="https://evil.example/x" onerror=alert(1)>',
    "![x](https://evil.example/pixel.png)",
    "[click](javascript:alert(1))",
    "https://evil.example and www.evil.example and <https://evil.example>",
    "a | b | c\n| --- | --- |\n| d | e |",
    "```\nend of block\n```\n# a heading",
    "~~~\n`````text\n",
    "**bold** __bold__ ~~gone~~ `code` *it* _it_",
    "&lt;b&gt; &#60;b&#62; &amp;",
    "line one\r\nline two\rline three\u2028line four",
    "\x1b[31mred\x1b[0m \u202eturned around\u202c",
    "\\",
    "a\\|b \\`c\\`",
    "$x^2$ and $$y$$",
    "[^1]: a footnote",
    "trailing `",
    "<!-- a comment",
    "]]> <![CDATA[ x",
]
words = st.one_of(st.sampled_from(HOSTILE), st.text(max_size=80), st.text(alphabet="`~<>|\\[]()!*_&#;:/ \n\t-+=ab1.", max_size=60))


def text_of(markdown: str) -> str:
    """What a reader sees of a paragraph. Fails where there is more to it than text."""
    (opening, content, closing) = READER.parse(markdown)
    assert (opening.type, content.type, closing.type) == ("paragraph_open", "inline", "paragraph_close")
    assert {child.type for child in content.children or []} <= {"text", "text_special", "code_inline"}
    return "".join(child.content for child in content.children or [])


def as_one_line(text: str) -> str:
    return " ".join(re.sub(r"[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u202a-\u202e\u2066-\u2069]", "\ufffd", text).split())


@settings(deadline=None)
@given(words)
def test_text_within_a_line_is_read_as_it_was(text: str) -> None:
    assert text_of(f"x {inline(text)} y").split() == ["x", *as_one_line(text).split(), "y"]


@settings(deadline=None)
@given(words)
def test_a_name_as_code_is_read_as_it_was(text: str) -> None:
    assert text_of(f"x {code(text)} y").split() == ["x", *as_one_line(text).split(), "y"]


@settings(deadline=None)
@given(words, words)
def test_a_cell_stays_a_cell(first: str, second: str) -> None:
    tokens = READER.parse(f"| a | b |\n| --- | --- |\n| x {inline(first)} | x {code(second)} |")
    cells = [token for before, token in itertools.pairwise(tokens) if before.type == "td_open"]
    assert [token.content.split()[0] for token in cells] == ["x", "x"]
    assert {child.type for token in cells for child in token.children or []} <= {"text", "text_special", "code_inline"}


@settings(deadline=None)
@given(words)
def test_a_block_holds_the_text_and_ends_where_it_ends(text: str) -> None:
    tokens = READER.parse(f"before\n\n{block(text)}\n\nafter")
    assert [token.type for token in tokens if token.type != "inline"] == [
        "paragraph_open",
        "paragraph_close",
        "fence",
        "paragraph_open",
        "paragraph_close",
    ]
    (shown,) = [token.content for token in tokens if token.type == "fence"]
    kept = re.sub(r"[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u202a-\u202e\u2066-\u2069]", "\ufffd", text)
    assert re.sub(r"\s", "", shown) == re.sub(r"\s", "", kept)


def test_no_address_is_made_a_link_of() -> None:
    """GitHub makes links of bare addresses, which the reader of these tests does not: what it looks for must not be there."""
    shown = inline("see https://evil.example, WWW.evil.example, ftp://evil.example and a@evil.example")
    assert not re.search(r"://|www\.|@", shown, re.IGNORECASE)


def test_long_texts_are_cut_and_long_lines_broken() -> None:
    assert inline("a" * 300, 10) == "aaaaaaaaa…"
    lines = block("word " * 100 + "x" * 500).splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert "".join(lines[1:-1]).replace(" ", "") == "word" * 100 + "x" * 500
    assert block("ab" * 5000, 100).splitlines()[-2].endswith("…")


def test_line_breaks_stay_in_a_block() -> None:
    assert block("one\r\n\r\n  two\rthree") == "```text\none\n\n  two\nthree\n```"


@pytest.mark.parametrize("secret", ["hf_abcdefghijklmnop", "Authorization: Bearer abc.def"])
def test_what_looks_like_a_secret_is_not_shown(secret: str) -> None:
    for shown in (inline(secret), code(secret), block(secret)):
        assert secret.rsplit(maxsplit=1)[-1] not in shown
