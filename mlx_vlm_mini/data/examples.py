"""Training data: lines of JSON -> conversations -> token ids with a mask of what the assistant says.

A line is `{"messages": [...]}` with OpenAI-style messages, image paths relative to the file's folder; or LLaVA's form,
`{"image": PATH, "conversations": [{"from": "human", "value": "<image>\\n..."}, {"from": "gpt", "value": ...}]}`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_vlm_mini.errors import PromptError, VLMError
from mlx_vlm_mini.images.names import local_path
from mlx_vlm_mini.images.source import image_size
from mlx_vlm_mini.processor import Processor
from mlx_vlm_mini.text.messages import Message, images_of, take_beside, to_messages


@dataclass(frozen=True)
class Example:
    """A conversation of a data file.

    Attributes:
        where: file and line, for errors.
        kind: what kind of question it asks, where the line says so.
    """

    messages: tuple[Message, ...]
    where: str
    kind: str | None = None


@dataclass(frozen=True)
class Encoded:
    """An example as the model reads it.

    Attributes:
        input_ids: int32[L].
        answer: bool[L]: true at tokens that the assistant says, its end token included.
        slots: bool[L]: true where an image's features stand.
        pixel_values: float32[B, height, width, 3], B rows over its images.
    """

    input_ids: np.ndarray
    answer: np.ndarray
    slots: np.ndarray
    pixel_values: np.ndarray


def read_examples(file: Path) -> list[Example]:
    """Read and check a data file: every line, and that its images are there and are images.

    Raises:
        PromptError: a line is at fault, named by file and number.
    """
    try:
        # Not splitlines: U+2028 may stand inside a text. utf-8-sig: Notepad's and Excel's files begin with a mark.
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise PromptError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from None
    examples, seen = [], set[Path]()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            entry = json.loads(line)
            messages = _messages(entry, file.parent)
            if not isinstance(entry.get("kind"), str | None):
                raise PromptError(f"its kind is {entry['kind']!r:.40}, not a text")
            for part in images_of(messages):
                if part["image"] not in seen:
                    image_size(part["image"])
                    seen.add(part["image"])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, VLMError) as error:
            reason = str(error) if isinstance(error, VLMError) else f"not a line of training data ({error!r})"
            raise PromptError(f"{where}: {reason}") from None
        examples.append(Example(tuple(messages), where, entry.get("kind")))
    if not examples:
        raise PromptError(f"{file} has no lines")
    return examples


def _messages(entry: Any, folder: Path) -> list[Message]:
    if "conversations" in entry:
        entry = {"messages": _from_llava(entry)}
    said = entry["messages"]
    if not isinstance(said, list) or not all(isinstance(each, dict) and "role" in each for each in said):
        raise PromptError("its messages are no list of objects with a role and a content")
    messages = to_messages(take_beside(entry))
    for part in images_of(messages):
        if not isinstance(part["image"], str):
            raise PromptError("an image is not a path")
        part["image"] = folder / local_path(part["image"])
    if not any(message["role"] == "assistant" for message in messages):
        raise PromptError("the assistant says nothing in it, so there is nothing to learn")
    return messages


def _from_llava(entry: Any) -> list[dict[str, Any]]:
    """LLaVA's conversation form (github.com/haotian-liu/LLaVA, docs/Finetune_Custom_Data.md) as messages."""
    messages = []
    images = [entry["image"]] if isinstance(entry.get("image"), str) else list(entry.get("image") or [])
    for turn in entry["conversations"]:
        role = {"human": "user", "gpt": "assistant", "system": "system"}[turn["from"]]
        text, *rest = turn["value"].split("<image>")
        parts: list[dict[str, Any]] = [{"type": "text", "text": text.strip()}] if text.strip() else []
        for after in rest:
            if not images:
                raise PromptError("it has more <image> than images")
            parts.append({"type": "image", "image": images.pop(0)})
            if after.strip():
                parts.append({"type": "text", "text": after.strip()})
        messages.append({"role": role, "content": parts})
    if images:
        raise PromptError(f"{len(images)} of its images have no <image> in the text")
    return messages


def encode(processor: Processor, example: Example) -> Encoded:
    """Tokens of a conversation, with the assistant's marked.

    The whole conversation is rendered once; where each answer begins and ends is found by rendering the messages before
    it with the prompt for an answer, and those up to it without. An answer at the very end is closed with an end token
    where the chat template does not write one, so that the model learns to stop.

    Raises:
        PromptError: the chat template does not render a conversation as the beginning of a longer one.
    """
    messages = list(example.messages)
    prepared = [processor.prepare(part["image"], part.get("tokens")) for part in images_of(messages)]

    def render(count: int, prompt: bool) -> tuple[str, list[bool]]:
        shown = prepared[: len(images_of(messages[:count]))]
        return processor.expand(messages[:count], shown, add_generation_prompt=prompt)

    text, is_slot = render(len(messages), False)
    ids, offsets, slots = processor.tokenize(text, is_slot)
    ends = np.array([end for _, end in offsets])
    answer = np.zeros(len(ids), dtype=bool)
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            before, through = render(number, True)[0], render(number + 1, False)[0]
            if not through.startswith(before) or not text.startswith(through.rstrip()):
                raise PromptError(f"{example.where}: the chat template does not show where the assistant begins")
            answer |= (ends > len(before)) & (ends <= len(through))
    if messages[-1]["role"] == "assistant" and ids[-1] not in processor.eos_token_ids:
        ids = [*ids, min(processor.eos_token_ids)]
        answer, slots = np.append(answer, True), np.append(slots, False)
    pixels = [image.pixel_values for image in prepared]
    stacked = np.concatenate(pixels) if pixels else np.zeros((0, 1, 1, 3), np.float32)
    return Encoded(np.array(ids, dtype=np.int32), answer, slots, stacked)


@dataclass(frozen=True)
class Batch:
    """Examples side by side, padded at their ends.

    Attributes:
        input_ids: int32[B, L].
        targets: int32[B, L]: the next token where the assistant says it, else -1.
        features_at: int32[B, L]: at an image's slots the row of all features that stands there, else -1.
        pixel_values: float32[N, height, width, 3] over all examples, padded with black rows.
        num_tokens: tokens of the examples, without the padding.
    """

    input_ids: mx.array
    targets: mx.array
    features_at: mx.array
    pixel_values: mx.array
    num_tokens: int

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        return self.input_ids, self.targets, self.features_at, self.pixel_values


def collate(encoded: Sequence[Encoded], num_features: int, *, pad_length: int = 1, pad_rows: int = 1) -> Batch:
    """Lay examples side by side, lengths and rows rounded up to these multiples, so that few shapes occur."""
    length = -(-max(len(each.input_ids) for each in encoded) // pad_length) * pad_length
    ids = np.zeros((len(encoded), length), np.int32)
    targets, features_at = np.full_like(ids, -1), np.full_like(ids, -1)
    row = 0
    for number, each in enumerate(encoded):
        end = len(each.input_ids)
        ids[number, :end] = each.input_ids
        targets[number, : end - 1] = np.where(each.answer[1:], each.input_ids[1:], -1)
        count = int(each.slots.sum())
        features_at[number, :end][each.slots] = np.arange(row, row + count)
        row += count
    pixels = [each.pixel_values for each in encoded if len(each.pixel_values)]
    rows = sum(map(len, pixels))
    if row != rows * num_features:
        raise PromptError(f"the prompts have {row} image tokens, the images give {rows * num_features}")
    if pixels:
        spare = -rows % pad_rows
        pixels.append(np.zeros((spare, *pixels[0].shape[1:]), np.float32))
        stacked = np.concatenate(pixels)
    else:
        stacked = np.zeros((0, 1, 1, 3), np.float32)
    num_tokens = sum(len(each.input_ids) for each in encoded)
    return Batch(mx.array(ids), mx.array(targets), mx.array(features_at), mx.array(stacked), num_tokens)
