"""A token through the decoder, as a graph that is traced once and not built by Python for each token.

For that nothing may change its shape from token to token. So the layers read the whole of what mlx-lm's caches hold in
store (they grow by 256 tokens at a time), under a mask that hides what is not filled yet, and the position is an array.
Layers with a window read their window alone. Python builds a token's graph in half the time then
(benchmarks/README.md); on a GPU that is what limits small models.

The first token of a trace is computed both ways. Where the two differ, or tracing fails, the model's tokens are built
from then on, and `bench` says why.
"""

import os
from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx

from mlx_vlm_mini.borrow import borrow
from mlx_vlm_mini.config import SLIDING
from mlx_vlm_mini.decoder.decoder import Decoder
from mlx_vlm_mini.decoder.masks import Causal, Rows
from mlx_vlm_mini.decoder.reading import Pass
from mlx_vlm_mini.decoder.sharpness import sharpness
from mlx_vlm_mini.decoder.state import NoCache, State

COMPILE = "MLX_VLM_MINI_COMPILE"
BUILT_FIRST = 32  # tokens of a model's first answer: a trace costs what it spares for so many
_TEXT = {"full_attention", *SLIDING, "shared_full_attention"}
_AGREE = {mx.float32: 1e-4, mx.float16: 1e-2, mx.bfloat16: 5e-2}  # of the largest logit

Step = Callable[[mx.array], mx.array]
"""int[1], a token -> float[1, vocab_size], logits of the next one; the state then holds it, too."""


class _Slot:
    """A layer's keys and values at a size that stays, in place of mlx-lm's cache, while a step is traced."""

    def __init__(self, keys: mx.array, values: mx.array, place: mx.array, part: tuple[mx.array, int] | None) -> None:
        """
        Args:
            keys, values: float[1, H, S, D].
            place: int[1], where the token's own are written.
            part: what the layer reads: from where, int[1], and how many tokens; None: all.
        """
        self.keys, self.values, self.place, self.part = keys, values, place, part

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.keys = mx.slice_update(self.keys, keys, self.place, axes=(2,))
        self.values = mx.slice_update(self.values, values, self.place, axes=(2,))
        if self.part is None:
            return self.keys, self.values
        start, length = self.part
        size = (*self.keys.shape[:2], length, self.keys.shape[3])
        return mx.slice(self.keys, start, (2,), size), mx.slice(self.values, start, (2,), size)


def compiles() -> bool:
    """Whether steps are traced here: on a GPU, or where the environment variable MLX_VLM_MINI_COMPILE is 1; not where
    it is 0. On a CPU MLX calls the C++ compiler for a trace's parts, which takes seconds the first time."""
    chosen = os.environ.get(COMPILE)
    return chosen == "1" if chosen in ("0", "1") else mx.default_device().type == mx.DeviceType.gpu


def make_step(decoder: Decoder, state: State) -> Step:
    """The step of an answer; `state` holds its prompt."""

    def built(token: mx.array) -> mx.array:
        return decoder.logits(decoder(decoder.read(token[:, None]), state))[:, 0]

    if not compiles() or not _is_plain(decoder, state) or trace_fault(decoder) is not None:
        return built
    cache = [entry for entry in state.layers if type(entry) is not NoCache]
    shift = cast(int, state.positions.shift)
    left = 0 if hasattr(decoder, "traced_step") else BUILT_FIRST

    def traced(token: mx.array) -> mx.array:
        nonlocal left
        place, left = state.start, left - 1
        if left >= 0 or cache[0].keys is None or place >= cache[0].keys.shape[2] or trace_fault(decoder) is not None:
            return built(token)  # which lets the caches grow
        held = [(entry.keys, entry.values) for entry in cache]
        position = mx.array([place + shift])
        if not hasattr(decoder, "traced_step"):
            return _first(decoder, token, mx.array([place]), position, held, built)
        logits, held = decoder.traced_step(token, mx.array([place]), position, held)
        for entry, (keys, values) in zip(cache, held, strict=True):
            entry.keys, entry.values, entry.offset = keys, values, place + 1
        state.start = place + 1
        return logits

    return traced


def _first(decoder: Decoder, token: mx.array, place: mx.array, position: mx.array, held: Any, built: Step) -> mx.array:
    """The first token of a trace, which is made here: built; where the trace gives other logits, that is noted."""
    try:
        step = _trace(decoder)
        found = step(token, place, position, held)[0].astype(mx.float32)
        mx.eval(found)
    except Exception as error:  # whatever a device's compiler raises: the answer goes on without it
        decoder.trace_fault = f"tracing failed: {str(error).strip().partition(chr(10))[0][:200]}"
        return built(token)
    logits = built(token)
    expected = logits.astype(mx.float32)
    apart, largest = float(mx.abs(found - expected).max()), float(mx.abs(expected).max())
    if apart <= _AGREE[logits.dtype] * largest:
        decoder.traced_step = step
    else:
        decoder.trace_fault = f"the first traced token's logits differ by {apart:.2g}, of {largest:.2g} at most"
    return logits


def trace_fault(decoder: Decoder) -> str | None:
    """Why this model's steps are built although they could be traced; None where nothing is wrong."""
    found: str | None = getattr(decoder, "trace_fault", None)
    return found


def _is_plain(decoder: Decoder, state: State) -> bool:
    """Whether a token depends on what came before it by keys, values and its own position alone."""
    plain = borrow("models.cache").KVCache
    return (
        decoder.config.embeddings.learned_positions is None
        and {*decoder.config.layer_types} <= _TEXT
        and all(rope.depends_on == "nothing" for rope in decoder.ropes.values())
        and all(type(entry) in (plain, NoCache) for entry in state.layers)
    )


def _trace(decoder: Decoder) -> Callable[..., Any]:
    config = decoder.config
    windows = {kind: config.window_of(kind) for kind in dict.fromkeys(config.layer_types)}
    keeps = [config.shape(kind).shared_with is None for kind in config.layer_types]
    kinds = [kind for kind, own in zip(config.layer_types, keeps, strict=True) if own]

    def step(token: mx.array, place: mx.array, position: mx.array, held: Any) -> Any:
        stored = held[0][0].shape[2]
        run = Pass(decoder.read(token[:, None]), Rows(0, 1), position, Causal())
        run.beside = decoder.beside(run.reading)
        run.masks, parts = {}, {}
        for kind, window in windows.items():
            if window is None:
                run.masks[kind] = mx.arange(stored)[None] <= place
                continue
            start, length = mx.clip(place - window + 1, 0, max(stored - window, 0)), min(window, stored)
            places = start + mx.arange(length)
            run.masks[kind] = ((places <= place) & (places > place - window))[None]
            if length < stored:
                parts[kind] = start, length
        slots = [_Slot(keys, values, place, parts.get(kind)) for (keys, values), kind in zip(held, kinds, strict=True)]
        run.ropes = {kind: rope.at(position, 1) for kind, rope in decoder.ropes.items()}
        run.sharpness = sharpness(decoder.config.scales.query_scale, place, 1)
        waiting = iter(slots)
        hidden = decoder.run(run, [next(waiting) if own else None for own in keeps])
        return decoder.logits(hidden)[:, 0], [(slot.keys, slot.values) for slot in slots]

    traced: Callable[..., Any] = mx.compile(step, inputs=[decoder])  # weights that training changes are seen
    return traced
