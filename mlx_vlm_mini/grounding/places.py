"""Where the pixels that a vision tower sees lie in the picture that they were made of: preprocessing undone.

Coordinates are the picture's pixels, counted from its left top corner: its pixel n reaches from n to n + 1. A box is
(left, top, right, bottom), and may lie beside the picture where bars were put around it.
"""

import numpy as np


def join(boxes: np.ndarray, sources: np.ndarray) -> np.ndarray:
    """The boxes around several each: float64[N, 4], NaN where there is nothing to be around.

    Args:
        boxes: float64[P, 4], NaN where a feature has no place.
        sources: int[N, n], which of them; -1 is none.
    """
    found = np.where(sources[..., None] < 0, np.nan, boxes[sources])  # (N, n, 4)
    return np.concatenate([found[..., :2].min(axis=1), found[..., 2:].max(axis=1)], axis=-1)


def lay_over(weights: np.ndarray, boxes: np.ndarray, size: tuple[int, int], cells: tuple[int, int]) -> np.ndarray:
    """Weights spread evenly over their boxes and summed up where these overlap, cell by cell of a grid on the picture.

    Args:
        weights: float[N].
        boxes: float64[N, 4]; those that are NaN are left out, as are parts beside the picture.
        size: the picture's height and width.
        cells: rows and columns of the grid; `size` itself gives a cell a pixel.

    Returns:
        float64[rows, columns], the weight in each cell.
    """
    placed = ~np.isnan(boxes[:, 0])
    down = _overlap(boxes[placed, 1], boxes[placed, 3], size[0], cells[0])
    across = _overlap(boxes[placed, 0], boxes[placed, 2], size[1], cells[1])
    return (down * weights[placed, None].astype(np.float64)).T @ across


def _overlap(low: np.ndarray, high: np.ndarray, length: int, cells: int) -> np.ndarray:
    """Of each interval, what part of it lies in each of the equal cells of a length: float64[N, cells]."""
    edges = np.linspace(0, length, cells + 1)
    inside = np.minimum(high[:, None], edges[1:]) - np.maximum(low[:, None], edges[:-1])
    return np.clip(inside, 0, None) / (high - low)[:, None]


def weight_inside(weights: np.ndarray, boxes: np.ndarray, region: tuple[float, float, float, float]) -> np.ndarray:
    """The weight that lies in a region of the picture, each box's being spread evenly over it.

    Args:
        weights: float[..., N].
        region: a box.

    Returns:
        float64[...].
    """
    low, high = np.maximum(boxes[:, :2], region[:2]), np.minimum(boxes[:, 2:], region[2:])
    part = np.prod(np.clip(high - low, 0, None), axis=-1) / np.prod(boxes[:, 2:] - boxes[:, :2], axis=-1)
    return weights.astype(np.float64) @ np.nan_to_num(part)
