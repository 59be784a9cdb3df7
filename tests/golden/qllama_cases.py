"""What the tiny QLLaMA is and is asked; needs no torch."""

from dataclasses import dataclass
from typing import Any

from reference import CASES

IMAGES = ("photo.jpg", "shapes.png", "strip.png")
TEXTS = ("a red circle", "a photo of a small house under a grey sky", "ünïcode & 42", "", "square " * 100)
CAPTION = "English caption:"
CONFIG: dict[str, Any] = {
    "architectures": ["InternVLModel"], "model_type": "internvl",
    "auto_map": {"AutoConfig": "configuration_internvl.InternVLConfig", "AutoModel": "modeling_internvl.InternVLModel"},
    "clip_embed_dim": 24, "attn_pool_num_heads": 4, "num_query_token": 6, "cross_attention_frequency": 2,
    "force_image_size": None, "label_smoothing": 0.0, "use_backbone_lora": 0, "use_qllama_lora": 0,
    "vision_config": {
        "model_type": "intern_vit_6b", "hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 2,
        "num_hidden_layers": 2, "image_size": 28, "patch_size": 7, "qk_normalization": True, "qkv_bias": False,
        "layer_norm_eps": 1e-6, "hidden_act": "gelu",
    },
    "qllama_config": {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4,
        "num_hidden_layers": 3, "rms_norm_eps": 1e-4, "vocab_size": 443, "max_position_embeddings": 512,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """What tests/mlx_vlm_mini/test_parity.py asks."""

    cases: tuple[str, ...] = ("image", "strip")


SPECS = {"qllama": Spec()}


def picture_and_text(case: str) -> tuple[str, str]:
    first, second = CASES[case][-1]["content"]
    return first["image"], second["text"]
