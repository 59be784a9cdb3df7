"""Config of the decoder."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from mlx_vlm_mini.errors import CheckpointError

from .checks import Activation, NormType, check_flags, check_multiple, check_positive, check_sizes
from .queries import QueryConfig

LayerType = Literal[
    "full_attention", "sliding_attention", "shared_full_attention", "shared_sliding_attention", "cross_attention",
    "query_attention", "linear_attention",
]  # fmt: skip
SLIDING: tuple[LayerType, ...] = ("sliding_attention", "shared_sliding_attention")
BlindRows = Literal["zero", "attend"]
TwoWay = Literal["nothing", "prompt", "images", "images_in_window", "images_whole"]
MLPType = Literal["gated", "plain", "moe", "gated_and_moe"]
QueryScaleType = Literal["log", "log_steps"]


@dataclass(frozen=True, kw_only=True)
class NormConfig:
    """The decoder's norms."""

    rms_norm_eps: float
    norm_type: NormType = "rms_norm"
    """RMS norms, or layer norms (OPT), whose eps is the same field."""
    rms_norm_offset: float = 0.0
    """Added to the stored weight: Gemma's are around 0 and multiply by 1 + weight."""
    sandwich: bool = False
    """Norms behind attention and MLP too, before the residual (Gemma 2)."""
    qk_norm: bool = False
    """Norms of each head's queries and keys (Qwen3)."""
    v_norm: bool = False
    """Norms of each head's values, without weights (Gemma 4; not Qwen3)."""

    def __post_init__(self) -> None:
        check_positive(self, "rms_norm_eps")
        check_flags(self, "sandwich", "qk_norm", "v_norm")
        if self.norm_type not in get_args(NormType):
            raise CheckpointError(f"config.json: unknown norm_type {self.norm_type!r} of the decoder")


@dataclass(frozen=True, kw_only=True)
class QueryScale:
    """What queries are multiplied by, which grows with the tokens before them (`decoder/sharpness.py`)."""

    kind: QueryScaleType
    length: int
    """Tokens so many from the first are not yet scaled."""
    beta: float = 1.0
    """Growth for each step of the logarithm (`log_steps`)."""

    def __post_init__(self) -> None:
        check_sizes(self, "length")
        check_positive(self, "beta")
        if self.kind == "log" and self.length == 1:
            raise CheckpointError("config.json: queries cannot grow by a logarithm to the base 1")
        if self.kind not in get_args(QueryScaleType):
            raise CheckpointError(f"config.json: unknown query_scale {self.kind!r}")


@dataclass(frozen=True, kw_only=True)
class ScaleConfig:
    """Fixed factors and caps that keep a decoder's numbers in range; a cap c turns x into c tanh(x / c)."""

    embed_scale: float = 1.0
    """Of the tokens' embeddings, not of image features."""
    image_scale: float = 1.0
    """Of image features (Granite-Docling)."""
    residual_scale: float = 1.0
    """Of what attention and feed-forward add to the stream (Granite)."""
    logits_scaling: float = 1.0
    """Logits are divided by it (Granite)."""
    query_pre_attn_scalar: float | None = None
    """Attention scores are divided by its root; None: by that of `head_dim`."""
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    query_scale: QueryScale | None = None
    """Of tokens far from the first; None: no query is scaled by its place."""
    fits_float16: bool = True
    """Whether no activation exceeds 65504, float16's largest number: Gemma's do."""
    layer_scalars: bool = False
    """What leaves a layer, the stream that entered it included, is multiplied by a number of the file (Gemma 4; not
    Gemma 3)."""

    def __post_init__(self) -> None:
        check_flags(self, "fits_float16", "layer_scalars")
        optional = ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")
        check_positive(self, "embed_scale", "image_scale", "residual_scale", "logits_scaling")
        check_positive(self, *(name for name in optional if getattr(self, name) is not None))


@dataclass(frozen=True, kw_only=True)
class BiasConfig:
    """Which of the decoder's linear layers have biases."""

    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        check_flags(self, "qkv_bias", "o_bias", "mlp_bias")


@dataclass(frozen=True, kw_only=True)
class CrossAttentionConfig:
    """Layers of type `cross_attention`, which look at images and not at text (Llama 3.2 Vision)."""

    spare_embeddings: int
    """Rows of the token embedding behind the vocabulary's: of tokens that are read and never said, an image's say."""
    blind_rows: BlindRows = "zero"
    """Tokens before the first image: the layers leave them as they are; or, as transformers computes it, they look at
    all images and are spared the MLP alone."""

    def __post_init__(self) -> None:
        check_sizes(self, "spare_embeddings")
        if self.blind_rows not in get_args(BlindRows):
            raise CheckpointError(f"config.json: unknown blind_rows {self.blind_rows!r}")


@dataclass(frozen=True, kw_only=True)
class WindowConfig:
    """Of the layers of the types `SLIDING`."""

    sliding_window: int
    """Keys that such a layer sees, the query's own among them."""
    sliding_rope_theta: float | None = None
    """Base of their own, unscaled rotary positions (Gemma 3); None: all layers have the same."""

    def __post_init__(self) -> None:
        check_sizes(self, "sliding_window")
        check_positive(self, *(["sliding_rope_theta"] if self.sliding_rope_theta is not None else []))


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """A kind of layer: its attention, and its feed-forward where that has a width of its own."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dims: int
    """Numbers of a head that rotary positions rotate, its first ones."""
    neighbours: bool = False
    """They rotate each even number against the next (GLM-4); else one half against the other."""
    gated: bool = False
    """Each head's output is multiplied by a gate that q_proj gives besides the query (Qwen3-Next)."""
    keys_as_values: bool = False
    """Values are what k_proj gives, before the keys' norm and without rotation (Gemma 4 12B, 26B and 31B; not E2B)."""
    shared_with: LayerType | None = None
    """Keys and values are those of the last layer of this kind (Gemma 4 E2B); None: the layers have their own (31B)."""
    mlp_width: int | None = None
    """Of the gated or plain feed-forward (Gemma 4 E2B's layers with others' keys); None: `intermediate_size` (E4B)."""

    def __post_init__(self) -> None:
        widths = ["mlp_width"] if self.mlp_width is not None else []
        check_sizes(self, "num_heads", "num_kv_heads", "head_dim", "rotary_dims", *widths)
        check_multiple(self, "num_heads", "num_kv_heads")
        check_flags(self, "neighbours", "gated", "keys_as_values")
        if self.rotary_dims % 2 or self.rotary_dims > self.head_dim:
            raise CheckpointError(
                f"config.json: rotary positions need an even number of a head's {self.head_dim} numbers, not "
                f"{self.rotary_dims}"
            )


@dataclass(frozen=True, kw_only=True)
class DeltaConfig:
    """Of the layers of type `linear_attention`: a gated delta net (Qwen3-Next, Qwen3.5)."""

    num_key_heads: int
    num_value_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_kernel: int
    """Tokens that the causal convolution before the recurrence sees, a token's own among them."""

    def __post_init__(self) -> None:
        check_sizes(self, "num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel")
        check_multiple(self, "num_value_heads", "num_key_heads")
        if self.conv_kernel < 2:
            raise CheckpointError("config.json: the convolution of linear attention needs 2 tokens or more, not 1")

    @property
    def key_size(self) -> int:
        """Numbers of all heads' keys of a token, as of its queries."""
        return self.num_key_heads * self.key_head_dim

    @property
    def value_size(self) -> int:
        """Numbers of all heads' values of a token."""
        return self.num_value_heads * self.value_head_dim

    @property
    def mixed_size(self) -> int:
        """Channels of the convolution: queries, keys and values."""
        return 2 * self.key_size + self.value_size


@dataclass(frozen=True, kw_only=True)
class ExpertConfig:
    """Of feed-forwards of type `moe`: a router chooses a few of many for each token."""

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool = True
    """The chosen ones' shares add up to 1: softmax after the choice. Else they are those among all experts."""
    shared_expert_intermediate_size: int | None = None
    """Of one that every token has besides, times the sigmoid of a gate of its own; None: there is none."""

    def __post_init__(self) -> None:
        shared = ["shared_expert_intermediate_size"] if self.shared_expert_intermediate_size is not None else []
        check_sizes(self, "num_experts", "num_experts_per_tok", "moe_intermediate_size", *shared)
        check_flags(self, "norm_topk_prob")
        if self.num_experts_per_tok > self.num_experts:
            raise CheckpointError(
                f"config.json: a token cannot have {self.num_experts_per_tok} of {self.num_experts} experts"
            )


@dataclass(frozen=True, kw_only=True)
class PerLayerConfig:
    """Embeddings of each token for each layer (Gemma 4 E2B), besides those that enter the first one."""

    size: int
    vocab_size: int
    """Rows of the table."""
    pad_token_id: int
    """Whose row stands for an image's tokens."""

    def __post_init__(self) -> None:
        check_sizes(self, "size", "vocab_size")
        if type(self.pad_token_id) is not int or not 0 <= self.pad_token_id < self.vocab_size:
            raise CheckpointError(f"config.json: pad_token_id must be a token id, not {self.pad_token_id!r}")


@dataclass(frozen=True, kw_only=True)
class EmbeddingConfig:
    """What of a token is looked up in a table besides what enters the first layer."""

    learned_positions: int | None = None
    """Rows of a learned position embedding before the first token's (OPT); None: positions are rotary."""
    per_layer: PerLayerConfig | None = None
    """Each layer reads an embedding of its own of each token (Gemma 4 E2B). None: it does not (31B)."""


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
    window: WindowConfig | None
    tie_word_embeddings: bool
    two_way: TwoWay
    """What sees later tokens of its kind, too, all else being causal: the tokens of the prompt (PaliGemma), or of an
    image those of the same one. These in all layers, but nothing before a sliding layer's window (Gemma 3); so, but in
    sliding layers alone (`images_in_window`, Gemma 4 26B and 31B); or in all layers and whatever the window
    (`images_whole`, Gemma 4 12B)."""
    cross_attention: CrossAttentionConfig | None = None
    """Image embeddings do not enter the sequence: layers of a type of their own read them. None: there are none."""
    queries: QueryConfig | None = None
    """Query tokens stand for an image, and layers of another type let them look at it. None: there are none."""
    delta: DeltaConfig | None = None
    """Some layers keep a state in place of keys and values. None: there are none."""
    shapes: Mapping[LayerType, LayerShape] = field(default_factory=dict)
    """Kinds of layers whose shape is not the one that the fields above say."""
    mlp_type: MLPType = "gated"
    """`moe`: a router chooses a few of many experts (Qwen3.5-MoE); `gated_and_moe`: so it does, and what they give is
    added to what a gated MLP gives of the same token (Gemma 4 26B-A4B)."""
    experts: ExpertConfig | None = None
    """Of feed-forwards that have them; with type `moe`, `intermediate_size` is that of an expert. None: none has."""
    embeddings: EmbeddingConfig = EmbeddingConfig()

    def __post_init__(self) -> None:
        check_sizes(self, "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        check_sizes(self, "num_key_value_heads", "head_dim", "intermediate_size", "max_position_embeddings")
        check_positive(self, "rope_theta")
        check_flags(self, "tie_word_embeddings")
        if self.two_way not in get_args(TwoWay):
            raise CheckpointError(f"config.json: unknown two_way {self.two_way!r}")
        check_multiple(self, "num_attention_heads", "num_key_value_heads")
        if self.head_dim % 2:
            raise CheckpointError(f"config.json: rotary positions need an even head_dim, not {self.head_dim}")
        if self.mlp_type not in get_args(MLPType):
            raise CheckpointError(f"config.json: unknown mlp_type {self.mlp_type!r}")
        if (self.mlp_type in ("moe", "gated_and_moe")) != (self.experts is not None):
            raise CheckpointError("config.json: feed-forwards of experts and their settings go together")
        if len(self.layer_types) != self.num_hidden_layers:
            raise CheckpointError(
                f"config.json: layer_types has {len(self.layer_types)} entries for {self.num_hidden_layers} layers"
            )
        unknown = set(self.layer_types) - set(get_args(LayerType))
        if unknown:
            raise CheckpointError(f"config.json: unknown layer type {unknown.pop()!r}")
        for kind in set(self.layer_types):
            self.shape(kind)
        if set(SLIDING) & set(self.layer_types) and self.window is None:
            raise CheckpointError("config.json: sliding layers need a sliding_window")
        self._check_shared()
        per_layer = self.embeddings.per_layer
        if per_layer is not None and per_layer.vocab_size < self.vocab_size:
            raise CheckpointError(
                f"config.json: vocab_size_per_layer_input {per_layer.vocab_size} is below vocab_size {self.vocab_size}"
            )
        if ("cross_attention" in self.layer_types) != (self.cross_attention is not None):
            raise CheckpointError("config.json: cross-attention layers and their settings go together")
        if ("query_attention" in self.layer_types) != (self.queries is not None):
            raise CheckpointError("config.json: query tokens and layers that let them look at an image go together")
        if ("linear_attention" in self.layer_types) != (self.delta is not None):
            raise CheckpointError("config.json: linear attention layers and their settings go together")
        if set(self.layer_types) == {"linear_attention"}:
            raise CheckpointError("config.json: a decoder needs a layer that attends to tokens")
        if set(self.layer_types) == {"cross_attention"}:
            raise CheckpointError("config.json: a decoder needs a layer that reads text")
        if self.cross_attention is not None and self.tie_word_embeddings:
            raise CheckpointError("config.json: the head cannot be tied to an embedding with spare rows")

    def shape(self, kind: LayerType) -> LayerShape:
        """The sizes of a kind of layer."""
        if kind in self.shapes:
            return self.shapes[kind]
        factor = (self.rope_scaling or {}).get("partial_rotary_factor") or 1.0
        if not isinstance(factor, int | float) or not 0 < factor <= 1:
            raise CheckpointError(f"config.json: partial_rotary_factor must be above 0 and at most 1, not {factor!r}")
        return LayerShape(
            num_heads=self.num_attention_heads,
            num_kv_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            rotary_dims=int(self.head_dim * factor),
        )

    def active_share(self, name: str) -> float:
        """Which part of one of our tensors a token reads: of stacked experts those that it takes, of what each layer
        adds to a token one row, of others all."""
        if self.embeddings.per_layer is not None and "per_layer.embed." in name:
            return 1 / self.embeddings.per_layer.vocab_size
        if self.experts is None or ".switch_mlp." not in name:
            return 1.0
        return self.experts.num_experts_per_tok / self.experts.num_experts

    def _check_shared(self) -> None:
        """Raises CheckpointError where a layer would share keys of one that does not come before it."""
        seen: set[LayerType] = set()
        for kind in self.layer_types:
            source = self.shape(kind).shared_with
            if kind.startswith("shared_") != (source is not None) or (source is not None and source not in seen):
                raise CheckpointError(f"config.json: layers of type {kind} share keys and values of none before them")
            seen.add(kind)

    def window_of(self, kind: LayerType) -> int | None:
        """Keys that a layer of a kind sees, a query's own among them; None: all before it."""
        return self.sliding_window if kind in SLIDING else None

    def mlp_width(self, kind: LayerType) -> int:
        """The width of a kind of layer's gated or plain feed-forward."""
        return self.shape(kind).mlp_width or self.intermediate_size

    @property
    def has_sections(self) -> bool:
        """Whether a token has three positions, so that it matters where pictures stand (Qwen2-VL)."""
        return (self.rope_scaling or {}).get("mrope_section") is not None

    @property
    def sliding_window(self) -> int | None:
        """Keys that a `sliding_attention` layer sees, where there are such layers."""
        return None if self.window is None else self.window.sliding_window

    @property
    def prefix_lm(self) -> bool:
        """Whether the whole prompt sees itself."""
        return self.two_way == "prompt"

    @property
    def num_embeddings(self) -> int:
        """Rows of the token embedding."""
        return self.vocab_size + (0 if self.cross_attention is None else self.cross_attention.spare_embeddings)
