"""Small pictures in a terminal: which way it can show, and what is sent."""

import base64
import io
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mlx_vlm_mini.cli.thumbnail import CELL, COLUMNS, ROWS, draw_thumbnail, find_kind, fit

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("environment", "kind"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm"),
        ({"TERM": "xterm-256color", "LC_TERMINAL": "iTerm2"}, "iterm"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, "iterm"),
        ({"TERM": "foot"}, "sixel"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "Apple_Terminal"}, "blocks"),
        ({"TERM": "xterm", "COLORTERM": "truecolor"}, "blocks"),
        ({"TERM": "tmux-256color", "TMUX": "x", "TERM_PROGRAM": "iTerm.app", "KITTY_WINDOW_ID": "1"}, "blocks"),
        ({"TERM": "screen.xterm-256color", "LC_TERMINAL": "iTerm2"}, "blocks"),
        ({"TERM": "vt100"}, "none"),
        ({"TERM": "dumb", "COLORTERM": "truecolor"}, "none"),
        ({"TERM": "xterm-kitty", "NO_COLOR": "1"}, "none"),
        ({}, "none"),
    ],
)
def test_what_a_terminal_can_show(environment, kind):
    assert find_kind(environment) == kind


@given(st.integers(1, 100000), st.integers(1, 100000), st.integers(1, COLUMNS))
def test_size_in_cells(width, height, columns):
    across, down = fit(width, height, columns)
    assert 1 <= across <= columns and 1 <= down <= ROWS
    if 2 < across < columns and 2 < down < ROWS:
        pytest.fail("neither side is used up")


def test_proportions_are_kept():
    assert fit(640, 480) == (32, 12) and fit(480, 640) == (18, 12) and fit(1000, 100) == (32, 2)


def test_half_blocks_are_the_pixels():
    image = Image.new("RGB", (4, 4), (255, 0, 0))
    image.paste((0, 0, 255), (0, 2, 4, 4))
    lines = draw_thumbnail(image, "blocks", {"COLORTERM": "truecolor"}, columns=4).splitlines()
    assert lines == [
        "\x1b[38;2;255;0;0;48;2;255;0;0m▀" * 4 + "\x1b[0m",
        "\x1b[38;2;0;0;255;48;2;0;0;255m▀" * 4 + "\x1b[0m",
    ]
    assert draw_thumbnail(image, "blocks", {}, columns=4).startswith("\x1b[38;5;196;48;5;196m▀")
    assert draw_thumbnail(image, "none", {}) == ""


def test_kitty_gets_a_png_in_chunks():
    sent = draw_thumbnail(NOISE, "kitty", {})
    chunks = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", sent)
    assert "".join(f"\x1b_G{keys};{data}\x1b\\" for keys, data in chunks) + "\n" == sent
    assert chunks[0][0] == "a=T,f=100,c=32,r=11,q=2,m=1" and {keys for keys, _ in chunks[1:]} == {"m=1", "m=0"}
    assert chunks[-1][0] == "m=0" and all(len(data) <= 4096 for _, data in chunks)
    image = Image.open(io.BytesIO(base64.b64decode("".join(data for _, data in chunks))))
    assert image.size == (32 * CELL[0], 11 * CELL[1])


def test_iterm_gets_a_png():
    sent = re.fullmatch(
        r"\x1b\]1337;File=inline=1;size=(\d+);width=32;height=11:(.*)\x07\n", draw_thumbnail(NOISE, "iterm", {})
    )
    assert sent is not None
    png = base64.b64decode(sent[2])
    assert len(png) == int(sent[1]) and Image.open(io.BytesIO(png)).format == "PNG"


def decode_sixel(text: str) -> np.ndarray:
    """Read sixels as a terminal does."""
    match = re.fullmatch(r'\x1bPq"1;1;(\d+);(\d+)(.*)\x1b\\\n', text)
    assert match is not None
    width, height = int(match[1]), int(match[2])
    canvas = np.full((height + 6, width, 3), -1)
    palette, colour, x, top = {}, 0, 0, 0
    for token in re.findall(r"#\d+(?:;2;\d+;\d+;\d+)?|[$\-?-~]", match[3]):
        if token.startswith("#"):
            number, *rgb = token[1:].split(";")
            colour = int(number)
            if rgb:
                palette[colour] = [int(value) for value in rgb[1:]]
        elif token == "$":
            x = 0
        elif token == "-":
            x, top = 0, top + 6
        else:
            for bit in range(6):
                if (ord(token) - 63) >> bit & 1:
                    canvas[top + bit, x] = palette[colour]
            x += 1
    return canvas[:height]


def test_sixels_are_the_picture():
    image = Image.new("RGB", (64, 64), (255, 0, 0))
    image.paste((0, 255, 255), (32, 0, 64, 64))
    canvas = decode_sixel(draw_thumbnail(image, "sixel", {}, columns=8))
    assert canvas.shape == (4 * CELL[1], 8 * CELL[0], 3)
    assert (canvas[:, :30] == [100, 0, 0]).all() and (canvas[:, 50:] == [0, 100, 100]).all() and (canvas >= 0).all()
