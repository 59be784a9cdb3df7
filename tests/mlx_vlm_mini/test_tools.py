"""Tools: what templates are told of them, and calls told from an answer's text."""

import json

import pytest
from checkpoints import PLAIN

from mlx_vlm_mini import load
from mlx_vlm_mini.errors import PromptError
from mlx_vlm_mini.text.literal import MARK, unmark
from mlx_vlm_mini.text.messages import to_messages
from mlx_vlm_mini.text.template import ChatTemplate
from mlx_vlm_mini.text.tools import Call, ToolFilter, check_calls, check_tools, takes_tools

TEMPLATE = (  # after Qwen3-VL's
    "{%- if tools -%}<|im_start|>system\n# Tools\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{%- endif -%}"
    "{%- for message in messages -%}<|im_start|>{{ message.role }}\n"
    "{%- if message.role == 'tool' -%}<tool_response>\n{{ message.content }}\n</tool_response>{%- else -%}{{ message.content }}{%- endif -%}"
    "{%- for call in message.tool_calls or [] -%}<tool_call>\n{\"name\": \"{{ call.function.name }}\", "
    "\"arguments\": {{ call.function.arguments | tojson }}}\n</tool_call>{%- endfor -%}<|im_end|>\n{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}"
)  # fmt: skip
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Today's",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}, "days": {"type": "integer"}}},
    },
}
JSON_CALL = '<tool_call>\n{"name": "weather", "arguments": {"town": "Köln", "days": 2}}\n</tool_call>'
TAG_CALL = "<tool_call>\n<function=weather>\n<parameter=town>\nKöln\n</parameter>\n<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>"
EXPECTED = Call("weather", {"town": "Köln", "days": 2})


def told(text: str, size: int) -> tuple[str, list[Call]]:
    tools = ToolFilter([WEATHER])
    parts = [tools.add(text[place : place + size]) for place in range(0, len(text), size)] + [tools.finish()]
    return "".join(part for part, _ in parts), [call for _, calls in parts for call in calls]


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("No tool.", ("No tool.", [])),
        (JSON_CALL, ("", [EXPECTED])),
        (TAG_CALL, ("", [EXPECTED])),
        (f"Let me look.\n\n{JSON_CALL}", ("Let me look.", [EXPECTED])),
        (f"{JSON_CALL}\n{TAG_CALL}\n", ("", [EXPECTED] * 2)),
        (JSON_CALL.removesuffix("</tool_call>"), ("", [EXPECTED])),  # its end tag is what ended the answer
        ('<tool_call>\n{"name": "weather", "parameters": {}}\n</tool_call>', ("", [Call("weather", {})])),
        ("<tool_call>{broken}</tool_call> and more", ("<tool_call>{broken}</tool_call> and more", [])),
        ('<tool_call>{"name": 3}</tool_call>', ('<tool_call>{"name": 3}</tool_call>', [])),
        ('<tool_call>{"name": "f", "arguments": []}</tool_call>', ('<tool_call>{"name": "f", "arguments": []}</tool_call>', [])),
        ("a <tool", ("a <tool", [])), ("a <b> c < d", ("a <b> c < d", [])), ("<tool_call>", ("<tool_call>", [])),
        ("<tool_call><function=f><parameter=x>\n[1, {}]\n</parameter><parameter=y>\nfree\ntext\n</parameter></function></tool_call>",
         ("", [Call("f", {"x": [1, {}], "y": "free\ntext"})])),
    ],
    ids=range(14),
)  # fmt: skip
def test_calls_are_told_from_text(text, expected, size):
    assert told(text, size) == expected


def test_a_template_is_told_of_tools_calls_and_answers():
    template = ChatTemplate(TEMPLATE, {}, "<image>")
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"town": "Köln", "days": 2}'}}
    messages = to_messages(
        [
            {"role": "user", "content": "Rain?", "tools": [WEATHER]},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "No.", "tool_call_id": "c1"},
        ]
    )
    (text,) = template.render(messages)
    assert json.dumps(WEATHER) in text and JSON_CALL in text and "<tool_response>\nNo.\n</tool_response>" in text
    (plain,) = template.render(to_messages("Rain?"))
    assert (
        "# Tools" not in plain
        and takes_tools(TEMPLATE)
        and not takes_tools("{{ tools }}")
        and not takes_tools("<tool_call>")
    )
    with pytest.raises(PromptError, match="takes no tools in a form that is read here"):
        ChatTemplate("{{ messages[0].content }}", {}, "<image>").render(messages)


def test_what_is_said_of_tools_is_text():
    """Special tokens in names, descriptions and arguments do not become such."""
    template = ChatTemplate(TEMPLATE, {}, "<image>")
    nasty = {
        "type": "function",
        "function": {"name": "<|im_end|>", "description": "a <image> b", "parameters": {"<|im_end|>": ["<image>"]}},
    }
    call = {"function": {"name": "f", "arguments": {"<|im_end|>": "<image>"}}}
    messages = to_messages(
        [
            {"role": "user", "content": "Hi", "tools": [nasty]},
            {"role": "assistant", "content": "x", "tool_calls": [call]},
            {"role": "tool", "content": "y", "name": "<|im_end|>", "tool_call_id": "<image>"},
        ]
    )
    (text,) = template.render(messages, controls=["<|im_end|>", "<|im_start|>"])
    ends = 1 + len(messages)
    assert text.count("<|im_end|>") == ends and text.count(MARK) == 6
    assert unmark(text).count("<|im_end|>") == ends + 3 and unmark(text).count("<image>") == 3


def test_what_is_no_tool_and_no_call():
    for tools, message in (
        ("x", "must be a list"), ([3], r"tools\[0\] must be"), ([WEATHER, {"function": {}}], r"tools\[1\] must be"),
        ([{"function": {"name": "f", "parameters": "x"}}], "must be a JSON schema"),
    ):  # fmt: skip
        with pytest.raises(PromptError, match=message):
            check_tools(tools)
    for calls, message in (
        ([3], r"tool_calls\[0\] must be"), ("x", r"tool_calls\[0\] must be"), ([{"function": {"name": "f", "arguments": "{"}}], "are no JSON"),
        ([{"function": {"name": "f", "arguments": [1]}}], "must be an object"),
    ):  # fmt: skip
        with pytest.raises(PromptError, match=message):
            check_calls(calls)
    with pytest.raises(PromptError, match="'tools', which is not known"):
        to_messages([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tools": [WEATHER]}])


def test_a_model_whose_template_takes_none():
    _, processor = load(PLAIN)
    with pytest.raises(PromptError, match="takes no tools"):
        processor([{"role": "user", "content": "Hi", "tools": [WEATHER]}])
