"""Prefill and decoding. Knows token ids and readings only."""

import math
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar, cast

import mlx.core as mx

from mlx_vlm_mini.decoder.decoder import Decoder
from mlx_vlm_mini.decoder.reading import Reading
from mlx_vlm_mini.decoder.state import State
from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.layers.kernels import claim_process, is_forked, kernels

from .step import make_step

Sampler = Callable[[mx.array], mx.array]
"""float[1, vocab_size] log-probabilities -> int[1] token ids, as mlx-lm's `make_sampler` makes them."""

LogitsProcessor = Callable[[mx.array, mx.array], mx.array]
"""(int[L] tokens so far, float[1, vocab_size] logits) -> logits, as mlx-lm's `make_logits_processors` makes them."""

PREFILL_STEP = 512  # prompt tokens a chunk: bounds the activations' memory
TAIL = 8  # last tokens of a prompt, among which those are that open an answer; thoughts go with it from later prompts

_REMEDIES = {"float16": "its numbers are too large for that type, load it as bfloat16 or float32"}

Step = TypeVar("Step")
_turn = threading.RLock()
_wired: list[int] = []  # of each answer that is being given, the limit to go back to


@dataclass(frozen=True)
class Token:
    """A token and the log-probability that the model gave it, before temperature and the like."""

    id: int
    logprob: float


def take_turns(steps: Generator[Step, None, None]) -> Iterator[Step]:
    """What `steps` yields; each step is computed while no other thread of the process computes one.

    So answers that several threads ask for take turns token by token, and each is what it would be alone.
    """
    try:
        while True:
            claim_process()
            with _turn:
                try:
                    step = next(steps)
                except StopIteration:
                    return
            yield step
    finally:
        if not is_forked():
            with _turn:
                steps.close()


def one_at_a_time(step: Callable[[], Step]) -> Step:
    """What `step` gives, computed while no other thread of the process computes one; see `take_turns`."""
    claim_process()
    with _turn:
        return step()


@contextmanager
def wired_memory() -> Iterator[None]:
    """On Metal, let weights and caches stay resident while generating: up to what the GPU recommends. Where several
    answers are being given, until the last of them has ended."""
    limit = None
    if mx.metal.is_available() and mx.default_device().type == mx.DeviceType.gpu:
        limit = mx.device_info(mx.Device(mx.gpu)).get("max_recommended_working_set_size")
    if limit is None:
        yield
        return
    before = mx.set_wired_limit(int(limit))
    _wired.append(_wired[0] if _wired else before)
    try:
        yield
    finally:
        mx.synchronize()
        before = _wired.pop()
        if not _wired:
            mx.set_wired_limit(before)


def read_in_chunks(
    decoder: Decoder, reading: Reading, state: State, step: int = PREFILL_STEP
) -> Generator[int, None, mx.array]:
    """Read a prompt into the state, chunk by chunk.

    Where layers keep states that nothing can be taken out of, the place `TAIL` tokens before the prompt's end is kept
    as one to go back to: for the same prompt again, and for one that goes on otherwise than its last tokens.

    Args:
        reading: the prompt, or the part of it that the state lacks.
        step: tokens a chunk. Not applied where the prompt's keys depend on all of it, nor among tokens that see one
            another.

    Yields:
        After each chunk but the last how many tokens are done.

    Returns:
        float[1, vocab_size], the logits of the last token; not evaluated.
    """
    total, before = reading.length, state.start
    whole = decoder.reads_whole(before + total)
    step = total if whole else step
    tail = total if whole or not state.needs_snapshots or total <= TAIL else total - TAIL
    done = 0

    def cut() -> int:
        length = min(step, tail - done) if done < tail else step
        return reading.visible.cut(before + done, length, before + total) - before

    while (end := cut()) < total:
        decoder(reading.part(done, end), state)
        state.evaluate()
        if end == tail:
            state.snapshot()
        done = end
        yield done
        mx.clear_cache()
    hidden = decoder(reading.part(done, total), state)
    if tail == total:
        state.snapshot()
    return decoder.logits(hidden[:, -1:])[:, 0]


def prefill(
    decoder: Decoder,
    reading: Reading,
    state: State,
    *,
    step: int = PREFILL_STEP,
    progress: Callable[[int, int], None] | None = None,
) -> mx.array:
    """Read a prompt into the state, and score its last token only.

    Args:
        reading, step: see `read_in_chunks`.
        progress: called with tokens done and tokens in all.

    Returns:
        float[1, vocab_size], the logits of the last token; not evaluated.
    """
    chunks = read_in_chunks(decoder, reading, state, step)
    while True:
        try:
            done = next(chunks)
        except StopIteration as end:
            return cast(mx.array, end.value)
        if progress is not None:
            progress(done, reading.length)


class Chooser:
    """Chooses an answer's tokens: logits processors, then the sampler.

    Attributes:
        greedy: whether it takes the likeliest token, and nothing else matters.
    """

    def __init__(
        self,
        prompt: mx.array,
        sampler: Sampler,
        logits_processors: Sequence[LogitsProcessor] = (),
        *,
        greedy: bool = False,
    ) -> None:
        """`prompt`: int[L], for the logits processors."""
        self._tokens, self._sampler, self._processors = prompt, sampler, logits_processors
        self.greedy = greedy and not logits_processors

    def __call__(self, logits: mx.array) -> tuple[mx.array, mx.array]:
        """float[1, vocab_size] -> the token int[1] and its log-probability float[1, 1]; not evaluated."""
        for processor in self._processors:
            logits = processor(self._tokens, logits)
        logprobs = kernels().log_softmax(logits)
        token = self._sampler(logprobs)
        return token, mx.take_along_axis(logprobs, token[:, None], axis=-1)

    def add(self, token: mx.array) -> None:
        """Note a token that was chosen, int[1]."""
        if self._processors:
            self._tokens = mx.concatenate([self._tokens, token.astype(self._tokens.dtype)])


def checked(token: int, logprob: float, decoder: Decoder) -> Token:
    """A token that was computed.

    Raises:
        CheckpointError: its log-probability is not finite.
    """
    if not math.isfinite(logprob):
        kind = str(decoder.norm.weight.dtype).split(".")[-1]
        raise CheckpointError(
            f"the model computed a log-probability of {logprob} in {kind}: "
            + _REMEDIES.get(kind, "its weights are broken, or a logits processor leaves no token")
        )
    return Token(token, logprob)


def decode(decoder: Decoder, logits: mx.array, state: State, *, max_tokens: int, choose: Chooser) -> Iterator[Token]:
    """Sample tokens one after another; the next one is being computed while the reader has this one.

    Args:
        logits: float[1, vocab_size], of the prompt's last token.
        state: holds the prompt. When a token is yielded it holds, or is about to hold, that token too.
        max_tokens: tokens to yield at most.

    Raises:
        CheckpointError: the model computes numbers that are not finite.
    """
    step = make_step(decoder, state)
    token, logprob = choose(logits)
    mx.async_eval(token, logprob)
    for count in range(1, max_tokens + 1):
        current, current_logprob = token, logprob
        if count < max_tokens:
            choose.add(current)
            token, logprob = choose(step(current))
            mx.async_eval(token, logprob)
        yield checked(cast(int, current.item()), cast(float, current_logprob.item()), decoder)
        if count % 256 == 0:
            mx.clear_cache()
