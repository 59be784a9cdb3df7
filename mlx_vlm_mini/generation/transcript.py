"""A conversation as JSON, its pictures by path and SHA-256.

    {"format": "mlx-vlm-mini conversation", "version": 1, "model": FINGERPRINT, "settings": {...}, "options": {...},
     "messages": [{"role": "user", "content": [{"type": "text", "text": ...},
                                               {"type": "image", "path": ..., "sha256": ..., "tokens": ...}]}],
     "cache": null or the SHA-256 of what the cache beside it holds}

An answer's message also has its "reasoning_content" where the model thought before it. A picture that came from no file
is written beside the JSON, under its SHA-256; `tokens` is there where it was allowed another number than the checkpoint
says.
"""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mlx_vlm_mini.errors import CheckpointError, PromptError
from mlx_vlm_mini.files import read_json, write_whole
from mlx_vlm_mini.images.source import Picture, read_image
from mlx_vlm_mini.processor import PreparedImage
from mlx_vlm_mini.text.messages import Message
from mlx_vlm_mini.text.thinking import KEYS

FORMAT, VERSION = "mlx-vlm-mini conversation", 1
_NUMBER, _WHOLE = (int, float), (int,)
_OPTIONS: dict[str, tuple[type, ...]] = {  # of stream.Options, those that a file can hold
    "max_tokens": _WHOLE, "temperature": _NUMBER, "top_p": _NUMBER, "min_p": _NUMBER, "top_k": _WHOLE,
    "repetition_penalty": _NUMBER, "seed": _WHOLE, "stop": (str, list), "think": (bool,), "prefill_step": _WHOLE,
    "schema": (str, dict), "choices": (list,), "regex": (str,), "grammar": (str,), "image_tokens": _WHOLE,
}  # fmt: skip
_SETTINGS: dict[str, tuple[type, ...]] = {"context": _WHOLE, "on_full": (str,), "kv_bits": _WHOLE, "rotate": _WHOLE}


@dataclass(frozen=True)
class Transcript:
    """What a file says of a conversation.

    Attributes:
        messages: their images read, not decoded.
        settings, options: keywords of `Chat`.
        model: the fingerprint of the model that it was held with.
        cache: the SHA-256 of what the cache holds; None where none was saved.
        notes: pictures that are others now, a line each.
    """

    messages: list[Message]
    settings: dict[str, Any]
    options: dict[str, Any]
    model: str
    cache: str | None
    notes: list[str]


def places(path: Path) -> tuple[Path, Path]:
    """The JSON file and the cache's: `path` itself if it ends in .json, else conversation.json in the folder `path`."""
    file = path if path.suffix.lower() == ".json" else path / "conversation.json"
    return file, file.with_suffix(".safetensors")


def write_transcript(
    file: Path,
    messages: Sequence[Message],
    *,
    settings: Mapping[str, Any],
    options: Mapping[str, Any],
    model: str,
    cache: str | None,
) -> None:
    """Write a conversation whose images are prepared.

    Raises:
        PromptError: it cannot be written.
    """
    content = {
        "format": FORMAT,
        "version": VERSION,
        "model": model,
        "settings": dict(settings),
        "options": {name: value for name, value in options.items() if value is not None and _fits(name, value)},
        "messages": [_plain_message(message, file) for message in messages],
        "cache": cache,
    }
    write_whole(file, lambda place: place.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8"))


def _fits(name: str, value: Any) -> bool:
    value = list(value) if isinstance(value, tuple) else value
    return _is_one_of(value, _OPTIONS.get(name, ()))


def _is_one_of(value: Any, kinds: tuple[type, ...]) -> bool:
    """Whether a value has one of these types; a list is one of texts, and True is no number."""
    if isinstance(value, list) and not all(isinstance(item, str) for item in value):
        return False
    return isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))


def _plain_message(message: Message, file: Path) -> Message:
    more = {key: message[key] for key in KEYS if key in message}
    if isinstance(message["content"], str):
        return {"role": message["role"], "content": message["content"], **more}
    if any(part["type"] == "video" for part in message["content"]):
        raise PromptError("a conversation with a video is not saved: clear it, or go on without saving")
    content = [_plain_image(part["image"], file) if part["type"] == "image" else part for part in message["content"]]
    return {"role": message["role"], "content": content, **more}


def _plain_image(image: PreparedImage, file: Path) -> dict[str, Any]:
    origin, folder = image.origin, file.parent.absolute()
    path, sha256 = origin.path, origin.sha256
    if path is None:
        data, suffix = origin.data, "image"
        if isinstance(data, Image.Image):
            stream = io.BytesIO()
            data.save(stream, "PNG", compress_level=1)
            data, suffix, sha256 = stream.getvalue(), "png", hashlib.sha256(stream.getvalue()).hexdigest()
        picture = data or b""
        path = folder / f"{file.stem}-{sha256[:16]}.{suffix}"
        write_whole(path, lambda place: place.write_bytes(picture))
    inside = path.relative_to(folder) if path.is_relative_to(folder) else path
    own = {} if image.budget is None else {"tokens": image.budget}
    return {"type": "image", "path": str(inside), "sha256": sha256, **own}


def read_transcript(file: Path) -> Transcript:
    """Read a conversation.

    Raises:
        PromptError: the file is missing or does not hold a conversation.
        ImageError: a picture is missing.
    """
    try:
        content = read_json(file)
    except CheckpointError as error:
        raise PromptError(str(error)) from None
    if content.get("format") != FORMAT or content.get("version") != VERSION:
        raise PromptError(f"{file} is not a conversation that this version of mlx-vlm-mini saved")
    messages, model, cache = content.get("messages"), content.get("model"), content.get("cache")
    settings, options = content.get("settings"), content.get("options")
    if not isinstance(messages, list) or not isinstance(model, str) or not isinstance(cache, str | None):
        raise PromptError(f"{file} lacks its messages, or its model or cache is no text")
    for name, values, known in (("settings", settings, _SETTINGS), ("options", options, _OPTIONS)):
        if not isinstance(values, dict):
            raise PromptError(f"{file}: {name} must be an object")
        for key, value in values.items():
            wrong = not _is_one_of(value, known.get(key, ()))
            if wrong and not (name == "settings" and key in known and value is None):
                raise PromptError(f"{file}: {key}={json.dumps(value)[:80]} is none of a conversation's {name}")
    notes: list[str] = []
    read = [_read_message(message, file, number, notes) for number, message in enumerate(messages, 1)]
    return Transcript(read, settings or {}, options or {}, model, cache, notes)


def _read_message(message: Any, file: Path, number: int, notes: list[str]) -> Message:
    role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
    thinking = message.get(KEYS[0]) if role == "assistant" else None
    if not isinstance(thinking, str | None):
        raise PromptError(f"{file}: message {number} has a {KEYS[0]} that is no text")
    more = {} if thinking is None else {KEYS[0]: thinking}
    if isinstance(role, str) and isinstance(content, str):
        return {"role": role, "content": content, **more}
    if not isinstance(role, str) or not isinstance(content, list):
        raise PromptError(f"{file}: message {number} is not a role with a text or a list of parts")
    parts: list[dict[str, Any]] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        elif kind == "image" and isinstance(part.get("path"), str) and isinstance(part.get("sha256"), str):
            own = {"tokens": part["tokens"]} if type(part.get("tokens")) is int and part["tokens"] > 0 else {}
            parts.append({"type": "image", "image": _read_picture(part, file, notes), **own})
        else:
            raise PromptError(f"{file}: message {number} has a part that is neither text nor an image with its sha256")
    return {"role": role, "content": parts, **more}


def _read_picture(part: Mapping[str, str], file: Path, notes: list[str]) -> Picture:
    path = file.parent / part["path"]
    try:
        regular = path.is_file() or not path.exists()
    except (OSError, ValueError):
        regular = False
    if not regular:  # a device might never end
        raise PromptError(f"{file}: {part['path'][:200]!r} is not a file")
    picture = read_image(path)
    if picture.sha256 != part["sha256"]:
        notes.append(f"{path} has changed since the conversation was saved: the model is shown what it is now")
    return picture
