"""Activations with an exponential that is fast where MLX's is not: 2.5 times as fast for a prompt, the same to 1e-6."""

import math
from collections.abc import Callable

import mlx.core as mx

from mlx_vlm_mini.config import Activation

from . import exponential


def _times_sigmoid(x: mx.array, scale: float = 1.0, inner: Callable[[mx.array], mx.array] = lambda x: x) -> mx.array:
    """x / (1 + e^(-scale inner(x))); the fast way where there are enough numbers to gain from it, few of them at a
    time, so that what stands between stays in the cache."""
    if x.dtype != mx.float32 or x.size <= exponential.FEW:
        return x * mx.sigmoid(scale * inner(x))
    flat = x.reshape(-1)
    step = exponential.CHUNK // 2
    parts = mx.split(flat, list(range(step, flat.size, step)))
    return mx.concatenate([part * exponential.sigmoid(inner(part), scale) for part in parts]).reshape(x.shape)


def silu(x: mx.array) -> mx.array:
    return _times_sigmoid(x)


def quick_gelu(x: mx.array) -> mx.array:
    return _times_sigmoid(x, 1.702)


def gelu_tanh(x: mx.array) -> mx.array:
    """As tanh(t) is 2 / (1 + e^-2t) - 1, this is x / (1 + e^-2t)."""
    return _times_sigmoid(x, math.sqrt(8 / math.pi), lambda x: x + 0.044715 * x * x * x)


def gelu(x: mx.array) -> mx.array:
    return x * (1 + mx.erf(x / math.sqrt(2))) / 2


def relu(x: mx.array) -> mx.array:
    return mx.maximum(x, 0)


ACTIVATIONS: dict[Activation, Callable[[mx.array], mx.array]] = {
    "gelu": gelu,
    "gelu_pytorch_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "relu": relu,
    "silu": silu,
}
