"""How far a long run is: a line for whoever looks on, a line a minute in a log, a file for `mlx-vlm-mini status`."""

import json
import os
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from .part import Part
from .status import Status

LOG_S = 60.0  # between lines in a log
NOTE_S = 5.0  # between writings of the file


@dataclass
class Tally:
    """Counts of a run.

    Attributes:
        total: questions of the whole work; None while the end of a list was not reached.
        share: those of this part.
        held: of this part, those that were answered before.
        answered, failed: by this run.
        unit: what is counted a minute: pictures or answers.
    """

    total: int | None = None
    share: int | None = None
    held: int = 0
    answered: int = 0
    failed: int = 0
    unit: str = "pictures"

    @property
    def settled(self) -> int:
        return self.held + self.answered + self.failed

    @property
    def left(self) -> int | None:
        """Questions of this part that are open."""
        return None if self.share is None else max(self.share - self.settled, 0)


def note_file(output: Path) -> Path:
    """Where a run that writes `output` notes how far it is."""
    return output.with_name(f".{output.name}.status")


class Progress:
    """Tells how far a run is, on stderr and in a file beside its output."""

    def __init__(self, tally: Tally, output: Path | None, part: Part | None) -> None:
        """`output`: the file that is written; None where nothing is noted."""
        self.tally = tally
        self._part, self._file = part, None if output is None else note_file(output)
        self._status, self._shows = Status(), sys.stderr.isatty()
        self._begin = self._logged = self._noted = time.monotonic()
        self._name = ""

    def start(self) -> None:
        """The model is loaded: from now on time counts."""
        self._begin = self._logged = time.monotonic()
        self.note()

    @property
    def rate(self) -> float:
        """Questions a minute."""
        return 60 * (self.tally.answered + self.tally.failed) / max(time.monotonic() - self._begin, 1e-3)

    def describe(self) -> str:
        """`12/400, 45.2 pictures/min, 9 min left`."""
        tally, rate = self.tally, self.rate
        words = [f"{tally.settled}" + (f"/{tally.share}" if tally.share is not None else "")]
        if tally.failed:
            words.append(f"{tally.failed} failed")
        if rate:
            words.append(f"{rate:.1f} {tally.unit}/min")
        if tally.left and rate:
            words.append(f"{duration(60 * tally.left / rate)} left")
        return ", ".join(words)

    def update(self, name: str = "") -> None:
        """Tell what there is to tell, where it is time to; `name` is what was answered last."""
        now, self._name = time.monotonic(), name or self._name
        if self._shows:
            self._status.show(f"answering {self._bar()}{self.describe()}  {self._name}")
        elif now - self._logged >= LOG_S:
            self._logged = now
            click.echo(f"answering: {self.describe()}", err=True)
        if now - self._noted >= NOTE_S:
            self.note()

    def say(self, text: str) -> None:
        """What is done before the first answer."""
        self._status.show(text)

    def clear(self) -> None:
        """Make room for another line on stderr."""
        self._status.clear()

    def _bar(self) -> str:
        share = self.tally.share
        if not share:
            return ""
        done = 20 * self.tally.settled // share
        return f"[{'#' * done}{'-' * (20 - done)}] "

    def note(self, *, running: bool = True) -> None:
        """Write the file."""
        self._noted = time.monotonic()
        if self._file is None:
            return
        entry = {
            **asdict(self.tally),
            "part": None if self._part is None else [self._part.number, self._part.count],
            "per_minute": round(self.rate, 2),
            "running": running,
            "updated": time.time(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        try:
            new = self._file.with_name(f"{self._file.name}.new")
            new.write_text(json.dumps(entry))
            new.replace(self._file)
        except OSError:  # the answers matter more
            self._file = None

    def remove(self, *outputs: Path) -> None:
        """Remove the notes of these files: there is nothing left to tell."""
        for output in outputs:
            note_file(output).unlink(missing_ok=True)


def read_note(output: Path) -> Mapping[str, Any] | None:
    """What a run that writes, or wrote, this file noted last; None where it noted nothing."""
    try:
        entry = json.loads(note_file(output).read_text())
    except (OSError, ValueError):
        return None
    known = {"total", "share", "held", "answered", "failed", "updated", "host"}
    return entry if isinstance(entry, dict) and entry.keys() >= known else None


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 05 min`, `4 days`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 90:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{round(minutes / 60 / 24)} days"
