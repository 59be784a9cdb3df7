"""All that is kept of a sequence, or of the rows of a batch: the layers' caches, and what they all depend on.

A layer's cache is mlx-lm's, an `ImageCache`, or any object that says how far back it can go: `reach(length)`, the
largest length up to this one that it can go back to, and `rewind(length)`, which goes there. One that goes to few
lengths only has `snapshot()`, which makes the present one such a length, `snapshots`, the shortest first, and
`forget()`, which gives up the first of them.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from .cross_attention import ImageCache, Span
from .masks import Rows
from .positions import Counting, Positions
from .reading import Visibility

SNAPSHOTS = 8  # of a sequence
SURE = 2  # of them that are kept whatever they take: the last prompt's and answer's end
SNAPSHOT_BYTES = 2**29  # of all layers' snapshots, beyond those that are sure

MakeLayers = Callable[[], list[Any]]


@dataclass(frozen=True)
class Aside:
    """What of a sequence the rows of a batch lack, and further tokens leave as it is.

    Attributes:
        positions, spans: as of `State`.
        layers: the caches of images, and what others can go back to, by the layer's number.
    """

    positions: Positions
    spans: tuple[Span, ...]
    layers: dict[int, Any]


class NoCache:
    """Of a layer that keeps nothing, as it attends to what another one keeps."""

    nbytes = 0
    state: tuple[mx.array, ...] = ()

    def empty(self) -> bool:
        """Always."""
        return True

    def reach(self, length: int) -> int:
        """Any length."""
        return length

    def rewind(self, length: int) -> None:
        """There is nothing to go back in."""

    @classmethod
    def merge(cls, caches: Sequence["NoCache"]) -> "NoCache":
        """The same for the rows of a batch."""
        return cls()

    def extend(self, other: "NoCache") -> None:
        """See `State.extend`."""

    def filter(self, rows: mx.array) -> None:
        """See `State.keep`."""

    def extract(self, row: int) -> "NoCache":
        """See `State.extract`."""
        return self


@dataclass
class State:
    """What a decoder keeps of the tokens that it has read.

    Attributes:
        make: gives empty caches, one a layer.
        visible: which tokens see one another, where a cache decides that (a rotating one); None: as each reading says.
        layers: the caches.
        start: keys stored; of a batch those of its longest row.
        padding: int[B] (numpy), stored keys before each row's first token; None: one sequence, or rows of equal length.
        prompt_length: tokens of the prompt that began the sequence, of a batch one number a row; None: not known.
        positions: where its tokens stand.
        spans: of the images whose features layers of their own attend to.
    """

    make: MakeLayers
    visible: Visibility | None = None
    layers: list[Any] = field(default_factory=list)
    start: int = 0
    padding: np.ndarray | None = None
    prompt_length: int | tuple[int, ...] | None = None
    positions: Positions = field(default_factory=Counting)
    spans: tuple[Span, ...] = ()

    def __post_init__(self) -> None:
        if not self.layers:
            self.layers = self.make()

    @property
    def length(self) -> int | mx.array:
        """Tokens that are kept; of a batch of unequal rows int[B]."""
        return self.start if self.padding is None else mx.array(self.start - self.padding)

    @property
    def lengths(self) -> int | tuple[int, ...]:
        """The same, known without the device."""
        return self.start if self.padding is None else tuple((self.start - self.padding).tolist())

    def rows(self, length: int) -> Rows:
        """`length` further tokens."""
        return Rows(self.start, length, None if self.padding is None else mx.array(self.padding))

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
        """Keep the present length as one to go back to, and give up the oldest ones where there are too many."""
        entries = [entry for entry in self.layers if hasattr(entry, "snapshot")]
        for entry in entries:
            entry.snapshot()
        while entries and self._has_too_many(entries):
            for entry in entries:
                entry.forget()

    @staticmethod
    def _has_too_many(entries: Sequence[Any]) -> bool:
        count = len(entries[0].snapshots)
        nbytes = sum(each.memory.nbytes for entry in entries for each in entry.snapshots)
        return count > SNAPSHOTS or (count > SURE and nbytes > SNAPSHOT_BYTES)

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
            ValueError: they cannot be rows of a batch: a cache has no batched form.
        """
        first = states[0]
        if any(state.visible is not None or state.is_batch for state in states):
            raise ValueError("sequences with a rotating cache cannot be rows of a batch")
        layers = []
        for entries in zip(*(state.layers for state in states), strict=True):
            if not all(hasattr(entry, "merge") for entry in entries):
                raise ValueError(f"a {type(entries[0]).__name__} cannot be part of a batch")
            images = isinstance(entries[0], ImageCache)
            seen = [(entry, state.spans, state.start) for entry, state in zip(entries, states, strict=True)]
            layers.append(type(entries[0]).merge(seen if images else [*entries]))
        lengths = np.array([state.start for state in states])
        batch = cls(first.make, layers=layers, start=int(lengths.max()))
        batch._set_rows(
            batch.start - lengths,
            [cast(int, state.prompt_length or state.start) for state in states],
            [cast(int, state.positions.shift) for state in states],
        )
        return batch

    @property
    def is_batch(self) -> bool:
        """Whether it has rows."""
        return isinstance(self.prompt_length, tuple)

    def _rows(self) -> tuple[np.ndarray, list[int], list[int]]:
        """Of each row of a batch its padding, the length of its prompt, and the shift of its positions."""
        assert isinstance(self.prompt_length, tuple)
        count, shift = len(self.prompt_length), self.positions.shift
        padding = np.zeros(count, dtype=np.int64) if self.padding is None else self.padding
        return padding, [*self.prompt_length], [*shift] if isinstance(shift, tuple) else [shift] * count

    def _set_rows(self, padding: np.ndarray, prompts: Sequence[int], shifts: Sequence[int]) -> None:
        self.padding = padding if padding.any() else None
        self.prompt_length = tuple(prompts)
        self.positions = Counting(shifts[0] if len({*shifts}) == 1 else tuple(shifts))

    def extend(self, other: "State") -> None:
        """Append the rows of another batch (`merge` of one sequence makes one), padding the shorter ones."""
        for entry, further in zip(self.layers, other.layers, strict=True):
            entry.extend(further)
        start = max(self.start, other.start)
        (padding, prompts, shifts), (further, more_prompts, more_shifts) = self._rows(), other._rows()
        padding = np.concatenate([padding + (start - self.start), further + (start - other.start)])
        self.start = start
        self._set_rows(padding, prompts + more_prompts, shifts + more_shifts)

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows of a batch, in this order; padding that all of them have goes."""
        chosen = mx.array([*rows])
        for entry in self.layers:
            entry.filter(chosen)
        padding, prompts, shifts = self._rows()
        padding = padding[[*rows]]
        spare = int(padding.min())
        self.start -= spare
        self._set_rows(padding - spare, [prompts[row] for row in rows], [shifts[row] for row in rows])

    @property
    def can_be_row(self) -> bool:
        """Whether it can be a row of a batch, see `merge`."""
        return self.visible is None and all(hasattr(entry, "merge") for entry in self.layers)

    def aside(self) -> Aside:
        """What has to be handed to `extract`, so that a row goes back as this sequence does."""
        layers = {
            number: entry if isinstance(entry, ImageCache) else entry.snapshots
            for number, entry in enumerate(self.layers)
            if isinstance(entry, ImageCache) or hasattr(entry, "snapshots")
        }
        return Aside(self.positions, self.spans, layers)

    def extract(self, row: int, aside: Aside | None = None) -> "State":
        """One row of a batch as a sequence of its own.

        Args:
            aside: of the sequence that became the row. Without it images have the keys that further tokens attend to,
                and recurrent layers go back nowhere.
        """
        padding, prompts, shifts = self._rows()
        layers = [entry.extract(row) for entry in self.layers]
        own = State(self.make, layers=layers, start=self.start - int(padding[row]), positions=Counting(shifts[row]))
        own.prompt_length = prompts[row]
        if aside is not None:
            own.positions, own.spans = aside.positions, aside.spans
            for number, kept in aside.layers.items():
                if isinstance(kept, ImageCache):
                    own.layers[number] = kept
                else:
                    own.layers[number].snapshots = kept
            return own
        images = next((entry for entry in layers if isinstance(entry, ImageCache) and entry.keys is not None), None)
        if images is not None and images.keys is not None:
            count = images.keys.shape[2]
            own.spans = (Span(0, count, count),)
        return own


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
