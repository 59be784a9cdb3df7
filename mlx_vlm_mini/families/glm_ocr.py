"""GLM-OCR: GLM-4V's tower without learned positions and with norms of each head's queries and keys, and a small GLM-4.

Source: models/glm_ocr of huggingface/transformers; config.json as it is on the Hub. The tower's own MLPs are
`intermediate_size` wide, the merger's as wide as three embeddings. Whole heads are rotated. A layer that drafts tokens
ahead, which the files have after the last one, is not read.
"""

from collections.abc import Mapping
from typing import Any

from mlx_vlm_mini.config import BlockConfig, VLMConfig
from mlx_vlm_mini.families.parts.configs import side
from mlx_vlm_mini.families.parts.patch_grids import grid_tower, image_text, pixels

from .glm4v import CHAT_TEMPLATE, WEIGHTS, gated_projector, glm_decoder

__all__ = ["CHAT_TEMPLATE", "IMAGE_PROCESSOR", "WEIGHTS", "config", "image_text", "pixels"]

IMAGE_PROCESSOR = "Glm46V"

_TEXT = {
    "vocab_size": 59392, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16,
    "num_attention_heads": 16, "num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
}  # fmt: skip
_VISION = {
    "depth": 24, "hidden_size": 1024, "hidden_act": "silu", "attention_bias": True, "num_heads": 16, "in_channels": 3,
    "patch_size": 14, "rms_norm_eps": 1e-5, "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 1536,
    "intermediate_size": 4096,
}  # fmt: skip


def config(hf: Mapping[str, Any]) -> VLMConfig:
    decoder = glm_decoder(hf, _TEXT, bias=False)
    values = {**_VISION, **(hf.get("vision_config") or {})}
    bias = values["attention_bias"]
    tower = grid_tower(
        {**values, "width": values["hidden_size"]},
        blocks=BlockConfig(
            norm_type="rms_norm", qkv_bias=bias, o_bias=bias, gated_mlp=True, mlp_bias=bias,
            qk_norm_eps=values["rms_norm_eps"], qk_norm_heads=True,
        ),
        eps=values["rms_norm_eps"],
        post_norm=True,
        frames=side(values["temporal_patch_size"], "temporal_patch_size"),
    )  # fmt: skip
    return VLMConfig(
        family="glm_ocr",
        vision=tower,
        projector=gated_projector(tower, decoder, values, values["out_hidden_size"] * values["in_channels"]),
        decoder=decoder,
        image_token_id=hf.get("image_token_id", 59280),
        image_grid_pinpoints=None,
        draft_layers=(hf.get("text_config") or {}).get("num_nextn_predict_layers") or 0,
    )
