"""A conversation that keeps its KV cache from turn to turn."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from .errors import VLMError
from .model import VLM, Inputs
from .processor import Processor
from .prompt import Message, Prompt, images_of, to_messages
from .stream import Chunk, Options, stream_inputs


class Chat:
    """A conversation about images and text.

        chat = Chat(model, processor)
        for chunk in chat.send(["Compare ", Path("a.png"), " with ", Path("b.png")]):
            print(chunk.text, end="")

    Each turn reads only what the cache lacks. What it holds is decided on the exact sequence of token ids and, at an
    image's slots, on the image's pixels: another picture never gets the answer about the old one.

    Attributes:
        messages: the conversation so far, images prepared.
    """

    def __init__(self, model: VLM, processor: Processor, *, system: str | None = None, **options: Any) -> None:
        """
        Args:
            system: a system message that opens the conversation.
            options: defaults for every turn, see `Options`.
        """
        self.model = model
        self.processor = processor
        self.system = system
        self.options = options
        self.clear()

    def clear(self) -> None:
        """Forget the conversation."""
        self.messages: list[Message] = []
        if self.system is not None:
            self.messages.append({"role": "system", "content": [{"type": "text", "text": self.system}]})
        self._turns = object()  # a turn that is still being answered when this changes is forgotten, too
        self._cache = self.model.make_cache()
        self._held = np.zeros((0, 2), dtype=np.uint64)  # what the cache holds, see _identify

    def send(self, prompt: Prompt, *, images: Sequence[Any] = (), **options: Any) -> Iterator[Chunk]:
        """Say something and yield the answer, token by token.

        An answer that is interrupted stays in the conversation as far as it went. When the prompt itself is refused
        (an image that cannot be opened, say), the conversation stays as it was.

        Args:
            prompt: a text, a list of texts and images in order, or messages to append.
            images: come before the text.
            options: for this turn, see `Options`.

        Raises:
            PromptError, ImageError: the prompt or an image is at fault.
        """
        started = time.perf_counter()
        chosen = Options(**{**self.options, **options})
        turn = to_messages(prompt, images)
        for part in images_of(turn):
            part["image"] = self.processor.prepare(part["image"])
        inputs = self.processor([*self.messages, *turn])
        identity = self._identify(inputs)
        cached = self._reuse(identity)
        answer: list[str] = []
        tokens: list[int] = []
        turns, cache, refused = self._turns, self._cache, False
        try:
            for chunk in stream_inputs(
                self.model,
                self.processor,
                inputs,
                cache,
                options=chosen,
                cached=cached,
                started=started,
            ):
                answer.append(chunk.text)
                tokens.append(chunk.token)
                yield chunk
        except VLMError:
            refused = True
            raise
        finally:
            if turns is self._turns:
                self._keep(identity, tokens)
                if not refused:
                    said = {"role": "assistant", "content": [{"type": "text", "text": "".join(answer)}]}
                    self.messages += [*turn, said]

    def _identify(self, inputs: Inputs) -> np.ndarray:
        """What each position of a prompt is: uint64[L, 2], (token id, 0), or an image's digest and a row of it."""
        ids = np.array(inputs.input_ids[0]).astype(np.uint64)
        identity = np.stack([ids, np.zeros_like(ids)], axis=-1)
        slots = np.flatnonzero(inputs.slots)
        for image in inputs.images:
            own, slots = slots[: image.tokens], slots[image.tokens :]
            identity[own, 0] = np.uint64(int.from_bytes(image.digest[:8], "little"))
            identity[own, 1] = np.arange(1, len(own) + 1, dtype=np.uint64)
        return identity

    def _reuse(self, wanted: np.ndarray) -> int:
        """Trim the cache to what it shares with a prompt, all but its last token; return its length."""
        if self.model.decoder.reads_whole(len(wanted)):
            self._held = self._held[:0]
        length = min(len(self._held), len(wanted) - 1)
        different = np.flatnonzero((self._held[:length] != wanted[:length]).any(axis=-1))
        length = int(different[0]) if len(different) else length
        for entry in self._cache:
            entry.trim(entry.offset - length)
        self._held = self._held[:length]
        return length

    def _keep(self, prompt: np.ndarray, tokens: list[int]) -> None:
        """Note what the cache holds after an answer; trim the token that was computed ahead."""
        said = np.array([[token, 0] for token in tokens], dtype=np.uint64).reshape(-1, 2)
        held = np.concatenate([prompt, said])
        length = min(entry.offset for entry in self._cache)
        length = min(length, len(held)) if tokens else min(length, len(self._held))
        for entry in self._cache:
            entry.trim(entry.offset - length)
        mx.eval([entry.state for entry in self._cache if not entry.empty()])
        self._held = held[:length]
