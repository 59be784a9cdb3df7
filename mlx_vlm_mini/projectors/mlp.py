"""The projector: image features -> decoder embeddings.

Source: LLaVA (arXiv:2304.08485) projects linearly, LLaVA-1.5 (arXiv:2310.03744) with an MLP, InternVL 1.5
(arXiv:2404.16821) joins neighbours and norms them first.
"""

from itertools import pairwise
from math import isqrt

import mlx.core as mx
import mlx.nn as nn

from mlx_vlm_mini.config import ProjectorConfig, ShuffleConfig
from mlx_vlm_mini.layers.kernels import activation
from mlx_vlm_mini.layers.norms import NORMS


def pixel_shuffle(features: mx.array, shuffle: ShuffleConfig) -> mx.array:
    """Join each square of neighbouring features, row by row within it: a grid that many times smaller and wider.

    Args:
        features: float[B, P, C], a square grid row by row whose side is a multiple of the factor.

    Returns:
        float[B, P / factor**2, C * factor**2], row by row, or column by column where `transposed`.
    """
    (B, P, C), n = features.shape, shuffle.factor
    side = isqrt(P) // n
    x = features.reshape(B, side, n, side, n, C)
    x = x.transpose(0, 3, 1, 2, 4, 5) if shuffle.transposed else x.transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(B, side * side, n * n * C)


class Projector(nn.Module):
    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        self.config = config
        self.act = activation(config.hidden_act)
        if config.norm_eps is not None:
            self.norm = NORMS[config.norm_type](config.input_size, eps=config.norm_eps)
        sizes = [config.input_size, *[config.hidden_size] * config.num_layers]
        self.layers = [nn.Linear(rows, columns, bias=config.bias) for rows, columns in pairwise(sizes)]

    def __call__(self, features: mx.array) -> mx.array:
        """float[B, P, C] -> float[B, P, hidden_size], P being fewer behind a pixel shuffle."""
        x = features if self.config.shuffle is None else pixel_shuffle(features, self.config.shuffle)
        x = self.norm(x) if "norm" in self else x
        for number, layer in enumerate(self.layers):
            x = layer(self.act(x) if number else x)
        return x
