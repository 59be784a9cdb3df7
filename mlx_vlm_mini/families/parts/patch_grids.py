"""What families share whose images are grids of patches: Qwen2-VL and its successors, PaddleOCR-VL, GLM-4V.

Source: models/qwen2_vl, qwen2_5_vl and qwen3_vl of huggingface/transformers.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from mlx_vlm_mini.config import (
    BlockConfig,
    DecoderConfig,
    GridConfig,
    MergerConfig,
    NormType,
    ProjectorConfig,
    ShuffleConfig,
    VisionConfig,
    VLMConfig,
)
from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.preprocessing.grid import PatchGrid
from mlx_vlm_mini.preprocessing.pixels import preprocess
from mlx_vlm_mini.preprocessing.settings import ImageSettings
from mlx_vlm_mini.preprocessing.video import Clip, VideoLayout, step_times

from .configs import activation, llama_weights, side, text_decoder
from .maps import Weights

IMAGE_PROCESSOR = "Qwen2VL"
VIDEO_TOKEN = "<|video_pad|>"

_EPS = 1e-6  # of the tower's norms; no config says it
_SAID = (
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}"
    "{{ '<|vision_start|><|' + part['type'] + '_pad|><|vision_end|>' }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}"
)


def chat_template(system: str = "") -> str:
    """ChatML with pictures in place; `system` opens a conversation that has no such message."""
    opening = f"<|im_start|>system\n{system}<|im_end|>\n"
    default = "{% if loop.first and message['role'] != 'system' %}{{ '" + opening + "' }}{% endif %}" if system else ""
    asked = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    return "{% for message in messages %}" + default + _SAID + "{% endfor %}" + asked


def grid_weights(mlp: Mapping[str, str], merger: Mapping[str, str]) -> Weights:
    """Names of a whole model in all layouts: the Hub's files, transformers in memory, mlx-community's.

    Args:
        mlp, merger: names of the modules of a block's MLP and of a merger, to ours.
    """
    names: dict[str, str | tuple[str, ...] | None] = {}
    for prefix in ("visual.", "model.visual.", "vision_tower."):
        block, ours = prefix + "blocks.{}.", "vision.blocks.{}."
        taps = prefix + "deepstack_merger_list.{}."
        names |= {
            prefix + "patch_embed.proj": "vision.patch_embed",
            prefix + "pos_embed.weight": "vision.pos_embed",
            block + "norm1": ours + "norm1",
            block + "norm2": ours + "norm2",
            block + "attn.qkv": (ours + "attn.q_proj", ours + "attn.k_proj", ours + "attn.v_proj"),
            block + "attn.proj": ours + "attn.o_proj",
            **{f"{block}mlp.{theirs}": f"{ours}mlp.{name}" for theirs, name in mlp.items()},
            **{f"{prefix}merger.{theirs}": f"projector.{name}" for theirs, name in merger.items()},
            **{taps + theirs: "projector.taps.{}." + name for theirs, name in merger.items()},
        }
    for prefix in ("model.", "model.language_model.", "language_model.model."):
        names |= llama_weights(prefix)
    return names | {"lm_head": "decoder.lm_head", "language_model.lm_head": "decoder.lm_head"}


def sectioned_decoder(
    hf: Mapping[str, Any], kind: str, defaults: Mapping[str, Any], sections: tuple[int, int, int], *, interleaved: bool
) -> DecoderConfig:
    """A decoder with three positions a token, whose part of config.json may be all of it.

    Args:
        kind: of decoder, as `text_decoder` knows it.
        defaults: the class's.
        sections: where config.json names none.
    """
    text = hf.get("text_config") or hf
    if "num_experts" in text:
        raise CheckpointError("config.json: a decoder of experts (MoE) is not supported")
    decoder = text_decoder(
        {**defaults, **text, "model_type": kind},
        proven=(kind,),
        tie_word_embeddings=hf.get("tie_word_embeddings", False),
    )
    scaling = {"mrope_section": sections, **(decoder.rope_scaling or {}), "mrope_interleaved": interleaved}
    return replace(decoder, rope_scaling=scaling)


def grid_tower(
    values: Mapping[str, Any],
    *,
    blocks: BlockConfig,
    eps: float = _EPS,
    patch_bias: bool = True,
    pre_norm: bool = False,
    post_norm: bool = False,
    taps: tuple[int, ...] = (),
    **grid: Any,
) -> VisionConfig:
    """A tower of patch grids.

    Args:
        values: vision_config with its class's defaults, `width` and `intermediate_size` among them.
        taps: blocks whose output the decoder's first layers are given.
        grid: further fields of `GridConfig`.
    """
    rope = values.get("rope_parameters") or {}
    if rope.get("rope_theta", 10000.0) != 10000.0 or values["in_channels"] != 3:
        raise CheckpointError("config.json: the tower's rope_theta must be 10000, and in_channels 3")
    depth, patch = values["depth"], side(values["patch_size"], "patch_size")
    return VisionConfig(
        hidden_size=values["width"],
        num_hidden_layers=depth,
        num_attention_heads=values["num_heads"],
        intermediate_size=values["intermediate_size"],
        image_size=patch * values["spatial_merge_size"],
        patch_size=patch,
        hidden_act=activation(values["hidden_act"]),
        layer_norm_eps=eps,
        blocks=blocks,
        class_token=False,
        patch_bias=patch_bias,
        pre_norm=pre_norm,
        post_norm=post_norm,
        feature_layers=(depth, *(number + 1 for number in taps)),
        drop_first_feature=False,
        resample_positions=False,
        grid=GridConfig(**grid),
    )


def merger_projector(
    tower: VisionConfig, decoder: DecoderConfig, values: Mapping[str, Any], merger: MergerConfig, *, eps: float = _EPS
) -> ProjectorConfig:
    """What joins a tower's squares to embeddings.

    Raises:
        CheckpointError: `out`, the merger's width by vision_config, is not the decoder's.
    """
    if values["out"] != decoder.hidden_size:
        raise CheckpointError(
            f"config.json: the merger's width {values['out']} differs from the decoder's {decoder.hidden_size}"
        )
    factor = values["spatial_merge_size"]
    return ProjectorConfig(
        input_size=tower.feature_size * factor**2,
        hidden_size=decoder.hidden_size,
        num_layers=2,
        hidden_act="gelu",
        bias=True,
        shuffle=ShuffleConfig(factor=factor, transposed=False),
        norm_eps=eps,
        merger=merger,
    )


def grid_model(
    hf: Mapping[str, Any],
    decoder: DecoderConfig,
    family: str,
    values: Mapping[str, Any],
    *,
    norm_type: NormType = "layer_norm",
    gated_mlp: bool = False,
    patch_bias: bool = False,
    taps: tuple[int, ...] = (),
    **grid: Any,
) -> VLMConfig:
    """The whole model of a Qwen; see `grid_tower`.

    Args:
        values: `width`, `out` and `intermediate_size` among them.
    """
    blocks = BlockConfig(norm_type=norm_type, gated_mlp=gated_mlp)
    frames = side(values["temporal_patch_size"], "temporal_patch_size")
    tower = grid_tower(values, blocks=blocks, patch_bias=patch_bias, taps=taps, frames=frames, **grid)
    return VLMConfig(
        family=family,
        vision=tower,
        projector=merger_projector(tower, decoder, values, MergerConfig(norm_type=norm_type, taps=len(taps))),
        decoder=decoder,
        image_token_id=hf.get("image_token_id", 151655),
        image_grid_pinpoints=None,
    )


def pixels(image: Image.Image, settings: ImageSettings) -> np.ndarray:
    return preprocess(image, settings)[None]


def fitting_grid(config: VLMConfig, settings: ImageSettings) -> PatchGrid:
    """The image processor's grid, whose tokens are the model's.

    Raises:
        CheckpointError: they are not.
    """
    assert isinstance(settings.tiling, PatchGrid)  # loading.py has seen to it
    if settings.tiling.factor != config.vision.image_size:
        raise CheckpointError(
            f"preprocessor_config.json makes a token of {settings.tiling.factor} pixels a side, config.json of "
            f"{config.vision.image_size}"
        )
    return settings.tiling


def image_text(config: VLMConfig, settings: ImageSettings, image_token: str, size: tuple[int, int]) -> str:
    return image_token * fitting_grid(config, settings).count_tokens(size)


def video_layout(config: VLMConfig, clip: Clip, image_token: str) -> VideoLayout:
    """A video's tokens, step by step."""
    steps, height, width, _ = clip.pixel_values.shape
    grid, side = config.vision.grid, config.vision.image_size
    assert grid is not None
    return VideoLayout(image_token * (steps * (height // side) * (width // side)), step_times(clip, grid))
