"""The projector that averages: squares of neighbouring features, a norm, and one matrix.

Source: Gemma 3 (arXiv:2503.19786); models/gemma3 of huggingface/transformers.
"""

from math import isqrt

import mlx.core as mx
import mlx.nn as nn

from mlx_vlm_mini.config import ProjectorConfig
from mlx_vlm_mini.layers.norms import OffsetRMSNorm


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
