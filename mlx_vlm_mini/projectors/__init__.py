"""Image features -> decoder embeddings: `make_projector` makes the projector that a config asks for."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from mlx_vlm_mini.config import MergerKind, ProjectorConfig

from .connector import Connector
from .merger import ChannelMerger, GatedMerger, PatchMerger
from .mlp import Projector
from .pooling import GridPooledProjector, PooledProjector
from .qformer import QFormer
from .resampler import Resampler

MERGERS: Mapping[MergerKind, Any] = MappingProxyType(
    {"joined": PatchMerger, "channels": ChannelMerger, "gated": GatedMerger}
)


def make_projector(config: ProjectorConfig) -> Any:
    """The projector of a config: that of the first part that it has, or linear layers."""
    merger = None if config.merger is None else MERGERS[config.merger.kind]
    kinds: list[tuple[object, Any]] = [
        (config.resampler, Resampler),
        (config.pool, PooledProjector),
        (config.grid_pool, GridPooledProjector),
        (config.merger, merger),
        (config.qformer, QFormer),
        (config.connector, Connector),
    ]
    return next((kind for part, kind in kinds if part is not None), Projector)(config)
