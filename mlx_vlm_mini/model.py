"""The model: three parts, and where image features enter the sequence."""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_vlm_mini.decoder.cross_attention import ImageCache, ShownImage, Span
from mlx_vlm_mini.decoder.decoder import Decoder
from mlx_vlm_mini.decoder.masks import ImageBlock, find_blocks
from mlx_vlm_mini.decoder.opt import OPTDecoder
from mlx_vlm_mini.decoder.query_attention import Looks, QuerySight
from mlx_vlm_mini.decoder.sections import PlacedImage
from mlx_vlm_mini.layers.types import Recorder
from mlx_vlm_mini.preprocessing.canvas import Canvas, choose_canvas
from mlx_vlm_mini.projectors.arrange import pack
from mlx_vlm_mini.projectors.contrast import Contrast
from mlx_vlm_mini.projectors.merger import ChannelMerger, PatchMerger
from mlx_vlm_mini.projectors.mlp import Projector, join_squares, pixel_shuffle
from mlx_vlm_mini.projectors.pooling import PooledProjector
from mlx_vlm_mini.projectors.qformer import QFormer
from mlx_vlm_mini.projectors.resampler import Resampler
from mlx_vlm_mini.vision.grid import GridVisionTransformer
from mlx_vlm_mini.vision.tiled import TiledVisionTransformer
from mlx_vlm_mini.vision.transformer import VisionTransformer

from .borrow import borrow
from .config import OPTConfig, ProjectorConfig, VLMConfig
from .errors import CheckpointError, PromptError
from .inputs import InputImage, Inputs


def _make_projector(config: ProjectorConfig) -> nn.Module:
    kinds: dict[Any, Any] = {
        Resampler: config.resampler,
        PooledProjector: config.pool,
        ChannelMerger if config.merger is not None and config.merger.by_channel else PatchMerger: config.merger,
        QFormer: config.qformer,
    }
    kind = next((kind for kind, settings in kinds.items() if settings is not None), Projector)
    projector: nn.Module = kind(config)
    return projector


class VLM(nn.Module):
    """A vision-language model.

    pixel_values --vision--> features --projector--> image embeddings --+
    input_ids --decoder.embed--> embeddings <---------------------------+   at the slots
    embeddings --decoder--> hidden states --decoder.logits--> logits

    With cross-attention (Llama 3.2 Vision) image embeddings enter no slot: layers of the decoder look at them (`show`).
    With query tokens (QLLaMA) these stand in the slots, and look at the image in some layers (`show`, too).
    """

    def __init__(self, config: VLMConfig) -> None:
        super().__init__()
        self.config = config
        tower = VisionTransformer if config.vision.tiled is None else TiledVisionTransformer
        self.vision: Any = (tower if config.vision.grid is None else GridVisionTransformer)(config.vision)
        self.projector: Any = _make_projector(config.projector)
        if config.text_alone:
            self.vision, self.projector = nn.Module(), nn.Module()
        text = config.decoder
        self.decoder = OPTDecoder(text) if isinstance(text, OPTConfig) else Decoder(text)
        if config.has_newline:
            self.image_newline = mx.zeros(config.decoder.hidden_size)
        if config.decoder.queries is not None:
            self.query_tokens = mx.zeros((config.decoder.queries.num_query_tokens, config.decoder.hidden_size))
        if config.contrast is not None:
            self.contrast = Contrast(config.vision.feature_size, config.decoder.hidden_size, config.contrast)

    @property
    def dtype(self) -> mx.Dtype:
        """The type that the model computes in."""
        return self.decoder.norm.weight.dtype

    def make_cache(self) -> list[Any]:
        """An empty KV cache, one entry a decoder layer: mlx-lm's, or an `ImageCache`."""
        return self.cache_of(borrow("models.cache").KVCache)

    def cache_of(self, make: Callable[[], Any]) -> list[Any]:
        """The same with entries that `make` gives for the layers that read text."""
        return [ImageCache() if kind == "cross_attention" else make() for kind in self.config.decoder.layer_types]

    def project(
        self, pixel_values: mx.array, instruction: np.ndarray | None = None, looks: Recorder | None = None
    ) -> mx.array:
        """Encode and project rows of pixels at once; `instruction` and `looks` are for a Q-Former, see there."""
        features = self.vision(pixel_values.astype(self.dtype))
        if self.config.vision.grid is not None and self.config.projector.merger is None:
            features = features.flatten(1, 2)
        if self.config.projector.qformer is None:
            return self.projector(features)
        return self.projector(features, None if instruction is None else mx.array(instruction), looks)

    def embed_images(self, pixel_values: mx.array, instruction: np.ndarray | None = None) -> mx.array:
        """Encode and project rows of pixels, images or independent tiles, one by one, so that memory does not grow.

        Args:
            pixel_values: float[B, height, width, 3].
            instruction: int[L], what a Q-Former reads beside them.

        Returns:
            float[B, P, C].
        """
        embeddings = []
        for row in range(pixel_values.shape[0]):
            embeddings.append(self.project(pixel_values[row : row + 1], instruction))
            mx.eval(embeddings[-1])
        return mx.concatenate(embeddings)

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
        merge = self.config.projector.shuffle
        if self.config.vision.grid is not None:
            rows, columns = (side // self.config.vision.patch_size for side in image.pixel_values.shape[1:3])
            numbers = mx.arange(rows * columns).reshape(1, rows, columns, 1)
            return np.array(join_squares(numbers, 1 if merge is None else merge.factor).flatten(0, 2))
        count = self.config.vision.features_at(image.pixel_values.shape[1])
        numbers = mx.arange(image.rows * count).reshape(image.rows, count, 1)
        if self.config.projector.joined is not None:
            numbers = pixel_shuffle(numbers, self.config.projector.joined)
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
        """What stands in an image's slots, float[tokens, C], or what cross-attention looks at; evaluated.

        Raises:
            PromptError: its features are not as many as its slots.
            CheckpointError: the image processor cuts tiles otherwise than config.json says.
        """
        if self.config.decoder.queries is not None:
            features = self.embed_images(mx.array(image.pixel_values))[0]
        elif self.config.vision.tiled is None:
            embeddings = self.embed_images(mx.array(image.pixel_values), image.instruction)
            features = self.arrange(embeddings, image)
        else:  # keys of unused tiles matter only where tokens that see no image attend to all
            features = self.embed_tiled([image])[0]
            features = (features if self.decoder.looks_ahead else features[: image.rows]).flatten(0, 1)
        mx.eval(features)
        return features

    def embed(self, inputs: Inputs, start: int = 0, encode: Callable[[InputImage], mx.array] | None = None) -> mx.array:
        """Embeddings of the prompt from token `start` on, image features in their slots.

        Images are encoded one at a time; those whose slots all lie before `start` are not, and none where
        cross-attention layers look at them (`show`).

        Args:
            encode: in place of `self.encode`, to be spared what was encoded before.

        Returns:
            float[1, L - start, C].

        Raises:
            PromptError: the number of slots differs from the number of feature rows.
            CheckpointError: the image processor cuts tiles otherwise than config.json says.
        """
        embeddings = self.decoder.embed(inputs.input_ids[:, start:])
        count = int(inputs.slots.sum())
        given = sum(image.tokens for image in inputs.images)
        if count != given:
            raise PromptError(f"the prompt has {count} image tokens, the images give {given}")
        if self.config.decoder.cross_attention is not None:
            return embeddings
        positions = np.flatnonzero(inputs.slots[start:])
        if self.config.decoder.queries is not None:
            if len(positions):
                embeddings[:, mx.array(positions)] = self.query_tokens
            return embeddings
        arranged: list[mx.array] = []  # of the last image first
        missing = len(positions)
        for image in reversed(inputs.images):
            if missing <= 0:
                break
            arranged.append((encode or self.encode)(image))
            missing -= image.tokens
        if not arranged:
            return embeddings
        features = mx.concatenate(arranged[::-1])[-len(positions) :, : embeddings.shape[-1]]
        embeddings[:, mx.array(positions)] = features.astype(embeddings.dtype)
        return embeddings

    def show(
        self, inputs: Inputs, start: int = 0, encode: Callable[[InputImage], mx.array] | None = None
    ) -> list[ShownImage | ImageBlock | PlacedImage]:
        """What the decoder has to know of the images besides their embeddings, for tokens from `start` on.

        Where tokens have three positions all images' places, and what else is added to the tokens of those that reach
        behind `start`. With cross-attention layers or query tokens what these look at, of images whose tokens stand at
        `start` or behind; or where those tokens are that see one another. Else nothing. Arguments and errors as of
        `embed`.
        """
        if self.config.decoder.has_sections:
            return [*self._place(inputs, start, encode or self.encode)]
        if self.config.decoder.two_way == "images":
            return [*find_blocks(inputs.slots, start)]
        if self.config.decoder.cross_attention is None and self.config.decoder.queries is None:
            return []
        shown: list[ShownImage | ImageBlock | PlacedImage] = []
        places = np.flatnonzero(inputs.slots)[:: self.decoder.least_chunk]  # where each image's slots begin
        for position, image in zip(places.tolist(), inputs.images, strict=True):
            if position >= start:
                features = (encode or self.encode)(image)
                seen = image.rows * self.config.vision.num_features
                shown.append(ShownImage(Span(position, seen, len(features)), features))
        return shown

    def _place(self, inputs: Inputs, start: int, encode: Callable[[InputImage], mx.array]) -> list[PlacedImage]:
        placed, slots = [], np.flatnonzero(inputs.slots)
        for image in inputs.images:
            own, slots = slots[: image.tokens], slots[image.tokens :]
            rows, columns = (side // self.config.vision.image_size for side in image.pixel_values.shape[1:3])
            taps = None
            if own[-1] >= start and len(self.config.vision.feature_layers) > 1:
                taps = encode(image).reshape(image.tokens, -1, self.config.decoder.hidden_size)[:, 1:].swapaxes(0, 1)
            apart = np.flatnonzero(np.diff(own) > 1) + 1  # text stands between a video's steps (Qwen3-VL)
            for part in np.split(np.arange(len(own)), apart):
                shown = None if taps is None else taps[:, int(part[0]) : int(part[-1]) + 1]
                times = (0,) if len(apart) else image.times
                placed.append(PlacedImage(int(own[part[0]]), rows, columns, shown, times))
        return placed

    def read(
        self, inputs: Inputs, start: int = 0, encode: Callable[[InputImage], mx.array] | None = None
    ) -> tuple[mx.array, list[ShownImage | ImageBlock | PlacedImage]]:
        """What `embed` and `show` give, each image being encoded once for both."""
        found: dict[bytes, mx.array] = {}

        def once(image: InputImage) -> mx.array:
            if image.digest not in found:
                found[image.digest] = (encode or self.encode)(image)
            return found[image.digest]

        return self.embed(inputs, start, once), self.show(inputs, start, once)

    def query(self, features: mx.array, text: mx.array | None = None, looks: Recorder | None = None) -> mx.array:
        """What the query tokens become that look at an image, without a cache.

        Args:
            features: float[P, C], what `encode` gives.
            text: float[1, L, C], embeddings behind the queries; all see one another then.
            looks: takes the queries' weights on the features, layer after layer.

        Returns:
            float[1, Q, C], behind the last norm.
        """
        x = self.query_tokens[None]
        x = x if text is None else mx.concatenate([x, text.astype(x.dtype)], axis=1)
        sight = QuerySight(None, features[None], looks)
        for layer, kind in zip(self.decoder.layers, self.config.decoder.layer_types, strict=True):
            mask = sight if kind == "query_attention" else None
            x = layer(x, mask=mask, rope=self.decoder.rope, cache=None, attentions=None)
        return self.decoder.norm(x[:, : len(self.query_tokens)])

    @property
    def mixes(self) -> bool:
        """Whether an image's slots show mixtures of all its features (`mixing`)."""
        return self.config.takes_one_image or self.config.projector.resampler is not None

    def mixing(self, image: InputImage, encode: Callable[[InputImage], mx.array] | None = None) -> np.ndarray | None:
        """How an image's slots are mixed of the vision tower's features: float32[tokens, P], rows that sum to 1; None
        where slots show features of their own (`sources`).

        Of query tokens it is the mean over heads and layers of what they look at, of a resampler's the mean over heads.
        """
        if not self.mixes:
            return None
        if self.config.projector.resampler is not None:
            features = self.vision(mx.array(image.pixel_values).astype(self.dtype))
            return np.array(self.projector.weights(features)[0])
        qformer = self.config.projector.qformer
        looks = Looks(len(self.query_tokens) if qformer is None else qformer.num_query_tokens)
        if qformer is None:
            self.query((encode or self.encode)(image), looks=looks)
        else:  # what was kept of the image is behind the queries
            self.project(mx.array(image.pixel_values), image.instruction, looks)
        return np.array(looks.mean())

    def __call__(self, inputs: Inputs, cache: Sequence[Any] | None = None) -> mx.array:
        """The scores of every token of the prompt: float[1, L, vocab_size]."""
        embeddings, images = self.read(inputs)
        return self.decoder.logits(self.decoder(embeddings, cache, images=images))
