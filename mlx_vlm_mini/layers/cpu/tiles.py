"""Attention on a CPU, in tiles whose scores stay in the cache."""

import mlx.core as mx

from mlx_vlm_mini.layers.blocks import plain_attention
from mlx_vlm_mini.layers.types import Mask

from . import exponential

ONE_FROM = 1024  # keys from which on tiles are faster for a single query, too
CAUSAL_ROWS = 128  # queries of a tile on a CPU, about, where each sees what stands before it


def attend(queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: Mask) -> mx.array:
    """As `Kernels.attend`: in tiles for prompts and behind many keys, MLX's own for a token behind few of them."""
    if queries.dtype == mx.float32 and (queries.shape[2] > 1 or keys.shape[2] >= ONE_FROM):
        return attend_in_tiles(queries * (scale * exponential.LOG2E), keys, values, mask)
    return plain_attention(queries, keys, values, scale, mask)


def attend_in_tiles(queries: mx.array, keys: mx.array, values: mx.array, mask: Mask) -> mx.array:
    """Attention for CPUs: so few heads and queries at a time that their scores stay in the cache, one after another;
    with 2^t in place of e^x, for which the queries come multiplied.

    The scores stand on their side, [keys, queries]: their largest and their sum are then found row by row.
    """
    (B, H, L, D), S, groups = queries.shape, keys.shape[2], queries.shape[1] // keys.shape[1]
    queries = queries.reshape(-1, groups, L, D)  # those that share keys
    keys, values = keys.reshape(-1, S, D), values.reshape(-1, S, D)
    tiles = -(-groups * L * S // exponential.CHUNK)
    causal = isinstance(mask, str)
    if causal:  # more of them spare more of the products that nobody sees
        tiles = max(tiles, L // CAUSAL_ROWS)
    rows = -(-L // min(tiles, L))
    heads = max(exponential.CHUNK // (groups * rows * S), 1)
    blocks: list[mx.array] = []
    for start in range(0, L, rows):
        block = queries[:, :, start : start + rows].reshape(len(keys), -1, D)
        end = S - L + min(start + rows, L) if causal else S
        bias = _bias(mask, L, S, start, rows, end)
        if bias is not None:
            bias = mx.tile(bias, (1, 1, groups))
            bias = bias if len(bias) == 1 else mx.repeat(bias, len(keys) // len(bias), axis=0)
        outputs: list[mx.array] = []
        for first in range(0, len(keys), heads):
            part = slice(first, first + heads)
            few = block[part]
            if blocks or outputs:  # one after the other, else MLX computes the scores of all first
                (few,) = mx.depends([few], [(outputs or blocks)[-1]])
            scores = keys[part, :end] @ few.swapaxes(-1, -2)  # (heads, keys, groups * rows)
            if bias is not None:
                scores = scores + (bias if len(bias) == 1 else bias[part])
            powers = exponential.power(scores - mx.stop_gradient(scores.max(axis=-2, keepdims=True)))
            outputs.append((powers.swapaxes(-1, -2) @ values[part, :end]) / powers.sum(axis=-2)[..., None])
        blocks.append(mx.concatenate(outputs).reshape(len(keys), groups, -1, D))
    return mx.concatenate(blocks, axis=2).reshape(B, H, L, D)


def _bias(mask: Mask, L: int, S: int, start: int, rows: int, end: int) -> mx.array | None:
    """What is added to scores [keys, queries] of some queries: float[1 or B, end, rows]."""
    if mask is None:
        return None
    if isinstance(mask, str):
        seen = (mx.arange(end)[:, None] <= mx.arange(S - L + start, end))[None]
    else:
        seen = mask.reshape(-1, L, S)[:, start : start + rows].swapaxes(-1, -2)
    return mx.where(seen, 0.0, mx.finfo(mx.float32).min)
