"""Files as every room reads and writes them: JSON within limits, and files and folders replaced in one step."""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import CheckpointError, PromptError

_LARGEST = 32 * 2**20  # bytes of a header, or of a JSON file: the largest that are known have a third of that


_DEEPEST = 100  # lists in one another


_MOST_ENTRIES = 3_000_000  # commas and brackets in one, which say what memory it takes


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: the file is missing, not JSON or not an object.
    """
    try:
        content = json.loads(_check_size(read_bytes(file), file).decode("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing") from None
    except RecursionError:
        raise CheckpointError(f"{file} is not valid JSON: its lists lie too deep in one another") from None
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must hold a JSON object")
    _check_depth(content, file)
    return content


def _check_depth(content: dict[str, Any], file: Path) -> None:
    """Refuse JSON that can be read, but no longer be written: a conversion writes it again."""
    level: list[Any] = [content]
    for _ in range(_DEEPEST):
        parts = [each for part in level for each in (part.values() if isinstance(part, dict) else part)]
        level = [each for each in parts if isinstance(each, dict | list)]
        if not level:
            return
    raise CheckpointError(f"{file} is not valid JSON: its lists lie too deep in one another")


def read_bytes(file: Path, most: int = _LARGEST) -> bytes:
    """A file's content.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it has more than `most` bytes, is no file, or cannot be read.
    """
    try:
        if not file.is_file() and file.exists():  # a pipe would be waited for, a device read for ever
            raise CheckpointError(f"{file} is no regular file")
        with file.open("rb") as stream:
            content = stream.read(most + 1)
        check_pointer(content[:100], file)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from None
    if len(content) > most:
        raise CheckpointError(f"{file} has more than {most >> 20} MB, which no model's has: it was not read")
    return content


_POINTER = b"version https://git-lfs.github.com/spec/"


def check_pointer(start: bytes, file: Path) -> None:
    """Raises CheckpointError where a file begins as what Git LFS puts in its place; 8 bytes are enough to tell."""
    if len(start) >= 8 and start[: len(_POINTER)] == _POINTER[: len(start)]:
        raise CheckpointError(
            f"{file} is a Git LFS pointer, not the file that it names: run `git lfs pull` in its folder"
        )


def _check_size(content: bytes, file: Path) -> bytes:
    """Refuse JSON whose objects would take gigabytes."""
    entries = sum(map(content.count, (b",", b"[", b"{")))
    if entries > _MOST_ENTRIES:
        raise CheckpointError(f"{file} lists {entries:,} things, at most {_MOST_ENTRIES:,} are read")
    return content


def write_whole(file: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside `file`, which it then replaces in one step.

    Raises:
        PromptError: it cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        place = file.with_name(f".{file.stem}-{os.getpid()}{file.suffix}")
        try:
            write(place)
            place.replace(file)
        finally:
            place.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:  # mlx raises the second
        raise PromptError(f"cannot save {file}: {getattr(error, 'strerror', None) or error}") from None


@contextmanager
def one_process(folder: Path) -> Iterator[None]:
    """Lock a folder, which is made where it is missing; the lock (flock) ends with the process.

    Raises:
        CheckpointError: another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        for left in reversed(range(10)):  # one that was just killed may take a moment to let go
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not left:
                    raise CheckpointError(f"another process is writing to {folder} right now") from None
                time.sleep(0.1)
        yield
    finally:
        os.close(lock)


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A hidden folder beside `folder`, to be written to; it becomes `folder` in one step.

    Where that is there already, each file of it is replaced in one step, config.json last, and others stay.
    """
    work = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        yield work
        if not folder.exists():
            work.rename(folder)
            return
        for file in sorted(work.iterdir(), key=lambda file: file.name == "config.json"):
            file.replace(folder / file.name)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_text(file: Path, text: str) -> None:
    """Replace a file of text in one step."""
    part = file.with_name(f"{file.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)
