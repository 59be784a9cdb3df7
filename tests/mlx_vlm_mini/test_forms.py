"""Forms of answers as they are asked for: what is taken, and what is refused, by the keyword and its place."""

import json
import time

import pytest

from mlx_vlm_mini.errors import PromptError
from mlx_vlm_mini.text import forms
from mlx_vlm_mini.text.forms import make_form

NOT = {"not": {"type": "string"}}
UNIQUE = {"type": "array", "uniqueItems": True}


class Model:
    """What pydantic's models have."""

    @staticmethod
    def model_json_schema():
        return {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.mark.parametrize(
    "asked",
    [
        {"schema": {"type": "object"}}, {"schema": '{"type": "array"}'}, {"schema": "json"}, {"schema": Model},
        {"schema": True}, {"schema": {}}, {"schema": {"title": "A", "description": "b", "default": 1, "const": 1}},
        {"choices": ["yes", "no"]}, {"choices": ("é🙂", 'a "b"', "\\", "\n", "/", "<|im_end|>", "\x01")},
        {"regex": r"\d+"}, {"regex": "a*"}, {"regex": "^a/b$"}, {"grammar": 'start: "a" | start "b"'},
    ],
)  # fmt: skip
def test_forms_that_are_taken(asked):
    form = make_form(**asked)
    assert form is not None and form.kind == next(iter(asked)) and not form.spaced
    assert make_form(**asked) == form


def test_no_form_and_forms_that_begin_with_a_space():
    assert make_form() is None
    assert make_form(regex=r"\s*a").spaced and make_form(choices=[" a", "b"]).spaced
    assert not make_form(schema={"enum": [" a"]}).spaced


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"schema": {}, "regex": "a"}, "an answer has one form, here are schema and regex: give one of them"),
        ({"schema": "{"}, "the schema is no JSON: Expecting property name"),
        ({"schema": "[1]"}, "the schema must be an object, not of type list"),
        ({"schema": 5}, "the schema must be an object, not of type int"),
        ({"schema": False}, "the schema allows nothing"),
        ({"schema": {"a": {1}}}, "the schema cannot be written as JSON: Object of type set"),
        ({"schema": {"minimum": float("nan")}}, "the schema cannot be written as JSON: Out of range float"),
        ({"schema": {"type": "objekt"}}, "the schema at its top cannot be followed: Invalid type: objekt"),
        (
            {"schema": {"properties": {"a": {"type": "array", "items": NOT}}}},
            'the schema at #/properties/a/items cannot be followed: the keyword "not" cannot be enforced: leave it out',
        ),
        (
            {"schema": {"properties": {"a/b": {"if": {}, "then": {}}}}},
            'at #/properties/a~1b cannot be followed: the keywords "if", "then" cannot be enforced: leave them out',
        ),
        (
            {"schema": {"properties": {"a": {"$ref": "#/$defs/x"}}, "$defs": {"x": {"properties": {"q": UNIQUE}}, "unused": NOT}}},
            'at #/$defs/x/properties/q cannot be followed: the keyword "uniqueItems"',
        ),
        (
            {"schema": {"properties": {"a": {"$ref": "#/properties/b"}, "b": {"type": "string", "pattern": "(?=a)"}}}},
            "at #/properties/b cannot be followed: look-around, including look-ahead and look-behind, is not supported",
        ),
        ({"schema": {"items": [{"type": "string"}, NOT]}}, "at #/items/1 cannot be followed"),
        ({"schema": {"anyOf": [{"type": "string"}, {"prefixItems": [UNIQUE]}]}}, "at #/anyOf/1/prefixItems/0 cannot"),
        (
            {"schema": {"properties": {"a": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}}},
            'at #/properties/a cannot be followed: the keyword "oneOf" has alternatives that may both hold: write "anyOf"',
        ),
        ({"schema": {"type": "string", "format": "foo"}}, "Unknown format: foo"),
        ({"schema": {"type": "integer", "minimum": 5, "maximum": 3}}, "nothing satisfies it: minimum (5) is greater"),
        ({"schema": {"$ref": "http://x/y"}}, "Resource 'http://x/y' is not present"),
        ({"schema": {"$ref": "#/$defs/x"}}, "Pointer '/$defs/x' does not exist"),
        ({"schema": {"properties": 5}}, "properties must be an object"),
        ({"schema": {"$ref": {"not": {}}}}, "the schema at its top cannot be followed"),
        ({"schema": {"type": "object", "properties": {"a": False}, "required": ["a"]}}, "property 'a' is unsatisfiable"),
        ({"choices": []}, "there must be 1 to 10,000 choices, not 0"),
        ({"choices": "a,b"}, "choices must be a list of texts, not 'a,b'"),
        ({"choices": ["a", 5]}, "choices must be a list of texts, not of type list"),
        ({"choices": ["a", ""]}, "choice 2 is empty: leave it out"),
        ({"choices": ["a", "b", "a"]}, "the choice 'a' stands twice"),
        ({"choices": ["\ud800"]}, "choice 1 is not valid UTF-8 text"),
        ({"regex": ""}, "regex must be a text that is not empty, not ''"),
        ({"regex": 5}, "regex must be a text that is not empty, not of type int"),
        ({"regex": "(("}, "the regex cannot be followed: unclosed group"),
        ({"regex": "(?=a)b"}, "look-around, including look-ahead and look-behind, is not supported"),
        ({"regex": r"[^\s\S]"}, "the regex cannot be followed: it matches no text"),
        ({"regex": "a{0}"}, "the regex matches no text but the empty one"),
        ({"regex": "a" * 30_000}, "the regex has 30,000 characters, at most 20,000 are read"),
        ({"grammar": 'start: "a'}, "the grammar cannot be followed: 1(10): lexer error"),
        ({"grammar": 'foo: "a"'}, "the grammar cannot be followed: no start rule found"),
        ({"grammar": "start: <|im_end|>"}, 'it names the special token "<|im_end|>", and answers have none'),
        ({"grammar": "start: start"}, "the grammar cannot be followed: it matches no text"),
        ({"grammar": 'start: %json {"not": {}}'}, 'the keyword "not" cannot be enforced'),
    ],
)  # fmt: skip
def test_forms_that_are_refused(asked, said):
    with pytest.raises(PromptError) as refused:
        make_form(**asked)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def nested(depth: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"schema": nested(5000)}, "nested too deep"),
        ({"schema": '{"a":' * 100_000}, "nested too deep"),
        ({"schema": nested(300)}, "recursion limit"),
        ({"schema": {"properties": {f"k{n}": {} for n in range(60_000)}}}, "at most 500,000 are read"),
        ({"schema": " " * 600_000}, "at most 500,000 are read"),
        ({"regex": "(" * 900 + "a" + ")*" * 900}, "nested parentheses"),
        ({"grammar": "start: " + "(" * 3000 + '"a"' + ")" * 3000}, "too deeply nested"),
    ],
)
def test_hostile_forms_end_soon(asked, said):
    begin = time.perf_counter()
    with pytest.raises(PromptError, match=said):
        make_form(**asked)
    assert time.perf_counter() - begin < 10


@pytest.mark.parametrize(
    "asked",
    [
        {"schema": {"allOf": [{"pattern": f"a.{{{n}}}b"} for n in range(40)]}},
        {"grammar": "start: /b+//b+//b+/"},
        {"grammar": "start: A\nA: " + " & ".join(f"/(?s:.*)a.{{{n}}}b(?s:.*)/" for n in range(40))},
    ],
)
def test_patterns_that_take_for_ever_are_tried_in_a_process_that_ends(asked, monkeypatch):
    monkeypatch.setattr(forms, "_SECONDS", 1)
    monkeypatch.setattr(forms, "_TRY", forms._TRY.replace("RLIMIT_CPU, (2, 3)", "RLIMIT_CPU, (1, 2)"))
    with pytest.raises(PromptError, match="is too complex: it needs above 1 s to be read"):
        make_form(**asked)


def test_a_large_schema_is_taken():
    schema = {
        "type": "object",
        "properties": {f"key{n}": {"type": "string", "pattern": f"^{n}[a-z]$"} for n in range(40)},
    }
    assert make_form(schema=schema) is not None


@pytest.mark.parametrize(
    ("text", "value"),
    [('{"a":1}', {"a": 1}), ("[1.5]", [1.5]), ('"x"', "x"), ('{"a":', None), ("NaN", None), ("[" * 5000 + "]" * 5000, None)],
)  # fmt: skip
def test_what_an_answer_is_the_json_of(text, value):
    assert make_form(schema={}).parse(text) == value
    assert make_form(regex="a").parse(text) is None


def test_a_schemas_own_options_are_not_taken():
    """White space is not free, whatever the schema says to llguidance."""
    form = make_form(schema={"x-guidance": {"whitespace_flexible": True, "lenient": True}, "type": "object"})
    assert json.loads(form.lark.removeprefix("start: %json "))["x-guidance"] == {"whitespace_flexible": False}
    with pytest.raises(PromptError, match="not"):
        make_form(schema={"x-guidance": {"lenient": True}, "not": {}})
