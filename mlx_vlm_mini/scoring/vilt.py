"""ViLT: questions about an image, answered by one transformer that reads words and patches as a single sequence.

Every word attends to every patch and the other way round, in each layer; the answer is one of a fixed list. Source:
arXiv:2102.03334; modeling_vilt.py and image_processing_vilt.py of huggingface/transformers.
"""

from collections.abc import Mapping
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
from mlx_vlm_mini.errors import CheckpointError, ImageError, PromptError
from mlx_vlm_mini.families.parts.configs import vision_tower
from mlx_vlm_mini.files import read_json
from mlx_vlm_mini.images.source import ImageSource, open_image
from mlx_vlm_mini.preprocessing.pixels import preprocess
from mlx_vlm_mini.preprocessing.settings import ImageSettings, image_settings
from mlx_vlm_mini.text.tokenizer import Tokenizer, load_tokenizer
from mlx_vlm_mini.vision.transformer import Block, PatchEmbed

_DEFAULTS = {
    "vocab_size": 30522, "max_position_embeddings": 40, "type_vocab_size": 2, "modality_type_vocab_size": 2,
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
    "hidden_act": "gelu", "layer_norm_eps": 1e-12, "image_size": 384, "patch_size": 32, "qkv_bias": True,
}  # fmt: skip
_LONGEST = 1333 / 800  # a picture's longer side at most, in those of its shorter one
_LAYER = "vilt.encoder.layer.{}."
WEIGHTS = {
    "vilt.embeddings.text_embeddings.word_embeddings": "words",
    "vilt.embeddings.text_embeddings.position_embeddings": "word_positions",
    "vilt.embeddings.text_embeddings.token_type_embeddings": "word_types",
    "vilt.embeddings.text_embeddings.LayerNorm": "word_norm",
    "vilt.embeddings.text_embeddings.position_ids": None,
    "vilt.embeddings.cls_token": "class_token",
    "vilt.embeddings.position_embeddings": "pos_embed",
    "vilt.embeddings.patch_embeddings.projection": "patch_embed",
    "vilt.embeddings.token_type_embeddings": "modalities",
    _LAYER + "layernorm_before": "blocks.{}.norm1",
    _LAYER + "attention.attention.query": "blocks.{}.attn.q_proj",
    _LAYER + "attention.attention.key": "blocks.{}.attn.k_proj",
    _LAYER + "attention.attention.value": "blocks.{}.attn.v_proj",
    _LAYER + "attention.output.dense": "blocks.{}.attn.o_proj",
    _LAYER + "layernorm_after": "blocks.{}.norm2",
    _LAYER + "intermediate.dense": "blocks.{}.mlp.fc1",
    _LAYER + "output.dense": "blocks.{}.mlp.fc2",
    "vilt.layernorm": "norm",
    "vilt.pooler.dense": "pooler",
    "classifier.0": "classifier.layers.0",
    "classifier.1": "classifier.layers.1",
    "classifier.3": "classifier.layers.3",
}


@dataclass(frozen=True)
class ViLTConfig:
    """config.json in our terms.

    Attributes:
        blocks: the transformer, which is a vision transformer's, and its patches.
        max_length: tokens of a question at most.
        answers: all that it can say.
    """

    blocks: VisionConfig
    vocab_size: int
    max_length: int
    type_vocab_size: int
    modalities: int
    answers: tuple[str, ...]


def read_config(hf: Mapping[str, Any]) -> ViLTConfig:
    """config.json of a ViLT checkpoint for question answering.

    Raises:
        CheckpointError: it describes none.
    """
    values, labels = {**_DEFAULTS, **hf}, hf.get("id2label") or {}
    if hf.get("model_type") != "vilt" or "ViltForQuestionAnswering" not in (hf.get("architectures") or []):
        raise CheckpointError("config.json describes no ViLT for question answering (ViltForQuestionAnswering)")
    if not values["qkv_bias"]:
        raise CheckpointError("config.json: a ViLT without qkv_bias is not supported")
    tower = {name: values[name] for name in _DEFAULTS if name in ("hidden_act", "image_size", "layer_norm_eps")}
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size")
    return ViLTConfig(
        blocks=vision_tower(
            {**tower, **{name: values[name] for name in sizes}, "model_type": "siglip_vision_model"},
            feature_layers=-1,
            drop_first_feature=False,
        ),
        vocab_size=values["vocab_size"],
        max_length=values["max_position_embeddings"],
        type_vocab_size=values["type_vocab_size"],
        modalities=values["modality_type_vocab_size"],
        answers=tuple(str(labels[str(number)]) for number in range(len(labels))),
    )


class ViLT(nn.Module):
    def __init__(self, config: ViLTConfig) -> None:
        super().__init__()
        self.config = config
        blocks, width = config.blocks, config.blocks.hidden_size
        self.words = nn.Embedding(config.vocab_size, width)
        self.word_positions = nn.Embedding(config.max_length, width)
        self.word_types = nn.Embedding(config.type_vocab_size, width)
        self.word_norm = nn.LayerNorm(width, eps=blocks.layer_norm_eps)
        self.patch_embed = PatchEmbed(blocks)
        self.class_token = mx.zeros((1, 1, width))
        self.pos_embed = mx.zeros((1, 1 + (blocks.image_size // blocks.patch_size) ** 2, width))
        self.modalities = nn.Embedding(config.modalities, width)
        self.blocks = [Block(blocks) for _ in range(blocks.num_hidden_layers)]
        self.norm = nn.LayerNorm(width, eps=blocks.layer_norm_eps)
        self.pooler = nn.Linear(width, width)
        self.classifier = nn.Sequential(
            nn.Linear(width, 2 * width), nn.LayerNorm(2 * width), nn.GELU(), nn.Linear(2 * width, len(config.answers))
        )

    def _positions(self, rows: int, columns: int) -> mx.array:
        """float[1, 1 + rows * columns, C]: the class token's, and the square grid's stretched over the patches."""
        side = self.config.blocks.image_size // self.config.blocks.patch_size
        grid = self.pos_embed[0, 1:].reshape(side, side, -1)
        grid = mx.einsum("rs,stc,ut->ruc", _stretch(side, rows), grid, _stretch(side, columns))
        return mx.concatenate([self.pos_embed[:, :1], grid.reshape(1, rows * columns, -1)], axis=1)

    def __call__(
        self, input_ids: mx.array, pixel_values: mx.array, attentions: list[mx.array] | None = None
    ) -> mx.array:
        """Logits of all answers to a question.

        Args:
            input_ids: int32[1, L].
            pixel_values: float[1, height, width, 3], sides multiples of a patch.
            attentions: where given, each layer appends its weights float[1, H, N, N] over the L tokens, a class token
                and the patches, by rows.

        Returns:
            float[1, answers].
        """
        p = self.config.blocks.patch_size
        words = self.words(input_ids) + self.word_types.weight[0] + self.word_positions.weight[: input_ids.shape[1]]
        patches = mx.concatenate([self.class_token, self.patch_embed(pixel_values)], axis=1)
        patches = patches + self._positions(pixel_values.shape[1] // p, pixel_values.shape[2] // p)
        kinds = self.modalities.weight
        x = mx.concatenate([self.word_norm(words) + kinds[0], patches + kinds[1]], axis=1)
        for block in self.blocks:
            x = block(x, attentions)
        logits: mx.array = self.classifier(mx.tanh(self.pooler(self.norm(x)[:, 0])))
        return logits


def _stretch(side: int, count: int) -> mx.array:
    """float32[count, side]: linear interpolation whose ends meet (torch's `align_corners=True`)."""
    places = np.arange(count) * ((side - 1) / (count - 1) if count > 1 else 0.0)
    low = np.minimum(places.astype(int), side - 1)
    weights = np.zeros((count, side), np.float32)
    weights[np.arange(count), low] = 1 - (places - low)
    weights[np.arange(count), np.minimum(low + 1, side - 1)] += places - low
    return mx.array(weights)


class Answerer:
    """Answers questions about images from a fixed list.

    answerer = load_answerer("dandelin/vilt-b32-finetuned-vqa")
    answerer.answers("photo.jpg", "How many cats are there?")
    """

    def __init__(self, model: ViLT, tokenizer: Tokenizer, settings: ImageSettings, divisor: int) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.image_settings = settings
        self.divisor = divisor

    def pixels(self, image: ImageSource) -> np.ndarray:
        """float32[height, width, 3]: the shorter side as the checkpoint says, the longer one at most 5/3 of that, both
        multiples of a patch."""
        opened = open_image(image)
        shorter = int((self.image_settings.size or {})["shortest_edge"])
        scale = shorter / min(opened.size)
        if max(opened.size) * scale > int(_LONGEST * shorter):
            scale *= int(_LONGEST * shorter) / (max(opened.size) * scale)
        width, height = (int(side * scale + 0.5) // self.divisor * self.divisor for side in opened.size)
        if not width or not height:
            raise ImageError(f"an image of {opened.width}x{opened.height} pixels is too narrow for this model")
        return preprocess(opened, replace(self.image_settings, size={"height": height, "width": width}))

    def logits(self, image: ImageSource, question: str) -> np.ndarray:
        """float32[answers].

        Raises:
            ImageError: the image cannot be opened.
            PromptError: the question is longer than the model takes.
        """
        ids = self.tokenizer.encode(question)
        if len(ids) > self.model.config.max_length:
            raise PromptError(f"the question has {len(ids)} tokens, the model takes {self.model.config.max_length}")
        logits = self.model(mx.array([ids], dtype=mx.int32), mx.array(self.pixels(image)[None]))
        return np.array(logits[0])

    def answers(self, image: ImageSource, question: str, *, top: int = 5) -> list[tuple[str, float]]:
        """The likeliest answers, each with its own probability: several may be right."""
        logits = self.logits(image, question)
        best = np.argsort(-logits, kind="stable")[:top]
        return [(self.model.config.answers[index], float(1 / (1 + np.exp(-logits[index])))) for index in best]


def load_answerer(name: str | Path, *, revision: str | None = None) -> Answerer:
    """Load a ViLT for question answering, to compute in float32.

    Args:
        name: a checkpoint folder, or a name on the Hugging Face Hub such as "dandelin/vilt-b32-finetuned-vqa".
        revision: branch, tag or commit on the Hub.

    Raises:
        CheckpointError: the checkpoint cannot be found, read or understood, or is of another kind.
    """
    checkpoint = open_checkpoint(find_folder(name, revision=revision))
    model = load_whole(checkpoint, "vilt", WEIGHTS, lambda: ViLT(read_config(checkpoint.config)))
    file = checkpoint.folder / "preprocessor_config.json"
    if not file.is_file():
        raise CheckpointError(f"{checkpoint.folder} has no preprocessor_config.json, which says how it takes images")
    hf = {"size": {"shortest_edge": 384}, **read_json(file)}
    if not isinstance(hf["size"], dict) or "shortest_edge" not in hf["size"]:
        hf["size"] = {"shortest_edge": hf["size"]}
    for name_of_class in ("image_processor_type", "feature_extractor_type"):
        hf.pop(name_of_class, None)
    divisor = hf.get("size_divisor", 32)
    if type(divisor) is not int or not 0 < divisor < 4096:
        raise CheckpointError(f"{file}: size_divisor must be a whole number of pixels, not {divisor!r}")
    settings = image_settings(hf, default_type="Siglip")  # of mean and deviation 0.5, as this one
    return Answerer(model, load_tokenizer(checkpoint.folder), settings, divisor)
