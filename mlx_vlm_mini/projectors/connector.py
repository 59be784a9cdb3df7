"""The projector of pages: squares of a tile's features joined, positions added, two layers; by a coarse or a fine way.

Source: models/granite_docling of huggingface/transformers. Features of earlier blocks, which the decoder's first layers
add to its image tokens (arXiv:2406.04334), have layers of their own in each way.
"""

from dataclasses import replace
from math import isqrt

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_vlm_mini.config import ProjectorConfig, ShuffleConfig
from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.layers.kernels import activation

from .mlp import Projector, pixel_shuffle

_BASE = 10000.0  # of the positions' frequencies


def sine_positions(side: int, size: int) -> np.ndarray:
    """Positions on a square, row by row: sines and cosines of the column, then of the row, float32[side**2, size]."""
    frequencies = _BASE ** -(np.arange(size // 4) / (size // 4))
    rows, columns = np.divmod(np.arange(side**2), side)
    angles = [place[:, None] * frequencies for place in (columns, rows)]
    return np.concatenate([part for each in angles for part in (np.sin(each), np.cos(each))], axis=-1).astype(
        np.float32
    )


class Way(nn.Module):
    """What is different in each way: how many features become one embedding."""

    def __init__(self, config: ProjectorConfig, width: int, factor: int) -> None:
        """`width`: of a state of the tower."""
        super().__init__()
        assert config.connector is not None
        self.shuffle = ShuffleConfig(factor=factor, transposed=False)
        joined = width * factor**2
        self.projection = nn.Linear(joined, config.hidden_size, bias=False)
        tap = replace(config, input_size=joined, shuffle=self.shuffle, connector=None)
        self.taps = [Projector(tap) for _ in range(config.connector.taps)]

    def __call__(self, features: mx.array) -> mx.array:
        """float[B, P, C] -> float[B, tokens, hidden_size], their places added."""
        x = self.projection(pixel_shuffle(features, self.shuffle))
        return x + mx.array(sine_positions(isqrt(x.shape[1]), x.shape[2])).astype(x.dtype)


class Connector(nn.Module):
    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        assert config.connector is not None and config.norm_eps is not None and config.shuffle is not None
        factor, size, eps = config.shuffle.factor, config.hidden_size, config.norm_eps
        width = config.input_size // factor**2 // (1 + config.connector.taps)
        self.act = activation(config.hidden_act)
        self.norm_in = nn.LayerNorm(width, eps=eps)
        self.coarse = Way(config, width, factor)
        if config.connector.fine:
            self.fine = Way(config, width, factor // 2)
        self.norm_mid = nn.LayerNorm(size, eps=eps)
        self.proj = nn.Linear(size, size, bias=False)
        self.norm_out = nn.LayerNorm(size, eps=eps)

    def __call__(self, features: mx.array, tokens: int | None = None) -> mx.array:
        """
        Args:
            features: float[B, P, C (1 + taps)] of square tiles: the last block's, normed, then earlier ones'.
            tokens: of each tile in the prompt, which say the way; None: the coarse one.

        Returns:
            float[B, tokens, hidden_size (1 + taps)].

        Raises:
            CheckpointError: no way gives so many.
        """
        ways = {features.shape[1] // way.shuffle.factor**2: way for way in (self.coarse, *self._fine())}
        if tokens is not None and tokens not in ways:
            raise CheckpointError(
                f"the image processor gives a tile {tokens} tokens, config.json {' or '.join(map(str, ways))}"
            )
        way = self.coarse if tokens is None else ways[tokens]
        own, *tapped = mx.split(features, 1 + len(way.taps), axis=-1)
        x = self.norm_out(self.proj(self.act(self.norm_mid(way(self.norm_in(own))))))
        return mx.concatenate([x, *(tap(part) for tap, part in zip(way.taps, tapped, strict=True))], axis=-1)

    def _fine(self) -> tuple[Way, ...]:
        return (self.fine,) if "fine" in self else ()
