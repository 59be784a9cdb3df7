"""A PDF -> its pages as RGB images on white, rendered by PDFium in a process of its own, within limits."""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from PIL import Image

from mlx_vlm_mini.errors import ImageError

from .names import find_file

DPI = 144  # twice PDF's own 72: small print is legible, and a page has 2 million pixels, as a screenshot
MOST_PAGES = 20  # of one prompt
MOST_PIXELS = 24_000_000  # of a page; one that would have more is rendered smaller
SECONDS = 20  # of a document's computing
MOST_BYTES = 4 * 2**30  # of address space, most of which is never touched
_NAME = re.compile(r"(?s)(.+)\[([\d\s,-]*)\]")
_RANGE = re.compile(r"\s*(\d{1,6})\s*(?:(-)\s*(\d{1,6})?)?\s*")


def is_pdf(data: bytes) -> bool:
    """By its header, which may stand behind a few bytes of something else."""
    return b"%PDF-" in data[:1024] and not data.startswith((b"\xff\xd8", b"\x89PNG", b"GIF8", b"RIFF", b"II*", b"MM"))


def split_name(name: str) -> tuple[str, str | None]:
    """`report.pdf[2-5]` as `report.pdf` and `2-5`; other names, and files that are called so, with None."""
    found = _NAME.fullmatch(name)
    if found is None or name.startswith("data:"):
        return name, None
    file = found[1]
    if file.lower().endswith(".pdf") and not _is_file(name):
        return file, found[2]
    return (file, found[2]) if _is_file(file) and not _is_file(name) else (name, None)


def choose_pages(pages: str | None, count: int, name: str, most: int = MOST_PAGES) -> list[int]:
    """Numbers of pages that `2`, `2-5`, `2-` or `1,4-6` mean, in that order; all where it is None.

    Raises:
        ImageError: that is no choice of pages, or names some that are not there, or too many.
    """
    if not count:
        raise ImageError(f"{name} has no pages")
    chosen: list[int] = []
    for part in ["1-"] if pages is None else pages.split(","):
        found = _RANGE.fullmatch(part)
        if found is None:
            raise ImageError(f"{name}[{pages}] is no choice of pages: write {name}[2], [2-5], [2-] or [1,4-6]")
        first = int(found[1])
        last = first if found[2] is None else count if found[3] is None else int(found[3])
        if not 1 <= first <= last <= count:
            raise ImageError(f"{name} has {count} page{'s' * (count > 1)}, and {part.strip()} is none of them")
        chosen += range(first, last + 1)
        if len(chosen) > most:
            total = count if pages is None else f"more than {most}"
            raise ImageError(
                f"{name}: {total} pages, and the limit is {most}: choose some, as in {name}[1-{min(most, count)}], or "
                "raise --max-pages (most_pages)"
            )
    return chosen


def count_pages(data: bytes, name: str) -> int:
    """How many pages a PDF has.

    Raises:
        ImageError: it is broken, or has a password.
    """
    with _Child(data, name, DPI) as child:
        return child.count


def render_pages(
    data: bytes, name: str, pages: str | None = None, *, dpi: int = DPI, most: int = MOST_PAGES
) -> list[tuple[int, Image.Image]]:
    """Pages with their numbers, as RGB on white; `pages` and `most` as `choose_pages` takes them.

    Args:
        dpi: pixels an inch, from 1 to 1200; a page that would have more than MOST_PIXELS has fewer.

    Raises:
        ImageError: they are not there, or cannot be rendered, or not in time.
    """
    if not 1 <= dpi <= 1200:
        raise ImageError(f"pages have from 1 to 1200 dpi, not {dpi}")
    with _Child(data, name, dpi) as child:
        return [*child.render(choose_pages(pages, child.count, name, most))]


class _Child:
    """PDFium at work on a document, in a process of its own.

    Attributes:
        count: of its pages.
    """

    def __init__(self, data: bytes, name: str, dpi: int) -> None:
        self._data, self._name, self._dpi = data, name, dpi

    def __enter__(self) -> "_Child":
        limits = [str(limit) for limit in (self._dpi, MOST_PIXELS, SECONDS, MOST_BYTES)]
        command = [sys.executable, "-P", str(Path(__file__).with_name("pdf_child.py")), *limits]
        try:
            self._child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        except OSError as error:
            raise ImageError(f"{self._name} is a PDF, and PDFium does not start: {error.strerror or error}") from None
        self._clock = threading.Timer(4 * SECONDS, self._child.kill)  # waiting, too, ends
        self._clock.daemon = True
        self._clock.start()
        try:
            self._write(len(self._data).to_bytes(8, "big") + self._data)
            self.count = int(self._answer()["pages"])
        except BaseException:
            self.__exit__()
            raise
        return self

    def render(self, pages: Sequence[int]) -> Iterator[tuple[int, Image.Image]]:
        self._write(json.dumps([*pages]).encode() + b"\n")
        for number in pages:
            width, height = self._answer()["size"]
            if not (0 < width * height <= 2 * MOST_PIXELS):  # it may be another's by now
                raise ImageError(_stopped(self._name))
            pixels = self._from.read(3 * width * height)
            if len(pixels) < 3 * width * height:
                raise ImageError(_stopped(self._name))
            yield number, Image.frombytes("RGB", (width, height), pixels)

    def __exit__(self, *_: object) -> None:
        self._clock.cancel()
        self._child.kill()
        self._child.wait()
        with suppress(OSError):
            self._to.close()
        self._from.close()

    @property
    def _to(self) -> IO[bytes]:
        assert self._child.stdin is not None
        return self._child.stdin

    @property
    def _from(self) -> IO[bytes]:
        assert self._child.stdout is not None
        return self._child.stdout

    def _write(self, data: bytes) -> None:
        with suppress(OSError):  # it has ended: what it answered says why
            self._to.write(data)
            self._to.flush()

    def _answer(self) -> dict[str, Any]:
        line = self._from.readline(1000)
        if not line.endswith(b"\n"):
            raise ImageError(_stopped(self._name))
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ImageError(_said(answer, self._name))
        return answer


def _said(answer: dict[str, Any], name: str) -> str:
    if answer["error"] == "locked":
        return f"{name} has a password: save a copy without one, and give that"
    where = f"page {answer['page']} of {name}" if "page" in answer else name
    return f"{where} is broken, or no PDF that PDFium can read: save it anew"


def _stopped(name: str) -> str:
    return (
        f"{name} cannot be rendered: PDFium failed, or needed above {SECONDS} s or {MOST_BYTES // 2**30} GiB; choose "
        f"fewer pages, as in {name}[1], or save it anew"
    )


def _is_file(name: str) -> bool:
    return os.path.isfile(find_file(name))  # noqa: PTH113 - never raises
