"""Where the pixels that a vision tower sees lie in the picture that they were made of."""

from typing import NamedTuple

import numpy as np


class Frame(NamedTuple):
    """Pixels made of a piece of a picture: x of them from the left and y from the top is, in the picture,
    `left + x * across` and `top + y * down`. The default is the picture itself."""

    left: float = 0.0
    top: float = 0.0
    across: float = 1.0
    down: float = 1.0

    def cut(self, left: int, top: int) -> "Frame":
        """What is cut out of these pixels, or put around them where `left` and `top` are negative."""
        return self._replace(left=self.left + left * self.across, top=self.top + top * self.down)

    def resize(self, before: tuple[int, int], after: tuple[int, int]) -> "Frame":
        """These pixels resized; `before` and `after` are width and height."""
        return self._replace(across=self.across * before[0] / after[0], down=self.down * before[1] / after[1])

    def patches(self, height: int, width: int, patch_size: int) -> np.ndarray:
        """Boxes of the patches of height x width of these pixels, row by row: float64[P, 4]."""
        rows, columns = height // patch_size, width // patch_size
        left = self.left + np.arange(columns) * patch_size * self.across
        top = self.top + np.arange(rows) * patch_size * self.down
        left, top = (edges.ravel() for edges in np.meshgrid(left, top))
        return np.stack([left, top, left + patch_size * self.across, top + patch_size * self.down], axis=-1)
