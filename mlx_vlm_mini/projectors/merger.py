"""The projector of patch grids: squares of neighbouring features joined, and two layers.

Source: models/qwen2_vl, qwen3_vl, mistral3 and glm4v in huggingface/transformers. Qwen3-VL has one more for each tap,
the features of an earlier block that the decoder's first layers add to its image tokens (arXiv:2406.04334).
"""

import mlx.core as mx
import mlx.nn as nn

from mlx_vlm_mini.config import ProjectorConfig
from mlx_vlm_mini.layers.kernels import activation
from mlx_vlm_mini.layers.mlp import GatedMLP
from mlx_vlm_mini.layers.norms import NORMS
from mlx_vlm_mini.vision.tower import join_squares


class Merger(nn.Module):
    def __init__(self, config: ProjectorConfig, *, norm_joined: bool) -> None:
        """`norm_joined`: the norm is of a joined square, not of each feature in it."""
        super().__init__()
        assert config.merger is not None and config.shuffle is not None and config.norm_eps is not None
        self.factor, self.norm_joined, self.act = config.shuffle.factor, norm_joined, activation(config.hidden_act)
        joined = config.input_size // (1 + config.merger.taps)
        norm = NORMS[config.merger.norm_type]
        self.norm = norm(joined if norm_joined else joined // self.factor**2, eps=config.norm_eps)
        self.layers = [
            nn.Linear(joined, joined, bias=config.bias),
            nn.Linear(joined, config.hidden_size, bias=config.bias),
        ]

    def __call__(self, features: mx.array) -> mx.array:
        """float[B, rows, columns, C] -> float[B, tokens, hidden_size]."""
        x = features if self.norm_joined else self.norm(features)
        x = join_squares(x, self.factor).flatten(1, 2)
        x = self.norm(x) if self.norm_joined else x
        return self.layers[1](self.act(self.layers[0](x)))


class PatchMerger(Merger):
    def __init__(self, config: ProjectorConfig) -> None:
        assert config.merger is not None
        super().__init__(config, norm_joined=config.merger.norm_joined)
        self.taps = [Merger(config, norm_joined=True) for _ in range(config.merger.taps)]

    def __call__(self, features: mx.array) -> mx.array:
        """float[B, rows, columns, C (1 + taps)] -> float[B, tokens, hidden_size (1 + taps)]."""
        own, *tapped = mx.split(features, 1 + len(self.taps), axis=-1)
        merged = [super().__call__(own)]
        merged += [merge(part) for merge, part in zip(self.taps, tapped, strict=True)]
        return mx.concatenate(merged, axis=-1)


class ChannelMerger(nn.Module):
    """Mistral 3's: each feature normed, squares joined channel by channel and narrowed by a layer, then two layers."""

    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        assert config.merger is not None and config.shuffle is not None and config.norm_eps is not None
        self.factor, self.act = config.shuffle.factor, activation(config.hidden_act)
        width = config.input_size // self.factor**2
        self.norm = NORMS[config.merger.norm_type](width, eps=config.norm_eps)
        self.merging_layer = nn.Linear(config.input_size, width, bias=False)
        self.layers = [
            nn.Linear(width, config.hidden_size, bias=config.bias),
            nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias),
        ]

    def __call__(self, features: mx.array) -> mx.array:
        """float[B, rows, columns, C] -> float[B, tokens, hidden_size]."""
        x = join_squares(self.norm(features), self.factor).flatten(1, 2)  # (B, tokens, n * n * C)
        x = mx.unflatten(x, -1, (self.factor**2, -1)).swapaxes(-1, -2).flatten(-2)  # (B, tokens, C * n * n)
        return self.layers[1](self.act(self.layers[0](self.merging_layer(x))))


class Downsample(nn.Module):
    """A convolution whose stride is its kernel, as a product with joined squares."""

    def __init__(self, width: int, out: int, factor: int) -> None:
        super().__init__()
        self.weight = mx.zeros((out, factor, factor, width))
        self.bias = mx.zeros(out)

    def __call__(self, squares: mx.array) -> mx.array:
        """float[..., n * n * C] -> float[..., out]."""
        return squares @ self.weight.reshape(len(self.weight), -1).T + self.bias


class GatedMerger(nn.Module):
    """GLM-4V's: each square through a convolution, a layer, a norm and GELU, and a gated MLP."""

    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        assert config.merger is not None and config.shuffle is not None and config.norm_eps is not None
        assert config.merger.inner_size is not None
        self.factor, self.act, size = config.shuffle.factor, activation("gelu"), config.hidden_size
        self.downsample = Downsample(config.input_size // self.factor**2, size, self.factor)
        self.proj = nn.Linear(size, size, bias=config.bias)
        self.norm = NORMS[config.merger.norm_type](size, eps=config.norm_eps)
        self.mlp = GatedMLP(size, config.merger.inner_size, config.hidden_act, bias=config.bias)

    def __call__(self, features: mx.array) -> mx.array:
        """float[B, rows, columns, C] -> float[B, tokens, hidden_size]."""
        x = self.downsample(join_squares(features, self.factor).flatten(1, 2))
        return self.mlp(self.act(self.norm(self.proj(x))))
