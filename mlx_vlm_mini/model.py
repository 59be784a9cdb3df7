"""The model: a vision tower, a projector and a decoder; what an image becomes on its way into the sequence."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from math import isqrt
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_vlm_mini.decoder.decoder import Decoder
from mlx_vlm_mini.decoder.masks import Prefix
from mlx_vlm_mini.decoder.query_attention import Looks
from mlx_vlm_mini.decoder.reading import Memory, Reading
from mlx_vlm_mini.decoder.state import State
from mlx_vlm_mini.drawing.parts.drawer import Drawer
from mlx_vlm_mini.layers.types import Recorder
from mlx_vlm_mini.preprocessing.canvas import Canvas, choose_canvas
from mlx_vlm_mini.projectors import make_projector
from mlx_vlm_mini.projectors.arrange import pack
from mlx_vlm_mini.projectors.contrast import Contrast
from mlx_vlm_mini.projectors.mlp import pixel_shuffle
from mlx_vlm_mini.vision import make_tower
from mlx_vlm_mini.vision.tower import join_squares

from .config import VLMConfig
from .errors import CheckpointError, PromptError
from .fusion import Encode, choose_fusion
from .inputs import InputImage, Inputs


class VLM(nn.Module):
    """A vision-language model.

    pixel_values --vision--> features --projector--> image embeddings --+
    input_ids --decoder.embed--> embeddings <---------------------------+   as `fusion` says
    embeddings --decoder--> hidden states --decoder.logits--> logits
    """

    def __init__(self, config: VLMConfig) -> None:
        super().__init__()
        self.config = config
        self.vision: Any = nn.Module() if config.text_alone else make_tower(config.vision)
        self.projector: Any = nn.Module() if config.text_alone else make_projector(config.projector)
        self.decoder = Decoder(config.decoder)
        self.fusion = choose_fusion(config)
        if config.has_newline:
            self.image_newline = mx.zeros(config.decoder.hidden_size)
        if config.decoder.queries is not None:
            self.query_tokens = mx.zeros((config.decoder.queries.num_query_tokens, config.decoder.hidden_size))
        if config.contrast is not None:
            self.contrast = Contrast(config.vision.feature_size, config.decoder.hidden_size, config.contrast)
        if config.drawing is not None:
            self.drawing = Drawer(config.drawing)

    @property
    def dtype(self) -> mx.Dtype:
        """The type that the model computes in."""
        return self.decoder.norm.weight.dtype

    def make_state(self, make: Callable[[], Any] | None = None) -> State:
        """An empty state of a sequence; see `Decoder.make_state`."""
        return self.decoder.make_state(make)

    def project(
        self,
        features: mx.array,
        instruction: np.ndarray | None = None,
        looks: Recorder | None = None,
        tokens: int | None = None,
    ) -> mx.array:
        """Features as the tower gives them, of all rows of an image -> embeddings float[B, P, C].

        Args:
            instruction: int[L], what a Q-Former reads beside them.
            looks: takes the weights of a Q-Former's queries.
            tokens: of a row, where a projector can give more or fewer.
        """
        if self.config.vision.grid is not None and not self.config.projector.reads_grid:
            features = features.flatten(1, 2)
        if self.config.projector.connector is not None:
            return self.projector(features, tokens)
        if self.config.projector.qformer is None:
            return self.projector(features)
        return self.projector(features, None if instruction is None else mx.array(instruction), looks)

    def embed_images(
        self, pixel_values: mx.array, instruction: np.ndarray | None = None, tokens: int | None = None
    ) -> mx.array:
        """Encode and project an image's rows of pixels: float[B, height, width, 3] -> float[B, P, C]; evaluated.

        Args:
            instruction, tokens: see `project`.
        """
        embeddings = self.project(self.vision(pixel_values.astype(self.dtype)), instruction, tokens=tokens)
        mx.eval(embeddings)
        return embeddings

    def embed_tiled(self, images: Sequence[InputImage]) -> mx.array:
        """Encode and project images whose tiles see one another, all at once: float[images, max_tiles, P, C].

        Raises:
            CheckpointError: the image processor cuts tiles otherwise than config.json says.
        """
        vision = self.config.vision
        assert vision.tiled is not None
        canvas = Canvas(tile_size=vision.image_size, max_tiles=vision.tiled.max_tiles)
        grids = [choose_canvas(image.size, canvas) for image in images]
        for image, (rows, columns) in zip(images, grids, strict=True):
            if image.rows != rows * columns:
                raise CheckpointError(
                    f"the image processor cuts an image of {image.size[1]}x{image.size[0]} pixels into {image.rows} "
                    f"tiles, config.json into {rows * columns}: preprocessor_config.json does not fit it"
                )
        pixels = np.zeros((len(images), canvas.max_tiles, *images[0].pixel_values.shape[1:]), dtype=np.float32)
        for place, image in zip(pixels, images, strict=True):
            place[: image.rows] = image.pixel_values
        return self.projector(self.vision(mx.array(pixels).astype(self.dtype), grids))

    def arrange(self, features: mx.array, image: InputImage) -> mx.array:
        """The embeddings of an image's rows, float[rows, P, C], as they stand in its slots: float[tokens, C].

        Raises:
            PromptError: they are not as many as its slots.
        """
        return self._arrange(features, self.image_newline if self.config.has_newline else None, image)

    def sources(self, image: InputImage) -> np.ndarray:
        """Which of the vision tower's features an image's slots show: int[tokens, n], n where the projector joins n.

        Features are numbered as the tower gives them, row of pixels after row; -1 is a newline, which shows none.

        Raises:
            PromptError, CheckpointError: as `arrange`.
        """
        merge = self.config.projector.joined
        if self.config.vision.grid is not None:
            sources, done = [], 0
            for pixels in image.pieces:
                rows, columns = (side // self.config.vision.feature_side for side in pixels.shape[1:3])
                count = len(pixels) * rows * columns
                numbers = mx.arange(done, done + count).reshape(-1, rows, columns, 1)
                sources.append(np.array(join_squares(numbers, 1 if merge is None else merge.factor).flatten(0, 2)))
                done += count
            return np.concatenate(sources)
        count = self.config.vision.features_at(image.pixel_values.shape[1])
        numbers = mx.arange(image.rows * count).reshape(image.rows, count, 1)
        joined = self.config.projector.joined
        if joined is not None and self.config.projector.connector is not None:  # by one of two ways
            joined = replace(joined, factor=isqrt(count * image.rows // image.tokens))
        if joined is not None:
            numbers = pixel_shuffle(numbers, joined)
        newline = mx.full(numbers.shape[-1:], -1) if self.config.has_newline else None
        corners = [(0, 0)] if self.config.most_tiles is None else list(product((0, 1), (0, 1)))
        found = [np.array(self._arrange(numbers, newline, image, corner)) for corner in corners]
        shrunk = any((each != found[0]).any() for each in found)  # then each of its features is made of four
        return np.concatenate(found, axis=-1) if shrunk else found[0]

    def _arrange(
        self, features: mx.array, newline: mx.array | None, image: InputImage, corner: tuple[int, int] | None = None
    ) -> mx.array:
        pinpoints, merge = self.config.image_grid_pinpoints, self.config.tile_merge
        if pinpoints is None:
            features = features.flatten(0, 1)
        else:
            tile_size = self.config.vision.image_size
            most = self.config.most_tiles
            options: dict[str, Any] = {"merge": merge or "unpad", "most_tiles": most, "corner": corner}
            features = pack(features, newline, image.size, pinpoints, tile_size=tile_size, **options)
        if len(features) != image.tokens:
            height, width = image.size
            raise PromptError(
                f"the prompt has {image.tokens} tokens for an image of {width}x{height} pixels, the image gives "
                f"{len(features)}"
            )
        return features

    def encode(self, image: InputImage) -> mx.array:
        """What stands in an image's slots, float[tokens, C], or what cross-attention attends to; evaluated.

        Raises:
            PromptError: its features are not as many as its slots.
            CheckpointError: the image processor cuts tiles otherwise than config.json says.
        """
        if self.config.decoder.queries is not None:
            features = self.embed_images(mx.array(image.pixel_values))[0]
        elif self.config.vision.tiled is None:
            tokens = image.tokens // image.rows
            parts = [self.embed_images(mx.array(pixels), image.instruction, tokens) for pixels in image.pieces]
            embeddings = mx.concatenate([part.flatten(0, 1) for part in parts])[None] if len(parts) > 1 else parts[0]
            features = self.arrange(embeddings, image)
        else:  # keys of unused tiles matter only where tokens that see no image attend to all
            features = self.embed_tiled([image])[0]
            features = (features if self.decoder.looks_ahead else features[: image.rows]).flatten(0, 1)
        mx.eval(features)
        return features

    def read(self, inputs: Inputs, start: int = 0, encode: Encode | None = None) -> Reading:
        """What the decoder reads of a prompt from token `start` on; each image is encoded at most once.

        Args:
            encode: in place of `self.encode`, to be spared what was encoded before.

        Raises:
            PromptError: the number of slots differs from the number of feature rows.
            CheckpointError: the image processor cuts tiles otherwise than config.json says.
        """
        slots, named = int(inputs.slots.sum()), sum(image.tokens for image in inputs.images)
        if slots != named:
            raise PromptError(f"the prompt has {slots} image tokens, the images give {named}")
        found: dict[bytes, mx.array] = {}

        def once(image: InputImage) -> mx.array:
            if image.digest not in found:
                found[image.digest] = (encode or self.encode)(image)
            return found[image.digest]

        return self.fusion.read(self, inputs, start, once)

    def query(self, features: mx.array, text: mx.array | None = None, looks: Recorder | None = None) -> mx.array:
        """What the query tokens become that attend to an image, without a cache.

        Args:
            features: float[P, C], what `encode` gives.
            text: float[1, L, C], embeddings after the queries; all see one another then.
            looks: takes the queries' weights on the features, layer after layer.

        Returns:
            float[1, Q, C], after the last norm.
        """
        x = self.query_tokens[None]
        x = x if text is None else mx.concatenate([x, text.astype(x.dtype)], axis=1)
        reading = Reading(x, Prefix(x.shape[1]), memory=Memory(features, looks=looks))
        return self.decoder(reading)[:, : len(self.query_tokens)]

    @property
    def mixes(self) -> bool:
        """Whether an image's slots show mixtures of all its features (`mixing`)."""
        return self.config.takes_one_image or self.config.projector.resampler is not None

    def mixing(self, image: InputImage, encode: Encode | None = None) -> np.ndarray | None:
        """How an image's slots are mixed of the vision tower's features: float32[tokens, P], rows that sum to 1; None
        where slots show features of their own (`sources`).

        Of query tokens it is the mean over heads and layers of what they attend to, of a resampler's the mean over
        heads.
        """
        if not self.mixes:
            return None
        pixel_values = mx.array(image.pixel_values).astype(self.dtype)
        if self.config.projector.resampler is not None:
            return np.array(self.projector.weights(self.vision(pixel_values))[0])
        qformer = self.config.projector.qformer
        looks = Looks(len(self.query_tokens) if qformer is None else qformer.num_query_tokens)
        if qformer is None:
            self.query((encode or self.encode)(image), looks=looks)
        else:  # what was kept of the image is what the queries became
            self.project(self.vision(pixel_values), image.instruction, looks)
        return np.array(looks.mean())

    def __call__(self, inputs: Inputs, state: State | None = None) -> mx.array:
        """The scores of every token of the prompt: float[1, L, vocab_size]."""
        return self.decoder.logits(self.decoder(self.read(inputs), state))
