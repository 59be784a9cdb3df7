"""Learned positions of a square of patches, resized to the grid of an image: separable, a matrix for each axis.

Source: torch's `interpolate` and `grid_sample`, by which models of huggingface/transformers resize them.
"""

from collections.abc import Callable, Mapping
from math import isqrt
from types import MappingProxyType

import mlx.core as mx
import numpy as np

from mlx_vlm_mini.config import Resize

_CUBIC = -0.75  # the slope at distance 1 of torch's cubic kernel


def _corners(side: int, count: int) -> np.ndarray:
    places = np.arange(count) * (side - 1) / max(count - 1, 1)
    return np.maximum(0, 1 - np.abs(places[:, None] - np.arange(side)))


def _taps(side: int, count: int, reach: int, kernel: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Centres on centres: a kernel's values at the `2 * reach` places around each, those outside being the edge's."""
    places = (np.arange(count) + 0.5) * side / count - 0.5
    taps = np.floor(places)[:, None] + np.arange(1 - reach, 1 + reach)
    found = np.zeros((count, side))
    np.add.at(
        found,
        (np.arange(count)[:, None], np.clip(taps, 0, side - 1).astype(int)),
        kernel(np.abs(places[:, None] - taps)),
    )
    return found


def _floor(side: int, count: int) -> np.ndarray:
    """The last one at or before the same part of the way, in float32 and by the reference's bounds, so that a patch on
    a bound takes the same one."""
    step = 1 / side
    bounds = (step + step * np.arange(side - 1)).astype(np.float32)
    places = np.searchsorted(bounds, np.arange(count, dtype=np.float32) / np.float32(count), side="right")
    return np.eye(side)[places]


def _cubic(distance: np.ndarray) -> np.ndarray:
    a = _CUBIC
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    return np.where(distance <= 1, near, ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a)


def _antialiased(side: int, count: int) -> np.ndarray:
    scale = side / count
    width = max(scale, 1.0)
    centres = (np.arange(count) + 0.5) * scale
    found = np.maximum(0, 1 - np.abs(np.arange(side) + 0.5 - centres[:, None]) / width)
    return found / found.sum(axis=1, keepdims=True)


RESIZES: Mapping[Resize, Callable[[int, int], np.ndarray]] = MappingProxyType(
    {
        "corners": _corners,
        "linear": lambda side, count: _taps(side, count, 1, lambda distance: np.maximum(0, 1 - distance)),
        "antialiased": _antialiased,
        "floor": _floor,
        "cubic": lambda side, count: _taps(side, count, 2, _cubic),
    }
)
"""By kind: (positions along a side, wanted) -> how much each wanted one has of each, float64[wanted, side]."""


def resize(positions: mx.array, rows: int, columns: int, kind: Resize) -> mx.array:
    """A square's positions as those of a grid.

    Args:
        positions: float[side * side, C].

    Returns:
        float[rows * columns, C], of the same type; computed in float32.
    """
    side = isqrt(len(positions))
    if rows == columns == side:
        return positions
    down, across = (mx.array(RESIZES[kind](side, count).astype(np.float32)) for count in (rows, columns))
    square = positions.astype(mx.float32).reshape(side, -1)
    found = (down @ square).reshape(rows, side, -1)  # (rows, side, C)
    return (across @ found).reshape(rows * columns, -1).astype(positions.dtype)
