"""Ctrl-C while an answer is computed: acted on between two tokens, where nothing is half done.

Raised wherever it comes, it would now and then be lost: `mx.array` of numpy's swallows what is raised meanwhile.
"""

import signal
from types import FrameType, TracebackType


class Interrupts:
    """Notes the first Ctrl-C until `check`; the second one ends whatever runs."""

    def __init__(self) -> None:
        self._noted = False

    def check(self, *_: object) -> None:
        """Raises KeyboardInterrupt where there was a Ctrl-C."""
        if self._noted:
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._noted:
            raise KeyboardInterrupt
        self._noted = True

    def __enter__(self) -> "Interrupts":
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._before)
