"""An answer's tokens become text: chunks, stop strings, finish reasons and statistics."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from mlx_vlm_mini.decoder.state import State
from mlx_vlm_mini.errors import PromptError
from mlx_vlm_mini.inputs import InputImage, Inputs
from mlx_vlm_mini.model import VLM
from mlx_vlm_mini.processor import Processor
from mlx_vlm_mini.text.thinking import ThinkingFilter, length_of_beginning
from mlx_vlm_mini.text.tokenizer import TextStream

from .constraints import Constraint, ConstraintAfterThinking, vocabulary_of
from .decode import Chooser, Token, release_buffers, score_continuations
from .features import Features
from .options import Options

FinishReason = Literal["stop", "length"]


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
        thinking_tokens: those of them that are its thinking, the markers around it included; they come first.
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
    thinking_tokens: int = 0
    image_s: float = 0.0
    prefill_s: float = 0.0
    first_token_s: float = 0.0
    decode_s: float = 0.0
    peak_memory_bytes: int = 0


@dataclass(frozen=True)
class Choice:
    """How probable one of the texts is that an answer may be.

    Attributes:
        text: the choice.
        logprob: natural logarithm of the model's probability that its answer begins with the text, with or without a
            space in front; where the tokens of a choice begin those of another, that its answer is the text and ends.
        probability: among the choices.
    """

    text: str
    logprob: float
    probability: float


@dataclass(frozen=True)
class Chunk:
    """One token of an answer.

    Attributes:
        text: the text that the token completes; may be empty, as while the model thinks.
        token: its id.
        logprob: its log-probability under the model, before temperature and the like.
        finish_reason: on the last chunk "stop" (an end token, a stop string, or a form that is complete) or "length",
            else None.
        stats: the same object on every chunk, up to date.
        thinking: the text of the answer's thinking that the token completes, without the markers around it.
        choices: of each choice how probable it is, where that was asked for (`Options.probabilities`).
        object: on the last chunk what the answer is the JSON of, where a schema was asked for and the answer is whole.
    """

    text: str
    token: int
    logprob: float
    finish_reason: FinishReason | None
    stats: Stats
    thinking: str = ""
    choices: tuple[Choice, ...] = ()
    object: Any = None


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
        cut = len(self.held) - length_of_beginning(self.held, self.stops)
        shown, self.held = self.held[:cut], self.held[cut:]
        return shown, False


class Answering:
    """One answer while it is given: what belongs to it whoever computes its tokens, alone or as a row of a batch.

    Attributes:
        choose: chooses its tokens.
        stats: what it costs.
    """

    def __init__(
        self,
        model: VLM,
        processor: Processor,
        inputs: Inputs,
        options: Options,
        *,
        begin: float,
        features: Features,
        cached: int = 0,
        context: int | None = None,
    ) -> None:
        """
        Args:
            begin: `time.perf_counter()` at which the caller began.
            features: where what images become is kept and found.
            cached: tokens of the prompt that its state already holds.
            context: for the statistics.

        Raises:
            PromptError: the model would think before choices whose probabilities are asked for.
        """
        vocab_size = model.config.decoder.vocab_size
        self.model, self.inputs, self.options = model, inputs, options
        self._ends = processor.eos_token_ids | special_stops(processor, options.stops)
        constraint = None
        if options.form is not None:
            video = processor.tokenizer.token_to_id(processor.video_token or "")
            images = {processor.image_token_id, processor.image_token_id if video is None else video}
            make = partial(vocabulary_of, processor.tokenizer, vocab_size, self._ends, images)
            thinking, text = self._begin_text(processor)
            if options.probabilities and thinking.place == "thinking":
                raise PromptError("how probable choices are is asked before the model thinks: turn that off (think)")
            constraint = Constraint(options.form, make)
            if thinking.place != "text":
                constraint = ConstraintAfterThinking(options.form, make, thinking, text, processor.marker_texts)
        self.choose: Chooser = options.make_chooser(vocab_size, known_tokens(inputs, vocab_size), constraint)
        self.stats = Stats(
            prompt_tokens=len(inputs.slots),
            image_tokens=int(inputs.slots.sum()),
            cached_tokens=cached,
            context_limit=context,
        )
        self._begin, self._features = begin, features
        stops = processor.stops if constraint is None else ()  # a form says where it ends
        self._filter = _StopFilter((*options.stops, *stops))
        self._drops_space = constraint is not None and constraint.drops_space
        self._thinking, self._text = self._begin_text(processor)
        self._choices: tuple[Choice, ...] = ()
        self._whole = ""

    def _begin_text(self, processor: Processor) -> tuple[ThinkingFilter, TextStream]:
        """What makes the answer's tokens text, and tells thinking from it."""
        filtered = ThinkingFilter(processor.chat_template.markers, self.inputs.answer_begins)
        return filtered, TextStream(processor.tokenizer, processor.marker_texts)

    def find(self, image: InputImage) -> mx.array:
        """An image's features, encoded or found: float[tokens, C]."""
        return self._features.encode(image, self._encode)

    def _encode(self, image: InputImage) -> mx.array:
        self.stats.encoded_images += 1
        return self.model.encode(image)

    def read_prompt(self, logits: mx.array, state: State) -> None:
        """Note that the prompt is read, and find how probable the choices are, where that is asked for.

        Args:
            logits: float[1, vocab_size], of the prompt's last token.
            state: holds the prompt, and does so afterwards.
        """
        mx.async_eval(logits)
        constraint = self.choose.constraint
        if constraint is None or not self.options.probabilities:
            return
        texts = self.options.choices or ()
        ways = [constraint.ways(text) for text in texts]
        starts = {way[:length] for each in ways for way in each for length in range(1, len(way))}
        nested = any(way in starts for each in ways for way in each)
        ends = [end for end in self._ends if end < logits.shape[-1]] if nested else []
        decoder = self.model.decoder
        scores = iter(score_continuations(decoder, logits, state, [way for each in ways for way in each], ends))
        logprobs = np.array([np.logaddexp.reduce([next(scores) for _ in each]) for each in ways])
        odds = np.exp(logprobs - np.logaddexp.reduce(logprobs))
        found = zip(texts, logprobs.tolist(), odds.tolist(), strict=True)
        self._choices = tuple(Choice(text, logprob, share) for text, logprob, share in found)

    def read_images(self) -> None:
        """Note that images are encoded and the text is tokenized."""
        if self.stats.encoded_images:
            release_buffers()
        self.stats.image_s = time.perf_counter() - self._begin

    def chunk(self, token: Token) -> Chunk:
        """What a token adds to the answer; the last one has a `finish_reason`."""
        now, stats = time.perf_counter(), self.stats
        stats.generated_tokens += 1
        if stats.generated_tokens == 1:
            stats.first_token_s = now - self._begin
            stats.prefill_s = stats.first_token_s - stats.image_s
        stats.decode_s = now - self._begin - stats.first_token_s
        stats.peak_memory_bytes = mx.get_peak_memory()
        ended, thinks = token.id in self._ends, self._thinking.place == "thinking"
        thinking, said = self._thinking.add("" if ended else self._text.add(token.id))
        if thinks or self._thinking.place == "thinking":
            stats.thinking_tokens = stats.generated_tokens
        text, stopped = self._filter.add(self._said(said))
        ended = ended or token.last
        last = ended or stopped or stats.generated_tokens == self.options.max_tokens
        if last and not stopped:
            more, rest = self._thinking.add(self._text.finish())
            last_thought, left = self._thinking.finish()
            thinking += more + last_thought
            rest = self._said(rest + left)
            if self.choose.constraint is not None and not ended:
                rest = rest.rstrip("\ufffd")  # a character that was cut is no part of the form
            rest, stopped = self._filter.add(rest)
            text += rest + ("" if stopped else self._filter.held)
        reason: FinishReason | None = None if not last else "stop" if ended or stopped else "length"
        found, form = None, self.options.form
        if form is not None and form.kind == "schema":
            self._whole += text
            found = form.parse(self._whole) if ended else None
        return Chunk(text, token.id, token.logprob, reason, stats, thinking, self._choices, found)

    def _said(self, text: str) -> str:
        """Text of the answer, without the space in front that is no part of its form."""
        if text and self._drops_space:
            self._drops_space = False
            return text.removeprefix(" ")
        return text


def special_stops(processor: Processor, stops: Sequence[str]) -> set[int]:
    """Ids of the stop strings that are special tokens: these never appear in an answer's text."""
    found = {processor.tokenizer.token_to_id(stop) for stop in stops} - {None}
    return {token for token in found if token is not None and not processor.tokenizer.decode([token])}


def known_tokens(inputs: Inputs, vocab_size: int) -> mx.array:
    """int[n]: a prompt's token ids that have a logit, which an image token's need not have."""
    ids = np.array(inputs.input_ids[0])
    return mx.array(ids[ids < vocab_size])
