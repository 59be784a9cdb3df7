"""Activations by the names that Hugging Face's configs use."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from .config import Activation

ACTIVATIONS: dict[Activation, Callable[[mx.array], mx.array]] = {
    "gelu": nn.gelu,
    "gelu_pytorch_tanh": nn.gelu_approx,
    "quick_gelu": nn.gelu_fast_approx,
    "relu": nn.relu,
    "silu": nn.silu,
}
