"""Prompts: what a caller gives -> messages -> text by the checkpoint's chat template -> one slot per image token."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from mlx_vlm_mini.errors import PromptError
from mlx_vlm_mini.images.source import Access, ImageSource, may_have_pages, read_images
from mlx_vlm_mini.images.video import Video

from .thinking import KEYS
from .tools import check_calls, check_tools

Message = dict[str, Any]
"""{"role": str, "content": str or list of {"type": "text", "text": str} and {"type": "image", "image": ImageSource},
with "tokens" where the image may have another number than usual, or {"type": "video", "image": Video}}; of an answer
that was thought about also "reasoning_content": str; "tools" that may be called from there on, "tool_calls" of an
answer, all in OpenAI's form"""

Prompt = str | Sequence[Any]
"""Text; texts and images in order; or OpenAI-style messages."""


_MESSAGE_KEYS = {"role", "content", "images"}
_NAMES = ("image", "path", "url")
_PART_KEYS: dict[str, set[str]] = {
    "text": {"text"}, "image": {*_NAMES, "base64", "tokens"}, "image_url": {"image_url", "tokens"},
    "video": {"image", "video", "fps", "max_frames"},
}  # fmt: skip


def to_messages(
    prompt: Prompt, images: ImageSource | Sequence[ImageSource] = (), access: Access | None = None
) -> list[Message]:
    """What a caller gives, as messages of one form.

    Args:
        prompt: a text; a list of texts (`str`) and images (anything else that opens as one) in order; or messages,
            whose content is a text or a list of `text`, `image`, `image_url` and `video` parts.
        images: come before the text; with messages they fill the `{"type": "image"}` parts that name no image. One
            image may stand for a list of it. A message's own `images` (Ollama's form) are taken so, too.
        access: what names may reach, so that a PDF becomes its pages, an image each (`report.pdf`, `report.pdf[2-5]`);
            None leaves it as it is.

    Raises:
        PromptError: something in it is neither, or there is nothing to say.
        ImageError: a PDF is at fault.
    """
    if isinstance(prompt, str | Path) or not isinstance(prompt, Sequence):
        prompt = [prompt]
    waiting: list[Any] = [images] if _is_one(images) else list(cast(Sequence[ImageSource], images))
    given = len(waiting)
    if prompt and all(isinstance(item, Mapping) and "role" in item for item in prompt):
        messages = [_message(cast(Mapping[str, Any], item), waiting) for item in prompt]
        if waiting:
            raise PromptError(
                f"{len(waiting)} of {given} images have no place in the messages: add an image part for each"
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
    if access is not None and access.pdfs:
        messages = [{**message, "content": _with_pages(message["content"], access)} for message in messages]
    return messages


def _is_one(images: Any) -> bool:
    """Whether it is an image, not several: texts and bytes are sequences, too; PIL images and arrays are none."""
    if isinstance(images, str | Path | bytes | bytearray | memoryview):
        return True
    return not isinstance(images, Sequence | Iterator)


def _with_pages(content: Any, access: Access) -> Any:
    """A PDF's pages in its place."""
    if isinstance(content, str):
        return content
    parts: list[dict[str, Any]] = []
    for part in content:
        source = part.get("image") if part["type"] == "image" else None
        pages = read_images(source, access) if source is not None and may_have_pages(source) else [source]
        parts += [{**part, "image": page} for page in pages] if source is not None else [part]
    return parts


def _says_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, list | dict | str) and not value)  # arrays compare number by number


def _check_keys(what: str, given: Mapping[str, Any], known: set[str]) -> None:
    """Raises PromptError where something is said that would be left out without a word."""
    unknown = [str(key) for key, value in given.items() if key not in known and not _says_nothing(value)]
    if unknown:
        raise PromptError(f"{what} has {unknown[0]!r}, which is not known: it takes {', '.join(sorted(known))}")


def take_beside(entry: Mapping[str, Any]) -> Any:
    """The messages of a line {"messages": [...], "images": [...]}, with these images in them.

    They fill the image parts that name none, in order; where there are no such parts the first user message shows them.

    Raises:
        PromptError: there are more or fewer of them than parts, or videos stand beside the messages.
    """
    for key in ("videos", "video"):
        if entry.get(key):
            raise PromptError(f"its {key!r} stand beside the messages: put them into the message that shows them")
    messages, images = entry["messages"], entry.get("images") or entry.get("image")
    if not images:
        return messages
    images = [images] if isinstance(images, str) else [*images]
    contents = [message.get("content") for message in messages]
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    named = {*_NAMES, "base64"}
    empty = [part for part in parts if part.get("type") == "image" and not named & part.keys()]
    if empty and len(empty) != len(images):
        raise PromptError(
            f"its messages have {len(empty)} places for an image, and {len(images)} images stand beside them"
        )
    for part, image in zip(empty, images, strict=False):
        part["image"] = image
    if not empty:
        if not messages:
            raise PromptError("it has images and no message that shows them")
        first = next((number for number, message in enumerate(messages) if message.get("role") == "user"), 0)
        messages = [*messages]
        messages[first] = {**messages[first], "images": [*images, *(messages[first].get("images") or [])]}
    return messages


def _message(item: Mapping[str, Any], waiting: list[ImageSource]) -> Message:
    role, content, own = str(item["role"]), item.get("content"), item.get("images")
    answers = role == "assistant"
    own_keys = {*KEYS, "tool_calls"} if answers else {"tool_call_id", "name"} if role == "tool" else {"tools"}
    _check_keys(f"the {role[:40]} message", item, _MESSAGE_KEYS | own_keys)
    thinking = next((item[key] for key in KEYS if answers and not _says_nothing(item.get(key))), None)
    if not isinstance(thinking, str | None):
        raise PromptError("the assistant message's thinking is no text: leave it out")
    more: dict[str, Any] = {} if thinking is None else {KEYS[0]: thinking}
    if item.get("tools") and not answers:
        more["tools"] = check_tools(item["tools"])
    if item.get("tool_calls") and answers:
        more["tool_calls"] = check_calls(item["tool_calls"])
    if role == "tool":
        more |= {key: str(item[key]) for key in ("tool_call_id", "name") if item.get(key)}
    shown: list[Any] = [] if own is None else [own] if _is_one(own) else list(own)
    if isinstance(content, str):
        if not shown:
            return {"role": role, "content": content, **more}
        images = [{"type": "image", "image": image} for image in shown]
        return {"role": role, "content": [*images, {"type": "text", "text": content}], **more}
    if not isinstance(content, Sequence):
        raise PromptError(f"the {role[:40]} message has no content: give a text or a list of parts")
    parts = [_part(part, shown if own is not None else waiting) for part in content]
    if shown:
        raise PromptError(
            f"{len(shown)} of the {role[:40]} message's images have no place in it: add an image part each"
        )
    return {"role": role, "content": parts, **more}


def _part(part: Any, waiting: list[ImageSource]) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if not isinstance(kind, str):
        raise PromptError("a message part has no type that is a text: give text, image, image_url or video parts")
    if isinstance(part, Mapping) and kind in _PART_KEYS:
        _check_keys(f"the {kind} part", part, {"type", *_PART_KEYS[kind]})
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind in ("image", "image_url"):
        return {"type": "image", "image": _source(part, waiting), **_budget(part)}
    if kind == "video":
        if part.get("image") is not None:  # of messages that were given before
            return {"type": "video", "image": part["image"]}
        if part.get("video") is None:
            raise PromptError('a video part names no video: give {"type": "video", "video": PATH}')
        return {"type": "video", "image": Video(part["video"], part.get("fps"), part.get("max_frames"))}
    raise PromptError(f"a message part of type {kind!r} is not supported: give text, image, image_url or video parts")


def _source(part: Mapping[str, Any], waiting: list[ImageSource]) -> ImageSource:
    """What an image part names; the next that waits where it names none."""
    if part["type"] == "image_url":
        url = part.get("image_url")
        url = url.get("url") if isinstance(url, Mapping) else url
        if isinstance(url, str):
            return url
        raise PromptError('an image_url part has no url: give {"type": "image_url", "image_url": {"url": URL}}')
    for key in _NAMES:
        if part.get(key) is not None:
            return cast(ImageSource, part[key])
    if part.get("base64") is not None:
        return f"data:;base64,{part['base64']}"
    if waiting:
        return waiting.pop(0)
    raise PromptError('an image part names no image: give {"type": "image", "image": PATH}')


def _budget(part: Mapping[str, Any]) -> dict[str, int]:
    """The tokens that an image part allows its image, where it says them."""
    tokens = part.get("tokens")
    if tokens is None:
        return {}
    if type(tokens) is not int or tokens < 1:
        raise PromptError(f"an image part's tokens must be a whole number of 1 or more, not {tokens!r}")
    return {"tokens": tokens}


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
