"""Rotary positions along more than one axis: of patches on a grid, and of a picture's tokens among text.

Sources: arXiv:2409.12191 (M-RoPE), models/qwen2_vl and models/qwen3_vl of huggingface/transformers.

In a decoder each token has three positions: in time, down and across. Of text they are equal and count on; a picture's
tokens share one time, and rows and columns begin there. What follows begins behind the longer side:

    token   text  text  a picture of 2 x 3      text  text
    time    0     1     2  2  2  2  2  2        5     6
    down    0     1     2  2  2  3  3  3        5     6
    across  0     1     2  3  4  2  3  4        5     6

A video is such pictures one behind another, each with a time of its own; what follows begins behind the last of these
times, too. So the authors compute it. In transformers 5.23 text behind a video begins behind the longer side while the
times still run, and an answer behind both; where the times do not reach beyond that side, all is equal.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_vlm_mini.config import DecoderConfig
from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.layers.rotary import Turn, turn_once


@dataclass(frozen=True)
class PlacedImage:
    """A picture among a prompt's tokens.

    Attributes:
        position: of its first token in the prompt.
        rows, columns: of its tokens; of a video, of those of each time.
        taps: float[n, rows * columns, C], what the decoder's first n layers add to its tokens; None: nothing, or they
            were read already.
        times: of a video's steps, from 0 on; a picture has one.
    """

    position: int
    rows: int
    columns: int
    taps: mx.array | None = None
    times: tuple[int, ...] = (0,)

    @property
    def tokens(self) -> int:
        return len(self.times) * self.rows * self.columns

    @property
    def end(self) -> int:
        return self.position + self.tokens


def token_positions(images: Sequence[PlacedImage], start: int, length: int) -> np.ndarray:
    """Positions of `length` tokens behind `start` others, in time, down and across: int[3, length]."""
    end, done, shift = start + length, 0, 0
    found = np.empty((3, end), dtype=np.int64)
    for image in images:
        if image.position >= end:
            break
        found[:, done : image.position] = np.arange(done, image.position) + shift
        step, place = np.divmod(np.arange(image.tokens)[: end - image.position], image.rows * image.columns)
        along = np.stack([np.array(image.times)[step], *np.divmod(place, image.columns)])
        found[:, image.position : image.end] = along + image.position + shift
        shift += _shift(image)
        done = min(image.end, end)
    found[:, done:] = np.arange(done, end) + shift
    return found[:, start:]


def _shift(image: PlacedImage) -> int:
    """How much smaller, below 0, positions are behind a picture than its number of tokens makes them."""
    return max(image.rows, image.columns, image.times[-1] + 1) - image.tokens


class SectionedRoPE(nn.Module):
    """Three positions a token, each turning some of the frequencies; of text alone it is the plain one.

    In chunks, the first s0 frequencies go by time, the next s1 by the row, the last s2 by the column (Qwen2-VL);
    interleaved, every third by the row up to 3 s1, every third by the column up to 3 s2, the others by time (Qwen3-VL).
    """

    def __init__(self, plain: Any, config: DecoderConfig) -> None:
        """
        Args:
            plain: turns text.

        Raises:
            CheckpointError: the sections do not fit the heads, or the kind of scaling.
        """
        super().__init__()
        scaling = config.rope_scaling or {}
        sections, half = scaling["mrope_section"], config.head_dim // 2
        whole = isinstance(sections, list | tuple) and all(type(size) is int and size >= 0 for size in sections)
        interleaved = scaling.get("mrope_interleaved", False)
        if not whole or len(sections) != 3 or not (interleaved or sum(sections) == half):
            raise CheckpointError(
                f"config.json: mrope_section must be three numbers with the sum {half}, not {sections!r}"
            )
        periods = getattr(plain, "_freqs", None)
        if periods is None or getattr(plain, "growth", None) is not None:
            raise CheckpointError("config.json: a rope scaling that depends on the length takes no mrope_section")
        self.plain = plain
        self._frequencies = np.float32(1) / np.array(periods, dtype=np.float32)
        self._axis = np.repeat(np.arange(3), sections)
        if interleaved:
            self._axis = np.zeros(half, dtype=np.int64)
            for axis in (1, 2):
                self._axis[axis : 3 * sections[axis] : 3] = axis

    def __call__(self, x: mx.array, offset: int = 0) -> mx.array:
        turned: mx.array = self.plain(x, offset=offset)
        return turned

    def among(self, images: Sequence[PlacedImage], start: int, length: int) -> Callable[..., mx.array]:
        """What turns `length` tokens behind `start` others of a prompt with these images."""
        if all(image.end <= start for image in images):  # text alone: what it follows moved it
            shift = shift_behind(images)
            turn = turn_once(self.plain, start + shift, length)
            return turn if turn is not self.plain else lambda x, offset: self.plain(x, offset=offset + shift)
        positions = token_positions(images, start, length)[self._axis].T  # (L, D / 2)
        return Turn(positions.astype(np.float32) * self._frequencies, getattr(self.plain, "mscale", 1.0))


def shift_behind(images: Sequence[PlacedImage]) -> int:
    """By how much positions behind all of these pictures differ from the numbers of tokens before them."""
    return sum(map(_shift, images))


def remember(images: Sequence[PlacedImage], cache: Any) -> tuple[PlacedImage, ...]:
    """A prompt's pictures, kept with its first layer's cache: by them positions and its length differ.

    Args:
        images: all of the prompt, in order; none where the cache knows them.
        cache: one of mlx-lm's, or None.
    """
    if cache is None:
        return tuple(images)
    known = tuple(images) or getattr(cache, "placed", ())
    cache.placed = tuple(replace(image, taps=None) if image.end <= cache.offset else image for image in known)
    return known


def forget(cache: Any, length: int) -> None:
    """Forget the pictures that do not end within a cache's first `length` tokens."""
    cache.placed = tuple(image for image in getattr(cache, "placed", ()) if image.end <= length)


def add_taps(x: mx.array, layer: int, images: Sequence[PlacedImage], start: int) -> mx.array:
    """What a layer gives of tokens behind `start` others, float[1, L, C], with its taps added to the images' tokens."""
    for image in images:
        first, last = max(image.position, start), min(image.end, start + x.shape[1])
        if image.taps is not None and layer < len(image.taps) and first < last:
            tap = image.taps[layer, first - image.position : last - image.position].astype(x.dtype)
            x = x.at[:, first - start : last - start].add(tap)
    return x
