"""PaddleOCR-VL: a SigLIP for images of any size, Qwen2-VL's merger, and ERNIE 4.5 (0.3B) with three positions a token.

Source: models/paddleocr_vl of huggingface/transformers. Its tower has learned positions, resized to each image, and
rotary ones besides. On the Hub config.json is flat and calls the vision part by the whole model's name. It takes no
videos.
"""

from collections.abc import Mapping
from typing import Any

from mlx_vlm_mini.config import BlockConfig, MergerConfig, VLMConfig
from mlx_vlm_mini.families.parts.configs import clip_weights, llama_weights, side
from mlx_vlm_mini.families.parts.maps import Weights
from mlx_vlm_mini.families.parts.patch_grids import (
    grid_tower,
    image_text,
    merger_projector,
    pixels,
    sectioned_decoder,
)

__all__ = ["CHAT_TEMPLATE", "IMAGE_PROCESSOR", "WEIGHTS", "config", "image_text", "pixels"]

IMAGE_PROCESSOR = "PaddleOCRVL"

_PROJECTOR = {"pre_norm": "norm", "linear_1": "layers.0", "linear_2": "layers.1"}
_FUSED = tuple(f"vision.blocks.{{}}.attn.{name}_proj" for name in "qkv")


def _siglip(prefix: str) -> Weights:
    """The tower with tensors that nothing reads: positions of another way to resize, and a pooling head."""
    names = clip_weights(prefix, post_norm=True)
    return names | {prefix + "embeddings.packing_position_embedding.*": None, prefix + "head.*": None}


def _mlx_siglip() -> Weights:
    """mlx-vlm's names."""
    names = {name.replace(".encoder.", "."): ours for name, ours in clip_weights("visual.", post_norm=True).items()}
    return names | {"visual.layers.{}.self_attn.qkv": _FUSED}


WEIGHTS: Weights = {
    **_siglip("visual.vision_model."),
    **{f"mlp_AR.{theirs}": f"projector.{ours}" for theirs, ours in _PROJECTOR.items()},
    **llama_weights("model."),
    "lm_head": "decoder.lm_head",
    # As transformers has them in memory.
    **_siglip("model.visual.vision_model."),
    **{f"model.projector.{theirs}": f"projector.{ours}" for theirs, ours in _PROJECTOR.items()},
    **llama_weights("model.language_model."),
    # As mlx-community's files have them.
    **_mlx_siglip(),
    **{f"visual.projector.{theirs}": f"projector.{ours}" for theirs, ours in _PROJECTOR.items()},
    **llama_weights("language_model.model."),
    "language_model.lm_head": "decoder.lm_head",
}

CHAT_TEMPLATE = (  # pictures of a message before its words
    "{{ '<|begin_of_sentence|>' }}{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'] | capitalize + ': ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}"
    "{{ '<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ '</s>' if message['role'] == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)

_TEXT = {
    "vocab_size": 103424, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 18,
    "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "rope_theta": 5e5, "use_bias": False,
}  # fmt: skip
_SECTIONS = (16, 24, 24)
_VISION = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
    "num_channels": 3, "image_size": 384, "patch_size": 14, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
    "spatial_merge_size": 2,
}  # fmt: skip


def config(hf: Mapping[str, Any]) -> VLMConfig:
    text = {**_TEXT, **(hf.get("text_config") or hf)}
    text |= {"attention_bias": text["use_bias"], "mlp_bias": text["use_bias"]}
    tie = {"tie_word_embeddings": True, **hf, "text_config": text}
    decoder = sectioned_decoder(tie, "llama", {}, _SECTIONS, interleaved=False)
    values = {**_VISION, **(hf.get("vision_config") or {})}
    values |= {
        "depth": values["num_hidden_layers"], "num_heads": values["num_attention_heads"],
        "width": values["hidden_size"], "in_channels": values["num_channels"], "out": decoder.hidden_size,
    }  # fmt: skip
    tower = grid_tower(
        values,
        blocks=BlockConfig(),
        eps=values["layer_norm_eps"],
        post_norm=True,
        position_side=side(values["image_size"], "image_size") // side(values["patch_size"], "patch_size"),
        position_resize="linear",
    )
    return VLMConfig(
        family="paddleocr_vl",
        vision=tower,
        projector=merger_projector(tower, decoder, values, MergerConfig(norm_type="layer_norm"), eps=1e-5),
        decoder=decoder,
        image_token_id=hf.get("image_token_id", 100295),
        image_grid_pinpoints=None,
    )
