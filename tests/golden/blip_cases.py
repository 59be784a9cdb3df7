"""What the tiny BLIP-2 and InstructBLIP are and are asked; needs no torch."""

from dataclasses import dataclass, field
from typing import Any

from reference import CASES


@dataclass(frozen=True)
class Spec:
    """A tiny checkpoint; `cases` is what tests/mlx_vlm_mini/test_parity.py asks."""

    model_type: str
    tokenizer: str
    vision: dict[str, Any]
    qformer: dict[str, Any]
    text: dict[str, Any]
    seed: int
    shards: int = 1
    extra: dict[str, Any] = field(default_factory=dict)
    cases: tuple[str, ...] = ("image", "strip", "asked_twice")


SPECS = {
    "blip2-opt": Spec(
        model_type="blip-2", tokenizer="opt",
        vision=dict(
            hidden_size=40, intermediate_size=56, num_hidden_layers=2, num_attention_heads=5, image_size=28, patch_size=7),
        qformer=dict(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=44, vocab_size=90,
            max_position_embeddings=40),
        text=dict(
            model_type="opt", hidden_size=48, num_hidden_layers=2, num_attention_heads=4, ffn_dim=70,
            max_position_embeddings=200, word_embed_proj_dim=48),
        extra=dict(num_query_tokens=6), seed=40),
    "instructblip-vicuna": Spec(
        model_type="instructblip", tokenizer="llama",
        vision=dict(
            hidden_size=36, intermediate_size=44, num_hidden_layers=2, num_attention_heads=3, image_size=24, patch_size=6),
        qformer=dict(
            hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=40, max_position_embeddings=60),
        text=dict(
            model_type="llama", hidden_size=40, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=300, rms_norm_eps=1e-5),
        extra=dict(num_query_tokens=5), seed=41, shards=2),
}  # fmt: skip


def picture_and_text(case: str) -> tuple[str, str]:
    """The image of a conversation, and its last question."""
    parts = [part for message in CASES[case] for part in message["content"]]
    (image,) = (part["image"] for part in parts if part["type"] == "image")
    return image, "".join(part["text"] for part in CASES[case][-1]["content"] if part["type"] == "text")
