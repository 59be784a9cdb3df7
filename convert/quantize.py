"""What becomes of each tensor: kept, cast, or quantized."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, cast, get_args

import mlx.core as mx
import mlx.nn as nn

from mlx_vlm_mini.checkpoint import DTYPES, TensorInfo
from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.loading import Plan
from mlx_vlm_mini.pickled import Pickled
from mlx_vlm_mini.weights import CONVOLUTIONS, to_mlx_layout

_NAMES = {dtype: name for name, (dtype, _) in DTYPES.items()}
Part = Literal["vision", "projector", "decoder", "embeddings", "head"]
Mode = Literal["affine", "mxfp4", "mxfp8", "nvfp4"]
BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
_FIXED: dict[Mode, tuple[int, int]] = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}  # bits, group size


@dataclass(frozen=True)
class Output:
    """Tensors to write that come from one tensor of the source.

    Attributes:
        entries: name, safetensors type and shape of each, in order.
        make: computes them.
    """

    entries: tuple[tuple[str, str, tuple[int, ...]], ...]
    make: Callable[[], tuple[mx.array, ...]]

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


def quantizable(plan: Plan) -> dict[str, Part]:
    """Linear layers and embeddings: their weights' names in the checkpoint, to the part that they belong to."""
    special: dict[str, Part] = {"decoder.embed_tokens": "embeddings", "decoder.lm_head": "head"}
    found: dict[str, Part] = {}
    for path, module in plan.model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            part = cast(Part, path.partition(".")[0])
            found[plan.ours[f"{path}.weight"]] = special.get(path, part)
    return found


def plan_outputs(
    plan: Plan, quantizations: Mapping[Part, Quantization], dtype: mx.Dtype | None
) -> tuple[list[Output], dict[str, Quantization], list[tuple[str, str]]]:
    """Decide for every tensor of the checkpoint, those that the model does not use included.

    Returns:
        The outputs in the source's order; how each quantized layer is quantized, by its name in the checkpoint; and the
        names of layers left in floating point, with the reason.
    """
    candidates = quantizable(plan) if quantizations else {}
    names = {theirs: ours for ours, theirs in plan.ours.items()}
    outputs, quantized, skipped = [], {}, []
    for name, info in plan.checkpoint.tensors.items():
        quantization = quantizations.get(candidates[name]) if name in candidates else None
        if quantization is not None and info.shape[-1] % quantization.group_size == 0:
            outputs.append(_quantized(plan, name, info, quantization, dtype))
            quantized[name.removesuffix(".weight")] = quantization
            continue
        if quantization is not None:
            skipped.append((name, f"its width {info.shape[-1]} is no multiple of {quantization.group_size}"))
        outputs.append(_cast(plan, name, names.get(name, ""), info, dtype))
    return outputs, quantized, skipped


def _float_type(info: TensorInfo | Pickled, dtype: mx.Dtype | None) -> mx.Dtype:
    return DTYPES[info.dtype][0] if dtype is None or not info.is_float else dtype


def _cast(plan: Plan, name: str, ours: str, info: TensorInfo | Pickled, dtype: mx.Dtype | None) -> Output:
    target = _float_type(info, dtype)
    shape = info.shape
    # A patch projection that the model itself does not read has no name of ours and stays as it is.
    if ours in CONVOLUTIONS and not plan.checkpoint.is_mlx:
        shape = (shape[0], *shape[2:], shape[1])

    def make() -> tuple[mx.array, ...]:
        return (to_mlx_layout(ours, plan.checkpoint.read(name), plan.checkpoint).astype(target),)

    return Output(((name, _NAMES[target], shape),), make)


def _quantized(
    plan: Plan, name: str, info: TensorInfo | Pickled, quantization: Quantization, dtype: mx.Dtype | None
) -> Output:
    target = _float_type(info, dtype)
    module = name.removesuffix(".weight")
    rows, columns = info.shape
    groups = (rows, columns // quantization.group_size)
    packed = (rows, columns * quantization.bits // 32)

    def make() -> tuple[mx.array, ...]:
        weight = plan.checkpoint.read(name).astype(target)
        return tuple(mx.quantize(weight, **quantization.as_config()))

    entries = [(f"{module}.weight", "U32", packed)]
    if quantization.mode == "affine":
        entries += [(f"{module}.scales", _NAMES[target], groups), (f"{module}.biases", _NAMES[target], groups)]
    else:  # a byte a group, and no bias
        entries.append((f"{module}.scales", "U8", groups))
    return Output(tuple(entries), make)
