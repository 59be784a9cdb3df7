"""The file of answers: lines of JSON, each with its key, continued after an interruption; and those of several parts."""

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import click
import numpy as np

from mlx_vlm_mini.errors import PromptError

from .part import Part, part_files

_BEGIN = b'{"key": "'  # of every line
_PLAIN = re.compile(rb'\{"key": "([^"\\]+)", (?!.*"error").*\}\n', re.DOTALL)  # in a text, quotes have a backslash


class Keys:
    """A set of keys that takes 16 bytes for each, so that millions fit."""

    _FEW = 2**16

    def __init__(self) -> None:
        self._sorted = np.zeros(0, dtype="S16")
        self._new: set[bytes] = set()

    def __len__(self) -> int:
        return len(self._sorted) + len(self._new)

    def add(self, key: str) -> bool:
        """Whether it is new."""
        short = _shorten(key)
        if self._has(short):
            return False
        self._new.add(short)
        if len(self._new) > max(self._FEW, len(self._sorted) // 8):
            self._sorted = np.sort(np.concatenate([self._sorted, np.array([*self._new], dtype="S16")]))
            self._new.clear()
        return True

    def __contains__(self, key: str) -> bool:
        return self._has(_shorten(key))

    def without(self, others: "Keys") -> int:
        """How many keys are none of the others."""
        return sum(not others._has(bytes(key)) for key in (*self._sorted, *self._new))

    def _has(self, short: bytes) -> bool:
        if short in self._new:
            return True
        place = int(self._sorted.searchsorted(short))
        return place < len(self._sorted) and bool(self._sorted[place] == short)


def _shorten(key: str) -> bytes:
    # numpy drops zeros at the end: the last byte is never one.
    return hashlib.blake2b(key.encode(), digest_size=15).digest() + b"."


class Line(NamedTuple):
    """A line of the file: what it says, under which key, and whether it is an error."""

    text: bytes
    key: str
    failed: bool


def read_lines(file: BinaryIO, path: Path) -> Iterator[Line]:
    """The whole lines of a file; one at its end that a killed run left unfinished is left out.

    Raises:
        PromptError: the file holds something else.
    """
    for number, text in enumerate(file, 1):
        if (match := _PLAIN.fullmatch(text)) is not None:
            yield Line(text, match[1].decode(errors="replace"), False)
            continue
        if not text.endswith(b"\n") and (text.startswith(_BEGIN) or _BEGIN.startswith(text)):
            return
        try:
            entry = json.loads(text)
            key = str(entry["key"])
        except (ValueError, TypeError, KeyError, RecursionError):
            raise PromptError(f"{path}:{number} is no answer of generate: name another file") from None
        yield Line(text, key, "error" in entry)


class Output:
    """Lines of JSON, in a file that is continued, or on stdout.

    Of a part of the work it is a file of its own, beside that of all. Without a part, the files of all parts are taken
    in: each answer once, whichever files have it.

    Attributes:
        path: of the file that is written; None for stdout.
        done: keys of the answers that it held, and that other parts' files hold.
        regular: whether it is a file that can be read again, not a device.
    """

    def __init__(self, path: Path | None, part: Part | None = None) -> None:
        """
        Raises:
            PromptError: the file holds something else, or another run is writing it.
        """
        self.path = path if path is None or part is None else part.file(path)
        self.done, self._failed = Keys(), Keys()
        self._file: BinaryIO | None = None
        self.regular = False
        if path is None or self.path is None:
            return
        self.regular = path.is_file() or not path.exists()  # a device or a pipe is written, not read
        if part is not None and not self.regular:
            raise PromptError(f"parts have files beside {path}, and it is none: name a file")
        with ExitStack() as stack:
            self._file = stack.enter_context(_open_alone(self.path, "a+b" if self.regular else "ab"))
            if self.regular:
                self._read(self._file, self.path)
                others = [file for _, file in part_files(path)]
                if part is None:
                    for other in others:
                        self._take_in(other)
                else:
                    for other in (path, *others):
                        self._look(other)
            stack.pop_all()

    def _read(self, file: BinaryIO, path: Path) -> None:
        """Note what is there; drop a last line that a killed run left unfinished."""
        file.seek(0)
        whole = 0
        for line in read_lines(file, path):
            whole += len(line.text)
            (self._failed if line.failed else self.done).add(line.key)
        if whole < file.seek(0, os.SEEK_END):
            file.truncate(whole)

    def _look(self, path: Path) -> None:
        """Note what another file holds, which a run may be writing."""
        if path == self.path or not path.is_file():
            return
        with path.open("rb") as file:
            for line in read_lines(file, path):
                if not line.failed:
                    self.done.add(line.key)

    def _take_in(self, path: Path) -> None:
        """Append a part's answers, each once, and remove its file: not before all of them are on the disk."""
        assert self._file is not None
        with _open_alone(path, "r+b") as file:
            for line in read_lines(file, path):
                if line.key not in self.done and (self._failed if line.failed else self.done).add(line.key):
                    self._file.write(line.text)
            self._file.flush()
            os.fsync(self._file.fileno())
            path.unlink()

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


def count_answers(files: Sequence[Path]) -> tuple[int, int]:
    """How many questions these files answer, each counted once, and how many others they hold an error of.

    Raises:
        PromptError: one of them holds something else.
    """
    done, failed = Keys(), Keys()
    for path in files:
        with path.open("rb") as file:
            for line in read_lines(file, path):
                (failed if line.failed else done).add(line.key)
    return len(done), failed.without(done)


def _open_alone(path: Path, mode: str) -> BinaryIO:
    """Open a file that no other run may write meanwhile, as far as its file system knows locks.

    Raises:
        PromptError: one does.
    """
    while True:
        file: BinaryIO = path.open(mode)  # type: ignore[assignment]
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise PromptError(f"another run is writing {path}") from None
        except OSError:  # a network disk without locks
            return file
        with suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                return file
        file.close()  # another run took it in and removed it between the two calls
