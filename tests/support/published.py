"""What the Hub's config.json files say of published models, as far as it shapes their tensors; such checkpoints without
data; and docs/models.md, which `python tests/support/published.py` rewrites.

Sources: llava-hf/llava-1.5-7b-hf from a log of transformers that prints it; paligemma-3b-pt-448 from a copy in transformers'
convert_colpali_weights_to_hf.py; LLaVA-NeXT's token ids and vocabularies (the decoder's, two or three tokens more, rounded up
to a multiple of 64) from convert_llava_next_weights_to_hf.py; LLaVA-OneVision's from convert_llava_onevision_weights_to_hf.py,
as are its towers; PaliGemma 2 from convert_paligemma2_weights_to_hf.py; sizes of
Vicuna-13B, Mistral-7B, Yi-34B and Llama-3-8B from copies of their configs; Llama 3.2 Vision from sku_list.py of
meta-llama/llama-models and convert_mllama_weights_to_hf.py of transformers; Qwen-VL's from a copy of its config.json, and its
tensors' names and shapes from vllm-project/vllm (tests/golden/qwen_vl_oracle.py); Qwen2-VL's and later ones' from copies of their
configs in public repositories, the sizes of 2-VL's recalled; SmolVLM-256M, SmolVLM2-500M, Gemma 3 4B and 27B from copies of their
configs in public repositories' tests; SmolVLM 2.2B, Idefics3-8B and Gemma 3 12B from memory; Mistral Small 3.1's from a copy of
its config, Pixtral-12B's from memory (its decoder has Mistral Nemo's sizes). PaddleOCR-VL's and GLM-4.1V's are their classes' defaults,
GLM-OCR's and GLM-4.6V-Flash's recalled; Janus-Pro's those of copies of their configs. Qwen3.5's 0.8B, 4B, 9B, 27B, 35B-A3B and
397B-A17B from copies of their configs and from THUDM/slime's scripts, 2B and 122B-A10B recalled; Qwen3-VL-MoE's from those scripts; MiniCPM-V 4.6's from a copy of its config in
sophgo/LLM-TPU; Gemma 4's from copies of their configs in public repositories' tests, but for 12B, which is recalled; LightOnOCR's are its class's defaults; Ministral 3's 8B has its class's, 3B, 14B and Devstral Small 2 are recalled, as is
Granite-Docling; of Qianfan-OCR the decoder is Qwen3-4B, with the vocabulary that its class has. None was downloaded from the Hub itself.
"""

from math import prod
from pathlib import Path
from typing import Any

from mlx.utils import tree_flatten
from qwen_vl_oracle import shapes_of

from mlx_vlm_mini.checkpoints.folder import Checkpoint, TensorInfo
from mlx_vlm_mini.checkpoints.load import plan
from mlx_vlm_mini.checkpoints.weights import count_decoder, hub_name, is_convolution
from mlx_vlm_mini.config import VLMConfig
from mlx_vlm_mini.convert.quantize import choose, plan_outputs, spread
from mlx_vlm_mini.families import find_family
from mlx_vlm_mini.families.parts.maps import Raised, Weights
from mlx_vlm_mini.model import VLM
from mlx_vlm_mini.preprocessing.anyres import most_tokens

DOCS = Path(__file__).parents[2] / "docs" / "models.md"

CLIP_L_336 = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
    "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768, "vocab_size": 32000,
}  # fmt: skip
SIGLIP_SO400M = {
    "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16,
    "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False,
}  # fmt: skip
VICUNA_7B = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064}
VICUNA_13B = {
    **VICUNA_7B, "hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40, "num_hidden_layers": 40,
    "num_key_value_heads": 40,
}  # fmt: skip
MISTRAL_7B = {
    "model_type": "mistral", "intermediate_size": 14336, "max_position_embeddings": 32768, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None, "vocab_size": 32064,
}  # fmt: skip
YI_34B = {
    "model_type": "llama", "hidden_size": 7168, "intermediate_size": 20480, "num_attention_heads": 56,
    "num_hidden_layers": 60, "num_key_value_heads": 8, "rope_theta": 5e6, "vocab_size": 64064,
}  # fmt: skip
LLAMA3_8B = {
    "model_type": "llama", "intermediate_size": 14336, "max_position_embeddings": 8192, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5, "rope_theta": 5e5, "vocab_size": 128320,
}  # fmt: skip
GEMMA_2B = {
    "model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16384, "num_attention_heads": 8,
    "num_hidden_layers": 18, "num_key_value_heads": 1, "vocab_size": 257216,
}  # fmt: skip
GEMMA2 = {  # layers, hidden size, MLP, heads, heads of keys and values, head size, query_pre_attn_scalar
    "3b": (26, 2304, 9216, 8, 4, 256, 256),
    "10b": (42, 3584, 14336, 16, 8, 256, 256),
    "28b": (46, 4608, 36864, 32, 16, 128, 144),
}


def _llava(model_type: str, text: dict[str, Any], image_token: int = 32000, **more: Any) -> dict[str, Any]:
    return {
        "model_type": model_type, "image_token_index": image_token, "projector_hidden_act": "gelu", "text_config": text,
        "tie_word_embeddings": False, "vision_config": CLIP_L_336, "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default", **more,
    }  # fmt: skip


def _next(text: dict[str, Any], image_token: int = 32000) -> dict[str, Any]:
    pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    return _llava("llava_next", text, image_token, image_grid_pinpoints=pinpoints)


def _onevision(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> dict[str, Any]:
    """Vocabularies two tokens larger than Qwen2's, rounded up to a multiple of 64."""
    return {
        "model_type": "llava_onevision", "image_token_index": 151646, "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_9", "projector_hidden_act": "gelu",
        "text_config": {
            "model_type": "qwen2", "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
            "max_position_embeddings": 32768, "tie_word_embeddings": hidden == 896, "vocab_size": vocabulary,
        },
        "vision_config": {**SIGLIP_SO400M, "image_size": 384, "num_hidden_layers": 26},
    }  # fmt: skip


def _paligemma(text: dict[str, Any], image_size: int) -> dict[str, Any]:
    """The top-level hidden size is PaliGemma 1's everywhere."""
    return {
        "model_type": "paligemma", "hidden_size": 2048, "image_token_index": 257152, "pad_token_id": 0,
        "projection_dim": text["hidden_size"], "text_config": text,
        "vision_config": {**SIGLIP_SO400M, "image_size": image_size, "projection_dim": text["hidden_size"]},
    }  # fmt: skip


def _gemma2(layers: int, hidden: int, mlp: int, heads: int, kv_heads: int, head: int, scalar: int) -> dict[str, Any]:
    return {
        "model_type": "gemma2", "head_dim": head, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": hidden,
        "intermediate_size": mlp, "num_attention_heads": heads, "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads, "query_pre_attn_scalar": scalar, "vocab_size": 257216,
    }  # fmt: skip


LLAMA32_11B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 40,
}
LLAMA32_90B: dict[str, Any] = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_hidden_layers": 100,
}


def _mllama(text: dict[str, Any], image_size: int) -> dict[str, Any]:
    """A cross-attention layer before every fourth layer that reads text."""
    return {
        "model_type": "mllama", "image_token_index": 128256,
        "text_config": {
            "model_type": "mllama_text_model", "cross_attention_layers": list(range(3, text["num_hidden_layers"], 5)),
            "max_position_embeddings": 131072, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
            "rope_scaling": {
                "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3",
            },
            "tie_word_embeddings": False, "vocab_size": 128256, **text,
        },
        "vision_config": {
            "model_type": "mllama_vision_model", "attention_heads": 16, "hidden_size": 1280, "image_size": image_size,
            "intermediate_layers_indices": [3, 7, 15, 23, 30], "intermediate_size": 5120, "max_num_tiles": 4,
            "num_global_layers": 8, "num_hidden_layers": 32, "patch_size": 14, "vision_output_dim": 7680,
        },
    }  # fmt: skip


SIGLIP_512 = {
    "hidden_size": 768, "image_size": 512, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12,
    "patch_size": 16,
}  # fmt: skip
SIGLIP_384 = {**SIGLIP_SO400M, "image_size": 384}
SMOLLM2 = {  # hidden size, MLP, layers, heads, heads of keys and values, vocabulary, rope_theta
    "256M": (576, 1536, 30, 9, 3, 49280, 1e5),
    "500M": (960, 2560, 32, 15, 5, 49280, 1e5),
    "2.2B": (2048, 8192, 24, 32, 32, 49155, 273768.0),
}
LLAMA31_ROPE = {
    "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}  # fmt: skip


def _smolvlm(name: str, model_type: str) -> dict[str, Any]:
    hidden, mlp, layers, heads, kv_heads, vocab, theta = SMOLLM2[name]
    large = name == "2.2B"
    kind = {"idefics3": "idefics3", "smolvlm": "smolvlm_vision"}[model_type]
    return {
        "model_type": model_type, "image_token_id": 49153 if large else 49190, "scale_factor": 3 if large else 4,
        "text_config": {
            "model_type": "llama", "head_dim": 64, "hidden_size": hidden, "intermediate_size": mlp,
            "max_position_embeddings": 16384 if large else 8192, "num_attention_heads": heads, "num_hidden_layers": layers,
            "num_key_value_heads": kv_heads, "rms_norm_eps": 1e-5, "rope_theta": theta, "vocab_size": vocab,
        },
        "tie_word_embeddings": False,
        "vision_config": {**(SIGLIP_384 if large else SIGLIP_512), "model_type": kind},
    }  # fmt: skip


GEMMA3: dict[str, dict[str, Any]] = {
    "4b": {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34},
    "12b": {
        "hidden_size": 3840, "intermediate_size": 15360, "num_attention_heads": 16, "num_hidden_layers": 48,
        "num_key_value_heads": 8,
    },
    "27b": {
        "head_dim": 128, "hidden_size": 5376, "intermediate_size": 21504, "num_attention_heads": 32,
        "num_hidden_layers": 62, "num_key_value_heads": 16, "query_pre_attn_scalar": 168,
    },
}  # fmt: skip


def _gemma3(text: dict[str, Any]) -> dict[str, Any]:
    return {
        "model_type": "gemma3", "boi_token_index": 255999, "eoi_token_index": 256000, "image_token_index": 262144,
        "mm_tokens_per_image": 256,
        "text_config": {
            "model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024, **text,
        },
        "vision_config": {**SIGLIP_SO400M, "image_size": 896},
    }  # fmt: skip


QWEN_VL = {
    "model_type": "qwen", "architectures": ["QWenLMHeadModel"], "hidden_size": 4096, "intermediate_size": 22016,
    "num_hidden_layers": 32, "num_attention_heads": 32, "kv_channels": 128, "layer_norm_epsilon": 1e-6,
    "max_position_embeddings": 8192, "no_bias": True, "rotary_emb_base": 10000, "rotary_pct": 1.0, "seq_length": 2048,
    "use_dynamic_ntk": True, "use_logn_attn": True, "vocab_size": 151936, "tie_word_embeddings": False,
    "visual": {
        "heads": 16, "image_size": 448, "image_start_id": 151857, "layers": 48, "mlp_ratio": 4.9231, "output_dim": 4096,
        "patch_size": 14, "width": 1664},
}  # fmt: skip
QWEN2_VL = {  # hidden size, MLP, layers, heads, heads of keys and values, vocabulary, tied head
    "2B": (1536, 8960, 28, 12, 2, 151936, True),
    "3B": (2048, 11008, 36, 16, 2, 151936, True),
    "7B": (3584, 18944, 28, 28, 4, 152064, False),
    "32B": (5120, 27648, 64, 40, 8, 152064, False),
    "72B": (8192, 29568, 80, 64, 8, 152064, False),
}
QWEN3_VL = {  # the same
    "2B": (2048, 6144, 28, 16, 8, 151936, True),
    "4B": (2560, 9728, 36, 32, 8, 151936, True),
    "8B": (4096, 12288, 36, 32, 8, 151936, False),
    "32B": (5120, 25600, 64, 64, 8, 151936, False),
}


def _qwen_vl(family: str, size: str) -> dict[str, Any]:
    """Flat before Qwen3-VL."""
    *numbers, tied = (QWEN3_VL if family == "qwen3_vl" else QWEN2_VL)[size]
    keys = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
    )  # fmt: skip
    text = dict(zip(keys, numbers, strict=True)) | {"rms_norm_eps": 1e-6}
    width = text["hidden_size"]
    if family == "qwen3_vl":
        rope = {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"}
        text |= {"head_dim": 128, "rope_theta": 5e6, "rope_scaling": rope, "model_type": "qwen3_vl_text"}
        small = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
        vision = {"out_hidden_size": width, **(small if size in ("2B", "4B") else {})}
        return {"model_type": family, "text_config": text, "vision_config": vision, "tie_word_embeddings": tied}
    text |= {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
    vision = {"model_type": family, "in_chans": 3, "hidden_size": width}
    if family == "qwen2_5_vl":
        mlp = 3456 if size in ("32B", "72B") else 3420
        vision |= {"hidden_size": 1280, "out_hidden_size": width, "intermediate_size": mlp}
    return {"model_type": family, **text, "tie_word_embeddings": tied, "vision_config": vision}


def _pixtral(model_type: str, mlp: int, context: int, **vision: Any) -> dict[str, Any]:
    """With the decoder of Mistral Nemo and Small."""
    return {
        "model_type": model_type, "image_token_index": 10, "projector_hidden_act": "gelu", "vision_feature_layer": -1,
        "text_config": {
            "model_type": "mistral", "hidden_size": 5120, "intermediate_size": mlp, "num_attention_heads": 32,
            "num_hidden_layers": 40, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": context,
            "rms_norm_eps": 1e-5, "rope_theta": 1e9, "sliding_window": None, "vocab_size": 131072,
        },
        "vision_config": {"model_type": "pixtral", "head_dim": 64, "hidden_act": "silu", "rope_theta": 1e4, **vision},
        **({"spatial_merge_size": 2} if model_type == "mistral3" else {"vision_feature_select_strategy": "full"}),
        "tie_word_embeddings": False,
    }  # fmt: skip


def _janus(hidden: int, mlp: int, layers: int, heads: int) -> dict[str, Any]:
    """Vision and VQ parts are the classes' defaults but for the decoder's width."""
    return {
        "model_type": "janus", "image_token_id": 100581, "tie_word_embeddings": False,  # the files have a head of their own
        "text_config": {
            "model_type": "llama", "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": 102400, "rope_theta": 10000.0,
            "rms_norm_eps": 1e-6, "max_position_embeddings": 16384,
        },
        "vision_config": {"model_type": "janus_vision_model", "projection_dim": hidden},
        "vq_config": {"model_type": "janus_vqgan", "projection_dim": hidden, "image_token_embed_dim": hidden},
    }  # fmt: skip


PADDLEOCR_VL = {
    "model_type": "paddleocr_vl", "head_dim": 128, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 18,
    "num_attention_heads": 16, "num_key_value_heads": 2, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    "rope_theta": 500000, "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"},
    "use_bias": False, "tie_word_embeddings": False, "vocab_size": 103424, "image_token_id": 100295,
    "vision_config": {
        "model_type": "paddleocr_vl", "hidden_size": 1152, "image_size": 384, "intermediate_size": 4304,
        "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14, "spatial_merge_size": 2,
        "temporal_patch_size": 2, "tokens_per_second": 2,
    },
}  # fmt: skip
GLM_9B = {  # beside its rope, which is written in two ways
    "attention_bias": True, "head_dim": 128, "hidden_size": 4096, "intermediate_size": 13696, "num_hidden_layers": 40,
    "num_attention_heads": 32, "num_key_value_heads": 2, "max_position_embeddings": 65536, "rms_norm_eps": 1e-5,
    "vocab_size": 151552, "model_type": "glm4v_text",
}  # fmt: skip
GLM_VISION = {
    "model_type": "glm4v_vision", "attention_bias": False, "depth": 24, "hidden_act": "silu", "hidden_size": 1536,
    "image_size": 336, "in_channels": 3, "intermediate_size": 13696, "num_heads": 12, "out_hidden_size": 4096,
    "patch_size": 14, "rms_norm_eps": 1e-5, "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip
GLM = {
    "zai-org/GLM-OCR": {
        "model_type": "glm_ocr", "image_token_id": 59280, "tie_word_embeddings": False,
        "text_config": {
            "model_type": "glm_ocr_text", "head_dim": 128, "hidden_size": 1536, "intermediate_size": 4608,
            "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 8, "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5, "vocab_size": 59392, "num_nextn_predict_layers": 1, "rope_parameters": {
                "rope_type": "default", "mrope_section": [16, 24, 24], "partial_rotary_factor": 1.0, "rope_theta": 10000},
        },
        "vision_config": {
            "model_type": "glm_ocr_vision", "attention_bias": True, "depth": 24, "hidden_act": "silu", "hidden_size": 1024,
            "image_size": 336, "in_channels": 3, "intermediate_size": 4096, "num_heads": 16, "out_hidden_size": 1536,
            "patch_size": 14, "rms_norm_eps": 1e-5, "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
    },
    "zai-org/GLM-4.1V-9B-Thinking": {
        "model_type": "glm4v", "image_token_id": 151343, "tie_word_embeddings": False, "vision_config": GLM_VISION,
        "text_config": {
            **GLM_9B, "partial_rotary_factor": 0.5, "rope_theta": 10000.0,
            "rope_scaling": {"type": "default", "mrope_section": [8, 12, 12]},
        },
    },
    "zai-org/GLM-4.6V-Flash": {
        "model_type": "glm46v", "image_token_id": 151343, "tie_word_embeddings": False, "vision_config": GLM_VISION,
        "text_config": {**GLM_9B, "max_position_embeddings": 131072, "rope_parameters": {
            "rope_type": "default", "mrope_section": [8, 12, 12], "partial_rotary_factor": 0.5, "rope_theta": 500000}},
    },
}  # fmt: skip
QWEN3_5 = {  # hidden size, MLP, layers, heads, heads of keys and values, heads of the delta nets' values, tied head
    "0.8B": (1024, 3584, 24, 8, 2, 16, True),
    "2B": (2048, 6144, 24, 8, 2, 16, True),
    "4B": (2560, 9216, 32, 16, 4, 32, True),
    "9B": (4096, 12288, 32, 16, 4, 32, False),
    "27B": (5120, 17408, 64, 24, 4, 48, False),
}
QWEN3_5_MOE = {  # hidden size, an expert's MLP, layers, heads, heads of keys and values, of values, experts, those of a token
    "35B-A3B": (2048, 512, 40, 16, 2, 32, 256, 8),
    "122B-A10B": (3072, 1024, 48, 32, 2, 64, 256, 8),
    "397B-A17B": (4096, 1024, 60, 32, 2, 64, 512, 10),
}
SMALL_TOWERS: dict[str, dict[str, Any]] = {
    "0.8B": {"depth": 12, "hidden_size": 768, "intermediate_size": 3072, "num_heads": 12},
    **{size: {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096} for size in ("2B", "4B")},
}


def _qwen3_5(size: str) -> dict[str, Any]:
    """Also with experts, whose shared one is as wide as the others."""
    experts: dict[str, Any] = {}
    if size in QWEN3_5:
        hidden, mlp, layers, heads, kv_heads, value_heads, tied = QWEN3_5[size]
        family, experts = "qwen3_5", {"intermediate_size": mlp}
    else:
        hidden, mlp, layers, heads, kv_heads, value_heads, count, chosen = QWEN3_5_MOE[size]
        family, tied = "qwen3_5_moe", False
        experts = {
            "num_experts": count, "num_experts_per_tok": chosen, "moe_intermediate_size": mlp,
            "shared_expert_intermediate_size": mlp,
        }  # fmt: skip
    text = {
        "model_type": f"{family}_text", "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": 256, "linear_num_value_heads": value_heads, **experts,
        "linear_num_key_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "vocab_size": 248320,
        "max_position_embeddings": 262144, "tie_word_embeddings": tied, "rms_norm_eps": 1e-6, "rope_parameters": {
            "rope_theta": 1e7, "rope_type": "default", "partial_rotary_factor": 0.25, "mrope_section": [11, 11, 10],
            "mrope_interleaved": True,
        },
    }  # fmt: skip
    vision = {"out_hidden_size": hidden, "deepstack_visual_indexes": [], **SMALL_TOWERS.get(size, {})}
    return {"model_type": family, "text_config": text, "vision_config": vision, "tie_word_embeddings": tied}


def _qwen3_vl_moe(hidden: int, mlp: int, layers: int, heads: int) -> dict[str, Any]:
    """Of 128 experts a token takes 8."""
    return {
        "model_type": "qwen3_vl_moe", "tie_word_embeddings": False, "vision_config": {"out_hidden_size": hidden},
        "text_config": {
            "model_type": "qwen3_vl_moe_text", "hidden_size": hidden, "moe_intermediate_size": mlp,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 4, "head_dim": 128,
            "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151936, "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-6, "rope_theta": 5e6,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        },
    }  # fmt: skip


def _ministral3(hidden: int, mlp: int, layers: int, *, tied: bool = False) -> dict[str, Any]:
    vision = {"model_type": "pixtral", "image_size": 1540, "patch_size": 14, "hidden_act": "silu", "head_dim": 64}
    return {
        "model_type": "mistral3", "image_token_index": 10, "projector_hidden_act": "gelu", "vision_feature_layer": -1,
        "spatial_merge_size": 2, "tie_word_embeddings": tied, "vision_config": vision, "text_config": {
            "model_type": "ministral3", "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 131072,
            "tie_word_embeddings": tied,
        },
    }  # fmt: skip


MINICPM_V_4_6 = {
    "model_type": "minicpmv4_6", "image_token_id": 248056, "insert_layer_id": 6, "tie_word_embeddings": True,
    "text_config": {
        **{key: value for key, value in _qwen3_5("0.8B")["text_config"].items() if key != "rope_parameters"},
        "vocab_size": 248094, "rope_parameters": {"rope_theta": 1e7, "rope_type": "default", "partial_rotary_factor": 0.25},
    },
    "vision_config": {**SIGLIP_SO400M, "model_type": "minicpmv4_6_vision", "image_size": 980},
}  # fmt: skip
GRANITE_DOCLING = {
    "model_type": "idefics3", "image_token_id": 100270, "scale_factor": 4, "tie_word_embeddings": True,
    "text_config": {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 100352, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192, "rope_theta": 1e5, "tie_word_embeddings": True,
    },
    "vision_config": {**SIGLIP_512, "model_type": "idefics3_vision"},
}  # fmt: skip
QIANFAN_OCR = {
    "model_type": "qianfan_ocr", "image_token_id": 151667, "tie_word_embeddings": False,
    "text_config": {
        "model_type": "qwen3", "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 5e6, "tie_word_embeddings": False,
    },
    "vision_config": {"model_type": "qianfan_ocr_vision"},
}  # fmt: skip
GRANITE_DOCLING_500M = {  # the defaults of transformers' classes, which are written in this model's style
    "model_type": "granite_docling", "image_token_id": 100337, "tie_word_embeddings": True,
    "text_config": {
        "model_type": "granite_docling_text", "vocab_size": 133800, "hidden_size": 1024, "intermediate_size": 2048,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5, "embedding_multiplier": 12.0, "logits_scaling": 4.0, "residual_multiplier": 0.263,
        "attention_multiplier": 0.015625,
    },
    "vision_config": {
        "model_type": "granite_docling_vision", "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 12, "image_size": 512, "patch_size": 16, "out_hidden_size": 1024, "scale_factor": 4,
        "deepstack_visual_indexes": [3, 7, 10], "use_fine_route": True,
    },
}  # fmt: skip
GEMMA4: dict[str, dict[str, Any]] = {
    "31B": {
        "hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 60, "num_attention_heads": 32,
        "num_key_value_heads": 16, "num_global_key_value_heads": 4,
    },
    "26B-A4B": {
        "hidden_size": 2816, "intermediate_size": 2112, "num_hidden_layers": 30, "num_attention_heads": 16,
        "num_key_value_heads": 8, "num_global_key_value_heads": 2, "enable_moe_block": True, "num_experts": 128,
        "top_k_experts": 8, "moe_intermediate_size": 704,
    },
    "12B": {
        "hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48, "num_attention_heads": 16,
        "num_key_value_heads": 8, "num_global_key_value_heads": 1,
    },
    "E4B": {
        "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 42, "num_key_value_heads": 2,
        "num_kv_shared_layers": 18,
    },
    "E2B": {
        "hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 35, "num_key_value_heads": 1,
        "num_kv_shared_layers": 20, "use_double_wide_mlp": True,
    },
}  # fmt: skip


def _gemma4(size: str) -> dict[str, Any]:
    """E4B and E2B also hear, which is left out."""
    text, small, plain = GEMMA4[size], size.startswith("E"), size == "12B"
    every = 5 if size == "E2B" else 6
    layers = range(1, text["num_hidden_layers"] + 1)
    tower = {"model_type": "gemma4_vision", "use_clipped_linears": small, "standardize": not small}
    if not small:
        tower |= {
            "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
            "num_key_value_heads": 16, "head_dim": 72,
        }  # fmt: skip
    return {
        "model_type": "gemma4_unified" if plain else "gemma4", "image_token_id": 258880, "boi_token_id": 255999,
        "eoi_token_id": 258882, "tie_word_embeddings": True,
        "vision_config": tower if not plain else {"model_type": "gemma4_unified_vision"},
        "text_config": {
            "model_type": "gemma4_unified_text" if plain else "gemma4_text", "attention_k_eq_v": not small,
            "final_logit_softcapping": 30.0, "global_head_dim": 512, "head_dim": 256,
            "hidden_size_per_layer_input": 256 if small else 0, "max_position_embeddings": 131072 if small else 262144,
            "num_attention_heads": 8, "sliding_window": 512 if small else 1024,
            "use_bidirectional_attention": None if small else "vision", "vocab_size": 262144,
            "layer_types": ["sliding_attention" if layer % every else "full_attention" for layer in layers], **text,
        },
    }  # fmt: skip


CONFIGS: dict[str, dict[str, Any]] = {
    "llava-hf/llava-1.5-7b-hf": _llava("llava", VICUNA_7B, pad_token_id=32001),
    "llava-hf/llava-1.5-13b-hf": _llava("llava", VICUNA_13B, pad_token_id=32001),
    "llava-hf/llava-v1.6-mistral-7b-hf": _next(MISTRAL_7B),
    "llava-hf/llava-v1.6-vicuna-7b-hf": _next(VICUNA_7B),
    "llava-hf/llava-v1.6-vicuna-13b-hf": _next(VICUNA_13B),
    "llava-hf/llava-v1.6-34b-hf": _next(YI_34B, 64000),
    "llava-hf/llama3-llava-next-8b-hf": _next(LLAMA3_8B, 128256),
    "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": _onevision(896, 4864, 24, 14, 2, 152000),
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": _onevision(3584, 18944, 28, 28, 4, 152128),
    "llava-hf/llava-onevision-qwen2-72b-ov-hf": _onevision(8192, 29568, 80, 64, 8, 152128),
    "HuggingFaceTB/SmolVLM-256M-Instruct": _smolvlm("256M", "idefics3"),
    "HuggingFaceTB/SmolVLM-500M-Instruct": _smolvlm("500M", "idefics3"),
    "HuggingFaceTB/SmolVLM-Instruct": _smolvlm("2.2B", "idefics3"),
    "HuggingFaceTB/SmolVLM2-256M-Video-Instruct": _smolvlm("256M", "smolvlm"),
    "HuggingFaceTB/SmolVLM2-500M-Video-Instruct": _smolvlm("500M", "smolvlm"),
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct": _smolvlm("2.2B", "smolvlm"),
    "HuggingFaceM4/Idefics3-8B-Llama3": {
        "model_type": "idefics3", "image_token_id": 128257, "scale_factor": 2,
        "text_config": {
            **LLAMA3_8B, "max_position_embeddings": 131072, "rope_scaling": LLAMA31_ROPE, "vocab_size": 128259,
        },
        "tie_word_embeddings": False,
        "vision_config": {**SIGLIP_SO400M, "image_size": 364, "model_type": "idefics3"},
    },
    **{f"google/paligemma-3b-pt-{side}": _paligemma(GEMMA_2B, side) for side in (224, 448, 896)},
    **{
        f"google/paligemma2-{name}-pt-{side}": _paligemma(_gemma2(*sizes), side)
        for name, sizes in GEMMA2.items()
        for side in (224, 448, 896)
    },
    **{f"google/gemma-3-{name}-it": _gemma3(text) for name, text in GEMMA3.items()},
    **{f"google/gemma-4-{size}-it": _gemma4(size) for size in GEMMA4},
    "meta-llama/Llama-3.2-11B-Vision": _mllama(LLAMA32_11B, 448),
    "meta-llama/Llama-3.2-11B-Vision-Instruct": _mllama(LLAMA32_11B, 560),
    "meta-llama/Llama-3.2-90B-Vision-Instruct": _mllama(LLAMA32_90B, 560),
    "Qwen/Qwen-VL-Chat": QWEN_VL,
    **{f"Qwen/Qwen2-VL-{size}-Instruct": _qwen_vl("qwen2_vl", size) for size in ("2B", "7B", "72B")},
    **{f"Qwen/Qwen2.5-VL-{size}-Instruct": _qwen_vl("qwen2_5_vl", size) for size in ("3B", "7B", "32B", "72B")},
    **{f"Qwen/Qwen3-VL-{size}-Instruct": _qwen_vl("qwen3_vl", size) for size in QWEN3_VL},
    "Qwen/Qwen3-VL-30B-A3B-Instruct": _qwen3_vl_moe(2048, 768, 48, 32),
    "Qwen/Qwen3-VL-235B-A22B-Instruct": _qwen3_vl_moe(4096, 1536, 94, 64),
    **{f"Qwen/Qwen3.5-{size}": _qwen3_5(size) for size in (*QWEN3_5, *QWEN3_5_MOE)},
    "openbmb/MiniCPM-V-4.6": MINICPM_V_4_6,
    "mistral-community/pixtral-12b": _pixtral("llava", 14336, 1024000, patch_size=16, image_size=1024),
    "mistralai/Mistral-Small-3.1-24B-Instruct-2503": _pixtral("mistral3", 32768, 131072, patch_size=14, image_size=1540),
    "mistralai/Ministral-3-3B-Instruct-2512": _ministral3(3072, 9216, 26, tied=True),
    "mistralai/Ministral-3-8B-Instruct-2512": _ministral3(4096, 14336, 34),
    "mistralai/Ministral-3-14B-Instruct-2512": _ministral3(5120, 16384, 40),
    "mistralai/Devstral-Small-2-24B-Instruct-2512": _ministral3(5120, 32768, 40),
    "lightonai/LightOnOCR-1B-1025": {"model_type": "lighton_ocr"},
    "ibm-granite/granite-docling-258M": GRANITE_DOCLING,
    "baidu/Qianfan-OCR": QIANFAN_OCR,
    "PaddlePaddle/PaddleOCR-VL": PADDLEOCR_VL,
    **GLM,
    "deepseek-community/Janus-Pro-1B": _janus(2048, 5632, 24, 16),
    "deepseek-community/Janus-Pro-7B": _janus(4096, 11008, 30, 32),
    "ibm-granite/granite-for-docling-500m": GRANITE_DOCLING_500M,
}  # fmt: skip


def without_data(config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Checkpoint:
    """A checkpoint whose tensors have names and shapes, of type BF16, and no bytes."""
    file = Path("model.safetensors")
    tensors = {name: TensorInfo(file, "BF16", shape, 0, 2 * prod(shape)) for name, shape in shapes.items()}
    return Checkpoint(Path("published"), config, headers=[(tensors, {"format": "pt"})])


def published(name: str) -> Checkpoint:
    """A published checkpoint without data: the tensors that our model asks for, by the Hub's names and in its layout."""
    config = CONFIGS[name]
    if config["model_type"] == "qwen":
        return without_data(config, shapes_of(config))
    family = find_family(config)
    ours = family.config(config)
    shapes: dict[str, tuple[int, ...]] = {}
    blocks = {}
    for tensor, array in tree_flatten(VLM(ours).parameters()):  # lazy: nothing is computed
        shape = tuple(array.shape)
        shapes[tensor] = (shape[0], shape[-1], *shape[1:-1]) if is_convolution(tensor) else shape
        if tensor.startswith("vision.blocks.0."):
            blocks[tensor] = shape
    for number in range(ours.vision.depth, ours.vision.num_hidden_layers):  # in the file, though nothing reads them
        shapes |= {tensor.replace(".0.", f".{number}.", 1): shape for tensor, shape in blocks.items()}
    for number, kind in enumerate(ours.decoder.layer_types):  # likewise, as these layers have the keys of others
        if (own := ours.decoder.shape(kind)).shared_with is not None:
            kept, keys = (
                f"decoder.layers.{number}.self_attn.",
                (own.num_kv_heads * own.head_dim, ours.decoder.hidden_size),
            )
            shapes |= {
                f"{kept}k_proj.weight": keys,
                f"{kept}v_proj.weight": keys,
                f"{kept}k_norm.weight": (own.head_dim,),
            }
    stored: dict[str, tuple[int, ...]] = {}
    for tensor, shape in shapes.items():
        if ".switch_mlp." in tensor:  # gate and up of all experts are one tensor, which stands beside that of down
            stem, _, part = tensor.removesuffix("_proj.weight").partition(".switch_mlp.")
            stem = stem.replace("decoder.", "model.language_model.").removesuffix(".experts")
            name = f"{stem}.experts.{'down' if part == 'down' else 'gate_up'}_proj"
            count, rows, columns = shape
            rows = rows if part == "down" else 2 * rows
            stored[name] = (count, columns, rows) if config["model_type"] == "qwen3_vl_moe" else (count, rows, columns)
            continue
        name = _stored_name(tensor, family.WEIGHTS, str(config["model_type"]))
        stored[name] = (stored.get(name, (0,))[0] + shape[0], *shape[1:]) if shape else ()
    return without_data(config, stored)


QWEN3 = ("model.visual.", "model.language_model.")
LATER = {  # families whose names on the Hub are those that others have in memory, and how these begin
    "qwen3_vl": QWEN3,
    "qwen3_5": QWEN3,
    "minicpmv4_6": ("model.vision_tower.", "model.merger.", "model.language_model."),
    "lighton_ocr": ("model.vision_encoder.", "model.vision_projection.", "model.language_model."),
}


def _stored_name(tensor: str, weights: Weights, model_type: str) -> str:
    """What one of our tensors, or what it is fused into, is called on the Hub."""
    parts = next((parts for kind, parts in LATER.items() if model_type.startswith(kind)), None)
    if parts is not None:
        chosen = {theirs: ours for theirs, ours in weights.items() if theirs.startswith((*parts, "lm_head"))}
        weights = {theirs: ours for theirs, ours in chosen.items() if not isinstance(ours, Raised)}
    for theirs, ours in weights.items():
        for part in ours if isinstance(ours, tuple) else () if ours is None else (ours,):
            try:
                return hub_name(tensor, {theirs: part})
            except KeyError:
                continue
    raise KeyError(tensor)


def image_tokens(config: VLMConfig) -> str:
    """Of an image, or of one that fills the most tiles."""
    vision = config.vision
    if vision.grid is not None and vision.grid.places is not None:
        return "up to 280, or 70 to 1,120"
    if vision.grid is not None:
        return f"1 for {vision.image_size} x {vision.image_size} pixels"
    if vision.tiled is not None:
        return f"1, up to {vision.num_features * vision.tiled.max_tiles:,} keys"
    if config.projector.connector is not None:  # 32 tiles, as its image processor's class says, and the whole
        return f"up to {33 * config.tokens_of_row:,}, or four times as many"
    if config.projector.shuffle is not None:  # of a square of 4 x 4 tiles, as their image processors say, and the whole
        return f"up to {17 * vision.num_features // config.projector.shuffle.factor**2:,}"
    if config.projector.resampler is not None:
        return f"{config.projector.resampler.num_queries}"
    if config.image_grid_pinpoints is None:
        return f"{config.tokens_of_row:,}"
    side = vision.image_size // vision.patch_size
    tiles: dict[str, Any] = {"tile_size": vision.image_size, "side": side, "most_tiles": config.most_tiles}
    return f"up to {most_tokens(config.image_grid_pinpoints, **tiles):,}"


def table() -> str:
    lines = [
        "# Published models, by the numbers\n",
        "Weights of each part, embeddings that an image takes in the prompt, and bytes of the tensors: in bfloat16, and",
        "after `convert -q 8` and `-q 4`, which quantize the decoder and leave the rest in bfloat16. Written by `python",
        "tests/support/published.py` from the shapes that config.json asks for; `mix` models have those of `pt` ones. The",
        "authors' own repositories (`liuhaotian/*`) hold the same towers, the vision one often elsewhere, and a vocabulary",
        "without spare rows. An image of Llama 3.2 Vision takes one token; its keys, which the decoder's cross-attention",
        "layers look at, are counted instead. What draws in Janus-Pro is counted with the projector; its head is quantized, its",
        "VQ decoder is not. Of experts a token reads some: the decoder's weights that it does are named, too. InternVL's sizes",
        "are in the README, by tests/test_reference_internvl.py.\n",
        "| model | vision | projector | decoder | image tokens | bfloat16 | 8 bits | 4 bits |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in CONFIGS:
        checkpoint = published(name)
        planned = plan(checkpoint)
        counts = dict.fromkeys(("vision", "projector", "decoder"), 0)
        for theirs, ours in {theirs: ours for ours, theirs in planned.ours.items()}.items():  # a fused one counts once
            part = ours.partition(".")[0]
            counts[part if part in counts else "projector"] += checkpoint.num_weights(theirs)
        sizes = [sum(info.nbytes for info in checkpoint.tensors.values())]
        for bits in (8, 4):
            outputs, _, skipped = plan_outputs(planned, spread(planned, choose(bits, 64, "affine", {})), None)
            assert not skipped
            sizes.append(sum(output.nbytes for output in outputs))
        parts = {part: f"{count / 1e6:,.1f} M" for part, count in counts.items()}
        if planned.config.decoder.experts is not None:
            _, active = count_decoder(checkpoint, planned.family.WEIGHTS, planned.config.decoder)
            parts["decoder"] += f", a token {active / 1e6:,.1f} M"
        cells = [f"`{name}`", *parts.values(), image_tokens(planned.config)]
        lines.append(f"| {' | '.join(cells + [f'{size / 1e9:.2f} GB' for size in sizes])} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    DOCS.write_text(table())
