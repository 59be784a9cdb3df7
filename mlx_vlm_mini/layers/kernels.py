"""The one door to code that only some devices need: a table of kernels, chosen once per device.

A Mac computes in plain MLX. On CPUs that are not Apple's, where MLX computes e^x one number at a time and the wheel's
matrix products are slow, layers/cpu takes its place. The environment variable MLX_VLM_MINI_KERNELS=mlx leaves it out
there, too: the answers are the same, and what a Mac computes can be tested without one.
"""

import os
import sys
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from mlx_vlm_mini.borrow import borrow
from mlx_vlm_mini.config import Activation
from mlx_vlm_mini.errors import VLMError

from .blocks import plain_attention
from .cpu.table import CPU
from .delta import gated_delta
from .softmax import log_softmax
from .types import Kernels, Rope

CHOICE = "MLX_VLM_MINI_KERNELS"


def _rope(periods: mx.array, scale: float, first: int | mx.array, length: int, dims: int, neighbours: bool) -> Rope:
    def rotate(x: mx.array) -> mx.array:
        x = mx.fast.rope(x, dims, traditional=neighbours, base=None, scale=1.0, offset=first, freqs=periods)
        if scale == 1:
            return x
        return x * scale if dims == x.shape[-1] else mx.concatenate([x[..., :dims] * scale, x[..., dims:]], axis=-1)

    return rotate


def _delta(
    queries: mx.array, keys: mx.array, values: mx.array, decays: mx.array, betas: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """On Metal by mlx-lm's kernel, which goes token by token with the state in registers."""
    metal = mx.metal.is_available() and mx.default_device().type == mx.DeviceType.gpu
    if not metal or keys.shape[-1] % 32 or values.shape[-1] % 4:  # what its threads share between them
        return gated_delta(queries, keys, values, decays, betas, state)
    found: tuple[mx.array, mx.array] = borrow("models.gated_delta").gated_delta_kernel(
        queries, keys, values, mx.exp(decays), betas, state
    )
    return found


MLX = Kernels(
    attend=plain_attention,
    activations={
        "gelu": nn.gelu,
        "gelu_pytorch_tanh": nn.gelu_approx,
        "quick_gelu": nn.gelu_fast_approx,
        "relu": nn.relu,
        "silu": nn.silu,
    },
    rope=_rope,
    log_softmax=log_softmax,
    convolve=lambda x, weight: mx.conv2d(x, weight, padding=1),
    delta=_delta,
    unpack=lambda part, dtype: None,
    prepare=lambda model, decoder, dtype, tied: None,
)

_process: int | None = None


def is_forked() -> bool:
    """Whether this process was forked from one that had computed."""
    return _process not in (None, os.getpid())


def claim_process() -> None:
    """Note that this process computes.

    Raises:
        VLMError: it was forked from one that had computed, whose threads it does not have: it would wait for ever.
    """
    global _process
    if is_forked():
        raise VLMError(
            "this process was forked after its parent had computed with MLX, which does not go on in a fork: start "
            "processes by 'spawn', or fork before the first model is loaded"
        )
    _process = os.getpid()


_chosen: dict[mx.DeviceType, Kernels] = {}


def kernels() -> Kernels:
    """Those of MLX's default device."""
    device = mx.default_device().type
    found = _chosen.get(device)
    if found is None:
        plain = device == mx.DeviceType.gpu or sys.platform == "darwin" or os.environ.get(CHOICE) == "mlx"
        found = _chosen[device] = MLX if plain else CPU
    return found


def activation(name: Activation) -> Callable[[mx.array], mx.array]:
    """An activation by Hugging Face's name, as the device computes it that is the default when it is called."""
    return lambda x: kernels().activations[name](x)
