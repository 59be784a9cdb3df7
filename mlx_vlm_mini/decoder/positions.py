"""Where tokens stand: one number each, or three on as many axes where pictures are among them (M-RoPE).

Sources: arXiv:2409.12191, models/qwen2_vl and models/qwen3_vl of huggingface/transformers.

On three axes each token has a position in time, down and across. Of text they are equal and count on; a picture's
tokens share one time, and rows and columns begin there. What follows begins after the longer side:

    token   text  text  a picture of 2 x 3      text  text
    time    0     1     2  2  2  2  2  2        5     6
    down    0     1     2  2  2  3  3  3        5     6
    across  0     1     2  3  4  2  3  4        5     6

A video is such pictures one after another, each with a time of its own; what follows begins after the last of these
times, too. So the authors compute it. In transformers 5.23 text after a video begins after the longer side while the
times still run, and an answer after both; where the times do not reach beyond that side, all is equal.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import numpy as np


class Positions(Protocol):
    """Where the tokens of a sequence stand."""

    def at(self, offset: int | mx.array, length: int) -> int | mx.array | np.ndarray:
        """Of `length` tokens after `offset` others (int[B]: of each row of a batch): where the first one stands, the
        others counting on; or where each stands on three axes, int[3, length]."""

    def within(self, length: int) -> "Positions":
        """What is known of a sequence's first `length` tokens."""

    @property
    def shift(self) -> int | tuple[int, ...]:
        """By how much positions after all that is known differ from the numbers of tokens before them."""


@dataclass(frozen=True)
class Counting:
    """Tokens count on; `shift` is added, of rows of a batch to each its own."""

    shift: int | tuple[int, ...] = 0

    def at(self, offset: int | mx.array, length: int) -> int | mx.array:
        """See `Positions`."""
        return offset + (self.shift if isinstance(self.shift, int) else mx.array(self.shift))

    def within(self, length: int) -> "Counting":
        """The same."""
        return self


@dataclass(frozen=True)
class PlacedImage:
    """A picture among a prompt's tokens.

    Attributes:
        position: of its first token in the prompt.
        rows, columns: of its tokens; of a video, of those of each time.
        times: of a video's steps, from 0 on; a picture has one.
    """

    position: int
    rows: int
    columns: int
    times: tuple[int, ...] = (0,)

    @property
    def tokens(self) -> int:
        return len(self.times) * self.rows * self.columns

    @property
    def end(self) -> int:
        return self.position + self.tokens

    @property
    def shift(self) -> int:
        """How much smaller, below 0, positions are after it than its number of tokens makes them."""
        return max(self.rows, self.columns, self.times[-1] + 1) - self.tokens


@dataclass(frozen=True)
class Axes:
    """Tokens of text and pictures on three axes."""

    images: tuple[PlacedImage, ...] = ()

    @property
    def shift(self) -> int:
        """See `Positions`."""
        return sum(image.shift for image in self.images)

    def at(self, offset: int | mx.array, length: int) -> int | mx.array | np.ndarray:
        """See `Positions`; of text after all pictures, one number."""
        if isinstance(offset, mx.array) or all(image.end <= offset for image in self.images):
            return offset + self.shift
        return token_positions(self.images, offset, length)

    def within(self, length: int) -> "Axes":
        """Without the pictures that do not end there."""
        return Axes(tuple(image for image in self.images if image.end <= length))


def token_positions(images: Sequence[PlacedImage], start: int, length: int) -> np.ndarray:
    """Positions of `length` tokens after `start` others, in time, down and across: int[3, length]."""
    end, done, shift = start + length, 0, 0
    found = np.empty((3, end), dtype=np.int64)
    for image in images:
        if image.position >= end:
            break
        found[:, done : image.position] = np.arange(done, image.position) + shift
        step, place = np.divmod(np.arange(image.tokens)[: end - image.position], image.rows * image.columns)
        along = np.stack([np.array(image.times)[step], *np.divmod(place, image.columns)])
        found[:, image.position : image.end] = along + image.position + shift
        shift += image.shift
        done = min(image.end, end)
    found[:, done:] = np.arange(done, end) + shift
    return found[:, start:]
