"""The one attention of towers, projectors and decoders: fused, or explicit with its weights."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .blocks import in_blocks
from .kernels import kernels
from .types import Mask, Recorder, Rope

BLOCK = 2**23  # scores at a time at most where the weights are computed


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
        mask: see `Mask`.
        attentions: where given, the weights are computed explicitly and appended, see `Recorder`.

    Returns:
        float[B, H, L, D].
    """
    if attentions is None and softcap is None:
        return kernels().attend(queries, keys, values, scale, mask)
    (B, H, L, D), S, groups = queries.shape, keys.shape[2], queries.shape[1] // keys.shape[1]
    rows = max(1, BLOCK // (B * H * S))
    if rows < L:

        def attend_block(queries: mx.array, keys: mx.array, values: mx.array, mask: Mask) -> mx.array:
            return attend(queries, keys, values, scale=scale, softcap=softcap, mask=mask, attentions=attentions)

        return in_blocks(attend_block, queries, keys, values, mask, rows)
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


def split_heads(x: mx.array, heads: int) -> mx.array:
    """float[B, L, H D] -> float[B, H, L, D]."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)


def join_heads(x: mx.array) -> mx.array:
    """float[B, H, L, D] -> float[B, L, H D]."""
    return x.transpose(0, 2, 1, 3).flatten(2)


class Attention(nn.Module):
    """Multi-head attention: of tokens on those before them (self-attention), or on what `memory` holds.

    `num_kv_heads` below `num_heads` groups the queries (arXiv:2305.13245).
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        head_dim: int,
        num_kv_heads: int | None = None,
        memory_size: int | None = None,
        output_size: int | None = None,
        qkv_bias: bool = False,
        o_bias: bool = False,
        scale: float | None = None,
        softcap: float | None = None,
        gated: bool = False,
        keys_as_values: bool = False,
        shared: bool = False,
    ) -> None:
        """
        Args:
            num_kv_heads: None: as many as heads.
            memory_size: width of what keys and values are made of; None: the hidden size.
            output_size: None: the hidden size.
            scale: of the scores; None: 1 / sqrt(head_dim).
            softcap: see `attend`.
            gated: q_proj gives each head a gate besides, by whose sigmoid its output is multiplied (Qwen3-Next).

            shared: keys and values are those of another layer, and nothing here makes any (Gemma 4 E2B).
            keys_as_values: there is no v_proj: values are what k_proj gives, not yet normed (Gemma 4).

        Norms of queries and keys are given by whoever builds it, as `q_norm` and `k_norm`: of each head, or of all
        heads at once where that is their width; and of each head's values as `v_norm`.
        """
        super().__init__()
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        self.scale = head_dim**-0.5 if scale is None else scale
        self.softcap, self.gated = softcap, gated
        width = memory_size or hidden_size
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim * (2 if gated else 1), bias=qkv_bias)
        if not shared:
            self.k_proj = nn.Linear(width, self.num_kv_heads * head_dim, bias=qkv_bias)
        if not (shared or keys_as_values):
            self.v_proj = nn.Linear(width, self.num_kv_heads * head_dim, bias=qkv_bias)
        self.o_proj = nn.Linear(num_heads * head_dim, output_size or hidden_size, bias=o_bias)

    def queries(self, x: mx.array) -> tuple[mx.array, mx.array | None]:
        """float[B, L, C] -> float[B, H, L, D], and where it is gated the gates float[B, L, H D]."""
        q, gate = self.q_proj(x), None
        if self.gated:
            q, gate = mx.split(mx.unflatten(q, -1, (self.num_heads, -1)), 2, axis=-1)
            q, gate = q.flatten(-2), gate.flatten(-2)
        return split_heads(self._normed("q_norm", q), self.num_heads), gate

    def keys_values(self, memory: mx.array) -> tuple[mx.array, mx.array]:
        """float[B, S, C'] -> float[B, H', S, D], twice."""
        k = self.k_proj(memory)
        v = split_heads(self.v_proj(memory) if "v_proj" in self else k, self.num_kv_heads)
        return split_heads(self._normed("k_norm", k), self.num_kv_heads), self.v_norm(v) if "v_norm" in self else v

    def _normed(self, name: str, x: mx.array) -> mx.array:
        if name not in self:
            return x
        norm = self[name]
        return norm(x.reshape(*x.shape[:2], -1, norm.weight.size)).flatten(2)

    def __call__(
        self,
        x: mx.array,
        *,
        memory: mx.array | tuple[mx.array, mx.array] | None = None,
        mask: Mask = None,
        rope: Rope | None = None,
        sharpness: mx.array | None = None,
        cache: Any = None,
        lend: Callable[[tuple[mx.array, mx.array]], None] | None = None,
        attentions: Recorder | None = None,
    ) -> mx.array:
        """float[B, L, C] -> float[B, L, output_size].

        Args:
            memory: what is attended to in place of `x`, float[B, S, C'], or the keys and values themselves, as
                `keys_values` or `lend` gives them.
            rope: rotates queries and keys, of which those that come as they are are rotated already.
            sharpness: float[L, 1] or float[B, 1, L, 1] that queries are multiplied by.
            cache: keeps keys and values, in mlx-lm's form.
            lend: is given the keys and values that are attended to.
            attentions: see `attend`.
        """
        q, gate = self.queries(x)
        ready = isinstance(memory, tuple)
        k, v = memory if isinstance(memory, tuple) else self.keys_values(x if memory is None else memory)
        if rope is not None:
            q, k = rope(q), k if ready else rope(k)
        if sharpness is not None:
            q = q * sharpness.astype(q.dtype)
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        if isinstance(k, tuple | list):  # quantized; one layer's at a time come back to floating point
            settings = {"group_size": cache.group_size, "bits": cache.bits}
            k, v = mx.dequantize(*k, **settings), mx.dequantize(*v, **settings)
        if lend is not None:
            lend((k, v))
        out = join_heads(attend(q, k, v, scale=self.scale, softcap=self.softcap, mask=mask, attentions=attentions))
        return self.o_proj(out if gate is None else out * mx.sigmoid(gate))
