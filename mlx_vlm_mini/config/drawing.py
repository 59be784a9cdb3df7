"""Config of what draws: image tokens from the decoder's hidden states, and pixels from image tokens (Janus)."""

from dataclasses import dataclass

from mlx_vlm_mini.errors import CheckpointError

from .checks import Activation, check_sizes

NORM_GROUPS = 32  # of the VQ decoder's group norms, in every checkpoint


@dataclass(frozen=True, kw_only=True)
class VQConfig:
    """A VQ decoder: a grid of codes to pixels, each level twice as wide and high as the one before.

    Attributes:
        num_embeddings: entries of the codebook.
        embed_dim: numbers of an entry.
        latent_channels: what an entry becomes before the first convolution.
        base_channels: multiplied by each level's number in `channel_multiplier`, whose last level is the coarsest.
        num_res_blocks: of a level, one fewer than are built.
        out_channels: of the pixels.
    """

    num_embeddings: int
    embed_dim: int
    latent_channels: int
    base_channels: int
    channel_multiplier: tuple[int, ...]
    num_res_blocks: int
    out_channels: int = 3

    def __post_init__(self) -> None:
        blocks = () if self.num_res_blocks == 0 else ("num_res_blocks",)
        check_sizes(self, "num_embeddings", "embed_dim", "latent_channels", "base_channels", "out_channels", *blocks)
        if not self.channel_multiplier or not all(type(each) is int and each > 0 for each in self.channel_multiplier):
            raise CheckpointError(
                f"config.json: channel_multiplier must be whole numbers above 0, not {[*self.channel_multiplier]}"
            )
        if len(self.channel_multiplier) > 8:
            raise CheckpointError(
                f"config.json: channel_multiplier has {len(self.channel_multiplier)} levels, 8 are most"
            )
        if self.out_channels != 3:
            raise CheckpointError(f"config.json: pictures have 3 channels, not out_channels {self.out_channels}")
        uneven = [width for width in self.widths if width % NORM_GROUPS]
        if uneven:
            raise CheckpointError(
                f"config.json: {uneven[0]} channels of the VQ decoder are no multiple of {NORM_GROUPS}, the groups of "
                "its norms"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, the coarsest first."""
        return tuple(self.base_channels * each for each in self.channel_multiplier[::-1])


@dataclass(frozen=True, kw_only=True)
class DrawingConfig:
    """What draws.

    Attributes:
        grid: image tokens along a side of a picture.
        hidden_size: of the decoder, and of what enters it for an image token.
        num_layers: of the MLP between an image token's embedding and the decoder.
    """

    vq: VQConfig
    grid: int
    hidden_size: int
    num_layers: int
    hidden_act: Activation

    def __post_init__(self) -> None:
        check_sizes(self, "grid", "hidden_size", "num_layers")
        if self.side > 4096:
            raise CheckpointError(f"config.json: drawn pictures have at most 4096 pixels a side, not {self.side}")

    @property
    def tokens(self) -> int:
        """Image tokens of a picture."""
        return self.grid**2

    @property
    def side(self) -> int:
        """Pixels along a side of a picture."""
        return self.grid * 2 ** (len(self.vq.channel_multiplier) - 1)
