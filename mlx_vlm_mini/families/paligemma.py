"""PaliGemma 1 and 2: SigLIP, a linear projector, and Gemma or Gemma 2 as a prefix-LM.

Sources: arXiv:2407.07726, arXiv:2412.03555; models/paligemma of huggingface/transformers.

The prompt: image tokens, `<bos>`, the text, a newline. All of it is a prefix whose tokens see one another; the answer
is causal. The models were trained on one text and one answer, not on conversations. Of a conversation they therefore
read all its images in order and the last user message's text; what was said before is not shown to them, and a system
message is refused.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from mlx_vlm_mini.config import ProjectorConfig, VLMConfig
from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.families.parts.configs import text_decoder, vision_tower, vlm_weights
from mlx_vlm_mini.families.parts.maps import Weights
from mlx_vlm_mini.preprocessing.pixels import preprocess
from mlx_vlm_mini.preprocessing.settings import ImageSettings

WEIGHTS: Weights = vlm_weights("linear", post_norm=True)

IMAGE_PROCESSOR = "Siglip"

PROMPT_LANGUAGE = r"<(?:loc\d{4}|seg\d{3})>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['user', 'assistant'] %}"
    "{{ raise_exception('PaliGemma takes one text with images and no ' + message['role'] + ' message') }}"
    "{% endif %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>{% endfor %}"
    "{% endfor %}"
    "{{ bos_token }}"
    "{% set last = messages | selectattr('role', 'equalto', 'user') | list | last %}"
    "{% for part in last['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{{ '\n' }}"
)

_VISION = {  # of a config without vision_config
    "hidden_size": 1152, "intermediate_size": 4096, "num_hidden_layers": 27, "num_attention_heads": 16,
    "image_size": 224, "patch_size": 14,
}  # fmt: skip
_TEXT = {  # of a config without text_config
    "model_type": "gemma", "vocab_size": 257152, "hidden_size": 2048, "intermediate_size": 16384,
    "num_hidden_layers": 18, "num_attention_heads": 8, "num_key_value_heads": 1,
}  # fmt: skip


def config(hf: Mapping[str, Any]) -> VLMConfig:
    """The top-level `hidden_size` is not read: PaliGemma 2 carries PaliGemma 1's."""
    vision, text = hf.get("vision_config"), hf.get("text_config")
    tower = vision_tower(
        {"model_type": "siglip_vision_model", **(_VISION if vision is None else vision)},
        feature_layers=-1,
        drop_first_feature=False,
        post_norm=True,
    )
    decoder = text_decoder(
        {"model_type": "gemma", **(_TEXT if text is None else text)},
        proven=("gemma", "gemma2"),
        tie_word_embeddings=hf.get("tie_word_embeddings", True),
        two_way="prompt",
    )
    width = hf.get("projection_dim", 2048)
    if width != decoder.hidden_size:
        raise CheckpointError(
            f"config.json: projection_dim {width} differs from the decoder's hidden_size {decoder.hidden_size}"
        )
    return VLMConfig(
        family="paligemma",
        vision=tower,
        projector=ProjectorConfig(
            input_size=tower.feature_size,
            hidden_size=width,
            num_layers=1,
            hidden_act="gelu",  # between layers, and there is one
            bias=True,
        ),
        decoder=decoder,
        image_token_id=hf.get("image_token_id", hf.get("image_token_index", 256000)),
        image_grid_pinpoints=None,
    )


def pixels(image: Image.Image, settings: ImageSettings) -> np.ndarray:
    return preprocess(image, settings)[None]


def image_text(config: VLMConfig, settings: ImageSettings, image_token: str, size: tuple[int, int]) -> str:
    return image_token * config.vision.num_features
