"""Tiny random checkpoints made, saved and answered by the reference: transformers 5.23 on torch 2.13.

    python tests/golden/reference.py           rewrites this folder: pictures, checkpoints and expected outputs
    python tests/golden/reference.py NAME...   rewrites these checkpoints only

tests/test_reference.py recomputes the expected outputs live with the same code. Nothing else in this repository needs torch.
"""

import io
import json
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gemma4_reference
import numpy as np
from float8_reference import decoded, is_float8, to_float8
from gemma4_reference import FAMILIES as GEMMA4
from lighton_reference import CHAT as LIGHTON
from minicpm_chat import MINICPM
from mllama_reference import TEMPLATE as MLLAMA
from mllama_reference import compute_as_meta, is_meta, tiles_of
from PIL import Image
from pixtral_reference import MINISTRAL3, MISTRAL3, PIXTRAL, as_on_the_hub, is_pixtral, tie_in_text, untied
from pixtral_reference import ImagesOnly as PixtralImages
from pixtral_reference import add_tokens as add_pixtral
from pixtral_reference import pixels_of as pixels_of_pixtral
from qwen_reference import FAMILIES as QWEN
from qwen_reference import (
    QWEN2,
    QWEN3,
    add_tokens,
    flatten,
    images_only,
    limits_by_their_names,
    neighbours,
    pixels_of,
)
from readers_reference import (
    GLM,
    PADDLE,
    READERS,
    as_glm4v,
    as_glm_ocr,
    flatten_paddle,
    with_draft_layer,
    with_unread_tensors,
)

GOLDEN = Path(__file__).parent
STEPS = 10  # tokens decoded with the cache

CORPUS = [
    "What is in this image? A red circle stands left of a blue square. ",
    "Compare the first picture with the second one. Which of them is larger? ",
    "The answer is yes, the triangle is green and the star is yellow. ",
    "How many objects do you see? There are three: two squares and one circle. ",
    "Describe the photo in a few words. It shows a small house under a grey sky. ",
] * 4

VICUNA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}"
    "{% endfor %}{% if message['role'] != 'assistant' %}{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}{% else %}{% for content in "
    "message['content'] | selectattr('type', 'equalto', 'text') %}{% generation %}{{ content['text'] + ' '}}"
    "{% endgeneration %}{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
IDEFICS3 = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] | capitalize }}{% if message['content'][0]['type'] == "
    "'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' %}"
    "{{ line['text'] }}{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
GEMMA3 = (
    "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}{%- set before = messages[0]['content'][0]['text'] + '\n\n' -%}"
    "{%- set said = messages[1:] -%}{%- else -%}{%- set before = '' -%}{%- set said = messages -%}{%- endif -%}"
    "{%- for message in said -%}{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}"
    "{{ '<start_of_turn>' + role + '\n' + (before if loop.first else '') }}{%- for item in message['content'] -%}"
    "{%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}{%- else -%}{{ item['text'] | trim }}{%- endif -%}"
    "{%- endfor -%}{{ '<end_of_turn>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<image>' }}{% else %}{{ content['text'] }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ONEVISION = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + content['text'] }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GRANITE = (
    "{% for message in messages %}{{ '<|start_of_role|>' + message['role'] + '<|end_of_role|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% elif part['type'] == 'image' %}{{ '<image>' }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|end_of_text|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
)
INTERNVL = CHATML.replace("'<image>'", "'<IMG_CONTEXT>\\n'")
QIANFAN = CHATML.replace("'<image>'", "'<image>\\n'")  # which is no token
INSTRUCT = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}{{ '<image>\n' }}{% else %}"
    "{{ content['text'] }}{% endif %}{% endfor %}{{ ' [/INST]' }}{% else %}{{ message['content'][0]['text'] + eos_token }}"
    "{% endif %}{% endfor %}"
)


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def image_part(name: str) -> dict[str, str]:
    return {"type": "image", "image": name}


def user(*parts: dict[str, str]) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


CASES: dict[str, list[dict[str, Any]]] = {
    "image": [user(image_part("photo.jpg"), text_part("What is in this image?"))],
    "two_images": [
        user(
            text_part("Compare "), image_part("photo.jpg"), text_part(" with "), image_part("shapes.png"),
            text_part(". Which is larger?"),
        )
    ],
    "text": [user(text_part("How many objects do you see?"))],
    "two_turns": [
        user(image_part("shapes.png"), text_part("Describe the photo.")),
        {"role": "assistant", "content": [text_part("A red circle and a blue square.")]},
        user(text_part("And this one? "), image_part("photo.jpg")),
    ],
}  # fmt: skip
USUAL = tuple(CASES)  # of every family that can take them
CASES |= {  # for tiles: a third shape, and images that stand beside one another
    "strip": [user(image_part("strip.png"), text_part("Which of them is larger?"))],
    "side_by_side": [
        user(
            text_part("See "), image_part("shapes.png"), image_part("photo.jpg"), text_part("yes, "), image_part("strip.png"),
            text_part("three: two squares"),
        )
    ],
}  # fmt: skip


ALONE = (*USUAL, "strip", "asked_twice")  # each picture alone, too


@dataclass(frozen=True)
class Spec:
    """A tiny checkpoint: its parts' config classes and sizes, and the layout that its files take.

    `cases` are those of CASES that the reference can take; `llava` is what else its config says.
    """

    vision: tuple[str, dict[str, Any]]
    text: tuple[str, dict[str, Any]]
    llava: dict[str, Any]
    image_processor: tuple[str, dict[str, Any]]
    tokenizer: str
    chat_template: str
    template_file: str
    rename: Callable[[str], str] = lambda name: name
    shards: int = 1
    config: Callable[[dict[str, Any]], None] = lambda config: None
    seed: int = 0
    family: str = "llava"
    finish: Callable[[Path], None] = lambda folder: None
    cases: tuple[str, ...] = USUAL


def hub_names(name: str) -> str:
    """Layout L1, most of the Hub's files: `vision_tower.vision_model.*`, `language_model.model.*`."""
    return name.replace("vision_tower.", "vision_tower.vision_model.", 1) if name.startswith("vision_tower.") else name


def memory_names(name: str) -> str:
    """Layout L2b, transformers 5 in memory: everything but the head below `model.`."""
    if name.startswith("language_model.lm_head"):
        return name.removeprefix("language_model.")
    if name.startswith("language_model.model."):
        return "model.language_model." + name.removeprefix("language_model.model.")
    return "model." + name


def older_memory_names(name: str) -> str:
    """Layout L2, transformers 4.52 in memory: as L2b, with `vision_model.` inside the tower."""
    return memory_names(name).replace("model.vision_tower.", "model.vision_tower.vision_model.", 1)


def qianfan_names(name: str) -> str:
    """Qianfan-OCR's names on the Hub; transformers 5.23 writes the decoder's layers into an `encoder`."""
    return name.replace("language_model.model.encoder.", "language_model.model.")


def mllama_memory_names(name: str) -> str:
    """Llama 3.2 Vision as transformers 5 has it in memory."""
    if name.startswith("language_model.lm_head"):
        return name.removeprefix("language_model.")
    return "model." + name.replace("language_model.model.", "language_model.", 1)


def old_rope_keys(config: dict[str, Any]) -> None:
    """Write a config as transformers 4 did: `rope_theta` and `rope_scaling`, `torch_dtype`, no `dtype`."""
    text = config["text_config"]
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope.pop("rope_theta")
    text["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
    for part in (config, text, config["vision_config"]):
        part.pop("dtype", None)
    config["torch_dtype"] = "float32"


def sparse(config: dict[str, Any]) -> None:
    """Leave out of a config what its classes default to, as the Hub's files do, and name the image token the new way."""
    old_rope_keys(config)
    text, vision = config["text_config"], config["vision_config"]
    for key in (
        "rms_norm_eps",
        "hidden_act",
        "tie_word_embeddings",
        "rope_scaling",
        "max_position_embeddings",
    ):
        text.pop(key)
    for key in ("hidden_act", "layer_norm_eps", "num_channels"):
        vision.pop(key)
    for key in ("projector_hidden_act", "vision_feature_select_strategy", "vision_feature_layer"):
        config.pop(key)
    config["image_token_id"] = config.pop("image_token_index")


def sparse_mllama(config: dict[str, Any]) -> None:
    """A config that leaves out what its classes default to, with the text as transformers 4 wrote it."""
    old_rope_keys(config)
    for key in ("hidden_act", "rms_norm_eps", "tie_word_embeddings"):
        config["text_config"].pop(key)
    for key in ("hidden_act", "norm_eps", "max_num_tiles", "supported_aspect_ratios"):
        config["vision_config"].pop(key)


def transformers_semantics(config: dict[str, Any]) -> None:
    config["semantics"] = "transformers"


def sparse_idefics3(config: dict[str, Any]) -> None:
    """A config as SmolVLM-256M's: what the classes default to is left out, and the vision part's own type is the outer one."""
    old_rope_keys(config)
    text, vision = config["text_config"], config["vision_config"]
    for key in ("hidden_act", "tie_word_embeddings", "rope_scaling"):
        text.pop(key)
    for key in ("hidden_act", "layer_norm_eps", "num_channels", "attention_dropout"):
        vision.pop(key)
    vision["model_type"] = "idefics3"


def sparse_gemma3(config: dict[str, Any]) -> None:
    """A config as google/gemma-3-4b-it's: what the classes default to is left out, one rope scaling, a pattern of layers."""
    text, vision = config["text_config"], config["vision_config"]
    text["rope_scaling"] = {"rope_type": "linear", "factor": text.pop("rope_parameters")["full_attention"]["factor"]}
    text["sliding_window_pattern"] = text.pop("layer_types").index("full_attention") + 1
    for key in (
        "rms_norm_eps", "hidden_activation", "tie_word_embeddings", "max_position_embeddings", "query_pre_attn_scalar",
        "num_attention_heads", "num_key_value_heads", "attn_logit_softcapping", "final_logit_softcapping",
    ):  # fmt: skip
        text.pop(key)
    for key in ("hidden_act", "layer_norm_eps", "num_channels"):
        vision.pop(key)
    for part in (config, text, vision):
        part.pop("dtype", None)
    config.pop("tie_word_embeddings", None)
    config["torch_dtype"] = "float32"


def sparse_paligemma(config: dict[str, Any]) -> None:
    """A config as google/paligemma-3b's, with PaliGemma 1's stale top-level hidden size."""
    old_rope_keys(config)
    text, vision = config["text_config"], config["vision_config"]
    for key in (
        "rms_norm_eps",
        "hidden_act",
        "tie_word_embeddings",
        "rope_scaling",
        "rope_theta",
        "max_position_embeddings",
    ):
        text.pop(key)
    for key in ("hidden_act", "layer_norm_eps", "num_channels"):
        vision.pop(key)
    for key in ("tie_word_embeddings", "vocab_size"):
        config.pop(key, None)
    config["hidden_size"] = 2048


def sparse_onevision(config: dict[str, Any]) -> None:
    """A config as llava-hf/llava-onevision-*'s: the tie is the text's alone."""
    old_rope_keys(config)
    for key in ("rms_norm_eps", "hidden_act", "rope_scaling", "layer_types", "use_sliding_window"):
        config["text_config"].pop(key, None)
    for key in ("hidden_act", "layer_norm_eps", "num_channels"):
        config["vision_config"].pop(key)
    for key in ("projector_hidden_act", "multimodal_projector_bias", "tie_word_embeddings"):
        config.pop(key)


CLIP_STATISTICS = dict(image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711])
GOTOCR = dict(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
GRANITE_TEXT = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=512, rope_parameters={"rope_theta": 1e5, "rope_type": "default"}, tie_word_embeddings=True,
    embedding_multiplier=3.0, residual_multiplier=0.6, attention_multiplier=0.2, logits_scaling=2.0,
    pad_token_id=None, bos_token_id=None, eos_token_id=None)  # fmt: skip
SPECS = {
    "llava-clip-llama": Spec(
        vision=("clip_vision_model", dict(
            hidden_size=48, intermediate_size=72, num_hidden_layers=3, num_attention_heads=3, image_size=42, patch_size=14)),
        text=("llama", dict(
            hidden_size=60, intermediate_size=88, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1,
            max_position_embeddings=512, rms_norm_eps=1e-5)),
        llava={},
        image_processor=("CLIP", dict(size={"shortest_edge": 42}, crop_size={"height": 42, "width": 42})),
        tokenizer="llama", chat_template=VICUNA, template_file="chat_template.json",
        rename=hub_names, config=old_rope_keys, seed=1),
    "llava-siglip-qwen2": Spec(
        vision=("siglip_vision_model", dict(
            hidden_size=40, intermediate_size=56, num_hidden_layers=2, num_attention_heads=5, image_size=48, patch_size=16,
            vision_use_head=True)),
        text=("qwen2", dict(
            hidden_size=56, intermediate_size=80, num_hidden_layers=3, num_attention_heads=7, num_key_value_heads=1,
            max_position_embeddings=512, tie_word_embeddings=True, rope_parameters={"rope_theta": 1e6, "rope_type": "default"})),
        llava=dict(vision_feature_layer=-1, vision_feature_select_strategy="full", tie_word_embeddings=True),
        image_processor=("Siglip", dict(size={"height": 48, "width": 48})),
        tokenizer="qwen2", chat_template=CHATML, template_file="chat_template.jinja", seed=2),
    "llava-clip-mistral": Spec(
        vision=("clip_vision_model", dict(
            hidden_size=36, intermediate_size=50, num_hidden_layers=3, num_attention_heads=3, image_size=28, patch_size=14)),
        text=("mistral", dict(
            hidden_size=52, intermediate_size=70, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=3,
            head_dim=12, sliding_window=11, rope_parameters={"rope_theta": 1e6, "rope_type": "default"})),
        llava={},
        image_processor=("Llava", dict(do_pad=True, size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})),
        tokenizer="llama", chat_template=INSTRUCT, template_file="tokenizer_config.json",
        rename=older_memory_names, config=sparse, seed=3),
    "llava-clip-llama-layers": Spec(
        vision=("clip_vision_model", dict(
            hidden_size=32, intermediate_size=40, num_hidden_layers=4, num_attention_heads=1, image_size=30, patch_size=10,
            hidden_act="gelu")),
        text=("llama", dict(
            hidden_size=45, intermediate_size=64, num_hidden_layers=2, num_attention_heads=9, num_key_value_heads=3,
            head_dim=8, attention_bias=True, mlp_bias=True, max_position_embeddings=512,
            rope_parameters={"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                             "high_freq_factor": 4.0, "original_max_position_embeddings": 32})),
        llava=dict(vision_feature_layer=[-2, -4, 1], vision_feature_select_strategy="full", multimodal_projector_bias=False),
        image_processor=("CLIP", dict(size={"height": 30, "width": 30}, do_center_crop=False)),
        tokenizer="llama", chat_template=VICUNA, template_file="chat_template.jinja",
        rename=memory_names, shards=2, seed=4),
    "llava-next-clip-mistral": Spec(  # photo.jpg: 2 x 1 tiles, bars above and below; shapes.png: 1 x 2, bars at the sides
        vision=("clip_vision_model", dict(
            hidden_size=36, intermediate_size=50, num_hidden_layers=3, num_attention_heads=3, image_size=24, patch_size=6)),
        text=("mistral", dict(
            hidden_size=52, intermediate_size=70, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=3,
            head_dim=12, sliding_window=None, rope_parameters={"rope_theta": 1e6, "rope_type": "default"})),
        llava=dict(image_grid_pinpoints=[[24, 48], [48, 24], [72, 24], [24, 72]]),
        image_processor=("LlavaNext", dict(
            size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24},
            image_grid_pinpoints=[[24, 48], [48, 24], [72, 24], [24, 72]])),
        tokenizer="llama", chat_template=INSTRUCT, template_file="chat_template.json",
        rename=hub_names, config=sparse, seed=5, family="llava_next"),
    "llava-next-siglip-qwen2": Spec(  # photo.jpg: 4 x 4 tiles, bars at the sides; shapes.png: 3 x 4, above and below
        vision=("siglip_vision_model", dict(
            hidden_size=40, intermediate_size=56, num_hidden_layers=2, num_attention_heads=5, image_size=24, patch_size=8,
            vision_use_head=True)),
        text=("qwen2", dict(
            hidden_size=56, intermediate_size=80, num_hidden_layers=3, num_attention_heads=7, num_key_value_heads=1,
            max_position_embeddings=512, rope_parameters={"rope_theta": 1e6, "rope_type": "default"})),
        llava=dict(
            vision_feature_layer=[-1, 1], vision_feature_select_strategy="full", image_grid_pinpoints=[[24, 48], [72, 96], [96, 96]]),
        image_processor=("LlavaNext", dict(
            size={"height": 24, "width": 24}, crop_size={"height": 24, "width": 24}, image_mean=[0.5, 0.4, 0.3],
            image_grid_pinpoints=[[24, 48], [72, 96], [96, 96]])),
        tokenizer="qwen2", chat_template=CHATML, template_file="chat_template.jinja",
        rename=memory_names, shards=2, seed=7, family="llava_next"),
    "llava-onevision": Spec(  # as on the Hub; grids of more than 2 tiles of 9 features are shrunk
        vision=("siglip_vision_model", dict(
            hidden_size=40, intermediate_size=56, num_hidden_layers=2, num_attention_heads=5, image_size=24, patch_size=8,
            vision_use_head=False)),
        text=("qwen2", dict(
            hidden_size=56, intermediate_size=80, num_hidden_layers=2, num_attention_heads=7, num_key_value_heads=1,
            max_position_embeddings=512, tie_word_embeddings=True, rope_parameters={"rope_theta": 1e6, "rope_type": "default"})),
        llava=dict(
            vision_feature_layer=-1, vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_2",
            image_grid_pinpoints=[[24 * h, 24 * w] for h in range(1, 4) for w in range(1, 4)]),
        image_processor=("LlavaOnevision", dict(
            size={"height": 24, "width": 24}, image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5],
            image_grid_pinpoints=[[24 * h, 24 * w] for h in range(1, 4) for w in range(1, 4)])),
        tokenizer="qwen2", chat_template=ONEVISION, template_file="chat_template.json",
        rename=hub_names, config=sparse_onevision, seed=30, family="llava_onevision", cases=ALONE),
    "llava-onevision-5": Spec(  # as transformers 5 writes it; wide grids, which nothing shrinks
        vision=("siglip_vision_model", dict(
            hidden_size=36, intermediate_size=50, num_hidden_layers=3, num_attention_heads=3, image_size=16, patch_size=8,
            vision_use_head=False)),
        text=("qwen2", dict(
            hidden_size=48, intermediate_size=70, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=3,
            max_position_embeddings=512, rope_parameters={"rope_theta": 1e6, "rope_type": "default"})),
        llava=dict(
            vision_feature_layer=[-1, 1], vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_9",
            image_grid_pinpoints=[[16, 48], [48, 32], [32, 64], [16, 16]]),
        image_processor=("LlavaOnevision", dict(
            size={"height": 16, "width": 16}, image_mean=[0.5, 0.4, 0.3],
            image_grid_pinpoints=[[16, 48], [48, 32], [32, 64], [16, 16]])),
        tokenizer="qwen2", chat_template=ONEVISION, template_file="chat_template.jinja",
        shards=2, seed=31, family="llava_onevision", cases=ALONE),
    "paligemma-gemma": Spec(
        vision=("siglip_vision_model", dict(
            hidden_size=40, intermediate_size=56, num_hidden_layers=2, num_attention_heads=5, image_size=42, patch_size=14,
            vision_use_head=False)),
        text=("gemma", dict(
            hidden_size=48, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1,
            head_dim=16)),
        llava=dict(projection_dim=48),
        image_processor=("Siglip", dict(size={"height": 42, "width": 42}, image_seq_length=9)),
        tokenizer="gemma", chat_template="", template_file="preprocessor_config.json",
        rename=hub_names, config=sparse_paligemma, seed=8, family="paligemma", cases=("image", "two_images")),
    "paligemma2-gemma2": Spec(
        vision=("siglip_vision_model", dict(
            hidden_size=36, intermediate_size=50, num_hidden_layers=2, num_attention_heads=3, image_size=48, patch_size=16,
            vision_use_head=False)),
        text=("gemma2", dict(
            hidden_size=52, intermediate_size=70, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            head_dim=10, query_pre_attn_scalar=7, sliding_window=6, attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0)),
        llava=dict(projection_dim=52),
        image_processor=("Siglip", dict(size={"height": 48, "width": 48}, image_seq_length=9)),
        tokenizer="gemma", chat_template="", template_file="processor_config.json",
        rename=memory_names, shards=2, seed=9, family="paligemma", cases=("image", "two_images")),
    "internvl-qwen2": Spec(  # photo.jpg: 3 x 2 tiles; shapes.png: 2 x 3
        vision=("internvl_vision", dict(
            hidden_size=40, intermediate_size=56, num_hidden_layers=2, num_attention_heads=5, image_size=[24, 24],
            patch_size=[6, 6], attention_bias=True)),
        text=("qwen2", dict(
            hidden_size=56, intermediate_size=80, num_hidden_layers=2, num_attention_heads=7, num_key_value_heads=1,
            max_position_embeddings=512, rope_parameters={"rope_theta": 1e6, "rope_type": "default"})),
        llava=dict(tie_word_embeddings=False, image_seq_length=4),
        image_processor=("GotOcr2", dict(size={"height": 24, "width": 24}, max_patches=6, **GOTOCR)),
        tokenizer="qwen2", chat_template=INTERNVL, template_file="chat_template.json",
        config=old_rope_keys, seed=10, family="internvl"),
    "internvl-rms-qwen3": Spec(  # InternViT-6B's kind; 6 x 6 patches on positions of 4 x 4
        vision=("internvl_vision", dict(
            hidden_size=36, intermediate_size=50, num_hidden_layers=3, num_attention_heads=3, image_size=[16, 16],
            patch_size=[4, 4], norm_type="rms_norm", use_qk_norm=True)),
        text=("qwen3", dict(
            hidden_size=52, intermediate_size=70, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=3,
            head_dim=12, max_position_embeddings=512, tie_word_embeddings=True,
            rope_parameters={"rope_theta": 1e6, "rope_type": "default"})),
        llava=dict(vision_feature_layer=-2, tie_word_embeddings=True, image_seq_length=9),
        image_processor=("GotOcr2", dict(size={"height": 24, "width": 24}, min_patches=2, max_patches=3, **GOTOCR)),
        tokenizer="qwen2", chat_template=INTERNVL, template_file="chat_template.jinja",
        rename=memory_names, shards=2, seed=11, family="internvl"),
    "internvl-chat-internlm2": Spec(  # as InternVL-Chat-V1-5: InternViT-6B's kind, 7 tiles with the thumbnail
        vision=("intern_vit_6b", dict(
            hidden_size=36, intermediate_size=50, num_hidden_layers=2, num_attention_heads=3, image_size=16, patch_size=4)),
        text=("InternLM2ForCausalLM", dict(
            model_type="internlm2", hidden_size=48, intermediate_size=72, num_hidden_layers=2, num_attention_heads=6,
            num_key_value_heads=2, max_position_embeddings=512, rms_norm_eps=1e-5, rope_theta=1e6, bias=False,
            rope_scaling={"type": "dynamic", "factor": 2.0})),
        llava=dict(
            template="internlm2-chat", ps_version="v2", force_image_size=16, dynamic_image_size=True, use_thumbnail=True,
            max_dynamic_patch=6, downsample_ratio=0.5, select_layer=-1),
        image_processor=("", {}), tokenizer="pieces", chat_template="", template_file="", seed=12, family="internvl_chat"),
    "internvl-chat-qwen3": Spec(  # as InternVL3_5: InternViT-300M's kind, vocab.json and merges.txt
        vision=("intern_vit_6b", dict(
            hidden_size=40, intermediate_size=56, num_hidden_layers=2, num_attention_heads=5, image_size=16, patch_size=4,
            qkv_bias=True, qk_normalization=False, norm_type="layer_norm")),
        text=("Qwen3ForCausalLM", dict(
            model_type="qwen3", hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6,
            num_key_value_heads=2, head_dim=12, max_position_embeddings=512, rope_theta=1e6)),
        llava=dict(
            template="internvl2_5", ps_version="v2", force_image_size=16, dynamic_image_size=True, use_thumbnail=True,
            max_dynamic_patch=5, system_message=None),
        image_processor=("", {}), tokenizer="qwen2 files", chat_template="", template_file="", shards=2, seed=13,
        family="internvl_chat"),
    "internvl-chat-llama": Spec(  # as InternVL-Chat-V1-1: one squashed image, columns first, 4 x 4 patches on positions of 2 x 2
        vision=("intern_vit_6b", dict(
            hidden_size=32, intermediate_size=44, num_hidden_layers=3, num_attention_heads=2, image_size=12, patch_size=6)),
        text=("LlamaForCausalLM", dict(
            model_type="llama", hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, rms_norm_eps=1e-5)),
        llava=dict(template="internvl_zh", force_image_size=24, select_layer=-2),
        image_processor=("", {}), tokenizer="llama", chat_template="", template_file="", seed=14, family="internvl_chat"),
    "internvl-chat-phi3": Spec(  # as InternVL2-4B, without its thumbnail
        vision=("intern_vit_6b", dict(
            hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4,
            qkv_bias=True, qk_normalization=False, norm_type="layer_norm")),
        text=("Phi3ForCausalLM", dict(
            model_type="phi3", hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, sliding_window=30, pad_token_id=2)),
        llava=dict(
            template="phi3-chat", ps_version="v2", force_image_size=16, dynamic_image_size=True, min_dynamic_patch=2,
            max_dynamic_patch=4),
        image_processor=("", {}), tokenizer="llama", chat_template="", template_file="", seed=15, family="internvl_chat"),
    "mllama-meta": Spec(  # photo.jpg: 2 x 2 tiles; shapes.png: 1 x 2; strip.png: 1 x 3
        vision=("mllama_vision_model", dict(
            hidden_size=24, intermediate_size=36, num_hidden_layers=3, num_global_layers=2, attention_heads=3, image_size=56,
            patch_size=14, intermediate_layers_indices=[1, 2], vision_output_dim=72)),
        text=("mllama_text_model", dict(
            hidden_size=64, intermediate_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
            cross_attention_layers=[1, 3], max_position_embeddings=1024, pad_token_id=0,
            rope_parameters={"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                             "high_freq_factor": 4.0, "original_max_position_embeddings": 32})),
        llava={},
        image_processor=("Mllama", dict(size={"height": 56, "width": 56}, **CLIP_STATISTICS)),
        tokenizer="llama3", chat_template=MLLAMA, template_file="chat_template.json",
        config=sparse_mllama, seed=20, family="mllama", cases=tuple(CASES)),
    "mllama-transformers": Spec(  # photo.jpg: 2 x 1 tiles; shapes.png: one; strip.png: 1 x 2
        vision=("mllama_vision_model", dict(
            hidden_size=24, intermediate_size=40, num_hidden_layers=4, num_global_layers=1, attention_heads=2, image_size=84,
            patch_size=21, intermediate_layers_indices=[0, 2, 3], vision_output_dim=96)),
        text=("mllama_text_model", dict(
            hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
            cross_attention_layers=[1], max_position_embeddings=1024, pad_token_id=0, rms_norm_eps=1e-4)),
        llava={},
        image_processor=("Mllama", dict(size={"height": 84, "width": 84}, **CLIP_STATISTICS)),
        tokenizer="llama3", chat_template=MLLAMA, template_file="chat_template.jinja",
        rename=mllama_memory_names, config=transformers_semantics, shards=2, seed=25, family="mllama",
        cases=tuple(CASES)),
    "idefics3-markers": Spec(  # as SmolVLM-256M; photo.jpg: 4 x 3 tiles; shapes.png: 3 x 4; strip.png: 1 x 4
        vision=("idefics3_vision", dict(
            hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=3, image_size=16, patch_size=2)),
        text=("llama", dict(
            hidden_size=48, intermediate_size=72, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
            max_position_embeddings=1024, rms_norm_eps=1e-5, rope_parameters={"rope_theta": 1e5, "rope_type": "default"})),
        llava=dict(scale_factor=4),
        image_processor=("Idefics3", dict(size={"longest_edge": 64}, max_image_size={"longest_edge": 16})),
        tokenizer="smol markers", chat_template=IDEFICS3, template_file="chat_template.json",
        config=sparse_idefics3, seed=30, family="idefics3", cases=tuple(CASES)),
    "idefics3-words": Spec(  # as Idefics3-8B: markers are plain text; photo.jpg: 2 x 2 tiles; shapes.png: 2 x 2; strip.png: 1 x 2
        vision=("idefics3_vision", dict(
            hidden_size=25, intermediate_size=40, num_hidden_layers=2, num_attention_heads=5, image_size=30, patch_size=5)),
        text=("llama", dict(
            hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=1024, rms_norm_eps=1e-4,
            rope_parameters={"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                             "high_freq_factor": 4.0, "original_max_position_embeddings": 32})),
        llava=dict(scale_factor=3),
        image_processor=("Idefics3", dict(size={"longest_edge": 45}, max_image_size={"longest_edge": 30})),
        tokenizer="smol words", chat_template=IDEFICS3, template_file="chat_template.jinja",
        shards=2, seed=31, family="idefics3", cases=(*USUAL, "strip")),
    "smolvlm-whole": Spec(  # as SmolVLM2, pictures not split
        vision=("smolvlm_vision", dict(
            hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4, image_size=24, patch_size=4)),
        text=("llama", dict(
            hidden_size=40, intermediate_size=64, num_hidden_layers=2, num_attention_heads=5, num_key_value_heads=5,
            max_position_embeddings=512, rms_norm_eps=1e-5, tie_word_embeddings=True)),
        llava=dict(scale_factor=2, tie_word_embeddings=True),
        image_processor=("Idefics3", dict(
            size={"longest_edge": 40}, max_image_size={"longest_edge": 24}, do_image_splitting=False)),
        tokenizer="smol markers", chat_template=IDEFICS3, template_file="chat_template.json",
        seed=32, family="smolvlm", cases=tuple(CASES)),
    "gemma3-hub": Spec(  # as gemma-3-4b-it: 9 tokens an image and a window of 7; every third layer sees everything
        vision=("siglip_vision_model", dict(
            hidden_size=40, intermediate_size=56, num_hidden_layers=2, num_attention_heads=5, image_size=24, patch_size=4,
            vision_use_head=False)),
        text=("gemma3_text", dict(
            hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=8, num_key_value_heads=4,
            head_dim=8, sliding_window=7, layer_types=([*["sliding_attention"] * 2, "full_attention"] * 2)[:5],
            rope_parameters={"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                             "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}})),
        llava=dict(mm_tokens_per_image=9),
        image_processor=("Gemma3", dict(size={"height": 24, "width": 24})),
        tokenizer="gemma3", chat_template=GEMMA3, template_file="chat_template.json",
        rename=hub_names, config=sparse_gemma3, seed=40, family="gemma3", cases=tuple(CASES)),
    "gemma3-crops": Spec(  # as a 27B saved by transformers 5, with pan and scan: photo.jpg and shapes.png: 2 crops; strip.png: 3
        vision=("siglip_vision_model", dict(
            hidden_size=36, intermediate_size=50, num_hidden_layers=2, num_attention_heads=3, image_size=16, patch_size=4,
            vision_use_head=False)),
        text=("gemma3_text", dict(
            hidden_size=36, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            head_dim=10, query_pre_attn_scalar=7, sliding_window=12, attn_logit_softcapping=2.0, final_logit_softcapping=3.0,
            layer_types=["full_attention", "sliding_attention", "sliding_attention"],
            rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 1e5},
                             "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}})),
        llava=dict(mm_tokens_per_image=4),
        image_processor=("Gemma3", dict(
            size={"height": 16, "width": 16}, do_pan_and_scan=True, pan_and_scan_min_crop_size=24,
            pan_and_scan_max_num_crops=3, pan_and_scan_min_ratio_to_activate=1.25)),
        tokenizer="gemma3", chat_template=GEMMA3, template_file="chat_template.jinja",
        rename=memory_names, shards=2, seed=41, family="gemma3", cases=tuple(CASES)),
    "qwen2-vl": Spec(  # photo.jpg: 8 x 6 tokens, halves rounded to even; shapes.png: 4 x 7; strip.png: 3 x 13
        vision=("qwen2_vl_vision", dict(
            depth=2, embed_dim=32, hidden_size=40, mlp_ratio=2, num_heads=2, patch_size=6)),
        text=("qwen2_vl_text", dict(
            hidden_size=40, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=512, rms_norm_eps=1e-6,
            rope_parameters={"rope_theta": 1e4, "rope_type": "default", "mrope_section": [1, 2, 2]})),
        llava={},
        image_processor=("Qwen2VL", dict(patch_size=6, size={"shortest_edge": 576, "longest_edge": 100000})),
        tokenizer="qwen2", chat_template=QWEN2, template_file="chat_template.json",
        config=flatten, seed=30, family="qwen2_vl", cases=tuple(CASES)),
    "qwen2.5-vl": Spec(  # windows of 3 x 3 tokens; photo.jpg: 6 x 4, above the limit; shapes.png: 4 x 6; strip.png: 2 x 10
        vision=("qwen2_5_vl_vision", dict(
            depth=4, hidden_size=24, intermediate_size=36, num_heads=2, patch_size=6, window_size=40, out_hidden_size=36,
            fullatt_block_indexes=[1, 3])),
        text=("qwen2_5_vl_text", dict(
            hidden_size=36, intermediate_size=50, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1,
            max_position_embeddings=512, rope_parameters={"rope_theta": 1e6, "rope_type": "default", "mrope_section": [1, 2, 3]})),
        llava=dict(tie_word_embeddings=True),
        image_processor=("Qwen2VL", dict(patch_size=6, size={"shortest_edge": 576, "longest_edge": 4000})),
        tokenizer="qwen2", chat_template=QWEN2, template_file="chat_template.jinja",
        shards=2, seed=31, family="qwen2_5_vl", cases=tuple(CASES)),
    "qwen3-vl": Spec(  # below the limit: photo.jpg 9 x 7 tokens, shapes.png 6 x 10, strip.png 4 x 15; positions of 5 x 5
        vision=("qwen3_vl_vision", dict(
            depth=3, hidden_size=24, intermediate_size=40, num_heads=2, patch_size=6, out_hidden_size=32,
            num_position_embeddings=25, deepstack_visual_indexes=[0, 2])),
        text=("qwen3_vl_text", dict(
            hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            head_dim=16, max_position_embeddings=512,
            rope_parameters={"rope_theta": 1e4, "rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True})),
        llava=dict(tie_word_embeddings=False),
        image_processor=("Qwen2VL", dict(
            patch_size=6, size={"shortest_edge": 8200, "longest_edge": 100000}, image_mean=[0.5] * 3, image_std=[0.5] * 3)),
        tokenizer="qwen2", chat_template=QWEN3, template_file="chat_template.jinja",
        seed=32, family="qwen3_vl", cases=tuple(CASES)),
    "qwen3.5": Spec(  # three linear layers and a full one, two heads of values for each of keys; tokens as of qwen3-vl
        vision=("qwen3_5_vision", dict(
            depth=2, hidden_size=16, intermediate_size=24, num_heads=2, patch_size=6, out_hidden_size=24,
            num_position_embeddings=25)),
        text=("qwen3_5_text", dict(
            hidden_size=24, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
            head_dim=32, max_position_embeddings=1024, linear_num_key_heads=2, linear_num_value_heads=4,
            linear_key_head_dim=8, linear_value_head_dim=6, tie_word_embeddings=True, rope_parameters={
                "rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1],
                "mrope_interleaved": True})),
        llava=dict(tie_word_embeddings=True),
        image_processor=("Qwen2VL", dict(
            patch_size=6, size={"shortest_edge": 8200, "longest_edge": 100000}, image_mean=[0.5] * 3, image_std=[0.5] * 3)),
        tokenizer="qwen2", chat_template=QWEN3, template_file="chat_template.jinja",
        seed=35, family="qwen3_5", cases=(*USUAL, "side_by_side", "chunks")),
    "qwen3.5-moe": Spec(  # two linear layers and a full one, three heads of values for each of keys
        vision=("qwen3_5_moe_vision", dict(
            depth=1, hidden_size=16, intermediate_size=24, num_heads=2, patch_size=6, out_hidden_size=16,
            num_position_embeddings=25)),
        text=("qwen3_5_moe_text", dict(
            hidden_size=16, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
            max_position_embeddings=1024, linear_num_key_heads=1, linear_num_value_heads=3, linear_key_head_dim=8,
            linear_value_head_dim=6, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=12,
            shared_expert_intermediate_size=12, layer_types=["linear_attention", "full_attention", "linear_attention"],
            rope_parameters={
                "rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1],
                "mrope_interleaved": True})),
        llava=dict(tie_word_embeddings=False),
        image_processor=("Qwen2VL", dict(
            patch_size=6, size={"shortest_edge": 8200, "longest_edge": 100000}, image_mean=[0.5] * 3, image_std=[0.5] * 3)),
        tokenizer="qwen2", chat_template=QWEN3, template_file="chat_template.jinja",
        shards=2, seed=41, family="qwen3_5_moe", cases=(*USUAL, "chunks")),
    "qwen3-vl-moe": Spec(  # gate and up together as wide as the hidden size, so that `down_proj` alone says how experts lie
        vision=("qwen3_vl_moe_vision", dict(
            depth=2, hidden_size=16, intermediate_size=24, num_heads=2, patch_size=6, out_hidden_size=16,
            num_position_embeddings=25, deepstack_visual_indexes=[0])),
        text=("qwen3_vl_moe_text", dict(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
            max_position_embeddings=512, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=8,
            rope_parameters={"rope_theta": 1e4, "rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True})),
        llava=dict(tie_word_embeddings=False),
        image_processor=("Qwen2VL", dict(
            patch_size=6, size={"shortest_edge": 8200, "longest_edge": 100000}, image_mean=[0.5] * 3, image_std=[0.5] * 3)),
        tokenizer="qwen2", chat_template=QWEN3, template_file="chat_template.jinja",
        seed=37, family="qwen3_vl_moe", cases=USUAL),
    "minicpm-v-4.6": Spec(  # shapes.png: 4 x 3 tokens; photo.jpg and strip.png as wholes and slices, 2 x 1 and 1 x 3
        vision=("minicpmv4_6_vision", dict(
            hidden_size=16, intermediate_size=20, num_hidden_layers=3, num_attention_heads=2, image_size=40, patch_size=4)),
        text=("qwen3_5_text", dict(
            hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
            head_dim=32, max_position_embeddings=1024, linear_num_key_heads=2, linear_num_value_heads=2,
            linear_key_head_dim=8, linear_value_head_dim=8, tie_word_embeddings=True,
            layer_types=["linear_attention", "full_attention", "linear_attention"], rope_parameters={
                "rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.25})),
        llava=dict(tie_word_embeddings=True, insert_layer_id=1),
        image_processor=("MiniCPMV4_6", dict(patch_size=4, scale_resolution=64)),
        tokenizer="qwen2", chat_template=MINICPM, template_file="chat_template.jinja",
        seed=57, family="minicpmv4_6", cases=(*USUAL, "strip", "side_by_side", "chunks")),
    "pixtral": Spec(  # photo.jpg: 12 x 9 tokens; shapes.png: 7 x 11; strip.png, shrunk: 4 x 13
        vision=("pixtral", dict(
            hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2, patch_size=8, image_size=100,
            hidden_act="silu")),
        text=("mistral", dict(
            hidden_size=40, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=16, max_position_embeddings=512, sliding_window=None, rms_norm_eps=1e-5,
            rope_parameters={"rope_theta": 1e9, "rope_type": "default"})),
        llava=dict(vision_feature_layer=-1, vision_feature_select_strategy="full"),
        image_processor=("Pixtral", dict(patch_size={"height": 8, "width": 8}, size={"longest_edge": 100})),
        tokenizer="llama3", chat_template=PIXTRAL, template_file="chat_template.json",
        config=as_on_the_hub, seed=43, cases=tuple(CASES)),
    "mistral3": Spec(  # photo.jpg: 8 x 6 tokens; shapes.png: 5 x 7; strip.png, shrunk: 2 x 8; three rotary frequencies by row, two by column
        vision=("pixtral", dict(
            hidden_size=30, intermediate_size=44, num_hidden_layers=2, num_attention_heads=3, patch_size=6, image_size=96,
            hidden_act="silu")),
        text=("mistral", dict(
            hidden_size=36, intermediate_size=50, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1,
            head_dim=10, max_position_embeddings=512, sliding_window=None, rms_norm_eps=1e-4,
            rope_parameters={"rope_theta": 1e9, "rope_type": "default"})),
        llava=dict(tie_word_embeddings=False, spatial_merge_size=2),
        image_processor=("Pixtral", dict(patch_size={"height": 6, "width": 6}, size={"longest_edge": 96})),
        tokenizer="llama3", chat_template=MISTRAL3, template_file="chat_template.jinja",
        rename=memory_names, shards=2, seed=41, family="mistral3", cases=tuple(CASES)),
    "ministral3": Spec(  # queries of tokens 24 and further are scaled; photo.jpg: 6 x 5 tokens
        vision=("pixtral", dict(
            hidden_size=30, intermediate_size=44, num_hidden_layers=2, num_attention_heads=3, patch_size=6, image_size=72,
            hidden_act="silu")),
        text=("ministral3", dict(
            hidden_size=36, intermediate_size=50, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=16, max_position_embeddings=512, sliding_window=None, tie_word_embeddings=True,
            rope_parameters={
                "rope_type": "yarn", "type": "yarn", "rope_theta": 1000.0, "factor": 16.0, "beta_fast": 32.0, "beta_slow": 1.0,
                "original_max_position_embeddings": 24, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1})),
        llava=dict(tie_word_embeddings=True, spatial_merge_size=2),
        image_processor=("Pixtral", dict(patch_size={"height": 6, "width": 6}, size={"longest_edge": 72})),
        tokenizer="llama3", chat_template=MINISTRAL3, template_file="chat_template.jinja",
        config=tie_in_text, seed=51, family="mistral3", cases=(*USUAL, "strip", "side_by_side")),
    "ministral3-float8": Spec(  # untied; the weights of the decoder's layers in float8
        vision=("pixtral", dict(
            hidden_size=30, intermediate_size=44, num_hidden_layers=2, num_attention_heads=3, patch_size=6, image_size=72,
            hidden_act="silu")),
        text=("ministral3", dict(
            hidden_size=36, intermediate_size=50, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=16, max_position_embeddings=512, sliding_window=None, tie_word_embeddings=False,
            rope_parameters={
                "rope_type": "yarn", "type": "yarn", "rope_theta": 1000.0, "factor": 16.0, "beta_fast": 32.0, "beta_slow": 1.0,
                "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1})),
        llava=dict(tie_word_embeddings=False, spatial_merge_size=2),
        image_processor=("Pixtral", dict(patch_size={"height": 6, "width": 6}, size={"longest_edge": 72})),
        tokenizer="llama3", chat_template=MINISTRAL3, template_file="chat_template.jinja", shards=2,
        config=untied, seed=52, family="mistral3", finish=to_float8),
    "lighton-ocr": Spec(  # patches: photo.jpg 11 x 8, shapes.png 7 x 11, strip.png 3 x 11; the last odd one is no token's
        vision=("pixtral", dict(
            hidden_size=30, intermediate_size=44, num_hidden_layers=2, num_attention_heads=3, patch_size=6, image_size=66,
            hidden_act="silu")),
        text=("qwen3", dict(
            hidden_size=36, intermediate_size=50, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=12, max_position_embeddings=512, rms_norm_eps=1e-4, sliding_window=None, tie_word_embeddings=True,
            rope_parameters={"rope_theta": 1e6, "rope_type": "default"})),
        llava=dict(tie_word_embeddings=True, spatial_merge_size=2),
        image_processor=("Pixtral", dict(patch_size={"height": 6, "width": 6}, size={"longest_edge": 66})),
        tokenizer="qwen2", chat_template=LIGHTON, template_file="chat_template.jinja",
        seed=53, family="lighton_ocr", cases=(*USUAL, "strip", "side_by_side", "picture")),
    "granite-docling": Spec(  # as Granite-Docling-258M, an Idefics3: 4 x 4 patches are a token; photo.jpg: 2 x 2 tiles
        vision=("idefics3_vision", dict(
            hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=4)),
        text=("llama", dict(
            hidden_size=36, intermediate_size=48, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
            head_dim=8, max_position_embeddings=512, rms_norm_eps=1e-5, tie_word_embeddings=True,
            rope_parameters={"rope_theta": 1e5, "rope_type": "default"})),
        llava=dict(scale_factor=4, tie_word_embeddings=True),
        image_processor=("Idefics3", dict(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})),
        tokenizer="smol markers granite", chat_template=GRANITE, template_file="chat_template.jinja",
        seed=55, family="idefics3", cases=(*USUAL, "strip")),
    "qianfan-ocr": Spec(  # photo.jpg: 2 x 3 tiles; shapes.png: 3 x 2; strip.png: 5 x 1; a thumbnail behind them
        vision=("qianfan_ocr_vision", dict(
            hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=3, image_size=[24, 24],
            patch_size=[6, 6])),
        text=("qwen3", dict(
            hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=12, max_position_embeddings=512, rms_norm_eps=1e-4,
            rope_parameters={"rope_theta": 1e6, "rope_type": "default"})),
        llava=dict(tie_word_embeddings=False, image_seq_length=4),
        image_processor=("GotOcr2", dict(size={"height": 24, "width": 24}, max_patches=6, **GOTOCR)),
        tokenizer="qwen2 plain", chat_template=QIANFAN, template_file="chat_template.jinja", rename=qianfan_names,
        seed=54, family="qianfan_ocr", cases=(*USUAL, "strip")),
    "paddleocr-vl": Spec(  # photo.jpg, above the limit: 6 x 4 tokens; shapes.png: 4 x 7; strip.png: 2 x 11; positions of 5 x 5
        vision=("paddleocr_vl_vision", dict(
            hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=6)),
        text=("paddleocr_vl_text", dict(
            hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=16, max_position_embeddings=512, tie_word_embeddings=False,
            rope_parameters={"rope_theta": 5e5, "rope_type": "default", "mrope_section": [2, 3, 3]})),
        llava=dict(tie_word_embeddings=False),
        image_processor=("PaddleOCRVL", dict(
            patch_size=6, size={"shortest_edge": 576, "longest_edge": 4000}, image_mean=[0.5] * 3, image_std=[0.5] * 3)),
        tokenizer="qwen2", chat_template=PADDLE, template_file="chat_template.json",
        config=flatten_paddle, finish=with_unread_tensors, seed=60, family="paddleocr_vl", cases=tuple(CASES)),
    "glm4v": Spec(  # half of a head is rotated; photo.jpg, above the limit: 6 x 4 tokens; shapes.png: 4 x 7; strip.png: 2 x 11
        vision=("glm4v_vision", dict(
            depth=2, hidden_size=24, num_heads=2, image_size=30, patch_size=6, out_hidden_size=48, intermediate_size=40)),
        text=("glm4v_text", dict(
            hidden_size=48, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1,
            max_position_embeddings=512, rope_parameters={
                "rope_theta": 1e4, "rope_type": "default", "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5})),
        llava=dict(tie_word_embeddings=False),
        image_processor=("Glm4v", dict(patch_size=6, size={"shortest_edge": 1152, "longest_edge": 8000})),
        tokenizer="qwen2", chat_template=GLM, template_file="chat_template.jinja",
        config=as_glm4v, seed=61, family="glm4v", cases=tuple(CASES)),
    "glm-ocr": Spec(  # a layer that drafts tokens behind the two; pictures as of glm4v
        vision=("glm_ocr_vision", dict(
            depth=2, hidden_size=24, num_heads=2, patch_size=6, out_hidden_size=36, intermediate_size=32)),
        text=("glm_ocr_text", dict(
            hidden_size=36, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=12, max_position_embeddings=512, rope_parameters={
                "rope_theta": 1e4, "rope_type": "default", "mrope_section": [1, 2, 3], "partial_rotary_factor": 1.0})),
        llava=dict(tie_word_embeddings=False),
        image_processor=("Glm46V", dict(patch_size=6, size={"shortest_edge": 1152, "longest_edge": 8000})),
        tokenizer="qwen2", chat_template=GLM, template_file="chat_template.json",
        config=as_glm_ocr, finish=with_draft_layer, seed=62, family="glm_ocr", cases=tuple(CASES)),
    "gemma4-31b": Spec(  # tokens: photo.jpg 9 x 7 of 70 or 13 x 9 of 140, shapes.png 6 x 10, strip.png 4 x 16; windows of 40 cut them
        vision=("gemma4_vision", dict(
            hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=16,
            patch_size=4, pooling_kernel_size=2, position_embedding_size=140, standardize=True)),
        text=("gemma4_text", dict(
            hidden_size=36, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
            global_head_dim=24, num_global_key_value_heads=1, attention_k_eq_v=True, hidden_size_per_layer_input=0,
            sliding_window=40, max_position_embeddings=1024, final_logit_softcapping=30.0,
            layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            use_bidirectional_attention="vision")),
        llava={}, image_processor=("Gemma4", dict(patch_size=4, pooling_kernel_size=2, max_soft_tokens=70)),
        tokenizer="gemma4", chat_template=gemma4_reference.LARGE, template_file="chat_template.jinja",
        config=gemma4_reference.as_on_the_hub, seed=61, family="gemma4", cases=(*USUAL, "strip", "side_by_side", "budgets")),
    "gemma4-26b": Spec(  # experts beside the MLP; config.json as transformers 5.23 writes it; squares of 3 x 3 patches
        vision=("gemma4_vision", dict(
            hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=16,
            patch_size=3, pooling_kernel_size=3, position_embedding_size=210, standardize=True)),
        text=("gemma4_text", dict(
            hidden_size=36, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
            global_head_dim=24, num_global_key_value_heads=1, attention_k_eq_v=True, hidden_size_per_layer_input=0,
            sliding_window=50, max_position_embeddings=1024, final_logit_softcapping=30.0, enable_moe_block=True, num_experts=5,
            top_k_experts=2, moe_intermediate_size=12,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"], use_bidirectional_attention="vision")),
        llava={}, image_processor=("Gemma4", dict(patch_size=3, pooling_kernel_size=3, max_soft_tokens=70)),
        tokenizer="gemma4", chat_template=gemma4_reference.APART, template_file="chat_template.jinja",
        shards=2, seed=62, family="gemma4", cases=(*USUAL, "strip", "budgets")),
    "gemma4-e2b": Spec(  # embeddings for single layers, the last two layers with others' keys and wider MLPs, clipped layers
        vision=("gemma4_vision", dict(
            hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=16,
            patch_size=4, pooling_kernel_size=2, position_embedding_size=140, use_clipped_linears=True)),
        text=("gemma4_text", dict(
            hidden_size=36, intermediate_size=24, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=1, head_dim=8,
            global_head_dim=24, hidden_size_per_layer_input=6, vocab_size_per_layer_input=440, num_kv_shared_layers=2,
            use_double_wide_mlp=True, sliding_window=30, max_position_embeddings=1024, final_logit_softcapping=30.0,
            layer_types=["sliding_attention", "full_attention", *["sliding_attention"] * 2, "full_attention"])),
        llava={}, image_processor=("Gemma4", dict(patch_size=4, pooling_kernel_size=2, max_soft_tokens=70)),
        tokenizer="gemma4", chat_template=gemma4_reference.SMALL, template_file="chat_template.jinja",
        config=gemma4_reference.as_on_the_hub, finish=gemma4_reference.keep_spare_tensors, seed=68, family="gemma4",
        cases=(*USUAL, "strip", "budgets")),
    "gemma4-12b": Spec(  # no tower: patches of 8 x 8 pixels; images whole in the mask of all layers
        vision=("gemma4_unified_vision", dict(
            patch_size=4, pooling_kernel_size=2, mm_embed_dim=36, mm_posemb_size=80, output_proj_dims=36)),
        text=("gemma4_unified_text", dict(
            hidden_size=36, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
            global_head_dim=24, num_global_key_value_heads=1, attention_k_eq_v=True, sliding_window=40,
            max_position_embeddings=1024, final_logit_softcapping=30.0,
            layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"])),
        llava={}, image_processor=("Gemma4", dict(patch_size=4, pooling_kernel_size=2, max_soft_tokens=70)),
        tokenizer="gemma4", chat_template=gemma4_reference.LARGE, template_file="chat_template.jinja",
        config=gemma4_reference.as_on_the_hub, finish=gemma4_reference.name_unified, seed=64, family="gemma4_unified",
        cases=(*USUAL, "strip", "side_by_side", "budgets")),
    "granite-docling-500m": Spec(  # 4 x 4 patches of a tile are a token; photo.jpg: 3 x 2 tiles; shapes.png: 2 x 3; strip.png: 1 x 6
        vision=("granite_docling_vision", dict(
            hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=4,
            out_hidden_size=32, scale_factor=4, deepstack_visual_indexes=[0, 2])),
        text=("granite_docling_text", dict(GRANITE_TEXT, embedding_multiplier=0.4, residual_multiplier=1.2)),
        llava=dict(tie_word_embeddings=True, density_router_hidden_size=8),
        image_processor=("GraniteDocling", dict(size={"height": 32, "width": 32}, max_patches=6)),
        tokenizer="smol markers granite", chat_template=GRANITE, template_file="chat_template.jinja",
        seed=63, family="granite_docling", cases=(*USUAL, "strip")),
    "granite-docling-fine": Spec(  # 2 x 2 patches are a token; strip.png is cut into 1 x 8 tiles
        vision=("granite_docling_vision", dict(
            hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=4,
            out_hidden_size=32, scale_factor=4, deepstack_visual_indexes=[1])),
        text=("granite_docling_text", dict(GRANITE_TEXT, tie_word_embeddings=False)),
        llava=dict(tie_word_embeddings=False, density_router_hidden_size=8),
        image_processor=("GraniteDocling", dict(
            size={"height": 32, "width": 32}, max_patches=6, fine_route=True, dense_max_patches=8, dense_max_scale=0.9,
            dense_min_aspect=2.0, dense_max_aspect=9.0)),
        tokenizer="smol markers granite", chat_template=GRANITE, template_file="chat_template.jinja",
        seed=64, family="granite_docling", cases=(*USUAL, "strip")),
}  # fmt: skip
CASES |= {  # Qwen-VL's alone: for positions that go by a prompt's length, and for a reference that encodes a message by itself
    "long_text": [user(text_part(" ".join(CORPUS[:3])))],
    "line_breaks": [user(text_part("\n\nDescribe the photo.\n"))],
    "system": [{"role": "system", "content": [text_part("Answer in a few words.")]}, *CASES["two_turns"]],
}


CASES["budgets"] = [  # an image's tokens are its own; the third has those that the file says
    user(
        {**image_part("photo.jpg"), "tokens": 140}, text_part("Compare "), {**image_part("shapes.png"), "tokens": 70},
        text_part(" with "), image_part("strip.png"),
    )
]  # fmt: skip
CASES["picture"] = [user(image_part("photo.jpg"))]  # a page to be read, without words
CASES["chunks"] = [user(text_part(" ".join(CORPUS[:5] * 2)))]  # longer than two chunks of a recurrence of 64 tokens

CASES["asked_twice"] = [  # stands here because families above take all cases above
    user(image_part("shapes.png"), text_part("Describe the photo.")),
    {"role": "assistant", "content": [text_part("A red circle and a blue square.")]},
    user(text_part("Which of them is larger?")),
]


def make_pictures(folder: Path) -> None:
    """Small pictures: a JPEG like a photo, higher than wide, a PNG of shapes with transparency, and one like a banner."""
    rng = np.random.default_rng(7)
    y, x = np.mgrid[0:96, 0:70] / 96
    sky = np.stack([80 + 90 * y, 120 + 80 * y + 30 * x, 220 - 100 * y], axis=-1)
    sky[60:90, 15:50] = (150, 70, 40)
    sky[40:60] = np.where((np.abs(x[40:60] - 0.35) < (y[40:60] - 0.4))[..., None], (180, 30, 30), sky[40:60])
    photo = np.clip(sky + rng.normal(0, 6, sky.shape), 0, 255).astype(np.uint8)
    Image.fromarray(photo).save(folder / "photo.jpg", quality=92)
    shapes = np.zeros((50, 81, 4), dtype=np.uint8)
    rows, columns = np.mgrid[0:50, 0:81]
    shapes[(rows - 25) ** 2 + (columns - 20) ** 2 < 15**2] = (220, 20, 30, 255)
    shapes[12:38, 48:74] = (20, 60, 210, 140)
    Image.fromarray(shapes).save(folder / "shapes.png")
    rows, columns = np.mgrid[0:40, 0:160]
    strip = np.stack([columns + 40, 255 - 5 * rows, (rows * columns) % 256], axis=-1).astype(np.uint8)
    Image.fromarray(strip).save(folder / "strip.png")


def make_tokenizer(kind: str) -> Any:
    """A small tokenizer in Llama's or Gemma's form (SentencePiece-like BPE with byte fallback) or in Qwen2's (byte-level
    BPE)."""
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    if kind == "llama":
        words = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        words.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        special = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]]
        words.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        words.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=420, special_tokens=special))
        content = json.loads(words.to_str())
        content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < 3]
        content["pre_tokenizer"] = None
        words = Tokenizer.from_str(json.dumps(content))
        words.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        words.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
        )
        words.add_special_tokens([AddedToken("<image>", special=True, normalized=False), "<pad>"])
        return PreTrainedTokenizerFast(
            tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
        )
    if kind in ("gemma3", "gemma4"):
        from transformers import GemmaTokenizer

        words = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        words.normalizer = normalizers.Replace(" ", "▁")
        words.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        special = ["<pad>", "<eos>", "<bos>", "<unk>", *[f"<0x{byte:02X}>" for byte in range(256)]]
        lines = [line.replace(". ", ".\n\n").replace("? ", "?\n\n\n") for line in CORPUS]  # newlines are joined
        words.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=400, special_tokens=special))
        model = json.loads(words.to_str())["model"]
        if kind == "gemma4":
            return gemma4_reference.add_tokens(model["vocab"], [tuple(pair) for pair in model["merges"]])
        places = {"image": "<image_soft_token>", "boi": "<start_of_image>", "eoi": "<end_of_image>"}
        gemma = GemmaTokenizer(
            vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]],
            extra_special_tokens={f"{name}_token": token for name, token in places.items()},
        )  # fmt: skip
        gemma.add_special_tokens({"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]})
        return gemma
    if kind == "gemma":
        from transformers import GemmaTokenizer
        from transformers.models.paligemma.processing_paligemma import EXTRA_TOKENS

        words = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        words.normalizer = normalizers.Replace(" ", "▁")
        words.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\n", *[f"<0x{byte:02X}>" for byte in range(256)]]
        words.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=420, special_tokens=special))
        model = json.loads(words.to_str())["model"]
        gemma = GemmaTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])
        gemma.add_tokens(EXTRA_TOKENS)
        gemma.add_special_tokens({"additional_special_tokens": [AddedToken("<image>", special=True, normalized=False)]})
        return gemma
    if kind == "llama3":
        words = Tokenizer(models.BPE())
        words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        words.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        words.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=360, initial_alphabet=alphabet))
        headers = ("begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id", "python_tag")
        words.add_special_tokens([f"<|{name}|>" for name in headers])
        bos = words.token_to_id("<|begin_of_text|>")
        words.post_processor = processors.Sequence([
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", bos)]),
        ])  # fmt: skip
        words.add_special_tokens([*[f"<|reserved_{number}|>" for number in range(4)], "<|image|>"])
        return PreTrainedTokenizerFast(
            tokenizer_object=words, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", pad_token="<|reserved_0|>"
        )
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if kind.startswith("smol"):  # lines end in the corpus, so that two newlines are a token
        corpus = [line.replace(". ", ".\n\n") for line in CORPUS]
        words.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=360, initial_alphabet=alphabet))
        words.add_special_tokens(
            ["<|im_start|>", "<|im_end|>", "<fake_token_around_image>", "<image>", "<end_of_utterance>"]
        )
        if "granite" in kind:
            words.add_special_tokens(["<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"])
        if "markers" in kind:
            places = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
            words.add_special_tokens(["<global-img>", *places])
        end = "<|end_of_text|>" if "granite" in kind else "<end_of_utterance>"
        return PreTrainedTokenizerFast(
            tokenizer_object=words, bos_token="<|im_start|>", eos_token=end, pad_token="<|im_end|>"
        )
    words.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=360, initial_alphabet=alphabet))
    words.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *([] if "plain" in kind else ["<image>"])])
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def make_image_processor(kind: str, options: dict[str, Any]) -> Any:
    from readers_reference import image_processors
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
    from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
    from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    classes = {
        "CLIP": CLIPImageProcessorPil,
        "Siglip": SiglipImageProcessorPil,
        "Llava": LlavaImageProcessorPil,
        "LlavaNext": LlavaNextImageProcessorPil,
        "LlavaOnevision": LlavaOnevisionImageProcessorPil,
        "GotOcr2": GotOcr2ImageProcessorPil,
        "Mllama": MllamaImageProcessorPil,
        "Idefics3": Idefics3ImageProcessorPil,
        "Gemma3": Gemma3ImageProcessorPil,
        "Gemma4": gemma4_reference.Gemma4ImageProcessorPil,
        "Qwen2VL": Qwen2VLImageProcessorPil,
        "Pixtral": PixtralImageProcessorPil,
        **image_processors(),
        "MiniCPMV4_6": MiniCPMV4_6ImageProcessorPil,
    }
    return classes[kind](**options)


BY_ID = (
    "internvl",
    "idefics3",
    "smolvlm",
    "lighton_ocr",
    "qianfan_ocr",
    "minicpmv4_6",
    *QWEN,
    *READERS,
    *GEMMA4,
)  # whose configs call the image token so


def make_model(spec: Spec, vocab_size: int, image_token_id: int, **more: Any) -> Any:
    """A model with random weights in which no norm, bias or embedding is at a neutral value; `more` is for its config."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    (vision_type, vision), (text_type, text) = spec.vision, spec.text
    config = AutoConfig.for_model(
        spec.family,
        vision_config=AutoConfig.for_model(vision_type, **vision),
        text_config=AutoConfig.for_model(text_type, vocab_size=vocab_size, **text),
        **{"image_token_id" if spec.family in BY_ID else "image_token_index": image_token_id},
        **(neighbours(image_token_id) if spec.family in QWEN else {}),
        **more,
        **spec.llava,
    )
    model = AutoModelForImageTextToText.from_config(config).eval()
    if spec.family in GEMMA4:
        fill(model, spec.seed)
        gemma4_reference.fill_buffers(model, spec.seed)
        return model
    return fill(model, spec.seed, gemma=text_type.startswith("gemma"), offset=text_type.startswith("qwen3_5"))


def fill(model: Any, seed: int, *, gemma: bool = False, offset: bool = False) -> Any:
    """Put random numbers into a model, none of them neutral.

    Args:
        offset: its text's norms add 1 to their weights, and most of its mixers are gated delta nets. Of numbers as large
            as elsewhere each of these would triple what rounding did to a token, so theirs are smaller, and the scores.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)

    def noise(tensor: Any) -> Any:
        return torch.randn(tensor.shape, generator=generator)

    with torch.no_grad():
        for name, tensor in model.named_parameters():
            small = gemma and "language_model" in name  # Gemma adds 1 in its norms and scales embeddings
            around_zero = small or (offset and "language_model" in name and "linear_attn" not in name)
            if name.endswith("A_log"):  # of memories that fade within some tokens, and within some hundreds
                tensor.copy_(1.5 * noise(tensor) - 3)
            elif tensor.ndim < 2:
                neutral = "norm" in name and name.endswith("weight") and not around_zero
                scores = offset and name.endswith("language_model.norm.weight")
                tensor.copy_(0.3 * noise(tensor) + neutral - 0.6 * scores)
            elif "embed" in name:
                tensor.copy_((0.1 if small else 0.7) * noise(tensor))
            else:
                inputs = tensor.shape[-1] if ".experts." in name else tensor[0].numel()
                delta = 0.3 if name.endswith("out_proj.weight") else 0.7
                gain = delta if "linear_attn.in_proj" in name or "linear_attn.out_proj" in name else 1.4
                tensor.copy_(gain * noise(tensor) / inputs**0.5)
    return model


def save(spec: Spec, folder: Path) -> None:
    """Write a checkpoint folder in the layout that the spec asks for."""
    from safetensors.torch import load_file
    from transformers import (
        Gemma3Processor,
        Idefics3Processor,
        LlavaNextProcessor,
        LlavaProcessor,
        MllamaProcessor,
        PaliGemmaProcessor,
    )

    if spec.family == "internvl_chat":
        return save_chat(spec, folder)
    folder.mkdir(parents=True)
    tokenizer = make_tokenizer(spec.tokenizer)
    if spec.family in ("internvl", "qianfan_ocr"):
        from internvl_reference import name_image_tokens

        tokenizer = name_image_tokens(tokenizer)
    if spec.family in QWEN:
        tokenizer = add_tokens(tokenizer)
    if spec.family in READERS:
        from readers_reference import add_tokens as add_readers

        tokenizer = add_readers(spec.family, tokenizer)
    if spec.family == "minicpmv4_6":
        from minicpm_reference import add_tokens as add_minicpm

        tokenizer = add_minicpm(tokenizer)
    pixtral = spec.vision[0] == "pixtral" and spec.family != "lighton_ocr"
    if spec.family == "lighton_ocr":
        from lighton_reference import add_tokens as add_lighton

        tokenizer = add_lighton(tokenizer)
    if pixtral:
        tokenizer = add_pixtral(tokenizer)
    own = {
        **dict.fromkeys(["internvl", "qianfan_ocr"], "<IMG_CONTEXT>"),
        "mllama": "<|image|>",
        "gemma3": "<image_soft_token>",
        **{family: reader.image_token for family, reader in READERS.items()},
        **dict.fromkeys(GEMMA4, "<|image|>"),
    }
    image_token = {**own, **dict.fromkeys([*QWEN, "lighton_ocr", "minicpmv4_6"], "<|image_pad|>")}.get(
        spec.family, "[IMG]" if pixtral else "<image>"
    )
    image_token_id = tokenizer.convert_tokens_to_ids(image_token)
    # Of Llama 3.2 Vision the image token is the first that has an embedding and no score.
    more = gemma4_reference.token_ids(tokenizer) if spec.family in GEMMA4 else {}
    more.pop("image_token_id", None)
    model = make_model(spec, image_token_id if spec.family == "mllama" else len(tokenizer) + 5, image_token_id, **more)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    spec.config(config)
    (folder / "config.json").write_text(json.dumps(config, indent=1))

    tensors = {spec.rename(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    write_tensors(spec, folder, tensors)

    kind, options = spec.image_processor
    clip = spec.vision[0] == "clip_vision_model"
    if spec.family == "paligemma":
        processor: Any = PaliGemmaProcessor(make_image_processor(kind, options), tokenizer)
    elif spec.family == "mllama":
        images = make_image_processor(kind, options)
        processor = MllamaProcessor(images, tokenizer, chat_template=spec.chat_template)
    elif pixtral:
        processor = PixtralImages(
            make_image_processor(kind, options), tokenizer, patch_size=spec.vision[1]["patch_size"],
            spatial_merge_size=spec.llava.get("spatial_merge_size", 1), chat_template=spec.chat_template,
        )  # fmt: skip
    elif spec.family == "lighton_ocr":
        from lighton_reference import ImagesOnly as LightOnImages

        processor = LightOnImages(
            make_image_processor(kind, options), tokenizer, patch_size=spec.vision[1]["patch_size"],
            spatial_merge_size=2, chat_template=spec.chat_template,
        )  # fmt: skip
    elif spec.family == "minicpmv4_6":
        from minicpm_reference import ImagesOnly as MiniCPMImages

        processor = MiniCPMImages(make_image_processor(kind, options), tokenizer, spec.chat_template)
    elif spec.family == "llava_onevision":
        from onevision_reference import StillImages

        processor = StillImages(
            make_image_processor(kind, options), tokenizer,
            num_image_tokens=(spec.vision[1]["image_size"] // spec.vision[1]["patch_size"]) ** 2,
            vision_feature_select_strategy="full", chat_template=spec.chat_template,
            vision_aspect_ratio=spec.llava["vision_aspect_ratio"],
        )  # fmt: skip
    elif spec.family == "gemma3":
        processor = Gemma3Processor(
            make_image_processor(kind, options), tokenizer, chat_template=spec.chat_template,
            image_seq_length=spec.llava["mm_tokens_per_image"],
        )  # fmt: skip
    elif spec.family in GEMMA4:
        processor = gemma4_reference.ImagesOnly(
            make_image_processor(kind, options), tokenizer, chat_template=spec.chat_template
        )
    elif spec.family in QWEN:
        processor = images_only(spec.family)(
            make_image_processor(kind, options), tokenizer, chat_template=spec.chat_template
        )
    elif spec.family in READERS:
        from readers_reference import images_only as reader

        processor = reader(spec.family)(
            make_image_processor(kind, options), tokenizer, chat_template=spec.chat_template
        )
    elif spec.family in ("idefics3", "smolvlm"):  # SmolVLM's own, the same for images, wants num2words for videos
        patches = spec.vision[1]["image_size"] // spec.vision[1]["patch_size"] // spec.llava["scale_factor"]
        processor = Idefics3Processor(
            make_image_processor(kind, options), tokenizer, image_seq_len=patches**2, chat_template=spec.chat_template
        )
    elif spec.family == "qianfan_ocr":
        from transformers import QianfanOCRProcessor

        processor = QianfanOCRProcessor(
            make_image_processor(kind, options), tokenizer, spec.llava["image_seq_length"], spec.chat_template
        )
    elif spec.family == "internvl":
        from internvl_reference import ImagesOnly

        processor = ImagesOnly(
            make_image_processor(kind, options), tokenizer, spec.llava["image_seq_length"], spec.chat_template
        )
    else:
        processor = {"llava": LlavaProcessor, "llava_next": LlavaNextProcessor}[spec.family](
            image_processor=make_image_processor(kind, options),
            tokenizer=tokenizer,
            patch_size=spec.vision[1]["patch_size"],
            vision_feature_select_strategy=spec.llava.get("vision_feature_select_strategy", "default"),
            num_additional_image_tokens=1 if clip else 0,
            chat_template=spec.chat_template,
        )
    processor.save_pretrained(folder)
    if spec.chat_template and spec.template_file != "chat_template.jinja":
        (folder / "chat_template.jinja").unlink()
        target = folder / spec.template_file
        content = json.loads(target.read_text()) if target.exists() else {}
        target.write_text(json.dumps({**content, "chat_template": spec.chat_template}, indent=1))
    if spec.template_file in (
        "chat_template.json",
        "preprocessor_config.json",
    ):  # as older Hub folders: settings of images in a file of their own
        content = json.loads((folder / "processor_config.json").read_text())
        (folder / "preprocessor_config.json").write_text(json.dumps(content.pop("image_processor"), indent=1))
        (folder / "processor_config.json").write_text(json.dumps(content, indent=1))
    if spec.config is flatten:
        limits_by_their_names(folder)
    spec.finish(folder)


def write_tensors(spec: Spec, folder: Path, tensors: dict[str, Any]) -> None:
    """Write the tensors in as many files as the spec asks for."""
    from safetensors.torch import save_file

    names = sorted(tensors)
    files = ["model.safetensors"]
    if spec.shards > 1:
        files = [f"model-{i + 1:05}-of-{spec.shards:05}.safetensors" for i in range(spec.shards)]
        index = {name: files[i % spec.shards] for i, name in enumerate(names)}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": index}, indent=1)
        )
    for i, file in enumerate(files):
        save_file(
            {name: tensors[name].contiguous() for name in names[i :: spec.shards]},
            folder / file,
            {"format": "pt"},
        )


def save_chat(spec: Spec, folder: Path) -> None:
    """Write a checkpoint folder in the layout of InternVL's authors."""
    from internvl_reference import TOKENS, ChatModel, save_pieces

    folder.mkdir(parents=True)
    if spec.tokenizer == "pieces":
        tokenizer, size = None, save_pieces(folder)
    else:
        tokenizer = make_tokenizer(spec.tokenizer.removesuffix(" files"))
        ends = ["<|im_start|>", "<|im_end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
        tokenizer.add_special_tokens({"additional_special_tokens": [*ends, *TOKENS]})
        size = len(tokenizer)
    text = {"architectures": [spec.text[0]], "vocab_size": size + 5, **spec.text[1]}
    config = {
        "architectures": ["InternVLChatModel"], "model_type": "internvl_chat", **spec.llava,
        "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
        "vision_config": {"architectures": ["InternVisionModel"], "model_type": spec.vision[0], **spec.vision[1]},
        "llm_config": text, "torch_dtype": "float32",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False))
    model = fill(ChatModel(config), spec.seed)
    write_tensors(spec, folder, model.names())
    if tokenizer is not None:
        tokenizer.chat_template = CHATML  # which the authors' own code does not use
        tokenizer.save_pretrained(folder)
    if spec.tokenizer.endswith(" files"):
        content = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.json").write_text(json.dumps(content["model"]["vocab"], ensure_ascii=False))
        merges = "".join(" ".join(pair) + "\n" for pair in content["model"]["merges"])
        (folder / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
        added = {str(token.pop("id")): token for token in content["added_tokens"]}
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings |= {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    crop = {
        "feature_extractor_type": "CLIPFeatureExtractor",
        "crop_size": 448,
        "size": 448,
        "image_mean": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(crop))  # not used either


def with_pictures(messages: list[dict[str, Any]], pictures: Path) -> tuple[list[dict[str, Any]], list[Image.Image]]:
    """Messages as the reference's template takes them, and the opened pictures in order."""
    opened, plain = [], []
    for message in messages:
        parts = []
        for part in message["content"]:
            if part["type"] == "image":
                opened.append(Image.open(io.BytesIO((pictures / part["image"]).read_bytes())))
                parts.append({"type": "image"})
            else:
                parts.append(part)
        plain.append({**message, "content": parts})
    return plain, opened


def save_pickled(folder: Path) -> None:
    """A `.bin` file with tensors of every kind that occurs in one, and the same as numpy arrays."""
    import torch

    generator = torch.Generator().manual_seed(5)
    whole = torch.randn(4, 6, generator=generator)
    tensors = {
        "whole": whole, "transposed": whole.t(), "row": whole[1], "strided": whole[:, 1:5:2], "scalar": torch.tensor(3.5),
        "repeated": whole[:1].expand(3, 6), "empty": torch.zeros(0, 3), "parameter": torch.nn.Parameter(whole[2].clone()),
        "bfloat16": whole.bfloat16(), "float16": whole.half(), "int64": torch.arange(5), "uint8": torch.arange(5).byte(),
        "bool": torch.tensor([True, False]),
    }  # fmt: skip
    torch.save(tensors, folder / "tensors.bin")
    arrays = {name: tensor.detach().float().numpy() for name, tensor in tensors.items()}
    np.savez_compressed(folder / "tensors.npz", **arrays)


class Reference:
    """A checkpoint folder opened by transformers in float32."""

    def __init__(self, folder: Path, chat_template: str | None = None) -> None:
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        warnings.filterwarnings("ignore")
        self.model = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        if self.model.config.model_type == "internvl":
            from internvl_reference import ImagesOnly

            self.processor = ImagesOnly.from_pretrained(folder, backend="pil")
        elif self.model.config.model_type == "llava_onevision":
            from onevision_reference import StillImages

            self.processor = StillImages.from_pretrained(folder, backend="pil")
        elif self.model.config.model_type in QWEN:
            self.processor = images_only(self.model.config.model_type).from_pretrained(folder, backend="pil")
        elif self.model.config.model_type == "lighton_ocr":
            from lighton_reference import ImagesOnly as LightOnImages

            self.processor = LightOnImages.from_pretrained(folder, backend="pil")
        elif self.model.config.model_type in READERS:
            from readers_reference import images_only as reader

            self.processor = reader(self.model.config.model_type).from_pretrained(folder, backend="pil")
        elif self.model.config.model_type == "minicpmv4_6":
            from minicpm_reference import ImagesOnly as MiniCPMImages

            self.processor = MiniCPMImages.from_pretrained(folder, backend="pil")
        elif self.model.config.model_type in GEMMA4:
            self.processor = gemma4_reference.open_processor(folder)
        elif is_pixtral(self.model.config):
            self.processor = PixtralImages.from_pretrained(folder, backend="pil")
        else:
            self.processor = AutoProcessor.from_pretrained(folder, backend="pil")
        if self.model.config.model_type == "gemma3":  # whose processor asks for no pan and scan, whatever the file says
            defaults, images = self.processor.images_kwargs, self.processor.image_processor
            given = {key: getattr(images, key, None) for key in defaults}
            self.processor.images_kwargs = {
                **defaults,
                **{key: value for key, value in given.items() if value is not None},
            }
        if is_meta(folder):
            compute_as_meta(self.model)
        self.chat_template = chat_template

    def count_tiles(self, size: Any) -> int:
        """Rows of pixels of a LLaVA-NeXT image of this height and width."""
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        config = self.model.config
        return image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)

    def answer(self, messages: list[dict[str, Any]], pictures: Path, steps: int = STEPS) -> dict[str, np.ndarray]:
        """Prompt ids, pixels, and `steps` tokens decoded greedily with the cache.

        Returns:
            `prompt_ids` int[L], `pixel_values` float32[B, height, width, 3], `prompt_logprobs` float32[L - 1] of the
            prompt's own tokens, `token_ids` int[steps], `logprobs` float32[steps, vocab_size].
        """
        import torch

        plain, opened = with_pictures(messages, pictures)
        if self.chat_template:
            text = self.processor.apply_chat_template(
                plain, add_generation_prompt=True, chat_template=self.chat_template
            )
            if (
                self.model.config.model_type == "llava_onevision" and opened
            ):  # of one conversation, as chat templates do
                opened = [opened]
            bos = self.processor.tokenizer.bos_token
            inputs = self.processor(
                text=text, images=opened or None, return_tensors="pt",
                add_special_tokens=not (bos and text.startswith(bos)),
            )  # fmt: skip
            budgets = gemma4_reference.budgets_of(messages)
            if any(budgets) or (opened and self.model.config.model_type == "gemma4_unified"):
                inputs = self.processor.with_budgets(text, opened, budgets)
        else:  # a processor that lays out one text behind its images itself
            text = "".join(part["text"] for part in plain[-1]["content"] if part["type"] == "text")
            inputs = self.processor(text="<image>" * len(opened) + text, images=opened, return_tensors="pt")
        names = (
            "input_ids", "pixel_values", "image_sizes", "attention_mask", "token_type_ids",
            "aspect_ratio_ids", "aspect_ratio_mask", "cross_attention_mask", "pixel_attention_mask", "image_grid_thw",
            "mm_token_type_ids", "batch_num_images", "target_sizes", "image_position_ids", "tile_fine_mask",
        )  # fmt: skip
        inputs = {key: inputs[key] for key in names if key in inputs}
        ids = inputs["input_ids"]
        rows, tokens = [], []
        if hasattr(self.model.model, "rope_deltas"):  # else text alone is decoded with the last picture's offset
            self.model.model.rope_deltas = None
        with torch.no_grad():
            out = self.model(**inputs, use_cache=True)
            read = ids[0, 1:].clamp(max=out.logits.shape[-1] - 1)  # an image token may have no score
            prompt = torch.log_softmax(out.logits[0, :-1], dim=-1).gather(1, read[:, None])[:, 0]
            for _ in range(steps):
                rows.append(torch.log_softmax(out.logits[0, -1], dim=-1).numpy())
                tokens.append(int(rows[-1].argmax()))
                if len(rows) == steps:
                    break
                more = {}
                if "cross_attention_mask" in inputs:  # as `generate` does: what the prompt's last token sees
                    more["cross_attention_mask"] = inputs["cross_attention_mask"][:, -1:]
                out = self.model(
                    input_ids=torch.tensor([[tokens[-1]]]),
                    past_key_values=out.past_key_values,
                    use_cache=True,
                    **more,
                )
        answer = {
            "prompt_ids": ids[0].numpy().astype(np.int32),
            "prompt_logprobs": prompt.numpy(),
            "token_ids": np.array(tokens, dtype=np.int32),
            "logprobs": np.stack(rows),
        }
        if opened:
            if is_pixtral(self.model.config):
                answer["pixel_values"] = pixels_of_pixtral(inputs)
                return answer
            if self.model.config.model_type in READERS:
                from readers_reference import pixels_of as pixels_of_reader

                answer["pixel_values"] = pixels_of_reader(self.model.config.model_type, inputs, self.processor)
                return answer
            if "target_sizes" in inputs:
                from minicpm_reference import pixels_of as pixels_of_minicpm

                answer["pixel_values"] = pixels_of_minicpm(inputs, self.model.config.vision_config.patch_size)
                return answer
            if "image_position_ids" in inputs:
                unified = self.model.config.model_type == "gemma4_unified"
                answer["pixel_values"] = gemma4_reference.pixels_of(inputs, unified=unified)
                return answer
            pixels = inputs["pixel_values"].numpy()
            if "image_grid_thw" in inputs:
                settings = self.processor.image_processor
                answer["pixel_values"] = pixels_of(inputs, settings.merge_size, settings.patch_size)
                return answer
            if pixels.ndim == 6:  # tiles that see one another
                pixels = tiles_of(inputs).numpy()[..., ::4, ::4]  # a part, for the goldens' size
            elif "pixel_attention_mask" in inputs:  # of all images, one after another
                pixels = pixels[0]
            elif pixels.ndim == 5:  # tiles, padded to the number of the image with most
                pixels = np.concatenate(
                    [image[: self.count_tiles(size)] for image, size in zip(pixels, inputs["image_sizes"], strict=True)]
                )
            answer["pixel_values"] = np.moveaxis(pixels, 1, -1)
        return answer


def open_reference(folder: Path, chat_template: str | None = None) -> Any:
    """What answers for a checkpoint folder: transformers, or our writing of the authors' own code."""
    if json.loads((folder / "config.json").read_text())["model_type"] == "internvl_chat":
        from internvl_reference import ChatReference

        return ChatReference(folder)
    if is_float8(folder):
        with tempfile.TemporaryDirectory() as place:
            return Reference(decoded(folder, Path(place) / "decoded"), chat_template)
    return Reference(folder, chat_template)


def expected_outputs(name: str, golden: Path = GOLDEN) -> dict[str, np.ndarray]:
    """What the reference answers to every case, computed now: `case/what` to an array."""
    reference = open_reference(golden / name, SPECS[name].chat_template)
    return {
        f"{case}/{what}": array
        for case in SPECS[name].cases
        for what, array in reference.answer(CASES[case], golden, STEPS).items()
    }


def regenerate(names: list[str]) -> None:
    """Rewrite tests/golden/, or of it the checkpoints of these names."""
    if not names:
        make_pictures(GOLDEN)
        save_pickled(GOLDEN)
    for name in names or SPECS:
        folder, spec = GOLDEN / name, SPECS[name]
        shutil.rmtree(folder, ignore_errors=True)
        save(spec, folder)
        expected = expected_outputs(name)
        np.savez_compressed(folder / "expected.npz", **expected)
        print(name, sum(file.stat().st_size for file in folder.iterdir()) // 1024, "KiB")
        for case in spec.cases:
            print("  ", case, len(expected[f"{case}/prompt_ids"]), "tokens ->", *expected[f"{case}/token_ids"])


if __name__ == "__main__":
    regenerate(sys.argv[1:])
