"""Tools: what a chat template is told of them, and an answer's calls of them, told from its text.

Sources: the chat templates of Qwen2.5, Qwen3-VL (JSON, after Nous Hermes) and Qwen3.5 (parameters in tags).
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_vlm_mini.errors import PromptError

from .thinking import length_of_beginning

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>\n?(.*?)\s*</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>\s*", re.DOTALL)


@dataclass(frozen=True)
class Call:
    """A tool that an answer calls.

    Attributes:
        name: of the tool.
        arguments: by their names.
    """

    name: str
    arguments: dict[str, Any]


def takes_tools(template: str) -> bool:
    """Whether a chat template tells its model of tools, and the model calls them in a form that is read here."""
    return re.search(r"\btools\b", template) is not None and OPEN in template


def check_tools(tools: Any) -> list[dict[str, Any]]:
    """Tools in OpenAI's form: `{"type": "function", "function": {"name", "description", "parameters"}}`.

    Raises:
        PromptError: they are not.
    """
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise PromptError("tools must be a list")
    for number, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise PromptError(f'tools[{number}] must be {{"type": "function", "function": {{"name": ..., ...}}}}')
        if not isinstance(function.get("parameters"), Mapping | None):
            raise PromptError(f"the parameters of tools[{number}] must be a JSON schema")
    return [dict(tool) for tool in tools]


def check_calls(calls: Any) -> list[dict[str, Any]]:
    """Calls of an earlier answer in OpenAI's form, their arguments as objects, which templates take.

    Raises:
        PromptError: they are not.
    """
    found = []
    for number, call in enumerate(calls if isinstance(calls, Sequence) and not isinstance(calls, str) else [calls]):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise PromptError(f'tool_calls[{number}] must be {{"function": {{"name": ..., "arguments": ...}}}}')
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                raise PromptError(f"the arguments of tool_calls[{number}] are no JSON") from None
        if not isinstance(arguments, Mapping | None):
            raise PromptError(f"the arguments of tool_calls[{number}] must be an object")
        own = {"name": function["name"], "arguments": dict(arguments or {})}
        named = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        found.append({**named, "type": "function", "function": own})
    return found


def texts_in(value: Any) -> list[str]:
    """All texts in a JSON value, keys included, in order."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for key, each in value.items() for text in (str(key), *texts_in(each))]
    return [text for each in value for text in texts_in(each)] if isinstance(value, list | tuple) else []


def replace_texts(value: Any, take: Callable[[], str]) -> Any:
    """The same value with other texts, `take` giving them in the order of `texts_in`."""
    if isinstance(value, str):
        return take()
    if isinstance(value, Mapping):
        return {take(): replace_texts(each, take) for each in value.values()}
    return [replace_texts(each, take) for each in value] if isinstance(value, list | tuple) else value


class ToolFilter:
    """Tells an answer's calls from its text, piece by piece; a piece that may be part of a tag waits. A call that
    cannot be read is text."""

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        """`tools`: those that the model was told of, by whose schemas the types of arguments in tags are known."""
        self._tools = {tool["function"]["name"]: tool["function"] for tool in tools}
        self._held, self._called = "", False

    def add(self, piece: str) -> tuple[str, list[Call]]:
        """What a piece completes: text, and calls."""
        self._held += piece
        text = ""
        calls: list[Call] = []
        while True:
            if self._called:  # white space between calls belongs to them
                self._held = self._held.lstrip()
                self._called = not self._held
            before, tag, rest = self._held.partition(OPEN)
            inside, end, after = rest.partition(CLOSE)
            if not end:
                said = before if tag else before[: len(before) - length_of_beginning(before, [OPEN])]
                said = said.rstrip()  # and so does what stands before one
                self._held = self._held[len(said) :]
                return text + said, calls
            call = self._read(inside)
            self._called, self._held = call is not None, after
            if call is None:
                text += before + tag + inside + end
            else:
                text += before.rstrip()
                calls.append(call)

    def finish(self) -> tuple[str, list[Call]]:
        """What is left at the answer's end: a call whose end tag is missing is read, too."""
        held, self._held = self._held, ""
        begun = held.lstrip()
        call = self._read(begun.removeprefix(OPEN)) if begun.startswith(OPEN) else None
        return ("", [call]) if call is not None else (held, [])

    def _read(self, text: str) -> Call | None:
        function = _FUNCTION.fullmatch(text)
        if function is not None:
            name = function[1].strip()
            schema = (self._tools.get(name, {}).get("parameters") or {}).get("properties")
            kinds = schema if isinstance(schema, Mapping) else {}
            given = [(key.strip(), each) for key, each in _PARAMETER.findall(function[2])]
            return Call(name, {key: _value(each, kinds.get(key)) for key, each in given})
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if not isinstance(found, dict) or not isinstance(found.get("name"), str):
            return None
        arguments = found.get("arguments", found.get("parameters", {}))
        return Call(found["name"], arguments) if isinstance(arguments, dict) else None


def _value(text: str, schema: Any) -> Any:
    """A parameter's value: a text where its schema says so, else the JSON that it is, if it is any."""
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    if kind == "string":
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
