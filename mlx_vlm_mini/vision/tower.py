"""What the vision towers of single pictures share, and the join of neighbouring features."""

import mlx.core as mx
import mlx.nn as nn

from mlx_vlm_mini.layers.types import Recorder


class Tower(nn.Module):
    """A tower that encodes each row of pixels (an image, a tile, a step of a video) by itself.

    A call takes all rows of an image. They are encoded and evaluated one by one, so that memory does not grow with
    their number; `encode` takes them all at once, as training does.
    """

    def encode(self, pixel_values: mx.array, attentions: Recorder | None = None) -> mx.array:
        """float[B, height, width, channels] -> features, row by row of the batch."""
        raise TypeError(f"{type(self).__name__} does not say how it encodes")

    def __call__(self, pixel_values: mx.array, attentions: Recorder | None = None) -> mx.array:
        """As `encode`."""
        if attentions is not None or len(pixel_values) == 1:
            return self.encode(pixel_values, attentions)
        features: list[mx.array] = []
        for row in mx.split(pixel_values, len(pixel_values)):
            features.append(self.encode(row))
            mx.eval(features[-1])
        return mx.concatenate(features)


def join_squares(features: mx.array, n: int) -> mx.array:
    """Join each square of n x n neighbouring features, row by row within it.

    Args:
        features: float[B, rows, columns, C]; rows and columns that make no whole square are left out.

    Returns:
        float[B, rows // n, columns // n, n * n * C].
    """
    B, rows, columns, C = features.shape
    down, across = rows // n, columns // n
    x = features[:, : down * n, : across * n].reshape(B, down, n, across, n, C)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(B, down, across, n * n * C)
