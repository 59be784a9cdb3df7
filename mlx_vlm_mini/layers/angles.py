"""Rotations by given angles, and the angles of patches on a grid."""

import mlx.core as mx
import numpy as np


class Turn:
    """Rotates the first `dims` numbers of float[..., L, D] by given angles, one half of them against the other; or
    `neighbours`, each even one against the next."""

    def __init__(
        self,
        angles: np.ndarray | mx.array,
        scale: float = 1.0,
        dims: int | None = None,
        *,
        neighbours: bool = False,
        parts: int = 1,
    ) -> None:
        """
        Args:
            angles: float32[..., L, dims / 2].
            scale: the rotated numbers are multiplied by it.
            dims: the others stay as they are; None: all are rotated.
            parts: so many equal parts are each rotated by their own angles, one half of a part against its other half.
        """
        both = (mx.cos(angles), mx.sin(angles)) if isinstance(angles, mx.array) else (np.cos(angles), np.sin(angles))
        self._cos, self._sin = (mx.array(each if scale == 1 else each * scale) for each in both)
        if parts > 1:
            self._cos, self._sin = (mx.unflatten(each, -1, (parts, -1)) for each in (self._cos, self._sin))
        self._dims, self._neighbours, self._parts = dims, neighbours, parts

    def __call__(self, x: mx.array) -> mx.array:
        if self._dims is not None and self._dims < x.shape[-1]:
            rotated, rest = mx.split(x, [self._dims], axis=-1)
            return mx.concatenate([self._rotate(rotated), rest], axis=-1)
        return self._rotate(x)

    def _rotate(self, x: mx.array) -> mx.array:
        y = x.astype(mx.float32)
        if self._parts > 1:
            y = mx.unflatten(y, -1, (self._parts, -1))
        one, other = (y[..., ::2], y[..., 1::2]) if self._neighbours else mx.split(y, 2, axis=-1)
        turned = [one * self._cos - other * self._sin, other * self._cos + one * self._sin]
        together = mx.stack(turned, axis=-1) if self._neighbours else mx.concatenate(turned, axis=-1)
        return together.reshape(x.shape).astype(x.dtype)


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
