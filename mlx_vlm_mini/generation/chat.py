"""A conversation that keeps its KV cache from turn to turn."""

import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mlx_vlm_mini.checkpoints.fingerprint import fingerprint
from mlx_vlm_mini.decoder.rope import longest_context
from mlx_vlm_mini.errors import PromptError, VLMError, check_whole
from mlx_vlm_mini.files import write_whole
from mlx_vlm_mini.inputs import Inputs
from mlx_vlm_mini.model import VLM
from mlx_vlm_mini.processor import Processor
from mlx_vlm_mini.text.messages import Message, Prompt, images_of, split_turns, to_messages
from mlx_vlm_mini.text.thinking import KEYS

from .answering import Chunk, Stats
from .batch import Turn
from .cache import TurnCache, identify
from .decode import one_at_a_time
from .features import FEATURE_MEMORY, Features
from .options import Options
from .stream import stream_inputs
from .transcript import places, read_transcript, write_transcript

if TYPE_CHECKING:
    from .engine import Engine, Request

OnFull = Literal["stop", "drop"]


@dataclass
class _Answer:
    """An answer that is being given.

    Attributes:
        messages: the conversation up to it, when it will have been given.
        prompt: the identity of their prompt.
        dropped: turns that it had to drop.
        think: whether it was asked to think first.
    """

    messages: list[Message]
    prompt: np.ndarray
    dropped: int
    think: bool | None
    text: list[str] = field(default_factory=list)
    thinking: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


class Chat:
    """A conversation about images and text.

        chat = Chat(model, processor)
        for chunk in chat.send(["Compare ", Path("a.png"), " with ", Path("b.png")]):
            print(chunk.text, end="")

    Each turn equals a fresh run of the whole conversation, and reads only what the cache lacks. What that holds is
    decided position by position: on token ids and, at an image's slots, on the SHA-256 of the image's pixels, so that
    another picture never gets the answer about the old one. The prompt is the messages as text; an answer is read again
    from the first token that its text does not give. What the model thought before an answer stands in that answer's
    message as `reasoning_content`; the chat template says whether later prompts hold it. Nothing of a cache is used
    again where that would not be exact: where the prompt sees itself both ways (PaliGemma), where what was said before
    an image depends on it (Llama 3.2 Vision as transformers computes it), where the conversation is or was longer than
    its rotary angles are fixed for (dynamic and longrope scaling), where the prompt has grown into another step of them
    (Qwen-VL), where the cache is quantized, and where a full rotating one would have to go back. Where layers keep
    states (Qwen3.5), what is read again begins at the nearest one that was kept.

    Whatever is done while an answer is being given ends it; what was said so far stays, except with `clear`. What
    another thread asks while a token is computed is refused: each thread needs its own Chat, and these take turns.

    Attributes:
        messages: the conversation so far, images prepared and in their places.
        options: defaults for every turn, see `Options`; may be changed between turns.
        context: tokens that the conversation and an answer may have.
        on_full: "stop" refuses a turn that does not fit; "drop" forgets the oldest turns for it.
        dropped_turns: how many were forgotten so.
        features: pixels and features of the pictures seen.
        last_stats: of the last answer.
        notes: what `load` found to have changed, a line each.
    """

    def __init__(
        self,
        model: VLM,
        processor: Processor,
        *,
        system: str | None = None,
        context: int | None = None,
        on_full: OnFull = "stop",
        kv_bits: int | None = None,
        rotate: int | None = None,
        feature_memory: int = FEATURE_MEMORY,
        engine: "Engine | None" = None,
        **options: Any,
    ) -> None:
        """
        Args:
            system: a system message that opens the conversation.
            context: in place of what config.json says.
            kv_bits: 2, 4 or 8 quantizes the cache, which takes 0.28 of float16's memory with 4; each turn then reads
                the whole conversation again.
            rotate: the cache holds that many tokens, the first few and the last ones; the model sees no others.
            feature_memory: bytes of pixels and features that are kept for pictures that come again.
            engine: answers every turn, as a row beside what else it answers; made with the same model. Its own options
                are not this conversation's.
            options: defaults for every turn, see `Options`.

        Raises:
            PromptError: an option makes no sense, or does not go with the model.
        """
        if on_full not in ("stop", "drop"):
            raise PromptError(f"on_full must be 'stop' or 'drop', not {on_full!r}")
        check_whole("context", context, 1)
        if engine is not None and engine.model is not model:
            raise PromptError("the engine answers with another model: give the one that it was made with")
        self.model = model
        self.processor = processor
        self.options = options
        self.context = context or longest_context(model.config.decoder)
        self.on_full = on_full
        self.features = Features(feature_memory)
        self.notes: list[str] = []
        self._settings: dict[str, Any] = {"context": context, "on_full": on_full, "kv_bits": kv_bits, "rotate": rotate}
        self._system = system
        self._thread = threading.RLock()
        self._cache = TurnCache(model, kv_bits=kv_bits, rotate=rotate)
        self.engine = engine
        self._running: tuple[Request, Turn] | None = None
        self.clear()

    def clear(self) -> None:
        """Forget the conversation, an answer that is being given included."""
        with self._alone():
            self._forget()

    def _forget(self) -> None:
        self._take_back()
        self._open: _Answer | None = None
        self.messages: list[Message] = []
        self._said: tuple[Message, list[int], bool | None] = {}, [], None
        self.dropped_turns = self._used = 0
        self.last_stats: Stats | None = None
        self._cache.clear()
        self.system = self._system

    @property
    def system(self) -> str | None:
        """The system message that opens the conversation. A new one is read in the next turn, with all behind it."""
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        self._close_answer()
        self._system = text
        opening = [] if text is None else [{"role": "system", "content": [{"type": "text", "text": text}]}]
        self.messages = opening + [message for turn in split_turns(self.messages)[1] for message in turn]

    @property
    def last_tokens(self) -> list[int] | None:
        """Token ids of the last answer; None where it was not given here, but read from a file, say."""
        self._close_answer()
        given, tokens, _ = self._said
        return list(tokens) if self.messages and self.messages[-1] is given else None

    @property
    def last_think(self) -> bool | None:
        """Whether the last answer was asked to think first, see `Options`; as the options say where it was not given
        here."""
        self._close_answer()
        given, _, think = self._said
        return think if self.messages and self.messages[-1] is given else self.options.get("think")

    @property
    def context_used(self) -> int:
        """Tokens of the conversation so far."""
        return self._used

    def send(self, prompt: Prompt, *, images: Sequence[Any] = (), **options: Any) -> Iterator[Chunk]:
        """Say something and yield the answer, token by token.

        An answer that is interrupted stays in the conversation as far as it went. When the prompt itself is refused
        (an image that cannot be opened, say), the conversation stays as it was.

        Args:
            prompt: a text, a list of texts and images in order, or messages to append.
            images: come before the text.
            options: for this turn, see `Options`.

        Raises:
            PromptError: the prompt is at fault, or does not fit into the context.
            ImageError: an image is.
        """
        started = time.perf_counter()
        self._close_answer()
        yield from self._steps(
            self._answer(self.messages, to_messages(prompt, images, self.processor.access), options, started)
        )

    def retry(self, **options: Any) -> Iterator[Chunk]:
        """Answer the last message again and forget the answer that it had; nothing of the prompt is read again.

        Without a temperature the answer is the same. A seed in `self.options` counts on, so that the answer is another.

        Raises:
            PromptError: nothing was said yet.
        """
        started = time.perf_counter()
        before, turn = self._last_turn()
        if "seed" not in options and self.options.get("seed") is not None:
            self.options["seed"] = (self.options["seed"] + 1) % 2**64
        yield from self._steps(self._answer(before, turn, options, started))

    def edit(self, prompt: Prompt, *, images: Sequence[Any] = (), **options: Any) -> Iterator[Chunk]:
        """Say something else in place of the last message and its answer; arguments and errors as of `send`.

        Its pictures are those of the new prompt. What `undo` returns and `messages` holds can be given again.
        """
        started = time.perf_counter()
        before, _ = self._last_turn()
        yield from self._steps(
            self._answer(before, to_messages(prompt, images, self.processor.access), options, started)
        )

    def undo(self) -> list[Message]:
        """Forget the last message and its answer; return what was said, ready to be sent again.

        Raises:
            PromptError: nothing is left.
        """
        before, turn = self._last_turn()
        self.messages = before
        self._count()
        return turn

    def fork(self) -> "Chat":
        """Another conversation that begins as this one did; pictures are shared, and the cache until one goes on."""
        self._close_answer()
        own = {**self._settings, **self.options}
        twin = Chat(self.model, self.processor, system=self._system, engine=self.engine, **own)
        twin.context, twin.on_full, twin.features = self.context, self.on_full, self.features
        twin.dropped_turns, twin._used, twin.last_stats = self.dropped_turns, self._used, self.last_stats
        twin.messages = [{**message, "content": _copy(message["content"])} for message in self.messages]
        twin._cache = self._cache.fork()
        return twin

    def save(self, path: str | Path, *, cache: bool = False) -> None:
        """Write the conversation as JSON (see transcript.py); each file appears whole or not at all.

        Args:
            path: a file that ends in .json, or a folder, which gets conversation.json.
            cache: also write the KV cache beside it, as safetensors: as large as in memory.

        Raises:
            PromptError: it cannot be written, or the cache is quantized or rotating.
        """
        self._close_answer()
        file, cache_file = places(Path(path))
        own = fingerprint(self.model)
        for part in images_of(self.messages):
            part["image"] = self.features.prepare(self.processor, part["image"])
        cached = cache and len(self._cache.held) > 0
        if cached:
            self._cache.check_plain()
            write_whole(cache_file, lambda place: self._cache.write(place, own))
        settings = {**self._settings, "on_full": self.on_full}
        digest = self._cache.digest if cached else None
        write_transcript(file, self.messages, settings=settings, options=self.options, model=own, cache=digest)
        if not cached:
            cache_file.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path, model: VLM, processor: Processor, **options: Any) -> "Chat":
        """A conversation that was saved, to be gone on with.

        Where a picture, the model or the cache is not what it was, `notes` says so and the next turn computes anew.

        Args:
            options: in place of those that were saved: the arguments of `Chat`.

        Raises:
            PromptError: the file is missing or does not hold a conversation.
            ImageError: a picture is missing.
        """
        file, cache_file = places(Path(path))
        found = read_transcript(file)
        chat = cls(model, processor, **{**found.settings, **found.options, **options})
        system = options.get("system")
        chat.messages = found.messages
        for part in images_of(chat.messages):
            part["image"] = chat.features.prepare(processor, part["image"], part.pop("tokens", None))
        opening, _ = split_turns(chat.messages)
        if system is not None:
            chat.system = system
        elif len(opening) == 1:
            chat._system = "".join(
                part["text"] for part in to_messages(opening)[0]["content"] if part["type"] == "text"
            )
        chat.notes = found.notes
        own = fingerprint(model)
        if found.model != own:
            chat.notes.append(f"{file} was saved with another model: the conversation is read anew")
        elif found.cache is not None:
            try:
                chat._cache.check_plain()
                chat._cache.read(cache_file, own, found.cache)
            except VLMError as error:
                chat.notes.append(f"{error}: the conversation is read anew")
        chat._count()
        return chat

    def _last_turn(self) -> tuple[list[Message], list[Message]]:
        """The messages before the last turn, and what was said in it, without the answer."""
        self._close_answer()
        opening, turns = split_turns(self.messages)
        if not turns or turns[-1][0]["role"] == "assistant":
            raise PromptError("nothing was said yet: there is no message to take back")
        before = opening + [message for turn in turns[:-1] for message in turn]
        said = turns[-1]
        while said[-1]["role"] == "assistant":
            said = said[:-1]
        return before, said

    def _count(self) -> None:
        """Count the tokens of the messages as they are."""
        try:
            think = self.options.get("think")
            counted = partial(self.processor, add_generation_prompt=False, think=think)
            inputs = counted(self.messages) if self.messages else None
        except VLMError:  # a template may refuse a system message alone
            inputs = None
        self._used = 0 if inputs is None else len(inputs.slots)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Raises PromptError where another thread is using the conversation."""
        if not self._thread.acquire(blocking=False):
            raise PromptError("another thread is using this conversation: give each a Chat of its own (see fork)")
        try:
            yield
        finally:
            self._thread.release()

    def _steps(self, chunks: Generator[Chunk, None, None]) -> Iterator[Chunk]:
        """The chunks of an answer, during each of which no other thread can use the conversation."""
        try:
            while True:
                with self._alone():
                    chunk = next(chunks, None)
                if chunk is None:
                    return
                yield chunk
        finally:
            with self._alone():
                chunks.close()

    def _answer(
        self, before: list[Message], turn: list[Message], options: dict[str, Any], started: float
    ) -> Generator[Chunk, None, None]:
        chosen = Options(**{**self.options, **options})
        turn = [{**message, "content": _copy(message["content"])} for message in turn]
        for part in images_of(turn):
            part |= self.features.prepare_part(self.processor, part, chosen.image_tokens)
        before, inputs, dropped = self._fit(before, turn, chosen)
        identity = identify(inputs)
        answer = self._open = _Answer([*before, *turn], identity, dropped, chosen.think)
        try:
            for chunk in self._run(inputs, chosen, self._cache.share(identity), started):
                answer.text.append(chunk.text)
                answer.thinking.append(chunk.thinking)
                answer.tokens.append(chunk.token)
                self.last_stats = chunk.stats
                yield chunk
                if answer is not self._open:  # something else was done meanwhile
                    return
        except VLMError:
            if answer is self._open:
                self._keep_cache(answer)
                self._open = None
            raise
        finally:
            if answer is self._open:
                self._close_answer()

    def _run(self, inputs: Inputs, options: Options, cached: int, started: float) -> Iterator[Chunk]:
        """Answer a prompt whose first `cached` tokens are cached."""
        model, processor, features, context = self.model, self.processor, self.features, self.context
        if self.engine is None:
            yield from stream_inputs(
                model, processor, inputs, self._cache.state, options=options, cached=cached, started=started,
                features=features, context=context,
            )  # fmt: skip
            return
        one_at_a_time(self._cache.state.evaluate)  # no thread computes what another one asked for
        turn = Turn(self._cache.state, cached, features, context)
        running = self._running = self.engine.take_turn(inputs, options, turn, started), turn
        try:
            yield from running[0]
        finally:
            if running is self._running:
                self._take_back()

    def _take_back(self) -> None:
        """Have the engine end what it answers, and give the state back."""
        if self._running is not None and self.engine is not None:
            running, self._running = self._running, None
            state = self.engine.end_turn(*running)
            if state is None:
                self._cache.clear()
            else:
                self._cache.state = state

    def _fit(self, before: list[Message], turn: list[Message], options: Options) -> tuple[list[Message], Inputs, int]:
        """The messages that a turn is answered after, the prompt that gives, and how many turns were dropped for it."""
        opening, turns = split_turns(before)
        dropped, max_tokens = 0, options.max_tokens
        while True:
            inputs = self.processor([*before, *turn], think=options.think)
            if len(inputs.slots) + max_tokens <= self.context:
                return before, inputs, dropped
            if self.on_full == "stop" or dropped == len(turns):
                raise PromptError(_too_long(inputs, max_tokens, self.context, can_drop=bool(turns) and not dropped))
            dropped += 1
            before = opening + [message for later in turns[dropped:] for message in later]

    def _close_answer(self) -> None:
        """Put the answer that is being given, or was, into the conversation."""
        with self._alone():
            self._take_back()
            answer, self._open = self._open, None
            if answer is None:
                return
            self._keep_answer(answer)

    def _keep_cache(self, answer: _Answer) -> None:
        """Note what the cache holds; computed while no other thread computes."""
        one_at_a_time(lambda: self._cache.keep(answer.prompt, answer.tokens))

    def _keep_answer(self, answer: _Answer) -> None:
        self._keep_cache(answer)
        said: Message = {"role": "assistant", "content": [{"type": "text", "text": "".join(answer.text)}]}
        if thinking := "".join(answer.thinking):
            said[KEYS[0]] = thinking
        self.messages, self._said = [*answer.messages, said], (said, answer.tokens, answer.think)
        self.dropped_turns += answer.dropped
        self._used = len(answer.prompt) + len(answer.tokens)


def _too_long(inputs: Inputs, max_tokens: int, context: int, *, can_drop: bool) -> str:
    advice = "undo or clear, drop the oldest turns," if can_drop else "shorten the message"
    return (
        f"the conversation would take {len(inputs.slots)} tokens ({int(inputs.slots.sum())} of images) and its answer "
        f"up to {max_tokens}, and the context is {context}: {advice} or ask for a shorter answer (max tokens)"
    )


def _copy(content: Any) -> Any:
    return content if isinstance(content, str) else [dict(part) for part in content]
