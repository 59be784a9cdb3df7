"""pixel_values -> image features: `make_tower` makes the transformer that a config asks for."""

from typing import Any

from mlx_vlm_mini.config import VisionConfig

from .grid import GridVisionTransformer
from .merging import MergingVisionTransformer
from .patches import NormedPatches
from .tiled import TiledVisionTransformer
from .transformer import VisionTransformer


def make_tower(config: VisionConfig) -> Any:
    """The vision tower of a config: of a fixed size, of tiles that see one another, or of any size, where the patches
    may become fewer on the way."""
    if config.grid is not None and config.grid.merged_after is not None:
        return MergingVisionTransformer(config)
    if config.grid is not None:
        return GridVisionTransformer(config) if config.num_hidden_layers else NormedPatches(config)
    return VisionTransformer(config) if config.tiled is None else TiledVisionTransformer(config)
