"""Image features -> decoder embeddings: `make_projector` makes the projector that a config asks for."""

from typing import Any

from mlx_vlm_mini.config import ProjectorConfig

from .merger import ChannelMerger, PatchMerger
from .mlp import Projector
from .pooling import PooledProjector
from .qformer import QFormer
from .resampler import Resampler


def make_projector(config: ProjectorConfig) -> Any:
    """The projector of a config: that of the first part that it has, or linear layers."""
    merger = ChannelMerger if config.merger is not None and config.merger.by_channel else PatchMerger
    kinds: list[tuple[object, Any]] = [
        (config.resampler, Resampler),
        (config.pool, PooledProjector),
        (config.merger, merger),
        (config.qformer, QFormer),
    ]
    return next((kind for part, kind in kinds if part is not None), Projector)(config)
