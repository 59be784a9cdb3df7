"""Many questions: prompts and pictures of files, folders, patterns and lists, read as they are needed.

So a list may have a million lines, or come from a pipe that is still being written.
"""

import glob
import hashlib
import json
import os
import re
import select
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from io import FileIO
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from mlx_vlm_mini.errors import ImageError, PromptError, VLMError

from .line import is_picture, is_shown

Message = dict[str, Any]
CHECKED = 10_000  # first lines of a prompt file, in which a broken one ends the command before it starts
_SORTED = json.JSONEncoder(sort_keys=True, default=str)
_POLL_S = 0.2  # for which a pipe is waited for


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        messages: with pictures by their names.
        named: what its line of output says about it: `images`, `prompt` and, where it was given, `id`.
        dpi: of its pages of PDFs; None for what is usual.
        fault: why it cannot be asked; None where it can.
    """

    messages: list[Message]
    named: dict[str, Any]
    dpi: int | None = None
    fault: str | None = None

    @property
    def images(self) -> list[str]:
        return [str(name) for name in self.named["images"]]

    @property
    def identity(self) -> str:
        """What tells it from other questions of the same run, without a look into the pictures."""
        return repr((self.messages or self.named, self.dpi))

    def key(self, settings: Mapping[str, Any]) -> str:
        """What an answer depends on, the pictures' bytes included, as 32 hexadecimal digits."""
        seen = [[name, _digest(name, self.dpi)] for name in self.images]
        asked: Any = self.messages if self.fault is None else self.named
        text = _SORTED.encode([asked, seen, settings])
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def opened(self) -> list[Message]:
        """Its messages, pages of PDFs read as it says; other pictures stay names."""
        if self.dpi is None:
            return self.messages
        from mlx_vlm_mini.images.source import may_have_pages, read_image

        def read(part: dict[str, Any]) -> dict[str, Any]:
            if part["type"] != "image" or not may_have_pages(part["image"]):
                return part
            return {**part, "image": read_image(part["image"], dpi=self.dpi or 0)}

        return [
            message if isinstance(message["content"], str) else {**message, "content": [*map(read, message["content"])]}
            for message in self.messages
        ]


@dataclass(frozen=True)
class Fault:
    """A picture that cannot be asked about.

    Attributes:
        name: of the picture, or of the PDF whose pages it should be.
        error: why.
    """

    name: str
    error: str


class Pictures:
    """Names of pictures, in order, one after another: those of folders and patterns, or the lines of a list.

    Attributes:
        count: how many; None where that is not known before the end: pages of PDFs, lines of a pipe.
    """

    def __init__(
        self, folders: Sequence[tuple[str, Sequence[str]]], lines: str | None = None, most_pages: int | None = None
    ) -> None:
        """
        Args:
            folders: beginnings of names, and their ends.
            lines: a file with one name a line, `-` for stdin, in their place.
        """
        self._folders, self._lines, self._most_pages = folders, lines, most_pages
        self.count: int | None = None
        if lines is None or _is_regular(lines):
            found = 0
            for name in self._names():
                if name is None or _is_pdf(name):
                    return
                found += 1
            self.count = found

    def __iter__(self) -> Iterator[str | Fault | None]:
        """Names; None where a pipe has nothing yet."""
        for name in self._names():
            if name is None or not _is_pdf(name):
                yield name
                continue
            try:
                yield from _pages_of(name, self._most_pages)
            except VLMError as error:
                yield Fault(name, str(error))

    def _names(self) -> Iterator[str | None]:
        for before, names in self._folders:
            yield from (before + name for name in names)
        if self._lines is None:
            return
        empty = True
        for line in _lines(self._lines):
            name = None if line is None else os.fsdecode(line.strip(b"\r\n"))
            empty = empty and not name
            if name is None or name.strip():
                yield name
        if empty:
            raise PromptError(f"there are no pictures in {self._lines}")


def spread(images: Sequence[str], *, by_page: bool = False, most_pages: int | None = None) -> Pictures | None:
    """The pictures of folders and patterns among names, in order; None where there are only names.

    Args:
        by_page: a PDF counts as many, too, and gives its pages.
        most_pages: of each.

    Raises:
        PromptError: one of them has no pictures.
        ImageError: a folder cannot be read.
    """
    if not any(_is_many(name) or (by_page and _is_pdf(name)) for name in images):
        return None
    found: list[tuple[str, Sequence[str]]] = []
    for name in images:
        if not _is_many(name):
            found.append(("", [name]))
            continue
        pattern = os.path.expanduser(name)  # noqa: PTH111 - never raises
        check_folder(pattern)
        if os.path.isdir(pattern):  # noqa: PTH112 - never raises
            with os.scandir(pattern) as entries:
                inside = [
                    each.name for each in entries if each.name[0] != "." and is_picture(each.name) and each.is_file()
                ]
            before = os.path.join(pattern, "")  # noqa: PTH118
        else:  # what a pattern names may be a PDF, too
            paths = glob.iglob(pattern, recursive=True)  # noqa: PTH207
            before, inside = "", [path for path in paths if is_shown(path) and os.path.isfile(path)]  # noqa: PTH113
        if not inside:
            raise PromptError(f"there are no pictures in {name}")
        inside.sort()
        found.append((before, inside))
    return Pictures(found, most_pages=most_pages)


def list_pictures(file: str, *, most_pages: int | None = None) -> Pictures:
    """The pictures that the lines of a file name, or those of stdin for `-`; a PDF is its pages.

    Raises:
        PromptError: the file cannot be read.
    """
    return Pictures([], file, most_pages)


def check_folder(name: str) -> None:
    """Raises ImageError where a folder may not be read: patterns take it for an empty one."""
    if not os.path.isdir(name):  # noqa: PTH112 - never raises
        return
    try:
        os.scandir(name).close()
    except OSError as error:
        from mlx_vlm_mini.images.names import unreadable

        raise ImageError(f"cannot read folder {unreadable(Path(name), error)}") from None


def _is_pdf(name: str) -> bool:
    if "[" not in name and name[-4:].lower() != ".pdf":
        return False
    from mlx_vlm_mini.images.pdf import split_name

    file, pages = split_name(name)
    return (pages is not None or file.lower().endswith(".pdf")) and "://" not in file[:8]


def _pages_of(name: str, most: int | None) -> list[str]:
    """A picture's name, or those of a PDF's pages."""
    if not _is_pdf(name):
        return [name]
    from mlx_vlm_mini.images.source import page_names

    return page_names(name) if most is None else page_names(name, most_pages=most)


def _is_regular(file: str) -> bool:
    """Whether it can be read twice.

    Raises:
        PromptError: it cannot be read at all.
    """
    if file == "-":
        return False
    try:
        with Path(file).expanduser().open("rb") as opened:
            return stat.S_ISREG(os.fstat(opened.fileno()).st_mode)
    except (OSError, ValueError, RuntimeError) as error:
        raise PromptError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from None


def _lines(file: str) -> Iterator[bytes | None]:
    """The lines of a file, or of stdin for `-`; None where a pipe has nothing yet.

    Raises:
        PromptError: the file cannot be read.
    """
    try:
        if file == "-":
            yield from _piped(sys.stdin.buffer)
            return
        with Path(file).expanduser().open("rb") as opened:
            yield from opened
    except (OSError, ValueError, RuntimeError) as error:
        raise PromptError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from None


def _piped(stream: BinaryIO) -> Iterator[bytes | None]:
    try:
        number = stream.fileno()
    except (OSError, ValueError):
        yield from stream
        return
    begun: list[bytes] = []
    while True:
        if not select.select([number], [], [], _POLL_S)[0]:
            yield None
            continue
        data = os.read(number, 2**16)
        if not data:
            break
        begun.append(data)
        if b"\n" in data:
            *whole, last = b"".join(begun).split(b"\n")
            begun = [last]
            yield from whole
    if rest := b"".join(begun):
        yield rest


def read_prompts(
    file: str, system: str | None, most_pages: int | None = None, *, keep_faults: bool = False
) -> Iterator[Item | None]:
    """The questions of a file, or of stdin for `-`: one a line, or lines of JSON where the first begins with `{`; None
    where a pipe has nothing yet.

    A line of JSON is `{"messages": [...]}` in OpenAI's form, pictures' paths relative to the file; its `id` comes back.

    Args:
        keep_faults: a broken line is a question with a `fault`.

    Raises:
        PromptError: the file cannot be read, or a line of it, named by its number.
    """
    is_json: bool | None = None
    folder = Path() if file == "-" else Path(file).expanduser().parent
    number = 0
    for data in _lines(file):
        if data is None:
            yield None
            continue
        number += 1
        if number == 1:
            data = data.removeprefix(b"\xef\xbb\xbf")  # of Notepad, Excel and PowerShell
        if not data.strip():
            continue
        try:
            line = data.decode()
            if not line.strip():
                continue
            is_json = line.lstrip().startswith("{") if is_json is None else is_json
            where = f"{file}:{number}"
            yield _from_json(line, where, folder, system, most_pages) if is_json else ask(line.strip(), [], system)
        except (PromptError, UnicodeDecodeError) as error:
            fault = str(error)
            if isinstance(error, UnicodeDecodeError):
                fault = f"cannot read {file}: line {number} is not UTF-8"
            if not keep_faults:
                raise PromptError(fault) from None
            is_json = bool(is_json)
            yield Item([], {"images": [], "prompt": data.decode(errors="replace").strip()}, fault=fault)
    if is_json is None:
        raise PromptError(f"{file} has no prompts")


def check_prompts(file: str, system: str | None, most_pages: int | None = None) -> int | None:
    """Raises PromptError where one of a file's first `CHECKED` lines is broken; how many prompts it has, None of what
    can be read only once."""
    if not _is_regular(file):
        return None
    for _ in islice(read_prompts(file, system, most_pages), CHECKED):
        pass
    with Path(file).expanduser().open("rb") as opened:
        return sum(1 for line in opened if line.strip())


def ask(prompt: str, images: Sequence[Any], system: str | None) -> Item:
    """A question about pictures, which come first."""
    parts = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": prompt}]
    return Item([*_opening(system), {"role": "user", "content": parts}], {"images": list(images), "prompt": prompt})


@dataclass
class Questions:
    """What is asked, in groups that stay together: all questions about a picture, or a single one.

    Attributes:
        groups: their questions; None where a pipe has nothing yet.
        count: of groups; None where it is not known before their end.
        size: questions a group.
        unit: what one is called in the plural: pictures or answers.
    """

    groups: Iterator[list[Item] | None]
    count: int | None
    size: int = 1
    unit: str = "answers"


def find_questions(
    prompt: str | None,
    prompt_file: str | None,
    images: Sequence[str],
    pictures: Pictures | None,
    system: str | None,
    pages: Mapping[str, int],
) -> Questions:
    """One prompt, or those of a file; about nothing, about some images together, or about each of many pictures.

    Raises:
        PromptError: a file cannot be read or has broken lines, or its questions bring pictures of their own.
    """
    most_pages, dpi = pages.get("most_pages"), pages.get("dpi")
    if prompt_file is None:
        prompts: Iterable[Item | None] = [ask(str(prompt), [], system)]
    else:
        prompts = read_prompts(prompt_file, system, most_pages, keep_faults=True)
    count = 1 if prompt_file is None else check_prompts(prompt_file, system, most_pages)
    if pictures is None:
        asked = (_about(item, images, system, dpi) for item in prompts)
        unit = "pictures" if images else "answers"
        return Questions((None if item is None else [item] for item in asked), count, unit=unit)
    about = [item for item in prompts if item is not None]
    groups = (
        None if name is None else [each for item in about if (each := _about(item, [name], system, dpi)) is not None]
        for name in pictures
    )
    return Questions(groups, pictures.count, len(about), "pictures" if len(about) == 1 else "answers")


def _about(item: Item | None, images: Sequence[str | Fault], system: str | None, dpi: int | None) -> Item | None:
    """A question about images, which come first."""
    if item is not None and images:
        if "prompt" not in item.named:
            raise PromptError("the prompt file's messages name their own pictures: leave --image out")
        fault = next((image.error for image in images if isinstance(image, Fault)), item.fault)
        names = [image.name if isinstance(image, Fault) else image for image in images]
        item = ask(item.named["prompt"], names, system)
        item = item if fault is None else replace(item, fault=fault)
    return item if item is None or dpi is None else replace(item, dpi=dpi)


def _from_json(line: str, where: str, folder: Path, system: str | None, most_pages: int | None) -> Item:
    from mlx_vlm_mini.text.messages import images_of, take_beside, to_messages

    try:
        entry = json.loads(line)
        messages = to_messages(take_beside(entry))
        pictures = images_of(messages)
        if not all(isinstance(part["image"], str) for part in pictures):
            raise PromptError("an image is not a path or a URL")
        if messages[-1]["role"] == "assistant":
            raise PromptError("the assistant has the last word in it: there is nothing to answer")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, PromptError) as error:
        reason = str(error) if isinstance(error, PromptError) else f'not a line {{"messages": [...]}} ({error!r})'
        raise PromptError(f"{where}: {reason}") from None
    for part in pictures:
        part["image"] = beside(folder, part["image"])
    try:
        messages = [{**message, "content": _by_page(message["content"], most_pages)} for message in messages]
    except VLMError as error:
        raise PromptError(f"{where}: {error}") from None
    pictures = images_of(messages)
    opening = [] if any(message["role"] == "system" for message in messages) else _opening(system)
    named = {"images": [part["image"] for part in pictures], "messages": entry["messages"]}
    return Item([*opening, *messages], named | ({"id": entry["id"]} if "id" in entry else {}))


def beside(folder: Path, name: str) -> str:
    """A picture's name in a file of that folder, as a path; addresses stay."""
    if re.match(r"(?i)https?://|data:", name):
        return name
    from mlx_vlm_mini.images.names import local_path

    return str(folder / local_path(name))


def _by_page(content: Any, most: int | None) -> Any:
    """PDFs as their pages' names."""
    if isinstance(content, str):
        return content
    return [
        {**part, "image": name} if name is not None else part
        for part in content
        for name in (_pages_of(part["image"], most) if part["type"] == "image" else [None])
    ]


def _opening(system: str | None) -> list[Message]:
    return [] if system is None else [{"role": "system", "content": [{"type": "text", "text": system}]}]


def _is_many(name: str) -> bool:
    path = os.path.expanduser(name)  # noqa: PTH111 - never raises
    if os.path.isdir(path):  # noqa: PTH112 - never raises
        return True
    if "[" in name and _is_pdf(name):
        return False
    return glob.has_magic(path) and "://" not in path and not path.startswith("data:") and not os.path.exists(path)  # noqa: PTH110


@lru_cache(maxsize=4096)
def _digest(name: str, dpi: int | None) -> str | None:
    """SHA-256 of a file, or what a page of one is known by; None of what is none."""
    if _is_pdf(name):
        from mlx_vlm_mini.images import pdf
        from mlx_vlm_mini.images.source import page_digest

        whole_name, page = pdf.split_name(name)
        whole = _digest(whole_name, dpi) if page is not None else None
        if page is not None and page.isdecimal() and whole is not None:
            return page_digest(whole, int(page), dpi or pdf.DPI)
    try:
        with _open(name) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # a device might never end
                return None
            digest = hashlib.sha256()
            while data := file.read(2**18):
                digest.update(data)
            return digest.hexdigest()
    except (OSError, ValueError, RuntimeError):
        return None


def _open(name: str) -> FileIO:
    """The file of a name, without waiting for the other end of a pipe."""

    def at_once(path: str, flags: int) -> int:
        return os.open(path, flags | os.O_NONBLOCK)

    if not name.startswith("~"):
        with suppress(OSError):
            return FileIO(name, opener=at_once)
    from mlx_vlm_mini.images.names import find_file

    return FileIO(find_file(name), opener=at_once)


def forget_digests() -> None:
    """Look into pictures anew: they may have changed."""
    _digest.cache_clear()


def check_pictures(item: Item, seen: Sequence[str]) -> None:
    """Raises PromptError where a picture was another one, by its SHA-256, when its question got its key."""
    for name, sha256 in zip(item.images, seen, strict=True):
        if _digest(name, item.dpi) not in (None, sha256):
            raise PromptError(f"{name} changed meanwhile: the same command asks about it again")
