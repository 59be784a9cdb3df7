"""Gemma 3 (4B to 27B) with images: SigLIP, averaged features, and a decoder in which an image's tokens see one another.

Sources: arXiv:2503.19786; models/gemma3 of huggingface/transformers.

One layer in six sees everything, the others a window; each kind has rotary positions of its own base. An image is
squashed to a square. With pan and scan (`crops.py`), off unless the image processor's settings or `max_tiles` turn it
on, crops of a long image follow the whole, between words that say so.
"""

from collections.abc import Mapping
from dataclasses import replace
from math import isqrt
from typing import Any

import numpy as np
from PIL import Image

from mlx_vlm_mini.config import DecoderConfig, PoolConfig, ProjectorConfig, VLMConfig
from mlx_vlm_mini.decoder.rope import rope_type
from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.families.parts.configs import text_decoder, vision_tower, vlm_weights
from mlx_vlm_mini.families.parts.maps import Weights
from mlx_vlm_mini.preprocessing.crops import Crops, crop_boxes, cut_crops
from mlx_vlm_mini.preprocessing.pixels import preprocess
from mlx_vlm_mini.preprocessing.settings import ImageSettings

WEIGHTS: Weights = {
    **vlm_weights(post_norm=True),
    **{
        prefix + "multi_modal_projector." + theirs: "projector." + ours
        for prefix in ("", "model.")
        for theirs, ours in (("mm_input_projection_weight", "projection"), ("mm_soft_emb_norm", "norm"))
    },
}

IMAGE_PROCESSOR = "Gemma3"

CHAT_TEMPLATE = (
    "{{ bos_token }}{% set system = '' %}"
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'][0]['text'] + '\n\n' %}{% set messages = messages[1:] %}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant must take turns, a system message comes first') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    "{{ system if loop.first else '' }}"
    "{% for part in message['content'] %}"
    "{{ '<start_of_image>' if part['type'] == 'image' else part['text'] | trim }}"
    "{% endfor %}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

_PATTERN = 6  # layers, of which the last one sees everything


def text_config(text: Mapping[str, Any]) -> DecoderConfig:
    """The decoder; its rotary positions as new configs say (one entry a kind of layer) or old ones (`rope_scaling`).

    Attention scores are not capped, whatever the config says, as in transformers.
    """
    if text.get("use_bidirectional_attention"):
        raise CheckpointError("config.json: a Gemma 3 with use_bidirectional_attention reads and does not write")
    given, types = text.get("rope_parameters") or {}, text.get("layer_types")
    near, far = dict(given.get("sliding_attention") or {}), dict(given.get("full_attention") or {})
    far |= text.get("rope_scaling") or {}
    far.setdefault("rope_theta", text.get("rope_theta", 1e6))
    if rope_type(near) != "default":
        raise CheckpointError(f"config.json: rope type '{rope_type(near)}' of sliding layers is not supported")
    pattern = text.get("sliding_window_pattern", _PATTERN)
    kinds = ("full_attention", *["sliding_attention"] * (pattern - 1))
    layers = text.get("num_hidden_layers", 26)
    values = {
        "model_type": "gemma3_text", **text, "rope_parameters": far, "rope_scaling": None,
        "layer_types": [kinds[(i + 1) % pattern] for i in range(layers)] if types is None else types,
    }  # fmt: skip
    decoder = text_decoder(values, proven=("gemma3_text",))
    window, theta = decoder.window, near.get("rope_theta", text.get("rope_local_base_freq", 1e4))
    return replace(
        decoder,
        scales=replace(decoder.scales, attn_logit_softcapping=None),
        window=None if window is None else replace(window, sliding_rope_theta=theta),
        two_way="images",
    )


def config(hf: Mapping[str, Any]) -> VLMConfig:
    """Logits are not capped, as transformers does not in models with images, whatever text_config says."""
    tower = vision_tower(
        {"model_type": "siglip_vision_model", **(hf.get("vision_config") or {})},
        feature_layers=-1,
        drop_first_feature=False,
        post_norm=True,
    )
    decoder = text_config(hf.get("text_config") or {})
    side, wanted = tower.image_size // tower.patch_size, hf.get("mm_tokens_per_image", 256)
    factor = side // max(isqrt(wanted), 1)
    if factor**2 * wanted != side**2:
        raise CheckpointError(f"config.json: {side} x {side} patches cannot become {wanted} image tokens by averaging")
    return VLMConfig(
        family="gemma3",
        vision=tower,
        projector=ProjectorConfig(
            input_size=tower.feature_size,
            hidden_size=decoder.hidden_size,
            num_layers=1,
            hidden_act="gelu",  # between layers, and there is one
            bias=False,
            pool=PoolConfig(factor=factor, norm_offset=1.0),
            norm_eps=tower.layer_norm_eps,
        ),
        decoder=replace(decoder, scales=replace(decoder.scales, final_logit_softcapping=None)),
        image_token_id=hf.get("image_token_id", hf.get("image_token_index", 262144)),
        image_place="<start_of_image>",
        image_grid_pinpoints=None,
    )


def pixels(image: Image.Image, settings: ImageSettings) -> np.ndarray:
    assert isinstance(settings.tiling, Crops)  # loading.py has seen to it
    return np.stack([preprocess(piece, settings) for piece in cut_crops(image, settings.tiling)])


def image_text(config: VLMConfig, settings: ImageSettings, image_token: str, size: tuple[int, int]) -> str:
    assert isinstance(settings.tiling, Crops)
    shown = f"\n\n<start_of_image>{image_token * config.tokens_of_row}<end_of_image>\n\n"
    crops = len(crop_boxes(size, settings.tiling))
    if not crops:
        return shown
    helping = "and here are some crops to help you see better " + " ".join([shown] * crops)
    return f"Here is the original image {shown} {helping}"
