"""Feed-forwards: with two layers, or with a gate."""

import mlx.core as mx
import mlx.nn as nn

from mlx_vlm_mini.config import Activation

from .kernels import activation


class Narrow(nn.Linear):
    """A linear layer of a few outputs by which much is decided, or of a few inputs: conversion does not quantize it."""


class MLP(nn.Module):
    """Two layers with biases: of towers, the Q-Former and OPT."""

    def __init__(self, size: int, inner: int, act: Activation) -> None:
        super().__init__()
        self.act = activation(act)
        self.fc1 = nn.Linear(size, inner)
        self.fc2 = nn.Linear(inner, size)

    def __call__(self, x: mx.array) -> mx.array:
        """float[..., C] -> float[..., C]."""
        return self.fc2(self.act(self.fc1(x)))


class GatedMLP(nn.Module):
    """The gated MLP of "GLU Variants Improve Transformer" (arXiv:2002.05202)."""

    def __init__(self, size: int, inner: int, act: Activation, *, bias: bool = False) -> None:
        super().__init__()
        self.act = activation(act)
        self.gate_proj = nn.Linear(size, inner, bias=bias)
        self.up_proj = nn.Linear(size, inner, bias=bias)
        self.down_proj = nn.Linear(inner, size, bias=bias)

    def __call__(self, x: mx.array) -> mx.array:
        """float[..., C] -> float[..., C]."""
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
