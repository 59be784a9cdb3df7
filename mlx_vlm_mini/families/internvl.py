"""InternVL as transformers writes it (`OpenGVLab/InternVL3-*-hf`): InternViT, a pixel shuffle, an MLP, and a decoder.

Sources: arXiv:2404.16821, arXiv:2504.10479; models/internvl of huggingface/transformers.

An image becomes a grid of square tiles with a thumbnail behind them (`tiles.py`); in the prompt stand `<img>`, so many
tokens a tile, `</img>`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from mlx_vlm_mini.config import BlockConfig, DecoderConfig, ProjectorConfig, ShuffleConfig, VisionConfig, VLMConfig
from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.families.parts.configs import activation, from_start, llama_weights, side, text_decoder
from mlx_vlm_mini.families.parts.maps import Weights, native_intern_vit
from mlx_vlm_mini.preprocessing.pixels import preprocess
from mlx_vlm_mini.preprocessing.settings import ImageSettings
from mlx_vlm_mini.preprocessing.tiles import Tiles, count_tiles, cut_tiles

WEIGHTS: Weights = {
    **native_intern_vit("vision_tower."),
    **native_intern_vit("model.vision_tower."),
    **{
        prefix + "multi_modal_projector." + theirs: "projector." + ours
        for prefix in ("", "model.")
        for theirs, ours in (("layer_norm", "norm"), ("linear_1", "layers.0"), ("linear_2", "layers.1"))
    },
    **llama_weights("language_model.model."),
    **llama_weights("language_model."),
    **llama_weights("model.language_model."),
    "language_model.lm_head": "decoder.lm_head",
    "lm_head": "decoder.lm_head",
}

IMAGE_PROCESSOR = "GotOcr2"

PROMPT_LANGUAGE = r"</?(?:ref|box|quad)>"

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}"
    "{{ '<IMG_CONTEXT>\n' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

VISION = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 448, "patch_size": 14, "hidden_act": "gelu", "layer_norm_eps": 1e-6, "norm_type": "layer_norm",
    "attention_bias": False, "use_qk_norm": False, "use_mean_pooling": True,
}  # fmt: skip


def config(hf: Mapping[str, Any]) -> VLMConfig:
    known = ("llama", "qwen2", "qwen3")
    # The class's tie; a head in the files counts.
    return native_model(hf, "internvl", VISION, {"model_type": "qwen2"}, proven=known, tie_word_embeddings=True)


def native_model(
    hf: Mapping[str, Any],
    family: str,
    vision: Mapping[str, Any],
    text: Mapping[str, Any],
    *,
    proven: tuple[str, ...],
    tie_word_embeddings: bool,
) -> VLMConfig:
    """The whole model by transformers' keys.

    Args:
        vision, text, tie_word_embeddings: what config.json may leave out.
        proven: kinds of decoders.
    """
    if hf.get("vision_feature_select_strategy", "default") != "default":
        raise CheckpointError("config.json: vision_feature_select_strategy must be 'default' for a pixel shuffle")
    values = {**vision, **(hf.get("vision_config") or {})}
    if values.get("use_absolute_position_embeddings", True) is not True:
        raise CheckpointError("config.json: an InternViT without position embeddings is not supported")
    tower = intern_vit(
        values,
        feature_layer=hf.get("vision_feature_layer", -1),
        qkv_bias=values["attention_bias"],
        qk_norm_eps=1e-6 if values["use_qk_norm"] else None,
        post_norm=not values["use_mean_pooling"],
    )
    decoder = text_decoder(
        {**text, **(hf.get("text_config") or {})},
        proven=proven,
        tie_word_embeddings=hf.get("tie_word_embeddings", tie_word_embeddings),
    )
    act = hf.get("projector_hidden_act", "gelu")
    return VLMConfig(
        family=family,
        vision=tower,
        projector=shuffle_projector(hf, tower, decoder, tower.image_size, act=act, transposed=False),
        decoder=decoder,
        image_token_id=hf.get("image_token_id", hf.get("image_token_index", 151667)),
        image_grid_pinpoints=None,
    )


def intern_vit(
    values: Mapping[str, Any], *, feature_layer: int, qkv_bias: bool, qk_norm_eps: float | None, post_norm: bool
) -> VisionConfig:
    """An InternViT; `feature_layer` may count from the end."""
    depth = values["num_hidden_layers"]
    layer = from_start(feature_layer, depth)
    return VisionConfig(
        hidden_size=values["hidden_size"],
        num_hidden_layers=depth,
        num_attention_heads=values["num_attention_heads"],
        intermediate_size=values["intermediate_size"],
        image_size=side(values["image_size"], "image_size"),
        patch_size=side(values["patch_size"], "patch_size"),
        hidden_act=activation(values["hidden_act"]),
        layer_norm_eps=values["layer_norm_eps"],
        blocks=BlockConfig(norm_type=values["norm_type"], qkv_bias=qkv_bias, qk_norm_eps=qk_norm_eps, layer_scale=True),
        class_token=True,
        patch_bias=True,
        pre_norm=False,
        post_norm=post_norm and layer == depth,
        feature_layers=(layer,),
        drop_first_feature=True,
        resample_positions=True,
    )


def shuffle_projector(
    hf: Mapping[str, Any], tower: VisionConfig, decoder: DecoderConfig, tile_size: int, *, act: str, transposed: bool
) -> ProjectorConfig:
    """Two layers behind a norm and a pixel shuffle, for tiles of so many pixels along a side."""
    factor = int(1 / hf.get("downsample_ratio", 0.5))
    if factor > 0:
        _joined(tile_size // tower.patch_size, factor)
    return ProjectorConfig(
        input_size=tower.feature_size * factor**2,
        hidden_size=decoder.hidden_size,
        num_layers=2,
        hidden_act=activation(act),
        bias=True,
        shuffle=ShuffleConfig(factor=factor, transposed=transposed),
        norm_eps=1e-5,
    )


def _joined(side: int, factor: int) -> int:
    """Features along a tile's side, of which squares are joined."""
    if side % factor:
        raise CheckpointError(
            f"config.json: a grid of {side} x {side} features cannot be joined in squares of {factor} x {factor}"
        )
    return side // factor


def pixels(image: Image.Image, settings: ImageSettings) -> np.ndarray:
    assert isinstance(settings.tiling, Tiles)  # loading.py has seen to it
    return np.stack([preprocess(tile, settings) for tile in cut_tiles(image, settings.tiling, settings.resample)])


def image_text(config: VLMConfig, settings: ImageSettings, image_token: str, size: tuple[int, int]) -> str:
    assert isinstance(settings.tiling, Tiles) and config.projector.shuffle is not None
    side = _joined(settings.tiling.tile_size // config.vision.patch_size, config.projector.shuffle.factor)
    return "<img>" + image_token * (side**2 * count_tiles(size, settings.tiling)) + "</img>"
