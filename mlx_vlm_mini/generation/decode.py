"""Prefill and decoding. Knows token ids and readings only."""

import math
import threading
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar, cast

import mlx.core as mx
import numpy as np

from mlx_vlm_mini.decoder.decoder import Decoder
from mlx_vlm_mini.decoder.reading import Reading
from mlx_vlm_mini.decoder.state import State
from mlx_vlm_mini.errors import CheckpointError, PromptError
from mlx_vlm_mini.layers.kernels import claim_process, is_forked, kernels

from .constraints import Constraint
from .step import Step as TokenStep
from .step import make_step

Sampler = Callable[[mx.array], mx.array]
"""float[1, vocab_size] log-probabilities -> int[1] token ids, as mlx-lm's `make_sampler` makes them."""

LogitsProcessor = Callable[[mx.array, mx.array], mx.array]
"""(int[L] tokens so far, float[1, vocab_size] logits) -> logits, as mlx-lm's `make_logits_processors` makes them."""

PREFILL_STEP = 512  # prompt tokens a chunk: bounds the activations' memory
MOST_FORCED = 64  # tokens of an answer that are read together, where the form allows no others
_FAR = 0x9E3779B97F4A7C15  # an odd number near 2^64 divided by the golden ratio: no two seeds' tokens come near
KEPT_IMAGES = 2  # last images of a prompt behind which a recurrent state is kept
TAIL = 8  # last tokens of a prompt, among which those are that open an answer; thoughts go with it from later prompts

_REMEDIES = {"float16": "its numbers are too large for that type, load it as bfloat16 or float32"}

Step = TypeVar("Step")
_turn = threading.RLock()
_wired: list[tuple[int, int]] = []  # of each answer that is being given, the limits to go back to: wired, unused
UNUSED_SHARE = 0.125  # of the memory that a GPU recommends, for buffers that nothing uses


@dataclass(frozen=True)
class Token:
    """A token and the log-probability that the model gave it, before temperature and the like.

    Attributes:
        last: whether it completes the form that the answer has.
    """

    id: int
    logprob: float
    last: bool = False


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
    """On Metal, let weights and caches stay resident while generating, up to what the GPU recommends, and let MLX keep
    at most a share of that in buffers that nothing uses. Where several answers are being given, until the last of them
    has ended."""
    limit = None
    if mx.metal.is_available() and mx.default_device().type == mx.DeviceType.gpu:
        limit = mx.device_info(mx.Device(mx.gpu)).get("max_recommended_working_set_size")
    if limit is None:
        yield
        return
    before = mx.set_wired_limit(int(limit)), mx.set_cache_limit(int(UNUSED_SHARE * int(limit)))
    _wired.append(_wired[0] if _wired else before)
    try:
        yield
    finally:
        mx.synchronize()
        before = _wired.pop()
        if not _wired:
            mx.set_wired_limit(before[0])
            mx.set_cache_limit(before[1])
            mx.clear_cache()


def release_buffers() -> None:
    """Give the buffers that nothing uses back to the system: a vision tower's are of sizes that the decoder never asks
    for. On a GPU; a CPU's allocator serves every size from them."""
    if mx.default_device().type == mx.DeviceType.gpu:
        mx.clear_cache()


def read_in_chunks(
    decoder: Decoder,
    reading: Reading,
    state: State,
    step: int = PREFILL_STEP,
    keep: Iterable[int] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Generator[int, None, mx.array]:
    """Read a prompt into the state, chunk by chunk.

    Where layers keep states that nothing can be taken out of, the place `TAIL` tokens before the prompt's end is kept
    as one to go back to: for the same prompt again, and for one that goes on otherwise than its last tokens. So are the
    lengths of the whole sequence in `keep`.

    Args:
        reading: the prompt, or the part of it that the state lacks.
        step: tokens a chunk. Not applied where the prompt's keys depend on all of it, nor among tokens that see one
            another.
        progress: called after each chunk but the last with tokens done and tokens in all.

    Yields:
        After each chunk but the last how many tokens are done.

    Returns:
        float[1, vocab_size], the logits of the last token; not evaluated.
    """
    total, before = reading.length, state.start
    whole = decoder.reads_whole(before + total)
    step = total if whole else step
    stops = {total}
    if state.needs_snapshots and not whole:
        stops |= {stop for stop in (total - TAIL, *(length - before for length in keep)) if 0 < stop < total}
    done = 0

    def cut() -> int:
        length = min(step, min(stop for stop in stops if stop > done) - done)
        return reading.visible.cut(before + done, length, before + total) - before

    while (end := cut()) < total:
        decoder(reading.part(done, end), state)
        state.evaluate()
        if end in stops:
            state.snapshot()
        done = end
        if progress is not None:
            progress(done, total)
        yield done
        mx.clear_cache()
    hidden = decoder(reading.part(done, total), state)
    if stops == {total}:
        state.snapshot()
    return decoder.logits(hidden[:, -1:])[:, 0]


def prefill(
    decoder: Decoder,
    reading: Reading,
    state: State,
    *,
    step: int = PREFILL_STEP,
    keep: Iterable[int] = (),
    progress: Callable[[int, int], None] | None = None,
) -> mx.array:
    """Read a prompt into the state, and score its last token only.

    Args:
        reading, step, keep: see `read_in_chunks`.
        progress: see `read_in_chunks`.

    Returns:
        float[1, vocab_size], the logits of the last token; not evaluated.
    """
    chunks = read_in_chunks(decoder, reading, state, step, keep, progress)
    while True:
        try:
            next(chunks)
        except StopIteration as end:
            return cast(mx.array, end.value)


class Chooser:
    """Chooses an answer's tokens: logits processors, then the sampler, among those that the answer's form allows.

    Attributes:
        greedy: whether it takes the likeliest token, and nothing else matters but the form.
        constraint: the answer's form; None where it has none.
    """

    def __init__(
        self,
        prompt: mx.array,
        sampler: Sampler,
        logits_processors: Sequence[LogitsProcessor] = (),
        *,
        greedy: bool = False,
        foreign: bool = False,
        constraint: Constraint | None = None,
    ) -> None:
        """
        Args:
            prompt: int[L], for the logits processors.
            foreign: whether the sampler is a caller's own, which may give tokens that do not exist.
        """
        self._foreign = foreign
        self._tokens, self._sampler, self._processors = prompt, sampler, logits_processors
        self.greedy = greedy and not logits_processors
        self.constraint = constraint

    def __call__(self, logits: mx.array, allowed: mx.array | None = None) -> tuple[mx.array, mx.array]:
        """float[1, vocab_size] -> the token int[1] and its log-probability float[1, 1], the model's own whatever the
        form allows; not evaluated.

        Args:
            logits: of several rows, float[B, vocab_size], where it is greedy.
            allowed: bool[B, vocab_size] in place of what the form allows.

        Raises:
            PromptError: a logits processor or the sampler gives something else than it has to.
        """
        shape = logits.shape
        for processor in self._processors:
            logits = processor(self._tokens, logits)
            if not isinstance(logits, mx.array) or logits.shape != shape:
                raise PromptError(f"a logits processor gave {_kind_of(logits)}, not logits of the shape {shape}")
        if allowed is None and self.constraint is not None:
            allowed = self.constraint.allowed()[None]
        logprobs = kernels().log_softmax(logits)
        token = self._sampler(logprobs if allowed is None else self._among(logprobs, allowed))
        if not isinstance(token, mx.array) or token.shape != shape[:1] or not mx.issubdtype(token.dtype, mx.integer):
            raise PromptError(f"the sampler gave {_kind_of(token)}, not whole numbers of the shape {shape[:1]}")
        if not self._foreign:
            return token, mx.take_along_axis(logprobs, token[:, None], axis=-1)
        exists = (token >= 0) & (token < shape[-1])  # beyond, MLX reads whatever memory there is
        token = mx.where(exists, token, 0)
        found = mx.take_along_axis(logprobs, token[:, None], axis=-1)
        return token, mx.where(exists[:, None], found, mx.nan)

    def _among(self, logprobs: mx.array, allowed: mx.array) -> mx.array:
        """Log-probabilities of the tokens that are allowed, as if there were no others."""
        found = mx.where(allowed, logprobs, -mx.inf)
        return found if self.greedy else found - mx.logsumexp(found, axis=-1, keepdims=True)

    def add(self, token: mx.array) -> None:
        """Note a token that was chosen, int[1]; not evaluated."""
        if self._processors:
            self._tokens = mx.concatenate([self._tokens, token.astype(self._tokens.dtype)])

    def follow(self, token: int) -> bool:
        """Follow the form with the token that was chosen; whether it completes the form.

        Raises:
            PromptError: the form cannot be followed further.
        """
        if self.constraint is None:
            return False
        self.constraint.add(token)
        return self.constraint.done

    def forced(self, most: int) -> list[int]:
        """The tokens that come next because the form allows no others, which are taken as chosen: at most so many, and
        none where logits processors have to see each of them."""
        found: list[int] = []
        while self.constraint is not None and not self._processors and len(found) < most:
            only = self.constraint.only
            if only is None:
                break
            found.append(only)
            self.constraint.add(only)
        if isinstance(self._sampler, Seeded):
            self._sampler.skip(len(found))
        return found


def _kind_of(value: object) -> str:
    """What a caller's function gave, for errors."""
    return f"{value.dtype} of the shape {value.shape}" if isinstance(value, mx.array) else type(value).__name__


class Seeded:
    """A sampler whose n-th token depends on the seed and n, whatever else draws numbers."""

    def __init__(self, sampler: Sampler, seed: int) -> None:
        self._sampler, self._next = sampler, seed * _FAR

    def __call__(self, logprobs: mx.array) -> mx.array:
        mx.random.seed(self._next % 2**64)
        self.skip(1)
        return self._sampler(logprobs)

    def skip(self, count: int) -> None:
        """Leave out tokens that need not be drawn."""
        self._next += count


def checked(token: int, logprob: float, decoder: Decoder, *, last: bool = False) -> Token:
    """A token that was computed.

    Raises:
        CheckpointError: its log-probability is not finite.
    """
    if not math.isfinite(logprob):
        kind = str(decoder.norm.weight.dtype).split(".")[-1]
        raise CheckpointError(
            f"the model computed a log-probability of {logprob} in {kind}: "
            + _REMEDIES.get(
                kind,
                "its weights are broken, or a logits processor leaves no token, or a sampler gave none of its tokens",
            )
        )
    return Token(token, logprob, last)


def decode(decoder: Decoder, logits: mx.array, state: State, *, max_tokens: int, choose: Chooser) -> Iterator[Token]:
    """Sample tokens one after another; the next one is being computed while the reader has this one.

    Args:
        logits: float[1, vocab_size], of the prompt's last token.
        state: holds the prompt. When a token is yielded it holds, or is about to hold, that token too.
        max_tokens: tokens to yield at most.

    Raises:
        CheckpointError: the model computes numbers that are not finite.
        PromptError: the answer's form cannot be followed further.
    """
    step = make_step(decoder, state)
    if choose.constraint is not None:
        yield from _decode_in_form(decoder, step, logits, state, max_tokens=max_tokens, choose=choose)
        return
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


def _decode_in_form(
    decoder: Decoder, step: TokenStep, logits: mx.array, state: State, *, max_tokens: int, choose: Chooser
) -> Iterator[Token]:
    """`decode` where the answer has a form. Which tokens it allows next is found while the device computes the logits
    of a token that was chosen; tokens without an alternative are read together."""
    mx.async_eval(logits)
    left, done = max_tokens, False
    together = MOST_FORCED if all(rope.depends_on == "nothing" for rope in decoder.ropes.values()) else 1
    while left and not done:
        forced = choose.forced(min(left, together))
        if forced:
            read, rows = mx.array(forced[: left - 1]), [logits]
            if read.size == 1:
                rows.append(step(read))
            elif read.size:
                rows.append(decoder.logits(decoder(decoder.read(read[None]), state))[0])
            scores = mx.concatenate(rows)
            given = mx.array(forced)
            logprobs = mx.take_along_axis(kernels().log_softmax(scores[: len(forced)]), given[:, None], axis=-1)[:, 0]
            logits = scores[len(forced) :]
            mx.async_eval(logprobs, logits)
            done = choose.constraint is not None and choose.constraint.done
            found = [*zip(forced, cast(list[float], logprobs.tolist()), strict=True)]
        else:
            token, logprob = choose(logits)
            mx.async_eval(token, logprob)
            if left > 1:
                choose.add(token)
                logits = step(token)
                mx.async_eval(logits)
            chosen = cast(int, token.item())
            done = choose.follow(chosen)
            found = [(chosen, cast(float, logprob.item()))]
        for number, (chosen, score) in enumerate(found, 1):
            left -= 1
            yield checked(chosen, score, decoder, last=done and number == len(found))
            if (max_tokens - left) % 256 == 0:
                mx.clear_cache()


class _Branches:
    """A prompt's state, read on in several ways one after another.

    Attributes:
        path: tokens that were read after the prompt.
        rows: float32[vocab_size] each, log-probabilities of what comes next: after the prompt, and after each token of
            the path.
    """

    def __init__(self, decoder: Decoder, logits: mx.array, state: State) -> None:
        self._decoder, self._prompt = decoder, state.start
        state.snapshot()
        # What cannot go back (a cache that gives tokens up) is read on in copies.
        self._source = None if state.goes_back else state
        self._state = state if self._source is None else state.fork()
        self._together = all(rope.depends_on == "nothing" for rope in decoder.ropes.values())
        self.path: list[int] = []
        self.rows = self._rows(logits)

    @staticmethod
    def _rows(logits: mx.array) -> list[np.ndarray]:
        return [*np.array(kernels().log_softmax(logits).astype(mx.float32))]

    def go(self, wanted: Sequence[int]) -> None:
        """Read these tokens after the prompt, what they share with the path not again."""
        pairs = zip(self.path, wanted, strict=False)
        shared = next(
            (place for place, (one, other) in enumerate(pairs) if one != other), min(len(self.path), len(wanted))
        )
        if shared < len(self.path):
            shared = self._back(shared)
        del self.path[shared:], self.rows[shared + 1 :]
        rest = wanted[shared:]
        size = len(rest) if self._together else 1
        for first in range(0, len(rest), max(size, 1)):
            part = mx.array([*rest[first : first + size]])
            hidden = self._decoder(self._decoder.read(part[None]), self._state)
            self.rows += self._rows(self._decoder.logits(hidden)[0])
        self.path += rest

    def _back(self, length: int) -> int:
        if self._source is None:
            return self._state.rewind(self._prompt + length) - self._prompt
        self._state = self._source.fork()
        return 0


def score_continuations(
    decoder: Decoder,
    logits: mx.array,
    state: State,
    continuations: Sequence[Sequence[int]],
    ends: Collection[int] = (),
) -> list[float]:
    """How probable it is that an answer begins with each of these token sequences. What they share is read once.

    Args:
        logits: float[1, vocab_size], of the prompt's last token.
        state: holds the prompt, and does so afterwards.
        continuations: none of them empty.
        ends: tokens one of which has to follow each; none: anything may.

    Returns:
        Natural logarithms of the probabilities, in the order of the continuations.
    """
    branches, found = _Branches(decoder, logits, state), dict[tuple[int, ...], float]()
    for wanted in sorted({tuple(each) for each in continuations}):
        branches.go(wanted if ends else wanted[:-1])
        total = sum(float(row[token]) for row, token in zip(branches.rows, wanted, strict=False))
        if ends:
            total += float(np.logaddexp.reduce(branches.rows[len(wanted)][[*ends]].astype(np.float64)))
        found[wanted] = total
    branches.go(())
    return [found[tuple(each)] for each in continuations]
