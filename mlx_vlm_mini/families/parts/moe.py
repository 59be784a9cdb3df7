"""What families share whose feed-forwards are experts: Qwen3-VL-MoE, Qwen3.5-MoE.

Source: models/qwen3_vl_moe and qwen3_5_moe of huggingface/transformers; config.json files as they are on the Hub.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mlx_vlm_mini.config import DecoderConfig, ExpertConfig
from mlx_vlm_mini.errors import CheckpointError

from .maps import Weights, expert_weights

_PREFIXES = ("model.", "model.language_model.", "language_model.model.")


def moe_weights(names: Weights) -> Weights:
    """A dense model's names with those of experts."""
    found = dict(names)
    for prefix in _PREFIXES:
        found |= expert_weights(prefix)
    return found


def without_experts(hf: Mapping[str, Any], defaults: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json as that of a dense model whose feed-forwards are as wide as an expert; and its text part whole.

    Raises:
        CheckpointError: some layers have no experts.
    """
    text = {**defaults, **(hf.get("text_config") or hf)}
    text["num_experts"] = text.get("num_local_experts", text["num_experts"])  # as transformers 5 writes it
    if text.get("mlp_only_layers") or text.get("decoder_sparse_step", 1) != 1:
        raise CheckpointError("config.json: layers without experts among those with them are not supported")
    plain = {key: value for key, value in text.items() if key not in ("num_experts", "num_local_experts")}
    return {**hf, "text_config": {**plain, "intermediate_size": text["moe_intermediate_size"]}}, text


def with_experts(decoder: DecoderConfig, text: Mapping[str, Any]) -> DecoderConfig:
    """The decoder with experts as its part of config.json says."""
    experts = ExpertConfig(
        num_experts=text["num_experts"],
        num_experts_per_tok=text["num_experts_per_tok"],
        moe_intermediate_size=text["moe_intermediate_size"],
        shared_expert_intermediate_size=text.get("shared_expert_intermediate_size"),
    )
    return replace(decoder, mlp_type="moe", experts=experts)
