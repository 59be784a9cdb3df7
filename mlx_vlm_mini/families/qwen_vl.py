"""Qwen-VL (2023) and Qwen-VL-Chat: ViT-bigG, a resampler of 256 queries, and Qwen-7B; config.json says nearly all.

Sources: arXiv:2308.12966; the README of github.com/QwenLM/Qwen-VL; qwen_vl.py, qwen.py and layers/resampler.py of
vllm-project/vllm. The code that comes with the checkpoints is never run.

An image is squashed into a square; in the prompt stand `Picture 1: <img>`, a slot for each query and `</img>`, counted
over the whole conversation. (The reference spells the picture's address in the slots, which its features then replace.)
Whether a model takes conversations or goes on a text says `chat_format` in generation_config.json: `chatml` or `raw`.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from mlx_vlm_mini.config import (
    BiasConfig,
    BlockConfig,
    DecoderConfig,
    Prescribed,
    ProjectorConfig,
    QueryScale,
    ResamplerConfig,
    VisionConfig,
    VLMConfig,
)
from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.families.parts.configs import text_decoder
from mlx_vlm_mini.families.parts.maps import Weights, qwen_decoder, qwen_vision
from mlx_vlm_mini.preprocessing.pixels import preprocess
from mlx_vlm_mini.preprocessing.settings import ImageSettings
from mlx_vlm_mini.text.formats.ranks import END_OF_TEXT, MESSAGE_END, MESSAGE_START, PLACES

WEIGHTS: Weights = {
    **qwen_vision("transformer.visual."),
    **qwen_decoder("transformer."),
    "lm_head": "decoder.lm_head",
}

IMAGE_PROCESSOR = "CLIP"

PROMPT_LANGUAGE = r"</?(?:ref|box|quad)>"

CHAT_TEMPLATE = ""  # generation_config.json prescribes it

_SAID = (
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{% set seen.pictures = seen.pictures + 1 %}"
    "{{ 'Picture ' ~ seen.pictures ~ ': <imgpad>\n' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
)
_TEMPLATES = {
    "chatml": (
        "{% set seen = namespace(pictures=0) %}{% if messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
        "{% for message in messages %}{% if message['role'] not in ['system', 'user', 'assistant'] %}"
        "{{ raise_exception('no ' + message['role'] + ' message can stand here') }}{% endif %}"
        "{{ '<|im_start|>' + message['role'] + '\n' }}" + _SAID + "{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "raw": (
        "{% set seen = namespace(pictures=0) %}{% for message in messages %}"
        "{% if message['role'] not in ['user', 'assistant'] %}"
        "{{ raise_exception('a model that goes on a text takes no ' + message['role'] + ' message') }}{% endif %}"
        + _SAID
        + "{% endfor %}"
    ),
}
_ENDS = {"chatml": (MESSAGE_END, MESSAGE_START, END_OF_TEXT), "raw": (END_OF_TEXT,)}

_TEXT = {
    "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
    "num_attention_heads": 32, "kv_channels": 128, "layer_norm_epsilon": 1e-6, "max_position_embeddings": 8192,
    "seq_length": 2048, "rotary_emb_base": 10000, "rotary_pct": 1.0, "use_dynamic_ntk": True, "use_logn_attn": True,
    "no_bias": True, "tie_word_embeddings": False,
}  # fmt: skip
_VISUAL = {
    "width": 1664, "layers": 48, "heads": 16, "mlp_ratio": 4.9231, "patch_size": 14, "image_size": 448,
    "output_dim": 4096, "n_queries": 256, "image_start_id": 151857,
}  # fmt: skip
_STORED = 16  # positions along a side that the tower stores, whatever the image's size
_HEAD = 128  # numbers of a head of the resampler
_EPS = 1e-6  # of the tower's norms and the resampler's


def config(hf: Mapping[str, Any]) -> VLMConfig:
    """`generation_config`, what generation_config.json says, is put there by loading.py."""
    if not isinstance(hf.get("visual"), Mapping):
        raise CheckpointError("config.json describes a Qwen without `visual`, which sees nothing: Qwen-VL has it")
    visual, decoder = {**_VISUAL, **hf["visual"]}, _decoder({**_TEXT, **hf})
    tower = _tower(visual)
    width, token = visual["output_dim"], visual["image_start_id"] + 2
    if width != decoder.hidden_size:
        raise CheckpointError(f"config.json: output_dim {width} differs from hidden_size {decoder.hidden_size}")
    if token >= decoder.vocab_size:
        raise CheckpointError(f"config.json: image_start_id {token - 2} is beyond the vocabulary {decoder.vocab_size}")
    form = (hf.get("generation_config") or {}).get("chat_format", "chatml")
    if form not in _TEMPLATES:
        raise CheckpointError(f"generation_config.json: chat_format must be 'chatml' or 'raw', not {form!r}")
    return VLMConfig(
        family="qwen_vl",
        vision=tower,
        projector=ProjectorConfig(
            input_size=tower.feature_size,
            hidden_size=width,
            num_layers=1,
            hidden_act="gelu",  # between layers, and there is one
            bias=False,
            resampler=ResamplerConfig(num_queries=visual["n_queries"], num_heads=width // _HEAD, norm_eps=_EPS),
        ),
        decoder=decoder,
        image_token_id=token,
        image_grid_pinpoints=None,
        prescribed=Prescribed(
            image_token="<imgpad>",
            chat_template=_TEMPLATES[form],
            end_token=_ENDS[form],
            image_processor={
                "size": {"height": visual["image_size"], "width": visual["image_size"]},
                "do_center_crop": False,
            },
            shown_tokens=PLACES,
        ),
    )


def _decoder(values: Mapping[str, Any]) -> DecoderConfig:
    heads, length = values["num_attention_heads"], values["seq_length"]
    if values["kv_channels"] * heads != values["hidden_size"] or values["rotary_pct"] != 1:
        raise CheckpointError("config.json: kv_channels times num_attention_heads must be hidden_size, rotary_pct 1")
    if values["intermediate_size"] % 2 or not isinstance(length, int) or length < 2:
        raise CheckpointError("config.json: intermediate_size must be even, and seq_length a number of tokens above 1")
    decoder = text_decoder(
        {
            **{key: values[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "tie_word_embeddings")},
            "num_attention_heads": heads,
            "intermediate_size": values["intermediate_size"] // 2,  # gate and up together
            "rms_norm_eps": values["layer_norm_epsilon"],
            "rope_theta": values["rotary_emb_base"],
            "max_position_embeddings": values["max_position_embeddings"],
        }
    )
    scaling = {"rope_type": "prompt_ntk", "original_max_position_embeddings": length}
    return replace(
        decoder,
        biases=BiasConfig(qkv_bias=True, o_bias=not values["no_bias"], mlp_bias=not values["no_bias"]),
        scales=replace(
            decoder.scales, query_scale=QueryScale(kind="log", length=length) if values["use_logn_attn"] else None
        ),
        rope_scaling=scaling if values["use_dynamic_ntk"] else None,
    )


def _tower(visual: Mapping[str, Any]) -> VisionConfig:
    return VisionConfig(
        hidden_size=visual["width"],
        num_hidden_layers=visual["layers"],
        num_attention_heads=visual["heads"],
        intermediate_size=int(visual["width"] * visual["mlp_ratio"]),
        image_size=_STORED * visual["patch_size"],
        patch_size=visual["patch_size"],
        hidden_act="gelu",
        layer_norm_eps=_EPS,
        blocks=BlockConfig(),
        class_token=False,
        patch_bias=False,
        pre_norm=True,
        post_norm=False,
        feature_layers=(visual["layers"],),
        drop_first_feature=False,
        resample_positions=True,
    )


def pixels(image: Image.Image, settings: ImageSettings) -> np.ndarray:
    return preprocess(image, settings)[None]


def image_text(config: VLMConfig, settings: ImageSettings, image_token: str, size: tuple[int, int]) -> str:
    assert config.projector.resampler is not None
    return "<img>" + image_token * config.projector.resampler.num_queries + "</img>"
