"""Answers as they come: prompt -> text, with stop strings, finish reasons and statistics."""

import time
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import mlx.core as mx

from mlx_vlm_mini.decoder.state import State
from mlx_vlm_mini.images.source import ImageSource
from mlx_vlm_mini.inputs import Inputs
from mlx_vlm_mini.model import VLM
from mlx_vlm_mini.processor import Processor
from mlx_vlm_mini.text.messages import Prompt

from .answering import Answering, Chunk
from .decode import KEPT_IMAGES, decode, prefill, take_turns, wired_memory
from .features import Features
from .options import Options


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
    answer = Answering(model, processor, inputs, options, begin=begin, features=kept, cached=cached, context=context)
    with wired_memory():
        reading = model.read(inputs, cached, answer.find)
        mx.eval(reading.embeddings, reading.beside)
        answer.read_images()
        keep, step = inputs.image_ends[-KEPT_IMAGES:], options.prefill_step
        logits = prefill(model.decoder, reading, state, step=step, keep=keep, progress=options.progress)
        answer.read_prompt(logits, state)
        for token in decode(model.decoder, logits, state, max_tokens=options.max_tokens, choose=answer.choose):
            chunk = answer.chunk(token)
            yield chunk
            if chunk.finish_reason is not None:
                return


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
        options: see `Options`: max_tokens, temperature, top_p, seed, stop, think, ...

    Yields:
        A `Chunk` a token; the last one has a `finish_reason`.

    Raises:
        PromptError, ImageError: the prompt or an image is at fault.
    """
    started = time.perf_counter()
    chosen = Options(**options)
    inputs = processor(prompt, images, think=chosen.think, image_tokens=chosen.image_tokens)
    yield from stream_inputs(model, processor, inputs, model.make_state(), options=chosen, started=started)


def generate(
    model: VLM,
    processor: Processor,
    prompt: Prompt,
    *,
    images: Sequence[ImageSource] = (),
    **options: Any,
) -> str:
    """Answer a prompt: the text of `stream_generate`, whole, without what the model thought."""
    return "".join(chunk.text for chunk in stream_generate(model, processor, prompt, images=images, **options))
