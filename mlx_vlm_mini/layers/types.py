"""Types of attention and of rotary positions, and the table of functions that devices compute in ways of their own."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import mlx.core as mx
import mlx.nn as nn

from mlx_vlm_mini.config import Activation

Mask = mx.array | Literal["causal"] | None
"""bool[L, S] or bool[B, 1, L, S], true where a query may look; "causal" when the queries are the last L of the S
positions; None when every query sees every key."""

Rope = Callable[[mx.array], mx.array]
"""Rotates queries or keys, float[B, H, L, D], by the positions of their tokens."""


class Recorder(Protocol):
    """Takes attention weights, layer after layer: a list, or what keeps less of them."""

    def append(self, weights: mx.array, /) -> None:
        """float[B, H, L, S]; where these are more than `attention.BLOCK`, float[B, H, rows, S'] again and again until
        all L queries had their turn. S' below S leaves out keys that none of the rows sees."""


@dataclass(frozen=True)
class Kernels:
    """Functions of which a device has its own; what they compute is the same.

    Attributes:
        attend: (queries, keys, values, scale, mask) -> float[B, H, L, D]: attention that gives no weights and has no
            softcap.
        activations: by Hugging Face's names.
        rope: (periods float32[dims / 2], scale, first, length, dims, neighbours) -> a `Rope` of `length` tokens, the
            first of which stands at `first`, a number or int[B]; see `rotary.Rotary`.
        log_softmax: float[..., n] -> float32[..., n].
        convolve: (float[B, height, width, C], float[out, 3, 3, C]) -> float[B, height, width, out], zeros being around.
        delta: the gated delta rule, as `delta.gated_delta`.
        unpack: makes a part's quantized layers ones of floats, in place, where products with these are faster: (part,
            type).
        prepare: makes a loaded model's layers fast, in place: (model, decoder, type to compute in, whether the
            embeddings are the head).
    """

    attend: Callable[[mx.array, mx.array, mx.array, float, Mask], mx.array]
    activations: Mapping[Activation, Callable[[mx.array], mx.array]]
    rope: Callable[[mx.array, float, Any, int, int, bool], Rope]
    log_softmax: Callable[[mx.array], mx.array]
    convolve: Callable[[mx.array, mx.array], mx.array]
    delta: Callable[[mx.array, mx.array, mx.array, mx.array, mx.array, mx.array], tuple[mx.array, mx.array]]
    unpack: Callable[[nn.Module, mx.Dtype], None]
    prepare: Callable[[nn.Module, nn.Module, mx.Dtype, bool], None]
