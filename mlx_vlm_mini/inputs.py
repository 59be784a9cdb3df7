"""What a processor makes of a prompt, and a model reads."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import mlx.core as mx
import numpy as np

from .errors import PromptError


@dataclass(frozen=True, kw_only=True, eq=False)
class InputImage:
    """One image of a prompt.

    Attributes:
        pixel_values: float32[B, height, width, 3] (numpy), normalised: one row, or one a tile. Of a video
            float32[T, height, width, 3 * frames]: one row a step of time.
        slices: float32[B, height, width, 3] (numpy): further rows of another size, see `preprocessing/slices.py`.
        tokens: its slots in the prompt.
        size: height and width in pixels, as it was opened.
        digest: SHA-256 of its size and all its pixels, by which a cache tells images apart; of its instruction, too.
        budget: tokens that it was allowed to have; None: as the checkpoint says.
        instruction: int32[L] (numpy), what a Q-Former reads beside it; None where that is nothing.
        times: of a video, where its steps stand on the decoder's axis of time.
    """

    pixel_values: np.ndarray
    tokens: int
    size: tuple[int, int]
    digest: bytes
    times: tuple[int, ...] = (0,)
    instruction: np.ndarray | None = None
    budget: int | None = None
    slices: np.ndarray | None = None

    @property
    def pieces(self) -> tuple[np.ndarray, ...]:
        """All its rows of pixels, those of one size together."""
        return (self.pixel_values,) if self.slices is None else (self.pixel_values, self.slices)

    @property
    def rows(self) -> int:
        """Its rows of pixels, which the vision tower encodes one by one."""
        return sum(map(len, self.pieces))


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What `processor(messages)` gives: everything the model needs.

    Attributes:
        input_ids: int32[1, L]; at an image's slots stands the image token's id.
        slots: bool[L] (numpy): true where a row of image features replaces the token's embedding.
        images: in the prompt's order; their slots follow one another.
        answer_length: tokens at the end that belong to an answer.
        answer_begins: where the answer begins that follows: in its thinking where the prompt's end opens that.
    """

    input_ids: mx.array
    slots: np.ndarray
    images: tuple[InputImage, ...] = ()
    answer_length: int = 0
    answer_begins: Literal["beginning", "thinking", "text"] = "text"

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt, without those of an answer that was appended."""
        return len(self.slots) - self.answer_length

    @property
    def image_ends(self) -> list[int]:
        """Of each image the length of the prompt up to its last slot."""
        slots, ends = np.flatnonzero(self.slots), np.cumsum([image.tokens for image in self.images])
        return [int(slots[end - 1]) + 1 for end in ends if end]

    def followed_by(self, tokens: Sequence[int]) -> "Inputs":
        """The same with an answer's token ids after them."""
        ids = mx.array([[*tokens]], dtype=self.input_ids.dtype).reshape(1, -1)
        return replace(
            self,
            input_ids=mx.concatenate([self.input_ids, ids], axis=1),
            slots=np.concatenate([self.slots, np.zeros(len(tokens), dtype=bool)]),
            answer_length=self.answer_length + len(tokens),
        )

    @property
    def pixel_values(self) -> mx.array | None:
        """float32[B, height, width, 3]: the rows of all images in order, copied; None for text alone.

        Raises:
            PromptError: the images have different sizes.
        """
        pieces = [piece for image in self.images for piece in image.pieces]
        if len({piece.shape[1:] for piece in pieces}) > 1:
            raise PromptError("the images have different sizes: each has pixel_values of its own")
        return mx.array(np.concatenate(pieces)) if pieces else None
