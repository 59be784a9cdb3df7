"""How image features meet the sequence: chosen once for a model, by its config.

- `Slots`: features take the places of the image tokens' embeddings (LLaVA and most others); those of earlier blocks,
  where a projector gives them, go to the first layers (Qwen3-VL, Granite-Docling).
- `Grids`: so do they, and tokens stand on three axes (Qwen2-VL on).
- `CrossAttention`: features stay outside, and layers of their own attend to them (Llama 3.2 Vision).
- `Queries`: query tokens take the image's place, and attend to its features in some layers (QLLaMA).
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from mlx_vlm_mini.config import TwoWay, VLMConfig
from mlx_vlm_mini.decoder.cross_attention import Span
from mlx_vlm_mini.decoder.masks import Blocks, Causal, Prefix, find_blocks
from mlx_vlm_mini.decoder.positions import Axes, PlacedImage
from mlx_vlm_mini.decoder.reading import Memory, Reading, Visibility

from .inputs import InputImage, Inputs

Encode = Callable[[InputImage], mx.array]
"""An image -> its features as `VLM.encode` gives them."""

VISIBLE: dict[TwoWay, Callable[[Inputs, int], Visibility]] = {
    "nothing": lambda inputs, start: Causal(),
    "prompt": lambda inputs, start: Prefix(inputs.prompt_length),
    "images": lambda inputs, start: Blocks(tuple(find_blocks(inputs.slots, start))),
    "images_in_window": lambda inputs, start: Blocks(tuple(find_blocks(inputs.slots, start)), in_windows=True),
    "images_whole": lambda inputs, start: Blocks(tuple(find_blocks(inputs.slots, start)), whole=True),
}
"""By what sees later tokens of its kind, the visibility of a prompt that is read from token `start` on."""


class Fusion(Protocol):
    """How image features meet the sequence."""

    def read(self, model: Any, inputs: Inputs, start: int, encode: Encode) -> Reading:
        """What the decoder reads of a prompt from token `start` on; each image is encoded at most once, and only where
        its features are needed.

        Raises:
            PromptError: the number of slots differs from the number of feature rows.
        """


def _places(inputs: Inputs) -> Iterator[tuple[InputImage, np.ndarray]]:
    """Each image with the positions of its slots."""
    slots = np.flatnonzero(inputs.slots)
    for image in inputs.images:
        yield image, slots[: image.tokens]
        slots = slots[image.tokens :]


def _token_ids(model: Any, inputs: Inputs, start: int) -> mx.array:
    """int[1, L - start]: ids to be looked up; an image token's id may have no row, and its embedding is replaced."""
    ids = np.array(inputs.input_ids[:, start:])
    rows = model.decoder.embed_tokens.weight.shape[0]
    return inputs.input_ids[:, start:] if (ids < rows).all() else mx.array(np.where(ids < rows, ids, 0))


class Slots:
    """Features take the places of the image tokens' embeddings."""

    def read(self, model: Any, inputs: Inputs, start: int, encode: Encode) -> Reading:
        """See `Fusion`."""
        ids, per_layer = _token_ids(model, inputs, start), model.config.decoder.embeddings.per_layer
        embeddings = model.decoder.embed(ids)
        slots = np.flatnonzero(inputs.slots[start:])
        width = embeddings.shape[-1]
        found = [encode(image) for image, places in _places(inputs) if len(places) and places[-1] >= start]
        if found:
            features, scale = mx.concatenate(found)[-len(slots) :, :width], model.config.decoder.scales.image_scale
            features = features if scale == 1 else features * scale
            embeddings[:, mx.array(slots)] = features.astype(embeddings.dtype)
        if per_layer is not None:
            ids = mx.where(mx.array(inputs.slots[start:]), per_layer.pad_token_id, ids)
        return Reading(
            embeddings,
            VISIBLE[model.config.decoder.two_way](inputs, start),
            token_ids=None if per_layer is None else ids,
            prompt_length=inputs.prompt_length,
            **self._more(model, inputs, start, found),
        )

    def _more(self, model: Any, inputs: Inputs, start: int, found: list[mx.array]) -> dict[str, Any]:
        """What else belongs to the reading: features of earlier vision blocks, which are added to what the first layers
        give.

        Args:
            found: features of the images that reach beyond `start`.
        """
        taps = model.config.projector.taps
        if not found or not taps:
            return {}
        slots = np.flatnonzero(inputs.slots[start:])
        features = mx.concatenate(found)[-len(slots) :]  # (slots, C (1 + taps))
        width = model.config.decoder.hidden_size
        zeros = mx.zeros((1, inputs.input_ids.shape[1] - start, width), dtype=features.dtype)
        parts = mx.split(features, 1 + taps, axis=-1)[1:]
        return {"beside": tuple(_placed(zeros, mx.array(slots), part) for part in parts)}


class Grids(Slots):
    """Tokens stand on three axes besides."""

    def _more(self, model: Any, inputs: Inputs, start: int, found: list[mx.array]) -> dict[str, Any]:
        side, placed = model.config.vision.image_size, []
        for image, own in _places(inputs):
            rows, columns = (pixels // side for pixels in image.pixel_values.shape[1:3])
            apart = np.flatnonzero(np.diff(own) > 1) + 1  # text stands between a video's steps (Qwen3-VL)
            times = (0,) if len(apart) else image.times
            placed += [PlacedImage(int(part[0]), rows, columns, times) for part in np.split(own, apart)]
        return {"positions": Axes(tuple(placed)), **super()._more(model, inputs, start, found)}


def _placed(zeros: mx.array, places: mx.array, rows: mx.array) -> mx.array:
    found = mx.array(zeros)
    found[:, places] = rows
    return found


class CrossAttention:
    """Features stay outside of the sequence."""

    def read(self, model: Any, inputs: Inputs, start: int, encode: Encode) -> Reading:
        """See `Fusion`."""
        features, spans = [], []
        for image, places in _places(inputs):
            if places[0] >= start:
                features.append(encode(image))
                seen = image.rows * model.config.vision.num_features
                spans.append(Span(int(places[0]), seen, len(features[-1])))
        memory = Memory(mx.concatenate(features), tuple(spans)) if features else None
        embeddings = model.decoder.embed(inputs.input_ids[:, start:])
        return Reading(embeddings, memory=memory, prompt_length=inputs.prompt_length)


class Queries:
    """Query tokens take the image's place: they are the first of the prompt, and see one another."""

    def read(self, model: Any, inputs: Inputs, start: int, encode: Encode) -> Reading:
        """See `Fusion`."""
        embeddings = model.decoder.embed(_token_ids(model, inputs, start))
        if start:
            return Reading(embeddings, prompt_length=inputs.prompt_length)
        slots = np.flatnonzero(inputs.slots)
        if not len(slots):
            return Reading(embeddings, prompt_length=inputs.prompt_length)
        embeddings[:, mx.array(slots)] = model.query_tokens
        (image,) = inputs.images
        memory = Memory(encode(image))
        return Reading(embeddings, Prefix(len(slots)), memory=memory, prompt_length=inputs.prompt_length)


def choose_fusion(config: VLMConfig) -> Fusion:
    """The fusion of a model of this config."""
    if config.decoder.cross_attention is not None:
        return CrossAttention()
    if config.decoder.queries is not None:
        return Queries()
    return Grids() if config.decoder.has_sections else Slots()
