"""Config of the Q-Former, a projector whose query tokens look at the image (BLIP-2)."""

from dataclasses import dataclass

from mlx_vlm_mini.errors import CheckpointError

from .checks import Activation, check_multiple, check_positive, check_sizes

MOST_LAYERS = 1000  # far above every model's 12


@dataclass(frozen=True, kw_only=True)
class InstructionConfig:
    """The Q-Former reads the question, too, by a vocabulary of its own (InstructBLIP)."""

    vocab_size: int
    max_position_embeddings: int

    def __post_init__(self) -> None:
        check_sizes(self, "vocab_size", "max_position_embeddings")


@dataclass(frozen=True, kw_only=True)
class QFormerConfig:
    """A BERT over query tokens, which look at the image in every `cross_attention_frequency`-th layer."""

    num_query_tokens: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: Activation
    layer_norm_eps: float
    cross_attention_frequency: int
    instruction: InstructionConfig | None
    """None: the queries read no text (BLIP-2)."""

    def __post_init__(self) -> None:
        check_sizes(self, "num_query_tokens", "hidden_size", "num_hidden_layers", "num_attention_heads")
        check_sizes(self, "intermediate_size", "cross_attention_frequency")
        check_positive(self, "layer_norm_eps")
        check_multiple(self, "hidden_size", "num_attention_heads")
        if self.num_hidden_layers > MOST_LAYERS:
            raise CheckpointError(f"config.json: a Q-Former of {self.num_hidden_layers} layers is not supported")
