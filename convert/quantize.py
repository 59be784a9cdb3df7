"""What becomes of each tensor: kept, cast, or quantized."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_vlm_mini.checkpoint import DTYPES, TensorInfo
from mlx_vlm_mini.loading import Plan
from mlx_vlm_mini.pickled import Pickled
from mlx_vlm_mini.weights import CONVOLUTIONS, to_mlx_layout

_NAMES = {dtype: name for name, (dtype, _) in DTYPES.items()}
BITS = (4, 8)
GROUP_SIZES = (32, 64, 128)


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
    """Affine quantization: each `group_size` weights of a row share a scale and a bias."""

    bits: int
    group_size: int

    def as_config(self) -> dict[str, Any]:
        """mlx-lm's form, for config.json."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": "affine"}


def quantizable(plan: Plan) -> dict[str, str]:
    """The decoder's linear layers and embeddings: their weights' names in the checkpoint, to our module paths."""
    return {
        plan.ours[f"{path}.weight"]: path
        for path, module in plan.model.named_modules()
        if path.startswith("decoder.") and isinstance(module, nn.Linear | nn.Embedding)
    }


def plan_outputs(
    plan: Plan, quantization: Quantization | None, dtype: mx.Dtype | None
) -> tuple[list[Output], list[tuple[str, str]]]:
    """Decide for every tensor of the checkpoint, those that the model does not use included.

    Returns:
        The outputs in the source's order, and the names of layers left in floating point with the reason.
    """
    candidates = quantizable(plan) if quantization is not None else {}
    names = {theirs: ours for ours, theirs in plan.ours.items()}
    outputs, skipped = [], []
    for name, info in plan.checkpoint.tensors.items():
        if quantization is not None and name in candidates:
            if info.shape[-1] % quantization.group_size == 0:
                outputs.append(_quantized(plan, name, info, quantization, dtype))
                continue
            skipped.append((name, f"its width {info.shape[-1]} is no multiple of {quantization.group_size}"))
        outputs.append(_cast(plan, name, names.get(name, ""), info, dtype))
    return outputs, skipped


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
        parts = mx.quantize(weight, group_size=quantization.group_size, bits=quantization.bits)
        return tuple(parts)

    entries = (
        (f"{module}.weight", "U32", packed),
        (f"{module}.scales", _NAMES[target], groups),
        (f"{module}.biases", _NAMES[target], groups),
    )
    return Output(entries, make)
