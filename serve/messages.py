"""Messages as OpenAI's and Ollama's clients write them -> the library's."""

from collections.abc import Mapping
from typing import Any

from mlx_vlm_mini.images.source import may_have_pages
from mlx_vlm_mini.text.messages import images_of
from mlx_vlm_mini.text.thinking import KEYS

from .limits import Limits
from .refusals import Refusal

_ROLES = {"developer": "system", "function": "tool"}
_DETAILS = ("auto", "high", None)
_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


def read_messages(given: Any, limits: Limits) -> list[dict[str, Any]]:
    """The `messages` of a chat completion.

    Content may be a text, a list of parts or null; parts are texts, pictures and PDFs. What else a message has (`name`,
    `annotations`, ...) is left out, the thinking and the calls of an answer excepted.

    Raises:
        Refusal: they are none, or hold what is not taken here.
    """
    if not isinstance(given, list) or not given:
        raise Refusal(400, "messages must be a list with one message or more", "messages")
    found = []
    for number, message in enumerate(given):
        where = f"messages[{number}]"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise Refusal(400, f"{where} must be an object with a role", where)
        role, content = message["role"], message.get("content")
        if isinstance(content, list):
            content = [_part(part, f"{where}.content[{place}]") for place, part in enumerate(content)]
        elif content is None:
            content = ""
        elif not isinstance(content, str):
            raise Refusal(400, f"{where}.content must be a text, a list of parts or null", f"{where}.content")
        found.append({"role": _ROLES.get(role, role), "content": content, **_beside(message)})
    return checked(found, limits)


def read_ollama(given: Any, limits: Limits) -> list[dict[str, Any]]:
    """The `messages` of `/api/chat`: texts with `images` in base64.

    Raises:
        Refusal: they are none, or hold what is not taken here.
    """
    if not isinstance(given, list):
        raise Refusal(400, "messages must be a list")
    found = []
    for number, message in enumerate(given):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise Refusal(400, f"messages[{number}] must be an object with a role")
        content = message.get("content") or ""
        if not isinstance(content, str):
            raise Refusal(400, f"the content of messages[{number}] must be a text")
        role = message["role"]
        found.append(
            {
                "role": _ROLES.get(role, role),
                "content": with_images(content, message.get("images")),
                **_beside(message),
            }
        )
    return checked(found, limits)


def _beside(message: Mapping[str, Any]) -> dict[str, Any]:
    """What an answer was thought about and which tools it called, and of a tool's answer which call it belongs to."""
    if message["role"] in ("tool", "function"):
        name = message.get("name") or message.get("tool_name")
        named = {"tool_call_id": message.get("tool_call_id"), "name": name}
        return {key: value for key, value in named.items() if isinstance(value, str)}
    if message["role"] != "assistant":
        return {}
    found = next((message[key] for key in KEYS if isinstance(message.get(key), str) and message[key]), None)
    calls = message.get("tool_calls")
    return {**({} if found is None else {KEYS[0]: found}), **({"tool_calls": calls} if calls else {})}


def with_images(text: str, images: Any) -> Any:
    """A text after pictures in base64, as a message's content.

    Raises:
        Refusal: they are no list of texts.
    """
    if not images:
        return text
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise Refusal(400, "images must be a list of pictures in base64")
    parts = [
        {"type": "image", "image": image if image[:5].lower() == "data:" else f"data:;base64,{image}"}
        for image in images
    ]
    return [*parts, {"type": "text", "text": text}]


def checked(messages: list[dict[str, Any]], limits: Limits) -> list[dict[str, Any]]:
    """Raises Refusal where messages hold too many pictures."""
    count = len(images_of(messages))
    if count > limits.images:
        raise Refusal(400, f"the messages hold {count} pictures, and the limit is {limits.images}", "messages")
    return messages


def _part(part: Any, where: str) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(kind, str):
        raise Refusal(400, f"{where} must be an object with a type", where)
    if kind in _TEXTS:
        text = part.get(_TEXTS[kind])
        if not isinstance(text, str):
            raise Refusal(400, f"{where}.{_TEXTS[kind]} must be a text", where)
        return {"type": "text", "text": text}
    if kind in ("image_url", "input_image"):
        return _image(part, where)
    if kind in ("file", "input_file"):
        return _file(part, where)
    raise Refusal(400, f"{where} is of type {kind!r}: texts, image_url parts and files with a PDF are taken", where)


def _image(part: Mapping[str, Any], where: str) -> dict[str, Any]:
    given = part.get("image_url")
    url, detail = (given.get("url"), given.get("detail")) if isinstance(given, Mapping) else (given, part.get("detail"))
    if not isinstance(url, str):
        raise Refusal(400, f"{where} has no url: give " + '{"image_url": {"url": "data:image/png;base64,..."}}', where)
    if detail not in _DETAILS:
        raise Refusal(400, f"{where}.image_url.detail is {detail!r}, and auto and high are what is taken", where)
    return {"type": "image", "image": url}


def _file(part: Mapping[str, Any], where: str) -> dict[str, Any]:
    given = part.get("file")
    file = given if isinstance(given, Mapping) else part
    data = file.get("file_data")
    if not isinstance(data, str):
        what = (
            "file_id names a file that was uploaded, and none are kept here"
            if file.get("file_id")
            else "it has no file_data"
        )
        raise Refusal(400, f"{where}: {what}: send the file itself as file_data", where)
    data = data if data[:5].lower() == "data:" else f"data:application/pdf;base64,{data}"
    if not may_have_pages(data) and not data[:11].lower() == "data:image/":
        raise Refusal(
            400, f"{where}: files are taken as PDFs or pictures, not as {data[5:50].partition(';')[0]}", where
        )
    return {"type": "image", "image": data}
