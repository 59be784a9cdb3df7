"""Exponential, sigmoid and log-softmax for CPUs on which MLX computes them one number at a time.

There e^x takes 12 ns a number, a sum 0.2 ns, so that softmax and not the matrix products decides how long attention
takes. Here 2^t is 2^n 2^f: n goes into the exponent's bits, 2^f is a polynomial, and all of it are products and sums,
which MLX does many at a time. Measured by benchmarks/exponential.py.
"""

import math
import sys
from typing import cast

import mlx.core as mx

LOG2E = math.log2(math.e)
# 2^(f/2) on [-1/2, 1/2], least relative error (8e-8), times the constant that makes its first coefficient 1 and so
# spares a product. That constant's square is 2^21 ONE.
_POLYNOMIAL = (11.57766075, 100.03134442, 577.25439307, 1665.60796661)
ONE = 2774249.96335814 / 2**21
_ROUND = 1.5 * 2.0**23 - 21  # adding it to a float32 leaves the nearest whole number, less 21, in the last bits
FEW = 1 << 14  # numbers of which MLX's own way costs less than the dozen operations here
_SUMMED = 512  # numbers that are added one after the other, at most
CHUNK = 1 << 19  # numbers at a time that fit a core's cache, with what stands between


def is_slow() -> bool:
    """Whether MLX computes e^x one number at a time here: on a CPU that is not Apple's."""
    return sys.platform != "darwin" and mx.default_device().type == mx.DeviceType.cpu


def power(t: mx.array) -> mx.array:
    """`ONE` times 2^t of float32 numbers up to 126, relative error 5e-7 at most; below -126 it is as good as 0."""
    return cast(mx.array, _power(t))


@mx.custom_function
def _power(t: mx.array) -> mx.array:
    t = mx.maximum(t, -126.0)
    rounded = t + _ROUND
    f = t - (rounded - _ROUND)
    root = f + _POLYNOMIAL[0]
    for coefficient in _POLYNOMIAL[1:]:
        root = root * f + coefficient
    shifted = mx.left_shift(mx.view(rounded, mx.int32), 23)
    return mx.view(mx.view(root * root, mx.int32) + shifted, mx.float32)


@_power.vjp
def _power_vjp(t: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    return cotangent * output * math.log(2)


def sigmoid(x: mx.array, scale: float = 1.0) -> mx.array:
    """1 / (1 + e^(-scale x)) of float32 numbers, absolute error 1e-6 at most."""
    return cast(mx.array, _sigmoid(x * (-scale * LOG2E)))


@mx.custom_function
def _sigmoid(t: mx.array) -> mx.array:
    return ONE / (ONE + power(mx.minimum(t, 126.0)))


@_sigmoid.vjp
def _sigmoid_vjp(t: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    return cotangent * output * (output - 1) * math.log(2)


def log_softmax(logits: mx.array) -> mx.array:
    """float[..., n] -> float32[..., n], log-probabilities as exact as float32 holds them. Lazy.

    On a CPU `mx.logsumexp` adds all n numbers one after the other, and is off by 1e-4 where they are 150,000.
    """
    logits = logits.astype(mx.float32)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    fast = is_slow() and logits.size > FEW
    powers = power(shifted * LOG2E) if fast else mx.exp(shifted)
    powers = mx.pad(powers, [(0, 0)] * (powers.ndim - 1) + [(0, -powers.shape[-1] % _SUMMED)])
    total = powers.reshape(*powers.shape[:-1], -1, _SUMMED).sum(axis=-1).sum(axis=-1, keepdims=True)
    return shifted - mx.log(total / ONE if fast else total)
