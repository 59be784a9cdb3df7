"""Attention of a few queries at a time, so that their scores fit a bound."""

from collections.abc import Callable

import mlx.core as mx

from .types import Mask

SCORES = 2**30  # bytes of scores in one buffer at most
BLOCK = 2**26  # bytes of the scores of a block; MLX allocates those of some ten blocks ahead
FUSED = (64, 80, 128)  # head sizes for which every version of MLX that we allow has a Metal kernel that keeps no scores


def is_fused(head_dim: int) -> bool:
    """Whether MLX's attention of many queries computes without a buffer of scores."""
    return mx.metal.is_available() and mx.default_device().type == mx.DeviceType.gpu and head_dim in FUSED


def plain_attention(queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: Mask) -> mx.array:
    """MLX's attention, see `Kernels.attend`; in blocks where it would fill a buffer of more than `SCORES` bytes.

    A photo of 12 megapixels has 46,875 patches in Qwen3-VL's tower, whose heads of 72 are fused in MLX 0.32.4 and
    later only: 70 GB of scores in half precision.
    """

    def attend(queries: mx.array, keys: mx.array, values: mx.array, mask: Mask) -> mx.array:
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)

    (B, H, L, D), S = queries.shape, keys.shape[2]
    row = B * H * S * queries.dtype.size  # bytes of a query's scores
    if row * L <= SCORES or is_fused(D):
        return attend(queries, keys, values, mask)
    return in_blocks(attend, queries, keys, values, mask, max(1, BLOCK // row))


def in_blocks(
    attend: Callable[[mx.array, mx.array, mx.array, Mask], mx.array],
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    mask: Mask,
    rows: int,
) -> mx.array:
    """`attend(queries, keys, values, mask)`, `rows` queries after `rows` queries, none of which depends on the others.

    Args:
        queries: float[B, H, L, D].
        keys, values: float[B, H', S, D].

    Returns:
        float[B, H, L, D].
    """
    blocks: list[mx.array] = []
    L, S = queries.shape[2], keys.shape[2]
    for start in range(0, L, rows):
        block, visible, end = queries[:, :, start : start + rows], mask, S
        if isinstance(mask, mx.array):
            visible = mask[..., start : start + rows, :]
        elif mask == "causal":  # no query of the block may attend to a key after its last
            end = S - L + start + block.shape[2]
        if blocks:  # one after the other, else the scores of all are in memory at once
            (block,) = mx.depends([block], [blocks[-1]])
        blocks.append(attend(block, keys[:, :, :end], values[:, :, :end], visible))
    return mx.concatenate(blocks, axis=2)
