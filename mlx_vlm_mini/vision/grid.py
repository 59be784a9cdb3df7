"""The vision transformer of patch grids: pixels of any size -> patch features, row by row.

Sources: Qwen2-VL (arXiv:2409.12191), Qwen2.5-VL (arXiv:2502.13923), Qwen3-VL (arXiv:2511.21631), Pixtral
(arXiv:2410.07073); models/qwen2_vl, qwen2_5_vl, qwen3_vl, pixtral and gemma4 of huggingface/transformers. Patches know
their row and column by rotary positions in every block (Qwen3-VL's and Gemma 4's by learned ones besides). In most of
Qwen2.5-VL's blocks they see the patches of their window alone.
"""

import mlx.core as mx
import numpy as np

from mlx_vlm_mini.config import VisionConfig
from mlx_vlm_mini.errors import ImageError
from mlx_vlm_mini.layers.angles import Turn, grid_angles
from mlx_vlm_mini.layers.norms import NORMS
from mlx_vlm_mini.layers.types import Recorder

from .positions import resize
from .tower import Tower
from .transformer import Block, LinearPatchEmbed, PatchEmbed, SandwichBlock


def count_patches(pixel_values: mx.array, p: int) -> tuple[int, int]:
    """Rows and columns of patches in float[1, height, width, channels].

    Raises:
        ImageError: a side is no multiple of theirs.
    """
    height, width = pixel_values.shape[1:3]
    if not height or not width or height % p or width % p:
        raise ImageError(f"an image of {width}x{height} pixels is not made of patches of {p}")
    return height // p, width // p


def window_order(rows: int, columns: int, side: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """The patches of a grid, window by window of side x side; those at the right and the bottom are what is left.

    Returns:
        int[rows * columns], numbers of patches row by row; and groups of equal windows, which follow one another: how
        many, and the patches of each.
    """
    numbers = np.arange(rows * columns).reshape(rows, columns)
    order, groups = [], []
    for top, bottom in ((0, rows // side * side), (rows // side * side, rows)):
        for left, right in ((0, columns // side * side), (columns // side * side, columns)):
            part = numbers[top:bottom, left:right]
            if part.size:
                high, wide = min(side, bottom - top), min(side, right - left)
                down, across = part.shape[0] // high, part.shape[1] // wide
                order.append(part.reshape(down, high, across, wide).transpose(0, 2, 1, 3).ravel())
                groups.append((down * across, high * wide))
    return np.concatenate(order), groups


def positions_by_axes(across: mx.array, down: mx.array, rows: int, columns: int) -> mx.array:
    """Learned positions of columns and of rows, float[places, C], added up: float[P, C].

    Raises:
        ImageError: there are not as many.
    """
    if max(rows, columns) > len(across):
        raise ImageError(f"an image of {columns}x{rows} patches needs more positions than this model's {len(across)}")
    return (across[None, :columns] + down[:rows, None]).reshape(rows * columns, -1)


class FramePatchEmbed(PatchEmbed):
    """Patches of several frames of a video; a picture is all of them."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(config)
        assert config.grid is not None and config.grid.frames is not None
        p, frames = config.patch_size, config.grid.frames
        scale = (3 * p * p * frames) ** -0.5
        self.weight = mx.random.uniform(-scale, scale, (config.hidden_size, frames, p, p, 3))

    def kernel(self, channels: int) -> mx.array:
        weight = self.weight.astype(mx.float32)
        if channels == 3:
            return weight.sum(axis=1)  # which half precision would round
        return weight.transpose(0, 2, 3, 1, 4)  # (C, p, p, frames, 3)


class GridVisionTransformer(Tower):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        assert config.grid is not None
        self.config, self.grid = config, config.grid
        embed = PatchEmbed if self.grid.frames is None else FramePatchEmbed
        self.patch_embed = (LinearPatchEmbed if self.grid.linear_patches else embed)(config)
        if self.grid.position_side is not None:
            self.pos_embed = mx.zeros((self.grid.position_side**2, config.hidden_size))
        if config.pre_norm:
            self.norm_pre = NORMS[config.blocks.norm_type](config.hidden_size, eps=config.layer_norm_eps)
        if self.grid.places is not None:
            self.pos_axes = mx.zeros((2, self.grid.places, config.hidden_size))
        block = SandwichBlock if config.blocks.sandwich else Block
        self.blocks = [block(config) for _ in range(config.depth)]
        if config.post_norm:
            self.norm = NORMS[config.blocks.norm_type](config.hidden_size, eps=config.layer_norm_eps)

    def _turns(self, order: np.ndarray, columns: int, groups: list[tuple[int, int]]) -> tuple[Turn, list[Turn]]:
        """What rotates patches that are numbered so, of the whole image and of each group of equal windows."""
        config, theta = self.config, self.grid.axial_theta
        dims = config.hidden_size // config.num_attention_heads
        down, across = order // columns, order % columns
        if theta is None:
            angles = grid_angles(down, across, dims, alternating=self.grid.alternating)
        else:
            angles = grid_angles(across, down, dims, theta)
        parts, cuts = 1 if theta is None else 2, np.cumsum([count * size for count, size in groups])[:-1].tolist()
        return Turn(angles, parts=parts), [
            Turn(part.reshape(count, 1, size, -1), parts=parts)
            for part, (count, size) in zip(np.split(angles, cuts), groups, strict=True)
        ]

    def encode(self, pixel_values: mx.array, attentions: Recorder | None = None) -> mx.array:
        """Encode one image.

        Args:
            pixel_values: float[1, height, width, 3], normalised; whole patches along each side. Of a video, one step of
                time: float[1, height, width, 3 * frames], its frames one behind another.
            attentions: where given, each block appends its weights float[1, H, P, P], or of its windows
                float[windows, H, P', P'] once for each group of equal ones.

        Returns:
            float[1, rows, columns, feature_size].

        Raises:
            ImageError: a side is no multiple of the patches'.
        """
        config = self.config
        rows, columns = count_patches(pixel_values, config.patch_size)
        x = self.patch_embed(pixel_values).astype(pixel_values.dtype)  # (1, P, C)
        if "pos_axes" in self:
            x = x + positions_by_axes(self.pos_axes[0], self.pos_axes[1], rows, columns)
        if "norm_pre" in self:
            x = self.norm_pre(x)
        if "pos_embed" in self:
            x = x + resize(self.pos_embed, rows, columns, self.grid.position_resize).astype(x.dtype)
        window = self.grid.window
        order, groups = window_order(rows, columns, max(rows, columns) if window is None else window)
        whole, turns = self._turns(order, columns, groups)
        cuts = np.cumsum([count * size for count, size in groups])[:-1].tolist()
        states = [x[:, mx.array(order)]]
        for number, block in enumerate(self.blocks):
            if window is None or number in self.grid.full_blocks or len(groups) == groups[0][0] == 1:
                states.append(block(states[-1], attentions, rope=whole))
                continue
            parts = [
                block(part.reshape(count, size, -1), attentions, rope=turn).reshape(1, count * size, -1)
                for part, turn, (count, size) in zip(mx.split(states[-1], cuts, axis=1), turns, groups, strict=True)
            ]
            states.append(mx.concatenate(parts, axis=1))
        if "norm" in self:
            states[-1] = self.norm(states[-1])
        features = mx.concatenate([states[layer] for layer in config.feature_layers], axis=-1)
        return features[:, mx.array(np.argsort(order))].reshape(1, rows, columns, -1)
