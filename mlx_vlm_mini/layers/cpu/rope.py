"""Rotary positions by angles that are computed once for all layers.

On a CPU `mx.fast.rope` is some twenty operations, which each call builds anew: half of Python's time for a token.
"""

import mlx.core as mx
import numpy as np

from mlx_vlm_mini.layers.angles import Turn
from mlx_vlm_mini.layers.types import Rope


def rope(periods: mx.array, scale: float, first: int | mx.array, length: int, dims: int, neighbours: bool) -> Rope:
    """As `Kernels.rope`."""
    if isinstance(first, mx.array):  # of one token, or of each row of a batch
        places = first.astype(mx.float32)[:, None] + mx.arange(length, dtype=mx.float32)  # (B, L)
        return Turn(places[:, None, :, None] * (1 / periods), scale, dims, neighbours=neighbours)
    positions = np.arange(first, first + length, dtype=np.float32)
    return Turn(positions[:, None] * (np.float32(1) / np.array(periods)), scale, dims, neighbours=neighbours)
