"""A picture of a real conversation in a terminal: the program runs in a pseudo-terminal, is typed to, and is drawn.

    pip install pyte
    python docs/make_screenshot.py MODEL docs/chat.png "What is in @photo.jpg?" "/retry"

Each line is typed when the prompt is there. Needs a monospaced font with half blocks, DejaVu Sans Mono by default.
"""

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import click
import pyte
from PIL import Image, ImageDraw, ImageFont

PROGRAM = Path(sys.executable).with_name("mlx-vlm-mini")
READY = b"\x1b[?2004h"  # the editor asks for bracketed paste: it waits for a line
BACKGROUND, TEXT = "#1b1d23", "#d7dae0"
NAMED = {
    "black": "#3b4048", "red": "#e06c75", "green": "#98c379", "brown": "#e5c07b", "blue": "#61afef",
    "magenta": "#c678dd", "cyan": "#56b6c2", "white": "#d7dae0",
}  # fmt: skip
SCALE = 2  # the picture has twice the pixels that it is shown with
FONT_SIZE = 13 * SCALE


def record(command: list[str], lines: tuple[str, ...], folder: Path, screen: pyte.Screen) -> None:
    """Run a command in a terminal of the screen's size, type lines to it, and let the screen show what comes."""
    master, slave = pty.openpty()
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", screen.lines, screen.columns, 0, 0))
    screen.write_process_input = lambda text: os.write(master, text.encode())  # where the cursor is, if asked
    stream = pyte.ByteStream(screen)
    environment = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor", "XDG_STATE_HOME": os.devnull}
    for name in ("NO_COLOR", "TERM_PROGRAM", "LC_TERMINAL", "KITTY_WINDOW_ID", "TMUX", "STY"):
        environment.pop(name, None)
    process = subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, cwd=folder, env=environment, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(slave)

    def follow(until: bytes, seconds: float) -> bool:
        seen, end = b"", time.monotonic() + seconds
        while time.monotonic() < end:
            if not select.select([master], [], [], 0.1)[0]:
                continue
            try:
                data = os.read(master, 4096)
            except OSError:  # Linux: the other side is closed
                raise click.ClickException("the program ended:\n" + "\n".join(screen.display).rstrip()) from None
            seen += data
            stream.feed(data)
            if until in seen:
                return True
        return False

    try:
        for line in lines:
            if not follow(READY, 600):
                raise click.ClickException("the prompt did not come within 10 minutes")
            follow(b"\0", 0.3)
            os.write(master, line.encode() + b"\r")
        follow(READY, 600)
        follow(b"\0", 0.3)
    finally:
        process.terminate()
        process.wait()
        os.close(master)


def draw(screen: pyte.Screen, font_file: str) -> Image.Image:
    """The screen's lines, as far as something stands in them."""
    font = ImageFont.truetype(font_file, FONT_SIZE)
    bold = ImageFont.truetype(font_file.replace(".ttf", "-Bold.ttf"), FONT_SIZE)
    width, height = round(font.getlength("M")), round(FONT_SIZE * 1.35)
    height += height % 2  # a half block is half a line
    used = max((row for row, line in enumerate(screen.display) if line.strip()), default=0) + 1
    margin = FONT_SIZE
    image = Image.new("RGB", (screen.columns * width + 2 * margin, used * height + 2 * margin), BACKGROUND)
    canvas = ImageDraw.Draw(image)
    for row in range(used):
        for column in range(screen.columns):
            cell = screen.buffer[row][column]
            left, top = margin + column * width, margin + row * height
            front, back = _colour(cell.fg, TEXT), _colour(cell.bg, BACKGROUND)
            if cell.data == "▀":
                canvas.rectangle((left, top, left + width - 1, top + height // 2 - 1), front)
                canvas.rectangle((left, top + height // 2, left + width - 1, top + height - 1), back)
                continue
            if back != BACKGROUND:
                canvas.rectangle((left, top, left + width - 1, top + height - 1), back)
            if cell.data.strip():
                canvas.text((left, top + height * 0.12), cell.data, front, bold if cell.bold else font)
    return image


def _colour(name: str, default: str) -> str:
    return default if name == "default" else NAMED.get(name.removeprefix("bright"), f"#{name}")


class Dimmed(pyte.Screen):
    """pyte knows no faint text, which our notes are."""

    def select_graphic_rendition(self, *attributes: int, **options: object) -> None:
        super().select_graphic_rendition(*((38, 2, 127, 132, 142) if attributes == (2,) else attributes), **options)


@click.command()
@click.argument("model")
@click.argument("destination", type=click.Path(path_type=Path))
@click.argument("lines", nargs=-1, required=True)
@click.option("--folder", type=click.Path(file_okay=False, path_type=Path), default=Path(), help="Where it is run.")
@click.option("--options", default="", help="More of the command, --max-tokens 50 for one.")
@click.option("--columns", default=88, show_default=True)
@click.option("--font", default="/usr/share/fonts/truetype/dejavu/DejaVuSansMono.ttf", show_default=True)
def main(
    model: str, destination: Path, lines: tuple[str, ...], folder: Path, options: str, columns: int, font: str
) -> None:
    """Talk to MODEL line by line and draw the terminal into the PNG file DESTINATION."""
    screen = Dimmed(columns, 200)
    screen.set_mode(pyte.modes.LNM)
    typed = " ".join(["mlx-vlm-mini chat", model, *options.split()])
    pyte.Stream(screen).feed(f"$ {typed}\n")
    screen.reset_mode(pyte.modes.LNM)
    record([str(PROGRAM), "chat", model, *options.split()], lines, folder, screen)
    for row in screen.buffer.values():  # the prompt that waits at the end
        if "".join(row[column].data for column in range(columns)).strip() == ">":
            row.clear()
    draw(screen, font).quantize(128).save(destination, optimize=True)
    click.echo(f"{destination}: {destination.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
