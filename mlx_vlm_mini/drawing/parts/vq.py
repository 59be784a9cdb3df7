"""The VQ decoder: image tokens -> pixels.

Source: VQGAN (arXiv:2012.09841) as LlamaGen has it (arXiv:2406.06525); models/janus of huggingface/transformers.
Modules are named as there.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn

from mlx_vlm_mini.config import NORM_GROUPS, VQConfig
from mlx_vlm_mini.layers.attention import attend
from mlx_vlm_mini.layers.kernels import activation, kernels

swish = activation("silu")


class GroupNorm(nn.GroupNorm):
    """Over groups of adjacent channels and all cells."""

    def __init__(self, channels: int) -> None:
        super().__init__(NORM_GROUPS, channels, eps=1e-6, pytorch_compatible=True)


class Conv3x3(nn.Conv2d):
    """A convolution of 3 x 3 cells with zeros around the picture."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__(channels, out, kernel_size=3, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        """float[1, height, width, channels] -> float[1, height, width, out]."""
        return kernels().convolve(x, self.weight) + self.bias


class Block(nn.Module):
    """Two convolutions added to what enters."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = GroupNorm(channels), Conv3x3(channels, out)
        self.norm2, self.conv2 = GroupNorm(out), Conv3x3(out, out)
        if channels != out:
            self.nin_shortcut = nn.Conv2d(channels, out, kernel_size=1)

    def __call__(self, x: mx.array) -> mx.array:
        """float[1, height, width, channels] -> float[1, height, width, out]."""
        y = self.conv1(swish(self.norm1(x)))
        y = self.conv2(swish(self.norm2(y)))
        return (self.nin_shortcut(x) if "nin_shortcut" in self else x) + y


class CellAttention(nn.Module):
    """Attention of every cell to all cells, with one head, added to what enters."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = GroupNorm(channels)
        for name in ("q", "k", "v", "proj_out"):
            setattr(self, name, nn.Conv2d(channels, channels, kernel_size=1))

    def __call__(self, x: mx.array) -> mx.array:
        """float[1, height, width, C] -> the same shape."""
        normed = self.norm(x)
        q, k, v = (part(normed).flatten(1, 2)[:, None] for part in (self.q, self.k, self.v))  # (1, 1, cells, C)
        found = attend(q, k, v, scale=x.shape[-1] ** -0.5)
        return x + self.proj_out(found.reshape(x.shape))


class Middle(nn.Module):
    """What stands before the levels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1, self.block_2 = Block(channels, channels), Block(channels, channels)
        self.attn_1 = CellAttention(channels)

    def steps(self) -> list[nn.Module]:
        """Its modules in order."""
        return [self.block_1, self.attn_1, self.block_2]


class Upsample(nn.Module):
    """Every cell becomes four equal ones; then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, channels)

    def __call__(self, x: mx.array) -> mx.array:
        """float[1, height, width, C] -> float[1, 2 height, 2 width, C]."""
        return self.conv(mx.repeat(mx.repeat(x, 2, axis=1), 2, axis=2))


class Level(nn.Module):
    """Blocks of one resolution."""

    def __init__(self, channels: int, out: int, blocks: int, *, attends: bool, last: bool) -> None:
        super().__init__()
        self.block = [Block(channels if number == 0 else out, out) for number in range(blocks)]
        if attends:
            self.attn = [CellAttention(out) for _ in range(blocks)]
        if not last:
            self.upsample = Upsample(out)

    def steps(self) -> Iterator[nn.Module]:
        """Its modules in order."""
        for number, block in enumerate(self.block):
            yield block
            if "attn" in self:
                yield self.attn[number]
        if "upsample" in self:
            yield self.upsample


class VQDecoder(nn.Module):
    """A codebook and a convolutional decoder. Nothing is computed of two modules at once, so that memory stays that of
    one."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths = config.widths
        self.codebook = mx.zeros((config.num_embeddings, config.embed_dim))
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.latent_channels, kernel_size=1)
        self.conv_in = Conv3x3(config.latent_channels, widths[0])
        self.mid = Middle(widths[0])
        last = len(widths) - 1
        self.up = [
            Level(channels, out, config.num_res_blocks + 1, attends=number == 0, last=number == last)
            for number, (channels, out) in enumerate(pairwise((widths[0], *widths)))
        ]
        self.norm_out = GroupNorm(widths[-1])
        self.conv_out = Conv3x3(widths[-1], config.out_channels)

    def __call__(self, tokens: Sequence[int], grid: int) -> mx.array:
        """The pixels of one picture, normalised as the checkpoint's images are.

        Args:
            tokens: int[grid * grid], row by row.
            grid: tokens along a side.

        Returns:
            float32[side, side, 3], evaluated.
        """
        codes = self.codebook[mx.array([*tokens])].astype(mx.float32)
        codes = codes / mx.maximum(mx.linalg.norm(codes, axis=-1, keepdims=True), 1e-12)
        x = codes.astype(self.codebook.dtype).reshape(1, grid, grid, -1)
        steps = [self.post_quant_conv, self.conv_in, *self.mid.steps()]
        for step in (*steps, *(step for level in self.up for step in level.steps())):
            x = step(x)
            mx.eval(x)
        x = self.conv_out(swish(self.norm_out(x)))[0].astype(mx.float32)
        mx.eval(x)
        mx.clear_cache()
        return x
