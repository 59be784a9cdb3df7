"""Rotary positions by angles that are computed once for all layers (arXiv:2104.09864)."""

from typing import Any

import mlx.core as mx
import numpy as np


class Turn:
    """Turns float[..., L, D] by given angles, one half of D against the other."""

    def __init__(self, angles: np.ndarray | mx.array, scale: float = 1.0) -> None:
        """`angles` float32[..., L, D / 2]; the result is `scale` times as long."""
        parts = (mx.cos(angles), mx.sin(angles)) if isinstance(angles, mx.array) else (np.cos(angles), np.sin(angles))
        self._cos, self._sin = (mx.array(part if scale == 1 else part * scale) for part in parts)

    def __call__(self, x: mx.array, offset: int = 0) -> mx.array:
        """`offset` is not used: the angles are those of the tokens themselves."""
        one, other = mx.split(x.astype(mx.float32), 2, axis=-1)
        turned = [one * self._cos - other * self._sin, other * self._cos + one * self._sin]
        return mx.concatenate(turned, axis=-1).astype(x.dtype)


def turn_once(rope: Any, offset: int | mx.array, length: int) -> Any:
    """What turns `length` tokens behind `offset` others as `rope` does, with angles computed once for all layers; or
    one token at the position `offset`, int[1].

    On a CPU `mx.fast.rope` is some twenty operations, which each call builds anew: half of Python's time for a token.
    On a GPU it is one, and `rope` is given back; as is one whose frequencies are not known.
    """
    rope = getattr(rope, "plain", rope)
    periods = rope.periods(offset + length) if hasattr(rope, "periods") else getattr(rope, "_freqs", None)
    if periods is None or mx.default_device().type != mx.DeviceType.cpu:
        return rope
    scale: Any = getattr(rope, "mscale", None) or getattr(rope, "scale", 1.0)
    if isinstance(offset, mx.array):
        return Turn(offset.astype(mx.float32)[:, None] * (1 / periods), scale)
    positions = np.arange(offset, offset + length, dtype=np.float32)
    return Turn(positions[:, None] * (np.float32(1) / np.array(periods)), scale)


def grid_angles(
    rows: np.ndarray, columns: np.ndarray, dims: int, base: float = 10000.0, *, alternating: bool = False
) -> np.ndarray:
    """Angles of patches in given rows and columns, int[P]: float32[P, dims / 2]; the first half of them by the row, the
    second by the column, at the same frequencies, or where `alternating` at those that lie between."""
    exponents = np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims)
    frequencies = np.float32(1) / (base ** exponents.astype(np.float64)).astype(np.float32)
    own = frequencies[::2], frequencies[1::2] if alternating else frequencies[::2]
    places = (place.astype(np.float32)[:, None] for place in (rows, columns))
    return np.concatenate([place * each for place, each in zip(places, own, strict=True)], axis=-1)
