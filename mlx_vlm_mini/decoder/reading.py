"""What a decoder reads at once (`Reading`), and what is prepared of it for all layers (`Pass`)."""

from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import mlx.core as mx

from mlx_vlm_mini.layers.types import Mask, Recorder

from .cross_attention import Span
from .masks import Causal, Rows
from .positions import Positions


class Visibility(Protocol):
    """Which tokens see one another."""

    def mask(self, window: int | None, rows: Rows) -> Mask:
        """Of some tokens on all so far; `window`: keys that a token sees, its own among them; None: all before it."""

    def cut(self, start: int, step: int, end: int) -> int:
        """Where a piece of a prompt of about `step` tokens ends that begins at `start`; `end` is the prompt's."""


@dataclass(frozen=True)
class Memory:
    """Image features that layers of their own attend to (Llama 3.2 Vision, QLLaMA).

    Attributes:
        features: float[S, C], of the images one after another.
        spans: which of them belong to which image.
        looks: where given, takes the weights of query tokens float[B, H, Q, S] (QLLaMA).
    """

    features: mx.array
    spans: tuple[Span, ...] = ()
    looks: Recorder | None = None


@dataclass(frozen=True)
class Reading:
    """Tokens that a decoder reads at once.

    Attributes:
        embeddings: float[B, L, C].
        visible: which of them see one another; causal by default.
        positions: where tokens stand; None: as the state knows it, counting on.
        memory: of the images that are new.
        beside: float[B, L, C] a layer, added to what the first layers give (DeepStack, arXiv:2406.04334).
        token_ids: int[B, L], by which layers have embeddings of their own, the padding's id where images stand (Gemma 4
            E2B); None: they have none.
        prompt_length: tokens of the prompt that begins the sequence, which some rotary scalings go by. None: as the
            state knows it; without one all of these tokens.
    """

    embeddings: mx.array
    visible: Visibility = field(default_factory=Causal)
    positions: Positions | None = None
    memory: Memory | None = None
    beside: tuple[mx.array, ...] = ()
    token_ids: mx.array | None = None
    prompt_length: int | None = None

    @property
    def length(self) -> int:
        """L."""
        return self.embeddings.shape[1]

    def part(self, start: int, end: int) -> "Reading":
        """Some of these tokens; the first part has the memory."""
        return replace(
            self,
            embeddings=self.embeddings[:, start:end],
            memory=None if start else self.memory,
            beside=tuple(each[:, start:end] for each in self.beside),
            token_ids=None if self.token_ids is None else self.token_ids[:, start:end],
        )


@dataclass
class Pass:
    """One run of a decoder's layers over some tokens: what layers of a kind share is made once.

    Attributes:
        reading: the tokens.
        rows: how many they are, and what is stored before them.
        first: position of the first token (`Positions.at`).
        visible: which tokens see one another: the reading's, or what the cache allows.
        spans: of all images that layers of their own attend to, the new ones last.
        masks: by kind of layer, what its attention may look at.
        ropes: by kind of layer, what rotates its queries and keys.
        sharpness: float[L, 1], of rows float[B, 1, L, 1], that queries are multiplied by; None: nothing.
        beside: of each layer, the first ones or all, what it is given besides the stream; see `StreamLayer.join`.
        shared: by kind of layer, the keys and values of its last one so far, where other layers attend to them.
        attentions: takes each layer's weights.
    """

    reading: Reading
    rows: Rows
    first: Any
    visible: Visibility
    spans: tuple[Span, ...] = ()
    masks: dict[str, Any] = field(default_factory=dict)
    ropes: dict[str, Any] = field(default_factory=dict)
    sharpness: mx.array | None = None
    beside: tuple[mx.array, ...] = ()
    shared: dict[str, tuple[mx.array, mx.array]] = field(default_factory=dict)
    attentions: Recorder | None = None
