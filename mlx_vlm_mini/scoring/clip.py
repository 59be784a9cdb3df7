"""CLIP: how well texts fit images, by the cosine between the vectors that two towers give.

Image and text meet nowhere before those vectors: a model without cross-modal attention, beside which the others are to
be seen. Source: arXiv:2103.00020; modeling_clip.py of huggingface/transformers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_vlm_mini.checkpoints.folder import open_checkpoint
from mlx_vlm_mini.checkpoints.hub import find_folder
from mlx_vlm_mini.checkpoints.weights import load_whole
from mlx_vlm_mini.config import VisionConfig
from mlx_vlm_mini.errors import CheckpointError, PromptError
from mlx_vlm_mini.families.parts.configs import activation, clip_weights, vision_tower
from mlx_vlm_mini.files import read_json
from mlx_vlm_mini.images.source import ImageSource, open_image
from mlx_vlm_mini.preprocessing.pixels import preprocess
from mlx_vlm_mini.preprocessing.settings import ImageSettings, image_settings
from mlx_vlm_mini.text.tokenizer import Tokenizer, load_tokenizer
from mlx_vlm_mini.vision.transformer import Block, VisionTransformer

_TEXT = {
    "vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
    "num_attention_heads": 8, "max_position_embeddings": 77, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}  # fmt: skip
_VISION = clip_weights("vision_model.", post_norm=True)
WEIGHTS = {
    **_VISION,
    **{
        theirs.replace("vision_model.", "text_model."): ours.replace("vision.", "text.")
        for theirs, ours in _VISION.items()
        if ours is not None and ".blocks." in ours
    },
    "text_model.embeddings.token_embedding": "text.embed_tokens",
    "text_model.embeddings.position_embedding.weight": "text.pos_embed",
    "text_model.embeddings.position_ids": None,
    "text_model.final_layer_norm": "text.norm",
    "visual_projection": "visual_projection",
    "text_projection": "text_projection",
    "logit_scale": "logit_scale",
}


@dataclass(frozen=True)
class CLIPConfig:
    """Both towers in our terms.

    Attributes:
        text: the text tower's blocks, which are those of a vision transformer; its other fields mean nothing.
        vocab_size, max_length: tokens that there are, and that a text may have.
        end_token_id: where the vector of a text is read; None reads it at the token of the highest id, as OpenAI does.
        projection_dim: length of the vectors.
    """

    vision: VisionConfig
    text: VisionConfig
    vocab_size: int
    max_length: int
    end_token_id: int | None
    projection_dim: int


def read_config(hf: Mapping[str, Any]) -> CLIPConfig:
    """config.json of a CLIP checkpoint in our terms.

    Raises:
        CheckpointError: it describes no CLIP model.
    """
    if hf.get("model_type") != "clip":
        raise CheckpointError(f"config.json says model_type {hf.get('model_type')!r}, and only CLIP can be scored with")
    vision_part, text = hf.get("vision_config") or {}, {**_TEXT, **(hf.get("text_config") or {})}
    vision = vision_tower(
        {**vision_part, "model_type": "clip_vision_model"}, feature_layers=-1, drop_first_feature=False, post_norm=True
    )
    blocks = replace(
        vision,
        hidden_size=text["hidden_size"],
        intermediate_size=text["intermediate_size"],
        num_hidden_layers=text["num_hidden_layers"],
        num_attention_heads=text["num_attention_heads"],
        hidden_act=activation(text["hidden_act"]),
        layer_norm_eps=text["layer_norm_eps"],
        feature_layers=(text["num_hidden_layers"],),
    )
    end = text["eos_token_id"]  # 2 stands in OpenAI's files and is no token of theirs
    return CLIPConfig(
        vision=vision,
        text=blocks,
        vocab_size=text["vocab_size"],
        max_length=text["max_position_embeddings"],
        end_token_id=None if end == 2 else end,
        projection_dim=hf.get("projection_dim", 512),
    )


class TextTower(nn.Module):
    """A causal transformer over tokens: int32[B, L] -> float[B, L, C]."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        width = config.text.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.pos_embed = mx.zeros((config.max_length, width))
        self.blocks = [Block(config.text) for _ in range(config.text.num_hidden_layers)]
        self.norm = nn.LayerNorm(width, eps=config.text.layer_norm_eps)

    def __call__(self, input_ids: mx.array) -> mx.array:
        x = self.embed_tokens(input_ids) + self.pos_embed[: input_ids.shape[1]]
        for block in self.blocks:
            x = block(x, mask="causal")
        return self.norm(x)


class CLIP(nn.Module):
    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionTransformer(config.vision)
        self.text = TextTower(config)
        self.visual_projection = nn.Linear(config.vision.hidden_size, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(config.text.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = mx.array(0.0)

    def encode_images(self, pixel_values: mx.array) -> mx.array:
        """Vectors of length 1, float[B, D], of float[B, side, side, 3]."""
        return _unit(self.visual_projection(self.vision(pixel_values)[:, 0]))

    def encode_texts(self, input_ids: mx.array) -> mx.array:
        """Vectors of length 1, float[B, D], of int32[B, L]; what stands behind a text's end token does not matter."""
        end = self.config.end_token_id
        ends = mx.argmax(input_ids if end is None else input_ids == end, axis=1)
        x = self.text(input_ids)
        return _unit(self.text_projection(x[mx.arange(len(x)), ends]))

    def __call__(self, pixel_values: mx.array, input_ids: mx.array) -> mx.array:
        """float[images, texts]: the cosines, times the learned scale."""
        return mx.exp(self.logit_scale) * (self.encode_images(pixel_values) @ self.encode_texts(input_ids).T)


def _unit(x: mx.array) -> mx.array:
    return x / mx.linalg.norm(x, axis=-1, keepdims=True)


class Scorer:
    """Says how well texts fit images.

    scorer = load_scorer("openai/clip-vit-base-patch32")
    scorer.probabilities(["photo.jpg"], ["a cat", "a dog"])
    """

    def __init__(self, model: CLIP, tokenizer: Tokenizer, settings: ImageSettings) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.image_settings = settings

    def tokenize(self, texts: Sequence[str]) -> mx.array:
        """int32[B, L]: each text between the tokenizer's special tokens, shorter ones filled with their end token.

        Raises:
            PromptError: a text is longer than the model takes.
        """
        most, rows = self.model.config.max_length, [self.tokenizer.encode(text) for text in texts]
        for text, ids in zip(texts, rows, strict=True):
            if len(ids) > most:
                raise PromptError(f"a text has {len(ids)} tokens, the model takes {most}: {text[:40]!r}...")
        longest = max(len(ids) for ids in rows)
        return mx.array([ids + ids[-1:] * (longest - len(ids)) for ids in rows], dtype=mx.int32)

    def logits(self, images: Sequence[ImageSource], texts: Sequence[str]) -> np.ndarray:
        """float32[images, texts]: cosines times the learned scale, about 100.

        Raises:
            ImageError: an image cannot be opened.
            PromptError: there are no images or no texts, or a text is too long.
        """
        if not images or not texts:
            raise PromptError("there must be an image and a text to compare")
        said = self.model.encode_texts(self.tokenize(texts))
        seen = []
        for image in images:  # one at a time: memory does not grow with their number
            pixels = mx.array(preprocess(open_image(image), self.image_settings))
            seen.append(self.model.encode_images(pixels[None].astype(said.dtype)))
            mx.eval(seen[-1])
        logits = mx.exp(self.model.logit_scale) * (mx.concatenate(seen) @ said.T)
        return np.array(logits.astype(mx.float32))

    def probabilities(self, images: Sequence[ImageSource], texts: Sequence[str]) -> np.ndarray:
        """float32[images, texts]: for each image, which of the texts it is about if it is about one of them."""
        return self.probabilities_of(self.logits(images, texts))

    @staticmethod
    def probabilities_of(logits: np.ndarray) -> np.ndarray:
        """The same of logits that are there: their softmax over the texts."""
        odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return np.asarray(odds / odds.sum(axis=-1, keepdims=True))


def load_scorer(name: str | Path, *, revision: str | None = None) -> Scorer:
    """Load a CLIP model, to compute in float32.

    Args:
        name: a checkpoint folder, or a name on the Hugging Face Hub such as "openai/clip-vit-base-patch32".
        revision: branch, tag or commit on the Hub.

    Raises:
        CheckpointError: the checkpoint cannot be found, read or understood, or is of another kind.
    """
    checkpoint = open_checkpoint(find_folder(name, revision=revision))
    model = load_whole(checkpoint, "clip", WEIGHTS, lambda: CLIP(read_config(checkpoint.config)))
    file = checkpoint.folder / "preprocessor_config.json"
    if not file.is_file():
        raise CheckpointError(f"{checkpoint.folder} has no preprocessor_config.json, which says how it takes images")
    return Scorer(model, load_tokenizer(checkpoint.folder), image_settings(read_json(file), default_type="CLIP"))
