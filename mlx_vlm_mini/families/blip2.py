"""BLIP-2 and InstructBLIP: EVA's ViT-g, a Q-Former, and OPT or Vicuna.

Sources: arXiv:2301.12597, arXiv:2305.06500; models/blip_2 and models/instructblip of huggingface/transformers.

The prompt: the query tokens of one image, the decoder's `<s>` or `</s>`, the text; InstructBLIP's Q-Former reads that
text, too. They were trained on one image and one text ("Question: ... Answer:"), not on conversations: of one they
therefore read the image and the last user message's text, and a system message is refused.
"""

from collections.abc import Mapping
from typing import Any

from mlx_vlm_mini.config import (
    BlockConfig,
    InstructionConfig,
    Prescribed,
    ProjectorConfig,
    QFormerConfig,
    VisionConfig,
    VLMConfig,
)
from mlx_vlm_mini.families.parts.configs import activation, llama_weights, side, text_decoder
from mlx_vlm_mini.families.parts.conversations import one_image_template
from mlx_vlm_mini.families.parts.maps import Weights
from mlx_vlm_mini.families.parts.opt import opt_decoder, opt_weights
from mlx_vlm_mini.preprocessing.settings import ImageSettings

from .paligemma import pixels

__all__ = ["CHAT_TEMPLATE", "IMAGE_PROCESSOR", "WEIGHTS", "config", "image_text", "pixels"]

_BLOCK, _LAYER = "vision_model.encoder.layers.{}.", "qformer.encoder.layer.{}."
_OURS, _QUERIES = "vision.blocks.{}.", "projector.blocks.{}."
WEIGHTS: Weights = {
    "vision_model.embeddings.class_embedding": "vision.class_token",
    "vision_model.embeddings.position_embedding": "vision.pos_embed",
    "vision_model.embeddings.patch_embedding": "vision.patch_embed",
    "vision_model.post_layernorm": "vision.norm",
    _BLOCK + "self_attn.qkv": (_OURS + "attn.q_proj", _OURS + "attn.k_proj", _OURS + "attn.v_proj"),
    _BLOCK + "self_attn.projection": _OURS + "attn.o_proj",
    **{f"{_BLOCK}layer_norm{number}": f"{_OURS}norm{number}" for number in (1, 2)},
    **{f"{_BLOCK}mlp.fc{number}": f"{_OURS}mlp.fc{number}" for number in (1, 2)},
    "query_tokens": "projector.query_tokens",
    "qformer.layernorm": "projector.norm",
    "qformer.embeddings.layernorm": "projector.norm",
    "qformer.embeddings.word_embeddings": "projector.embed_words",
    "qformer.embeddings.position_embeddings.weight": "projector.pos_embed",
    "qformer.embeddings.position_ids": None,
    "language_projection": "projector.layers.0",
    **{
        f"{_LAYER}{theirs}.{where}": f"{_QUERIES}{ours}"
        for theirs, attn, norm in (("attention", "attn", "attn_norm"), ("crossattention", "cross_attn", "cross_norm"))
        for where, ours in (
            *((f"attention.{name}", f"{attn}.{name[0]}_proj") for name in ("query", "key", "value")),
            ("output.dense", f"{attn}.o_proj"),
            ("output.LayerNorm", norm),
        )
    },
    **{
        f"{_LAYER}{theirs.format(suffix)}": f"{_QUERIES}{kind}_{ours}"
        for suffix, kind in (("", "text"), ("_query", "query"))
        for theirs, ours in (
            ("intermediate{}.dense", "mlp.fc1"),
            ("output{}.dense", "mlp.fc2"),
            ("output{}.LayerNorm", "norm"),
        )
    },
    **opt_weights("language_model.model.decoder."),
    **llama_weights("language_model.model."),
    "language_model.lm_head": "decoder.lm_head",
}

IMAGE_PROCESSOR = "Blip"

CHAT_TEMPLATE = ""  # config prescribes it

_VISION = {
    "hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 39, "num_attention_heads": 16,
    "image_size": 224, "patch_size": 14, "hidden_act": "gelu", "layer_norm_eps": 1e-6, "qkv_bias": True,
}  # fmt: skip
_QFORMER = {
    "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "hidden_act": "gelu", "max_position_embeddings": 512, "layer_norm_eps": 1e-12,
    "cross_attention_frequency": 2,
}  # fmt: skip


def config(hf: Mapping[str, Any]) -> VLMConfig:
    instructed, text = hf.get("model_type") == "instructblip", hf.get("text_config") or {}
    vision, qformer = {**_VISION, **(hf.get("vision_config") or {})}, {**_QFORMER, **(hf.get("qformer_config") or {})}
    opt = text.get("model_type", "opt") == "opt"
    decoder = opt_decoder(text) if opt else text_decoder(text, proven=("llama", "opt"))
    instruction = InstructionConfig(
        vocab_size=qformer["vocab_size"], max_position_embeddings=qformer["max_position_embeddings"]
    )
    return VLMConfig(
        family="instructblip" if instructed else "blip2",
        vision=VisionConfig(
            **{key: vision[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")},
            **{key: vision[key] for key in ("intermediate_size", "layer_norm_eps")},
            image_size=side(vision["image_size"], "image_size"),
            patch_size=side(vision["patch_size"], "patch_size"),
            hidden_act=activation(vision["hidden_act"]),
            blocks=BlockConfig(qkv_bias=vision["qkv_bias"]),
            class_token=True,
            patch_bias=True,
            pre_norm=False,
            post_norm=True,
            feature_layers=(vision["num_hidden_layers"],),
            drop_first_feature=False,
            resample_positions=False,
        ),
        projector=ProjectorConfig(
            input_size=vision["hidden_size"],
            hidden_size=decoder.hidden_size,
            num_layers=1,
            hidden_act="gelu",  # between layers, and there is one
            bias=True,
            qformer=QFormerConfig(
                num_query_tokens=hf.get("num_query_tokens", 32),
                **{key: qformer[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")},
                **{key: qformer[key] for key in ("intermediate_size", "layer_norm_eps", "cross_attention_frequency")},
                hidden_act=activation(qformer["hidden_act"]),
                instruction=instruction if instructed else None,
            ),
        ),
        decoder=decoder,
        image_token_id=hf.get("image_token_id", hf.get("image_token_index")),
        image_grid_pinpoints=None,
        prescribed=Prescribed(
            image_token="<image>",
            cut_at_images=True,
            chat_template=one_image_template("InstructBLIP" if instructed else "BLIP-2"),
            end_token=None,
            files_first=True,
            image_processor={"size": {"height": vision["image_size"], "width": vision["image_size"]}},
        ),
    )


def image_text(config: VLMConfig, settings: ImageSettings, image_token: str, size: tuple[int, int]) -> str:
    assert config.projector.qformer is not None
    return image_token * config.projector.qformer.num_query_tokens
