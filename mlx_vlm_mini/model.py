"""The model: three parts, and where image features enter the sequence."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .borrow import borrow
from .config import VLMConfig
from .decoder import Decoder
from .errors import PromptError
from .projector import Projector
from .vision import VisionTransformer


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What `processor(messages)` gives: everything the model needs.

    Attributes:
        input_ids: int32[1, L]; at an image's slots stands the image token's id.
        pixel_values: float32[B, height, width, 3], normalised; B rows over all images, in the prompt's order. None for
            text alone.
        slots: bool[L] (numpy): true where a row of image features replaces the token's embedding.
        digests: one a row of `pixel_values`: SHA-256 of its pixels, by which a cache tells images apart.
    """

    input_ids: mx.array
    pixel_values: mx.array | None
    slots: np.ndarray
    digests: tuple[bytes, ...] = ()


class VLM(nn.Module):
    """A vision-language model.

    pixel_values --vision--> features --projector--> image embeddings --+
    input_ids --decoder.embed_tokens--> embeddings <--------------------+   at the slots
    embeddings --decoder--> hidden states --decoder.logits--> logits
    """

    def __init__(self, config: VLMConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionTransformer(config.vision)
        self.projector = Projector(config.projector)
        self.decoder = Decoder(config.decoder)

    @property
    def dtype(self) -> mx.Dtype:
        """The type that the model computes in."""
        return self.decoder.norm.weight.dtype

    def make_cache(self) -> list[Any]:
        """An empty KV cache (mlx-lm's), one entry a decoder layer."""
        cache = borrow("models.cache").KVCache
        return [cache() for _ in self.decoder.layers]

    def embed_images(self, pixel_values: mx.array) -> mx.array:
        """Encode and project images one by one, so that memory does not grow with their number.

        Args:
            pixel_values: float[B, height, width, 3].

        Returns:
            float[B, P, C].
        """
        embeddings = []
        for row in range(pixel_values.shape[0]):
            embeddings.append(self.projector(self.vision(pixel_values[row : row + 1].astype(self.dtype))))
            mx.eval(embeddings[-1])
        return mx.concatenate(embeddings)

    def embed(self, inputs: Inputs, start: int = 0) -> mx.array:
        """Embeddings of the prompt from token `start` on, image features in their slots.

        Images whose slots all lie before `start` are not encoded.

        Returns:
            float[1, L - start, C].

        Raises:
            PromptError: the number of slots differs from the number of feature rows.
        """
        embeddings = self.decoder.embed_tokens(inputs.input_ids[:, start:])
        count = int(inputs.slots.sum())
        images = 0 if inputs.pixel_values is None else inputs.pixel_values.shape[0]
        per_image = self.config.vision.num_features
        if count != images * per_image:
            raise PromptError(f"the prompt has {count} image tokens, the images give {images * per_image}")
        positions = np.flatnonzero(inputs.slots[start:])
        if inputs.pixel_values is None or not len(positions):
            return embeddings
        needed = -(-len(positions) // per_image)
        features = self.embed_images(inputs.pixel_values[-needed:])
        features = features.reshape(-1, features.shape[-1])[-len(positions) :]
        embeddings[:, mx.array(positions)] = features.astype(embeddings.dtype)
        return embeddings

    def __call__(self, inputs: Inputs, cache: Sequence[Any] | None = None) -> mx.array:
        """The scores of every token of the prompt: float[1, L, vocab_size]."""
        return self.decoder.logits(self.decoder(self.embed(inputs), cache))
