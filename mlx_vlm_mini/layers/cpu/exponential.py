"""Exponential, sigmoid and log-softmax for CPUs on which MLX computes them one number at a time.

There e^x takes 12 ns a number, a sum 0.2 ns, so that softmax and not the matrix products decides how long attention
takes. Here 2^t is 2^n 2^f: n goes into the exponent's bits, 2^f is a polynomial, and all of it are products and sums,
which MLX does many at a time. Measured by benchmarks/exponential.py.
"""

import math
from typing import cast

import mlx.core as mx

from mlx_vlm_mini.layers import softmax

LOG2E = math.log2(math.e)
# 2^(f/2) on [-1/2, 1/2], least relative error (8e-8), times the constant that makes its first coefficient 1 and so
# spares a product. That constant's square is 2^21 ONE.
_POLYNOMIAL = (11.57766075, 100.03134442, 577.25439307, 1665.60796661)
ONE = 2774249.96335814 / 2**21
_ROUND = 1.5 * 2.0**23 - 21  # adding it to a float32 leaves the nearest whole number, less 21, in the last bits
FEW = 1 << 14  # numbers of which MLX's own way costs less than the dozen operations here
CHUNK = 1 << 19  # numbers at a time that fit a core's cache, with what stands between


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
    """float[..., n] -> float32[..., n], log-probabilities as exact as float32 holds them; lazy."""
    if logits.size <= FEW:
        return softmax.log_softmax(logits)
    return softmax.log_softmax(logits, lambda shifted: power(shifted * LOG2E), ONE)
