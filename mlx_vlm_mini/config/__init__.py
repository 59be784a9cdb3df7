"""The configuration of the three parts. Field names are Hugging Face's where it has one.

Shape letters, used in every comment of this package:

    B batch    L tokens    P patches    H heads    D head size    C hidden size
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mlx_vlm_mini.errors import CheckpointError

from .checks import Activation, NormType, check_layers, check_sizes
from .decoder import (
    SLIDING,
    BiasConfig,
    BlindRows,
    CrossAttentionConfig,
    DecoderConfig,
    DeltaConfig,
    EmbeddingConfig,
    ExpertConfig,
    LayerShape,
    LayerType,
    MLPType,
    NormConfig,
    PerLayerConfig,
    QueryScale,
    QueryScaleType,
    ScaleConfig,
    TwoWay,
    WindowConfig,
)
from .drawing import NORM_GROUPS, DrawingConfig, VQConfig
from .projector import (
    ConnectorConfig,
    GridPoolConfig,
    MergerConfig,
    MergerKind,
    PoolConfig,
    ProjectorConfig,
    ResamplerConfig,
    ShuffleConfig,
)
from .qformer import InstructionConfig, QFormerConfig
from .queries import ContrastConfig, QueryConfig
from .vision import MOST_TILES, BlockConfig, GridConfig, Resize, TiledConfig, VisionConfig

__all__ = [
    "MOST_TILES", "NORM_GROUPS", "SLIDING", "Activation", "BiasConfig", "BlindRows", "BlockConfig", "ConnectorConfig",
    "ContrastConfig", "CrossAttentionConfig", "DecoderConfig", "DeltaConfig", "DrawingConfig", "EmbeddingConfig",
    "ExpertConfig", "GridConfig", "GridPoolConfig", "InstructionConfig", "LayerShape", "LayerType", "MLPType",
    "MergerConfig", "MergerKind", "NormConfig", "NormType", "PerLayerConfig", "PoolConfig", "Prescribed",
    "ProjectorConfig", "QFormerConfig", "QueryConfig", "QueryScale", "QueryScaleType", "ResamplerConfig", "Resize",
    "ScaleConfig", "ShuffleConfig", "TileMerge", "TiledConfig", "TwoWay", "VLMConfig", "VQConfig", "VisionConfig",
    "WindowConfig", "check_layers", "draft_layers", "flat", "grid", "unpad", "unpad_floor",
]  # fmt: skip

TileMerge = Literal["unpad", "unpad_floor", "grid", "flat"]


@dataclass(frozen=True, kw_only=True)
class Prescribed:
    """What config.json itself says, of a family whose other files do not say it: its own code did."""

    image_token: str
    chat_template: str
    """Jinja; whatever template the folder has, it is not the one that the model was trained with."""
    end_token: str | tuple[str, ...] | None
    """Ends an answer; any of several does; None: what the folder's files say does."""
    image_processor: Mapping[str, Any]
    """In the form of preprocessor_config.json."""
    files_first: bool = False
    """What the folder's own files say of images counts before `image_processor`."""
    cut_at_images: bool = False
    """`image_token` is in no vocabulary: the text is cut there, and each piece becomes tokens by itself."""
    stop: str | None = None
    """Text that ends an answer, too."""
    shown_tokens: tuple[str, ...] = ()
    """Tokens that an answer's text shows, though the tokenizer may call them special."""
    extra_tokens: tuple[str, ...] = ()
    """Of the prompt; where the tokenizer lacks them, they take the next free ids in this order."""


@dataclass(frozen=True, kw_only=True)
class VLMConfig:
    """The three parts, and the token that holds an image's place in the prompt."""

    family: str
    vision: VisionConfig
    projector: ProjectorConfig
    decoder: DecoderConfig
    image_token_id: int | None
    """None where `prescribed` names the token instead, and where there are no images."""
    image_grid_pinpoints: tuple[tuple[int, int], ...] | None
    """Heights and widths in pixels that an image's tiles may fill (`anyres`); None: all features are shown."""
    tile_merge: TileMerge | None = None
    """How the tiles' features follow the squashed image's: `unpad` as rows of one grid without the bars, a newline
    behind each; `unpad_floor` the same with what is shown rounded down, as the original LLaVA does; `grid` as rows of
    the whole grid; `flat` tile by tile."""
    most_tiles: int | None = None
    """Tiles whose features an image's grid may have: a grid a fifth larger is shrunk, and an image that is not alone is
    not cut (LLaVA-OneVision). None: whatever its tiles give (LLaVA-NeXT)."""
    prescribed: Prescribed | None = None
    image_place: str | None = None
    """What the chat template writes where an image stands; None: the image token."""
    text_alone: bool = False
    """There is no tower and no projector, and `vision` and `projector` mean nothing."""
    contrast: ContrastConfig | None = None
    draft_layers: int = 0
    """Decoder layers in the files after the last one, which draft tokens ahead and are not read (GLM-OCR)."""
    drawing: DrawingConfig | None = None
    """What draws pictures (Janus); None: the model answers alone."""

    def __post_init__(self) -> None:
        patches = (self.vision.image_size // self.vision.patch_size) ** 2
        if self.image_grid_pinpoints is not None and self.vision.num_features != patches:
            raise CheckpointError(
                f"config.json: tiles need a feature for each of their {patches} patches, and vision_config with "
                f"vision_feature_select_strategy gives {self.vision.num_features}"
            )
        if self.draft_layers != 0:
            check_sizes(self, "draft_layers")
        named = self.image_token_id is None and (self.prescribed is not None or self.text_alone)
        if not named and (not isinstance(self.image_token_id, int) or self.image_token_id < 0):
            raise CheckpointError(f"config.json: the image token must be a token id, not {self.image_token_id!r}")
        shuffle = self.projector.shuffle
        factor = 1 if shuffle is None else shuffle.factor
        if self.projector.input_size != self.vision.feature_size * factor**2:
            raise CheckpointError(
                f"config.json: the projector reads {self.projector.input_size} numbers, the vision tower gives "
                f"{self.vision.feature_size} in each of {factor**2} features"
            )
        merges, grid = self.projector.merger is not None, self.vision.grid is not None
        if (merges and not grid) or (grid and merges != (shuffle is not None)):
            raise CheckpointError("config.json: a merger needs a tower of patch grids, whose squares it alone can join")
        if self.projector.grid_pool is not None and not grid:
            raise CheckpointError("config.json: means of a grid's squares need a tower of patch grids")
        if (self.vision.tiled is None) != (self.decoder.cross_attention is None):
            raise CheckpointError("config.json: a tower of tiles and cross-attention are supported together only")
        if self.drawing is not None and self.drawing.hidden_size != self.decoder.hidden_size:
            raise CheckpointError(
                f"config.json: image tokens enter the decoder with {self.drawing.hidden_size} numbers, its hidden size "
                f"is {self.decoder.hidden_size}"
            )
        if self.contrast is not None:
            for size in (self.vision.feature_size, self.decoder.hidden_size):
                if size % self.contrast.pool_heads:
                    raise CheckpointError(
                        f"config.json: {size} numbers are no multiple of attn_pool_num_heads {self.contrast.pool_heads}"
                    )

    @property
    def takes_one_image(self) -> bool:
        """Whether prompts hold exactly one image, for which query tokens stand."""
        return self.decoder.queries is not None or self.projector.qformer is not None

    @property
    def tokens_of_row(self) -> int:
        """Embeddings of a row of pixels, of the tower's own size."""
        joined = self.projector.joined
        return self.vision.num_features // (1 if joined is None else joined.factor**2)

    @property
    def has_newline(self) -> bool:
        """Whether the checkpoint has an embedding that ends a row of an image's tiles."""
        return self.tile_merge in ("unpad", "unpad_floor")
