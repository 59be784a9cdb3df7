"""What is typed into a conversation: messages with pictures, and commands that begin with a slash."""

import os
import shlex
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_vlm_mini.errors import ImageError, PromptError

from .forms import FORMS
from .interrupt import Interrupts
from .line import Mention, is_picture, is_shown, parse_line, read_path, read_pictures, strip_edges
from .look import Look
from .said import as_typed, last_said, parts_of, prepared_by, typed_name
from .status import Status, cost_of

if TYPE_CHECKING:
    from mlx_vlm_mini import Chat
    from mlx_vlm_mini.generation.answering import Chunk
    from mlx_vlm_mini.images.source import Picture

COMMANDS = {  # name: what may follow, what it does
    "/image": (
        "PATH",
        "show a picture or a PDF's pages with your next message (a URL works too); @PATH in a message does the same",
    ),
    "/paste": ("", "show the picture on the clipboard with your next message"),
    "/imagine": ("PROMPT", "draw a picture, write it to a file, and show it with your next message (Janus-Pro)"),
    "/system": ("[TEXT]", "the system message: show it, set it, or remove it with /system off"),
    "/set": ("[NAME VALUE]", "settings of answers: list them, or change one: /set temperature 0.7"),
    "/model": ("[MODEL]", "which model this is, or go on with another one"),
    "/retry": ("", "another answer to your last message"),
    "/edit": ("[TEXT]", "say your last message differently"),
    "/undo": ("", "take back your last message and its answer"),
    "/fork": ("", "try something: /back returns to this point"),
    "/back": ("", "return to the last /fork"),
    "/attend": ("[FILE]", "where the model looked for its last answer: heat maps as .png or .html, arrays as .npz"),
    "/save": ("[--cache] FILE", "write the conversation to a file, with its cache if you like"),
    "/load": ("FILE", "go on with a conversation from a file"),
    "/stats": ("", "what the last answer and the conversation cost"),
    "/clear": ("", "forget the conversation"),
    "/help": ("", "this list"),
    "/quit": ("", "leave (so does Ctrl-D); Ctrl-C ends an answer"),
}
RETRY_TEMPERATURE = 0.7


class Session:
    """A conversation and what its user can do to it.

    Attributes:
        waiting: parts that come before the next message: its pictures.
        ask: edits a text; None where there is no editor.
    """

    def __init__(
        self,
        chat: "Chat",
        model: str,
        *,
        pages: dict[str, int] | None = None,
        look: Look,
        settings: Mapping[str, click.Option],
        begin: Callable[[str], "Chat"],
    ) -> None:
        """
        Args:
            model: its name.
            pages: how PDFs are read, see `read_pictures`.
            settings: what `/set` knows, each with its type.
            begin: begins a conversation with another model, by its name.
        """
        self.chat = chat
        self.model = model
        self.waiting: list[dict[str, Any]] = []
        self.ask: Callable[[str], str] | None = None
        self._pages = pages or {}
        self._look = look
        self._settings = settings
        self._begin = begin
        self._forks: list[Chat] = []

    def take(self, line: str) -> bool:
        """Do what a line says; false when that is to leave.

        Raises:
            VLMError: it cannot be done; the conversation is as it was.
        """
        line = line.strip()
        name, rest = (*line.split(maxsplit=1), "", "")[:2]
        if name == "/quit":
            return False
        if name in COMMANDS:
            getattr(self, f"_{name[1:]}")(rest)
        elif line.startswith("//"):  # a message that begins with a slash
            self._say(line[1:])
        elif line.startswith("/") and not isinstance(parse_line(line)[0], Mention):
            if "/" in name[1:] and is_shown(name):
                raise ImageError(f"image not found: {name}")
            self._look.note(f"unknown command {name}; /help lists them, // begins a message with a slash")
        elif line:
            self._say(line)
        return True

    def show_picture(self, picture: "Picture", name: str) -> dict[str, Any]:
        """Show a picture that was read, and give the part of a message that holds it."""
        from mlx_vlm_mini.images.source import open_image

        tokens = self.chat.options.get("image_tokens")
        prepared = self.chat.features.prepare(self.chat.processor, picture, tokens)
        if self._look.thumbnails != "none":
            self._look.show(open_image(picture), name)
        return {"type": "image", "image": prepared}

    def prepare_video(self, part: dict[str, Any]) -> dict[str, Any]:
        """The part of a message that holds a video, its frames made ready."""
        from mlx_vlm_mini.text.messages import to_messages

        video = to_messages([part, "?"])[0]["content"][0]["image"]
        return {"type": "video", "image": self.chat.features.prepare(self.chat.processor, video)}

    def _say(self, line: str) -> None:
        parts = [*self.waiting, *self._parts(line)]
        self._answer(lambda **options: self.chat.send(parts, **options))
        self.waiting.clear()

    def _parts(self, line: str) -> list[Any]:
        """A line as parts of a message, its pictures opened."""
        parts: list[Any] = []
        for part in strip_edges(parse_line(line)):
            if isinstance(part, Mention):
                parts += [self.show_picture(each, each.name) for each in read_pictures([part.source], self._pages)]
            else:
                parts.append({"type": "text", "text": part})
        return parts

    def _answer(self, begin: Callable[..., Iterator["Chunk"]], **options: Any) -> None:
        dropped = self.chat.dropped_turns
        look = self._look
        try:
            with Interrupts() as interrupts, look.answer() as answer, Status(plain=look.plain) as status:

                def progress(done: int, total: int) -> None:
                    status.prefill(done, total)
                    interrupts.check()

                status.show("reading the prompt")
                with closing(begin(progress=progress, **options)) as chunks:  # type: ignore[type-var]  # it is a generator
                    for chunk in chunks:
                        status.clear()
                        answer.add(chunk)
                        if answer.waits:
                            status.show(f"writing: {chunk.stats.generated_tokens} tokens")
                        interrupts.check()
        except KeyboardInterrupt:
            click.echo(" [stopped]", nl=False, err=True)
        click.echo()
        if self._look.costs and self.chat.last_stats is not None:
            self._look.note(cost_of(self.chat.last_stats))
        if self.chat.dropped_turns > dropped:
            self._look.note(
                f"the context was full: {self.chat.dropped_turns - dropped} of the oldest turns are forgotten"
            )

    def _image(self, path: str) -> None:
        if not path:
            raise ImageError("/image needs a path or a URL")
        for each in read_pictures([read_path(path)], self._pages):
            self._wait(self.show_picture(each, each.name))

    def _paste(self, _: str) -> None:
        from mlx_vlm_mini.images.source import read_image

        self._wait(self.show_picture(read_image(clipboard_picture()), "from the clipboard"))

    def _imagine(self, prompt: str) -> None:
        from mlx_vlm_mini.images.source import read_image

        from .imagine import draw_here

        file = draw_here(self.chat.model, self.chat.processor, prompt, self.model, plain=self._look.plain)
        self._look.note(f"written to {file}")
        self._wait(self.show_picture(read_image(file), file.name))

    def _wait(self, part: dict[str, Any]) -> None:
        self.waiting.append(part)
        number = len(self.waiting)
        click.echo(f"{number} image{'s' if number > 1 else ''} will be shown with your next message.", err=True)

    def _system(self, text: str) -> None:
        if text:
            self.chat.system = None if text == "off" else text
        shown = self.chat.system
        self._look.note("no system message" if shown is None else f"system message: {shown}")

    def _set(self, text: str) -> None:
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise PromptError(f"/set: {str(error).lower()}") from None
        if not words:
            for name, value in self.settings().items():
                self._look.note(f"{name:<20} {value}")
            return
        name, values = words[0].replace("-", "_"), words[1:]
        if name not in self._settings:
            raise PromptError(f"there is no setting '{words[0]}': /set lists them")
        if values:
            value = self._value(name, values)
            if name in FORMS:  # an answer has one
                self.chat.options = {key: kept for key, kept in self.chat.options.items() if key not in FORMS}
            self.chat.options[name] = value
        self._look.note(f"{name} {self.settings()[name]}")

    def _value(self, name: str, values: list[str]) -> Any:
        """A setting's value as the option of the command line takes it; `none` is its default."""
        from mlx_vlm_mini.generation.options import Options

        parameter = self._settings[name]
        if values == ["none"]:
            return defaults()[name]
        if not parameter.multiple and len(values) > 1:
            raise PromptError(f"{name} is one value, not {len(values)}")
        context = click.Context(click.Command("set"))
        try:
            value = parameter.type_cast_value(context, values if parameter.multiple else values[0])
        except click.BadParameter as error:
            raise PromptError(f"{name}: {error.message}") from None
        Options(**{name: value})  # raises at what the option lets through: not a number, say
        if name == "think":
            self.chat.processor.chat_template.check_think(value)
        return value

    def settings(self) -> dict[str, str]:
        """What `/set` knows, and what each is now."""
        now = {name: self.chat.options.get(name, defaults()[name]) for name in self._settings}
        return {name: _written(name, value) for name, value in now.items()}

    def _retry(self, _: str) -> None:
        options = {}
        if not self.chat.options.get("temperature"):
            options["temperature"] = RETRY_TEMPERATURE
            self._look.note(f"at temperature {RETRY_TEMPERATURE}, for at 0 the answer would be the same")
        self._answer(self.chat.retry, **options)

    def _edit(self, text: str) -> None:
        said = last_said(self.chat.messages)
        if not said or not (text or self.ask):
            raise PromptError(
                "/edit needs what is to take the last message's place" if said else "nothing was said yet"
            )
        typed = text or (self.ask(as_typed(said) or "") if self.ask else "").strip()
        parts = self._parts(typed)
        if not typed:
            return
        # Pictures stay that the new message does not speak of, and those that cannot be typed.
        old = [part for part in parts_of(said[0]) if part["type"] != "text"]
        if any(part["type"] == "image" for part in parts) or not text:
            old = [part for part in old if typed_name(part) is None]
        self._answer(lambda **options: self.chat.edit([*old, *parts], **options))

    def _undo(self, _: str) -> None:
        taken = as_typed(self.chat.undo())
        self._look.note("taken back" if taken is None else f"taken back: {taken}")

    def _fork(self, _: str) -> None:
        fork = self.chat.fork()
        self._forks.append(self.chat)
        self.chat = fork
        self._look.note("/back returns to this point")

    def _back(self, _: str) -> None:
        if not self._forks:
            raise PromptError("there is no /fork to return to")
        self.chat = self._forks.pop()
        said = as_typed(last_said(self.chat.messages))
        self._look.note("back at the beginning" if said is None else f"back behind: {said}")

    def _attend(self, name: str) -> None:
        from .attend import attend_last

        with Status(plain=self._look.plain) as status:
            status.show("looking at where the model looked")
            file = attend_last(self.chat, str(read_file_name(name)) if name else "")
        self._look.note(f"written to {file}")

    def _save(self, path: str) -> None:
        with_cache = path.startswith("--cache ")
        file = read_file_name(path.removeprefix("--cache "))
        self.chat.save(file, cache=with_cache)
        self._look.note(f"saved to {file}")

    def _load(self, path: str) -> None:
        from mlx_vlm_mini import Chat

        self._go_on_with(Chat.load(read_file_name(path), self.chat.model, self.chat.processor))

    def _model(self, name: str) -> None:
        if not name:
            self._look.note(f"{self.model}, family {self.chat.model.config.family}")
            return
        with Status(plain=self._look.plain) as status:
            status.show(f"loading {name}")
            chat = self._begin(str(read_file_name(name)))
        chat.options = {**self.chat.options}
        said = [*self.chat.messages, {"role": "user", "content": self.waiting}]
        *chat.messages, waiting = [{**message, "content": prepared_by(chat, message)} for message in said]
        chat.system = self.chat.system
        self.waiting, self.model = waiting["content"], name
        self._go_on_with(chat)

    def _go_on_with(self, chat: "Chat") -> None:
        """Put another conversation in the place of this one."""
        self.chat = chat
        self._forks.clear()
        for note in chat.notes:
            self._look.note(note)
        said = as_typed(last_said(chat.messages))
        self._look.note("nothing was said yet" if said is None else f"going on behind: {said}")

    def _stats(self, _: str) -> None:
        messages = self.chat.messages
        said = [message for message in messages if message["role"] == "user"]
        pictures = sum(part["type"] == "image" for message in said for part in parts_of(message))
        rows = {"messages": len(said), "images": pictures}
        rows["context_used"] = self.chat.context_used
        if self.chat.last_stats is not None:
            rows |= asdict(self.chat.last_stats)
        for name, value in rows.items():
            shown = f"{value:.3f}" if isinstance(value, float) else "none" if value is None else f"{value:,}"
            self._look.note(f"{name:<20} {shown}")

    def _clear(self, _: str) -> None:
        self.chat.clear()
        self.waiting.clear()
        self._forks.clear()
        click.echo("The conversation is forgotten.", err=True)

    def _help(self, _: str) -> None:
        for name, (argument, does) in COMMANDS.items():
            click.echo(f"{f'{name} {argument}':<20} {does}", err=True)


def _written(name: str, value: Any) -> str:
    """A setting's value as `/set` takes it; of a file what it says, in short."""
    if value in (None, ()):
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if name == "choices":
        return ",".join(f'"{each}"' if "," in each else each for each in value)
    text = shlex.join(value) if isinstance(value, tuple) else " ".join(str(value).split())
    return f"{text[:60]}..." if name in FORMS and len(text) > 60 else text


def find_settings(command: click.Command) -> dict[str, click.Option]:
    """What `/set` knows: those of a command's options that are `Options`, and one more."""
    options = [*command.params, click.Option(["--prefill-step"], type=click.IntRange(1))]
    return {str(each.name): each for each in options if isinstance(each, click.Option) and each.name in defaults()}


def defaults() -> dict[str, Any]:
    """What `Options` are where nobody says anything."""
    from mlx_vlm_mini.generation.options import Options

    return {field.name: field.default for field in fields(Options)}


def read_file_name(typed: str) -> Path:
    """Raises PromptError where nothing can have that name."""
    name = read_path(typed)
    if not name or "\0" in name:
        raise PromptError("the name of a file or a model is missing" if not name else "no file can have that name")
    return Path(os.path.expanduser(name))  # noqa: PTH111 - never raises


def clipboard_picture() -> Any:
    """The picture that was copied, or the file of one.

    Raises:
        ImageError: there is none, or the platform lets nobody see.
    """
    from PIL import ImageGrab

    try:
        found = ImageGrab.grabclipboard()
    except (NotImplementedError, OSError, ChildProcessError, subprocess.SubprocessError) as error:
        raise ImageError(
            f"the clipboard cannot be read here ({' '.join(str(error).split())}): give a path to /image"
        ) from None
    picture = next((Path(name) for name in found if is_picture(name)), None) if isinstance(found, list) else found
    if picture is None:
        raise ImageError("there is no picture on the clipboard")
    return picture
