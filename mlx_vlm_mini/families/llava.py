"""LLaVA-1.5 and its kin: CLIP or SigLIP, an MLP, and Llama, Mistral or Qwen2.

Sources: arXiv:2310.03744; models/llava of huggingface/transformers. The tensors' names are those of the Hub's files, of
transformers since 4.52 in memory, and of what transformers 5 writes.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from mlx_vlm_mini.config import ProjectorConfig, VLMConfig
from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.image import ImageSettings, preprocess

from .parts import activation, clip_weights, llama_weights, text_decoder, vision_tower

_VISION_DEFAULTS = {  # of a config without vision_config: CLIP-L/14 at 336 pixels
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
}  # fmt: skip

WEIGHTS: Mapping[str, str | None] = {
    **clip_weights("vision_tower.vision_model."),
    **clip_weights("vision_tower."),
    **clip_weights("model.vision_tower.vision_model."),
    **clip_weights("model.vision_tower."),
    "multi_modal_projector.linear_1": "projector.layers.0",
    "multi_modal_projector.linear_2": "projector.layers.1",
    "model.multi_modal_projector.linear_1": "projector.layers.0",
    "model.multi_modal_projector.linear_2": "projector.layers.1",
    **llama_weights("language_model.model."),
    **llama_weights("language_model."),
    **llama_weights("model.language_model."),
    "language_model.lm_head": "decoder.lm_head",
    "lm_head": "decoder.lm_head",
}

CHAT_TEMPLATE = (  # LLaVA-1.5's prompt, as its authors and llava-hf give it
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] %}"
    "{{ '<image>\n' if part['type'] == 'image' else part['text'] + ' ' }}"
    "{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def config(hf: Mapping[str, Any]) -> VLMConfig:
    text, vision = hf.get("text_config") or {}, hf.get("vision_config")
    strategy = hf.get("vision_feature_select_strategy", "default")
    if strategy not in ("default", "full"):
        raise CheckpointError(
            f"config.json: vision_feature_select_strategy '{strategy}' is neither 'default' nor 'full'"
        )
    decoder = text_decoder(text, tie_word_embeddings=hf.get("tie_word_embeddings", False))
    tower = vision_tower(
        _VISION_DEFAULTS if vision is None else vision,
        feature_layers=hf.get("vision_feature_layer", -2),
        drop_first_feature=strategy == "default",
    )
    return VLMConfig(
        family="llava",
        vision=tower,
        projector=ProjectorConfig(
            input_size=tower.feature_size,
            hidden_size=decoder.hidden_size,
            num_layers={"mlp": 2, "linear": 1}[hf.get("projector_type", "mlp")],  # the key is ours, of `compose`
            hidden_act=activation(hf.get("projector_hidden_act", "gelu")),
            bias=hf.get("multimodal_projector_bias", True),
        ),
        decoder=decoder,
        image_token_id=hf.get("image_token_id", hf.get("image_token_index", 32000)),
    )


def pixels(image: Image.Image, settings: ImageSettings) -> np.ndarray:
    return preprocess(image, settings)[None]


def image_text(config: VLMConfig, image_token: str, rows: int) -> str:
    return image_token * (rows * config.vision.num_features)
