"""Feed-forwards."""

from typing import Protocol

import mlx.core as mx
import mlx.nn as nn

from mlx_vlm_mini.config import Activation, VisionConfig

from .activation import ACTIVATIONS


class MLPConfig(Protocol):
    """What configs of parts with such an MLP have."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def hidden_act(self) -> Activation: ...


class MLP(nn.Module):
    """Without a gate, its layers with biases: of towers, Q-Former and OPT."""

    def __init__(self, config: MLPConfig) -> None:
        super().__init__()
        self.act = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(self.act(self.fc1(x)))


class GatedMLP(nn.Module):
    """The same with a gate (arXiv:2002.05202), modules named as decoders name them."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.act = ACTIVATIONS[config.hidden_act]
        width, inner, bias = config.hidden_size, config.intermediate_size, config.blocks.mlp_bias
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
