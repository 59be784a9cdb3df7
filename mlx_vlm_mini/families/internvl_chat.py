"""InternVL as its authors write it (`OpenGVLab/InternVL-Chat-*`, `InternVL2*`, `InternVL3*`): config.json says it all.

Sources: arXiv:2404.16821, arXiv:2412.05271; internvl_chat/internvl/{model,conversation.py,train/dataset.py} of
github.com/OpenGVLab/InternVL. That code comes with the checkpoints, too, and is never run.

Its other files are left aside: the chat template of a tokenizer is not the conversation that the model was trained on,
and preprocessor_config.json does not know of tiles.
"""

from collections.abc import Mapping
from typing import Any

from mlx_vlm_mini.config import Prescribed, VisionConfig, VLMConfig
from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.families.parts.configs import llama_weights, text_decoder
from mlx_vlm_mini.families.parts.conversations import Conversation, chat_template
from mlx_vlm_mini.families.parts.maps import Weights, internlm2, phi3
from mlx_vlm_mini.families.parts.maps import intern_vit as intern_vit_weights

from .internvl import PROMPT_LANGUAGE, image_text, intern_vit, pixels, shuffle_projector

__all__ = ["CHAT_TEMPLATE", "IMAGE_PROCESSOR", "PROMPT_LANGUAGE", "WEIGHTS", "config", "image_text", "pixels"]

WEIGHTS: Weights = {
    **intern_vit_weights("vision_model."),
    "mlp1.0": "projector.norm",
    "mlp1.1": "projector.layers.0",
    "mlp1.3": "projector.layers.1",
    **llama_weights("language_model.model."),
    **phi3("language_model.model."),
    **internlm2("language_model.model."),
    "language_model.lm_head": "decoder.lm_head",
    "language_model.output": "decoder.lm_head",
}

IMAGE_PROCESSOR = "InternVLChat"

CHAT_TEMPLATE = ""  # config.json prescribes it


_OLD = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
_NEW = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"


def _chatml(system: str, after: str) -> Conversation:
    user, assistant = "<|im_start|>user\n", "<|im_start|>assistant\n"
    return Conversation(
        system, (user, after), (assistant, after), "", "<|im_start|>system\n", after, end_token="<|im_end|>"
    )


CONVERSATIONS = {
    "Hermes-2": _chatml(_OLD, "<|im_end|>"),
    "internlm2-chat": _chatml(_OLD, "<|im_end|>"),
    "internvl2_5": _chatml(_NEW, "<|im_end|>\n"),
    "phi3-chat": Conversation(
        _OLD, ("<|user|>\n", "<|end|>"), ("<|assistant|>\n", "<|end|>"), "", "<|system|>\n", "<|end|>", "<|end|>"
    ),
    "internvl_zh": Conversation("", ("<human>", " "), ("<bot>", "</s>"), close=" "),
}
_VISION = {  # of InternVisionConfig: InternViT-6B
    "hidden_size": 3200, "intermediate_size": 12800, "num_hidden_layers": 48, "num_attention_heads": 25,
    "image_size": 224, "patch_size": 14, "hidden_act": "gelu", "layer_norm_eps": 1e-6, "norm_type": "rms_norm",
    "qkv_bias": False, "qk_normalization": True,
}  # fmt: skip
_DECODERS = {
    "InternLM2ForCausalLM": "internlm2", "LlamaForCausalLM": "llama", "Phi3ForCausalLM": "phi3",
    "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3",
}  # fmt: skip


def authors_intern_vit(hf: Mapping[str, Any], feature_layer: int) -> VisionConfig:
    """An InternViT by its own config.json; `feature_layer` may count from the end."""
    values = {**_VISION, **hf}
    return intern_vit(
        values,
        feature_layer=feature_layer,
        qkv_bias=values["qkv_bias"],
        qk_norm_eps=values["layer_norm_eps"] if values["qk_normalization"] else None,
        post_norm=False,
    )


def config(hf: Mapping[str, Any]) -> VLMConfig:
    name = hf.get("template")
    if not isinstance(name, str) or name not in CONVERSATIONS:
        known = ", ".join(sorted(CONVERSATIONS))
        raise CheckpointError(f"config.json: conversation template {name!r} is not known (known: {known})")
    conversation, system = CONVERSATIONS[name], hf.get("system_message")
    if system is not None:
        conversation = conversation._replace(system=system)
    tower = authors_intern_vit(hf.get("vision_config") or {}, hf.get("select_layer", -1))
    text = hf.get("llm_config") or {}
    architecture = (text.get("architectures") or [None])[0]
    model_type = _DECODERS.get(architecture, text.get("model_type", architecture))
    decoder = text_decoder({**text, "model_type": model_type}, proven=tuple(_DECODERS.values()))
    transposed = hf.get("ps_version", "v1") == "v1"
    side = hf.get("force_image_size") or tower.image_size
    return VLMConfig(
        family="internvl_chat",
        vision=tower,
        projector=shuffle_projector(hf, tower, decoder, side, act="gelu", transposed=transposed),
        decoder=decoder,
        image_token_id=None,
        image_grid_pinpoints=None,
        prescribed=Prescribed(
            image_token="<IMG_CONTEXT>",
            chat_template=chat_template(conversation, "<IMG_CONTEXT>\n"),
            end_token=conversation.end_token,
            image_processor={
                "size": {"height": side, "width": side},
                "do_pad": hf.get("pad2square", False),
                "min_patches": hf.get("min_dynamic_patch", 1) if hf.get("dynamic_image_size") else 1,
                "max_patches": hf.get("max_dynamic_patch", 6) if hf.get("dynamic_image_size") else 1,
                "use_thumbnail": hf.get("use_thumbnail", False),
            },
        ),
    )
