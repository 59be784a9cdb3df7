"""What the tiny Janus is, is asked and draws; needs no torch."""

from dataclasses import dataclass
from typing import Any

from reference import CASES, USUAL

BEGIN, END, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
PROMPTS = {"circle": "a red circle", "long": "Describe a small house under a grey sky. "}


@dataclass(frozen=True)
class Spec:
    """A tiny checkpoint; `cases` is what tests/mlx_vlm_mini/test_parity.py asks.

    Attributes:
        default_system: whether its processor writes the system prompt before each question.
    """

    vision: dict[str, Any]
    text: dict[str, Any]
    vq: dict[str, Any]
    image_size: int
    seed: int
    default_system: bool = True
    shards: int = 1
    cases: tuple[str, ...] = (*USUAL, "strip", "side_by_side", "system")


SPECS = {
    "janus": Spec(  # 4 x 4 image tokens, pictures of 8 x 8 pixels
        vision=dict(
            hidden_size=24, num_hidden_layers=2, num_attention_heads=3, image_size=32, patch_size=8, mlp_ratio=1.5,
            depth=2, projection_dim=36),
        text=dict(
            hidden_size=36, intermediate_size=52, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
            head_dim=12, max_position_embeddings=512, rms_norm_eps=1e-6,
            rope_parameters={"rope_theta": 1e4, "rope_type": "default"}),
        vq=dict(
            num_embeddings=90, embed_dim=8, latent_channels=16, base_channels=32, channel_multiplier=[2, 1],
            num_res_blocks=1, projection_dim=36, image_token_embed_dim=36),
        image_size=32, seed=70),
}  # fmt: skip

assert set(SPECS["janus"].cases) <= set(CASES)
