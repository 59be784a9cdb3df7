"""Config of the projector."""

from dataclasses import dataclass
from math import isqrt
from typing import Literal, get_args

from mlx_vlm_mini.errors import CheckpointError

from .checks import Activation, NormType, check_flags, check_positive, check_sizes
from .qformer import QFormerConfig

MergerKind = Literal["joined", "channels", "gated"]


@dataclass(frozen=True, kw_only=True)
class ShuffleConfig:
    """Pixel shuffle: squares of `factor` x `factor` neighbouring features become one feature (InternVL)."""

    factor: int
    transposed: bool
    """The smaller grid comes column by column, as InternVL-Chat 1.1 and 1.2 were trained."""

    def __post_init__(self) -> None:
        check_sizes(self, "factor")


@dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """Means of squares of `factor` x `factor` neighbouring features (Gemma 3), an RMS norm, a matrix; `pooling.py`."""

    factor: int
    norm_offset: float
    """As the decoder's `rms_norm_offset`."""

    def __post_init__(self) -> None:
        check_sizes(self, "factor")


@dataclass(frozen=True, kw_only=True)
class GridPoolConfig:
    """Means of squares of `factor` x `factor` features of a grid of any size, times the root of their width, before
    norm and linear layer (Gemma 4; Gemma 3's grids are square, its means stay as they are); see `pooling.py`."""

    factor: int
    standardize: bool
    """A bias of the file is taken off then, and what is left multiplied by a scale (Gemma 4 31B; not E2B)."""

    def __post_init__(self) -> None:
        check_sizes(self, "factor")
        check_flags(self, "standardize")


@dataclass(frozen=True, kw_only=True)
class MergerConfig:
    """Squares of features become embeddings; see `merger.py`."""

    norm_type: NormType
    kind: MergerKind = "joined"
    """Each feature normed, squares joined, two layers (Qwen2-VL); joined channel by channel and narrowed by a layer
    before the two (Mistral 3); or a convolution of each square, a norm and a gated MLP (GLM-4V)."""
    inner_size: int | None = None
    """Of the gated MLP."""
    taps: int = 0
    """Further mergers, for features of earlier blocks, whose norm is of the joined ones (Qwen3-VL)."""
    norm_joined: bool = False
    """The norm is of a joined square, not of each feature in it (MiniCPM-V 4.6)."""

    def __post_init__(self) -> None:
        check_sizes(self, *(["taps"] if self.taps != 0 else []), *(["inner_size"] if self.kind == "gated" else []))
        check_flags(self, "norm_joined")
        if self.kind not in get_args(MergerKind):
            raise CheckpointError(f"config.json: unknown merger {self.kind!r}")


@dataclass(frozen=True, kw_only=True)
class ConnectorConfig:
    """Joined features of tiles with places of their own, by two ways (Granite-Docling); see `connector.py`."""

    taps: int
    """Features of earlier blocks that have layers of their own."""
    fine: bool
    """Besides the way by the pixel shuffle's factor there is one by half of it, with four times the embeddings."""

    def __post_init__(self) -> None:
        check_sizes(self, *(["taps"] if self.taps != 0 else []))
        check_flags(self, "fine")


@dataclass(frozen=True, kw_only=True)
class ResamplerConfig:
    """Learned queries that read the features by cross-attention, in front of the linear layer (Qwen-VL)."""

    num_queries: int
    """Embeddings of an image, a square number: the queries have places on a grid over it."""
    num_heads: int
    norm_eps: float

    def __post_init__(self) -> None:
        check_sizes(self, "num_queries", "num_heads")
        check_positive(self, "norm_eps")
        if isqrt(self.num_queries) ** 2 != self.num_queries:
            raise CheckpointError(f"config.json: the resampler's {self.num_queries} queries do not fill a square")


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """Image features to decoder embeddings: `num_layers` linear layers with an activation between them.

    One layer is the linear projection of LLaVA (2023), two are the MLP of LLaVA-1.5, none leaves features as they are.
    Before them come a pixel shuffle and a norm where the config has them; `input_size` is what enters the first layer.
    Or a Q-Former, which reads the image's features; the linear layer reads what its query tokens become.
    """

    input_size: int
    hidden_size: int
    num_layers: int
    hidden_act: Activation
    bias: bool
    shuffle: ShuffleConfig | None = None
    norm_eps: float | None = None
    norm_type: NormType = "layer_norm"
    """Of the norm before the first layer: InternVL's has weights, Gemma 4's none."""
    resampler: ResamplerConfig | None = None
    qformer: QFormerConfig | None = None
    pool: PoolConfig | None = None
    """In place of all that; one layer."""
    grid_pool: GridPoolConfig | None = None
    merger: MergerConfig | None = None
    """In place of what stands above, for grids of patches; it has the other fields' sizes."""
    connector: ConnectorConfig | None = None

    def __post_init__(self) -> None:
        check_sizes(self, "input_size", "hidden_size", *(["num_layers"] if self.num_layers != 0 else []))
        check_flags(self, "bias")
        if self.num_layers == 0 and self.input_size != self.hidden_size:
            raise CheckpointError(
                f"config.json: features of {self.input_size} numbers are no embeddings of {self.hidden_size}: "
                "a projector is needed"
            )
        if self.resampler is not None and self.hidden_size % self.resampler.num_heads:
            raise CheckpointError(
                f"config.json: embeddings of {self.hidden_size} numbers cannot be cut into {self.resampler.num_heads} "
                "heads of the resampler"
            )

    @property
    def taps(self) -> int:
        """Features of earlier blocks that the decoder's first layers are given besides (DeepStack)."""
        part = self.merger or self.connector
        return 0 if part is None else part.taps

    @property
    def joined(self) -> ShuffleConfig | None:
        """Which features become one embedding, shuffled or averaged; None: each is one."""
        pool = self.pool or self.grid_pool
        return self.shuffle if pool is None else ShuffleConfig(factor=pool.factor, transposed=False)

    @property
    def reads_grid(self) -> bool:
        """Whether it takes features in rows and columns."""
        return self.merger is not None or self.grid_pool is not None
