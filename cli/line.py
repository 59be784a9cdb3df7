"""A typed line -> text and pictures, each picture at the place where it was named."""

import os
import re
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlx_vlm_mini.images.source import Picture

SUFFIXES = frozenset([
    ".avif", ".bmp", ".gif", ".heic", ".heif", ".hif", ".ico", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png",
    ".pnm", ".ppm", ".qoi", ".tga", ".tif", ".tiff", ".webp",
])  # fmt: skip

# Spaces are ASCII's alone: macOS names its screenshots with U+202F, which no terminal escapes when they are dragged.
_QUOTED = r"\"[^\"\n]+\"|'[^'\n]+'"
_WORD = r"(?:\\.|[^ \t\r\n\\])+"
_CANDIDATE = re.compile(
    rf"(?<![\w.%+\-/\\@])@(?P<named>{_QUOTED}|{_WORD})"  # not in the middle of a word: bob@example.org
    rf"|(?:(?<=[ \t\r\n])|\A)(?P<dragged>{_QUOTED}|(?:file://|~?/){_WORD})(?=[ \t\r\n]|\Z)"
)
_PAGES = re.compile(r"(?i).*?\.pdf\[[\d,-]*\]")
_AFTER_WORD = ".,;:!?)]}>'\"\u201d\u2019\u00bb\u2026"


@dataclass(frozen=True)
class Mention:
    """A picture that a line names.

    Attributes:
        source: its path or http(s) URL.
        typed: how the line says it.
    """

    source: str
    typed: str


def parse_line(text: str, is_file: Callable[[str], bool] = os.path.isfile) -> list[str | Mention]:
    """Cut a line where pictures stand: `@photo.jpg`, `@"a b.jpg"`, `@a\\ b.jpg`, `@https://host/a.png`, and paths that
    a terminal writes when a file is dragged into it.

    After `@` stands a file that is there, or a name that ends as pictures' names do, be it there or not; another
    `@word` is text. A dragged path is absolute, stands by itself between spaces, and is a picture that is there.

    Returns:
        Texts and pictures in order. What was typed, joined, is the line.
    """
    parts: list[str | Mention] = []
    place = 0
    for match in _CANDIDATE.finditer(text):
        word = match["named"] or match["dragged"]
        found = _named(word, is_file) if match["named"] else _dragged(word, is_file)
        if found is None:
            continue
        source, left = found
        end = match.end() - left
        if match.start() > place:
            parts.append(text[place : match.start()])
        parts.append(Mention(source, text[match.start() : end]))
        place = end
    if place < len(text):
        parts.append(text[place:])
    return parts


def strip_edges(parts: Sequence[str | Mention]) -> list[str | Mention]:
    """Without spaces at both ends; and where all pictures come first, without those that set them apart, so that
    `@a.png What?` shows a.png and asks "What?". Between words the text stays as it is."""
    kept = list(parts)
    for end, strip in ((0, str.lstrip), (-1, str.rstrip)):
        if kept and isinstance(part := kept[end], str):
            kept[end] = strip(part)
    mentions = [part for part in kept if isinstance(part, Mention)]
    words = [part for part in kept if isinstance(part, str) and part.strip()]
    if not words:
        return [*mentions]
    if words == [kept[-1]]:
        return [*mentions, words[0].lstrip()]
    return [part for part in kept if part]


def read_path(text: str, exists: Callable[[str], bool] = os.path.exists) -> str:
    """A path that is all of a text, written as shells, terminals or people write it."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    if text.startswith("file://"):
        return _from_url(text)
    return text if exists(os.path.expanduser(text)) else _unescape(text)  # noqa: PTH111 - never raises


def is_picture(name: str) -> bool:
    """Whether a name ends as pictures' names do."""
    return os.path.splitext(name)[1].lower() in SUFFIXES  # noqa: PTH122 - never raises


def is_shown(name: str) -> bool:
    """Whether a name ends as those of pictures, of PDFs and of their pages do."""
    return is_picture(name) or name.lower().endswith(".pdf") or _PAGES.fullmatch(name) is not None


def _named(word: str, is_file: Callable[[str], bool]) -> tuple[str, int] | None:
    """The picture that stands after `@`, and how many characters behind it are none of its name."""
    if word[0] in "\"'" and word[0] == word[-1] and len(word) > 1:
        path = word[1:-1]
        return (path, 0) if is_file(_home(path)) or is_shown(path) else None
    if (pages := _PAGES.match(word)) is not None and not re.match(r"https?://", word):
        return _unescape(pages[0]), len(word) - pages.end()
    bare = len(word.rstrip(_AFTER_WORD))
    if re.match(r"https?://", word):
        url = word[:bare]
        return (url, len(word) - bare) if is_shown(urllib.parse.urlsplit(url).path) else None
    for end in range(len(word), bare - 1, -1):
        for path in (word[:end], _unescape(word[:end])):
            if is_file(_home(path)):
                return path, len(word) - end
    path = _unescape(word[:bare])
    return (path, len(word) - bare) if is_shown(path) else None


def _dragged(word: str, is_file: Callable[[str], bool]) -> tuple[str, int] | None:
    if word[0] in "\"'":
        paths = [word[1:-1]]
    elif word.startswith("file://"):
        paths = [_from_url(word)]
    else:
        paths = [word, _unescape(word)]
    for path in paths:
        if path.startswith(("/", "~/")) and is_shown(path) and is_file(_home(path)):
            return path, 0
    return None


def _home(path: str) -> str:
    return os.path.expanduser(path)  # noqa: PTH111 - never raises


def _from_url(url: str) -> str:
    """The path of `file:///a%20b.png` or `file://host/a%20b.png`."""
    rest = url.removeprefix("file://")
    return urllib.parse.unquote(rest[max(rest.find("/"), 0) :])


def _unescape(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text)


def read_pictures(sources: Sequence[str | bytes], pages: "dict[str, int]") -> "list[Picture]":
    """Read pictures by their paths or addresses, a PDF being its pages; `pages` as `options.page_options` gives them."""
    from mlx_vlm_mini.images.source import LOCAL, read_images

    return [picture for source in sources for picture in read_images(source, LOCAL, **pages)]
