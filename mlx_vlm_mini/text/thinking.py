"""Where an answer's thinking begins and ends: the markers that a chat template names, and text that is cut at them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

SWITCH = "enable_thinking"
"""What a chat template reads to know whether the model is to think."""
KEYS = ("reasoning_content", "reasoning", "thinking")
"""Names of a message's thinking, here the first; DeepSeek's and vLLM's, OpenRouter's, Ollama's."""


Place = Literal["beginning", "thinking", "between", "text"]
"""Where in an answer something stands: at its beginning, where its thinking may begin, in that, between that and the
text, in the text."""


class Markers(NamedTuple):
    """Texts around an answer's thinking."""

    open: str
    close: str


MARKERS = (
    Markers("<think>", "</think>"),  # Qwen, GLM, MiniCPM-V
    Markers("<|channel>thought", "<channel|>"),  # Gemma 4
    Markers("[THINK]", "[/THINK]"),  # Mistral
)


def find_markers(template: str) -> Markers | None:
    """The markers that a chat template names; None where its model does not think."""
    return next((markers for markers in MARKERS if markers.close in template), None)


def answer_begins(prompt: str, markers: Markers | None) -> Literal["beginning", "thinking", "text"]:
    """Where the answer to a prompt begins: in its thinking, or in its text, where the prompt's end says so."""
    end = prompt.rstrip()
    if markers is None or end.endswith(markers.close):
        return "text"
    return "thinking" if end.endswith(markers.open) else "beginning"


def length_of_beginning(text: str, whole: Sequence[str]) -> int:
    """Characters at a text's end that may be the beginning of one of some texts."""
    return max((n for each in whole for n in range(1, len(each)) if text.endswith(each[:n])), default=0)


@dataclass
class ThinkingFilter:
    """Separates an answer's thinking from its text, piece by piece. A piece that may be part of a marker waits.

    White space at both ends of the thinking, and between it and the answer, is in neither.

    Attributes:
        markers: None of a model that does not think: all is text.
        place: where in an answer the next piece stands.
    """

    markers: Markers | None
    place: Place = "beginning"
    _held: str = ""
    _begun: bool = False

    def add(self, piece: str) -> tuple[str, str]:
        """What a piece completes: thinking, and text."""
        if self.markers is None:
            return "", piece
        self._held += piece
        thinking = ""
        if self.place == "beginning":
            begun = self._held.lstrip()
            if begun.startswith(self.markers.open):
                self.place, self._held = "thinking", begun[len(self.markers.open) :]
            elif self.markers.open.startswith(begun):
                return "", ""
            else:
                self.place = "text"
        if self.place == "thinking":
            thinking = self._think(self.markers.close)
        if self.place == "between" and (rest := self._held.lstrip()):
            self.place, self._held = "text", rest
        if self.place != "text":
            return thinking, ""
        text, self._held = self._held, ""
        return thinking, text

    def _think(self, close: str) -> str:
        found, marker, rest = self._held.partition(close)
        if not self._begun:
            found = found.lstrip()
        keep = 0 if marker else length_of_beginning(found, [close])
        thinking = found[: len(found) - keep].rstrip()
        self._begun = self._begun or bool(thinking)
        self._held = rest if marker else found[len(thinking) :]
        if marker:
            self.place = "between"
        return thinking

    def finish(self) -> tuple[str, str]:
        """What still waited when the answer ended: thinking, and text."""
        rest, self._held = self._held, ""
        if self.place == "thinking":
            return rest.rstrip(), ""
        return "", rest if self.place in ("beginning", "text") else ""
