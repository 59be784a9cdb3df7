"""The place where a conversion works: beside the destination, one process at a time, gone or whole at the end."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from mlx_vlm_mini.errors import CheckpointError, VLMError
from mlx_vlm_mini.files import read_json

RECORD = "conversion.json"
"""What a folder was made of and how; while the work goes on also which of its files are finished."""


class Workplace:
    """A hidden folder beside the destination, which becomes the destination in one step.

    Killed at any moment it leaves no destination or a whole one. What is finished is found again by the next
    conversion with the same identity; of another one it is thrown away. The folder itself is locked (flock), so no lock
    outlives its process.

    Attributes:
        folder: the hidden folder, between `with` and `finish`.
        record: conversion.json; `identity` and `files` (name to bytes and sha256) are kept here, the rest is
            the caller's.
    """

    def __init__(self, destination: Path, sources: Iterable[Path] = (), *, force: bool = False) -> None:
        """Args:
            destination: the folder to come.
            sources: folders that must stay as they are.
            force: replace a checkpoint folder that is there; it stays until the new one is whole.

        Raises:
            CheckpointError: the destination is in the way, or is the source.
        """
        self.destination = Path(os.path.realpath(destination))
        parent, name = self.destination.parent, self.destination.name
        self.folder, self._old = parent / f".{name}.partial", parent / f".{name}.replaced"
        self._force = force
        self.record: dict[str, Any] = {}
        self._lock: int | None = None
        real = [Path(os.path.realpath(source)) for source in sources]
        if any(self.destination.is_relative_to(each) or each.is_relative_to(self.destination) for each in real):
            raise CheckpointError(f"{destination} is the source, or lies in it, or holds it: name another folder")
        self._check_destination()

    def _check_destination(self) -> None:
        if self.destination.is_file():
            raise CheckpointError(f"{self.destination} is a file; name a folder that does not exist yet")
        if not self.destination.exists() or not any(self.destination.iterdir()):
            return
        if not self._force:
            raise CheckpointError(f"{self.destination} exists and is not empty; name another folder, or give --force")
        if not (self.destination / "config.json").is_file():
            raise CheckpointError(
                f"{self.destination} is no checkpoint folder, so not even --force replaces it: remove it yourself"
            )

    def __enter__(self) -> "Workplace":
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        while self._lock is None:
            self.folder.mkdir(exist_ok=True)
            self._lock = self._try_lock()
        try:
            if self._old.exists() and not self.destination.exists():  # killed between the two steps of a replacement
                self._old.rename(self.destination)
            self._check_destination()  # by now another process may have finished
            names = {file.name for file in self.folder.iterdir()}
            if names and RECORD not in names and names != {f"{RECORD}.part"}:
                raise CheckpointError(f"{self.folder} is in the way and was not made here: remove it")
        except BaseException:
            self._unlock()
            raise
        self._remove_old()
        return self

    def _try_lock(self) -> int | None:
        """The locked folder, None if it was moved away meanwhile."""
        try:
            lock = os.open(self.folder, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), self.folder.stat()):
                return lock
        except FileNotFoundError:
            pass
        except BlockingIOError:
            os.close(lock)
            raise CheckpointError(f"another process is converting to {self.destination} right now") from None
        os.close(lock)
        return None

    def start(self, identity: dict[str, Any]) -> None:
        """Take up what a conversion of the same identity left here, else begin anew."""
        try:
            self.record = read_json(self.folder / RECORD)
        except CheckpointError:
            self.record = {}
        identity = json.loads(json.dumps(identity))
        if self.record.get("identity") != identity or not isinstance(self.record.get("files"), dict):
            for file in self.folder.iterdir():
                shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink()
            self.record = {"identity": identity, "files": {}}
            self.save_record()

    def save_record(self) -> None:
        part = self.folder / f"{RECORD}.part"
        part.write_text(json.dumps(self.record, indent=2, ensure_ascii=False), encoding="utf-8")
        _sync(part)
        part.replace(self.folder / RECORD)

    def is_finished(self, name: str) -> bool:
        """Whether a file was written whole, and still is what was written."""
        entry, file = self.record["files"].get(name), self.folder / name
        return (
            isinstance(entry, dict)
            and file.is_file()
            and file.stat().st_size == entry.get("bytes")
            and sha256(file) == entry.get("sha256")
        )

    def add(self, name: str, write: Callable[[Path], str]) -> None:
        """Have a file written; it gets its name when it is whole and on the disk.

        Args:
            write: writes to a path and returns the sha256 of what it wrote.
        """
        part = self.folder / f"{name}.part"
        digest = write(part)
        _sync(part)
        part.replace(self.folder / name)
        self.record["files"][name] = {"bytes": (self.folder / name).stat().st_size, "sha256": digest}
        self.save_record()

    def finish(self) -> None:
        """Put the folder in the destination's place."""
        for file in self.folder.iterdir():
            _sync(file)
        _sync(self.folder)
        if self.destination.exists() and any(self.destination.iterdir()):
            self.destination.rename(self._old)
        self.folder.rename(self.destination)
        _sync(self.destination.parent)
        self._remove_old()

    def _remove_old(self) -> None:
        """Under another name: half of it must never be taken for the one to put back."""
        removed = self._old.with_name(f".{self.destination.name}.removed")
        if self._old.exists():
            shutil.rmtree(removed, ignore_errors=True)
            self._old.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finished files stay for the next run, unless a tensor of the source is at fault."""
        if error is not None and self.record and self.folder.is_dir():
            if isinstance(error, VLMError) or not self.record.get("files"):
                shutil.rmtree(self.folder, ignore_errors=True)
            else:
                for part in self.folder.glob("*.part"):
                    part.unlink(missing_ok=True)
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            with suppress(OSError):  # nothing was put into it
                self.folder.rmdir()
            os.close(self._lock)
            self._lock = None


def _sync(path: Path) -> None:
    """Have a file or a folder written to the disk, so that a power cut cannot undo an order of steps."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(file: Path) -> str:
    """A file's sha256 in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
