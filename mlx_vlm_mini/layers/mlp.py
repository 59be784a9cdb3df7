"""Feed-forwards: with two layers, or with a gate; and linear layers and embeddings of a special kind."""

import math

import mlx.core as mx
import mlx.nn as nn

from mlx_vlm_mini.config import Activation

from .kernels import activation


class Narrow(nn.Linear):
    """A linear layer of a few outputs by which much is decided, or of a few inputs: conversion does not quantize it."""


class PerLayerEmbedding(nn.Embedding):
    """A table of embeddings for all layers, which few bits harm: conversion gives it 8 or more."""


class Clippable(nn.Module):
    """A linear layer, of which inputs and outputs are kept within bounds where it `clips` (Gemma 4 E2B's tower)."""

    def __init__(self, linear: nn.Module, *, clips: bool) -> None:
        super().__init__()
        self.linear = linear
        if clips:
            self.input_min, self.output_min = mx.array(-math.inf), mx.array(-math.inf)
            self.input_max, self.output_max = mx.array(math.inf), mx.array(math.inf)

    def __call__(self, x: mx.array) -> mx.array:
        """As the linear layer."""
        if "input_min" not in self:
            return self.linear(x)
        x = mx.clip(x, self.input_min.astype(x.dtype), self.input_max.astype(x.dtype))
        x = self.linear(x)
        return mx.clip(x, self.output_min.astype(x.dtype), self.output_max.astype(x.dtype))


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
