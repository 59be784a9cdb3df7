"""The projectors that average: squares of neighbouring features, a norm, and one matrix.

Sources: Gemma 3 (arXiv:2503.19786); models/gemma3 and models/gemma4 of huggingface/transformers.
"""

from math import isqrt

import mlx.core as mx
import mlx.nn as nn

from mlx_vlm_mini.config import ProjectorConfig
from mlx_vlm_mini.layers.norms import OffsetRMSNorm
from mlx_vlm_mini.vision.tower import join_squares

from .mlp import Projector


class PooledProjector(nn.Module):
    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        assert config.pool is not None and config.norm_eps is not None
        self.factor = config.pool.factor
        self.norm = OffsetRMSNorm(config.input_size, eps=config.norm_eps, offset=config.pool.norm_offset)
        self.projection = mx.zeros((config.input_size, config.hidden_size))

    def __call__(self, features: mx.array) -> mx.array:
        """float[B, P, C] -> float[B, P / factor**2, hidden_size]: the means of a square grid's squares, row by row."""
        (B, P, C), n = features.shape, self.factor
        side = isqrt(P) // n
        x = features.reshape(B, side, n, side, n, C).mean(axis=(2, 4)).reshape(B, side * side, C)
        return self.norm(x) @ self.projection


class GridPooledProjector(Projector):
    """Means of a grid of any size, in float32 until they are standardized: their numbers exceed float16's largest."""

    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__(config)
        assert config.grid_pool is not None
        self.factor = config.grid_pool.factor
        if config.grid_pool.standardize:
            self.std_bias, self.std_scale = mx.zeros(config.input_size), mx.ones(config.input_size)

    def __call__(self, features: mx.array) -> mx.array:
        """float[B, rows, columns, C] -> float[B, tokens, hidden_size], row by row."""
        C = features.shape[-1]
        x = join_squares(features.astype(mx.float32), self.factor).flatten(1, 2)
        x = mx.unflatten(x, -1, (-1, C)).mean(axis=-2) * C**0.5
        if "std_bias" in self:
            x = (x - self.std_bias.astype(mx.float32)) * self.std_scale.astype(mx.float32)
        return super().__call__(x.astype(features.dtype))
