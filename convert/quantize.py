"""What becomes of each tensor: kept, cast, or quantized."""

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any, Literal, cast, get_args

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_vlm_mini.checkpoints.folder import DTYPES, TensorInfo
from mlx_vlm_mini.checkpoints.load import Plan
from mlx_vlm_mini.checkpoints.pickled import Pickled
from mlx_vlm_mini.checkpoints.weights import EXPERT, is_bare, is_convolution, lies_transposed, to_mlx_layout
from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.layers.experts import is_stack
from mlx_vlm_mini.layers.mlp import Narrow, PerLayerEmbedding

from .read import Reader

_NAMES = {dtype: name for name, (dtype, _) in DTYPES.items()}
_NAMES_OF_TYPES = {mx.float32: "float32", mx.float16: "float16", mx.bfloat16: "bfloat16"}
Entries = tuple[tuple[str, str, tuple[int, ...]], ...]
"""Name, safetensors type and shape of tensors that are written one after the other."""
Packed = tuple[mx.array, mx.array, mx.array]
"""A quantized weight as `mx.quantize` gives it: codes packed into uint32[rows, columns * bits / 32], scales, biases."""
Part = Literal["vision", "projector", "decoder", "embeddings", "head"]
Mode = Literal["affine", "mxfp4", "mxfp8", "nvfp4"]
BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
HEADS = ("decoder.lm_head", "drawing.head.proj_out", "drawing.head.vision_head")
_FIXED: dict[Mode, tuple[int, int]] = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}  # bits, group size


@dataclass(frozen=True)
class Output:
    """Tensors to write that come from one tensor of the source.

    Attributes:
        entries: of each, in order.
        make: computes them.
        part: what it belongs to: a `Part`, or "unused".
        kind: how it is stored, for a person: "float16", "4 bits".
        weights: number of weights.
    """

    entries: Entries
    make: Callable[[], tuple[mx.array, ...]]
    part: str = "unused"
    kind: str = ""
    weights: int = 0

    @property
    def nbytes(self) -> int:
        return sum(DTYPES[dtype][1] * prod(shape) for _, dtype, shape in self.entries)


@dataclass(frozen=True)
class Quantization:
    """How one layer is quantized: `group_size` weights of a row share a scale (and, affine, a bias)."""

    bits: int
    group_size: int
    mode: Mode = "affine"

    def as_config(self) -> dict[str, Any]:
        """mlx-lm's form, for config.json."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    def __str__(self) -> str:
        return f"{self.bits} bits" if self.mode == "affine" else self.mode


def choose(
    bits: int | None, group_size: int, mode: Mode, part_bits: Mapping[Part, int | None]
) -> dict[Part, Quantization]:
    """How each part is quantized; parts that are not in the result stay in floating point.

    `bits` and `mode` are for the decoder, its embeddings and its head; the vision tower and the projector, which are
    small and lose more, are quantized only where `part_bits` asks for it, and always affinely.

    Raises:
        CheckpointError: MLX has no such bits or groups, or the mode has another number of bits.
    """
    for given in (bits, *part_bits.values()):
        if given is not None and given not in BITS:
            raise CheckpointError(f"weights are quantized to {', '.join(map(str, BITS))} bits, not to {given}")
    if group_size not in GROUP_SIZES:
        raise CheckpointError(f"groups have {', '.join(map(str, GROUP_SIZES))} weights, not {group_size}")
    chosen: dict[Part, Quantization] = {}
    fixed = _FIXED.get(mode)
    for part in get_args(Part):
        text = part not in ("vision", "projector")
        own = part_bits.get(part)
        wanted = own if own is not None else bits if text else None
        if fixed is not None and text:
            if wanted not in (None, fixed[0]):
                raise CheckpointError(f"{mode} has {fixed[0]} bits, not {wanted}: leave the bits of the {part} out")
            chosen[part] = Quantization(*fixed, mode)
        elif wanted is not None:
            chosen[part] = Quantization(wanted, group_size)
    return chosen


def find_parts(plan: Plan) -> dict[str, Part]:
    """The checkpoint's tensors to the part that they belong to; those that the model does not use are left out."""
    special: dict[str, Part] = {
        **dict.fromkeys(("decoder.embed_tokens", "decoder.per_layer.embed"), "embeddings"),
        **dict.fromkeys(HEADS, "head"),
    }
    found: dict[str, Part] = {}
    for ours, theirs in plan.ours.items():
        part = ours.partition(".")[0]
        # What stands between the towers, an image's newline say, is the projector's.
        own = cast(Part, part) if part in ("vision", "decoder") else "projector"
        found[theirs] = special.get(ours.rpartition(".")[0], own)
    return found


def find_layers(plan: Plan) -> dict[str, Quantization | None]:
    """Linear layers and embeddings: their weights' names in the checkpoint, to how they are packed there.

    A vision tower's embeddings are positions, which are not to be packed, and neither are narrow layers; those that are
    packed are among the result.
    """
    found: dict[str, Quantization | None] = {}
    ones = find_experts(plan)
    for path, module in plan.model.named_modules():
        if path in ones:
            packing = Quantization(module.bits, module.group_size, module.mode) if "scales" in module else None
            found |= dict.fromkeys(ones[path], packing)
        if isinstance(module, Narrow) or (isinstance(module, nn.Embedding) and path.startswith("vision.")):
            continue
        if isinstance(module, nn.Linear | nn.Embedding):
            found[plan.ours[f"{path}.weight"]] = None
        elif isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
            found[plan.ours[f"{path}.weight"]] = Quantization(module.bits, module.group_size, module.mode)
    return found


def find_experts(plan: Plan) -> dict[str, list[str]]:
    """Layers of experts by their paths, to their weights in the checkpoint: one of all experts, or one each."""
    paths = {path for path, module in plan.model.named_modules() if is_stack(module)}
    found: dict[str, list[str]] = {}
    for ours, theirs in plan.ours.items():
        path = EXPERT.sub("", ours).removesuffix(".weight")
        if path in paths:
            found.setdefault(path, []).append(theirs)
    return found


def spread(plan: Plan, quantizations: Mapping[Part, Quantization]) -> dict[str, Quantization]:
    """How each layer is to be quantized, by its weight's name, where only the parts' bits are given.

    Embeddings of single layers get 8 bits where others get fewer: these are the bulk of some models (Gemma 4 E2B), and
    few bits harm them.
    """
    parts = find_parts(plan)
    chosen = {name: quantizations[parts[name]] for name in find_layers(plan) if parts[name] in quantizations}
    tables = [path for path, module in plan.model.named_modules() if isinstance(module, PerLayerEmbedding)]
    for name in {plan.ours[f"{path}.weight"] for path in tables} & chosen.keys():
        size = chosen[name].group_size if chosen[name].mode == "affine" else 64
        chosen[name] = Quantization(8, size)
    return chosen


def plan_outputs(
    plan: Plan,
    quantizations: Mapping[str, Quantization],
    dtype: mx.Dtype | None,
    reader: Reader | None = None,
    *,
    dequantize: bool = False,
    without: Container[str] = (),
    packed: Mapping[str, Packed] | None = None,
) -> tuple[list[Output], dict[str, Quantization], list[tuple[str, str]]]:
    """Decide for every tensor of the checkpoint, those that the model does not use included.

    What is packed already stays so where nothing else is asked for; else it is unpacked first.

    Args:
        quantizations: of layers, by their weights' names; those that are not in it stay as they are.
        reader: gives the tensors; one that refuses NaN unless told.
        dequantize: unpack what `quantizations` does not name, too.
        without: names of tensors that the result needs no copy of.
        packed: weights that are quantized already, by name.

    Returns:
        The outputs in the source's order, of which experts that are one tensor lie (experts, out, in) where they are
        quantized; how each quantized layer is quantized, by its name in the checkpoint; and the
        names of layers left in floating point, with the reason.
    """
    reader = Reader(plan.checkpoint) if reader is None else reader
    experts = {name for names in find_experts(plan).values() for name in names if is_bare(name)}
    shapes = dict(tree_flatten(plan.model.parameters()))
    transposed = lies_transposed(shapes, plan.ours, plan.checkpoint, plan.family.WEIGHTS)
    layers, parts = find_layers(plan), find_parts(plan)
    names = {theirs: ours for ours, theirs in plan.ours.items()}
    unpacked = set()  # modules whose scales and biases go with their weight
    for name, packing in layers.items():
        wanted = quantizations.get(name)
        if packing is not None and (dequantize if wanted is None else wanted != packing):
            unpacked.add(name.removesuffix(".weight"))
    outputs: list[Output] = []
    quantized: dict[str, Quantization] = {}
    skipped: list[tuple[str, str]] = []
    for name, info in plan.checkpoint.tensors.items():
        module, _, parameter = name.rpartition(".")
        whole = name in experts  # all experts, whose name is that of a module then
        if whole:
            module, parameter = name, "weight"
        if name in without or (module in unpacked and parameter in ("scales", "biases")):
            continue
        packing = layers.get(name if whole else f"{module}.weight")
        wanted = quantizations.get(name)
        weight = _Weight(name, info.shape, _float_type(info, dtype), partial(reader.read, name))
        if module in unpacked and packing is not None and parameter == "weight":
            weight = _unpacked(plan, module, packing, dtype, reader)
        elif packing is not None and name in layers:
            quantized[module], wanted = packing, None
        if wanted is not None and whole and transposed:
            weight = _swapped(weight)
        if wanted is not None and weight.shape[-1] % wanted.group_size:
            skipped.append((name, f"its width {weight.shape[-1]} is no multiple of {wanted.group_size}"))
            weight, wanted = _swapped(weight) if whole and transposed else weight, None
        if wanted is not None:
            quantized[module] = wanted
            entries, make = _quantized(weight, wanted, (packed or {}).get(name))
        else:
            entries, make = _cast(plan, names.get(name, ""), weight)
        stored = quantized.get(module) if (whole or f"{module}.weight" in layers) and parameter != "bias" else None
        kind = _NAMES_OF_TYPES.get(weight.dtype, "whole numbers") if stored is None else str(stored)
        outputs.append(Output(entries, make, parts.get(name, "unused"), kind, plan.checkpoint.num_weights(name)))
    return outputs, quantized, skipped


@dataclass(frozen=True)
class _Weight:
    """A tensor as it comes from the source, and the type that it gets."""

    name: str
    shape: tuple[int, ...]
    dtype: mx.Dtype
    read: Callable[[], mx.array]


def _swapped(weight: _Weight) -> _Weight:
    """(experts, in, out) as (experts, out, in), or back."""
    (count, *sides), read = weight.shape, weight.read
    return replace(weight, shape=(count, *sides[::-1]), read=lambda: mx.contiguous(read().swapaxes(1, 2)))


def _float_type(info: TensorInfo | Pickled, dtype: mx.Dtype | None) -> mx.Dtype:
    return DTYPES[info.dtype][0] if dtype is None or not info.is_float else dtype


def _unpacked(plan: Plan, module: str, packing: Quantization, dtype: mx.Dtype | None, reader: Reader) -> _Weight:
    *rows, columns = plan.checkpoint.tensors[f"{module}.weight"].shape
    scales = plan.checkpoint.tensors[f"{module}.scales"]
    if dtype is None:  # the floating-point modes' scales are bytes, which do not tell
        dtype = DTYPES[scales.dtype][0] if scales.is_float else mx.bfloat16
    read = partial(reader.unpack, module, packing.as_config(), dtype)
    return _Weight(f"{module}.weight", (*rows, columns * 32 // packing.bits), dtype, read)


def _cast(plan: Plan, ours: str, weight: _Weight) -> tuple[Entries, Callable[[], tuple[mx.array, ...]]]:
    shape = weight.shape
    # A patch projection that the model itself does not read has no name of ours and stays as it is.
    if is_convolution(ours) and not plan.checkpoint.is_mlx:
        shape = (shape[0], *shape[2:], shape[1])

    def make() -> tuple[mx.array, ...]:
        return (to_mlx_layout(ours, weight.read(), plan.checkpoint).astype(weight.dtype),)

    return ((weight.name, _NAMES[weight.dtype], shape),), make


def _quantized(
    weight: _Weight, quantization: Quantization, ready: Packed | None
) -> tuple[Entries, Callable[[], tuple[mx.array, ...]]]:
    module = weight.name.removesuffix(".weight")
    *rows, columns = weight.shape
    groups = (*rows, columns // quantization.group_size)
    packed = (*rows, columns * quantization.bits // 32)
    dtype = _NAMES[weight.dtype]

    def make() -> tuple[mx.array, ...]:
        if ready is not None:
            return ready
        return tuple(mx.quantize(weight.read().astype(weight.dtype), **quantization.as_config()))

    entries: Entries = ((f"{module}.weight", "U32", packed),)
    if quantization.mode == "affine":
        return (*entries, (f"{module}.scales", dtype, groups), (f"{module}.biases", dtype, groups)), make
    return (*entries, (f"{module}.scales", "U8", groups)), make  # a byte a group, and no bias
