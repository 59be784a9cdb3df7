"""Pictures from words: image tokens drawn one by one under guidance, then their pixels.

Sources: arXiv:2501.17811 (Janus-Pro), arXiv:2207.12598 (guidance); models/janus of huggingface/transformers.
"""

import math
import secrets
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import mlx.core as mx
import numpy as np

from mlx_vlm_mini.config import VLMConfig
from mlx_vlm_mini.decoder.reading import Reading
from mlx_vlm_mini.errors import CheckpointError, PromptError
from mlx_vlm_mini.generation.decode import PREFILL_STEP, checked, take_turns, wired_memory
from mlx_vlm_mini.layers.kernels import kernels
from mlx_vlm_mini.model import VLM
from mlx_vlm_mini.preprocessing.pixels import to_image
from mlx_vlm_mini.processor import DrawingTokens, Processor

from .drawn import Drawn, DrawStats

GUIDANCE = 5.0
TOGETHER = 4  # pictures that are drawn at once: with guidance each takes two rows of keys and values
MOST_PICTURES = 1000  # of one call


@dataclass(frozen=True, kw_only=True)
class DrawOptions:
    """How to draw.

    Attributes:
        count: pictures.
        guidance: g in u + g (c - u), c being the scores with the prompt and u those without its words: 1 draws by the
            prompt alone, 0 without it.
        temperature: 0 always takes the likeliest image token.
        seed: the n-th picture depends on seed + n and nothing else that is drawn.
        progress: called with steps done and steps in all; a step is one image token of the pictures drawn together.
    """

    count: int = 1
    guidance: float = GUIDANCE
    temperature: float = 1.0
    seed: int | None = None
    progress: Callable[[int, int], None] | None = None

    def __post_init__(self) -> None:
        """Raises PromptError where an option has another type or is out of range."""
        for name in ("guidance", "temperature"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value < 0:
                raise PromptError(f"{name} must be a number from 0, not {value!r}")
        if 0 < self.temperature < 1e-4 or self.temperature > 1e4:
            raise PromptError(f"temperature must be 0 or from 0.0001 to 10000, not {self.temperature}")
        for name, least, most in (("count", 1, MOST_PICTURES), ("seed", 0, 2**64 - 1)):
            value = getattr(self, name)
            if value is None and name == "seed":
                continue
            if type(value) is not int or not least <= value <= most:
                raise PromptError(f"{name} must be a whole number from {least} to {most}, not {value!r}")


def refuse_config(config: VLMConfig, name: str = "") -> None:
    """Refuse a model whose config says that it cannot draw.

    Args:
        name: the model's, for the error.

    Raises:
        CheckpointError: it cannot.
    """
    named = name or "this model"
    if config.family != "janus":
        raise CheckpointError(
            f"{named} cannot draw: family '{config.family}' answers in words alone; take a model of the family "
            "'janus', such as deepseek-community/Janus-Pro-1B"
        )
    if config.drawing is None:
        raise CheckpointError(f"{named} answers and cannot draw: its files lack the VQ decoder")


def check_drawing(model: VLM, processor: Processor, name: str = "") -> None:
    """Refuse a model that cannot draw; see `refuse_config`."""
    refuse_config(model.config, name)
    if processor.drawing_tokens is None:
        raise CheckpointError(
            f"{name or 'this model'} answers and cannot draw: its tokenizer lacks <begin_of_image> or a pad token"
        )


def imagine(
    model: VLM,
    processor: Processor,
    prompt: str,
    *,
    count: int = 1,
    guidance: float = GUIDANCE,
    temperature: float = 1.0,
    seed: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Drawn]:
    """Draw pictures.

    Args:
        prompt: what they should show.
        count, guidance, temperature, seed, progress: see `DrawOptions`. Without a seed one is chosen; a picture's own
            is in its `seed`, which alone draws it again.

    Returns:
        The pictures in the order of their seeds.

    Raises:
        PromptError: the prompt or an option is at fault.
        CheckpointError: the model cannot draw, or computes numbers that are not finite.
    """
    options = DrawOptions(count=count, guidance=guidance, temperature=temperature, seed=seed, progress=progress)
    check_drawing(model, processor)
    if not isinstance(prompt, str):
        raise PromptError("a picture is drawn after a text alone: give the prompt as one text, without pictures")
    found: list[Drawn] = []
    for done, total in take_turns(_draw(model, processor, prompt, options, found)):
        if progress is not None:
            progress(done, total)
    return found


def _draw(
    model: VLM, processor: Processor, prompt: str, options: DrawOptions, found: list[Drawn]
) -> Generator[tuple[int, int], None, None]:
    """The steps of `imagine`, which put pictures into `found`: steps done and steps in all."""
    ids, _ = processor.drawing_prompt(prompt)
    first = secrets.randbits(32) if options.seed is None else options.seed
    seeds = [(first + number) % 2**64 for number in range(options.count)]
    groups = [seeds[start : start + TOGETHER] for start in range(0, len(seeds), TOGETHER)]
    assert model.config.drawing is not None and processor.drawing_tokens is not None
    steps, settings = model.config.drawing.tokens, processor.image_settings
    if settings is None:
        raise CheckpointError(
            "the checkpoint has neither preprocessor_config.json nor an image_processor in processor_config.json, so "
            "how numbers become pixels is unknown: copy the file from the original repository"
        )
    with wired_memory():
        for number, group in enumerate(groups):
            stats = DrawStats(prompt_tokens=len(ids), generated_tokens=steps, together=len(group))
            tokens: list[mx.array] = []
            for _ in _draw_tokens(model, ids, processor.drawing_tokens, group, options, stats, tokens):
                yield number * steps + len(tokens), len(groups) * steps
            chosen = np.array(mx.stack(tokens, axis=-1))  # int[n, N]
            mx.clear_cache()
            for row, own in zip(chosen.tolist(), group, strict=True):
                start = time.perf_counter()
                values = np.array(model.drawing.pixels(row))
                image = to_image(values, settings)
                seconds, peak = time.perf_counter() - start, mx.get_peak_memory()
                cost = replace(stats, pixels_s=seconds, peak_memory_bytes=peak)
                found.append(
                    Drawn(
                        image=image, token_ids=tuple(row), prompt=prompt, guidance=options.guidance,
                        temperature=options.temperature, seed=own, stats=cost,
                    )
                )  # fmt: skip


def _draw_tokens(
    model: VLM,
    ids: Sequence[int],
    marks: DrawingTokens,
    seeds: Sequence[int],
    options: DrawOptions,
    stats: DrawStats,
    tokens: list[mx.array],
) -> Generator[None, None, None]:
    """Choose the image tokens of some pictures, int[n] a step, into `tokens`; yields after each step."""
    drawer, decoder, guidance = model.drawing, model.decoder, options.guidance
    begin = time.perf_counter()
    without = [token if token in (marks.begin, marks.image) else marks.pad for token in ids]
    rows = [*([ids] if guidance != 0 else []), *([without] if guidance != 1 else [])]
    guided = len(rows) == 2
    x, state = decoder.embed(mx.array([row for row in rows for _ in seeds])), model.make_state()
    for start in range(0, len(ids), PREFILL_STEP):
        hidden = decoder(Reading(x[:, start : start + PREFILL_STEP]), state)[:, -1]
        state.evaluate()
    mx.eval(hidden)
    stats.prefill_s = time.perf_counter() - begin
    steps = stats.generated_tokens
    keys = [mx.random.split(mx.random.key(seed), steps) for seed in seeds]

    def choose(hidden: mx.array, number: int) -> tuple[mx.array, mx.array]:
        """float[rows, C] -> int[n] and float[n]."""
        scores = drawer.logits(hidden).astype(mx.float32)
        if guided:
            conditional, unconditional = mx.split(scores, 2)
            scores = unconditional + guidance * (conditional - unconditional)
        if options.temperature == 0:
            token = mx.argmax(scores, axis=-1)
        else:
            hot = scores / options.temperature
            drawn = [mx.random.categorical(hot[place], key=own[number]) for place, own in enumerate(keys)]
            token = mx.stack(drawn)
        logprobs = kernels().log_softmax(scores)
        return token, mx.take_along_axis(logprobs, token[:, None], axis=-1)[:, 0]

    begin = time.perf_counter()
    token, logprob = choose(hidden, 0)
    mx.async_eval(token, logprob)
    for number in range(1, steps + 1):
        current, current_logprob = token, logprob
        if number < steps:
            read = mx.concatenate([current, current]) if guided else current
            hidden = decoder(Reading(drawer.embed(read[:, None])), state)[:, -1]
            token, logprob = choose(hidden, number)
            mx.async_eval(token, logprob)
        for each, score in zip(
            cast(list[int], current.tolist()), cast(list[float], current_logprob.tolist()), strict=True
        ):
            checked(each, score, decoder)
        tokens.append(current)
        stats.decode_s = time.perf_counter() - begin
        yield
        if number % 256 == 0:
            mx.clear_cache()


def drawing_reading(model: VLM, ids: Sequence[int], tokens: Sequence[int]) -> Any:
    """What the decoder reads of a prompt and the image tokens drawn after it, all at once: a `Reading`."""
    words, drawn = model.decoder.embed(mx.array([[*ids]])), model.drawing.embed(mx.array([[*tokens]], dtype=mx.int32))
    return Reading(mx.concatenate([words, drawn.astype(words.dtype)], axis=1))
