"""Gated delta net: in place of keys and values a layer keeps a state whose size does not grow with the tokens.

Source: Gated Delta Networks (arXiv:2412.06464); models/qwen3_5 of huggingface/transformers, whose names these are.
"""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_vlm_mini.config import DeltaConfig
from mlx_vlm_mini.layers.kernels import activation, kernels
from mlx_vlm_mini.layers.mlp import Narrow

_L2_EPS = 1e-6  # of the norm of queries and keys; no config says it


class Memory(NamedTuple):
    """What a layer keeps of some tokens.

    Attributes:
        state: float32[B, H, Dv, Dk], of the recurrence.
        inputs: float[B, conv_kernel - 1, channels], the last ones of the convolution.
    """

    state: mx.array
    inputs: mx.array

    @property
    def nbytes(self) -> int:
        return self.state.nbytes + self.inputs.nbytes


class Snapshot(NamedTuple):
    """What a layer kept when it had read `length` tokens."""

    length: int
    memory: Memory


class DeltaCache:
    """A layer's memory, and a few earlier ones that it can go back to: nothing can be taken out of a state again.

    Memories are never written into, and the tuple of snapshots is replaced, so that a copy of this object is a fork.

    Attributes:
        memory: None while nothing was read.
        offset: tokens read; of a batch int64[B].
        before: what there was before the last tokens that were read: decoding computes one token ahead.
        snapshots: older ones, the shortest first.
    """

    def __init__(self) -> None:
        self.memory: Memory | None = None
        self.offset: int | np.ndarray = 0
        self.before: Snapshot | None = None
        self.snapshots: tuple[Snapshot, ...] = ()

    def update(self, memory: Memory, length: int) -> None:
        """Replace the memory by that after `length` further tokens."""
        if self.memory is not None and isinstance(self.offset, int):
            self.before = Snapshot(self.offset, self.memory)
        self.memory, self.offset = memory, self.offset + length

    def snapshot(self) -> None:
        """Keep the present memory to go back to."""
        self.snapshots = self.kept

    def forget(self) -> None:
        """Give up the oldest snapshot."""
        self.snapshots = self.snapshots[1:]

    @property
    def kept(self) -> tuple[Snapshot, ...]:
        """The snapshots, and the present memory as one behind them; none of a batch."""
        own = () if self.memory is None or not isinstance(self.offset, int) else (Snapshot(self.offset, self.memory),)
        return (*(each for each in self.snapshots if each.length != self.offset), *own)

    @kept.setter
    def kept(self, kept: Sequence[Snapshot]) -> None:
        self.before, self.snapshots = None, tuple(kept)
        self.offset, self.memory = kept[-1]

    def _earlier(self) -> tuple[Snapshot, ...]:
        return (*self.snapshots, *([] if self.before is None else [self.before]))

    def reach(self, length: int) -> int:
        """The largest length up to this one that it can go back to; its own where it has read no more."""
        if self.offset <= length:
            return length
        return max((each.length for each in self._earlier() if each.length <= length), default=0)

    def rewind(self, length: int) -> None:
        """Go back to a length that it reaches."""
        if self.offset <= length:
            return
        found = next(each for each in self._earlier() if each.length == length)
        self.memory, self.offset, self.before = found.memory, length, None
        self.snapshots = tuple(each for each in self.snapshots if each.length <= length)

    def empty(self) -> bool:
        """Whether it holds nothing."""
        return self.memory is None

    @property
    def state(self) -> list[mx.array]:
        """What has to be evaluated, as of mlx-lm's caches."""
        earlier = [part for each in self._earlier() for part in each.memory]
        return [*(() if self.memory is None else self.memory), *earlier]

    @property
    def nbytes(self) -> int:
        """Bytes of all that it keeps, each array counted once."""
        return sum(part.nbytes for part in {id(part): part for part in self.state}.values())

    @classmethod
    def merge(cls, caches: Sequence["DeltaCache"]) -> "DeltaCache":
        """A batch whose rows are these sequences; it goes back nowhere."""
        merged = cls()
        memories = [cache.memory for cache in caches if cache.memory is not None]
        if memories:
            merged.memory = Memory(*(mx.concatenate(list(parts)) for parts in zip(*memories, strict=True)))
        merged.offset = np.array([cache.offset for cache in caches], dtype=np.int64)
        return merged

    def extend(self, other: "DeltaCache") -> None:
        """Append the rows of another batch."""
        assert self.memory is not None and other.memory is not None
        self.memory = Memory(*(mx.concatenate([*parts]) for parts in zip(self.memory, other.memory, strict=True)))
        self.offset = np.concatenate([np.atleast_1d(self.offset), np.atleast_1d(other.offset)])

    def filter(self, rows: mx.array) -> None:
        """Keep only these rows of a batch, in this order."""
        if self.memory is not None:
            self.memory = Memory(*(part[rows] for part in self.memory))
        assert not isinstance(self.offset, int)
        self.offset = self.offset[np.array(rows)]

    def extract(self, row: int) -> "DeltaCache":
        """One row of a batch as a sequence of its own."""
        own = DeltaCache()
        if self.memory is not None:
            own.memory = Memory(*(part[row : row + 1] for part in self.memory))
        assert not isinstance(self.offset, int)
        own.offset = int(self.offset[row])
        return own


class GatedDeltaNet(nn.Module):
    """Mixes tokens by a short convolution and by the gated delta rule, in float32 whatever the weights are.

    Of queries, keys and values one stands behind the other in `in_proj_qkv`, each head after head; a head of keys
    serves heads of values that follow one another.
    """

    def __init__(self, hidden_size: int, config: DeltaConfig, eps: float) -> None:
        """
        Args:
            eps: of the norm behind the recurrence.
        """
        super().__init__()
        self.config = config
        heads = config.num_value_heads
        self.in_proj_qkv = nn.Linear(hidden_size, config.mixed_size, bias=False)
        self.in_proj_z = nn.Linear(hidden_size, config.value_size, bias=False)
        self.in_proj_b = Narrow(hidden_size, heads, bias=False)
        self.in_proj_a = Narrow(hidden_size, heads, bias=False)
        self.conv1d = nn.Module()
        self.conv1d.weight = mx.zeros((config.mixed_size, config.conv_kernel, 1))
        self.A_log = mx.zeros(heads)
        self.dt_bias = mx.zeros(heads)
        self.norm = nn.RMSNorm(config.value_head_dim, eps=eps)
        self.out_proj = nn.Linear(config.value_size, hidden_size, bias=False)
        self.act = activation("silu")

    def __call__(self, x: mx.array, cache: DeltaCache | None = None) -> mx.array:
        """float[B, L, C] -> float[B, L, C]."""
        (B, L, _), config = x.shape, self.config
        memory = self._memory(B, x.dtype) if cache is None or cache.memory is None else cache.memory
        mixed, inputs = self._convolve(self.in_proj_qkv(x), memory.inputs)
        q, k, v = mx.split(mixed.astype(mx.float32), [config.key_size, 2 * config.key_size], axis=-1)
        q = _unit(q.reshape(B, L, config.num_key_heads, -1)) * config.key_head_dim**-0.5
        k = _unit(k.reshape(B, L, config.num_key_heads, -1))
        v = v.reshape(B, L, config.num_value_heads, -1)
        steps = mx.logaddexp(self.in_proj_a(x).astype(mx.float32) + self.dt_bias.astype(mx.float32), 0.0)  # softplus
        decays = -mx.exp(self.A_log.astype(mx.float32)) * steps
        betas = mx.sigmoid(self.in_proj_b(x).astype(mx.float32))
        out, state = kernels().delta(q, k, v, decays, betas, memory.state)
        if cache is not None:
            cache.update(Memory(state, inputs), L)
        gate = self.act(self.in_proj_z(x).astype(mx.float32)).reshape(out.shape)
        out = mx.fast.rms_norm(out, self.norm.weight.astype(mx.float32), self.norm.eps) * gate
        return self.out_proj(out.flatten(2).astype(x.dtype))

    def _memory(self, rows: int, dtype: mx.Dtype) -> Memory:
        """Of no tokens."""
        config = self.config
        state = mx.zeros((rows, config.num_value_heads, config.value_head_dim, config.key_head_dim))
        return Memory(state, mx.zeros((rows, config.conv_kernel - 1, config.mixed_size), dtype=dtype))

    def _convolve(self, x: mx.array, inputs: mx.array) -> tuple[mx.array, mx.array]:
        """Each channel's last `conv_kernel` inputs weighed and added up, float[B, L, channels]; and the inputs to keep,
        some of which were kept already where L is small."""
        length = x.shape[1]
        x = mx.concatenate([inputs.astype(x.dtype), x], axis=1)
        weight = self.conv1d.weight[..., 0]
        y = x[:, :length] * weight[:, 0]
        for place in range(1, weight.shape[1]):
            y = y + x[:, place : place + length] * weight[:, place]
        kept = mx.take(x, mx.arange(length, x.shape[1]), axis=1)  # a copy: a slice would keep all of x in memory
        return self.act(y), kept


def _unit(x: mx.array) -> mx.array:
    """Vectors of length 1."""
    return x * mx.rsqrt(mx.square(x).sum(axis=-1, keepdims=True) + _L2_EPS)
