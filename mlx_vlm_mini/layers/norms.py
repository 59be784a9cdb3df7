"""Norms."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_vlm_mini.config import NormType


class OffsetRMSNorm(nn.Module):
    """RMS norm whose weight is stored without an offset; in float32, as models/gemma and models/gemma4 of transformers
    compute it."""

    def __init__(self, dims: int, *, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = mx.full(dims, 1.0 - offset)
        self.eps = eps
        self.offset = offset

    def __call__(self, x: mx.array) -> mx.array:
        """float[..., dims] -> the same."""
        weight = self.weight.astype(mx.float32)
        weight = weight + self.offset if self.offset else weight
        return mx.fast.rms_norm(x.astype(mx.float32), weight, self.eps).astype(x.dtype)


class BareRMSNorm(nn.Module):
    """RMS norm without a weight."""

    def __init__(self, dims: int = 0, *, eps: float) -> None:
        """`dims`: any; it is there for calls that suit all norms."""
        super().__init__()
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        """float[..., dims] -> the same."""
        return mx.fast.rms_norm(x, None, self.eps)


NORMS: dict[NormType, Any] = {
    "layer_norm": nn.LayerNorm, "rms_norm": nn.RMSNorm, "rms_norm_float32": OffsetRMSNorm,
    "rms_norm_bare": BareRMSNorm,
}  # fmt: skip
"""By their names in configs; each is made with a width and `eps`."""
