"""The one attention of both towers: fused, and an explicit path that keeps its weights."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .cpu import exponential
from .cpu.tiles import attend_in_tiles
from .types import Mask, Recorder

BLOCK = 2**23  # scores held at a time where the attention is not fused
ONE_FROM = 1024  # keys from which on tiles are faster on a CPU for a single query, too


def attend(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    scale: float,
    softcap: float | None = None,
    mask: Mask = None,
    attentions: Recorder | None = None,
) -> mx.array:
    """softmax(scale QK^T) V, after "Attention Is All You Need" (arXiv:1706.03762), eq. 1.

    Args:
        queries: float[B, H, L, D].
        keys, values: float[B, H', S, D]; each of the H' heads serves H / H' query heads.
        softcap: where given, each score s becomes softcap tanh(s / softcap) before the mask (arXiv:2408.00118). The
            fused attention cannot do that.
        mask: bool[L, S] or bool[B, 1, L, S], true where a query may look; "causal" when the queries are the last L of
            the S positions; None when every query sees every key.
        attentions: where given, the weights are computed explicitly and appended, see `Recorder`.

    Returns:
        float[B, H, L, D].
    """
    (B, H, L, D), S, groups = queries.shape, keys.shape[2], queries.shape[1] // keys.shape[1]
    fused = attentions is None and softcap is None
    by_hand = fused and exponential.is_slow() and queries.dtype == mx.float32 and (L > 1 or S >= ONE_FROM)
    if fused and not by_hand:
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)
    if by_hand:
        return attend_in_tiles(queries * (scale * exponential.LOG2E), keys, values, mask)
    rows = max(1, BLOCK // (B * H * S))
    if rows < L:
        options = {"scale": scale, "softcap": softcap, "attentions": attentions}
        return _attend_in_blocks(queries, keys, values, rows, mask=mask, **options)
    if isinstance(mask, str):
        mask = mx.arange(S - L, S)[:, None] >= mx.arange(S)
    queries = (queries * scale).reshape(B, H // groups, groups, L, D)
    scores = queries @ keys[:, :, None].swapaxes(-1, -2)
    if softcap is not None:
        scores = softcap * mx.tanh(scores / softcap)
    if mask is not None:
        mask = mask if mask.ndim == 2 else mask[:, None]
        scores = mx.where(mask, scores, mx.finfo(scores.dtype).min)
    weights = mx.softmax(scores, axis=-1, precise=True)
    if attentions is not None:
        attentions.append(weights.reshape(B, H, L, S))
    return (weights @ values[:, :, None]).reshape(B, H, L, D)


def _attend_in_blocks(
    queries: mx.array, keys: mx.array, values: mx.array, rows: int, *, mask: Mask, **options: Any
) -> mx.array:
    """`attend`, `rows` queries after `rows` queries, none of which depends on the others."""
    blocks: list[mx.array] = []
    L, S = queries.shape[2], keys.shape[2]
    for start in range(0, L, rows):
        block, seen, end = queries[:, :, start : start + rows], mask, S
        if isinstance(mask, mx.array):
            seen = mask[..., start : start + rows, :]
        elif mask == "causal":  # what comes after the block is seen by none of it
            end = S - L + start + block.shape[2]
        if blocks:  # one after the other, else all their scores are held at once
            (block,) = mx.depends([block], [blocks[-1]])
        blocks.append(attend(block, keys[:, :, :end], values[:, :, :end], mask=seen, **options))
    return mx.concatenate(blocks, axis=2)


def logn_factors(offset: int, length: int, base: int) -> mx.array:
    """Of `length` tokens after `offset` others log n to this base, n counted from 1, at least 1: float[L, 1].

    So that attention to more keys than in pretraining stays as sharp (Qwen; Su Jianlin, spaces.ac.cn/archives/8823).
    """
    n = np.arange(offset + 1, offset + length + 1, dtype=np.float64)
    return mx.array(np.maximum(np.log(n) / np.log(base), 1).astype(np.float32))[:, None]


class Attention(nn.Module):
    """Multi-head self-attention; `num_kv_heads` below `num_heads` groups the queries (arXiv:2305.13245)."""

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        qkv_bias: bool,
        o_bias: bool,
        scale: float,
        softcap: float | None = None,
        qk_norm: tuple[int, float] | None = None,
        logn_length: int | None = None,
    ) -> None:
        """
        Args:
            logn_length: token n's query is multiplied by log n to this base where that is above 1.
            qk_norm: width and eps of an RMS norm over queries and one over keys: of each head, or of all at once.
        """
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.scale = scale
        self.softcap = softcap
        self.logn_length = logn_length
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=qkv_bias)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=o_bias)
        if qk_norm is not None:
            width, eps = qk_norm
            self.q_norm = nn.RMSNorm(width, eps=eps)
            self.k_norm = nn.RMSNorm(width, eps=eps)

    def __call__(
        self,
        x: mx.array,
        *,
        mask: Mask = None,
        rope: Any = None,
        cache: Any = None,
        attentions: Recorder | None = None,
    ) -> mx.array:
        """float[B, L, C] -> float[B, L, C]. `rope` turns queries and keys, mlx-lm's `cache` keeps keys and values."""
        B, L, _ = x.shape
        q, k = self.q_proj(x), self.k_proj(x)
        if "q_norm" in self:
            q = self.q_norm(q.reshape(B, L, -1, self.q_norm.weight.size))
            k = self.k_norm(k.reshape(B, L, -1, self.k_norm.weight.size))
        q = q.reshape(B, L, self.num_heads, -1).transpose(0, 2, 1, 3)  # (B, H, L, D)
        k = k.reshape(B, L, self.num_kv_heads, -1).transpose(0, 2, 1, 3)
        v = self.v_proj(x).reshape(B, L, self.num_kv_heads, -1).transpose(0, 2, 1, 3)
        if rope is not None:
            offset = 0 if cache is None else cache.offset
            q, k = rope(q, offset=offset), rope(k, offset=offset)
            if self.logn_length is not None and offset + L > self.logn_length:
                q = q * logn_factors(offset, L, self.logn_length).astype(q.dtype)
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        if isinstance(k, tuple | list):  # quantized; one layer's at a time come back to floating point
            settings = {"group_size": cache.group_size, "bits": cache.bits}
            k, v = mx.dequantize(*k, **settings), mx.dequantize(*v, **settings)
        out = attend(q, k, v, scale=self.scale, softcap=self.softcap, mask=mask, attentions=attentions)
        return self.o_proj(out.transpose(0, 2, 1, 3).reshape(B, L, -1))  # (B, L, C)
