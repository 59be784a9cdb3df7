"""Weights in eight bits of floating point, each tensor with a factor beside it (Mistral's FP8 files).

Format: E4M3 of arXiv:2209.05433, without infinities: a sign, four bits of exponent, three of mantissa.
"""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np

FLOAT8 = "F8_E4M3"
"""safetensors' name of the type."""

FACTOR = "_scale_inv"
"""Behind a weight's name: of the number that the weight is multiplied by when it is read."""

UNREAD = ("activation_scale", "input_scale")
"""Beside a weight: for computing in eight bits, which nothing here does."""


def _make_numbers() -> np.ndarray:
    codes = np.arange(128)
    exponents, fractions = codes >> 3, (codes & 7) / 8
    positive = np.where(exponents == 0, fractions * 2.0**-6, (1 + fractions) * 2.0 ** (exponents - 7.0))
    positive[-1] = np.nan
    return np.concatenate([positive, -positive]).astype(np.float32)


NUMBERS = _make_numbers()
"""What each code says: float32[256]."""


def decode(codes: mx.array) -> mx.array:
    """uint8[...] -> float32[...]. MLX 0.30 decodes what it loads, later ones give the codes."""
    return mx.array(NUMBERS)[codes] if codes.dtype == mx.uint8 else codes.astype(mx.float32)


def is_float8(settings: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` says what is read here: a factor a tensor, not one a block."""
    return settings.get("quant_method") == "fp8" and settings.get("weight_block_size") is None
