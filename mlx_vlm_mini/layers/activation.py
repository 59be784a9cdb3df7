"""Activations by the names that Hugging Face's configs use.

MLX's own are compiled: on a GPU into one kernel; on a CPU by the system's C++ compiler, half a second the first time,
and no faster for it. Where MLX computes e^x slowly (see exponential.py) they are written with what is fast there: 2.5
times as fast for a prompt, the same to 1e-6.
"""

import math
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from mlx_vlm_mini.config import Activation

from .cpu import exponential


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
    return _times_sigmoid(x) if exponential.is_slow() else nn.silu(x)


def quick_gelu(x: mx.array) -> mx.array:
    return _times_sigmoid(x, 1.702) if exponential.is_slow() else nn.gelu_fast_approx(x)


def gelu_tanh(x: mx.array) -> mx.array:
    """As tanh(t) is 2 / (1 + e^-2t) - 1, this is x / (1 + e^-2t)."""
    if not exponential.is_slow():
        return nn.gelu_approx(x)
    return _times_sigmoid(x, math.sqrt(8 / math.pi), lambda x: x + 0.044715 * x * x * x)


def gelu(x: mx.array) -> mx.array:
    return x * (1 + mx.erf(x / math.sqrt(2))) / 2 if exponential.is_slow() else nn.gelu(x)


ACTIVATIONS: dict[Activation, Callable[[mx.array], mx.array]] = {
    "gelu": gelu,
    "gelu_pytorch_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "relu": nn.relu,
    "silu": silu,
}
