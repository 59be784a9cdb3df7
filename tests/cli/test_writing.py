"""Answers on stdout: nothing in them steers the terminal, and nothing in them is lost."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_vlm_mini.cli.writing import Answer, MarkdownAnswer, block_end, neutralize


@given(st.text())
def test_no_control_character_comes_through(text):
    shown = neutralize(text)
    assert not [char for char in shown if (ord(char) < 32 and char not in "\n\t") or 0x7F <= ord(char) < 0xA0]
    harmless = "".join(char for char in text if char.isprintable() or char in "\n\t")
    assert neutralize(harmless) == harmless


def test_sequences_are_shown():
    assert neutralize("\x1b]0;title\x07 \x9b2J a\rb\r\n") == "␛]0;title␇ \ufffd2J ab\n"
    assert (
        neutralize("[/INST] x[i] **b** <image> \\n {0} ✓ 你\u200d") == "[/INST] x[i] **b** <image> \\n {0} ✓ 你\u200d"
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("out", "shown"), [(Terminal, "[/INST]␛[2J"), (io.StringIO, "[/INST]\x1b[2J")])
def test_a_file_gets_exactly_what_was_said(monkeypatch, out, shown):
    monkeypatch.setattr("sys.stdout", out())
    with Answer() as answer:
        answer.write("[/INST]")
        answer.write("\x1b[2J")
    import sys

    assert sys.stdout.getvalue() == shown


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("", None),
        ("one\ntwo", None),
        ("one\n", None),
        ("one\n\n", 5),
        ("\none\n\ntwo", 6),
        ("```\na\n\nb\n", None),
        ("```\na\n\nb\n```\n\nc", 14),
        ("\n\n", None),
    ],
)
def test_blocks_of_markdown(text, end):
    assert block_end(text) == end


def test_markdown_comes_block_by_block(monkeypatch):
    out = Terminal()
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setenv("COLUMNS", "40")
    with MarkdownAnswer(colour=False) as answer:
        for piece in "# A title\n\n- **one** [/INST] x[i]\n- [two](http://host)\n\nlast\x1b[2J":
            answer.write(piece)
        assert "x[i]" in out.getvalue() and "last" not in out.getvalue()
    text = out.getvalue()
    assert "**" not in text and "# A" not in text and "[/INST] x[i]" in text and "last␛[2J" in text
    assert "\x1b]8" not in text
