"""The Q-Former: query tokens that look at an image become its embeddings; a projector (BLIP-2, InstructBLIP).

Sources: arXiv:2301.12597, arXiv:2305.06500; models/blip_2 and models/instructblip of huggingface/transformers. It is a
BERT (arXiv:1810.04805), whose norms stand behind what is added. InstructBLIP's reads the question beside the queries:
all see one another, the queries alone look at the image, and have an MLP of their own.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_vlm_mini.config import ProjectorConfig, QFormerConfig
from mlx_vlm_mini.errors import PromptError
from mlx_vlm_mini.layers.attention import Attention
from mlx_vlm_mini.layers.mlp import MLP
from mlx_vlm_mini.layers.types import Recorder


class QFormerBlock(nn.Module):
    def __init__(self, config: QFormerConfig, number: int, seen: int) -> None:
        super().__init__()
        heads, size, eps = config.num_attention_heads, config.hidden_size, config.layer_norm_eps
        self.num_queries = config.num_query_tokens
        shape: dict[str, Any] = {"num_heads": heads, "head_dim": size // heads, "qkv_bias": True, "o_bias": True}
        self.attn = Attention(size, **shape)
        self.attn_norm = nn.LayerNorm(size, eps=eps)
        if number % config.cross_attention_frequency == 0:
            self.cross_attn = Attention(size, memory_size=seen, **shape)
            self.cross_norm = nn.LayerNorm(size, eps=eps)
        sizes = size, config.intermediate_size, config.hidden_act
        self.query_mlp, self.query_norm = MLP(*sizes), nn.LayerNorm(size, eps=eps)
        if config.instruction is not None:
            self.text_mlp, self.text_norm = MLP(*sizes), nn.LayerNorm(size, eps=eps)

    def __call__(self, x: mx.array, features: mx.array, looks: Recorder | None) -> mx.array:
        """float[B, L, C] -> float[B, L, C], the query tokens being the first."""
        x = self.attn_norm(x + self.attn(x))
        queries, text = x[:, : self.num_queries], x[:, self.num_queries :]
        if "cross_attn" in self:
            queries = self.cross_norm(queries + self.cross_attn(queries, memory=features, attentions=looks))
        queries = self.query_norm(queries + self.query_mlp(queries))
        if not text.shape[1]:
            return queries
        return mx.concatenate([queries, self.text_norm(text + self.text_mlp(text))], axis=1)


class QFormer(nn.Module):
    """Image features -> as many embeddings as there are query tokens."""

    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        assert config.qformer is not None
        own = config.qformer
        self.query_tokens = mx.zeros((own.num_query_tokens, own.hidden_size))
        if own.instruction is not None:
            self.embed_words = nn.Embedding(own.instruction.vocab_size, own.hidden_size)
            self.pos_embed = mx.zeros((own.instruction.max_position_embeddings, own.hidden_size))
        self.norm = nn.LayerNorm(own.hidden_size, eps=own.layer_norm_eps)
        self.blocks = [QFormerBlock(own, number, config.input_size) for number in range(own.num_hidden_layers)]
        self.layers = [nn.Linear(own.hidden_size, config.hidden_size, bias=config.bias)]

    def __call__(
        self, features: mx.array, instruction: mx.array | None = None, looks: Recorder | None = None
    ) -> mx.array:
        """
        Args:
            features: float[B, P, C].
            instruction: int[L], the question, which InstructBLIP's reads.
            looks: takes the queries' weights on the features, layer after layer.

        Returns:
            float[B, Q, hidden_size].

        Raises:
            PromptError: the question is longer than there are positions.
        """
        B, Q = features.shape[0], len(self.query_tokens)
        x = mx.broadcast_to(self.query_tokens, (B, *self.query_tokens.shape))
        if instruction is not None and "embed_words" in self:
            length, longest = len(instruction), len(self.pos_embed)
            if length > longest:
                raise PromptError(f"the question has {length} tokens, the Q-Former reads at most {longest}: shorten it")
            text = self.embed_words(instruction).astype(x.dtype) + self.pos_embed[:length]
            x = mx.concatenate([x, mx.broadcast_to(text, (B, *text.shape))], axis=1)
        x = self.norm(x)
        for block in self.blocks:
            x = block(x, features, looks)
        return self.layers[0](x[:, :Q])
