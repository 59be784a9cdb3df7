"""Cross-attention: queries of the text, keys and values of the images, these computed once and kept.

Source: Flamingo (arXiv:2204.14198) puts such layers, gated, between a language model's own; Llama 3.2 Vision's are in
models/llama3/multimodal/model.py of meta-llama/llama-models.

An image's token says from where on it is seen: by itself and what follows, up to the next image's. Images whose tokens
follow one another are seen together:

    token   text  <A>  text  <B>  <C>  text  text
    sees    none  A    A     B    B C  B C   B C
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_vlm_mini.config import DecoderConfig
from mlx_vlm_mini.layers.attention import Attention
from mlx_vlm_mini.layers.types import Recorder


class Span(NamedTuple):
    """The keys of an image: `position` of its token in the prompt, keys that tokens see, and keys in all.

    They differ where an image's unused tiles have keys, too; those come last.
    """

    position: int
    seen: int
    held: int


@dataclass(frozen=True)
class Sight:
    """What tokens look at.

    Attributes:
        keys: the part of all keys that matters.
        mask: bool[L, S] of that part; None where every token sees all of it.
        sees: bool[L, 1], which tokens see an image at all, in whose mask stands true; None where all do. Of rows of a
            batch the mask is bool[B, 1, 1, S], and this bool[B, 1, 1].
    """

    keys: slice
    mask: mx.array | None
    sees: mx.array | None


def look(spans: Sequence[Span], length: int, offset: int, *, blind_attend: bool, whole: bool = False) -> Sight | None:
    """What `length` tokens after `offset` others see of images.

    Args:
        spans: of all images of the prompt, in order; those that come later among them.
        blind_attend: tokens that see no image attend to every key of all images; else it does not count what they see.
        whole: all keys are wanted, not the part that matters.

    Returns:
        None where there is nothing to look at.
    """
    at = np.arange(offset, offset + length)
    places = np.array([span.position for span in spans], dtype=np.int64)
    begins = np.flatnonzero(np.diff(places, prepend=-2) != 1)  # of runs
    ends = np.append(places[begins], np.iinfo(np.int64).max)[np.searchsorted(begins, np.arange(len(spans)), "right")]
    sees = (places <= at[:, None]) & (at[:, None] < ends)  # (L, images)
    blind = np.asarray(~sees.any(axis=1))
    seen = np.flatnonzero(sees.any(axis=0))
    whole = whole or (blind_attend and bool(blind.any()))
    if not len(spans) or not (whole or len(seen)):
        return None
    first, last = (0, len(spans) - 1) if whole else (int(seen[0]), int(seen[-1]))
    columns, counts = [], []
    for image in range(first, last + 1):
        columns += [sees[:, image] | blind, blind]
        counts += [spans[image].seen, spans[image].held - spans[image].seen]
    if not whole:
        counts[-1] = 0
    start = sum(span.held for span in spans[:first])
    kept = [index for index, count in enumerate(counts) if count]
    mask = None
    if not all(columns[index].all() for index in kept):
        mask = mx.array(np.repeat(np.stack(columns, axis=1), counts, axis=1))
    return Sight(slice(start, start + sum(counts)), mask, mx.array(~blind[:, None]) if blind.any() else None)


class ImageCache:
    """Keys and values of a cross-attention layer, of a prompt's images in order.

    Attributes:
        keys, values: float[1, H, S, D]; None while there are none.
    """

    def __init__(self) -> None:
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    def add(self, keys: mx.array, values: mx.array) -> None:
        """Append those of further images."""
        if self.keys is not None and self.values is not None:
            keys = mx.concatenate([self.keys, keys], axis=2)
            values = mx.concatenate([self.values, values], axis=2)
        self.keys, self.values = keys, values

    def cut(self, count: int) -> None:
        """Give up all but the first keys. They are copied, so that what is given up does not stay in memory."""
        if self.keys is not None and count < self.keys.shape[2]:
            self.keys, self.values = (
                mx.contiguous(each[..., :count, :]) if count and each is not None else None
                for each in (self.keys, self.values)
            )

    def empty(self) -> bool:
        """Whether it holds nothing."""
        return self.keys is None

    @staticmethod
    def merge(caches: "Sequence[tuple[ImageCache, Sequence[Span], int]]") -> "ImageRows":
        """See `ImageRows.merge`."""
        return ImageRows.merge(caches)

    @property
    def state(self) -> list[mx.array]:
        """What has to be evaluated, as of mlx-lm's caches."""
        return [each for each in (self.keys, self.values) if each is not None]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(each.nbytes for each in self.state)


class ImageRows:
    """What rows of a batch attend to of their images: the keys that tokens after all of them see, padded at the end.

    Attributes:
        keys, values: float[B, H, S, D]; None where no row has images.
        counts: int[B] (numpy), keys of each row; 0 where it has no image.
    """

    def __init__(self, keys: mx.array | None, values: mx.array | None, counts: np.ndarray) -> None:
        self.keys, self.values, self.counts = keys, values, counts
        self._sight: Sight | None = None

    @classmethod
    def merge(cls, caches: Sequence[tuple[ImageCache, Sequence[Span], int]]) -> "ImageRows":
        """Rows of caches, each with the spans of its images and the number of tokens that were read."""
        rows = [cls._of(*each) for each in caches]
        for row in rows[1:]:
            rows[0].extend(row)
        return rows[0]

    @classmethod
    def _of(cls, cache: ImageCache, spans: Sequence[Span], length: int) -> "ImageRows":
        sight = look(spans, 1, length, blind_attend=False)
        if sight is None or cache.keys is None or cache.values is None:
            return cls(None, None, np.zeros(1, dtype=np.int64))
        keys, values = (each[..., sight.keys, :] for each in (cache.keys, cache.values))
        if sight.mask is not None:
            seen = mx.array(np.flatnonzero(np.array(sight.mask[0])))
            keys, values = keys[..., seen, :], values[..., seen, :]
        return cls(keys, values, np.array([keys.shape[2]]))

    def extend(self, other: "ImageRows") -> None:
        """Append the rows of another batch."""
        known = next((each for each in (self.keys, other.keys) if each is not None), None)
        if known is not None:
            longest = max(each.keys.shape[2] for each in (self, other) if each.keys is not None)
            (self.keys, self.values), more = self._padded(known, longest), other._padded(known, longest)
            self.keys = mx.concatenate([self.keys, more[0]])
            self.values = mx.concatenate([self.values, more[1]])
        self.counts, self._sight = np.concatenate([self.counts, other.counts]), None

    def _padded(self, known: mx.array, length: int) -> tuple[mx.array, mx.array]:
        if self.keys is None or self.values is None:
            zeros = mx.zeros((len(self.counts), known.shape[1], length, known.shape[3]), dtype=known.dtype)
            return zeros, zeros
        pad = [(0, 0), (0, 0), (0, length - self.keys.shape[2]), (0, 0)]
        return mx.pad(self.keys, pad), mx.pad(self.values, pad)

    def filter(self, rows: mx.array) -> None:
        """Keep only these rows, in this order; padding that all of them have goes."""
        self.counts, self._sight = self.counts[np.array(rows)], None
        longest = int(self.counts.max())
        if not longest:
            self.keys = self.values = None
        elif self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[rows, :, :longest], self.values[rows, :, :longest]

    def extract(self, row: int) -> ImageCache:
        """One row's."""
        own, count = ImageCache(), int(self.counts[row])
        if count and self.keys is not None and self.values is not None:
            own.add(self.keys[row : row + 1, :, :count], self.values[row : row + 1, :, :count])
        return own

    @property
    def sight(self) -> Sight | None:
        """What each row's tokens look at; None where no row has images."""
        if self._sight is None and self.keys is not None:
            keys, sees = self.keys.shape[2], self.counts > 0
            mask = (np.arange(keys) < self.counts[:, None]) | ~sees[:, None]
            self._sight = Sight(
                slice(None),
                None if mask.all() else mx.array(mask[:, None, None]),
                None if sees.all() else mx.array(sees[:, None, None]),
            )
        return self._sight

    def empty(self) -> bool:
        """Whether no row has images."""
        return self.keys is None

    @property
    def state(self) -> list[mx.array]:
        """What has to be evaluated, as of mlx-lm's caches."""
        return [each for each in (self.keys, self.values) if each is not None]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(each.nbytes for each in self.state)


class _Seeing:
    """Hands weights on, block by block of queries, 0 where a token sees no image."""

    def __init__(self, recorder: Recorder, sees: mx.array) -> None:
        self._recorder, self._sees, self._done = recorder, sees, 0

    def append(self, weights: mx.array, /) -> None:
        sees = self._sees[self._done : self._done + weights.shape[2]]
        self._done += weights.shape[2]
        self._recorder.append(weights * sees)


class CrossAttention(Attention):
    """Grouped queries of the text on keys and values of images; queries and keys are normed head by head."""

    def __init__(self, config: DecoderConfig) -> None:
        heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        super().__init__(config.hidden_size, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim)
        self.q_norm = nn.RMSNorm(dim, eps=config.norms.rms_norm_eps)
        self.k_norm = nn.RMSNorm(dim, eps=config.norms.rms_norm_eps)

    def keys_values(self, memory: mx.array) -> tuple[mx.array, mx.array]:
        """float[1, S, C] -> float[1, H, S, D], twice; laid out head by head, once: else each step would copy them for
        its product."""
        k, v = super().keys_values(memory)
        return mx.contiguous(k), mx.contiguous(v)

    def look(self, x: mx.array, sight: Sight, cache: "ImageCache | ImageRows", attentions: Recorder | None) -> mx.array:
        """float[B, L, C] -> float[B, L, C]. Weights that are asked for are 0 where a token sees no image."""
        assert cache.keys is not None and cache.values is not None
        memory = cache.keys[..., sight.keys, :], cache.values[..., sight.keys, :]
        if attentions is not None and sight.sees is not None:
            attentions = _Seeing(attentions, sight.sees)
        return self(x, memory=memory, mask=sight.mask, attentions=attentions)
