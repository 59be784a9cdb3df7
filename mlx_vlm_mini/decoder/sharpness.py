"""What queries are multiplied by so that attention to more keys than in pretraining stays as sharp.

Sources: Su Jianlin, spaces.ac.cn/archives/8823 (Qwen's log n); arXiv:2501.19399 and models/ministral3 of
huggingface/transformers (Llama 4's and Ministral 3's steps).
"""

from collections.abc import Callable, Mapping
from math import log
from types import MappingProxyType

import mlx.core as mx

from mlx_vlm_mini.config import QueryScale, QueryScaleType


def _log(places: mx.array, scale: QueryScale) -> mx.array:
    """log n to the base `length`, n counted from 1, at least 1."""
    return mx.maximum(mx.log(places + 1) / log(scale.length), 1)


def _log_steps(places: mx.array, scale: QueryScale) -> mx.array:
    """1 + beta log(1 + floor(place / length)), places counted from 0."""
    return 1 + scale.beta * mx.log(1 + places // scale.length)


SHARPNESS: Mapping[QueryScaleType, Callable[[mx.array, QueryScale], mx.array]] = MappingProxyType(
    {"log": _log, "log_steps": _log_steps}
)
"""By kind: int[...], tokens before each -> float32[...]."""


def sharpness(scale: QueryScale | None, before: int | mx.array, length: int) -> mx.array | None:
    """What the queries of `length` tokens are multiplied by.

    Args:
        before: tokens before the first of them; of rows of a batch int[B].

    Returns:
        float32[length, 1], of rows float32[B, 1, length, 1]; None where that is 1 for all.
    """
    if scale is None or (isinstance(before, int) and before + length <= scale.length):
        return None
    places = mx.arange(length)
    places = places + (before if isinstance(before, int) else before[:, None, None])
    return SHARPNESS[scale.kind](places, scale)[..., None]
