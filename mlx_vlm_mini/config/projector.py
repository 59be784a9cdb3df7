"""Config of the projector."""

from dataclasses import dataclass

from mlx_vlm_mini.errors import CheckpointError

from .checks import Activation, check_flags, check_sizes
from .qformer import QFormerConfig


@dataclass(frozen=True, kw_only=True)
class ShuffleConfig:
    """Pixel shuffle: squares of `factor` x `factor` neighbouring features become one feature (InternVL)."""

    factor: int
    transposed: bool
    """The smaller grid comes column by column, as InternVL-Chat 1.1 and 1.2 were trained."""

    def __post_init__(self) -> None:
        check_sizes(self, "factor")


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
    qformer: QFormerConfig | None = None

    def __post_init__(self) -> None:
        check_sizes(self, "input_size", "hidden_size", *(["num_layers"] if self.num_layers != 0 else []))
        check_flags(self, "bias")
        if self.num_layers == 0 and self.input_size != self.hidden_size:
            raise CheckpointError(
                f"config.json: features of {self.input_size} numbers are no embeddings of {self.hidden_size}: "
                "a projector is needed"
            )
