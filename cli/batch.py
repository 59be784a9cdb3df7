"""Many answers: prompts and pictures in, a line of JSON an answer out, gone on with where it was stopped."""

import fcntl
import glob
import hashlib
import json
import os
import re
import sys
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import click

from mlx_vlm_mini.errors import ImageError, PromptError, VLMError

from .line import is_picture, is_shown
from .writing import neutralize

Message = dict[str, Any]
_BEGIN = b'{"key": "'  # of every line of output


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        messages: with pictures by their names.
        named: what its line of output says about it: `images`, `prompt` and, where it was given, `id`.
        dpi: of its pages of PDFs; None for what is usual.
    """

    messages: list[Message]
    named: dict[str, Any]
    dpi: int | None = None

    @property
    def images(self) -> list[str]:
        return [str(name) for name in self.named["images"]]

    def key(self, settings: dict[str, Any]) -> str:
        """What an answer depends on, the pictures' bytes included, as 32 hexadecimal digits."""
        seen = [[name, _digest(name, self.dpi)] for name in self.images]
        text = json.dumps([self.messages, seen, settings], sort_keys=True, default=str)
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


def spread(images: Sequence[str], *, by_page: bool = False, most_pages: int | None = None) -> list[str] | None:
    """The pictures of folders and patterns among names, in order; None where there are only names.

    Args:
        by_page: a PDF counts as many, too, and gives its pages.
        most_pages: of each.

    Raises:
        PromptError: one of them has no pictures.
        ImageError: the pages of one cannot be told.
    """
    if not any(_is_many(name) or (by_page and _is_pdf(name)) for name in images):
        return None
    found: list[str] = []
    for name in images:
        if not _is_many(name):
            found += _pages_of(name, most_pages)
            continue
        pattern = os.path.expanduser(name)  # noqa: PTH111 - never raises
        inside = os.path.join(glob.escape(pattern), "*") if os.path.isdir(pattern) else pattern  # noqa: PTH112, PTH118
        check_folder(pattern)
        is_wanted = is_picture if inside != pattern else is_shown  # a folder's pictures, but what a pattern names
        found_here = sorted(glob.glob(inside, recursive=True))  # noqa: PTH207
        pictures = [path for path in found_here if is_wanted(path) and os.path.isfile(path)]  # noqa: PTH113
        if not pictures:
            raise PromptError(f"there are no pictures in {name}")
        found += [page for path in pictures for page in _pages_of(path, most_pages)]
    return found


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
    from mlx_vlm_mini.images.pdf import split_name

    file, pages = split_name(name) if "pdf" in name.lower() or "[" in name else (name, None)
    return (pages is not None or file.lower().endswith(".pdf")) and "://" not in file[:8]


def _pages_of(name: str, most: int | None) -> list[str]:
    """A picture's name, or those of a PDF's pages."""
    if not _is_pdf(name):
        return [name]
    from mlx_vlm_mini.images.source import page_names

    return page_names(name) if most is None else page_names(name, most_pages=most)


def read_prompts(file: str, system: str | None, most_pages: int | None = None) -> list[Item]:
    """The questions of a file, or of stdin for `-`: one a line, or lines of JSON where the first begins with `{`.

    A line of JSON is `{"messages": [...]}` in OpenAI's form, pictures' paths relative to the file; its `id` comes back.

    Raises:
        PromptError: the file cannot be read, or a line of it, named by its number.
    """
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).expanduser().read_bytes()
        text = data.decode().removeprefix("\ufeff")  # of Notepad, Excel and PowerShell
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    except (OSError, ValueError, RuntimeError) as error:
        raise PromptError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from None
    if not lines:
        raise PromptError(f"{file} has no prompts")
    if not lines[0][1].lstrip().startswith("{"):
        return [ask(line.strip(), [], system) for _, line in lines]
    folder = Path() if file == "-" else Path(file).expanduser().parent
    return [_from_json(line, f"{file}:{number}", folder, system, most_pages) for number, line in lines]


def ask(prompt: str, images: Sequence[Any], system: str | None) -> Item:
    """A question about pictures, which come first."""
    parts = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": prompt}]
    return Item([*_opening(system), {"role": "user", "content": parts}], {"images": list(images), "prompt": prompt})


def ask_about(items: Sequence[Item], pictures: Sequence[str | Sequence[str]], system: str | None) -> list[Item]:
    """Every question about every picture, or about several at a time; a picture's questions follow one another.

    Raises:
        PromptError: the questions bring pictures of their own.
    """
    if any("prompt" not in item.named for item in items):
        raise PromptError("the prompt file's messages name their own pictures: leave --image out")
    shown = [[each] if isinstance(each, str) else each for each in pictures]
    return [ask(item.named["prompt"], images, system) for images in shown for item in items]


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


@cache
def _digest(name: str, dpi: int | None) -> str | None:
    """SHA-256 of a file, or what a page of one is known by; None of what is none."""
    from mlx_vlm_mini.images.names import find_file

    if _is_pdf(name):
        from mlx_vlm_mini.images import pdf
        from mlx_vlm_mini.images.source import page_digest

        whole_name, page = pdf.split_name(name)
        whole = _digest(whole_name, dpi) if page is not None else None
        if page is not None and page.isdecimal() and whole is not None:
            return page_digest(whole, int(page), dpi or pdf.DPI)
    try:
        path = find_file(name)
        if not path.is_file():  # a device might never end
            return None
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError, RuntimeError):
        return None


def check_pictures(item: Item, seen: Sequence[str]) -> None:
    """Raises PromptError where a picture was another one, by its SHA-256, when its question got its key."""
    for name, sha256 in zip(item.images, seen, strict=True):
        if _digest(name, item.dpi) not in (None, sha256):
            raise PromptError(f"{name} changed meanwhile: the same command asks about it again")


class Output:
    """Lines of JSON, in a file that is gone on with, or on stdout.

    Attributes:
        done: keys of the answers that the file held.
    """

    def __init__(self, path: Path | None) -> None:
        """
        Raises:
            PromptError: the file holds something else, or another run is writing it.
        """
        self.path = path
        self.done: set[str] = set()
        self._file: BinaryIO | None = None
        if path is None:
            return
        with ExitStack() as stack:
            regular = path.is_file() or not path.exists()  # a device or a pipe is written, not read
            self._file = stack.enter_context(path.open("a+b" if regular else "ab"))
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise PromptError(f"another run is writing {path}") from None
            if regular:
                self._read(self._file, path)
            stack.pop_all()

    def _read(self, file: BinaryIO, path: Path) -> None:
        """Note what is there; drop a last line that a killed run left unfinished."""
        file.seek(0)
        whole = 0
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n") and (line.startswith(_BEGIN) or _BEGIN.startswith(line)):
                file.truncate(whole)
                break
            try:
                entry = json.loads(line)
                key = str(entry["key"])
            except (ValueError, TypeError, KeyError, RecursionError):
                raise PromptError(f"{path}:{number} is no answer of generate: name another file") from None
            whole += len(line)
            if "error" not in entry:
                self.done.add(key)

    def write(self, key: str, entry: dict[str, Any]) -> None:
        """Add a line, and see it out."""
        entry = {"key": key, **entry}
        try:
            line = json.dumps(entry, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # a file's name that is not UTF-8
            line = json.dumps(entry).encode()
        if self._file is None:
            click.echo(line)
        else:
            self._file.write(line + b"\n")
            self._file.flush()

    def __enter__(self) -> "Output":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()


def left_to_do(items: Sequence[Item], output: Output, settings: dict[str, Any]) -> list[tuple[str, Item]]:
    """What the output lacks, with its keys. A question that is asked again has a key of its own."""
    _digest.cache_clear()  # files may have changed since another run of this process
    asked: Counter[str] = Counter()
    todo = []
    for item in items:
        key = item.key(settings)
        asked[key] += 1
        if asked[key] > 1:
            key = f"{key}-{asked[key]}"
        if key not in output.done:
            todo.append((key, item))
    return todo


def answer_all(
    todo: Sequence[tuple[str, Item]],
    output: Output,
    ask: Callable[[Item], Callable[[], dict[str, Any]]],
    together: int,
) -> int:
    """Answer all in their order; what cannot be answered is written with its error, and counted.

    Args:
        ask: has an item answered, and gives what waits for its answer.
        together: items that are being answered at a time; as many again are asked ahead.
    """
    failed = 0
    waiting: deque[tuple[str, Item, Callable[[], dict[str, Any]]]] = deque()

    def settle(key: str, item: Item, wait: Callable[[], dict[str, Any]]) -> None:
        nonlocal failed
        try:
            entry = wait()
        except (VLMError, MemoryError) as error:
            failed += 1
            entry = {"error": " ".join(str(error).split()) or "out of memory"}
            over = "\r\x1b[2K" if sys.stderr.isatty() else ""  # the bar is drawn again below
            click.echo(f"{over}Error: {entry['error']}", err=True)
        output.write(key, item.named | entry)
        bar.update(1, (key, item))

    with click.progressbar(
        length=len(todo), label="answering", file=sys.stderr, hidden=not sys.stderr.isatty(), show_pos=True,
        item_show_func=_show,
    ) as bar:  # fmt: skip
        for key, item in todo:
            try:
                waiting.append((key, item, ask(item)))
            except (VLMError, MemoryError) as error:
                waiting.append((key, item, partial(_fail, error)))
            if len(waiting) >= (1 if together == 1 else 2 * together):
                settle(*waiting.popleft())
        while waiting:
            settle(*waiting.popleft())
    return failed


def _fail(error: Exception) -> dict[str, Any]:
    raise error


def _show(todo: tuple[str, Item] | None) -> str:
    return "" if todo is None else neutralize(" ".join(Path(name).name for name in todo[1].images)).replace("\n", " ")
