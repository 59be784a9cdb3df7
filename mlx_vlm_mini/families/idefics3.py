"""Idefics3, SmolVLM and SmolVLM2: SigLIP, a pixel shuffle with one linear layer, and Llama; images, not video.

Sources: arXiv:2408.12637, arXiv:2504.05299; models/idefics3 and models/smolvlm of huggingface/transformers.

An image becomes tiles (`splits.py`), each announced by its row and column in the prompt, and the whole behind them. The
announcements are tokens of their own in some vocabularies and plain text in others. Every tile fills the tower, so each
patch has its own position embedding, as in any SigLIP.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from mlx_vlm_mini.config import ProjectorConfig, ShuffleConfig, VLMConfig
from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.families.parts.configs import clip_weights, llama_weights, text_decoder, vision_tower
from mlx_vlm_mini.families.parts.maps import Weights
from mlx_vlm_mini.preprocessing.pixels import preprocess
from mlx_vlm_mini.preprocessing.settings import ImageSettings
from mlx_vlm_mini.preprocessing.splits import Splits, choose_split, cut_splits

WEIGHTS: Weights = {
    name: ours
    for prefix in ("model.", "")  # the Hub's and transformers'; mlx-community's
    for name, ours in {
        **clip_weights(prefix + "vision_model.", post_norm=True),
        prefix + "connector.modality_projection.proj": "projector.layers.0",
        **llama_weights("model.text_model." if prefix else "language_model."),
        "lm_head" if prefix else "language_model.lm_head": "decoder.lm_head",
    }.items()
}

IMAGE_PROCESSOR = "Idefics3"

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] | capitalize + (':' if message['content'][0]['type'] == 'image' else ': ') }}"
    "{% for part in message['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{{ '<end_of_utterance>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)

_VISION = {
    "hidden_size": 1152, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 16,
    "image_size": 224, "patch_size": 32,
}  # fmt: skip
_AROUND = "<fake_token_around_image>"


def config(hf: Mapping[str, Any]) -> VLMConfig:
    """vision_config's model_type is not read: it is `idefics3`, `idefics3_vision`, `smolvlm_vision` or missing."""
    vision, text = hf.get("vision_config") or {}, hf.get("text_config")
    tower = vision_tower(
        {**_VISION, **vision, "model_type": "siglip_vision_model"},
        feature_layers=-1,
        drop_first_feature=False,
        post_norm=True,
    )
    decoder = text_decoder(
        {"rms_norm_eps": 1e-5} if text is None else text,
        proven=("llama",),
        tie_word_embeddings=hf.get("tie_word_embeddings", False),
    )
    shuffle, side = ShuffleConfig(factor=hf.get("scale_factor", 2), transposed=False), tower.image_size
    if side // tower.patch_size % shuffle.factor:
        raise CheckpointError(
            f"config.json: patches of a tile, {side // tower.patch_size} along a side, cannot be joined in squares of "
            f"scale_factor {shuffle.factor}"
        )
    return VLMConfig(
        family="idefics3",
        vision=tower,
        projector=ProjectorConfig(
            input_size=tower.feature_size * shuffle.factor**2,
            hidden_size=decoder.hidden_size,
            num_layers=1,
            hidden_act="gelu",  # between layers, and there is one
            bias=False,
            shuffle=shuffle,
        ),
        decoder=decoder,
        image_token_id=hf.get("image_token_id", hf.get("image_token_index", 128257)),
        image_grid_pinpoints=None,
    )


def pixels(image: Image.Image, settings: ImageSettings) -> np.ndarray:
    assert isinstance(settings.tiling, Splits)  # loading.py has seen to it
    return np.stack([preprocess(tile, settings) for tile in cut_splits(image, settings.tiling, settings.resample)])


def image_text(config: VLMConfig, settings: ImageSettings, image_token: str, size: tuple[int, int]) -> str:
    assert isinstance(settings.tiling, Splits)
    tile = image_token * config.tokens_of_row
    rows, columns = choose_split(size, settings.tiling)
    whole = f"{_AROUND}<global-img>{tile}{_AROUND}"
    if rows * columns == 1:
        return whole
    lines = ("".join(f"{_AROUND}<row_{r}_col_{c}>{tile}" for c in range(1, columns + 1)) for r in range(1, rows + 1))
    return "\n".join(lines) + "\n\n" + whole
