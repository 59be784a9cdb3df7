"""The projector: image features -> decoder embeddings.

Source: LLaVA (arXiv:2304.08485) projects linearly, LLaVA-1.5 (arXiv:2310.03744) with an MLP.
"""

from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn

from .activation import ACTIVATIONS
from .config import ProjectorConfig


class Projector(nn.Module):
    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        self.act = ACTIVATIONS[config.hidden_act]
        sizes = [config.input_size, *[config.hidden_size] * config.num_layers]
        self.layers = [nn.Linear(rows, columns, bias=config.bias) for rows, columns in pairwise(sizes)]

    def __call__(self, features: mx.array) -> mx.array:
        """float[B, P, input_size] -> float[B, P, hidden_size]."""
        x = features
        for number, layer in enumerate(self.layers):
            x = layer(self.act(x) if number else x)
        return x
