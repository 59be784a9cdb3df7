"""The configuration of the three parts. Field names are Hugging Face's where it has one.

Shape letters, used in every comment of this package:

    B batch    L tokens    P patches    H heads    D head size    C hidden size
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from .errors import CheckpointError

Activation = Literal["gelu", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu"]
VisionNorm = Literal["layer_norm", "rms_norm"]
LayerType = Literal["full_attention", "sliding_attention", "cross_attention"]
BlindRows = Literal["zero", "attend"]
TileMerge = Literal["unpad", "unpad_floor", "grid", "flat"]


MOST_TILES = 100  # of an image in one tower, far above every model's 4; the grids that are compared grow with it
_LARGEST = 10**8  # of any size in a config: far above every model, and products of two still fit 64 bits


def _check_sizes(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _LARGEST:
            raise CheckpointError(f"config.json: {name} must be a whole number from 1 to {_LARGEST}, not {value!r}")


def _check_positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise CheckpointError(f"config.json: {name} must be a positive number, not {value!r}")


def _check_flags(config: object, *names: str) -> None:
    for name in names:
        if not isinstance(getattr(config, name), bool):
            raise CheckpointError(f"config.json: {name} must be true or false, not {getattr(config, name)!r}")


def _check_multiple(config: object, name: str, divisor: str) -> None:
    if getattr(config, name) % getattr(config, divisor):
        raise CheckpointError(
            f"config.json: {name} {getattr(config, name)} is not a multiple of {divisor} {getattr(config, divisor)}"
        )


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """What differs in the blocks of vision towers; the defaults are CLIP's and SigLIP's."""

    norm_type: VisionNorm = "layer_norm"
    qkv_bias: bool = True
    o_bias: bool = True
    qk_norm_eps: float | None = None
    """Of an RMS norm over the queries of all heads, and one over the keys (InternViT-6B); None: there are none."""
    layer_scale: bool = False
    """Learned factors of what attention and MLP add to the stream (arXiv:2103.17239)."""

    def __post_init__(self) -> None:
        _check_flags(self, "qkv_bias", "o_bias", "layer_scale")
        if self.norm_type not in get_args(VisionNorm):
            raise CheckpointError(f"config.json: unknown norm_type {self.norm_type!r} of the vision tower")
        if self.qk_norm_eps is not None:
            _check_positive(self, "qk_norm_eps")


@dataclass(frozen=True, kw_only=True)
class TiledConfig:
    """An image as several tiles that see one another (Llama 3.2 Vision); see `tiled_vision.py`."""

    max_tiles: int
    num_global_layers: int
    """Gated blocks behind the norm of the last block."""

    def __post_init__(self) -> None:
        _check_sizes(self, "max_tiles", "num_global_layers")
        if self.max_tiles > MOST_TILES:
            raise CheckpointError(f"config.json: an image has at most {MOST_TILES} tiles, not {self.max_tiles}")


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """A pre-norm vision transformer on a square image.

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

    def __post_init__(self) -> None:
        _check_sizes(self, "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        _check_sizes(self, "image_size", "patch_size")
        _check_positive(self, "layer_norm_eps")
        _check_multiple(self, "hidden_size", "num_attention_heads")
        if self.patch_size > self.image_size:
            raise CheckpointError(f"config.json: patch_size {self.patch_size} exceeds image_size {self.image_size}")
        _check_flags(self, "class_token", "patch_bias", "pre_norm", "post_norm", "drop_first_feature")
        _check_flags(self, "resample_positions")
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


@dataclass(frozen=True, kw_only=True)
class ShuffleConfig:
    """Pixel shuffle: squares of `factor` x `factor` neighbouring features become one feature (InternVL)."""

    factor: int
    transposed: bool
    """The smaller grid comes column by column, as InternVL-Chat 1.1 and 1.2 were trained."""

    def __post_init__(self) -> None:
        _check_sizes(self, "factor")


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """Image features to decoder embeddings: `num_layers` linear layers with an activation between them.

    One layer is the linear projection of LLaVA (2023), two are the MLP of LLaVA-1.5, none leaves features as they are.
    Before them come a pixel shuffle and a norm where the config has them; `input_size` is what enters the first layer.
    """

    input_size: int
    hidden_size: int
    num_layers: int
    hidden_act: Activation
    bias: bool
    shuffle: ShuffleConfig | None = None
    norm_eps: float | None = None

    def __post_init__(self) -> None:
        _check_sizes(self, "input_size", "hidden_size", *(["num_layers"] if self.num_layers != 0 else []))
        _check_flags(self, "bias")
        if self.num_layers == 0 and self.input_size != self.hidden_size:
            raise CheckpointError(
                f"config.json: features of {self.input_size} numbers are no embeddings of {self.hidden_size}: "
                "a projector is needed"
            )


@dataclass(frozen=True, kw_only=True)
class NormConfig:
    """The decoder's RMS norms."""

    rms_norm_eps: float
    rms_norm_offset: float = 0.0
    """Added to the stored weight: Gemma's are around 0 and multiply by 1 + weight."""
    sandwich: bool = False
    """Norms behind attention and MLP too, before the residual (Gemma 2)."""
    qk_norm: bool = False
    """Norms of each head's queries and keys (Qwen3)."""

    def __post_init__(self) -> None:
        _check_positive(self, "rms_norm_eps")
        _check_flags(self, "sandwich", "qk_norm")


@dataclass(frozen=True, kw_only=True)
class ScaleConfig:
    """Fixed factors and caps that keep a decoder's numbers in range; a cap c turns x into c tanh(x / c)."""

    embed_scale: float = 1.0
    """Of the tokens' embeddings, not of image features."""
    query_pre_attn_scalar: float | None = None
    """Attention scores are divided by its root; None: by that of `head_dim`."""
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    fits_float16: bool = True
    """Whether no activation exceeds 65504, float16's largest number: Gemma's do."""

    def __post_init__(self) -> None:
        _check_flags(self, "fits_float16")
        optional = ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")
        _check_positive(self, "embed_scale", *(name for name in optional if getattr(self, name) is not None))


@dataclass(frozen=True, kw_only=True)
class BiasConfig:
    """Which of the decoder's linear layers have biases."""

    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        _check_flags(self, "qkv_bias", "o_bias", "mlp_bias")


@dataclass(frozen=True, kw_only=True)
class CrossAttentionConfig:
    """Layers of type `cross_attention`, which look at images and not at text (Llama 3.2 Vision)."""

    spare_embeddings: int
    """Rows of the token embedding behind the vocabulary's: of tokens that are read and never said, an image's say."""
    blind_rows: BlindRows = "zero"
    """Tokens before the first image: the layers leave them as they are; or, as transformers computes it, they look at
    all images and are spared the MLP alone."""

    def __post_init__(self) -> None:
        _check_sizes(self, "spare_embeddings")
        if self.blind_rows not in get_args(BlindRows):
            raise CheckpointError(f"config.json: unknown blind_rows {self.blind_rows!r}")


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A pre-norm decoder with grouped-query attention, rotary positions and a gated MLP."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    hidden_act: Activation
    norms: NormConfig
    scales: ScaleConfig
    max_position_embeddings: int
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None
    """In Hugging Face's form: `rope_type` and what that type needs; None for plain rotary positions."""
    biases: BiasConfig
    layer_types: tuple[LayerType, ...]
    sliding_window: int | None
    """Keys that a `sliding_attention` layer sees, the query's own among them."""
    tie_word_embeddings: bool
    prefix_lm: bool
    """The prompt's tokens see one another, later ones too; what follows it is causal."""
    cross_attention: CrossAttentionConfig | None = None
    """Image embeddings do not enter the sequence: layers of a type of their own read them. None: there are none."""

    def __post_init__(self) -> None:
        _check_sizes(self, "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        _check_sizes(self, "num_key_value_heads", "head_dim", "intermediate_size", "max_position_embeddings")
        _check_positive(self, "rope_theta")
        _check_flags(self, "tie_word_embeddings", "prefix_lm")
        _check_multiple(self, "num_attention_heads", "num_key_value_heads")
        if self.head_dim % 2:
            raise CheckpointError(f"config.json: rotary positions need an even head_dim, not {self.head_dim}")
        if len(self.layer_types) != self.num_hidden_layers:
            raise CheckpointError(
                f"config.json: layer_types has {len(self.layer_types)} entries for {self.num_hidden_layers} layers"
            )
        unknown = set(self.layer_types) - set(get_args(LayerType))
        if unknown:
            raise CheckpointError(f"config.json: unknown layer type {unknown.pop()!r}")
        if "sliding_attention" in self.layer_types:
            _check_sizes(self, "sliding_window")
        if ("cross_attention" in self.layer_types) != (self.cross_attention is not None):
            raise CheckpointError("config.json: cross-attention layers and their settings go together")
        if set(self.layer_types) == {"cross_attention"}:
            raise CheckpointError("config.json: a decoder needs a layer that reads text")
        if self.cross_attention is not None and self.tie_word_embeddings:
            raise CheckpointError("config.json: the head cannot be tied to an embedding with spare rows")

    @property
    def num_embeddings(self) -> int:
        """Rows of the token embedding."""
        return self.vocab_size + (0 if self.cross_attention is None else self.cross_attention.spare_embeddings)


@dataclass(frozen=True, kw_only=True)
class Prescribed:
    """What config.json itself says, of a family whose other files do not say it: its own code did."""

    image_token: str
    chat_template: str
    """Jinja; whatever template the folder has, it is not the one that the model was trained with."""
    end_token: str
    """Ends an answer."""
    image_processor: Mapping[str, Any]
    """In the form of preprocessor_config.json."""
    cut_at_images: bool = False
    """`image_token` is in no vocabulary: the text is cut there, and each piece becomes tokens by itself."""
    stop: str | None = None
    """Text that ends an answer, too."""
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
    """None where `prescribed` names the token instead."""
    image_grid_pinpoints: tuple[tuple[int, int], ...] | None
    """Heights and widths in pixels that an image's tiles may fill (`anyres`); None: all features are shown."""
    tile_merge: TileMerge | None = None
    """How the tiles' features follow the squashed image's: `unpad` as rows of one grid without the bars, a newline
    behind each; `unpad_floor` the same with what is shown rounded down, as the original LLaVA does; `grid` as rows of
    the whole grid; `flat` tile by tile."""
    prescribed: Prescribed | None = None

    def __post_init__(self) -> None:
        patches = (self.vision.image_size // self.vision.patch_size) ** 2
        if self.image_grid_pinpoints is not None and self.vision.num_features != patches:
            raise CheckpointError(
                f"config.json: tiles need a feature for each of their {patches} patches, and vision_config with "
                f"vision_feature_select_strategy gives {self.vision.num_features}"
            )
        named = self.image_token_id is None and self.prescribed is not None
        if not named and (not isinstance(self.image_token_id, int) or self.image_token_id < 0):
            raise CheckpointError(f"config.json: the image token must be a token id, not {self.image_token_id!r}")
        shuffle = self.projector.shuffle
        factor = 1 if shuffle is None else shuffle.factor
        if self.projector.input_size != self.vision.feature_size * factor**2:
            raise CheckpointError(
                f"config.json: the projector reads {self.projector.input_size} numbers, the vision tower gives "
                f"{self.vision.feature_size} in each of {factor**2} features"
            )
        if (self.vision.tiled is None) != (self.decoder.cross_attention is None):
            raise CheckpointError("config.json: a tower of tiles and cross-attention are supported together only")

    @property
    def has_newline(self) -> bool:
        """Whether the checkpoint has an embedding that ends a row of an image's tiles."""
        return self.tile_merge in ("unpad", "unpad_floor")
