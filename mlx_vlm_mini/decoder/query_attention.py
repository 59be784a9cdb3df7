"""Query tokens look at an image, in some of the decoder's layers between attention and MLP.

Source: arXiv:2312.14238, section 3.2; modeling_qllama.py of github.com/OpenGVLab/InternVL. The queries see one another
and the image and no text, so that what they become depends on the image alone. Their keys and values stay in the KV
cache as those of any token, and later tokens need the image no more.
"""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlx_vlm_mini.config import DecoderConfig
from mlx_vlm_mini.layers.attention import attend
from mlx_vlm_mini.layers.types import Mask, Recorder


@dataclass(frozen=True)
class QuerySight:
    """What tokens see in a layer of this kind.

    Attributes:
        mask: of self-attention.
        features: float[B, P, C], what the queries look at, which are the first of the tokens; None where none are.
        looks: where given, takes the queries' weights float[B, H, Q, P], see `Recorder`.
    """

    mask: Mask
    features: mx.array | None
    looks: Recorder | None = None


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


class QueryAttention(nn.Module):
    """Cross-attention of the queries: both sides normed, no positions, no mask, no gate."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        assert config.queries is not None
        size, seen, dim, eps = (
            config.hidden_size, config.queries.vision_hidden_size, config.head_dim, config.norms.rms_norm_eps
        )  # fmt: skip
        self.num_queries, self.num_heads, self.scale = (
            config.queries.num_query_tokens,
            config.num_attention_heads,
            dim**-0.5,
        )
        self.norm1, self.norm2 = nn.RMSNorm(size, eps=eps), nn.RMSNorm(seen, eps=eps)
        self.q_proj = nn.Linear(size, self.num_heads * dim, bias=False)
        self.k_proj = nn.Linear(seen, self.num_heads * dim, bias=False)
        self.v_proj = nn.Linear(seen, self.num_heads * dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * dim, size, bias=False)

    def __call__(self, x: mx.array, features: mx.array, looks: Recorder | None = None) -> mx.array:
        """float[B, L, C] -> float[B, L, C]: what the first tokens see is added to them, the others stay as they are."""
        queries, rest = mx.split(x, [self.num_queries], axis=1)
        B, Q, _ = queries.shape
        seen = self.norm2(features)
        q, k, v = (
            each.reshape(B, each.shape[1], self.num_heads, -1).transpose(0, 2, 1, 3)  # (B, H, L, D)
            for each in (self.q_proj(self.norm1(queries)), self.k_proj(seen), self.v_proj(seen))
        )
        out = attend(q, k, v, scale=self.scale, attentions=looks)
        queries = queries + self.o_proj(out.transpose(0, 2, 1, 3).reshape(B, Q, -1))
        return mx.concatenate([queries, rest], axis=1)
