"""Prefill and decode. Knows token ids only, and hands on what cross-attention layers look at."""

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import mlx.core as mx

from mlx_vlm_mini.decoder.cross_attention import ImageCache, ShownImage
from mlx_vlm_mini.decoder.decoder import Decoder
from mlx_vlm_mini.decoder.masks import ImageBlock, cut_between
from mlx_vlm_mini.decoder.sections import PlacedImage
from mlx_vlm_mini.layers.cpu.exponential import log_softmax

from .step import make_step

Sampler = Callable[[mx.array], mx.array]
"""float[1, vocab_size] log-probabilities -> int[1] token ids, as mlx-lm's `make_sampler` makes them."""

LogitsProcessor = Callable[[mx.array, mx.array], mx.array]
"""(int[L] tokens so far, float[1, vocab_size] logits) -> logits, as mlx-lm's `make_logits_processors` makes them."""

PREFILL_STEP = 512  # prompt tokens a chunk: bounds the activations' memory

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
            with _turn:
                try:
                    step = next(steps)
                except StopIteration:
                    return
            yield step
    finally:
        with _turn:
            steps.close()


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


def prefill(
    decoder: Decoder,
    embeddings: mx.array,
    cache: Sequence[Any],
    *,
    images: Sequence[ShownImage | ImageBlock | PlacedImage] = (),
    step: int = PREFILL_STEP,
    progress: Callable[[int, int], None] | None = None,
) -> mx.array:
    """Read a prompt into the cache, chunk by chunk, and score its last token only.

    Args:
        embeddings: float[1, L, C], the prompt's or the part of it that the cache lacks.
        images: for cross-attention layers, those that the cache lacks; or those whose tokens see one another; as
            `model.show` gives them.
        step: tokens a chunk. Not applied where the prompt's keys depend on all of it, nor inside such an image.
        progress: called with tokens done and tokens in all.

    Returns:
        float[1, vocab_size], the logits of the last token; not evaluated.
    """
    total = embeddings.shape[1]
    held = next(entry.offset for entry in cache if not isinstance(entry, ImageCache))
    step = total if decoder.reads_whole(held + total) else max(step, decoder.least_chunk)
    done = 0
    blocks = [image for image in images if isinstance(image, ImageBlock)]
    while (end := cut_between(held + done, step, held + total, blocks) - held) < total:
        decoder(embeddings[:, done:end], cache, images=blocks if done else images)
        mx.eval([entry.state for entry in cache])
        done = end
        if progress is not None:
            progress(done, total)
        mx.clear_cache()
    hidden = decoder(embeddings[:, done:], cache, images=blocks if done else images)
    return decoder.logits(hidden[:, -1:])[:, 0]


def decode(
    decoder: Decoder,
    logits: mx.array,
    cache: Sequence[Any],
    *,
    prompt: mx.array,
    max_tokens: int,
    sampler: Sampler,
    logits_processors: Sequence[LogitsProcessor] = (),
) -> Iterator[Token]:
    """Sample tokens one after another; the next one is being computed while the reader has this one.

    Args:
        logits: float[1, vocab_size], of the prompt's last token.
        cache: holds the prompt. When a token is yielded it holds, or is about to hold, that token too.
        prompt: int[L], for the logits processors.
        max_tokens: tokens to yield at most.
    """

    def choose(logits: mx.array) -> tuple[mx.array, mx.array]:
        for processor in logits_processors:
            logits = processor(tokens, logits)
        logprobs = log_softmax(logits)
        token = sampler(logprobs)
        return token, mx.take_along_axis(logprobs, token[:, None], axis=-1)

    tokens, step = prompt, make_step(decoder, cache)
    token, logprob = choose(logits)
    mx.async_eval(token, logprob)
    for count in range(1, max_tokens + 1):
        current, current_logprob = token, logprob
        if count < max_tokens:
            if logits_processors:
                tokens = mx.concatenate([tokens, current.astype(tokens.dtype)])
            token, logprob = choose(step(current))
            mx.async_eval(token, logprob)
        yield Token(cast(int, current.item()), cast(float, current_logprob.item()))
        if count % 256 == 0:
            mx.clear_cache()
