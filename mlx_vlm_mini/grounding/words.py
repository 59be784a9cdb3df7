"""Cross-attention the other way: for each word of a prompt, where in the picture drawn of it its attention went."""

import hashlib
import re
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_vlm_mini.drawing.drawn import Drawn
from mlx_vlm_mini.drawing.imagine import check_drawing, drawing_reading
from mlx_vlm_mini.errors import CheckpointError, PromptError
from mlx_vlm_mini.generation.decode import one_at_a_time, wired_memory
from mlx_vlm_mini.images.source import Picture
from mlx_vlm_mini.layers.kernels import kernels
from mlx_vlm_mini.model import VLM
from mlx_vlm_mini.processor import Processor

from .attend import Rows
from .attended import AnswerAttention, ImageAttention, Reduce, choose


def attend_drawn(
    model: VLM,
    processor: Processor,
    drawn: Drawn,
    *,
    reduce: Reduce = "mean",
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
) -> AnswerAttention:
    """Where in a picture the attention to each word of its prompt came from.

    Image token k is explained by the query that chose it, which for the first is the prompt's last token; of the row
    that reads the prompt. A word's weight at a place of the picture is the part of that query's attention that the
    word's tokens have, divided by the number of places: so all words together have at most 1, and the sum over a
    picture is the mean over its places.

    Args:
        drawn: what `imagine` gave, with this model.
        reduce: "none" keeps every layer and head, "mean" averages them.
        layers, heads: those to look at; negative ones count from the end. None is all.

    Returns:
        `tokens` are the prompt's words, `token_ids` and `logprobs` those of the N image tokens, the second under the
        prompt without guidance; `images` is the picture, `weights` float32[words, N] or [layers, heads, words, N].

    Raises:
        PromptError: an option is at fault, or the picture is none of this model's.
        CheckpointError: the model cannot draw.
    """
    if reduce not in ("mean", "none"):
        raise PromptError(f"reduce must be mean or none for a drawn picture, not {reduce!r}")
    check_drawing(model, processor)
    assert model.config.drawing is not None
    shape, config = model.config.drawing, model.config.decoder
    if len(drawn.token_ids) != shape.tokens or not all(0 <= t < shape.vq.num_embeddings for t in drawn.token_ids):
        raise PromptError(
            f"the picture has {len(drawn.token_ids)} image tokens, this model draws {shape.tokens} of "
            f"{shape.vq.num_embeddings}: give the model that drew it"
        )
    chosen = choose("layer", layers, config.num_hidden_layers), choose("head", heads, config.num_attention_heads)
    ids, places = processor.drawing_prompt(drawn.prompt)
    words = [match.span() for match in re.finditer(r"\S+", drawn.prompt)]
    owners = [_word_of(place, drawn.prompt, words) for place in places]
    if not words:
        raise PromptError("the prompt of the picture is empty: there are no words to look at")
    belongs = np.array([[owner == number for owner in owners] for number in range(len(words))], dtype=np.float32)

    def read() -> tuple[mx.array, np.ndarray]:
        rows, state, first = Rows(np.arange(len(ids)), *chosen, reduce), model.make_state(), len(ids) - 1
        reading = drawing_reading(model, ids, drawn.token_ids[:-1])
        with wired_memory():
            if first:
                model.decoder(reading.part(0, first), state)
            rows.begin(shape.tokens)
            hidden = model.decoder(reading.part(first, reading.length), state, rows)[0]
            logprobs = kernels().log_softmax(model.drawing.logits(hidden))
            mx.eval(logprobs)
        return logprobs, rows.take()

    logprobs, found = one_at_a_time(read)
    weights = np.einsum("wl,...nl->...wn", belongs, found) / shape.tokens
    own = mx.take_along_axis(logprobs, mx.array([*drawn.token_ids])[:, None], axis=-1)[:, 0]
    values = np.array(own)
    if not np.isfinite(values).all():
        raise CheckpointError("the model computes numbers that are not finite for this picture")
    data = drawn.to_png()
    origin = Picture(data, "the drawn picture", None, hashlib.sha256(data).hexdigest())
    texts = [drawn.prompt[start:stop] for (start, _), (stop, _) in zip(words, [*words[1:], (None, 0)], strict=True)]
    return AnswerAttention(
        prompt=drawn.prompt,
        token_ids=drawn.token_ids,
        tokens=tuple(drawn.prompt[start:end] for start, end in words),
        texts=tuple(texts),
        logprobs=values,
        reduce=reduce,
        layers=tuple(chosen[0]),
        heads=tuple(chosen[1]),
        images=(
            ImageAttention(
                weights=weights.astype(np.float32),
                boxes=_cells(shape.grid, drawn.image.width, drawn.image.height),
                size=(drawn.image.height, drawn.image.width),
                origin=origin,
            ),
        ),
        drawn=True,
    )


def _word_of(place: tuple[int, int], prompt: str, words: Sequence[tuple[int, int]]) -> int | None:
    """Which word a token belongs to, by its first letter; None of tokens around the prompt and of white space."""
    start, end = place
    letters = [at for at in range(start, end) if not prompt[at].isspace()]
    if not letters:
        return None
    return next(number for number, (first, last) in enumerate(words) if first <= letters[0] < last)


def _cells(grid: int, width: int, height: int) -> np.ndarray:
    """Boxes of the picture's cells, row by row: float64[grid * grid, 4]."""
    rows, columns = np.divmod(np.arange(grid**2), grid)
    across, down = width / grid, height / grid
    return np.stack([columns * across, rows * down, (columns + 1) * across, (rows + 1) * down], axis=-1)
