"""The vision transformer in which four patches become one on the way: pixels of any size -> features, row by row.

Source: models/minicpmv4_6 of huggingface/transformers. A SigLIP whose patches take one of the stored positions each.
"""

import mlx.core as mx
import mlx.nn as nn

from mlx_vlm_mini.config import VisionConfig
from mlx_vlm_mini.errors import ImageError
from mlx_vlm_mini.layers.attention import Attention
from mlx_vlm_mini.layers.kernels import activation
from mlx_vlm_mini.layers.types import Recorder

from .positions import resize
from .tower import Tower, join_squares
from .transformer import Block, PatchEmbed


class WindowMerger(nn.Module):
    """Patches see those of their 2 x 2 window, whose mean then becomes one feature, with what an MLP makes of all four
    added."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size, joined, inner = config.hidden_size, 4 * config.hidden_size, 4 * config.intermediate_size
        heads = config.num_attention_heads
        self.norm1 = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.attn = Attention(size, num_heads=heads, head_dim=size // heads, qkv_bias=True, o_bias=True)
        self.norm2 = nn.LayerNorm(joined, eps=config.layer_norm_eps)
        self.fc1, self.fc2 = nn.Linear(joined, inner), nn.Linear(inner, size)
        self.act = activation("gelu_pytorch_tanh")

    def __call__(self, x: mx.array, attentions: Recorder | None = None) -> mx.array:
        """float[1, rows, columns, C] -> float[1, rows / 2, columns / 2, C]."""
        joined = join_squares(x, 2)  # (1, rows / 2, columns / 2, 4 C)
        windows = joined.reshape(-1, 4, x.shape[-1])
        windows = windows + self.attn(self.norm1(windows), attentions=attentions)
        added = self.fc2(self.act(self.fc1(self.norm2(windows.reshape(joined.shape)))))
        return added + windows.mean(axis=1).reshape(added.shape)


class MergingVisionTransformer(Tower):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        assert config.grid is not None and config.grid.position_side is not None
        self.config, self.grid = config, config.grid
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = mx.zeros((config.grid.position_side**2, config.hidden_size))
        self.blocks = [Block(config) for _ in range(config.depth)]
        self.merger = WindowMerger(config)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def encode(self, pixel_values: mx.array, attentions: Recorder | None = None) -> mx.array:
        """Encode pictures, or slices of one, of one size.

        Args:
            pixel_values: float[B, height, width, 3], normalised; an even number of patches along each side.
            attentions: where given, each block appends its weights float[B, H, P, P], the merger those of its windows.

        Returns:
            float[B, rows / 2, columns / 2, C], of rows x columns patches.

        Raises:
            ImageError: a side is no multiple of two patches.
        """
        (B, height, width, _), patch = pixel_values.shape, self.config.patch_size
        if not height or not width or height % (2 * patch) or width % (2 * patch):
            raise ImageError(f"an image of {width}x{height} pixels is not made of pairs of patches of {patch}")
        rows, columns = height // patch, width // patch
        positions = resize(self.pos_embed, rows, columns, self.grid.position_resize)
        x = self.patch_embed(pixel_values) + positions  # (B, P, C)
        for number, block in enumerate(self.blocks, 1):
            x = block(x, attentions)
            if number == self.grid.merged_after:
                x = self.merger(x.reshape(B, rows, columns, -1), attentions).flatten(1, 2)
        return self.norm(x).reshape(B, rows // 2, columns // 2, -1)
