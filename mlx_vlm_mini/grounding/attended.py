"""What `attend` gives: for every token of an answer, the attention over every image's patches."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mlx_vlm_mini.errors import PromptError
from mlx_vlm_mini.images.source import Picture

from .places import weight_inside

Reduce = Literal["none", "mean", "rollout"]
MADE_BY = "mlx-vlm-mini attend"


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageAttention:
    """Attention over one image.

    Attributes:
        weights: float32[T, P], or float32[layers, heads, T, P] where nothing was reduced. P are the image's tokens in
            the prompt, with cross-attention its keys. All keys of a query together, text included, have the weight 1;
            with cross-attention those of all images that it sees. Where query tokens stand for the image (QLLaMA), or
            a resampler's queries read it (Qwen-VL), P are the features that these look at, over which a query's weight
            is spread as its own looks are.
        boxes: float64[P, 4], of each its left, top, right and bottom in the picture, see places.py; NaN for tokens
            that show no place of it (newlines, a class token).
        size: the picture's height and width in pixels, as `open_image` opens it.
        origin: the picture.
    """

    weights: np.ndarray
    boxes: np.ndarray
    size: tuple[int, int]
    origin: Picture

    def inside(self, region: tuple[float, float, float, float]) -> np.ndarray:
        """The weight inside a box of the picture: float64 of the shape of `weights` without P."""
        return weight_inside(self.weights, self.boxes, region)


@dataclass(frozen=True, kw_only=True, eq=False)
class AnswerAttention:
    """Where the model looked for each of the T tokens of its answer.

    Token t is explained by the query at the position that predicts it: the one before it in the sequence, which for
    the first token is the prompt's last. What the token itself, once read, looks at explains the next one.

    Attributes:
        prompt: the text of the message that is answered.
        token_ids: of the answer, the one that ended it included.
        tokens: as the vocabulary writes them.
        texts: the text that each completes; may be empty.
        logprobs: float32[T], of the tokens, as the explicit attention gives them.
        reduce: what became of layers and heads.
        layers, heads: those that were looked at, counted from 0.
        images: in the prompt's order.
        drawn: the image was drawn of the prompt (`attend_drawn`): `tokens` and `texts` are the prompt's words,
            `token_ids` and `logprobs` those of the image's tokens.
    """

    prompt: str
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    texts: tuple[str, ...]
    logprobs: np.ndarray
    reduce: Reduce
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    images: tuple[ImageAttention, ...]
    drawn: bool = False

    @property
    def shares(self) -> np.ndarray:
        """Of each token the part of its attention that all images together have: float32[T]."""
        total: np.ndarray = np.sum([image.weights.sum(axis=-1) for image in self.mean().images], axis=0)
        return total

    def mean(self, layers: Sequence[int] | None = None, heads: Sequence[int] | None = None) -> "AnswerAttention":
        """The mean over layers and heads, by default over all that were looked at; negative ones count from the end.

        Raises:
            PromptError: it is reduced already, or was not looked at.
        """
        if self.reduce != "none":
            if layers is not None or heads is not None:
                raise PromptError("layers and heads are already reduced: attend with reduce='none' keeps them")
            return self
        wanted, places = [], []
        for name, chosen, known in (("layer", layers, self.layers), ("head", heads, self.heads)):
            found = list(known) if chosen is None else choose(name, chosen, max(known) + 1)
            missing = [number for number in found if number not in known]
            if missing:
                raise PromptError(f"{name} {missing[0]} was not looked at, only {', '.join(map(str, known))}")
            wanted.append(tuple(found))
            places.append([known.index(number) for number in found])
        images = tuple(
            replace(image, weights=image.weights[places[0]][:, places[1]].mean(axis=(0, 1))) for image in self.images
        )
        return replace(self, reduce="mean", layers=wanted[0], heads=wanted[1], images=images)

    @property
    def caption(self) -> str:
        """What `draw_attention` and `attention_page` call the sum of all tokens."""
        share = float(self.shares.sum() if self.drawn else self.shares.mean())
        if self.drawn:
            return f"{share:.0%} of the picture's attention went to these words"
        return f"{share:.0%} of the attention of all tokens is on the images"

    def describe(self, token: int) -> str:
        """A token and its share, as a sentence."""
        share = float(self.shares[token])
        if self.drawn:
            return f"{self.label(token)!r}: {share:.1%} of the picture's attention went to it"
        return f"{self.label(token)!r}: {share:.0%} of its attention is on the images"

    def label(self, token: int) -> str:
        """What to call a token: its text without white space around it, else as the vocabulary writes it."""
        return self.texts[token].strip() or self.tokens[token]

    def save(self, file: Path) -> None:
        """Write an .npz, which `numpy.load` reads: the attributes by their names, and of image i `weights_i`,
        `boxes_i` and `size_i`."""
        arrays: dict[str, Any] = {
            "made_by": MADE_BY, "prompt": self.prompt, "token_ids": self.token_ids, "tokens": self.tokens,
            "texts": self.texts, "logprobs": self.logprobs, "reduce": self.reduce, "layers": self.layers,
            "heads": self.heads,
        }  # fmt: skip
        for i, image in enumerate(self.images):
            arrays |= {f"weights_{i}": image.weights, f"boxes_{i}": image.boxes, f"size_{i}": image.size}
        with file.open("wb") as out:  # np.savez would put .npz behind another name
            np.savez_compressed(out, **arrays)


def choose(name: str, chosen: Sequence[int] | None, count: int) -> list[int]:
    """Numbers of layers or heads, those below 0 counted from the end, in order; None is all.

    Raises:
        PromptError: there is no such one, or none is chosen.
    """
    if chosen is None:
        return list(range(count))
    for number in chosen:
        if not -count <= number < count:
            raise PromptError(f"{name} {number} does not exist: the decoder has {count}, 0 to {count - 1}")
    if not chosen:
        raise PromptError(f"no {name} is chosen: the decoder has {count}, 0 to {count - 1}")
    return sorted({number % count for number in chosen})


def name_numbers(numbers: Sequence[int]) -> str:
    """Numbers in order, runs of them as `0-31`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)
