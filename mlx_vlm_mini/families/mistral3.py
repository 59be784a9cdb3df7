"""Mistral 3: Pixtral's tower, squares of 2 x 2 features merged channel by channel, Mistral or Ministral 3.

Mistral Small 3.1 and 3.2 have the first; Ministral 3, Devstral Small 2 and Mistral Medium 3.5 the second: YaRN, and
queries that grow with their place. Source: models/mistral3 and ministral3 of huggingface/transformers.
"""

from collections.abc import Mapping
from typing import Any

from mlx_vlm_mini.config import DecoderConfig, MergerConfig, ProjectorConfig, ShuffleConfig, VLMConfig
from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.families.parts.configs import activation, text_decoder
from mlx_vlm_mini.families.parts.maps import Weights

from .pixtral import IMAGE_PROCESSOR, SAID, image_text, pixels, pixtral_tower, pixtral_weights

__all__ = ["CHAT_TEMPLATE", "IMAGE_PROCESSOR", "WEIGHTS", "config", "image_text", "pixels"]

PROJECTOR = {
    "norm": "norm", "patch_merger.merging_layer": "merging_layer", "linear_1": "layers.0", "linear_2": "layers.1",
}  # fmt: skip
WEIGHTS: Weights = pixtral_weights(PROJECTOR)

CHAT_TEMPLATE = (
    SAID + "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST]' + said(message['content']) + '[/INST]' }}"
    "{% elif message['role'] == 'system' %}{{ '[SYSTEM_PROMPT]' + said(message['content']) + '[/SYSTEM_PROMPT]' }}"
    "{% else %}{{ said(message['content']) + eos_token }}{% endif %}{% endfor %}"
)

_TEXT = {  # of a config without text_config: Mistral Small 3.1
    "model_type": "mistral", "hidden_size": 5120, "intermediate_size": 32768, "num_hidden_layers": 40,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "rope_theta": 1e9, "sliding_window": None, "vocab_size": 131072,
}  # fmt: skip
_VISION = {"patch_size": 14}  # of a config without vision_config


def config(hf: Mapping[str, Any]) -> VLMConfig:
    text, vision = hf.get("text_config"), hf.get("vision_config")
    text, vision = {"model_type": "mistral", **(_TEXT if text is None else text)}, _VISION if vision is None else vision
    decoder = text_decoder(
        text, proven=("mistral", "ministral3"), tie_word_embeddings=hf.get("tie_word_embeddings", True)
    )
    token = hf.get("image_token_id", hf.get("image_token_index", 10))
    return merged_model(hf, "mistral3", decoder, vision, image_token_id=token)


def merged_model(
    hf: Mapping[str, Any], family: str, decoder: DecoderConfig, vision: Mapping[str, Any], *, image_token_id: int
) -> VLMConfig:
    """The whole model behind a Pixtral tower whose features are merged in squares.

    Args:
        vision: vision_config, completed with the class's defaults where there is none.
    """
    shuffle = ShuffleConfig(factor=hf.get("spatial_merge_size", 2), transposed=False)
    tower = pixtral_tower(vision, hf.get("vision_feature_layer", -1), merge=shuffle.factor)
    if len(tower.feature_layers) > 1:
        raise CheckpointError("config.json: vision_feature_layer must be one layer: the merger has a norm for one")
    return VLMConfig(
        family=family,
        vision=tower,
        projector=ProjectorConfig(
            input_size=tower.feature_size * shuffle.factor**2,
            hidden_size=decoder.hidden_size,
            num_layers=2,
            hidden_act=activation(hf.get("projector_hidden_act", "gelu")),
            bias=hf.get("multimodal_projector_bias", False),
            shuffle=shuffle,
            norm_eps=decoder.norms.rms_norm_eps,
            merger=MergerConfig(norm_type="rms_norm", kind="channels"),
        ),
        decoder=decoder,
        image_token_id=image_token_id,
        image_grid_pinpoints=None,
    )
