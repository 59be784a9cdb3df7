"""What a model knows: exact match per kind of question, with the picture and with a blank one in its place."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_vlm_mini.data.examples import Example
from mlx_vlm_mini.generation.stream import generate
from mlx_vlm_mini.images.source import image_size
from mlx_vlm_mini.model import VLM
from mlx_vlm_mini.processor import Processor
from mlx_vlm_mini.text.messages import Message, images_of


@dataclass(frozen=True)
class Score:
    """Right answers among the questions of a kind: with the pictures, and with blank ones, where these were asked."""

    questions: int
    right: int
    right_blank: int | None


def evaluate(
    model: VLM,
    processor: Processor,
    examples: Sequence[Example],
    *,
    blank: bool = True,
    think: bool | None = None,
    max_tokens: int | None = None,
    choices: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Score]:
    """Ask the last question of every example and compare with its answer, white space at the ends aside.

    A model that answers as well with blank pictures does not look at them; without `blank` that is not asked.

    Args:
        think: whether the model is to think before it answers; None: as its chat template does by default.
        max_tokens: of an answer; by default eight more than the right one has, which is too few to think.
        choices: answers that the model may give; None: any.

    Returns:
        A score for each kind, in the order of their names, and "all" at the end.
    """
    counts = {what: Counter[str]() for what in ("questions", "right", "right_blank")}
    for number, example in enumerate(examples, start=1):
        last = max(i for i, message in enumerate(example.messages) if message["role"] == "assistant")
        expected = _text(example.messages[last]).strip()
        asked = list(example.messages[:last])
        for kind in (example.kind or "unnamed", "all"):
            counts["questions"][kind] += 1
        ways = [("right", asked)]
        if blank:
            ways.append(("right_blank", [_blank(message) for message in asked]))
        for what, messages in ways:
            longest = max(len(processor.tokenizer.encode(text)) for text in (expected, *(choices or ())))
            options: dict[str, Any] = {"max_tokens": max_tokens or longest + 8, "think": think, "choices": choices}
            if generate(model, processor, messages, **options).strip() == expected:
                for kind in (example.kind or "unnamed", "all"):
                    counts[what][kind] += 1
        if progress is not None:
            progress(number, len(examples))
    kinds = [*sorted(kind for kind in counts["questions"] if kind != "all"), "all"]
    return {
        kind: Score(counts["questions"][kind], counts["right"][kind], counts["right_blank"][kind] if blank else None)
        for kind in kinds
    }


def _text(message: Message) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content if part["type"] == "text")


def _blank(message: Message) -> Message:
    """The message with a plain grey picture of the same size for each of its own."""
    if not images_of([message]):
        return message
    parts = []
    for part in message["content"]:
        if part["type"] == "image":
            width, height = image_size(part["image"])
            part = {**part, "image": np.full((height, width, 3), 128, dtype=np.uint8)}
        parts.append(part)
    return {**message, "content": parts}
