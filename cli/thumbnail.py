"""A small picture in the terminal: by kitty's, iTerm2's or sixel's graphics, or as half blocks of text."""

import base64
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from PIL import Image

Kind = Literal["kitty", "iterm", "sixel", "blocks", "none"]
KINDS = ("auto", "kitty", "iterm", "sixel", "blocks", "none")
COLUMNS, ROWS = 32, 12  # cells at most
CELL = 10, 20  # pixels that a cell is taken to have, where the terminal scales nothing


def find_kind(environment: Mapping[str, str]) -> Kind:
    """What the terminal of an environment can show. A multiplexer passes no graphics on, only text."""
    term, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    if term in ("", "dumb") or environment.get("NO_COLOR"):
        return "none"
    if not ("TMUX" in environment or "STY" in environment or term.startswith(("screen", "tmux"))):
        if program in ("iTerm.app", "WezTerm") or environment.get("LC_TERMINAL") == "iTerm2":
            return "iterm"
        if "KITTY_WINDOW_ID" in environment or term in ("xterm-kitty", "xterm-ghostty") or program == "ghostty":
            return "kitty"
        if term.startswith(("foot", "mlterm", "yaft")) or "sixel" in term:
            return "sixel"
    return "blocks" if _true_colour(environment) or "256" in term else "none"


def draw_thumbnail(image: "Image.Image", kind: Kind, environment: Mapping[str, str], columns: int = COLUMNS) -> str:
    """What shows an image when it is written to the terminal, its last line ended.

    Args:
        image: RGB.
        columns: cells across at most.
    """
    across, down = fit(image.width, image.height, columns)
    if kind == "blocks":
        return _blocks(image, across, down, true_colour=_true_colour(environment))
    if kind == "none":
        return ""
    small = image.resize((across * CELL[0], down * CELL[1]))
    if kind == "sixel":
        return f"{_sixel(small)}\n"
    png = io.BytesIO()
    small.save(png, "PNG")
    return _kitty(png.getvalue(), across, down) if kind == "kitty" else _iterm(png.getvalue(), across, down)


def fit(width: int, height: int, columns: int = COLUMNS) -> tuple[int, int]:
    """Cells across and down for an image of some size; a cell is twice as high as wide."""
    scale = min(columns / width, 2 * ROWS / height)
    return max(1, min(columns, round(width * scale))), max(1, min(ROWS, round(height * scale / 2)))


def _true_colour(environment: Mapping[str, str]) -> bool:
    return environment.get("COLORTERM", "") in ("truecolor", "24bit")


def _kitty(png: bytes, across: int, down: int) -> str:
    """sw.kovidgoyal.net/kitty/graphics-protocol: chunks of 4096 characters; q=2, or the terminal would answer."""
    data = base64.b64encode(png).decode()
    chunks = [data[start : start + 4096] for start in range(0, len(data), 4096)]
    keys = [f"a=T,f=100,c={across},r={down},q=2,"] + [""] * (len(chunks) - 1)
    more = [1] * (len(chunks) - 1) + [0]
    return "".join(f"\x1b_G{k}m={m};{c}\x1b\\" for k, m, c in zip(keys, more, chunks, strict=True)) + "\n"


def _iterm(png: bytes, across: int, down: int) -> str:
    """iterm2.com/documentation-images.html"""
    data = base64.b64encode(png).decode()
    return f"\x1b]1337;File=inline=1;size={len(png)};width={across};height={down}:{data}\x07\n"


def _sixel(image: "Image.Image", colours: int = 64) -> str:
    """vt100.net/docs/vt3xx-gp/chapter14.html: bands of six rows, and in a band a run of characters for each colour."""
    import numpy as np

    indexed = image.quantize(colours)
    palette = np.array(indexed.getpalette(), dtype=np.int64).reshape(-1, 3) * 100 // 255
    pixels = np.array(indexed)
    out = [f'\x1bPq"1;1;{image.width};{image.height}']
    out += [f"#{number};2;{r};{g};{b}" for number, (r, g, b) in enumerate(palette.tolist())]
    for top in range(0, image.height, 6):
        band = pixels[top : top + 6]
        weights = (1 << np.arange(len(band)))[:, None]
        for number in np.unique(band).tolist():
            bits = ((band == number) * weights).sum(axis=0) + 63
            out += [f"#{number}", bytes(bits.astype(np.uint8)).decode(), "$"]
        out[-1] = "-"
    return "".join(out) + "\x1b\\"


def _blocks(image: "Image.Image", across: int, down: int, *, true_colour: bool) -> str:
    """Two pixels a cell: the upper half block's colour and the colour behind it."""
    import numpy as np

    pixels = np.array(image.resize((across, 2 * down))).reshape(down, 2, across, 3)

    def colour(rgb: list[int]) -> str:
        if true_colour:
            return "2;" + ";".join(map(str, rgb))
        red, green, blue = (round(value / 51) for value in rgb)  # the cube of 6 x 6 x 6 among 256 colours
        return f"5;{16 + 36 * red + 6 * green + blue}"

    return "".join(
        "".join(f"\x1b[38;{colour(top)};48;{colour(bottom)}m▀" for top, bottom in zip(*row, strict=True)) + "\x1b[0m\n"
        for row in pixels.tolist()
    )
