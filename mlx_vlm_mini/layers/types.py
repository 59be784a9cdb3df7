"""What attention takes besides queries, keys and values."""

from typing import Literal, Protocol

import mlx.core as mx

Mask = mx.array | Literal["causal"] | None
"""bool[L, S] or bool[B, 1, L, S], true where a query may look; "causal" when the queries are the last L of the S
positions; None when every query sees every key."""


class Recorder(Protocol):
    """Takes attention weights, layer after layer: a list, or what keeps less of them."""

    def append(self, weights: mx.array, /) -> None:
        """float[B, H, L, S]; where these are more than `attention.BLOCK`, float[B, H, rows, S'] again and again until
        all L queries had their turn. S' below S leaves out keys that none of the rows sees."""
