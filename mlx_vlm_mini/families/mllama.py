"""Llama 3.2 Vision: a tower of tiles, a linear projector, and Llama with gated cross-attention layers.

Sources: arXiv:2407.21783, section 7; models/llama3/multimodal of meta-llama/llama-models; models/mllama of
huggingface/transformers.

An image takes one token of the prompt, whatever its size. Where Meta's code, with which the models were trained, and
transformers since 4.56 compute differently, Meta's counts:

- the intermediate states that the projector reads are what enters the blocks named, not what leaves them;
- tokens before the first image leave cross-attention layers as they entered, and do not attend to all images.

`"semantics": "transformers"` in config.json, a key of ours, asks for the other, which parity is tested with.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from mlx_vlm_mini.config import BlockConfig, CrossAttentionConfig, ProjectorConfig, TiledConfig, VisionConfig, VLMConfig
from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.families.parts.configs import activation, llama_weights, side, text_decoder
from mlx_vlm_mini.families.parts.maps import Weights, mllama_decoder, mllama_vision
from mlx_vlm_mini.preprocessing.canvas import Canvas, cut_canvas, place, possible_grids
from mlx_vlm_mini.preprocessing.pixels import preprocess
from mlx_vlm_mini.preprocessing.settings import ImageSettings

_TEXTS = ("language_model.model.", "model.language_model.")
WEIGHTS: Weights = {
    **{
        theirs: ours
        for prefix in ("vision_model.", "model.vision_model.", "vision_tower.")  # the last is mlx-vlm's
        for theirs, ours in mllama_vision(prefix).items()
    },
    **{prefix + "multi_modal_projector": "projector.layers.0" for prefix in ("", "model.")},
    **{theirs: ours for prefix in _TEXTS for theirs, ours in llama_weights(prefix).items()},
    **{theirs: ours for prefix in _TEXTS for theirs, ours in mllama_decoder(prefix).items()},
    "language_model.lm_head": "decoder.lm_head",
    "lm_head": "decoder.lm_head",
}

IMAGE_PROCESSOR = "Mllama"

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{% for part in message['content'] %}{{ '<|image|>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

_VISION = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_global_layers": 8,
    "attention_heads": 16, "image_size": 448, "patch_size": 14, "hidden_act": "gelu", "norm_eps": 1e-5,
    "max_num_tiles": 4, "intermediate_layers_indices": None, "supported_aspect_ratios": None,
    "vision_output_dim": None,
}  # fmt: skip
_TAPS = [3, 7, 15, 23, 30]
_CROSS = [3, 8, 13, 18, 23, 28, 33, 38]
_SPARE = 8  # embeddings behind the vocabulary's


def config(hf: Mapping[str, Any]) -> VLMConfig:
    semantics = hf.get("semantics", "meta")
    if semantics not in ("meta", "transformers"):
        raise CheckpointError(f"config.json: semantics must be 'meta' or 'transformers', not {semantics!r}")
    tower = _tower({**_VISION, **(hf.get("vision_config") or {})}, 1 if semantics == "transformers" else 0)
    text = hf.get("text_config") or {}
    decoder = text_decoder({"model_type": "mllama_text_model", **text}, proven=("mllama_text_model",))
    named = text.get("cross_attention_layers")
    layers = set(_CROSS if named is None else named)
    if not layers <= set(range(decoder.num_hidden_layers)):
        raise CheckpointError(
            f"config.json: cross_attention_layers {sorted(layers)} are not all among {decoder.num_hidden_layers} layers"
        )
    kinds = tuple("cross_attention" if i in layers else kind for i, kind in enumerate(decoder.layer_types))
    cross = CrossAttentionConfig(
        spare_embeddings=_SPARE, blind_rows="attend" if semantics == "transformers" else "zero"
    )
    decoder = replace(decoder, layer_types=kinds, cross_attention=cross if layers else None)
    token = hf.get("image_token_id", hf.get("image_token_index", 128256))
    if isinstance(token, int) and token >= decoder.num_embeddings:
        raise CheckpointError(
            f"config.json: the image token {token} has none of the {decoder.num_embeddings} embeddings"
        )
    return VLMConfig(
        family="mllama",
        vision=tower,
        projector=ProjectorConfig(
            input_size=tower.feature_size,
            hidden_size=decoder.hidden_size,
            num_layers=1,
            hidden_act="gelu",  # between layers, and there is one
            bias=True,
        ),
        decoder=decoder,
        image_token_id=token,
        image_grid_pinpoints=None,
    )


def _tower(values: Mapping[str, Any], shift: int) -> VisionConfig:
    """`shift` is added to the numbers of the intermediate layers."""
    depth, tiles = values["num_hidden_layers"], values["max_num_tiles"]
    named = values["intermediate_layers_indices"]
    taps = tuple(layer + shift for layer in (_TAPS if named is None else named))
    tiled = TiledConfig(max_tiles=tiles, num_global_layers=values["num_global_layers"])
    ratios = values["supported_aspect_ratios"]
    if ratios is not None and [tuple(ratio) for ratio in ratios] != possible_grids(tiles):
        raise CheckpointError(f"config.json: supported_aspect_ratios are not the {tiles} tiles' possible ones")
    width = values["hidden_size"] * (len(taps) + 1)
    if not taps or values["vision_output_dim"] not in (None, width):
        raise CheckpointError(
            f"config.json: vision_output_dim is {values['vision_output_dim']}, {len(taps)} intermediate layers and the "
            f"last one give {width}"
        )
    return VisionConfig(
        hidden_size=values["hidden_size"],
        num_hidden_layers=depth,
        num_attention_heads=values.get("num_attention_heads", values["attention_heads"]),
        intermediate_size=values["intermediate_size"],
        image_size=side(values["image_size"], "image_size"),
        patch_size=side(values["patch_size"], "patch_size"),
        hidden_act=activation(values["hidden_act"]),
        layer_norm_eps=values["norm_eps"],
        blocks=BlockConfig(qkv_bias=False, o_bias=False),
        class_token=True,
        patch_bias=False,
        pre_norm=True,
        post_norm=True,
        feature_layers=(*taps, depth),
        drop_first_feature=False,
        resample_positions=False,
        tiled=tiled,
    )


def pixels(image: Image.Image, settings: ImageSettings) -> np.ndarray:
    assert isinstance(settings.tiling, Canvas)  # loading.py has seen to it
    canvas = settings.tiling
    return cut_canvas(preprocess(place(image, canvas, settings.resample), settings), canvas.tile_size)


def image_text(config: VLMConfig, settings: ImageSettings, image_token: str, size: tuple[int, int]) -> str:
    return image_token
