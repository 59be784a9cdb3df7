"""Config of the vision tower."""

from dataclasses import dataclass
from typing import Literal, get_args

from mlx_vlm_mini.errors import CheckpointError

from .checks import Activation, NormType, check_flags, check_multiple, check_positive, check_sizes

Resize = Literal["corners", "linear", "antialiased", "floor", "cubic"]

MOST_TILES = 100  # of an image in one tower, far above every model's 4; the grids that are compared grow with it


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """What differs in the blocks of vision towers; the defaults are CLIP's and SigLIP's."""

    norm_type: NormType = "layer_norm"
    qkv_bias: bool = True
    o_bias: bool = True
    qk_norm_eps: float | None = None
    """Of an RMS norm over the queries of all heads, and one over the keys (InternViT-6B); None: there are none."""
    qk_norm_heads: bool = False
    """These norms are of each head by itself (GLM-OCR)."""
    layer_scale: bool = False
    """Learned factors of what attention and MLP add to the stream (arXiv:2103.17239)."""
    gated_mlp: bool = False
    """An MLP of three layers, as decoders have it (Qwen2.5-VL, Pixtral)."""
    mlp_bias: bool = True
    """Biases in a gated MLP (Qwen2.5-VL; Pixtral's has none)."""
    sandwich: bool = False
    """Norms after attention and MLP, too, of each head's queries, keys and values, and scores that are not scaled
    (Gemma 4); Pixtral's blocks have norms before them alone."""
    clipped: bool = False
    """Inputs and outputs of such a block's linear layers are kept within bounds of the file (Gemma 4 E2B; not 31B)."""

    def __post_init__(self) -> None:
        check_flags(
            self, "qkv_bias", "o_bias", "qk_norm_heads", "layer_scale", "gated_mlp", "mlp_bias", "sandwich", "clipped"
        )
        if self.norm_type not in get_args(NormType):
            raise CheckpointError(f"config.json: unknown norm_type {self.norm_type!r} of the vision tower")
        if self.qk_norm_eps is not None:
            check_positive(self, "qk_norm_eps")


@dataclass(frozen=True, kw_only=True)
class TiledConfig:
    """An image as several tiles that see one another (Llama 3.2 Vision); see `tiled_vision.py`."""

    max_tiles: int
    num_global_layers: int
    """Gated blocks behind the norm of the last block."""

    def __post_init__(self) -> None:
        check_sizes(self, "max_tiles", "num_global_layers")
        if self.max_tiles > MOST_TILES:
            raise CheckpointError(f"config.json: an image has at most {MOST_TILES} tiles, not {self.max_tiles}")


@dataclass(frozen=True, kw_only=True)
class GridConfig:
    """An image of any size as a grid of patches, with rotary positions down and across; see `grid_vision.py`."""

    frames: int | None = None
    """Of a video, that a patch spans; a picture is all of them (Qwen2-VL). None: there are pictures alone (Pixtral)."""
    window: int | None = None
    """Patches along a side of the windows that most blocks see (Qwen2.5-VL); None: all see the whole image."""
    full_blocks: tuple[int, ...] = ()
    """Blocks that see the whole image all the same."""
    position_side: int | None = None
    """Side of the square of learned positions (Qwen3-VL); None: there are none."""
    position_resize: Resize = "corners"
    """How these become an image's: linear from corner to corner (Qwen3-VL), linear (PaddleOCR-VL), antialiased where
    they are fewer (LFM2-VL), the last one at or before (MiniCPM-V 4.6), or cubic (GLM-4V)."""
    tokens_per_second: float | None = None
    """Places on the decoder's axis of time that a second of a video takes (Qwen2.5-VL); None: a step takes one."""
    merged_after: int | None = None
    """Blocks before squares of 2 x 2 neighbouring features become one (MiniCPM-V 4.6), whose positions are learned and
    not rotary; None: none do."""
    alternating: bool = False
    """Every other rotary frequency goes by the row, those between by the column (Pixtral); else the former by both."""
    linear_patches: bool = False
    """Patches are projected by what is stored as a linear layer (Gemma 4); else as a convolution (Qwen2-VL)."""
    places: int | None = None
    """Learned positions of columns, and as many of rows, which are added up (Gemma 4); Qwen3-VL has those of a square.
    None: there are none."""
    axial_theta: float | None = None
    """Base of rotary positions by which one half of each head turns by the column, the other by the row (Gemma 4).
    None: the base is 10,000, and both halves turn against one another (Qwen2-VL)."""

    def __post_init__(self) -> None:
        optional = ("frames", "window", "position_side", "merged_after", "places")
        check_sizes(self, *(name for name in optional if getattr(self, name) is not None))
        check_flags(self, "alternating", "linear_patches")
        if self.position_resize not in get_args(Resize):
            raise CheckpointError(f"config.json: unknown position_resize {self.position_resize!r}")
        positive = ("tokens_per_second", "axial_theta")
        check_positive(self, *(name for name in positive if getattr(self, name) is not None))


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """A pre-norm vision transformer on a square image, or on one of any size where it has a `grid`. With a grid there
    may be no layers: patches between norms are all then (Gemma 4 12B).

    `feature_layers` are the hidden states that the projector reads: 0 is what enters the first block, n what leaves
    block n. Several are concatenated along C. Blocks after the last one named are not built.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    image_size: int
    patch_size: int
    hidden_act: Activation
    layer_norm_eps: float
    blocks: BlockConfig
    class_token: bool
    """A learned token in front of the patches (CLIP)."""
    patch_bias: bool
    """A bias in the patch projection (SigLIP)."""
    pre_norm: bool
    """A norm between the embeddings and the first block (CLIP)."""
    post_norm: bool
    """A norm behind the last block, of what the projector reads from it."""
    feature_layers: tuple[int, ...]
    drop_first_feature: bool
    """LLaVA's feature strategy `default`: the first row, CLIP's class token, is left out."""
    resample_positions: bool
    """Images of another size get the position embeddings resampled (InternViT); otherwise they are refused."""
    tiled: TiledConfig | None = None
    """The image is tiles, `image_size` pixels along a side each; None: it is one square."""
    grid: GridConfig | None = None
    """The image has any size, its sides being multiples of `image_size`."""

    def __post_init__(self) -> None:
        layers = ["num_hidden_layers"] if self.num_hidden_layers != 0 or self.grid is None else []
        check_sizes(self, "hidden_size", *layers, "num_attention_heads", "intermediate_size")
        check_sizes(self, "image_size", "patch_size")
        check_positive(self, "layer_norm_eps")
        check_multiple(self, "hidden_size", "num_attention_heads")
        if self.patch_size > self.image_size:
            raise CheckpointError(f"config.json: patch_size {self.patch_size} exceeds image_size {self.image_size}")
        check_flags(self, "class_token", "patch_bias", "pre_norm", "post_norm", "drop_first_feature")
        check_flags(self, "resample_positions")
        if not self.feature_layers:
            raise CheckpointError("config.json: the list of vision feature layers is empty")
        for layer in self.feature_layers:
            if not isinstance(layer, int) or isinstance(layer, bool) or not 0 <= layer <= self.num_hidden_layers:
                raise CheckpointError(
                    f"config.json: vision feature layer {layer} does not exist; the tower has "
                    f"{self.num_hidden_layers} layers"
                )

        if self.tiled is not None and not (self.pre_norm and self.post_norm and self.depth == self.num_hidden_layers):
            raise CheckpointError("config.json: a tower of tiles needs all of its blocks, and both norms")
        if self.post_norm and self.depth < self.num_hidden_layers:
            raise CheckpointError("config.json: the norm behind the last vision block needs that block to be read")

    @property
    def feature_side(self) -> int:
        """Pixels along a side of what a feature shows."""
        merges = self.grid is not None and self.grid.merged_after is not None
        return self.patch_size * (2 if merges else 1)

    @property
    def depth(self) -> int:
        """Blocks that are built."""
        return max(self.feature_layers)

    @property
    def num_positions(self) -> int:
        """Rows of the position embedding: the patches, and the class token where there is one."""
        return (self.image_size // self.patch_size) ** 2 + self.class_token

    @property
    def num_features(self) -> int:
        """Feature rows that one image, or one tile of it, gives."""
        return self.features_at(self.image_size)

    def features_at(self, side: int) -> int:
        """The same for images of `side` pixels along a side."""
        return (side // self.patch_size) ** 2 + self.class_token - self.drop_first_feature

    @property
    def feature_size(self) -> int:
        """Width of a feature row."""
        return self.hidden_size * len(self.feature_layers)
