"""What the program is doing right now: one line on stderr that goes away, only where a person is looking."""

import sys
from types import TracebackType


class Status:
    """A line on stderr that each `show` replaces and `clear` removes. Says nothing when stderr is not a terminal."""

    def __init__(self) -> None:
        self._on = sys.stderr.isatty()
        self._shown = False

    def show(self, text: str) -> None:
        if self._on:
            sys.stderr.write(f"\r\x1b[2K{text}")
            sys.stderr.flush()
            self._shown = True

    def clear(self) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()
            self._shown = False

    def prefill(self, done: int, total: int) -> None:
        """For `stream.Options.progress`."""
        self.show(f"reading the prompt: {done} of {total} tokens")

    def __enter__(self) -> "Status":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clear()
