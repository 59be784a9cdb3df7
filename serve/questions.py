"""What a client asks: a request's fields -> messages, options and how to answer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_vlm_mini.errors import PromptError
from mlx_vlm_mini.generation.options import Options
from mlx_vlm_mini.text.messages import images_of
from mlx_vlm_mini.text.thinking import SWITCH
from mlx_vlm_mini.text.tools import check_tools

from .limits import Limits
from .messages import checked, read_messages, read_ollama, with_images
from .refusals import Refusal


@dataclass(frozen=True, kw_only=True)
class Question:
    """A request, read.

    Attributes:
        model: its name; None where the client names none.
        messages: in the library's form.
        options: of `Options`.
        choices: how many answers are wanted.
        stream: whether they come piece by piece.
        usage: whether a stream says at its end what it cost.
        logprobs: whether the tokens' log-probabilities are told.
        tools: those that the model may call.
        effort: whether the model is to think, where it has a choice; None: as it does by default.
    """

    model: str | None
    messages: list[dict[str, Any]]
    options: dict[str, Any] = field(default_factory=dict)
    choices: int = 1
    stream: bool = False
    usage: bool = False
    logprobs: bool = False
    tools: list[dict[str, Any]] = field(default_factory=list)
    effort: bool | None = None


# Fields that clients send and that cannot be honoured: the values that mean "nothing", and what to do.
# None always means nothing. All other fields that are not known are left out.
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "functions": (([],), "give tools in its place"),
    "top_logprobs": ((0,), "the chosen tokens' log-probabilities are told alone: leave it out or give 0"),
    "frequency_penalty": ((0,), "give repetition_penalty in its place"),
    "presence_penalty": ((0,), "give repetition_penalty in its place"),
    "logit_bias": (({},), "leave it out"),
    "modalities": ((["text"], []), "answers are text"),
    "audio": ((), "answers are text"),
    "web_search_options": ((), "this server asks no other"),
}
_LEVELS = ("none", "minimal", "low", "medium", "high", "xhigh")
_REFUSED_BY_OLLAMA: dict[str, tuple[tuple[Any, ...], str]] = {
    "suffix": (("",), "models here complete no text between two others: leave it out"),
    "template": (("",), "a model's own template is used: leave it out"),
    "raw": ((False,), "a model's own template is used: leave it out"),
    "context": (([],), "send the messages of the conversation to /api/chat"),
}
_REFUSED_OPTIONS: dict[str, tuple[tuple[Any, ...], str]] = {
    "frequency_penalty": ((0,), "give repeat_penalty in its place"),
    "presence_penalty": ((0,), "give repeat_penalty in its place"),
    "mirostat": ((0,), "leave it out"),
    "tfs_z": ((1,), "leave it out"),
    "typical_p": ((1,), "leave it out"),
}


def read_chat(body: Mapping[str, Any], limits: Limits) -> Question:
    """A chat completion of OpenAI's.

    Raises:
        Refusal: a field is malformed, or cannot be honoured.
    """
    _check(body, _REFUSED)
    stream = _flag(body, "stream")
    asked = body.get("stream_options")
    if asked is not None and not isinstance(asked, Mapping):
        raise Refusal(400, "stream_options must be an object", "stream_options")
    choices = body.get("n")
    choices = 1 if choices is None else choices
    if type(choices) is not int or not 1 <= choices <= limits.choices:
        raise Refusal(400, f"n must be a whole number from 1 to {limits.choices}, not {choices!r}", "n")
    longest = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    options = {
        **_option(body, longest, "max_tokens"),
        **_option(body, "temperature"),
        **_option(body, "top_p"),
        **_option(body, "top_k", change=_at_least_zero),
        **_option(body, "min_p"),
        **_option(body, "seed", change=_seed),
        **_option(body, "repetition_penalty"),
        **_stops(body.get("stop"), "stop", limits),
        **_form(body.get("response_format")),
        **_think(body),
    }
    tools = _tools(body)
    return Question(
        model=_name(body),
        messages=_told(read_messages(body.get("messages"), limits), tools),
        tools=tools,
        options={"max_tokens": limits.max_tokens, **options},
        choices=choices,
        stream=stream,
        usage=asked is not None and _flag(asked, "include_usage"),
        logprobs=_flag(body, "logprobs"),
        effort=_effort(body),
    )


def read_answer(body: Mapping[str, Any], limits: Limits) -> tuple[str | None, list[dict[str, Any]], str]:
    """The model's name, the messages and the answer of a request about an answer, which is the last message.

    Raises:
        Refusal: there is none, or no picture that it could be about.
    """
    *messages, last = read_messages(body.get("messages"), limits)
    if last["role"] != "assistant" or not isinstance(last["content"], str) or not last["content"].strip():
        raise Refusal(400, "the last message must be the answer to be explained: a text of the assistant", "messages")
    if not images_of(messages):
        raise Refusal(400, "the messages before the answer hold no picture", "messages")
    return _name(body), messages, last["content"]


def read_ollama_chat(body: Mapping[str, Any], limits: Limits) -> Question:
    """A request of `/api/chat`; its messages may be none, which loads or unloads a model.

    Raises:
        Refusal: a field is malformed, or cannot be honoured.
    """
    return _read_ollama(body, read_ollama(body.get("messages") or [], limits), limits)


def read_ollama_generate(body: Mapping[str, Any], limits: Limits) -> Question:
    """A request of `/api/generate`: one prompt.

    Raises:
        Refusal: a field is malformed, or cannot be honoured.
    """
    texts = {name: body.get(name) or "" for name in ("prompt", "system")}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise Refusal(400, f"{name} must be a text")
    content = with_images(texts["prompt"], body.get("images"))
    system = [{"role": "system", "content": texts["system"]}] if texts["system"] else []
    messages = [*system, {"role": "user", "content": content}] if content else []
    return _read_ollama(body, checked(messages, limits), limits)


def _read_ollama(body: Mapping[str, Any], messages: list[dict[str, Any]], limits: Limits) -> Question:
    _check(body, _REFUSED_BY_OLLAMA)
    given = body.get("options")
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        raise Refusal(400, "options must be an object")
    _check(given, _REFUSED_OPTIONS, "options.")
    most = given.get("num_predict")
    options = {
        **({} if type(most) is int and most < 1 else _option(given, "num_predict", "max_tokens")),
        **_option(given, "temperature"),
        **_option(given, "top_p"),
        **_option(given, "top_k", change=_at_least_zero),
        **_option(given, "min_p"),
        **_option(given, "seed", change=_seed),
        **_option(given, "repeat_penalty", "repetition_penalty"),
        **_stops(given.get("stop"), "options.stop", limits),
        **_ollama_form(body.get("format")),
        **({"think": body["think"]} if isinstance(body.get("think"), bool) else {}),
    }
    tools = _tools(body)
    return Question(
        model=_name(body),
        messages=_told(messages, tools),
        tools=tools,
        options={"max_tokens": limits.max_tokens, **options},
        stream=_flag(body, "stream", True),
        usage=True,
        effort=_level(body.get("think"), "think") if not isinstance(body.get("think"), bool) else None,
    )


def _check(body: Mapping[str, Any], refused: Mapping[str, tuple[tuple[Any, ...], str]], where: str = "") -> None:
    """Raises Refusal where a field cannot be honoured that says something."""
    for name, (nothing, advice) in refused.items():
        value = body.get(name)
        if value is not None and not any(type(value) in (type(one), float) and value == one for one in nothing):
            raise Refusal(400, f"{where}{name} is not supported: {advice}", f"{where}{name}")


def _name(body: Mapping[str, Any]) -> str | None:
    name = body.get("model")
    if name is not None and not isinstance(name, str):
        raise Refusal(400, "model must be a text", "model")
    return name or None


def _flag(body: Mapping[str, Any], name: str, default: bool = False) -> bool:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise Refusal(400, f"{name} must be true or false", name)
    return value


def _option(
    body: Mapping[str, Any], name: str, own: str | None = None, *, change: Callable[[Any], Any] = lambda value: value
) -> dict[str, Any]:
    """A field as one of `Options`; nothing where it is not given."""
    value, own = body.get(name), own or name
    if value is None:
        return {}
    try:
        Options(**{own: change(value)})
    except PromptError as error:
        raise Refusal(400, str(error).replace(own, name, 1), name) from None
    return {own: change(value)}


def _at_least_zero(value: Any) -> Any:
    """-1 stands for nothing in llama.cpp's and vLLM's interface."""
    return 0 if value == -1 and type(value) is int else value


def _seed(value: Any) -> Any:
    """Seeds may be below 0."""
    return value % 2**64 if type(value) is int and -(2**63) <= value < 0 else value


def _tools(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tools that the model may call; none where `tool_choice` says so."""
    choice = body.get("tool_choice")
    if choice not in (None, "auto", "none"):
        raise Refusal(
            400, "tool_choice is auto or none here: whether a tool is called is the model's to say", "tool_choice"
        )
    if choice == "none" or not body.get("tools"):
        return []
    try:
        return check_tools(body["tools"])
    except PromptError as error:
        raise Refusal(400, str(error), "tools") from None


def _told(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages the first of which names the tools."""
    return [{**messages[0], "tools": tools}, *messages[1:]] if tools and messages else messages


def _effort(body: Mapping[str, Any]) -> bool | None:
    """`reasoning_effort`, or `reasoning.effort`: models here think or do not, so that all but "none" is the same."""
    nested = body.get("reasoning")
    given = body.get("reasoning_effort")
    given = nested.get("effort") if given is None and isinstance(nested, Mapping) else given
    return _level(given, "reasoning_effort")


def _level(given: Any, name: str) -> bool | None:
    if given is None:
        return None
    if given not in _LEVELS:
        raise Refusal(400, f"{name} must be one of {', '.join(_LEVELS)}, not {given!r}", name)
    return bool(given != "none")


def _think(body: Mapping[str, Any]) -> dict[str, Any]:
    """vLLM's `enable_thinking`, also inside of `chat_template_kwargs`, as the option `think`."""
    nested = body.get("chat_template_kwargs")
    value = body.get(SWITCH)
    value = nested.get(SWITCH) if value is None and isinstance(nested, Mapping) else value
    if value is not None and not isinstance(value, bool):
        raise Refusal(400, f"{SWITCH} must be true or false", SWITCH)
    return {} if value is None else {"think": value}


def _form(given: Any) -> dict[str, Any]:
    """OpenAI's `response_format` as the option `schema`; whether that can be followed is found out later."""
    kind = given.get("type") if isinstance(given, Mapping) else None
    if given is None or kind == "text":
        return {}
    if kind == "json_object":
        return {"schema": "json"}
    named = given.get("json_schema") if kind == "json_schema" else None
    if not isinstance(named, Mapping):
        forms = '{"type": "text"}, {"type": "json_object"} or {"type": "json_schema", "json_schema": {"schema": {...}}}'
        raise Refusal(400, f"response_format must be {forms}", "response_format")
    schema = named.get("schema")
    if schema is not None and not isinstance(schema, Mapping):
        raise Refusal(400, "response_format.json_schema.schema must be an object", "response_format")
    return {"schema": schema or "json"}


def _ollama_form(given: Any) -> dict[str, Any]:
    """Ollama's `format` as the option `schema`."""
    if given is None or given == "":
        return {}
    if given != "json" and not isinstance(given, Mapping):
        raise Refusal(400, 'format must be "json" or a JSON schema')
    return {"schema": given or "json"}


def _stops(value: Any, name: str, limits: Limits) -> dict[str, Any]:
    if value is None:
        return {}
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and len(stop) <= 1000 for stop in stops):
        raise Refusal(400, f"{name} must be a text or a list of texts of up to 1000 characters", name)
    if len(stops) > limits.stops:
        raise Refusal(400, f"{name} has {len(stops)} texts, and the limit is {limits.stops}", name)
    return {"stop": tuple(stops)}
