"""What a model that draws has beside its decoder: embeddings and a head of image tokens, and the VQ decoder."""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_vlm_mini.config import DrawingConfig
from mlx_vlm_mini.layers.kernels import activation
from mlx_vlm_mini.layers.mlp import Narrow

from .vq import VQDecoder


class TokenAligner(nn.Module):
    """Embeddings of image tokens, a few numbers each, to what the decoder reads."""

    def __init__(self, config: DrawingConfig) -> None:
        super().__init__()
        self.act = activation(config.hidden_act)
        self.fc1 = Narrow(config.vq.embed_dim, config.hidden_size)
        self.hidden_layers = [nn.Linear(config.hidden_size, config.hidden_size) for _ in range(config.num_layers - 1)]

    def __call__(self, x: mx.array) -> mx.array:
        """float[..., embed_dim] -> float[..., C]."""
        x = self.fc1(x)
        for layer in self.hidden_layers:
            x = layer(self.act(x))
        return x


class TokenHead(nn.Module):
    """The decoder's hidden states to scores of image tokens."""

    def __init__(self, config: DrawingConfig) -> None:
        super().__init__()
        self.act = activation(config.hidden_act)
        self.proj_out = nn.Linear(config.hidden_size, config.hidden_size)
        self.vision_head = nn.Linear(config.hidden_size, config.vq.num_embeddings)

    def __call__(self, hidden: mx.array) -> mx.array:
        """float[..., C] -> float[..., num_embeddings]."""
        return self.vision_head(self.act(self.proj_out(hidden)))


class Drawer(nn.Module):
    """hidden states --logits--> image tokens --embed--> what the decoder reads next; all of a picture's --pixels-->"""

    def __init__(self, config: DrawingConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = mx.zeros((config.vq.num_embeddings, config.vq.embed_dim))
        self.aligner, self.head, self.vq = TokenAligner(config), TokenHead(config), VQDecoder(config.vq)

    def logits(self, hidden: mx.array) -> mx.array:
        """float[B, C], the decoder's last hidden states -> float[B, num_embeddings]."""
        return self.head(hidden)

    def embed(self, tokens: mx.array) -> mx.array:
        """int[B, L] -> float[B, L, C]: what the decoder reads of image tokens, which is not the codebook's."""
        return self.aligner(self.embeddings[tokens])

    def pixels(self, tokens: Sequence[int]) -> mx.array:
        """A picture's image tokens, row by row -> float32[side, side, 3], normalised; evaluated."""
        return self.vq(tokens, self.config.grid)
