"""Answers as they come: prompt -> text, with stop strings, finish reasons and statistics."""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from mlx_vlm_mini.borrow import borrow_uncompiled
from mlx_vlm_mini.decoder.state import State
from mlx_vlm_mini.errors import PromptError
from mlx_vlm_mini.images.source import ImageSource
from mlx_vlm_mini.inputs import InputImage, Inputs
from mlx_vlm_mini.model import VLM
from mlx_vlm_mini.processor import Processor
from mlx_vlm_mini.text.messages import Prompt
from mlx_vlm_mini.text.tokenizer import TextStream

from .decode import PREFILL_STEP, LogitsProcessor, Sampler, decode, prefill, take_turns, wired_memory
from .features import Features

FinishReason = Literal["stop", "length"]

_MANY = 2**62
_LIMITS: dict[str, tuple[float, float]] = {
    "max_tokens": (1, _MANY), "temperature": (1e-4, 1e4), "top_p": (0.0, 1.0), "min_p": (0.0, 1.0), "top_k": (0, _MANY),
    "repetition_penalty": (0.01, 100.0), "seed": (0, 2**64 - 1), "prefill_step": (1, _MANY),
}  # fmt: skip
_FAR = 0x9E3779B97F4A7C15  # an odd number near 2^64 divided by the golden ratio: no two seeds' tokens come near


@dataclass
class Stats:
    """What an answer cost; grows while it is given.

    Attributes:
        prompt_tokens: tokens of the whole prompt, images included.
        image_tokens: those that images fill.
        cached_tokens: those that a conversation's cache already held.
        encoded_images: images that the vision tower encoded; those that a conversation had encoded before are not.
        context_limit: tokens that a conversation and its answer may have; None outside of one.
        generated_tokens: tokens of the answer, the one that ended it included.
        image_s: seconds to open, prepare and encode images and to tokenize the text.
        prefill_s: seconds to read the prompt.
        first_token_s: seconds from the call to the first token.
        decode_s: seconds from the first token to the last.
        peak_memory_bytes: MLX's peak, of the process.
    """

    prompt_tokens: int = 0
    image_tokens: int = 0
    cached_tokens: int = 0
    encoded_images: int = 0
    context_limit: int | None = None
    generated_tokens: int = 0
    image_s: float = 0.0
    prefill_s: float = 0.0
    first_token_s: float = 0.0
    decode_s: float = 0.0
    peak_memory_bytes: int = 0


@dataclass(frozen=True)
class Chunk:
    """One token of an answer.

    Attributes:
        text: the text that the token completes; may be empty.
        token: its id.
        logprob: its log-probability under the model, before temperature and the like.
        finish_reason: on the last chunk "stop" (an end token or a stop string) or "length", else None.
        stats: the same object on every chunk, up to date.
    """

    text: str
    token: int
    logprob: float
    finish_reason: FinishReason | None
    stats: Stats


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to answer.

    Attributes:
        max_tokens: tokens of an answer at most.
        temperature: 0 always takes the likeliest token.
        top_p, min_p, top_k, repetition_penalty: mlx-lm's samplers and penalty; at their defaults off.
        seed: makes a sampled answer repeatable: its n-th token depends on the seed and n, whatever else draws numbers.
        stop: texts that end the answer; they are not part of it.
        sampler, logits_processors: own ones, in mlx-lm's form, in place of those above.
        prefill_step: prompt tokens a chunk.
        progress: called with prompt tokens read and prompt tokens in all.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 0.0
    min_p: float = 0.0
    top_k: int = 0
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | Sequence[str] = ()
    sampler: Sampler | None = None
    logits_processors: Sequence[LogitsProcessor] | None = None
    prefill_step: int = PREFILL_STEP
    progress: Callable[[int, int], None] | None = None

    def __post_init__(self) -> None:
        """Raises PromptError where an option has another type, or is out of range."""
        for name, (low, high) in _LIMITS.items():
            value, whole = getattr(self, name), type(high) is int
            if value is None and name in ("seed", "repetition_penalty"):
                continue
            if not isinstance(value, int if whole else int | float) or isinstance(value, bool):
                raise PromptError(f"{name} must be a {'whole number' if whole else 'number'}, not {value!r}")
            if not (low <= value <= high or (name == "temperature" and value == 0)):
                limit = f"{low} or more" if high == _MANY else f"between {low} and {high}"
                limit = f"0 or more ({low} to {high} where it is not 0)" if name == "temperature" else limit
                raise PromptError(f"{name} must be {limit}, not {value}")
        if not isinstance(self.stop, str) and not (
            isinstance(self.stop, Sequence) and all(isinstance(stop, str) for stop in self.stop)
        ):
            raise PromptError(f"stop must be a text or a list of texts, not {self.stop!r}")

    @property
    def stops(self) -> tuple[str, ...]:
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        return tuple(stop for stop in stops if stop)

    def make_sampler(self, vocab_size: int) -> Sampler:
        sampler, numbers = self.sampler or self._choose_sampler(vocab_size), count()
        if self.seed is None:
            return sampler
        first = self.seed * _FAR

        def seeded(logprobs: mx.array) -> mx.array:
            mx.random.seed((first + next(numbers)) % 2**64)
            return sampler(logprobs)

        return seeded

    def _choose_sampler(self, vocab_size: int) -> Sampler:
        top_k = self.top_k if self.top_k < vocab_size else 0  # mlx-lm refuses what would leave nothing out
        sampler: Sampler = borrow_uncompiled("sample_utils").make_sampler(
            temp=self.temperature, top_p=self.top_p, min_p=self.min_p, top_k=top_k
        )
        return sampler

    def make_logits_processors(self) -> Sequence[LogitsProcessor]:
        if self.logits_processors is not None:
            return self.logits_processors
        processors: Sequence[LogitsProcessor] = borrow_uncompiled("sample_utils").make_logits_processors(
            repetition_penalty=self.repetition_penalty
        )
        return processors


@dataclass
class _StopFilter:
    """Holds text back while it may be the beginning of a stop string."""

    stops: tuple[str, ...]
    held: str = field(default="", init=False)

    def add(self, text: str) -> tuple[str, bool]:
        """Text that may be shown, and whether a stop string came."""
        self.held += text
        found = [place for stop in self.stops if (place := self.held.find(stop)) >= 0]
        if found:
            shown, self.held = self.held[: min(found)], ""
            return shown, True
        keep = max((n for stop in self.stops for n in range(1, len(stop)) if self.held.endswith(stop[:n])), default=0)
        cut = len(self.held) - keep
        shown, self.held = self.held[:cut], self.held[cut:]
        return shown, False


def stream_inputs(
    model: VLM,
    processor: Processor,
    inputs: Inputs,
    state: State,
    *,
    options: Options,
    cached: int = 0,
    started: float | None = None,
    features: Features | None = None,
    context: int | None = None,
) -> Iterator[Chunk]:
    """Answer inputs whose first `cached` tokens the state already holds. Several threads' answers take turns.

    Args:
        started: `time.perf_counter()` at which the caller began, for the statistics.
        features: where what images become is kept and found.
        context: for the statistics.
    """
    begin = time.perf_counter() if started is None else started
    return take_turns(_answer(model, processor, inputs, state, options, cached, begin, features or Features(), context))


def _answer(
    model: VLM,
    processor: Processor,
    inputs: Inputs,
    state: State,
    options: Options,
    cached: int,
    begin: float,
    kept: Features,
    context: int | None,
) -> Generator[Chunk, None, None]:
    """The steps of `stream_inputs`: its chunks."""
    stats = Stats(
        prompt_tokens=len(inputs.slots),
        image_tokens=int(inputs.slots.sum()),
        cached_tokens=cached,
        context_limit=context,
    )

    def encode(image: InputImage) -> mx.array:
        stats.encoded_images += 1
        return model.encode(image)

    def find(image: InputImage) -> mx.array:
        return kept.encode(image, encode)

    vocab_size = model.config.decoder.vocab_size
    ends = processor.eos_token_ids | special_stops(processor, options.stops)
    stop_filter, text_stream = _StopFilter((*options.stops, *processor.stops)), TextStream(processor.tokenizer)
    with wired_memory():
        reading = model.read(inputs, cached, find)
        mx.eval(reading.embeddings, reading.beside)
        stats.image_s = time.perf_counter() - begin
        logits = prefill(model.decoder, reading, state, step=options.prefill_step, progress=options.progress)
        tokens = decode(
            model.decoder,
            logits,
            state,
            prompt=known_tokens(inputs, vocab_size),
            max_tokens=options.max_tokens,
            sampler=options.make_sampler(vocab_size),
            logits_processors=options.make_logits_processors(),
        )
        for token in tokens:
            now = time.perf_counter()
            stats.generated_tokens += 1
            if stats.generated_tokens == 1:
                stats.first_token_s = now - begin
                stats.prefill_s = stats.first_token_s - stats.image_s
            stats.decode_s = now - begin - stats.first_token_s
            stats.peak_memory_bytes = mx.get_peak_memory()
            ended = token.id in ends
            text, stopped = stop_filter.add("" if ended else text_stream.add(token.id))
            last = ended or stopped or stats.generated_tokens == options.max_tokens
            if last and not stopped:
                rest, stopped = stop_filter.add(text_stream.finish())
                text += rest + ("" if stopped else stop_filter.held)
            reason: FinishReason | None = None if not last else "stop" if ended or stopped else "length"
            yield Chunk(text, token.id, token.logprob, reason, stats)
            if last:
                return


def special_stops(processor: Processor, stops: Sequence[str]) -> set[int]:
    """Ids of the stop strings that are special tokens: these never appear in an answer's text."""
    found = {processor.tokenizer.token_to_id(stop) for stop in stops} - {None}
    return {token for token in found if token is not None and not processor.tokenizer.decode([token])}


def known_tokens(inputs: Inputs, vocab_size: int) -> mx.array:
    """int[n]: a prompt's token ids that have a logit, which an image token's need not have."""
    ids = np.array(inputs.input_ids[0])
    return mx.array(ids[ids < vocab_size])


def stream_generate(
    model: VLM,
    processor: Processor,
    prompt: Prompt,
    *,
    images: Sequence[ImageSource] = (),
    **options: Any,
) -> Iterator[Chunk]:
    """Answer a prompt, token by token.

    Args:
        prompt: a text, a list of texts and images in order, or OpenAI-style messages.
        images: come before the text.
        options: see `Options`: max_tokens, temperature, top_p, seed, stop, ...

    Yields:
        A `Chunk` a token; the last one has a `finish_reason`.

    Raises:
        PromptError, ImageError: the prompt or an image is at fault.
    """
    started = time.perf_counter()
    chosen = Options(**options)
    inputs = processor(prompt, images)
    yield from stream_inputs(model, processor, inputs, model.make_state(), options=chosen, started=started)


def generate(
    model: VLM,
    processor: Processor,
    prompt: Prompt,
    *,
    images: Sequence[ImageSource] = (),
    **options: Any,
) -> str:
    """Answer a prompt: the text of `stream_generate`, whole."""
    return "".join(chunk.text for chunk in stream_generate(model, processor, prompt, images=images, **options))
