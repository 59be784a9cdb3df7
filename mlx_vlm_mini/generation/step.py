"""A token through the decoder, as a graph that is traced once and not built by Python for each token.

For that nothing may change its shape from token to token. So the layers read the whole of what mlx-lm's caches hold in
store (they grow by 256 tokens at a time), under a mask that hides what is not filled yet, and the position is an array.
Python builds a token's graph in half the time then (benchmarks/README.md); on a GPU that is what limits small models.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from mlx_vlm_mini.borrow import borrow
from mlx_vlm_mini.config import LayerType
from mlx_vlm_mini.decoder.decoder import Decoder
from mlx_vlm_mini.decoder.opt import OPTDecoder
from mlx_vlm_mini.decoder.rope import rope_type
from mlx_vlm_mini.decoder.sections import shift_behind
from mlx_vlm_mini.layers.rotary import turn_once

COMPILE = "MLX_VLM_MINI_COMPILE"
BUILT_FIRST = 32  # tokens of a model's first answer: a trace costs what it spares for so many
_TEXT = {"full_attention", "sliding_attention"}
_BY_LENGTH = {"dynamic", "longrope", "prompt_ntk"}  # scalings whose angles depend on the sequence's length

Step = Callable[[mx.array], mx.array]
"""int[1], a token behind what the cache holds -> float[1, vocab_size], logits of the next one; the cache then holds it,
too."""


class _Slot:
    """A layer's keys and values at a size that stays, in place of mlx-lm's cache, while a step is traced."""

    def __init__(self, keys: mx.array, values: mx.array, place: mx.array, position: mx.array) -> None:
        """
        Args:
            keys, values: float[1, H, S, D].
            place: int[1], where the token's own are written.
            position: int[1], by which they are turned.
        """
        self.keys, self.values, self.place, self.offset = keys, values, place, position

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.keys = mx.slice_update(self.keys, keys, self.place, axes=(2,))
        self.values = mx.slice_update(self.values, values, self.place, axes=(2,))
        return self.keys, self.values


def compiles() -> bool:
    """Whether steps are traced here: on a GPU, or where the environment variable MLX_VLM_MINI_COMPILE is 1; not where
    it is 0. On a CPU MLX calls the C++ compiler for a trace's parts, which takes seconds the first time."""
    chosen = os.environ.get(COMPILE)
    return chosen == "1" if chosen in ("0", "1") else mx.default_device().type == mx.DeviceType.gpu


def make_step(decoder: Decoder, cache: Sequence[Any]) -> Step:
    """The step of an answer; `cache` holds its prompt."""

    def built(token: mx.array) -> mx.array:
        return decoder.logits(decoder(decoder.embed(token[:, None]), cache))[:, 0]

    if not compiles() or not _is_plain(decoder, cache):
        return built
    shift = shift_behind(getattr(cache[0], "placed", ()))
    left = 0 if hasattr(decoder, "traced_step") else BUILT_FIRST

    def traced(token: mx.array) -> mx.array:
        nonlocal left
        place, left = cache[0].offset, left - 1
        if left >= 0 or cache[0].keys is None or place >= cache[0].keys.shape[2]:
            return built(token)  # which lets the caches grow
        if not hasattr(decoder, "traced_step"):
            decoder.traced_step = _trace(decoder)
        held = [(entry.keys, entry.values) for entry in cache]
        logits, held = decoder.traced_step(token, mx.array([place]), mx.array([place + shift]), held)
        for entry, (keys, values) in zip(cache, held, strict=True):
            entry.keys, entry.values, entry.offset = keys, values, place + 1
        return logits

    return traced


def _is_plain(decoder: Decoder, cache: Sequence[Any]) -> bool:
    """Whether a token depends on what came before it by keys, values and its own position alone."""
    config, plain = decoder.config, borrow("models.cache").KVCache
    return (
        not isinstance(decoder, OPTDecoder)
        and {*config.layer_types} <= _TEXT
        and rope_type(config.rope_scaling) not in _BY_LENGTH
        and config.scales.logn_length is None
        and all(type(entry) is plain for entry in cache)
    )


def _trace(decoder: Decoder) -> Callable[..., Any]:
    window = decoder.config.sliding_window

    def step(token: mx.array, place: mx.array, position: mx.array, held: Any) -> Any:
        slots = [_Slot(keys, values, place, position) for keys, values in held]
        stored = mx.arange(slots[0].keys.shape[2])[None]
        seen = stored <= place
        masks: dict[LayerType, mx.array] = {"full_attention": seen, "sliding_attention": seen}
        if window is not None:
            masks["sliding_attention"] = seen & (stored > place - window)
        usual = turn_once(decoder.rope, position, 1)
        sliding = turn_once(decoder.sliding_rope, position, 1) if "sliding_rope" in decoder else usual
        x = decoder.embed(token[:, None])
        for layer, kind, slot in zip(decoder.layers, decoder.config.layer_types, slots, strict=True):
            rope = sliding if kind == "sliding_attention" else usual
            x = layer(x, mask=masks[kind], rope=rope, cache=slot, attentions=None)
        return decoder.logits(decoder.norm(x))[:, 0], [(slot.keys, slot.values) for slot in slots]

    traced: Callable[..., Any] = mx.compile(step, inputs=[decoder])  # weights that training changes are seen
    return traced
