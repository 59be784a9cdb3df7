"""The prompts that LLaVA's decoders were trained on, by the names that its authors gave them, as chat templates.

Source: llava/conversation.py and llava/serve/cli.py of github.com/haotian-liu/LLaVA; `llava_llama_3` of
github.com/LLaVA-VL/LLaVA-NeXT.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from mlx_vlm_mini.errors import CheckpointError


def one_image_template(name: str) -> str:
    """Of families that were trained on one image with a text: both stand in front of the answer, whatever was said."""
    return (
        "{% for message in messages %}"
        "{% if message['role'] not in ['user', 'assistant'] %}"
        "{{ raise_exception('" + name + " takes one image with a text and no ' + message['role'] + ' message') }}"
        "{% endif %}"
        "{% for part in message['content'] if part['type'] == 'image' %}<image>{% endfor %}"
        "{% endfor %}"
        "{{ bos_token }}"
        "{% set asked = messages | selectattr('role', 'equalto', 'user') | list | last %}"
        "{% for part in asked['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
        "{% if not add_generation_prompt and messages[-1]['role'] == 'assistant' %}"
        "{% for part in messages[-1]['content'] if part['type'] == 'text' %}{{ ' ' + part['text'] }}{% endfor %}"
        "{% endif %}"
    )


class Conversation(NamedTuple):
    """A prompt: `open`, the system message, `close`, then each message between what its role puts around it.

    Attributes:
        colon: stands between a role and what it says; without its space before an answer that is still to come.
        end_token: the token that ends an answer; `stop` is a text that does, too.
    """

    system: str
    user: tuple[str, str]
    assistant: tuple[str, str]
    colon: str = ": "
    open: str = ""
    close: str = ""
    end_token: str = "</s>"
    stop: str | None = None


class Instruct(NamedTuple):
    """Llama 2's prompt: the system message is part of the first question; `begin` opens all questions but the first."""

    system: str
    begin: str
    end_token: str = "</s>"
    stop: str | None = None


_ASKS = "A chat between a curious {0} and an artificial intelligence assistant. The assistant gives helpful, detailed, "
_HUMAN, _USER = (_ASKS.format(who) + f"and polite answers to the {who}'s questions." for who in ("human", "user"))
_SEES = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
_LLAMA_2 = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)
_MPT = "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."


def _vicuna(system: str) -> Conversation:
    return Conversation(system, ("USER", " "), ("ASSISTANT", "</s>"), close=" ")


def _chatml(system: str) -> Conversation:
    user, assistant, end = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>"
    return Conversation(system, (user, end), (assistant, end), "", "<|im_start|>system\n", end, end)


_HEADER, _SAYS, _EOT = "<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>"
CONVERSATIONS: dict[str, Conversation | Instruct] = {
    "llava_v0": Conversation(_HUMAN, ("Human", "###"), ("Assistant", "###"), close="###", stop="###"),
    "llava_v1": _vicuna(_HUMAN),
    "vicuna_v1": _vicuna(_USER),
    "llava_llama_2": Instruct(_SEES, "<s>"),
    "llama_2": Instruct(_LLAMA_2, "<s>"),
    "mistral_instruct": Instruct("", ""),
    "chatml_direct": _chatml("Answer the questions."),
    "mpt": _chatml(_MPT),
    "llava_llama_3": Conversation(  # roles carry the header's first token a second time, as the authors wrote them
        _SEES, (f"{_HEADER}{_HEADER}user{_SAYS}", _EOT), (f"{_HEADER}{_HEADER}assistant{_SAYS}", _EOT), "",
        f"{_HEADER}system{_SAYS}", _EOT, _EOT),
}  # fmt: skip
_SHORT = {
    "v0": "llava_v0", "v1": "llava_v1", "mistral": "mistral_instruct", "chatml": "chatml_direct",
    "mistral_direct": "chatml_direct",
}  # fmt: skip
_BY_NAME = (  # of a model, in the order in which its authors' programs look
    ("llama-2", "llava_llama_2"), ("llama-?3", "llava_llama_3"), ("mistral", "mistral_instruct"),
    ("v1.6-34b", "chatml_direct"), ("v1", "llava_v1"), ("mpt", "mpt"), ("v0", "llava_v0"),
)  # fmt: skip


def choose_conversation(hf: Mapping[str, Any], name: str = "") -> str:
    """The conversation of an original LLaVA: of the model's name, else of `_name_or_path` in its config.json, else by
    its age: `image_aspect_ratio` came with LLaVA-1.5.

    Args:
        name: of the folder, or on the Hub.
    """
    for each in (name, str(hf.get("_name_or_path") or "")):
        last = each.rstrip("/").rpartition("/")[2].lower()
        for pattern, conversation in _BY_NAME:
            if re.search(pattern, last):
                return conversation
    return "llava_v1" if "image_aspect_ratio" in hf else "llava_v0"


def find_conversation(name: str) -> Conversation | Instruct:
    """A conversation by its name.

    Raises:
        CheckpointError: there is none of this name.
    """
    found = CONVERSATIONS.get(_SHORT.get(name, name))
    if found is None:
        known = ", ".join(sorted([*CONVERSATIONS, *_SHORT]))
        raise CheckpointError(f"there is no conversation '{name}'; known: {known}")
    return found


_SAID = (
    "{% macro said(message) %}{% for part in message['content'] %}"
    "{{ IMAGE if part['type'] == 'image' else part['text'] }}{% endfor %}{% endmacro %}"
    "{% set own = messages[0]['role'] == 'system' %}"
    "{% set system = said(messages[0]) if own else SYSTEM %}{% set rest = messages[1:] if own else messages %}"
)
_TURNS = (
    "{{ OPEN + system + CLOSE }}{% for message in rest %}{% set text = said(message) %}"
    "{% set before, after = (USER, AFTER_USER) if message['role'] == 'user' else (ASSISTANT, AFTER_ASSISTANT) %}"
    "{% if message['role'] not in ['user', 'assistant'] %}"
    "{{ raise_exception('no ' + message['role'] + ' message can stand here') }}{% endif %}"
    "{{ before + COLON + text + after if text else before + BARE }}"
    "{% endfor %}{% if add_generation_prompt %}{{ ANSWER }}{% endif %}"
)
_INSTRUCT = (
    "{% if rest[0]['role'] != 'user' %}{{ raise_exception('the first message must be the user\\'s') }}{% endif %}"
    "{% if system %}{% set system = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' %}{% endif %}"
    "{% for message in rest %}{% set text = said(message) %}"
    "{% if message['role'] == 'user' %}{% set text = system + text if loop.first else text %}"
    "{{ ('' if loop.first else BEGIN) + '[INST] ' + text + ' [/INST]' if text }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + text + ' </s>' if text }}"
    "{% else %}{{ raise_exception('no ' + message['role'] + ' message can stand here') }}{% endif %}{% endfor %}"
)


def chat_template(conversation: Conversation | Instruct, image: str) -> str:
    """A conversation as a Jinja template; `image` is what stands for one in the text."""
    values = {"IMAGE": image, "SYSTEM": conversation.system}
    if isinstance(conversation, Instruct):
        values["BEGIN"] = conversation.begin
    else:
        (user, after_user), (assistant, after) = conversation.user, conversation.assistant
        answer = assistant.replace(_HEADER * 2, _HEADER) + conversation.colon.rstrip()
        values |= {
            "OPEN": conversation.open, "CLOSE": conversation.close, "USER": user, "AFTER_USER": after_user,
            "ASSISTANT": assistant, "AFTER_ASSISTANT": after, "COLON": conversation.colon,
            "BARE": conversation.colon.rstrip(), "ANSWER": answer,
        }  # fmt: skip
    settings = "".join(f"{{% set {key} = {json.dumps(value, ensure_ascii=False)} %}}" for key, value in values.items())
    return settings + _SAID + (_INSTRUCT if isinstance(conversation, Instruct) else _TURNS)
