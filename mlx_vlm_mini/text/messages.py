"""Prompts: what a caller gives -> messages -> text by the checkpoint's chat template -> one slot per image token."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from mlx_vlm_mini.errors import PromptError
from mlx_vlm_mini.images.source import ImageSource
from mlx_vlm_mini.images.video import Video

Message = dict[str, Any]
"""{"role": str, "content": str or list of {"type": "text", "text": str} and {"type": "image", "image": ImageSource},
or {"type": "video", "image": Video}}"""

Prompt = str | Sequence[Any]
"""Text; texts and images in order; or OpenAI-style messages."""


def to_messages(prompt: Prompt, images: Sequence[ImageSource] = ()) -> list[Message]:
    """What a caller gives, as messages of one form.

    Args:
        prompt: a text; a list of texts (`str`) and images (anything else that opens as one) in order; or messages,
            whose content is a text or a list of `text`, `image`, `image_url` and `video` parts.
        images: come before the text; with messages they fill the `{"type": "image"}` parts that name no image.

    Raises:
        PromptError: something in it is neither, or there is nothing to say.
    """
    if isinstance(prompt, str | Path) or not isinstance(prompt, Sequence):
        prompt = [prompt]
    waiting = list(images)
    if prompt and all(isinstance(item, Mapping) and "role" in item for item in prompt):
        messages = [_message(cast(Mapping[str, Any], item), waiting) for item in prompt]
        if waiting:
            raise PromptError(
                f"{len(waiting)} of {len(images)} images have no place in the messages: add an image part for each"
            )
    else:
        shown = [{"type": "image", "image": image} for image in waiting]
        parts = [
            _part(item, []) if isinstance(item, str | Mapping) else {"type": "image", "image": item} for item in prompt
        ]
        if not any(part["type"] != "text" or part["text"].strip() for part in parts):
            raise PromptError("the prompt is empty: say what the model should answer")
        messages = [{"role": "user", "content": shown + parts}]
    if not any(message["content"] for message in messages):
        raise PromptError("the prompt is empty: say what the model should answer")
    return messages


def _message(item: Mapping[str, Any], waiting: list[ImageSource]) -> Message:
    content = item.get("content")
    if isinstance(content, str):
        return {"role": str(item["role"]), "content": content}
    if not isinstance(content, Sequence):
        raise PromptError(f"the {item['role']} message has no content: give a text or a list of parts")
    return {"role": str(item["role"]), "content": [_part(part, waiting) for part in content]}


def _part(part: Any, waiting: list[ImageSource]) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind == "image":
        for key in ("image", "path", "url"):
            if part.get(key) is not None:
                return {"type": "image", "image": part[key]}
        if part.get("base64") is not None:
            return {"type": "image", "image": f"data:;base64,{part['base64']}"}
        if waiting:
            return {"type": "image", "image": waiting.pop(0)}
        raise PromptError('an image part names no image: give {"type": "image", "image": PATH}')
    if kind == "image_url":
        url = part.get("image_url")
        url = url.get("url") if isinstance(url, Mapping) else url
        if isinstance(url, str):
            return {"type": "image", "image": url}
        raise PromptError('an image_url part has no url: give {"type": "image_url", "image_url": {"url": URL}}')
    if kind == "video":
        if part.get("image") is not None:  # of messages that were given before
            return {"type": "video", "image": part["image"]}
        if part.get("video") is None:
            raise PromptError('a video part names no video: give {"type": "video", "video": PATH}')
        return {"type": "video", "image": Video(part["video"], part.get("fps"), part.get("max_frames"))}
    raise PromptError(f"a message part of type {kind!r} is not supported: give text, image, image_url or video parts")


def images_of(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The image parts of messages, and the videos, in order."""
    return [
        part
        for message in messages
        if not isinstance(message["content"], str)
        for part in message["content"]
        if part["type"] in ("image", "video")
    ]


def text_of(message: Message) -> str:
    """A message's text, its images left out."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content if part["type"] == "text")


def split_turns(messages: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """The system messages that open a conversation, and its turns: what was said, up to the end of its answer."""
    start = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    turns: list[list[Message]] = []
    for message in messages[start:]:
        if not turns or (message["role"] != "assistant" and turns[-1][-1]["role"] == "assistant"):
            turns.append([])
        turns[-1].append(message)
    return list(messages[:start]), turns
