"""Images whose slots see one another, in a decoder that is causal otherwise: their blocks, masks of them, and where a
prompt may be cut.

Source: Gemma 3 (arXiv:2503.19786); models/gemma3 of huggingface/transformers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_vlm_mini.layers.types import Mask


class ImageBlock(NamedTuple):
    """A run of slots: the position of its first token in the prompt, and of the first one behind it."""

    start: int
    end: int


def find_blocks(slots: np.ndarray, start: int = 0) -> list[ImageBlock]:
    """The runs in bool[L] that reach beyond position `start`."""
    edges = np.flatnonzero(np.diff(slots.astype(np.int8), prepend=0, append=0))
    return [ImageBlock(first, end) for first, end in edges.reshape(-1, 2).tolist() if end > start]


def block_mask(num_queries: int, offset: int, window: int | None, blocks: Sequence[ImageBlock]) -> mx.array:
    """What `num_queries` tokens after `offset` cached ones may look at: themselves, what stands before them, and the
    whole of their block; with a window of 3 nothing that stands 3 tokens before them or further.

    A block of tokens 1 to 3, with that window:

        key    0 1 2 3 4
        0      x . . . .
        1      x x x x .
        2      x x x x .
        3      . x x x .
        4      . . x x x

    Returns:
        bool[num_queries, offset + num_queries].
    """
    total = offset + num_queries
    number = np.full(total, -1)
    for i, block in enumerate(blocks):
        number[block.start : block.end] = i
    own = number[offset:, None]
    queries, keys = np.arange(offset, total)[:, None], np.arange(total)
    seen = (keys <= queries) | ((own == number) & (own >= 0))
    return mx.array(seen if window is None else seen & (keys > queries - window))


def cut_between(start: int, step: int, end: int, blocks: Sequence[ImageBlock]) -> int:
    """Where a piece of about `step` tokens that begins at `start` ends, so that no block is in two pieces.

    It is shorter where a block would be cut, and longer where that block is its first.
    """
    cut = start + step
    for block in blocks:
        if block.start < cut < block.end:
            cut = block.start if block.start > start else block.end
            break
    return min(cut, end)


def causal_mask(num_queries: int, offset: int, window: int | None, prefix: int = 0) -> Mask:
    """What `num_queries` tokens after `offset` cached ones may look at: themselves and what stands before them.

    With a window of 3, queries 2 and 3 of 4 tokens see

        key    0 1 2 3
        2      x x x .
        3      . x x x

    The first `prefix` tokens of all see one another besides, in whatever window (arXiv:1910.10683, fig. 3).

    Returns:
        None or "causal" where the fused attention needs no array, else bool[num_queries, offset + num_queries].
    """
    total = offset + num_queries
    if prefix >= total:
        return None
    if prefix <= offset and (window is None or total <= window):
        return None if num_queries == 1 else "causal"
    queries, keys = mx.arange(offset, total)[:, None], mx.arange(total)
    seen = (keys <= queries) & (keys > queries - (total if window is None else window))
    return seen | ((queries < prefix) & (keys < prefix))


def rotating_mask(num_queries: int, offset: int, size: int, keep: int) -> Mask:
    """What `num_queries` tokens after `offset` others may look at where mlx-lm's rotating cache holds `size` tokens.

    Token t sees the first `keep` tokens and the last `size - keep` up to itself, in pieces of whatever length it is
    read. Several tokens find at most `size - 1` keys before theirs, in order; one finds those that it sees, in any
    order. (mlx-lm's own mask hides the first tokens from all of several queries but the first.)

    Returns:
        None where each query sees every key, else bool[num_queries, min(offset, size - 1) + num_queries].
    """
    if num_queries == 1:
        return None
    held = min(offset, size - 1)
    queries, keys = mx.arange(held, held + num_queries)[:, None], mx.arange(held + num_queries)
    return (keys <= queries) & ((keys > queries - (size - keep)) | (keys < keep))
