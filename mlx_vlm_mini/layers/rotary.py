"""Rotary positions (arXiv:2104.09864) whose frequencies may depend on the length.

A position is one number a token, or three, one on each of three axes (M-RoPE, arXiv:2409.12191).
"""

from collections.abc import Callable
from typing import Literal

import mlx.core as mx
import numpy as np

from .angles import Turn
from .kernels import kernels
from .types import Rope

Scaling = Callable[[int], tuple[mx.array, float]]
"""A length in tokens -> periods, positions a radian, float32[dims / 2]; and by what rotated vectors are multiplied."""

DependsOn = Literal["nothing", "length", "prompt"]


class Rotary:
    """Rotates queries and keys by the positions of their tokens.

    Attributes:
        dims: numbers of a head that are rotated, its first ones.
        scaling: gives the frequencies.
        depends_on: whose length the frequencies depend on: nothing's, that of all tokens so far, or that of the prompt
            that the sequence began with.
        axes: int[dims / 2], by which of three axes each frequency goes; None where positions are one number.
        neighbours: numbers 2 i and 2 i + 1 of a head are a pair (GLM-4), not i and i + dims / 2.
    """

    def __init__(
        self,
        dims: int,
        scaling: Scaling,
        *,
        depends_on: DependsOn = "nothing",
        axes: np.ndarray | None = None,
        neighbours: bool = False,
    ) -> None:
        self.dims, self.scaling, self.depends_on, self.axes = dims, scaling, depends_on, axes
        self.neighbours = neighbours
        mx.eval(scaling(1)[0])  # what is left to be computed belongs to the thread that asked for it

    def at(self, first: int | mx.array | np.ndarray, length: int, *, total: int | tuple[int, ...] = 1) -> Rope:
        """What rotates `length` tokens.

        Args:
            first: position of the first one, the others counting on; int[B] of each row of a batch; or positions of all
                on three axes, int[3, length].
            total: tokens that the frequencies depend on, of rows of a batch one number each.
        """
        if isinstance(total, tuple) and len({*total}) > 1:
            return self._of_rows(first, length, total)
        total = total[0] if isinstance(total, tuple) else total
        periods, scale = self.scaling(total)
        if not isinstance(first, np.ndarray):
            return kernels().rope(periods, scale, first, length, self.dims, self.neighbours)
        positions = first[self.axes].T  # (L, dims / 2)
        frequencies = np.float32(1) / np.array(periods, dtype=np.float32)
        return Turn(positions.astype(np.float32) * frequencies, scale, self.dims, neighbours=self.neighbours)

    def _of_rows(self, first: int | mx.array | np.ndarray, length: int, totals: tuple[int, ...]) -> Rope:
        """Rows with frequencies of their own."""
        scalings = [self.scaling(total) for total in totals]
        (scale,) = {scale for _, scale in scalings}
        periods = mx.stack([periods for periods, _ in scalings])[:, None, None]  # (B, 1, 1, dims / 2)
        places = mx.array(first).reshape(-1, 1) + mx.arange(length)  # (1 or B, L)
        return Turn(
            places.astype(mx.float32)[:, None, :, None] * (1 / periods), scale, self.dims, neighbours=self.neighbours
        )
