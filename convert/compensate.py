"""Quantization that makes up for its own errors, on the inputs that a layer really gets.

Source: GPTQ (arXiv:2210.17323), its columns in the order of their inputs' energy and its groups where they stand.
mlx-lm's quant/gptq.py does not fit: it packs 2, 4 and 8 bits only, and runs models on batches of tokens alone.

Rounding a weight moves a layer's outputs; the weights that are not rounded yet are moved to bring them back. With H the
sum of x x^T over the layer's inputs x, a row w that became v has the error (w - v) H (w - v)^T.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mlx_vlm_mini.checkpoints.folder import DTYPES
from mlx_vlm_mini.checkpoints.load import Plan, compute_dtype
from mlx_vlm_mini.checkpoints.weights import count_blocks, fused, join_rows
from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.inputs import InputImage

from .calibrate import Sample, Walk, release
from .quantize import Packed, Quantization

DAMPING = 0.01  # of H's mean diagonal, added to it: inputs that calibration did not show
BLOCK = 128  # columns whose corrections are gathered before they reach the others
ROWS = 1024  # at a time, which bounds the memory
SHRINK = tuple(1 - 0.04 * step for step in range(13))  # of a group's range: clipping a few pays where tails are heavy


@dataclass(frozen=True)
class Seen:
    """What inputs a layer got: H, the sum of x x^T over them, float64[columns, columns]."""

    hessian: np.ndarray

    @cached_property
    def damped(self) -> np.ndarray:
        """H with a little on its diagonal; inputs that never came are held in place."""
        diagonal = np.diag(self.hessian)
        mean = float(diagonal.mean()) or 1.0
        damped: np.ndarray = self.hessian + np.diag(np.where(diagonal > 0, DAMPING * mean, mean))
        return damped

    @cached_property
    def factor(self) -> tuple[np.ndarray, np.ndarray]:
        """The order of the columns, and in this order the upper U with H^-1 = U^T U: float32[columns, columns].

        A row of U says how an error in its column is best made good in those behind it.
        """
        order = np.argsort(-np.diag(self.damped), kind="stable")
        lower = np.linalg.cholesky(self.damped[np.ix_(order[::-1], order[::-1])])
        return order, _invert(lower)[::-1, ::-1].astype(np.float32)


def _invert(lower: np.ndarray) -> np.ndarray:
    """The inverse of a lower triangle, by halves: that is products for the most part, and no pivots."""
    if len(lower) <= 64:
        return np.tril(np.linalg.inv(lower))
    half = len(lower) // 2
    first, last = _invert(lower[:half, :half]), _invert(lower[half:, half:])
    inverse = np.zeros_like(lower)
    inverse[:half, :half], inverse[half:, half:] = first, last
    inverse[half:, :half] = -last @ (lower[half:, :half] @ first)
    return inverse


def compensate(weight: mx.array, seen: Seen | None, quantization: Quantization) -> Packed:
    """Quantize a linear layer's weight so that its outputs change little; no row does worse than `mx.quantize`'s.

    Args:
        weight: float[rows, columns]; its type is that of the scales and biases.
        seen: the layer's inputs; None takes all to be alike, so that there is nothing to make good.
        quantization: affine.

    Returns:
        What `mx.quantize` would give, with other codes, scales and biases.
    """
    bits, size = quantization.bits, quantization.group_size
    top = 2**bits - 1
    energy = np.ones(weight.shape[1]) if seen is None else np.diag(seen.damped)
    parts: list[Packed] = []
    for start in range(0, weight.shape[0], ROWS):
        rows = weight[start : start + ROWS]
        plain = mx.quantize(rows, **quantization.as_config())
        exact = np.array(rows.astype(mx.float32))
        scales, biases = fit(exact, energy, quantization, rows.dtype)
        grid = np.repeat(scales, size, axis=1).T, np.repeat(biases, size, axis=1).T
        codes = _round(exact.T, *grid, top) if seen is None else _spread(exact.T, *seen.factor, *grid, top)
        ours = pack(codes.T, bits), mx.array(scales).astype(rows.dtype), mx.array(biases).astype(rows.dtype)
        better = output_error(exact, ours, seen, quantization) < output_error(exact, plain, seen, quantization)
        keep = mx.array(better)[:, None]
        parts.append(tuple(mx.where(keep, a, b) for a, b in zip(ours, plain, strict=True)))  # type: ignore[arg-type]
        mx.eval(parts[-1])
    weights, all_scales, all_biases = (mx.concatenate(list(each)) for each in zip(*parts, strict=True))
    return weights, all_scales, all_biases


def output_error(exact: np.ndarray, packed: Packed, seen: Seen | None, quantization: Quantization) -> np.ndarray:
    """Of each row (w - v) H (w - v)^T, the sum of its output's squared errors: float64[rows]."""
    values = mx.dequantize(*packed, **quantization.as_config()).astype(mx.float32)
    difference = (exact - np.array(values)).astype(np.float64)
    weighed = difference if seen is None else difference @ seen.hessian
    error: np.ndarray = (weighed * difference).sum(axis=1)
    return error


def fit(
    exact: np.ndarray, energy: np.ndarray, quantization: Quantization, dtype: mx.Dtype
) -> tuple[np.ndarray, np.ndarray]:
    """Scales and biases of each group with a small weighted squared error: `mx.quantize`'s, or better ones.

    Args:
        exact: float32[rows, columns].
        energy: float[columns], the mean square of each input.
        dtype: type that scales and biases are stored in.

    Returns:
        scales, biases: float32[rows, groups], representable in `dtype`.
    """
    size, top = quantization.group_size, 2**quantization.bits - 1
    weight = mx.array(exact)
    w = weight.reshape(exact.shape[0], -1, size)
    h = mx.array((energy / energy.mean()).astype(np.float32)).reshape(-1, size)
    total = h.sum(axis=-1)

    def stored(array: mx.array) -> mx.array:
        return array.astype(dtype).astype(mx.float32)

    def codes(scales: mx.array, biases: mx.array) -> mx.array:
        safe = mx.where(scales == 0, 1.0, scales)
        return mx.clip(mx.round((w - biases[..., None]) / safe[..., None]), 0, top)

    def error(scales: mx.array, biases: mx.array) -> mx.array:
        difference = w - (codes(scales, biases) * scales[..., None] + biases[..., None])
        return (h * difference * difference).sum(axis=-1)

    _, scales, biases = mx.quantize(weight.astype(dtype), **quantization.as_config())
    best = scales.astype(mx.float32), biases.astype(mx.float32)
    least = error(*best)

    def offer(scales: mx.array, biases: mx.array) -> None:
        nonlocal best, least
        scales, biases = stored(scales), stored(biases)
        found = error(scales, biases)
        better = found < least
        best = mx.where(better, scales, best[0]), mx.where(better, biases, best[1])
        least = mx.minimum(found, least)
        mx.eval(best, least)

    low, high = w.min(axis=-1), w.max(axis=-1)
    middle = (h * w).sum(axis=-1) / total
    for share in SHRINK:
        start = middle + share * (low - middle)
        offer(share * (high - low) / top, start)
    for _ in range(3):  # the best line through the codes that are there
        q = codes(*best)
        mean_q, mean_w = ((h * each).sum(axis=-1) / total for each in (q, w))
        variance = (h * (q - mean_q[..., None]) ** 2).sum(axis=-1)
        covariance = (h * (q - mean_q[..., None]) * w).sum(axis=-1)
        scales = mx.where(variance > 0, covariance / mx.maximum(variance, 1e-30), best[0])
        offer(scales, mean_w - scales * mean_q)
    return np.array(best[0]), np.array(best[1])


def _round(values: np.ndarray, scales: np.ndarray, biases: np.ndarray, top: int) -> np.ndarray:
    codes: np.ndarray = np.clip(np.rint((values - biases) / np.where(scales == 0, 1, scales)), 0, top)
    return codes


def _spread(
    exact: np.ndarray, order: np.ndarray, upper: np.ndarray, scales: np.ndarray, biases: np.ndarray, top: int
) -> np.ndarray:
    """Round column after column, the error of each spread over those behind it.

    Args:
        exact, scales, biases: float32[columns, rows], a scale and a bias for every weight.
        top: the largest code.

    Returns:
        Codes float32[columns, rows].
    """
    w, scales, biases = np.ascontiguousarray(exact[order]), scales[order], biases[order]
    codes = np.empty_like(w)
    for start, end in pairwise([*range(0, len(w), BLOCK), len(w)]):
        errors = np.empty((end - start, w.shape[1]), np.float32)
        for k in range(start, end):
            codes[k] = _round(w[k], scales[k], biases[k], top)
            errors[k - start] = (w[k] - (codes[k] * scales[k] + biases[k])) / upper[k, k]
            w[k + 1 : end] -= upper[k, k + 1 : end, None] * errors[k - start]
        w[end:] -= upper[start:end, end:].T @ errors
    back = np.empty_like(codes)
    back[order] = codes
    return back


def pack(codes: np.ndarray, bits: int) -> mx.array:
    """Codes [rows, columns] below 2^bits as MLX packs them: a row's bits one after the other, the lowest first."""
    rows = len(codes)
    each = (codes.astype(np.uint8)[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
    return mx.array(np.packbits(each.reshape(rows, -1), axis=1, bitorder="little").view("<u4"))


Show = Callable[[str, mx.array], None]
"""Takes a layer's path and its inputs."""


class _Watched(nn.Module):
    """A layer that shows its inputs to someone before it reads them."""

    def __init__(self, inner: nn.Module, path: str, show: Show) -> None:
        super().__init__()
        self.inner = inner
        self._path = path
        self._show = show

    def __call__(self, x: mx.array) -> mx.array:
        self._show(self._path, x)
        return self.inner(x)


@contextmanager
def watch(model: nn.Module, paths: Set[str], show: Show) -> Iterator[None]:
    """While it lasts, the layers at these paths show their inputs."""
    layers = {path: layer for path, layer in model.named_modules() if path in paths}
    model.update_modules(tree_unflatten([(path, _Watched(layer, path, show)) for path, layer in layers.items()]))
    try:
        yield
    finally:
        model.update_modules(tree_unflatten(list(layers.items())))


class _Gather:
    """Gathers what layers see; those that read the same array, as queries, keys and values do, share one H."""

    def __init__(self) -> None:
        self._last: mx.array | None = None
        self._owner = ""
        self._owners: dict[str, str] = {}
        self._sums: dict[str, Any] = {}

    def add(self, path: str, x: mx.array) -> None:
        """Add a layer's inputs, float[..., columns]."""
        if x is self._last:
            self._owners[path] = self._owner
            return
        self._last, self._owner, self._owners[path] = x, path, path
        rows = x.reshape(-1, x.shape[-1]).astype(mx.float32)
        self._sums[path] = self._sums.get(path, 0) + rows.T @ rows
        mx.eval(self._sums[path])

    def seen(self) -> dict[str, Seen]:
        """By layer."""
        sums = {path: Seen(np.array(total).astype(np.float64)) for path, total in self._sums.items()}
        return {path: sums[owner] for path, owner in self._owners.items()}


def _finish_front(
    plan: Plan,
    images: Sequence[InputImage],
    layers: Mapping[str, nn.Module],
    finish: Callable[[str, Seen | None], None],
) -> None:
    """Quantize the layers before the decoder, by path, on what all images give them."""
    model = plan.model
    last: tuple[mx.array, Seen] | None = None

    def finish_at_once(path: str, x: mx.array) -> None:
        nonlocal last
        if not mx.issubdtype(x.dtype, mx.floating):  # tokens, of a Q-Former's embeddings
            return finish(path, None)
        if last is None or x is not last[0]:
            gather = _Gather()
            gather.add(path, x)
            last = x, gather.seen()[path]
        finish(path, last[1])

    if plan.config.vision.grid is not None:  # of different sizes, so one by one, before any layer is rounded
        gather = _Gather()
        with watch(model, layers.keys(), gather.add):
            for pixels in (piece for image in images for piece in image.pieces):
                mx.eval(model.embed_images(mx.array(pixels)))
        for path, seen in gather.seen().items():
            finish(path, seen)
        return
    # all pictures in one call, so that each layer is finished when the next one reads
    questions = [mx.array(image.instruction) for image in images if image.instruction is not None]
    asked = {path for path in layers if path.startswith("projector.") and questions}
    with watch(model, layers.keys() - asked, finish_at_once):
        if plan.config.vision.tiled is not None:
            mx.eval(model.embed_tiled(images))
        else:
            rows = mx.array(np.concatenate([image.pixel_values for image in images]))
            features = model.vision.encode(rows.astype(model.dtype))
            mx.eval(features if asked else model.project(features))
    if asked:  # each picture with its own question, of its own length: so one by one, as above
        gather, ends = _Gather(), np.cumsum([image.rows for image in images])
        with watch(model, {path for path in asked if isinstance(layers[path], nn.Linear)}, gather.add):
            for question, end, image in zip(questions, ends.tolist(), images, strict=True):
                mx.eval(model.projector(features[end - image.rows : end], question))
        found = gather.seen()
        for path in sorted(asked):
            finish(path, found.get(path))


def compensate_model(
    plan: Plan,
    chosen: Mapping[str, Quantization],
    samples: Sequence[Sample],
    dtype: mx.Dtype | None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Packed]:
    """Quantize the linear layers of a model in the order in which they compute, each on the inputs that the quantized
    ones before it give. Embeddings have no inputs to weigh; their groups are fitted by themselves.

    In memory are the samples' hidden states, one of the decoder's layers with H of its linear ones, and the result.

    Args:
        plan: its model is used up.
        chosen: weights by their names in the checkpoint, to how they are quantized, all of them affine.
        dtype: type of what stays in floating point, None as it is.
        say: called with what is being worked on.

    Returns:
        Packed weights by their names in the checkpoint.
    """
    model, decoder = plan.model, plan.model.decoder
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Embedding)}
    wanted = {path: plan.ours[f"{path}.weight"] for path in layers}
    wanted = {path: name for path, name in wanted.items() if name in chosen}
    held = fused(plan.ours)
    parts: dict[str, Packed] = {}  # by our weights' names, of which a fused tensor holds several
    result: dict[str, Packed] = {}

    def finish(path: str, seen: Seen | None) -> None:
        name = wanted[path]
        if seen is not None and not np.isfinite(seen.hessian).all():
            raise CheckpointError(f"{name} gets inputs that are not finite: the source is broken, or calibrates badly")
        target = dtype or DTYPES[plan.checkpoint.tensors[name].dtype][0]
        packed = parts[f"{path}.weight"] = compensate(layers[path].weight.astype(target), seen, chosen[name])
        values = mx.dequantize(*packed, **chosen[name].as_config())
        layers[path].weight = values.astype(layers[path].weight.dtype)
        if parts.keys() >= set(held[name]):
            blocks = count_blocks(name, plan.family.WEIGHTS, plan.config)
            weight, scales, biases = (join_rows(each, blocks) for each in zip(*map(parts.pop, held[name]), strict=True))
            result[name] = weight, scales, biases

    walk = Walk(plan, samples, compute_dtype(plan), say)
    walk.load_front()
    images = [image for sample in samples for image in sample.inputs.images]
    if images:
        _finish_front(plan, images, {path: layers[path] for path in wanted if not path.startswith("decoder.")}, finish)
    for path in ("decoder.embed_tokens", "decoder.per_layer.embed", "decoder.per_layer.projection"):
        if path in wanted:
            finish(path, None)
    walk.embed()
    for number in range(len(decoder.layers)):
        walk.load_layer(number)
        gather = _Gather()
        with watch(model, {path for path in wanted if path.startswith(f"decoder.layers.{number}.")}, gather.add):
            walk.run_layer(number, walk.hidden)
        for path, seen in gather.seen().items():
            finish(path, seen)
        walk.step(number)
    if "decoder.lm_head" in wanted:
        walk.load_head()
        gather = _Gather()
        for hidden, sample in zip(walk.hidden, samples, strict=True):
            gather.add("decoder.lm_head", decoder.norm(hidden)[0, mx.array(np.flatnonzero(~sample.inputs.slots))])
        finish("decoder.lm_head", gather.seen()["decoder.lm_head"])
    release(decoder)
    return result
