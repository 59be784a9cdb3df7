"""The vision transformer: pixels -> patch features.

Source: "An Image is Worth 16x16 Words" (arXiv:2010.11929). CLIP (arXiv:2103.00020) adds a class token and a norm in
front, SigLIP (arXiv:2303.15343) a bias in the patch projection, InternViT (arXiv:2312.14238) layer scales, RMS norms,
norms of queries and keys, and positions for any size. Modules are named as timm names them.
"""

import mlx.core as mx
import mlx.nn as nn

from mlx_vlm_mini.config import VisionConfig
from mlx_vlm_mini.errors import ImageError
from mlx_vlm_mini.layers.attention import Attention
from mlx_vlm_mini.layers.mlp import MLP, Clippable, GatedMLP
from mlx_vlm_mini.layers.norms import NORMS, BareRMSNorm
from mlx_vlm_mini.layers.types import Mask, Recorder, Rope

from .positions import resize
from .tower import Tower


def cut_patches(pixel_values: mx.array, p: int) -> mx.array:
    """Images in patches of p x p pixels, row by row, the pixels of a patch too: float[B, height, width, channels] ->
    float[B, P, p * p * channels]; what makes no whole patch is left out."""
    B, height, width, channels = pixel_values.shape
    rows, columns = height // p, width // p
    x = pixel_values[:, : rows * p, : columns * p].reshape(B, rows, p, columns, p, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(B, rows * columns, -1)


class LinearPatchEmbed(nn.Module):
    """Cuts the image into patches and projects each by a linear layer (Gemma 4)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.proj = nn.Linear(3 * config.patch_size**2, config.hidden_size, bias=config.patch_bias)

    def __call__(self, pixel_values: mx.array) -> mx.array:
        """float[B, height, width, 3] -> float[B, P, C]."""
        return self.proj(cut_patches(pixel_values, self.patch_size))


class PatchEmbed(nn.Module):
    """Cuts the image into patches and projects each: a convolution whose stride is its kernel, as one product."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        p = self.patch_size = config.patch_size
        scale = (3 * p * p) ** -0.5
        self.weight = mx.random.uniform(-scale, scale, (config.hidden_size, p, p, 3))
        if config.patch_bias:
            self.bias = mx.zeros(config.hidden_size)

    def __call__(self, pixel_values: mx.array) -> mx.array:
        p, channels = self.patch_size, pixel_values.shape[-1]
        x = cut_patches(pixel_values, p) @ self.kernel(channels).reshape(-1, p * p * channels).T  # (B, P, C)
        return x + self.bias if "bias" in self else x

    def kernel(self, channels: int) -> mx.array:
        """float[C, p, p, channels]."""
        return self.weight


class Block(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        heads, norm, qk_norm_eps = config.num_attention_heads, NORMS[config.blocks.norm_type], config.blocks.qk_norm_eps
        self.norm1 = norm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = Attention(
            config.hidden_size,
            num_heads=heads,
            head_dim=config.hidden_size // heads,
            qkv_bias=config.blocks.qkv_bias,
            o_bias=config.blocks.o_bias,
        )
        if qk_norm_eps is not None:
            width = config.hidden_size // heads if config.blocks.qk_norm_heads else config.hidden_size
            self.attn.q_norm = nn.RMSNorm(width, eps=qk_norm_eps)
            self.attn.k_norm = nn.RMSNorm(width, eps=qk_norm_eps)
        self.norm2 = norm(config.hidden_size, eps=config.layer_norm_eps)
        sizes = config.hidden_size, config.intermediate_size, config.hidden_act
        self.mlp = GatedMLP(*sizes, bias=config.blocks.mlp_bias) if config.blocks.gated_mlp else MLP(*sizes)
        if config.blocks.layer_scale:
            self.ls1, self.ls2 = mx.ones(config.hidden_size), mx.ones(config.hidden_size)

    def __call__(
        self, x: mx.array, attentions: Recorder | None = None, *, mask: Mask = None, rope: Rope | None = None
    ) -> mx.array:
        added = self.attn(self.norm1(x), mask=mask, rope=rope, attentions=attentions)
        x = x + (added * self.ls1 if "ls1" in self else added)
        added = self.mlp(self.norm2(x))
        return x + (added * self.ls2 if "ls2" in self else added)


class SandwichBlock(Block):
    """Gemma 4's block: norms after attention and MLP, too, and of each head's queries, keys and values; scores that are
    not scaled; linear layers whose inputs and outputs may be clipped."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(config)
        size, eps, norm = config.hidden_size, config.layer_norm_eps, NORMS[config.blocks.norm_type]
        head = size // config.num_attention_heads
        self.norm1_post, self.norm2_post = norm(size, eps=eps), norm(size, eps=eps)
        self.attn.q_norm, self.attn.k_norm, self.attn.v_norm = (
            norm(head, eps=eps),
            norm(head, eps=eps),
            BareRMSNorm(eps=eps),
        )
        self.attn.scale = 1.0
        for part, names in ((self.attn, "qkvo"), (self.mlp, ("gate", "up", "down"))):
            for name in names:
                part[f"{name}_proj"] = Clippable(part[f"{name}_proj"], clips=config.blocks.clipped)

    def __call__(
        self, x: mx.array, attentions: Recorder | None = None, *, mask: Mask = None, rope: Rope | None = None
    ) -> mx.array:
        x = x + self.norm1_post(self.attn(self.norm1(x), mask=mask, rope=rope, attentions=attentions))
        return x + self.norm2_post(self.mlp(self.norm2(x)))


class VisionTransformer(Tower):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        if config.class_token:
            self.class_token = mx.zeros(config.hidden_size)
        self.pos_embed = mx.zeros((config.num_positions, config.hidden_size))
        if config.pre_norm:
            self.norm_pre = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.blocks = [Block(config) for _ in range(config.depth)]
        if config.post_norm:
            self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def _positions(self, height: int, width: int) -> mx.array:
        """Position embeddings of an image, float[P, C]; bicubic between the stored ones where it has another size.

        Raises:
            ImageError: the tower takes no such size.
        """
        config, side = self.config, self.config.image_size
        if (height, width) == (side, side):
            return self.pos_embed
        stored, wanted = side // config.patch_size, height // config.patch_size
        if not config.resample_positions or height != width or not wanted:
            raise ImageError(
                f"the vision tower takes {side}x{side} pixels, the image processor gives {width}x{height}: "
                "preprocessor_config.json does not fit config.json"
            )
        first, rest = self.pos_embed[: -(stored**2)], self.pos_embed[-(stored**2) :]
        return mx.concatenate([first, resize(rest, wanted, wanted, "cubic")])

    def encode(self, pixel_values: mx.array, attentions: Recorder | None = None) -> mx.array:
        """Encode images.

        Args:
            pixel_values: float[B, side, side, 3], normalised; `image_size` pixels along a side, or any number of them
                where the config says `resample_positions`.
            attentions: where given, each block appends its weights float[B, H, P, P] (class token first).

        Returns:
            float[B, P, feature_size], P being `num_features` for images of `image_size` pixels.

        Raises:
            ImageError: the image has another size than the position embeddings.
        """
        positions = self._positions(*pixel_values.shape[1:3])
        x = self.patch_embed(pixel_values)  # (B, P, C)
        if "class_token" in self:
            first = mx.broadcast_to(self.class_token, (x.shape[0], 1, x.shape[2]))
            x = mx.concatenate([first, x], axis=1)
        x = x + positions
        if "norm_pre" in self:
            x = self.norm_pre(x)
        states = [x]
        for block in self.blocks:
            states.append(block(states[-1], attentions))
        chosen = [states[layer] for layer in self.config.feature_layers]
        if "norm" in self:  # of the first that the last block gives: one behind it is what a tap reads
            last = self.config.feature_layers.index(self.config.depth)
            chosen[last] = self.norm(chosen[last])
        features = mx.concatenate(chosen, axis=-1)
        return features[:, 1:] if self.config.drop_first_feature else features
