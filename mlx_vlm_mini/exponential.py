"""Exponential, softmax and sigmoid for CPUs on which MLX computes them one number at a time.

There e^x takes 12 ns a number, a sum 0.2 ns, so that softmax and not the matrix products decides how long attention
takes. Here e^x is 2^n 2^f: n goes into the exponent's bits, 2^f is a polynomial, and all of it are products and sums,
which MLX does many at a time. Measured by benchmarks/exponential.py.
"""

import math
import sys
from typing import cast

import mlx.core as mx

# 2^f on [-1/2, 1/2]: least squares of the relative error, at most 2e-7.
_POLYNOMIAL = (0.0013218675, 0.0096717026, 0.05550893, 0.2402223793, 0.6931468559, 1.0)
_ROUND = 1.5 * 2.0**23  # adding it to a float32 leaves the nearest whole number in the last bits
FEW = 1 << 14  # numbers of which MLX's own way costs less than the dozen operations here
CHUNK = 1 << 18  # numbers at a time that fit a core's cache, with what stands between


def is_slow() -> bool:
    """Whether MLX computes e^x one number at a time here: on a CPU that is not Apple's."""
    return sys.platform != "darwin" and mx.default_device().type == mx.DeviceType.cpu


def exp(x: mx.array) -> mx.array:
    """e^x of float32 numbers up to 88, relative error 4e-6 at most (4e-7 near 0); below -87 it is as good as 0."""
    t = mx.maximum(x * math.log2(math.e), -126.0)
    rounded = t + _ROUND
    f = t - (rounded - _ROUND)
    power = mx.array(_POLYNOMIAL[0])
    for coefficient in _POLYNOMIAL[1:]:
        power = power * f + coefficient
    shifted = mx.left_shift(mx.view(rounded, mx.int32), 23)
    return mx.view(mx.view(power, mx.int32) + shifted, mx.float32)


def softmax(x: mx.array) -> mx.array:
    """Softmax of float32 numbers along the last axis: `mx.softmax` for few numbers at a time (see `CHUNK`)."""
    return cast(mx.array, _softmax(x))


@mx.custom_function
def _softmax(x: mx.array) -> mx.array:
    power = exp(x - x.max(axis=-1, keepdims=True))
    return power * (1.0 / power.sum(axis=-1, keepdims=True))


@_softmax.vjp
def _softmax_vjp(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    product = cotangent * output
    return product - output * product.sum(axis=-1, keepdims=True)


@mx.custom_function
def _sigmoid(x: mx.array) -> mx.array:
    return 1.0 / (1.0 + exp(mx.minimum(-x, 88.0)))


@_sigmoid.vjp
def _sigmoid_vjp(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    return cotangent * output * (1 - output)


def sigmoid(x: mx.array) -> mx.array:
    """1 / (1 + e^-x) of float32 numbers, relative error 4e-6 at most."""
    return cast(mx.array, _sigmoid(x))
