"""Config of query tokens, and of what compares images with texts (QLLaMA)."""

from dataclasses import dataclass

from .checks import check_sizes


@dataclass(frozen=True, kw_only=True)
class QueryConfig:
    """Learned tokens in front of the text that stand for an image.

    They see one another, and in layers of type `query_attention` the image's features; what follows is causal.
    """

    num_query_tokens: int
    vision_hidden_size: int

    def __post_init__(self) -> None:
        check_sizes(self, "num_query_tokens", "vision_hidden_size")


@dataclass(frozen=True, kw_only=True)
class ContrastConfig:
    """Vectors of images and texts, whose cosine says how well they fit; see `contrast.py`."""

    embed_dim: int
    """Length of the vectors."""
    pool_heads: int

    def __post_init__(self) -> None:
        check_sizes(self, "embed_dim", "pool_heads")
