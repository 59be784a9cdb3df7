"""A loaded model's layers made fast."""

import mlx.core as mx
import mlx.nn as nn

from .rows import block_rows
from .unpack import unpack_for_cpu


def prepare(model: nn.Module, decoder: nn.Module, dtype: mx.Dtype, tied: bool) -> None:
    """As `Kernels.prepare`: quantized layers are unpacked, products with few rows are done in blocks."""
    unpack_for_cpu(model, dtype, tied=tied)
    block_rows(decoder)
