"""Attention masks: causal ones, with windows, with parts that see one another, and where a prompt may be cut for them.

Sources: prefix-LM, Raffel et al., 2020 (arXiv:1910.10683), figure 3; images inside a causal decoder, Gemma 3
(arXiv:2503.19786); models/gemma3, gemma4 and gemma4_unified of huggingface/transformers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_vlm_mini.layers.types import Mask


class Rows(NamedTuple):
    """Tokens that are read at once.

    Attributes:
        start: keys stored before theirs.
        length: how many.
        padding: int[B], how many of the stored keys lie before each row's first token; None: one sequence, or rows of
            equal length.
    """

    start: int
    length: int
    padding: mx.array | None = None

    @property
    def end(self) -> int:
        """Keys before the first token after them."""
        return self.start + self.length


class ImageBlock(NamedTuple):
    """A run of image tokens: the position of its first one in the prompt, and of the first token after it."""

    start: int
    end: int


def find_blocks(slots: np.ndarray, start: int = 0) -> list[ImageBlock]:
    """The runs in bool[L] that reach beyond position `start`."""
    edges = np.flatnonzero(np.diff(slots.astype(np.int8), prepend=0, append=0))
    return [ImageBlock(first, end) for first, end in edges.reshape(-1, 2).tolist() if end > start]


def causal_mask(rows: Rows, window: int | None = None, prefix: int = 0) -> Mask:
    """Tokens see themselves and what stands before them.

    With a window of 3, queries 2 and 3 of 4 tokens see

        key    0 1 2 3
        2      x x x .
        3      . x x x

    The first `prefix` tokens of all see one another besides, in whatever window.

    Returns:
        None or "causal" where the fused attention needs no array, else bool[L, S], or of padded rows bool[B, 1, L, S];
        S = start + L.
    """
    total = rows.end
    if rows.padding is None:
        if prefix >= total:
            return None
        if prefix <= rows.start and (window is None or total <= window):
            return None if rows.length == 1 else "causal"
    queries, keys = mx.arange(rows.start, total)[:, None], mx.arange(total)
    seen = (keys <= queries) & (keys > queries - (total if window is None else window))
    seen = seen | ((queries < prefix) & (keys < prefix))
    return seen if rows.padding is None else seen & (keys >= rows.padding[:, None, None, None])


def block_mask(rows: Rows, window: int | None, blocks: Sequence[ImageBlock], *, whole: bool = False) -> mx.array:
    """Tokens see themselves, what stands before them, and the whole of their block; with a window of 3 nothing that
    stands 3 tokens before them or further, or where `whole` nothing of that but their block.

    A block of tokens 1 to 3, with that window:

        key    0 1 2 3 4
        0      x . . . .
        1      x x x x .
        2      x x x x .
        3      . x x x .
        4      . . x x x

    Returns:
        bool[L, start + L].
    """
    number = np.full(rows.end, -1)
    for i, block in enumerate(blocks):
        number[block.start : block.end] = i
    own = number[rows.start :, None]
    queries, keys = np.arange(rows.start, rows.end)[:, None], np.arange(rows.end)
    near = keys > queries - (rows.end if window is None else window)
    block = (own == number) & (own >= 0)
    return mx.array((near & (keys <= queries)) | (block if whole else near & block))


@dataclass(frozen=True)
class Causal:
    """Tokens see what stands before them."""

    def mask(self, window: int | None, rows: Rows) -> Mask:
        """See `causal_mask`."""
        return causal_mask(rows, window)

    def cut(self, start: int, step: int, end: int) -> int:
        """Anywhere."""
        return min(start + step, end)


@dataclass(frozen=True)
class Prefix:
    """The first `length` tokens of a sequence see one another: a prompt (PaliGemma), or query tokens (QLLaMA)."""

    length: int

    def mask(self, window: int | None, rows: Rows) -> Mask:
        """See `causal_mask`."""
        return causal_mask(rows, window, self.length)

    def cut(self, start: int, step: int, end: int) -> int:
        """Not among the first tokens."""
        return min(max(start + step, self.length), end)


@dataclass(frozen=True)
class Blocks:
    """Images whose tokens see one another, all else being causal (Gemma 3).

    Attributes:
        blocks: the images.
        in_windows: they do so in layers with a window alone (Gemma 4 31B).
        whole: the window does not cut them (Gemma 4 12B).
    """

    blocks: tuple[ImageBlock, ...]
    in_windows: bool = False
    whole: bool = False

    def mask(self, window: int | None, rows: Rows) -> Mask:
        """None of the blocks may begin in these tokens and end after them."""
        causal = window is None and self.in_windows
        if causal or not any(block.end > rows.start and block.start < rows.end for block in self.blocks):
            return causal_mask(rows, window)
        return block_mask(rows, window, self.blocks, whole=self.whole)

    def cut(self, start: int, step: int, end: int) -> int:
        """Between images: a piece is shorter where one would be cut, and longer where that one is its first."""
        cut = start + step
        for block in self.blocks:
            if block.start < cut < block.end:
                cut = block.start if block.start > start else block.end
                break
        return min(cut, end)


@dataclass(frozen=True)
class Rotating:
    """mlx-lm's rotating cache, which holds `size` tokens: the first `keep` of a sequence and its last ones.

    Token t sees the first `keep` tokens and the last `size - keep` up to itself, in pieces of whatever length it is
    read. (mlx-lm's own mask hides the first tokens from all of several queries but the first.)
    """

    size: int
    keep: int

    def mask(self, window: int | None, rows: Rows) -> Mask:
        """Several tokens find at most `size - 1` keys before theirs, in order; one finds those that it sees, in any
        order."""
        if rows.length == 1:
            return None
        held = min(rows.start, self.size - 1)
        queries, keys = mx.arange(held, held + rows.length)[:, None], mx.arange(held + rows.length)
        return (keys <= queries) & ((keys > queries - (self.size - self.keep)) | (keys < self.keep))

    def cut(self, start: int, step: int, end: int) -> int:
        """Anywhere."""
        return min(start + step, end)
