"""A vision transformer whose image is several tiles that see one another: pixels -> patch features.

Source: models/llama3/multimodal of meta-llama/llama-models, models/mllama of huggingface/transformers. The blocks are
those of vision.py. New are positions mixed by learned gates, of a tile alone and of a tile on its canvas; gated blocks
behind the last norm; and intermediate states beside what these give.
"""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_vlm_mini.config import VisionConfig
from mlx_vlm_mini.errors import ImageError
from mlx_vlm_mini.layers.types import Mask, Recorder, Rope
from mlx_vlm_mini.preprocessing.canvas import possible_grids

from .transformer import Block, PatchEmbed

_ALIGNED = 8  # a tile's rows are padded to the next multiple of it, by as many where they are one already


class GatedBlock(Block):
    """A block that adds tanh(gate) of what attention and MLP give."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(config)
        self.gate_attn, self.gate_mlp = mx.zeros(1), mx.zeros(1)

    def __call__(
        self, x: mx.array, attentions: Recorder | None = None, *, mask: Mask = None, rope: Rope | None = None
    ) -> mx.array:
        x = x + mx.tanh(self.gate_attn) * self.attn(self.norm1(x), mask=mask, rope=rope, attentions=attentions)
        return x + mx.tanh(self.gate_mlp) * self.mlp(self.norm2(x))


class GatedTileEmbedding(nn.Module):
    """An embedding of `rows` vectors for each tile of each canvas, times tanh of a gate; canvas 0 is not used."""

    def __init__(self, config: VisionConfig, rows: int) -> None:
        super().__init__()
        assert config.tiled is not None
        self.shape = (config.tiled.max_tiles, rows, config.hidden_size)
        canvases = len(possible_grids(config.tiled.max_tiles)) + 1
        self.embedding = nn.Embedding(canvases, config.tiled.max_tiles * rows * config.hidden_size)
        self.gate = mx.zeros(1)

    def __call__(self, canvases: mx.array) -> mx.array:
        """int[B] -> float[B, tiles, rows, C]."""
        stored = self.embedding(canvases).astype(self.gate.dtype).reshape(-1, *self.shape)
        return mx.tanh(self.gate) * stored


class TiledVisionTransformer(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        assert config.tiled is not None
        self.config, self.tiled = config, config.tiled
        self.grids = possible_grids(config.tiled.max_tiles)
        self.patch_embed = PatchEmbed(config)
        self.class_token = mx.zeros(config.hidden_size)
        self.pos_embed = mx.zeros((config.num_positions, config.hidden_size))
        self.tile_pos = GatedTileEmbedding(config, config.num_positions)  # its gate is that of `pos_embed`, reversed
        self.pre_tile, self.post_tile = GatedTileEmbedding(config, 1), GatedTileEmbedding(config, 1)
        self.norm_pre = nn.LayerNorm(config.hidden_size)  # 1e-5, whatever the blocks' norms have
        self.blocks = [Block(config) for _ in range(config.depth)]
        self.norm = nn.LayerNorm(config.hidden_size)
        self.global_blocks = [GatedBlock(config) for _ in range(config.tiled.num_global_layers)]

    def _mask(self, grids: Sequence[tuple[int, int]], rows: int) -> mx.array:
        """bool[B, 1, S, S]: padding does not see padding; all else sees all, padding too, as it was trained."""
        used = mx.array([height * width for height, width in grids])[:, None, None]
        tiles, places = mx.arange(self.tiled.max_tiles)[:, None], mx.arange(rows)
        padding = ((tiles >= used) | (places >= self.config.num_positions)).reshape(len(grids), -1)
        return ~(padding[:, None, :, None] & padding[:, None, None, :])

    def __call__(
        self,
        pixel_values: mx.array,
        grids: Sequence[tuple[int, int]],
        attentions: Recorder | None = None,
    ) -> mx.array:
        """Encode images.

        Args:
            pixel_values: float[B, max_tiles, image_size, image_size, 3], normalised; 0 in tiles that are not used.
            grids: of each image, rows and columns of its tiles, which come first and row by row.
            attentions: where given, each block appends its weights float[B, H, S, S], S being `max_tiles` times the
                rows of a tile and their padding.

        Returns:
            float[B, max_tiles, P, feature_size]: the last global block's output, and behind it, number by number of the
            width, that of each intermediate layer.

        Raises:
            ImageError: the tiles have another size than the position embeddings.
        """
        config, (B, T, *size, _) = self.config, pixel_values.shape
        if size != [config.image_size] * 2:
            raise ImageError(
                f"the vision tower takes {config.image_size}x{config.image_size} pixels a tile, the image processor "
                f"gives {size[1]}x{size[0]}: preprocessor_config.json does not fit config.json"
            )
        canvases = mx.array([1 + self.grids.index(grid) for grid in grids])
        x = self.patch_embed(pixel_values.flatten(0, 1)).reshape(B, T, -1, config.hidden_size)  # (B, T, P - 1, C)
        x = x + self.pre_tile(canvases)
        first = mx.broadcast_to(self.class_token, (B, T, 1, config.hidden_size))
        x = mx.concatenate([first, x], axis=2)  # (B, T, P, C)
        x = x + (1 - mx.tanh(self.tile_pos.gate)) * self.pos_embed + self.tile_pos(canvases)
        P = config.num_positions
        x = mx.pad(self.norm_pre(x), [(0, 0), (0, 0), (0, _ALIGNED - P % _ALIGNED), (0, 0)])
        rows, mask = x.shape[2], self._mask(grids, x.shape[2])
        states = [x.flatten(1, 2)]  # (B, S, C)
        for block in self.blocks:
            states.append(block(states[-1], attentions, mask=mask))
        x = self.norm(states[-1]).reshape(B, T, rows, -1) + self.post_tile(canvases)
        x = x.flatten(1, 2)
        for block in self.global_blocks:
            x = block(x, attentions, mask=mask)
        taps = mx.stack([states[layer] for layer in config.feature_layers[:-1]], axis=-1)  # (B, S, C, layers)
        features = mx.concatenate([x, taps.flatten(2, 3)], axis=-1)
        return features.reshape(B, T, rows, -1)[:, :, :P]
