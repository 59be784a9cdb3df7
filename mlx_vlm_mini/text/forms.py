"""The form of an answer, as a caller asks for it: JSON Schema, a list of choices, a regular expression, a grammar.

Each becomes a grammar of llguidance, which follows it token by token (`generation/constraints.py`). JSON is written
without free white space, so that a model cannot go on with spaces for ever.

Source: github.com/guidance-ai/llguidance, docs/syntax.md and docs/json_schema.md.
"""

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Literal

from mlx_vlm_mini.errors import PromptError

Kind = Literal["schema", "choices", "regex", "grammar"]
Space = Literal["never", "maybe", "always"]

_MOST = {"schema": 500_000, "choices": 500_000, "regex": 20_000, "grammar": 500_000}  # characters
_MOST_CHOICES = 10_000
_QUICK = {"schema": 50_000, "choices": 20_000, "regex": 2_000, "grammar": 0}  # characters that are soon compiled
_MOST_PATTERNS = 8  # that are soon compiled together: the time can double with each
_PATTERNS = re.compile(r'"(?:pattern|patternProperties|format)":')
_SECONDS, _BYTES = 2, 4 * 2**30  # of a process that tries to compile a form
_MOST_TRIED = 300  # parts of a schema that are compiled alone, to find the one that is at fault
_LISTS = ("prefixItems", "items", "anyOf", "oneOf", "allOf")
_OBJECTS = ("$defs", "definitions", "properties", "patternProperties")
_SINGLE = ("items", "additionalItems", "additionalProperties")
_SHARED = ("$defs", "definitions")
_TRY = f"""
import json, sys
from contextlib import suppress
from resource import RLIMIT_AS, RLIMIT_CPU, setrlimit
setrlimit(RLIMIT_CPU, ({_SECONDS}, {_SECONDS + 1}))
with suppress(ValueError, OSError):
    setrlimit(RLIMIT_AS, ({_BYTES}, {_BYTES}))
import llguidance
tokens = llguidance.LLTokenizer("byte")
matcher = llguidance.LLMatcher(tokens, sys.stdin.read(), log_level=0)
matcher.compute_bitmask()
print("done")
"""


@dataclass(frozen=True)
class Form:
    """What an answer may be.

    Attributes:
        kind: what it was asked for as.
        lark: a grammar in llguidance's form of Lark; `start` is the answer.
        spaced: whether an answer may begin with a space.
    """

    kind: Kind
    lark: str
    spaced: bool

    def grammar(self, space: Space, *, forcing: bool = True) -> str:
        """llguidance's grammar of it.

        Args:
            space: whether a space stands in front of the answer.
            forcing: whether what can only follow is written as the tokenizer would write it; without that, every way to
                write it is allowed.
        """
        start = {"never": "start: @form", "maybe": 'start: @form | " " @form', "always": 'start: " " @form'}[space]
        options = "" if forcing else '%llguidance {"no_forcing": true}\n'
        grammars = [{"lark_grammar": options + start}, {"name": "form", "lark_grammar": options + self.lark}]
        return json.dumps({"grammars": grammars[1:] if space == "never" else grammars})

    def parse(self, text: str) -> Any:
        """The object that a whole answer is the JSON of; None where it is none."""
        if self.kind != "schema":
            return None
        try:
            return json.loads(text, parse_constant=_refuse, parse_float=_finite)
        except (ValueError, RecursionError):
            return None


def _refuse(_: str) -> None:
    raise ValueError


def _finite(text: str) -> float:
    """A number; ValueError where it is too large to be one."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def make_form(
    *, schema: Any = None, choices: Sequence[str] | None = None, regex: str | None = None, grammar: str | None = None
) -> Form | None:
    """The form that is asked for; None where none is.

    Args:
        schema: JSON Schema as a mapping or as JSON; a pydantic model; or "json" for any JSON object.
        choices: the texts that an answer may be.
        regex: a regular expression in the syntax of Rust's regex library.
        grammar: in llguidance's form of Lark.

    Raises:
        PromptError: there are several, or one cannot be followed.
    """
    given = {"schema": schema, "choices": choices, "regex": regex, "grammar": grammar}
    names = [name for name, value in given.items() if value is not None]
    if not names:
        return None
    if len(names) > 1:
        raise PromptError(f"an answer has one form, here are {' and '.join(names)}: give one of them")
    if schema is not None:
        return _compile("schema", _schema_text(schema))
    if choices is not None:
        return _compile("choices", _choices_text(choices))
    kind: Kind = "regex" if regex is not None else "grammar"
    text = given[kind]
    if not isinstance(text, str) or not text:
        raise PromptError(f"{kind} must be a text that is not empty, not {_short(text)}")
    return _compile(kind, text)


def _short(value: Any) -> str:
    return repr(value[:80]) if isinstance(value, str) else f"of type {type(value).__name__}"


def _schema_text(schema: Any) -> str:
    """A schema as JSON."""
    make = getattr(schema, "model_json_schema", None)
    if callable(make):
        schema = make()
    if isinstance(schema, str):
        if schema.strip() == "json":
            schema = {"type": "object"}
        else:
            if len(schema) > _MOST["schema"]:
                raise PromptError(_too_long("schema", len(schema)))
            try:
                schema = json.loads(schema)
            except (ValueError, RecursionError) as error:
                why = "nested too deep" if isinstance(error, RecursionError) else str(error)
                raise PromptError(f"the schema is no JSON: {why}") from None
    if schema is True:
        schema = {}
    if not isinstance(schema, Mapping):
        what = "allows nothing" if schema is False else f"must be an object, not of type {type(schema).__name__}"
        raise PromptError(f"the schema {what}")
    try:
        return json.dumps(dict(schema), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        why = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise PromptError(f"the schema cannot be written as JSON: {why}") from None


def _choices_text(choices: Any) -> str:
    """Choices as JSON.

    Raises:
        PromptError: they are no list of different texts, none of them empty.
    """
    if isinstance(choices, str) or not isinstance(choices, Sequence) or not all(isinstance(c, str) for c in choices):
        raise PromptError(f"choices must be a list of texts, not {_short(choices)}")
    if not 0 < len(choices) <= _MOST_CHOICES:
        raise PromptError(f"there must be 1 to {_MOST_CHOICES:,} choices, not {len(choices)}")
    for number, choice in enumerate(choices, 1):
        if not choice:
            raise PromptError(f"choice {number} is empty: leave it out")
        if any(0xD800 <= ord(letter) < 0xE000 for letter in choice):
            raise PromptError(f"choice {number} is not valid UTF-8 text")
    if len({*choices}) < len(choices):
        twice = next(choice for number, choice in enumerate(choices) if choice in choices[:number])
        raise PromptError(f"the choice {twice[:80]!r} stands twice")
    return json.dumps([*choices], ensure_ascii=False)


def _too_long(kind: str, length: int) -> str:
    return f"the {kind} has {length:,} characters, at most {_MOST[kind]:,} are read"


@lru_cache(64)
def _compile(kind: Kind, text: str) -> Form:
    """A form that llguidance can follow.

    Raises:
        PromptError: it cannot; the message names what and where.
    """
    if len(text) > _MOST[kind]:
        raise PromptError(_too_long(kind, len(text)))
    lark = _as_lark(kind, text)
    form = Form(kind, lark, False)
    quick = len(text) <= _QUICK[kind] and len(_PATTERNS.findall(text)) <= _MOST_PATTERNS
    if not quick:
        _try_elsewhere(kind, form.grammar("never"))
    matcher = _matcher(form.grammar("never"))
    if not matcher.is_error():
        allowed = matcher.compute_bitmask()
    if matcher.is_error():
        message = matcher.get_error()
        where = _locate(json.loads(text)) if kind == "schema" else None
        raise PromptError(_explain(kind, *(where or (" at its top" * (kind == "schema"), message))))
    if not any(allowed[:32]):
        raise PromptError(f"the {kind} matches no text but the empty one: an answer has at least one token")
    return Form(kind, lark, bool(allowed[ord(" ") // 8] >> ord(" ") % 8 & 1))


def _as_lark(kind: Kind, text: str) -> str:
    if kind == "grammar":
        return text
    if kind == "choices":
        return "start: CHOICE\nCHOICE: " + " | ".join(json.dumps(each, ensure_ascii=False) for each in json.loads(text))
    if kind == "schema":
        written = {**json.loads(text), "x-guidance": {"whitespace_flexible": False}}
        return f"start: %json {json.dumps(written)}"
    import llguidance

    return f"start: /{llguidance.regex_to_lark(text, 'd')}/"


@cache
def _bytes() -> Any:
    """A tokenizer whose tokens are single bytes."""
    import llguidance

    return llguidance.LLTokenizer("byte")


def _matcher(grammar: str) -> Any:
    import llguidance

    return llguidance.LLMatcher(_bytes(), grammar, log_level=0, limits=limits())


def limits() -> Any:
    """Of llguidance's work on a form: its own, and errors without its state."""
    import llguidance

    return llguidance.LLParserLimits(verbose_errors=False)


def _try_elsewhere(kind: Kind, grammar: str) -> None:
    """Compile in a process of its own, which can be ended.

    Raises:
        PromptError: it takes too long, or too much memory.
    """
    command = [sys.executable, "-P", "-c", _TRY]
    try:
        done = subprocess.run(
            command, input=grammar.encode(), capture_output=True, timeout=5 * _SECONDS, check=False
        ).stdout
    except subprocess.TimeoutExpired:
        done = b""
    except OSError as error:
        raise PromptError(f"the {kind} is large, and no process starts to try it: {error.strerror or error}") from None
    if b"done" not in done:
        raise PromptError(
            f"the {kind} is too complex: it needs above {_SECONDS} s to be read; use fewer or simpler patterns"
        )


def _children(node: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The schemas inside one, with their places in it."""
    for key in _OBJECTS:
        if isinstance(node.get(key), dict):
            for name, child in node[key].items():
                yield f"/{key}/{name.replace('~', '~0').replace('/', '~1')}", child
    for key in _LISTS:
        if isinstance(node.get(key), list):
            for number, child in enumerate(node[key]):
                yield f"/{key}/{number}", child
    for key in _SINGLE:
        yield f"/{key}", node.get(key)


def _locate(schema: dict[str, Any]) -> tuple[str, str] | None:
    """The innermost part of a schema that cannot be followed, and what is wrong with it; None where that is not found.

    Each part is compiled alone, with what all share beside it.
    """
    shared = {key: schema[key] for key in _SHARED if key in schema}
    parts, waiting = {"": schema}, [schema]
    while waiting and len(parts) < _MOST_TRIED:
        node = waiting.pop()
        here = next(place for place, part in parts.items() if part is node)
        found = {here + step: child for step, child in _children(node) if isinstance(child, dict)}
        parts |= found
        waiting += found.values()

    def fault(part: dict[str, Any]) -> str | None:
        matcher = _matcher(Form("schema", _as_lark("schema", json.dumps({**shared, **part})), False).grammar("never"))
        message: str = matcher.get_error()
        refers = re.search(r"Pointer '(.*)' does not exist", message)  # to a part that is not beside it here
        return message if matcher.is_error() and not (refers and refers[1] in parts) else None

    place = ""
    message: str | None = None
    seen = {place}
    while True:
        node = parts[place]
        target = node.get("$ref")
        target = target[1:] if isinstance(target, str) and target.startswith("#/") else ""
        inside = [place + step for step, child in _children(node) if isinstance(child, dict) and place + step in parts]
        if target in parts and target:
            inside.insert(0, target)
        for step in inside:
            if step in seen or (step.split("/")[-2] in _SHARED and step != target):
                continue  # what all share is read where it is referred to
            seen.add(step)
            why = fault(parts[step])
            if why is not None:
                place, message = step, why
                break
        else:
            return None if message is None else (f" at #{place}", message)


def _explain(kind: Kind, where: str, message: str) -> str:
    """What is wrong with a form, in a line."""
    keywords = re.search(r"Unimplemented keys: \[(.*?)\]", message)
    token = re.search(r'unknown special token: ("[^"]*")', message)
    if keywords:
        many = "," in keywords[1]
        what = f"the keyword{'s' * many} {keywords[1]} cannot be enforced: leave {'them' if many else 'it'} out"
    elif "oneOf constraints" in message:
        what = 'the keyword "oneOf" has alternatives that may both hold: write "anyOf", or make them differ'
    elif token:
        what = f"it names the special token {token[1]}, and answers have none"
    elif "NoExtension" in message:
        what = "it matches no text"
    else:
        lines = [line.strip() for line in message.splitlines()]
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        first = re.sub(r"^(at \d+\(\d+\): )?(failed to compile JSON schema: )?", "", lines[0] if lines else "")
        what = (errors or [first.replace("Unsatisfiable schema:", "nothing satisfies it:")])[0][:300]
    return f"the {kind}{where} cannot be followed: {what or 'it matches no text'}"
