"""Patches between norms, in place of a vision transformer: pixels of any size -> patch features, row by row.

Source: models/gemma4_unified of huggingface/transformers.
"""

import mlx.core as mx
import mlx.nn as nn

from mlx_vlm_mini.config import VisionConfig
from mlx_vlm_mini.layers.types import Recorder

from .grid import count_patches, positions_by_axes
from .tower import Tower
from .transformer import cut_patches


class NormedPatches(Tower):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        assert config.grid is not None and config.grid.places is not None
        self.config = config
        numbers, size, eps = 3 * config.patch_size**2, config.hidden_size, config.layer_norm_eps
        self.norm_pixels = nn.LayerNorm(numbers, eps=eps)
        self.patch_proj = nn.Linear(numbers, size, bias=config.patch_bias)
        self.norm_patches = nn.LayerNorm(size, eps=eps)
        self.pos_axes = mx.zeros((config.grid.places, 2, size))
        self.norm = nn.LayerNorm(size, eps=eps)

    def encode(self, pixel_values: mx.array, attentions: Recorder | None = None) -> mx.array:
        """float[1, height, width, 3], whole patches along each side -> float[1, rows, columns, C]; no attention is here
        to be recorded.

        Raises:
            ImageError: a side is no multiple of the patches', or longer than there are positions.
        """
        rows, columns = count_patches(pixel_values, self.config.patch_size)
        x = cut_patches(pixel_values, self.config.patch_size)  # (1, P, 3 * patch_size**2)
        # Paper is nearly as bright everywhere: of its pixels as they are a norm's variance would lose its digits.
        x = self.norm_pixels(x - x.mean(axis=-1, keepdims=True))
        x = self.norm_patches(self.patch_proj(x))
        x = self.norm(x + positions_by_axes(self.pos_axes[:, 0], self.pos_axes[:, 1], rows, columns))
        return x.reshape(1, rows, columns, -1)
