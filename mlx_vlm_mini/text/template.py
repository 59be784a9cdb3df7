"""Chat templates: found in a checkpoint, rendered in a sandbox, and cut where images stand."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mlx_vlm_mini.errors import CheckpointError, PromptError
from mlx_vlm_mini.files import read_bytes, read_json

from .literal import mark
from .messages import Message, images_of
from .thinking import KEYS, SWITCH, answer_begins, find_markers
from .tools import replace_texts, takes_tools, texts_in


def find_chat_template(folder: Path) -> str | None:
    """The checkpoint's chat template: chat_template.jinja, chat_template.json, processor_config.json or
    tokenizer_config.json, in this order; of several named ones `default`, else `chat`, else the first.

    Raises:
        CheckpointError: one of the files is broken.
    """
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return read_bytes(file).decode("utf-8")
        except ValueError:
            raise CheckpointError(f"{file} is not UTF-8 text") from None
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            template = read_json(folder / name).get("chat_template")
            if isinstance(template, list):
                entries = [entry for entry in template if isinstance(entry, dict)]
                template = {entry.get("name"): entry.get("template") for entry in entries}
            if isinstance(template, Mapping):
                named = {name: text for name, text in template.items() if isinstance(text, str)}
                template = next((named[name] for name in ("default", "chat", *named) if name in named), None)
            if isinstance(template, str):
                return template
    return None


_OF_TOOLS = ("tools", "tool_calls", "tool_call_id", "name")  # what messages say of tools


def _as_text(messages: Sequence[Message], tokens: Collection[str]) -> list[Message]:
    """Messages with marks inside the tokens that they have in their texts, in their roles and in what they say of
    tools; an answer's thinking goes by all names that templates have for it."""
    texts = [
        text
        for message in messages
        for text in (
            *([message[KEYS[0]]] if KEYS[0] in message else []),
            *(
                [message["content"]]
                if isinstance(message["content"], str)
                else [part["text"] for part in message["content"] if part["type"] == "text"]
            ),
            *(text for key in _OF_TOOLS if key in message for text in texts_in(message[key])),
        )
    ]
    marked = iter(mark(texts, tokens))
    return [
        {
            **message,
            "role": mark([message["role"]], tokens)[0],
            **(dict.fromkeys(KEYS, next(marked)) if KEYS[0] in message else {}),
            "content": next(marked)
            if isinstance(message["content"], str)
            else [{**part, "text": next(marked)} if part["type"] == "text" else part for part in message["content"]],
            **{key: replace_texts(message[key], partial(next, marked)) for key in _OF_TOOLS if key in message},
        }
        for message in messages
    ]


@dataclass
class ChatTemplate:
    """A chat template, rendered in a sandbox: it computes text, within limits, and reaches nothing else.

    Some templates take a message's content as a list of parts, some as a text, some both: which is found out once, by
    rendering a probe.

    Attributes:
        source: the template.
        variables: what else it may read: `bos_token`, `eos_token`, ...
        image_token: what stands for an image in the text.
        video_token: what stands for a video; None where the model takes none.
        markers: what stands around an answer's thinking; None where the model does not think.
    """

    source: str
    variables: Mapping[str, str]
    image_token: str
    video_token: str | None = None

    def __post_init__(self) -> None:
        from .sandbox import compile_template

        self.markers = find_markers(self.source)
        try:
            self._template = compile_template(self.source)
        except RecursionError:
            raise CheckpointError("the chat template is broken: its parts lie too deep in one another") from None
        except (Exception, MemoryError) as error:  # Python's own of what jinja2 makes of it, too
            raise CheckpointError(f"the chat template is broken: {error}") from None
        probe = "mlx-vlm-mini-probe"
        rendered = self._try([{"role": "user", "content": [{"type": "text", "text": probe}]}])
        self._takes_parts = probe in rendered and "'text'" not in rendered  # a list printed as it is shows its keys
        self._takes_text = probe in self._try([{"role": "user", "content": probe}])
        # Some templates take a system message's, or an answer's, as a text all the same.
        self._takes_as_text = {role for role in ("system", "assistant") if not self._reads_parts(role, probe)}

    def _reads_parts(self, role: str, probe: str) -> bool:
        """Whether the template reads parts of a message of this role, as far as it reads one at all."""
        parts = [{"type": "text", "text": probe}]

        def rendered(content: Any) -> str:
            both = [{"role": role, "content": content}, {"role": "user", "content": parts}]
            return self._try(both if role == "system" else both[::-1])

        found = rendered(parts)
        return "'text'" not in found and (found != "" or not rendered(probe))

    def _try(self, messages: list[Message], *, add_generation_prompt: bool = False) -> str:
        try:
            return self._render(messages, add_generation_prompt=add_generation_prompt)
        except PromptError:
            return ""

    def check_think(self, think: bool | None) -> None:
        """Raises PromptError where the template cannot do what `think` says. One without a switch for thinking does
        what its model always does: that may be said, too."""
        if think is None or SWITCH in self.source:
            return
        asked = self._try([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
        always = answer_begins(asked, self.markers) == "thinking"
        if always and not think:
            raise PromptError(
                f"this model always thinks: its chat template has no switch for that ({SWITCH}); leave think out"
            )
        if not always and (think or self.markers is not None):
            raise PromptError(f"this model's chat template has no switch for thinking ({SWITCH}): leave think out")

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        controls: Collection[str] = (),
        think: bool | None = None,
    ) -> list[str]:
        """The prompt's text, cut where the images and videos stand: one piece more than there are of them.

        What stands for an image, and `controls`, are text where a message has them in its own, whoever wrote it: there
        they come with a mark inside, which `Tokenizer` reads and `unmark` takes out.

        Args:
            controls: tokens that only the template may write: roles, ends, ...
            think: whether the model is to think before it answers; None: as the template does by default.

        Raises:
            PromptError: the template refuses the messages, or has not as many places as they hold images, or cannot do
                what `think` says.
        """
        self.check_think(think)
        tokens = {self.image_token, *controls, *([] if self.video_token is None else [self.video_token])}
        plain = [
            {**message, "content": self._content(message["content"], message["role"])}
            for message in _as_text(messages, tokens)
        ]
        tools = [tool for message in plain for tool in message.pop("tools", [])]
        if tools and not takes_tools(self.source):
            raise PromptError("this model's chat template takes no tools in a form that is read here: leave them out")
        text = self._render(plain, add_generation_prompt=add_generation_prompt, think=think, tools=tools)
        kinds = [part["type"] for part in images_of(messages)]
        if self.video_token is not None and "video" in kinds:
            return self._cut(text, kinds, self.video_token)
        pieces, images = text.split(self.image_token), len(kinds)
        if len(pieces) - 1 != images:
            raise PromptError(
                f"the chat template's text has {len(pieces) - 1} places for an image ({self.image_token}), "
                f"the messages hold {images} images"
            )
        return pieces

    def _cut(self, text: str, kinds: Sequence[str], video_token: str) -> list[str]:
        names = {self.image_token: "image", video_token: "video"}
        pieces = re.split(f"({'|'.join(map(re.escape, names))})", text)
        found = [names[token] for token in pieces[1::2]]
        if found != list(kinds):
            raise PromptError(
                f"the chat template's text has places for {', '.join(found) or 'nothing'}, the messages hold "
                f"{', '.join(kinds)}: does it know videos?"
            )
        return pieces[::2]

    def _content(self, content: Any, role: str) -> Any:
        """Content in a form that the template takes, without the images themselves."""
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if isinstance(content, str) and self._takes_text:
            return parts[0]["text"]
        if role in self._takes_as_text and all(part["type"] == "text" for part in parts):
            return "".join(part["text"] for part in parts)
        if self._takes_parts:
            return [part if part["type"] == "text" else {"type": part["type"]} for part in parts]
        tokens = {"image": self.image_token, "video": self.video_token}
        return "".join(part["text"] if part["type"] == "text" else f"{tokens[part['type']]}\n" for part in parts)

    def _render(
        self,
        messages: list[Message],
        *,
        add_generation_prompt: bool,
        think: bool | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        from .sandbox import Stopped, render

        given: dict[str, Any] = {**self.variables, "add_generation_prompt": add_generation_prompt}
        if think is not None:
            given[SWITCH] = think
        if tools:
            given["tools"] = [*tools]
        try:
            return render(self._template, given, messages)
        except Stopped as error:
            raise CheckpointError(f"the chat template was stopped: {error}") from None
        except RecursionError:
            raise CheckpointError("the chat template never ends: it calls itself") from None
        except (Exception, MemoryError) as error:  # whatever a program can raise
            raise PromptError(f"the chat template refuses these messages: {error}") from None
