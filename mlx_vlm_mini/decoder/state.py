"""All that is kept of a sequence, or of the rows of a batch: the layers' caches, and what they all depend on.

A layer's cache is mlx-lm's, an `ImageCache`, or any object that says how far back it can go: `reach(length)`, the
largest length up to this one that it can go back to, and `rewind(length)`, which goes there. One that goes to few
lengths only has `snapshot()`, which makes the present one such a length.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_map

from .cross_attention import ImageCache, Span
from .masks import Rows
from .positions import Counting, Positions
from .reading import Visibility

MakeLayers = Callable[[], list[Any]]


@dataclass
class State:
    """What a decoder keeps of the tokens that it has read.

    Attributes:
        make: gives empty caches, one a layer.
        visible: which tokens see one another, where a cache decides that (a rotating one); None: as each reading says.
        layers: the caches.
        start: keys stored; of a batch those of its longest row.
        padding: int[B], stored keys before each row's first token; None: one sequence, or rows of equal length.
        prompt_length: tokens of the prompt that began the sequence; None: not known.
        positions: where its tokens stand.
        spans: of the images whose features layers of their own attend to.
    """

    make: MakeLayers
    visible: Visibility | None = None
    layers: list[Any] = field(default_factory=list)
    start: int = 0
    padding: mx.array | None = None
    prompt_length: int | None = None
    positions: Positions = field(default_factory=Counting)
    spans: tuple[Span, ...] = ()

    def __post_init__(self) -> None:
        if not self.layers:
            self.layers = self.make()

    @property
    def length(self) -> int | mx.array:
        """Tokens that are kept; of a batch of unequal rows int[B]."""
        return self.start if self.padding is None else self.start - self.padding

    def rows(self, length: int) -> Rows:
        """`length` further tokens."""
        return Rows(self.start, length, self.padding)

    def evaluate(self) -> None:
        """Compute what the caches hold."""
        mx.eval([entry.state for entry in self.layers if not entry.empty()])

    @property
    def nbytes(self) -> int:
        """Bytes of the caches."""
        return sum(entry.nbytes for entry in self.layers)

    def clear(self) -> None:
        """Forget everything."""
        self.layers, self.start, self.padding = self.make(), 0, None
        self.prompt_length, self.positions, self.spans = None, Counting(), ()

    def reach(self, length: int) -> int:
        """The length that `rewind` would reach."""
        length = min(length, self.start)
        while (reached := min(_reach(entry, length) for entry in self.layers)) < length:
            length = reached
        return length

    def rewind(self, length: int) -> int:
        """Go back to the first `length` tokens, or as near before them as every layer can.

        Returns:
            The length that is reached: 0 where a layer can go nowhere else.
        """
        length = self.reach(length)
        if not length:
            self.clear()
            return 0
        self.spans = tuple(span for span in self.spans if span.position < length)
        for entry in self.layers:
            if isinstance(entry, ImageCache):
                entry.cut(sum(span.held for span in self.spans))
            elif hasattr(entry, "rewind"):
                entry.rewind(length)
            elif entry.offset > length:
                entry.trim(entry.offset - length)
        self.start, self.positions = length, self.positions.within(length)
        return length

    @property
    def goes_back(self) -> bool:
        """Whether it can go back to a length that `snapshot` kept from any longer one: not where a cache gives tokens
        up."""
        return all(
            hasattr(entry, "reach") or isinstance(entry, ImageCache) or not hasattr(entry, "max_size")
            for entry in self.layers
        )

    @property
    def needs_snapshots(self) -> bool:
        """Whether a layer goes back only to lengths that it was told to keep."""
        return any(hasattr(entry, "snapshot") for entry in self.layers)

    def snapshot(self) -> None:
        """Keep the present length as one to go back to."""
        for entry in self.layers:
            if hasattr(entry, "snapshot"):
                entry.snapshot()

    def fork(self) -> "State":
        """A state of the same tokens that goes on by itself.

        Nothing is copied yet: the arrays have other handles to the same memory, and MLX writes into an array in place
        only where nobody else holds its memory. So what is written to first copies each array once.
        """
        twin = copy.copy(self)
        twin.layers = [_fork(entry) for entry in self.layers]
        return twin

    @classmethod
    def merge(cls, states: Sequence["State"]) -> "State":
        """A batch whose rows are these sequences, shorter ones padded at their beginnings.

        Raises:
            ValueError: they cannot be rows of a batch: a cache has no batched form, or layers attend to images.
        """
        first = states[0]
        if any(state.spans or state.visible is not None or state.padding is not None for state in states):
            raise ValueError("sequences with cross-attention or with a rotating cache cannot be rows of a batch")
        layers = []
        for entries in zip(*(state.layers for state in states), strict=True):
            if not all(hasattr(entry, "merge") for entry in entries):
                raise ValueError(f"a {type(entries[0]).__name__} cannot be part of a batch")
            layers.append(type(entries[0]).merge([*entries]))
        lengths = [state.start for state in states]
        longest = max(lengths)
        padding = None if len({*lengths}) == 1 else mx.array([longest - length for length in lengths])
        shifts = [state.positions.shift for state in states]
        shift = shifts[0] if len({*shifts}) == 1 else mx.array(shifts)
        return cls(first.make, layers=layers, start=longest, padding=padding, positions=Counting(shift))

    def extend(self, other: "State") -> None:
        """Append the rows of another batch (`merge` of one sequence makes one), padding the shorter ones."""
        own, more = self._rows_of(), other._rows_of()
        for entry, further in zip(self.layers, other.layers, strict=True):
            entry.extend(further)
        start = max(self.start, other.start)
        self.padding = mx.concatenate([own[0] + (start - self.start), more[0] + (start - other.start)])
        self.positions = Counting(mx.concatenate([own[1], more[1]]))
        self.start = start

    def _rows_of(self) -> tuple[mx.array, mx.array]:
        """Of each row of a batch its padding and the shift of its positions, int[B] each."""
        count = self.layers[0].offset.shape[0]
        padding = mx.zeros(count, dtype=mx.int32) if self.padding is None else self.padding
        shift = self.positions.shift
        return padding, shift if isinstance(shift, mx.array) else mx.full(count, shift, dtype=mx.int32)

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows of a batch, in this order; padding that all of them have goes."""
        chosen = mx.array([*rows])
        for entry in self.layers:
            entry.filter(chosen)
        shift = self.positions.shift
        if isinstance(shift, mx.array):
            self.positions = Counting(shift[chosen])
        if self.padding is not None:
            kept = self.padding[chosen]
            spare = cast(int, kept.min().item())
            self.start -= spare
            self.padding = kept - spare

    def extract(self, row: int) -> "State":
        """One row of a batch as a sequence of its own."""
        shift = self.positions.shift
        own = cast(int, shift[row].item()) if isinstance(shift, mx.array) else shift
        before = 0 if self.padding is None else cast(int, self.padding[row].item())
        layers = [entry.extract(row) for entry in self.layers]
        return State(self.make, layers=layers, start=self.start - before, positions=Counting(own))


def _reach(entry: Any, length: int) -> int:
    if hasattr(entry, "reach"):
        return int(entry.reach(length))
    if isinstance(entry, ImageCache) or entry.offset <= length or entry.is_trimmable():
        return length
    return 0


def _fork(entry: Any) -> Any:
    twin = copy.copy(entry)
    if not twin.empty() and hasattr(twin, "keys"):
        twin.keys, twin.values = tree_map(lambda array: array[...], (twin.keys, twin.values))
    return twin
