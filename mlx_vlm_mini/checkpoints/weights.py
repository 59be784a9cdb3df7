"""From a checkpoint's tensors to the model's: rename by weight map, split fused ones, check strictly, cast, load."""

import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from itertools import accumulate, takewhile
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_vlm_mini.config import DecoderConfig, LayerShape, VLMConfig, check_layers
from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.families.parts.maps import Experts, PerHead, Raised, Weights
from mlx_vlm_mini.model import VLM

from .folder import Checkpoint

CONVOLUTIONS = frozenset({"vision.patch_embed.weight", "patch_embed.weight", "projector.downsample.weight"})
"""Our names of convolution kernels: (out, in, h, w) on the Hub, (out, h, w, in) here and in MLX's files; of videos
with time in front of h. Besides them, those of one axis in layers and those that draw, see `is_convolution`."""

_DRAWING = re.compile(r"drawing\.vq\.(.+\.)?(\w*conv\w*|nin_shortcut|[qkv]|proj_out)\.weight")

_BATCHED = frozenset({"vision.class_token", "vision.pos_embed", "query_tokens", "projector.query_tokens"})
"""Our names of tensors that some families store with axes of length 1 in front."""


def is_convolution(name: str) -> bool:
    """Whether one of our names is a convolution kernel's."""
    return name in CONVOLUTIONS or name.endswith(".conv1d.weight") or _DRAWING.fullmatch(name) is not None


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
EXPERT = re.compile(r"(?<=\.switch_mlp)\.(\d+)(?=\.)")
"""In our names, the number of an expert where a checkpoint holds experts one by one; the model's are stacked."""


def _find(name: str, weights: Weights) -> tuple[str | tuple[str, ...] | None, str]:
    """What a map says of a tensor, its layer numbers filled in, and what of the name stands behind that.

    Raises:
        KeyError: the map does not know the name.
    """
    numbers = _NUMBER.findall(name)
    pattern = name if {name, name.rpartition(".")[0]} & weights.keys() else _NUMBER.sub("{}", name)
    module, _, parameter = pattern.rpartition(".")
    whole = pattern in weights
    if not whole and module not in weights and _is_dropped(name, weights):
        return None, ""
    target = weights[pattern if whole else module]
    if isinstance(target, tuple):
        target = type(target)(each.format(*numbers) for each in target)
    elif target is not None:
        target = type(target)(target.format(*numbers))
    if whole and isinstance(target, Experts):
        return target, ".weight"
    return target, "" if whole else f".{parameter}"


def _is_dropped(name: str, weights: Weights) -> bool:
    """Whether a map drops all that begins as a name does."""
    return any(key.endswith("*") and name.startswith(key[:-1]) for key in weights)


def rename(name: str, weights: Weights) -> tuple[str, ...]:
    """Our names of a checkpoint's tensor: one, several of a fused one, none where the family drops it.

    A map names whole modules or single tensors; a name with its own numbers counts before one with `{}`. What stands
    behind a module (`weight`, `bias`, and `scales` and `biases` of a quantized one) is kept.

    Raises:
        KeyError: the map does not know the name.
    """
    target, rest = _find(name, weights)
    targets = () if target is None else (target,) if isinstance(target, str) else target
    return tuple(each + rest for each in targets)


def count_decoder(checkpoint: Checkpoint, weights: Weights, config: DecoderConfig) -> tuple[int, int]:
    """The decoder's weights in the files, and those of them that a token reads: of experts the ones that it takes."""
    total, active = 0, 0.0
    for theirs in checkpoint.tensors:
        try:
            ours = rename(theirs, weights)
        except KeyError:
            continue
        if ours and ours[0].startswith("decoder."):
            count = checkpoint.num_weights(theirs)
            total, active = total + count, active + count * config.active_share(ours[0])
    return total, round(active)


def hub_name(name: str, weights: Weights) -> str:
    """What one of our tensors is called on the Hub: by the first entry of the map that gives it alone.

    Raises:
        KeyError: the map gives no such tensor.
    """
    numbers, (module, _, parameter) = _NUMBER.findall(name), name.rpartition(".")
    for theirs, ours in weights.items():
        if not isinstance(ours, str) or ours.count("{}") > len(numbers):
            continue
        if ours.format(*numbers) in (name, module):
            whole = theirs.format(*numbers)
            return whole if ours.format(*numbers) == name else f"{whole}.{parameter}"
    raise KeyError(name)


def match_names(names: Iterable[str], weights: Weights, family: str) -> tuple[dict[str, str], list[str]]:
    """Match a checkpoint's tensors to ours.

    Returns:
        Our names to theirs, those of a fused tensor in the order of its rows; and their names that the family drops.

    Raises:
        CheckpointError: a tensor is unknown, or two have one meaning.
    """
    ours: dict[str, str] = {}
    unused, unknown = [], []
    for name in names:
        try:
            targets = rename(name, weights)
        except KeyError:
            unknown.append(name)
            continue
        if not targets:
            unused.append(name)
        for target in targets:
            if target in ours:
                raise CheckpointError(f"the checkpoint has both {ours[target]} and {name}, which mean the same tensor")
            ours[target] = name
    if unknown:
        raise CheckpointError(f"the checkpoint has {_list(unknown)}, which family '{family}' does not know")
    return ours, unused


def without_drafts(ours: Mapping[str, str], config: VLMConfig) -> tuple[dict[str, str], list[str]]:
    """Our names to a checkpoint's without those of layers that draft tokens ahead; and its names of these."""
    first, count = config.decoder.num_hidden_layers, config.draft_layers
    layers = {f"decoder.layers.{number}." for number in range(first, first + count)}
    drafts = {name for name in ours for layer in layers if name.startswith(layer)}
    kept = {name: theirs for name, theirs in ours.items() if name not in drafts}
    return kept, list(dict.fromkeys(ours[name] for name in drafts))


def _is_idle(name: str, config: VLMConfig) -> bool:
    """Whether a tensor belongs to a vision block behind the last one whose features are read, which is not built, or
    would make keys and values in a layer that has another's."""
    block = re.match(r"vision\.blocks\.(\d+)\.", name)
    if block is not None:
        return config.vision.depth <= int(block[1]) < config.vision.num_hidden_layers
    layer = re.match(r"decoder\.layers\.(\d+)\.self_attn\.(?:[kv]_proj|k_norm)\.", name)
    kinds = config.decoder.layer_types
    if layer is None or int(layer[1]) >= len(kinds):
        return False
    return config.decoder.shape(kinds[int(layer[1])]).shared_with is not None


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
        theirs = ours.get(f"{path}.scales", ours.get(f"{path}.scales".replace(".switch_mlp.", ".switch_mlp.0.")))
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


def _least_weights(config: VLMConfig) -> int:
    """Weights that the largest matrices of a model have, whatever its family: it has no fewer."""
    decoder, vision = config.decoder, config.vision
    mixed = {kind: _attention_weights(decoder.shape(kind)) for kind in decoder.layer_types}
    if decoder.delta is not None:
        mixed["linear_attention"] = decoder.delta.mixed_size + 2 * decoder.delta.value_size
    inner = 2 * decoder.intermediate_size
    if decoder.experts is not None:
        inner = 0 if decoder.mlp_type == "moe" else inner
        inner += 3 * decoder.experts.num_experts * decoder.experts.moe_intermediate_size
    block = vision.hidden_size * (4 * vision.hidden_size + 2 * vision.intermediate_size)
    tower = 0 if config.text_alone else vision.depth * block
    layers = sum(mixed[kind] + inner for kind in decoder.layer_types if kind != "cross_attention")
    per_layer = decoder.embeddings.per_layer
    beside = 0 if per_layer is None else per_layer.vocab_size * per_layer.size
    return decoder.hidden_size * (decoder.num_embeddings + layers) + tower + beside * decoder.num_hidden_layers


def _attention_weights(shape: LayerShape) -> int:
    """Rows of a layer's matrices of the hidden size."""
    made = 0 if shape.shared_with is not None else shape.num_kv_heads * (1 if shape.keys_as_values else 2)
    return (2 * shape.num_heads + made) * shape.head_dim


def _check_weights(config: VLMConfig, checkpoint: Checkpoint) -> None:
    """Refuse a config whose model cannot be in the files, before anything is made of it.

    Raises:
        CheckpointError: it asks for more than four weights a byte; the narrowest have two bits.
    """
    asked, held = _least_weights(config), sum(info.nbytes for info in checkpoint.tensors.values())
    if asked > 4 * held:
        raise CheckpointError(
            f"config.json asks for a model of {asked:.2g} weights or more, about {2 * asked / 1e9:.2g} GB in bfloat16; "
            f"{checkpoint.folder} holds {held / 1e9:.2g} GB of tensors: the files do not belong together"
        )


def build(config: VLMConfig, ours: Mapping[str, str], checkpoint: Checkpoint, weights: Weights) -> VLM:
    """The model with every tensor of the checkpoint's type and shape expected, none of them read.

    Args:
        weights: the family's map.

    Raises:
        CheckpointError: a tensor is missing, superfluous or of another shape.
    """
    tiled = config.vision.tiled
    depths = config.vision.num_hidden_layers, config.decoder.num_hidden_layers
    layers = max(*depths, 0 if tiled is None else tiled.num_global_layers)
    if layers > len(checkpoint.tensors):  # before a model of a billion layers is built
        raise CheckpointError(
            f"config.json asks for {layers} layers, {checkpoint.folder} has {len(checkpoint.tensors)} tensors in all"
        )
    _check_weights(config, checkpoint)
    try:
        model = VLM(config)
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise CheckpointError(f"config.json asks for a model that MLX cannot build: {error}") from None
    if any(name.endswith(".scales") for name in ours):
        try:
            nn.quantize(model, class_predicate=quantization_of(ours, checkpoint.quantization))
        except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:
            raise CheckpointError(f"config.json: quantization does not fit the model: {error}") from None
    expected = dict(tree_flatten(model.parameters()))
    block = [name for name in expected if name.startswith("vision.blocks.0.")]
    if not any(name.endswith(".scales") for name in block):  # quantized ones may each be so in their own way
        for number in range(config.vision.depth, config.vision.num_hidden_layers):
            expected |= {name.replace(".0.", f".{number}.", 1): expected[name] for name in block}
    whole = {theirs for theirs in set(ours.values()) if isinstance(_find(theirs, weights)[0], Experts)}
    options: dict[str, Any] = {"experts": whole, "transposed": lies_transposed(expected, ours, checkpoint, weights)}
    check_tensors(expected, ours, checkpoint, weights, is_idle=lambda name: _is_idle(name, config), **options)
    return model


def check_tensors(
    expected: Mapping[str, mx.array],
    ours: Mapping[str, str],
    checkpoint: Checkpoint,
    weights: Weights,
    *,
    is_idle: Callable[[str], bool] = lambda name: False,
    experts: Container[str] = (),
    transposed: bool = False,
) -> None:
    """Check that a checkpoint has the tensors that a model expects, of their shapes, and no others but idle ones.

    Args:
        experts: names in the checkpoint of tensors that hold all experts.
        transposed: see `lies_transposed`.

    Raises:
        CheckpointError: a tensor is missing, superfluous or of another shape.
    """
    expected = _one_by_one(expected, ours)
    missing = [name for name in expected if name not in ours]
    if missing:
        raise CheckpointError(
            f"{checkpoint.folder} lacks {_list([_their_name(name, ours, weights) for name in missing])}"
        )
    extra = [theirs for name, theirs in ours.items() if name not in expected and not is_idle(name)]
    if extra:
        raise CheckpointError(f"{checkpoint.folder} has {_list(extra)}, which config.json has no place for")
    held = fused(ours)
    for theirs in dict.fromkeys(ours[name] for name in expected):
        names, info = held[theirs], checkpoint.tensors[theirs]
        name, array = names[0], expected[names[0]]
        stored = info.shape
        if is_convolution(name) and not checkpoint.is_mlx and len(stored) in (3, 4, 5):
            stored = (stored[0], *stored[2:], stored[1])
        if name in _BATCHED:
            stored = stored[-array.ndim :] if set(stored[: -array.ndim]) <= {1} else stored
        asked = (sum(expected[each].shape[0] for each in names), *array.shape[1:]) if len(names) > 1 else array.shape
        if theirs in experts:
            asked = _asked_experts([expected[each].shape for each in names])
            asked = (asked[0], asked[2], asked[1]) if transposed and is_bare(theirs) else asked
        if stored != asked:
            raise CheckpointError(
                f"{checkpoint.folder}: {theirs} has shape {list(info.shape)}, config.json asks for {list(asked)}"
                + (" (out, height, width, in)" if is_convolution(name) else "")
            )
        if info.is_float != mx.issubdtype(array.dtype, mx.floating):
            kind = "whole numbers" if array.dtype != mx.float32 else "floating-point numbers"
            raise CheckpointError(f"{checkpoint.folder}: {theirs} has type {info.dtype} instead of {kind}")


def _one_by_one(expected: Mapping[str, mx.array], ours: Mapping[str, str]) -> dict[str, mx.array]:
    """Expected tensors, stacks of experts taken apart where the checkpoint holds these one by one."""
    stacks, found = {EXPERT.sub("", name) for name in ours if EXPERT.search(name)}, {}
    for name, array in expected.items():
        if name not in stacks:
            found[name] = array
            continue
        one = array[0]
        found |= {name.replace(".switch_mlp.", f".switch_mlp.{place}."): one for place in range(len(array))}
    return found


def is_bare(theirs: str) -> bool:
    """Whether a tensor that holds all experts is called as repositories call it, not as what is packed of it."""
    return not theirs.endswith((".weight", ".scales", ".biases"))


def _asked_experts(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of a tensor that holds these parts of all experts: (experts, out, in)."""
    return (shapes[0][0], sum(shape[1] for shape in shapes), shapes[0][2])


def lies_transposed(
    expected: Mapping[str, mx.array], ours: Mapping[str, str], checkpoint: Checkpoint, weights: Weights
) -> bool:
    """Whether tensors that hold all experts are (experts, in, out): by their shapes.

    One of a layer's two always tells, since gate and up together cannot be as wide as the hidden size where one is.
    """
    for theirs, names in fused(ours).items():
        if not isinstance(_find(theirs, weights)[0], Experts) or not is_bare(theirs):
            continue
        if not all(name in expected and expected[name].ndim == 3 for name in names):
            continue
        count, rows, columns = _asked_experts([expected[name].shape for name in names])
        if rows != columns and checkpoint.tensors[theirs].shape == (count, columns, rows):
            return True
    return False


def _stack(arrays: Sequence[tuple[str, mx.array]]) -> list[tuple[str, mx.array]]:
    """Tensors by our names, those of single experts put together."""
    found, parts = [], dict[str, dict[int, mx.array]]()
    for name, array in arrays:
        match = EXPERT.search(name)
        if match is None:
            found.append((name, array))
        else:
            parts.setdefault(EXPERT.sub("", name), {})[int(match[1])] = array
    return found + [(name, mx.stack([each[i] for i in range(len(each))])) for name, each in parts.items()]


def _their_name(name: str, ours: Mapping[str, str], weights: Weights) -> str:
    """What a missing tensor would be called in this checkpoint: as a sibling in another layer or part is, else the
    name that the map has for it and that begins most like the names that are there."""
    pattern = _NUMBER.sub("{}", name)
    for sibling, theirs in ours.items():
        if _NUMBER.sub("{}", sibling) == pattern and _NUMBER.findall(sibling) == _NUMBER.findall(theirs):
            return _NUMBER.sub("{}", theirs).format(*_NUMBER.findall(name))
    numbers, (module, _, parameter) = _NUMBER.findall(name), name.rpartition(".")
    found = []
    for theirs, targets in weights.items():
        for target in (targets,) if isinstance(targets, str) else targets or ():
            if max(target.count("{}"), theirs.count("{}")) > len(numbers):
                continue
            if target.format(*numbers) in (name, module):
                whole = theirs.format(*numbers)
                found.append(whole if target.format(*numbers) == name else f"{whole}.{parameter}")

    def likeness(each: str) -> int:
        pairs = (zip(each.split("."), held.split("."), strict=False) for held in ours.values())
        return max((sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], parts)) for parts in pairs), default=0)

    return max(found, key=likeness, default=name)


def to_torch_layout(name: str, array: mx.array) -> mx.array:
    """A tensor of the model, by our name, with convolution kernels as (out, in, h, w)."""
    return mx.moveaxis(array, -1, 1) if is_convolution(name) else array


def to_mlx_layout(name: str, array: mx.array, checkpoint: Checkpoint) -> mx.array:
    """A tensor, by our name, with convolution kernels as (out, h, w, in)."""
    if is_convolution(name) and not checkpoint.is_mlx:
        return mx.moveaxis(array, 1, -1)
    return array


def fused(ours: Mapping[str, str]) -> dict[str, list[str]]:
    """A checkpoint's tensors to what they hold: one tensor of ours, several of a fused one in the order of its rows."""
    held: dict[str, list[str]] = {}
    for name, theirs in ours.items():
        held.setdefault(theirs, []).append(name)
    return held


def split_rows(array: mx.array, rows: Sequence[int], blocks: int) -> list[mx.array]:
    """Cut a fused tensor: it is `blocks` times the same, an equal share of each part's `rows` after another."""
    shares = [count // blocks for count in rows]
    parts = mx.split(array.reshape(blocks, sum(shares), *array.shape[1:]), list(accumulate(shares))[:-1], axis=1)
    return [part.reshape(count, *array.shape[1:]) for part, count in zip(parts, rows, strict=True)]


def join_rows(parts: Sequence[mx.array], blocks: int) -> mx.array:
    """What `split_rows` cuts into these parts."""
    shares = [part.reshape(blocks, part.shape[0] // blocks, *part.shape[1:]) for part in parts]
    return mx.concatenate(shares, axis=1).reshape(-1, *parts[0].shape[1:])


def count_blocks(theirs: str, weights: Weights, config: VLMConfig) -> int:
    """How many times a fused tensor holds a share of each of its parts."""
    target = _find(theirs, weights)[0]
    if not isinstance(target, PerHead):
        return 1
    in_vision = target[0].startswith("vision.")
    return config.vision.num_attention_heads if in_vision else config.decoder.num_key_value_heads


def load_weights(
    model: VLM,
    ours: Mapping[str, str],
    checkpoint: Checkpoint,
    dtype: mx.Dtype,
    weights: Weights,
    *,
    prefixes: tuple[str, ...] = ("",),
) -> None:
    """Read the tensors into the model, floats as `dtype`, packed ones as they are.

    Args:
        weights: the family's map.
        prefixes: how our names of the tensors begin that are to be read.
    """
    arrays: list[tuple[str, mx.array]] = []
    expected = dict(tree_flatten(model.parameters()))
    transposed = lies_transposed(expected, ours, checkpoint, weights)
    for theirs, names in fused(ours).items():
        if not names[0].startswith(prefixes) or _is_idle(names[0], model.config):
            continue
        array = to_mlx_layout(names[0], checkpoint.read(theirs), checkpoint)
        target = _find(theirs, weights)[0]
        if isinstance(target, Raised):
            array = array.astype(mx.float32) - 1  # what was rounded with its 1 loses nothing here
        if mx.issubdtype(array.dtype, mx.floating):
            array = array.astype(dtype)
        if names[0] in _BATCHED:
            array = array.reshape(expected[names[0]].shape)
        if isinstance(target, Experts):
            array = array.swapaxes(1, 2) if transposed and is_bare(theirs) else array
            parts = mx.split(array, len(names), axis=1)
            arrays += [(name, mx.contiguous(part)) for name, part in zip(names, parts, strict=True)]
            continue
        if len(names) == 1:
            arrays.append((names[0], array))
            continue
        blocks = count_blocks(theirs, weights, model.config)
        arrays += zip(names, split_rows(array, [expected[name].shape[0] for name in names], blocks), strict=True)
    arrays = _stack(arrays)
    model.load_weights(arrays, strict="" in prefixes)
    model.eval()
    try:
        mx.eval([array for _, array in arrays])
    except RuntimeError as error:
        raise CheckpointError(f"cannot read the tensors of {checkpoint.folder}: {error}") from None


Module = TypeVar("Module", bound=nn.Module)


def load_whole(checkpoint: Checkpoint, kind: str, weights: Weights, build: Callable[[], Module]) -> Module:
    """A model of one piece, in float32, with a checkpoint's tensors in it.

    Args:
        kind: for errors.
        build: makes the model of config.json, with fresh weights.

    Raises:
        CheckpointError: config.json is malformed, or names or shapes do not fit it.
    """
    check_layers(checkpoint.config)
    parts = [checkpoint.config, *(part for part in checkpoint.config.values() if isinstance(part, dict))]
    layers = [part["num_hidden_layers"] for part in parts if isinstance(part.get("num_hidden_layers"), int)]
    if max(layers, default=0) > len(checkpoint.tensors):  # before a model of a billion layers is built
        raise CheckpointError(f"config.json asks for {max(layers)} layers, {checkpoint.folder} has fewer tensors")
    try:
        model = build()
    except (TypeError, KeyError, AttributeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(f"{checkpoint.folder}/config.json is malformed: {error!r}") from None
    ours, _ = match_names(checkpoint.tensors, weights, kind)
    check_tensors(dict(tree_flatten(model.parameters())), ours, checkpoint, weights)
    arrays = [(name, to_mlx_layout(name, checkpoint.read(theirs), checkpoint)) for name, theirs in ours.items()]
    model.load_weights([(name, array.astype(mx.float32)) for name, array in arrays])
    model.eval()
    mx.eval(model.parameters())
    return model
