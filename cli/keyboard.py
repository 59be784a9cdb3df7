"""The line editor at a terminal. Imported only there: prompt_toolkit takes a while."""

import asyncio
import signal
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from .completion import Offer


class Keyboard:
    """Reads messages with editing keys, history, completion with Tab, and several lines.

    Enter ends a message; Alt-Enter, and Enter after a backslash, begin a line. Pasted lines stay one message.
    """

    interactive = True
    edits = True

    def __init__(self, offers: Callable[[str], Sequence[Offer]], history: Path | None, prompt: str) -> None:
        self._prompt = prompt
        self._session: PromptSession[str] = PromptSession(
            history=_history(history),
            completer=_Offers(offers),
            complete_while_typing=False,
            key_bindings=_keys(),
            multiline=True,
            prompt_continuation="  ",
            enable_suspend=True,
        )

    def read(self, begin: str = "") -> str:
        before = {ending: signal.getsignal(ending) for ending in (signal.SIGTERM, signal.SIGHUP)}
        try:
            return self._session.prompt(self._prompt, default=begin, pre_run=self._end_on_signals)
        finally:
            for ending, handler in before.items():
                signal.signal(ending, handler)

    def _end_on_signals(self) -> None:
        """SIGTERM and a closed terminal end the editor, so that it leaves the terminal as it was."""
        for ending in (signal.SIGTERM, signal.SIGHUP):
            leave = partial(self._session.app.exit, exception=SystemExit(128 + ending))
            asyncio.get_running_loop().add_signal_handler(ending, leave)


class _Offers(Completer):
    def __init__(self, offers: Callable[[str], Sequence[Offer]]) -> None:
        self._offers = offers

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        for offer in self._offers(document.text_before_cursor):
            yield Completion(offer.text, -offer.length, display=offer.shown, display_meta=offer.note)


class _History(FileHistory):
    """A history whose file may fail: a full disk ends no conversation."""

    def store_string(self, string: str) -> None:
        with suppress(OSError, ValueError):
            super().store_string(string)


def _history(file: Path | None) -> History:
    return InMemoryHistory() if file is None else _History(file)


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.complete_state is not None and buffer.complete_state.current_completion is not None:
            buffer.complete_state = None  # takes what the menu shows
        elif buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return keys
