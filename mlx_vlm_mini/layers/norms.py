"""Norms."""

import mlx.core as mx
import mlx.nn as nn

from mlx_vlm_mini.config import NormType

NORMS: dict[NormType, type[nn.LayerNorm | nn.RMSNorm]] = {"layer_norm": nn.LayerNorm, "rms_norm": nn.RMSNorm}


class OffsetRMSNorm(nn.Module):
    """RMS norm whose weight is stored without an offset; in float32, as models/gemma of transformers computes it."""

    def __init__(self, dims: int, *, eps: float, offset: float) -> None:
        super().__init__()
        self.weight = mx.zeros(dims)
        self.eps = eps
        self.offset = offset

    def __call__(self, x: mx.array) -> mx.array:
        """float[..., dims] -> the same."""
        weight = self.weight.astype(mx.float32) + self.offset
        return mx.fast.rms_norm(x.astype(mx.float32), weight, self.eps).astype(x.dtype)
