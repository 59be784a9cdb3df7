"""Where a conversion reads from: a folder or a Hub name, and what proves that it is still the same."""

import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from mlx_vlm_mini.checkpoints.assembly import Assembly, open_model
from mlx_vlm_mini.checkpoints.folder import Checkpoint
from mlx_vlm_mini.checkpoints.hub import commit_of, is_hub_name, known_sha256
from mlx_vlm_mini.errors import CheckpointError


@dataclass(frozen=True)
class Source:
    """A checkpoint, and how it was asked for.

    Attributes:
        name: as it was given.
        revision: of a Hub name the commit.
        parts: `vision_tower`, `conversation` and `base`, as they were given.
        is_whole: whether the tensors are here; else their headers alone, from the Hub.
    """

    name: str
    revision: str | None
    parts: Mapping[str, Any]
    checkpoint: Checkpoint
    is_whole: bool

    @property
    def files(self) -> list[Path]:
        """The files of tensors."""
        return sorted({info.file for checkpoint in self._checkpoints for info in checkpoint.tensors.values()})

    @property
    def folders(self) -> set[Path]:
        """Where all of it lies."""
        here = {file.parent for file in self.files if file.is_file()}
        return {*here, *(checkpoint.folder for checkpoint in self._checkpoints)}

    @property
    def _checkpoints(self) -> list[Checkpoint]:
        base = self.checkpoint.base if isinstance(self.checkpoint, Assembly) else None
        return [self.checkpoint] if base is None else [self.checkpoint, base]

    def called(self, file: Path) -> str:
        """A file's name in records, which say nothing of the folders above."""
        inside = file.is_relative_to(self.checkpoint.folder)
        return str(file.relative_to(self.checkpoint.folder)) if inside else f"{file.parent.name}/{file.name}"

    def identity(self) -> dict[str, Any]:
        """What changes where the source changes: sizes and times of its files, and the config itself."""
        files = {self.called(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in self.files}
        config = hashlib.sha256(json.dumps(self.checkpoint.config, sort_keys=True).encode()).hexdigest()
        return {"files": files, "config": config}

    def download(self) -> "Source":
        """The same with its tensors, which are fetched from the Hub."""
        checkpoint = open_model(self.name, revision=self.revision, **self.parts)
        return replace(self, checkpoint=checkpoint, is_whole=True)


def find_source(name: str | Path, revision: str | None, **parts: Any) -> Source:
    """A source; of a Hub name that is not in the cache only the small files and the headers are fetched.

    Raises:
        CheckpointError: there is no such checkpoint, or the Hub does not give it.
    """
    checkpoint = open_model(name, revision=revision, weights=False, **parts)
    commit = commit_of(checkpoint.folder) if isinstance(name, str) and is_hub_name(name) else None
    whole = all(info.file.is_file() for info in checkpoint.tensors.values())
    return Source(str(name), commit, parts, checkpoint, whole)


class Hashes:
    """The sha256 of a source's files, computed by a thread beside the conversion, and compared with the Hub's."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._found: dict[str, str] = {}
        self._error: Exception | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            buffer = memoryview(bytearray(2**18))
            for file in self._source.files:
                digest = hashlib.sha256()
                with file.open("rb", buffering=0) as stream:
                    while count := stream.readinto(buffer):
                        digest.update(buffer[:count])
                        if self._stop.is_set():
                            return
                self._compare(file, digest.hexdigest())
        except Exception as error:
            self._error = error

    def _compare(self, file: Path, found: str) -> None:
        expected = known_sha256(file)
        if expected not in (None, found):
            raise CheckpointError(
                f"{file.resolve()} is damaged: its sha256 is {found[:12]}..., the Hub says {expected[:12]}...; "
                "remove it and run the command again"
            )
        self._found[self._source.called(file)] = found

    def check(self) -> None:
        """Raises CheckpointError where a file is known to be damaged by now."""
        if self._error is not None:
            raise self._error

    def finish(self) -> dict[str, str]:
        """Names of files to their sha256; waits for them.

        Raises:
            CheckpointError: a file is damaged.
        """
        self._thread.join()
        self.check()
        return self._found

    def __enter__(self) -> "Hashes":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
