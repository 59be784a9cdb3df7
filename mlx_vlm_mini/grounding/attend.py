"""The inspector: an answer's attention over its images, by self-attention or cross-attention, recorded explicitly;
where a resampler stands between patches and tokens, through its own attention back to the patches.

Only the answer's queries are computed explicitly, behind a prompt that was read as always; rollout needs those of the
whole prompt, and keeps of a layer what flowed there from the images. Source of the rollout: Abnar and Zuidema, 2020
(arXiv:2005.00928).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, get_args

import mlx.core as mx
import numpy as np

from mlx_vlm_mini.config import DecoderConfig
from mlx_vlm_mini.decoder.rope import turns_while_answering
from mlx_vlm_mini.decoder.state import State
from mlx_vlm_mini.errors import CheckpointError, PromptError
from mlx_vlm_mini.fusion import Encode
from mlx_vlm_mini.generation.answering import Chunk
from mlx_vlm_mini.generation.decode import prefill, wired_memory
from mlx_vlm_mini.generation.features import Features
from mlx_vlm_mini.generation.options import Options
from mlx_vlm_mini.generation.stream import stream_inputs
from mlx_vlm_mini.images.source import ImageSource
from mlx_vlm_mini.inputs import InputImage, Inputs
from mlx_vlm_mini.layers.kernels import kernels
from mlx_vlm_mini.model import VLM
from mlx_vlm_mini.preprocessing.pixels import frames
from mlx_vlm_mini.processor import PreparedImage, Processor
from mlx_vlm_mini.text.messages import Message, Prompt, images_of, text_of, to_messages
from mlx_vlm_mini.text.tokenizer import TextStream

from .attended import AnswerAttention, ImageAttention, Reduce, choose
from .places import join


def attend(
    model: VLM,
    processor: Processor,
    prompt: Prompt,
    *,
    images: Sequence[ImageSource] = (),
    answer: str | Sequence[int] | None = None,
    reduce: Reduce = "mean",
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    features: Features | None = None,
    listen: Callable[[Chunk], None] | None = None,
    **options: Any,
) -> AnswerAttention:
    """Where a model looks in its images for each token of an answer.

    Args:
        prompt: a text, a list of texts and images in order, or OpenAI-style messages; `images` come before the text.
        answer: a text or token ids; by default what the model answers, greedily unless `options` say otherwise.
        reduce: "none" keeps every layer and head; "mean" averages them; "rollout" multiplies the layers' mean heads,
            each with half of what its own position held (arXiv:2005.00928).
        layers, heads: those to look at; negative ones count from the end. None is all, in a model with cross-attention
            its layers; rollout takes all.
        features: where pixels and features of pictures are kept and found.
        listen: is called with each chunk of the answer that the model gives.
        options: see `Options`: max_tokens, temperature, ..., progress.

    Raises:
        PromptError: there is no image or no answer, or a layer or head that does not exist or sees no image.
        ImageError: an image cannot be opened.
    """
    chosen, config = Options(**options), model.config.decoder
    if reduce not in get_args(Reduce):
        raise PromptError(f"reduce must be one of {', '.join(get_args(Reduce))}, not {reduce!r}")
    if reduce == "rollout" and (layers is not None or heads is not None):
        raise PromptError("rollout goes through all layers and heads: leave them out")
    if reduce == "rollout" and config.cross_attention is not None:
        raise PromptError("rollout follows self-attention, and this model looks at images by cross-attention")
    if reduce == "rollout" and config.delta is not None:
        raise PromptError(
            "rollout follows self-attention, and layers of this model have none: choose another reduction"
        )
    layers = _choose_layers(config, layers)
    heads = choose("head", heads, config.num_attention_heads)
    kept = Features() if features is None else features
    messages = to_messages(prompt, images, processor.access)
    if any(part["type"] == "video" for part in images_of(messages)):
        raise PromptError("attention is drawn on images, not on videos: give some of the frames as images")
    messages = [
        {**message, "content": _prepare(message["content"], processor, kept, chosen.image_tokens)}
        for message in messages
    ]
    prepared: list[PreparedImage] = [part["image"] for part in images_of(messages)]
    if not prepared:
        raise PromptError("the prompt has no image, so there are no patches to look at: give one")
    inputs, state = processor(messages, think=chosen.think), model.make_state()
    boxes = [find_boxes(model, processor, image) for image in inputs.images]
    encode = partial(kept.encode, encode=model.encode)
    with wired_memory():
        mixings = [model.mixing(image, encode) for image in inputs.images]
        if answer is None:
            tokens = []
            for chunk in stream_inputs(model, processor, inputs, state, options=chosen, features=kept):
                tokens.append(chunk.token)
                if listen is not None:
                    listen(chunk)
        else:
            if isinstance(answer, str):
                answer = encode_answer(processor, messages, inputs, answer, chosen.think)
            tokens = list(answer)
        _check_tokens(tokens, config.vocab_size)
        if reduce == "rollout":
            logits, weights = _roll_out(model, inputs, tokens, encode)
        else:
            if answer is not None:
                reading = model.read(inputs, encode=encode)
                step, progress = chosen.prefill_step, chosen.progress
                mx.eval(prefill(model.decoder, reading, state, step=step, progress=progress))
            rows = Rows(_columns(inputs, state), layers, heads, reduce)
            logits, weights = _record(model, inputs, tokens, state, encode, rows)
    logprobs = kernels().log_softmax(logits)
    found = mx.take_along_axis(logprobs, mx.array(tokens)[:, None], axis=-1)[:, 0]
    counts = [len(places if mixing is None else mixing) for places, mixing in zip(boxes, mixings, strict=True)]
    shares = [
        own if mixing is None else own @ mixing
        for own, mixing in zip(np.split(weights, np.cumsum(counts)[:-1], axis=-1), mixings, strict=True)
    ]
    return AnswerAttention(
        prompt=text_of(messages[-1]),
        token_ids=tuple(tokens),
        tokens=tuple(processor.tokenizer.id_to_token(token) or f"<{token}>" for token in tokens),
        texts=_texts(processor, tokens),
        logprobs=np.array(found),
        reduce=reduce,
        layers=tuple(layers),
        heads=tuple(heads),
        images=tuple(
            ImageAttention(weights=own, boxes=places, size=image.size, origin=image.origin)
            for own, places, image in zip(shares, boxes, prepared, strict=True)
        ),
    )


def find_boxes(model: VLM, processor: Processor, image: InputImage) -> np.ndarray:
    """Where in its picture lies what each slot of an image shows: float64[tokens, 4], NaN where that is nowhere. With
    cross-attention, and where slots are mixed of all features (`VLM.mixing`), of what each of its features shows, tile
    after tile: float64[features, 4].

    Raises:
        CheckpointError: the image's rows are not those that the processor's settings make.
    """
    settings, vision = processor.settings_of(image.budget), model.config.vision
    assert settings is not None  # the image was prepared by them
    if settings.among is not None and image.rows == 1:  # cut images have rows for the whole and for tiles
        settings = settings.among
    rows = frames(image.size, settings)
    if len(rows) != image.rows:
        raise CheckpointError(
            f"family '{model.config.family}' cuts an image into {image.rows} pieces, its settings say {len(rows)}"
        )
    height = image.pixel_values.shape[1]
    lead = vision.features_at(height) - (height // vision.patch_size) ** 2  # a class token before the patches
    sizes = [piece.shape[1:3] for piece in image.pieces for _ in piece]
    places = [frame.patches(high, wide, vision.feature_side) for frame, (high, wide) in zip(rows, sizes, strict=True)]
    nowhere = np.full((lead, 4), np.nan)
    found = np.concatenate([part for boxes in places for part in (nowhere, boxes)])
    whole = model.config.decoder.cross_attention is not None or model.mixes
    return found if whole else join(found, model.sources(image))


def _choose_layers(config: DecoderConfig, layers: Sequence[int] | None) -> list[int]:
    """Layers to look at, of those that look at images."""
    kinds = config.layer_types
    if config.cross_attention is None:
        looking, why = [i for i, kind in enumerate(kinds) if kind != "linear_attention"], "has no attention weights"
    else:
        looking, why = [i for i, kind in enumerate(kinds) if kind == "cross_attention"], "reads text alone"
    chosen = choose("layer", looking if layers is None else layers, config.num_hidden_layers)
    blind = [number for number in chosen if number not in looking]
    if blind:
        raise PromptError(f"layer {blind[0]} {why}; images are seen by {', '.join(map(str, looking))}")
    return chosen


def _columns(inputs: Inputs, state: State) -> np.ndarray:
    """Which keys show the images, image after image: the slots, or of cross-attention those of all used tiles."""
    if not state.spans:
        return np.flatnonzero(inputs.slots)
    begins = np.cumsum([0, *(span.held for span in state.spans)])
    return np.concatenate([begin + np.arange(span.seen) for begin, span in zip(begins, state.spans, strict=False)])


def encode_answer(
    processor: Processor, messages: Sequence[Message], inputs: Inputs, answer: str, think: bool | None = None
) -> list[int]:
    """Token ids of an answer as the chat template would write it behind the prompt, whose tokens stay as they are.
    Where the prompt opens the answer's thinking, the template writes the end of an empty one.

    Args:
        messages: the prompt's, their images prepared.
        inputs: of them.
        think: as the prompt was made.
    """
    prepared = [part["image"] for part in images_of(messages)]
    opened, slots = processor.expand(messages, prepared, think=think)
    said = [*messages, {"role": "assistant", "content": answer}]
    whole, _ = processor.expand(said, prepared, add_generation_prompt=False, think=think)
    text, behind = answer.strip(), whole[len(opened) :] if whole.startswith(opened) else ""
    space = behind[: behind.find(text)] if text in behind else None
    markers = processor.chat_template.markers
    between = "" if space is None or markers is None or inputs.answer_begins != "thinking" else markers.close
    text = space + text if space is not None and space.strip() in ("", between) else answer
    ids, _, _ = processor.tokenize(opened + text, [*slots, *[False] * text.count(processor.image_token)])
    length = len(inputs.slots)
    if len(ids) > length and ids[:length] == inputs.input_ids[0].tolist():
        return ids[length:]
    return processor.tokenizer.encode_piece(text)[0]  # its beginning would have joined the prompt's end


def _prepare(content: Any, processor: Processor, features: Features, tokens: int | None) -> Any:
    return content if isinstance(content, str) else [features.prepare_part(processor, part, tokens) for part in content]


def _check_tokens(tokens: Sequence[int], vocab_size: int) -> None:
    if not tokens:
        raise PromptError("the answer is empty: there is no token to explain")
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise PromptError(f"the answer has the token id {token}, the vocabulary has {vocab_size}")


def _texts(processor: Processor, tokens: Sequence[int]) -> tuple[str, ...]:
    stream = TextStream(processor.tokenizer)
    texts = [stream.add(token) for token in tokens]
    texts[-1] += stream.finish()
    return tuple(texts)


class Rows:
    """Records the weights of some queries on the images' keys, in chosen layers and heads."""

    def __init__(self, columns: np.ndarray, layers: Sequence[int], heads: Sequence[int], reduce: Reduce) -> None:
        self._columns, self._heads = mx.array(columns), mx.array(list(heads))
        self._layers, self._reduce = frozenset(layers), reduce
        self._found: list[np.ndarray] = []  # a layer each, [heads, queries, N]; heads are 1 where they are averaged
        self.begin(0)

    def begin(self, queries: int) -> None:
        """From now on come so many queries' weights, from the first layer to the last."""
        self._queries, self._layer, self._done = queries, 0, 0
        self._blocks: list[np.ndarray] = []

    def append(self, weights: mx.array) -> None:
        self._done += weights.shape[2]
        if self._layer in self._layers:
            kept = weights[0][self._heads][..., self._columns].astype(mx.float32)
            kept = kept if self._reduce == "none" else kept.mean(axis=0, keepdims=True)
            self._blocks.append(np.array(kept))  # computed now, so that no layer's weights wait for the next one's
        if self._done == self._queries:
            if self._blocks:
                self._found.append(np.concatenate(self._blocks, axis=1))
            self._layer, self._done, self._blocks = self._layer + 1, 0, []

    def take(self) -> np.ndarray:
        """float32[layers, heads, queries, N], or their mean float32[queries, N]; they are then forgotten."""
        found, self._found = np.stack(self._found), []
        return found if self._reduce == "none" else found.mean(axis=(0, 1))


class _Rollout:
    """Follows what flows from the images' slots to all positions, layer by layer: float32[L, N], N slots."""

    def __init__(self, columns: np.ndarray, length: int) -> None:
        self.flow = (mx.arange(length)[:, None] == mx.array(columns)).astype(mx.float32)
        self._blocks: list[mx.array] = []
        self._done = 0

    def append(self, weights: mx.array) -> None:
        _, _, queries, keys = weights.shape
        own = self.flow[self._done : self._done + queries]
        mean = weights[0].astype(mx.float32).mean(axis=0)
        self._blocks.append(0.5 * (mean @ self.flow[:keys]) + 0.5 * own)
        mx.eval(self._blocks[-1])
        self._done += queries
        if self._done == len(self.flow):
            self.flow, self._blocks, self._done = mx.concatenate(self._blocks), [], 0


def _record(
    model: VLM, inputs: Inputs, tokens: Sequence[int], state: State, encode: Encode, rows: Rows
) -> tuple[mx.array, np.ndarray]:
    """Logits before each token, float[T, vocab_size], and what `rows` keeps; `state` holds the prompt or more."""
    first = len(inputs.slots) - 1
    reached = state.rewind(first)
    reading = model.read(inputs.followed_by(tokens[:-1]), reached, encode)
    if reached < first:
        model.decoder(reading.part(0, first - reached), state)
    # Where angles depend on the length, each token's are those of the length that it was read at.
    step = 1 if turns_while_answering(model.config.decoder, first + len(tokens)) else len(tokens)
    logits, weights = [], []
    for start in range(first - reached, reading.length, step):
        part = reading.part(start, min(start + step, reading.length))
        rows.begin(part.length)
        logits.append(model.decoder.logits(model.decoder(part, state, rows))[0])
        mx.eval(logits[-1])
        weights.append(rows.take())
    return mx.concatenate(logits), np.concatenate(weights, axis=-2)


def _roll_out(model: VLM, inputs: Inputs, tokens: Sequence[int], encode: Encode) -> tuple[mx.array, np.ndarray]:
    """The same, computed of the whole sequence: float32[T, N]."""
    length, decoder = len(inputs.slots), model.decoder
    if turns_while_answering(model.config.decoder, length + len(tokens)):
        raise PromptError(
            f"rollout needs keys that stay as they are, and this model turns them anew at {length} tokens: shorten the "
            "prompt, or choose another reduction"
        )
    flow = _Rollout(np.flatnonzero(inputs.slots), length + len(tokens) - 1)
    hidden = decoder(model.read(inputs.followed_by(tokens[:-1]), encode=encode), None, flow)
    logits = decoder.logits(hidden[:, length - 1 :])[0]
    mx.eval(logits)
    return logits, np.array(flow.flow[length - 1 :])
