"""What turns images and texts into vectors that are compared, and says whether an image and a text match (QLLaMA).

Source: arXiv:2312.14238, section 3.3; modeling_internvl.py of github.com/OpenGVLab/InternVL.
"""

import mlx.core as mx
import mlx.nn as nn

from mlx_vlm_mini.config import ContrastConfig
from mlx_vlm_mini.layers.attention import attend, join_heads, split_heads

EPS = 1e-5  # of the pools' norms, whatever the decoder's is


class AttentionPool(nn.Module):
    """One vector of many: their mean asks, all of them answer. float[B, N, C] -> float[B, D]."""

    def __init__(self, size: int, config: ContrastConfig) -> None:
        super().__init__()
        self.num_heads = config.pool_heads
        self.norm_q, self.norm_k, self.norm_v = (nn.LayerNorm(size, eps=EPS) for _ in range(3))
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(size, size) for _ in range(3))
        self.o_proj = nn.Linear(size, config.embed_dim)

    def __call__(self, x: mx.array) -> mx.array:
        q = self.q_proj(self.norm_q(x.mean(axis=1, keepdims=True)))
        k, v = self.k_proj(self.norm_k(x)), self.v_proj(self.norm_v(x))
        q, k, v = (split_heads(each, self.num_heads) for each in (q, k, v))  # (B, H, N, D)
        out = attend(q, k, v, scale=q.shape[-1] ** -0.5)
        return self.o_proj(join_heads(out)[:, 0])


class Contrast(nn.Module):
    """The heads that compare.

    Attributes:
        image_pool: of the vision tower's features.
        query_pool: of what the queries become.
        text_projection: float[C, D], of what the text's last token becomes.
        logit_scale: the cosines are multiplied by its exponential.
        match: of each query two scores, the second one for a text that fits.
    """

    def __init__(self, vision_size: int, hidden_size: int, config: ContrastConfig) -> None:
        super().__init__()
        self.image_pool = AttentionPool(vision_size, config)
        self.query_pool = AttentionPool(hidden_size, config)
        self.text_projection = mx.zeros((hidden_size, config.embed_dim))
        self.logit_scale = mx.array(0.0)
        self.match = nn.Linear(hidden_size, 2)
