"""Query tokens look at an image, in some of the decoder's layers between attention and MLP.

Source: arXiv:2312.14238, section 3.2; modeling_qllama.py of github.com/OpenGVLab/InternVL. The queries see one another
and the image and no text, so that what they become depends on the image alone. Their keys and values stay in the KV
cache as those of any token, and later tokens need the image no more.
"""

import mlx.core as mx
import mlx.nn as nn

from mlx_vlm_mini.config import DecoderConfig
from mlx_vlm_mini.layers.attention import Attention
from mlx_vlm_mini.layers.types import Recorder


class Looks:
    """Records what queries look at: the sum over layers of the mean over heads, nothing else being kept."""

    def __init__(self, num_queries: int) -> None:
        self._num_queries, self._layers, self._done = num_queries, 0, 0
        self._rows: list[mx.array] = []
        self._sum: mx.array | float = 0.0

    def append(self, weights: mx.array, /) -> None:
        self._rows.append(weights[0].astype(mx.float32).mean(axis=0))
        self._done += weights.shape[2]
        if self._done == self._num_queries:
            self._sum = self._sum + mx.concatenate(self._rows)
            mx.eval(self._sum)
            self._layers, self._rows, self._done = self._layers + 1, [], 0

    def mean(self) -> mx.array:
        """float32[Q, P], rows that sum to 1."""
        return self._sum / mx.array(self._layers)


class QueryAttention(Attention):
    """Cross-attention of the queries: both sides normed, no positions, no mask, no gate."""

    def __init__(self, config: DecoderConfig) -> None:
        assert config.queries is not None
        width, eps = config.queries.vision_hidden_size, config.norms.rms_norm_eps
        heads, dim = config.num_attention_heads, config.head_dim
        super().__init__(config.hidden_size, num_heads=heads, head_dim=dim, memory_size=width)
        self.num_queries = config.queries.num_query_tokens
        self.norm1, self.norm2 = nn.RMSNorm(config.hidden_size, eps=eps), nn.RMSNorm(width, eps=eps)

    def look(self, x: mx.array, features: mx.array, looks: Recorder | None = None) -> mx.array:
        """float[B, L, C] -> float[B, L, C]: what the first tokens see is added to them, the others stay as they are."""
        queries, rest = mx.split(x, [self.num_queries], axis=1)
        queries = queries + self(self.norm1(queries), memory=self.norm2(features), attentions=looks)
        return mx.concatenate([queries, rest], axis=1)
