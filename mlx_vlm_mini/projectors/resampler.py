"""The resampler: patch features -> a fixed number of decoder embeddings, by cross-attention of learned queries.

Source: Qwen-VL (arXiv:2308.12966), section 2.1; visual.py of Qwen/Qwen-VL-Chat on the Hub, layers/resampler.py of
vllm-project/vllm.
"""

from math import isqrt
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_vlm_mini.config import ProjectorConfig
from mlx_vlm_mini.layers.attention import attend, join_heads, split_heads
from mlx_vlm_mini.layers.types import Recorder
from mlx_vlm_mini.vision.positions import resize


class Projected(NamedTuple):
    """Queries, keys and values, float[..., C] each."""

    queries: mx.array
    keys: mx.array
    values: mx.array


class FusedAttention(nn.Module):
    """torch's MultiheadAttention, whose projections are one tensor: the rows of queries, keys and values in thirds."""

    def __init__(self, size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = mx.zeros((3 * size, size))
        self.in_proj_bias = mx.zeros(3 * size)
        self.out_proj = nn.Linear(size, size)

    def __call__(self, inputs: Projected, attentions: Recorder | None = None) -> mx.array:
        """float[B, L, C] of queries, float[B, S, C] of keys and values -> float[B, L, C]."""
        weights, biases = mx.split(self.in_proj_weight, 3), mx.split(self.in_proj_bias, 3)
        q, k, v = (
            split_heads(x @ weight.T + bias, self.num_heads)  # (B, H, L, D)
            for x, weight, bias in zip(inputs, weights, biases, strict=True)
        )
        out = attend(q, k, v, scale=q.shape[-1] ** -0.5, attentions=attentions)
        return self.out_proj(join_heads(out))


class Resampler(nn.Module):
    """Queries on a grid over the image ask its features, keys and queries knowing their places.

    `pos_embed` are places of the queries; those of the features are bicubic between them.
    """

    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        assert config.resampler is not None
        resampler, size = config.resampler, config.hidden_size
        self.config = config
        self.query = mx.zeros((resampler.num_queries, size))
        self.pos_embed = mx.zeros((resampler.num_queries, size))
        self.kv_proj = nn.Linear(config.input_size, size, bias=config.bias)
        self.ln_q, self.ln_kv, self.ln_post = (nn.LayerNorm(size, eps=resampler.norm_eps) for _ in range(3))
        self.attn = FusedAttention(size, resampler.num_heads)
        self.proj = mx.zeros((size, size))  # (in, out), as it is stored

    def __call__(self, features: mx.array, attentions: Recorder | None = None) -> mx.array:
        """float[B, P, C] -> float[B, num_queries, hidden_size].

        Args:
            features: a square grid row by row.
            attentions: where given, the weights float[B, H, num_queries, P] are appended.
        """
        values = self.ln_kv(self.kv_proj(features))
        side = isqrt(features.shape[1])
        keys = values + resize(self.pos_embed, side, side, "cubic")
        queries = self.ln_q(self.query) + self.pos_embed
        queries = mx.broadcast_to(queries, (len(features), *queries.shape))
        return self.ln_post(self.attn(Projected(queries, keys, values), attentions)) @ self.proj

    def weights(self, features: mx.array) -> mx.array:
        """How much each query takes from each feature, mean over heads: float32[B, num_queries, P], rows of sum 1."""
        blocks: list[mx.array] = []
        self(features, blocks)
        return mx.concatenate(blocks, axis=2).astype(mx.float32).mean(axis=1)
