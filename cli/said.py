"""Messages of a conversation, for people: what they would have typed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .line import parse_line

if TYPE_CHECKING:
    from mlx_vlm_mini import Chat


def last_said(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The last message of a conversation that its user wrote, alone in a list; or none."""
    return [message for message in messages if message["role"] == "user"][-1:]


def parts_of(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def as_typed(messages: Sequence[Mapping[str, Any]]) -> str | None:
    """Messages as one would type them; None where there is nothing to type."""
    typed = ""
    for part in (part for message in messages for part in parts_of(message)):
        text = part["text"] if part["type"] == "text" else typed_name(part) or ""
        apart = typed and text and not typed[-1].isspace() and (typed[-1].isalnum() or text[0].isalnum())
        typed += f" {text}" if apart else text
    return typed or None


def typed_name(part: Mapping[str, Any]) -> str | None:
    """How a line says a picture; None of one that came from no file and no address."""
    if part["type"] != "image":
        return None  # a video cannot be typed
    origin = part["image"].origin
    here = Path.cwd()
    path = origin.path.relative_to(here) if origin.path and origin.path.is_relative_to(here) else origin.path
    name = origin.name if path is None else str(path)
    typed = f'@"{name}"'
    return typed if [getattr(found, "source", None) for found in parse_line(typed)] == [name] else None


def prepared_by(chat: "Chat", message: Mapping[str, Any]) -> Any:
    """A message's content with its pictures made ready for another model, read again where need be."""
    if isinstance(message["content"], str):
        return message["content"]
    parts = []
    for part in message["content"]:
        if part["type"] == "image":
            origin = part["image"].origin
            source = origin if origin.data is not None else origin.path
            part = {"type": "image", "image": chat.features.prepare(chat.processor, source)}
        elif part["type"] == "video":
            part = {"type": "video", "image": chat.features.prepare(chat.processor, part["image"].video)}
        parts.append(part)
    return parts
