"""From a checkpoint's tensors to the model's: rename by weight map, check strictly, cast, load."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .checkpoint import Checkpoint
from .config import VLMConfig
from .errors import CheckpointError
from .model import VLM

CONVOLUTIONS = frozenset({"vision.patch_embed.weight"})
"""Our names of convolution kernels: (out, in, h, w) on the Hub, (out, h, w, in) here and in MLX's files."""

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def rename(name: str, weights: Mapping[str, str | None]) -> str | None:
    """Our name of a checkpoint's tensor; None where the family drops it.

    A map names whole modules or single tensors; a name with its own numbers counts before one with `{}`. What stands
    behind a module (`weight`, `bias`, and `scales` and `biases` of a quantized one) is kept.

    Raises:
        KeyError: the map does not know the name.
    """
    numbers = _NUMBER.findall(name)
    pattern = name if {name, name.rpartition(".")[0]} & weights.keys() else _NUMBER.sub("{}", name)
    module, _, parameter = pattern.rpartition(".")
    target = weights[pattern] if pattern in weights else weights[module]
    if target is None:
        return None
    return target.format(*numbers) + ("" if pattern in weights else f".{parameter}")


def hub_name(name: str, weights: Mapping[str, str | None]) -> str:
    """What one of our tensors is called on the Hub: by the first entry of the map that gives it.

    Raises:
        KeyError: the map gives no such tensor.
    """
    numbers, (module, _, parameter) = _NUMBER.findall(name), name.rpartition(".")
    for theirs, ours in weights.items():
        if ours is None or ours.count("{}") > len(numbers):
            continue
        if ours.format(*numbers) in (name, module):
            whole = theirs.format(*numbers)
            return whole if ours.format(*numbers) == name else f"{whole}.{parameter}"
    raise KeyError(name)


def match_names(
    names: Iterable[str], weights: Mapping[str, str | None], config: VLMConfig
) -> tuple[dict[str, str], list[str]]:
    """Match a checkpoint's tensors to ours.

    Returns:
        Our names to theirs, and their names that the family drops.

    Raises:
        CheckpointError: a tensor is unknown, or two have one meaning.
    """
    ours: dict[str, str] = {}
    unused, unknown = [], []
    for name in names:
        try:
            target = rename(name, weights)
        except KeyError:
            unknown.append(name)
            continue
        if target is None:
            unused.append(name)
        elif target in ours:
            raise CheckpointError(f"the checkpoint has both {ours[target]} and {name}, which mean the same tensor")
        else:
            ours[target] = name
    if unknown:
        raise CheckpointError(f"the checkpoint has {_list(unknown)}, which family '{config.family}' does not know")
    return ours, unused


def _is_idle(name: str, config: VLMConfig) -> bool:
    """Whether a tensor belongs to a vision block behind the last one whose features are read, which is not built."""
    match = re.match(r"vision\.blocks\.(\d+)\.", name)
    return match is not None and config.vision.depth <= int(match[1]) < config.vision.num_hidden_layers


def _list(names: list[str]) -> str:
    """The first names of a list, for an error of one line."""
    shown = ", ".join(sorted(names)[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({shown}{more})"


def quantization_of(
    ours: Mapping[str, str], quantization: Mapping[str, Any] | None
) -> Callable[[str, nn.Module], bool | dict[str, Any]]:
    """Which modules are stored quantized, and how: a predicate for `nn.quantize`.

    A module is quantized where the checkpoint has its `scales`; config.json says how, for all or for this one by its
    name in the checkpoint.
    """
    settings = quantization or {}

    def predicate(path: str, _: nn.Module) -> bool | dict[str, Any]:
        theirs = ours.get(f"{path}.scales")
        if theirs is None:
            return False
        own = settings.get(theirs.removesuffix(".scales"), settings.get(path))
        chosen = own if isinstance(own, Mapping) else settings
        if "bits" not in chosen or "group_size" not in chosen:
            raise CheckpointError(f"{theirs} is quantized, but config.json says neither bits nor group_size")
        return {
            "group_size": chosen["group_size"],
            "bits": chosen["bits"],
            "mode": chosen.get("mode", settings.get("mode", "affine")),
        }

    return predicate


def build(config: VLMConfig, ours: Mapping[str, str], checkpoint: Checkpoint) -> VLM:
    """The model with every tensor of the checkpoint's type and shape expected, none of them read.

    Raises:
        CheckpointError: a tensor is missing, superfluous or of another shape.
    """
    layers = max(config.vision.num_hidden_layers, config.decoder.num_hidden_layers)
    if layers > len(checkpoint.tensors):  # before a model of a billion layers is built
        raise CheckpointError(
            f"config.json asks for {layers} layers, {checkpoint.folder} has {len(checkpoint.tensors)} tensors in all"
        )
    try:
        model = VLM(config)
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise CheckpointError(f"config.json asks for a model that MLX cannot build: {error}") from None
    if any(name.endswith(".scales") for name in ours):
        try:
            nn.quantize(model, class_predicate=quantization_of(ours, checkpoint.quantization))
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"config.json: quantization does not fit the model: {error}") from None
    expected = dict(tree_flatten(model.parameters()))
    block = [name for name in expected if name.startswith("vision.blocks.0.")]
    if not any(name.endswith(".scales") for name in block):  # quantized ones may each be so in their own way
        for number in range(config.vision.depth, config.vision.num_hidden_layers):
            expected |= {name.replace(".0.", f".{number}.", 1): expected[name] for name in block}
    missing = [name for name in expected if name not in ours]
    if missing:
        raise CheckpointError(f"{checkpoint.folder} lacks {_list([_their_name(name, ours) for name in missing])}")
    extra = [theirs for name, theirs in ours.items() if name not in expected and not _is_idle(name, config)]
    if extra:
        raise CheckpointError(f"{checkpoint.folder} has {_list(extra)}, which config.json has no place for")
    for name, array in expected.items():
        info = checkpoint.tensors[ours[name]]
        stored = info.shape
        if name in CONVOLUTIONS and not checkpoint.is_mlx and len(stored) == 4:
            stored = (stored[0], *stored[2:], stored[1])
        if stored != array.shape:
            raise CheckpointError(
                f"{checkpoint.folder}: {ours[name]} has shape {list(info.shape)}, "
                f"config.json asks for {list(array.shape)}"
                + (" (out, height, width, in)" if name in CONVOLUTIONS else "")
            )
        if info.is_float != mx.issubdtype(array.dtype, mx.floating):
            kind = "whole numbers" if array.dtype != mx.float32 else "floating-point numbers"
            raise CheckpointError(f"{checkpoint.folder}: {ours[name]} has type {info.dtype} instead of {kind}")
    return model


def _their_name(name: str, ours: Mapping[str, str]) -> str:
    """What a missing tensor would be called in this checkpoint, judged by a sibling in another layer or part."""
    pattern = _NUMBER.sub("{}", name)
    for sibling, theirs in ours.items():
        if _NUMBER.sub("{}", sibling) == pattern and _NUMBER.findall(sibling) == _NUMBER.findall(theirs):
            return _NUMBER.sub("{}", theirs).format(*_NUMBER.findall(name))
    return name


def to_torch_layout(name: str, array: mx.array) -> mx.array:
    """A tensor of the model, by our name, with convolution kernels as (out, in, h, w)."""
    return array.transpose(0, 3, 1, 2) if name in CONVOLUTIONS else array


def to_mlx_layout(name: str, array: mx.array, checkpoint: Checkpoint) -> mx.array:
    """A tensor, by our name, with convolution kernels as (out, h, w, in)."""
    if name in CONVOLUTIONS and not checkpoint.is_mlx:
        return array.transpose(0, 2, 3, 1)
    return array


def load_weights(
    model: VLM, ours: Mapping[str, str], checkpoint: Checkpoint, dtype: mx.Dtype, *, prefixes: tuple[str, ...] = ("",)
) -> None:
    """Read the tensors into the model, floats as `dtype`, packed ones as they are.

    Args:
        prefixes: how our names of the tensors begin that are to be read.
    """
    arrays = []
    for name, theirs in ours.items():
        if not name.startswith(prefixes) or _is_idle(name, model.config):
            continue
        array = to_mlx_layout(name, checkpoint.read(theirs), checkpoint)
        arrays.append((name, array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array))
    model.load_weights(arrays, strict="" in prefixes)
    model.eval()
    try:
        mx.eval([array for _, array in arrays])
    except RuntimeError as error:
        raise CheckpointError(f"cannot read the tensors of {checkpoint.folder}: {error}") from None
