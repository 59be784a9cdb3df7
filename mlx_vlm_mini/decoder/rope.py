"""Rotary positions of decoders with their scalings, equal to transformers' modeling_rope_utils.py.

Each scaling is a function: a length in tokens -> periods and attention scale (`rotary.Scaling`).
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_vlm_mini.borrow import borrow
from mlx_vlm_mini.config import SLIDING, DecoderConfig, LayerType
from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.layers.rotary import DependsOn, Rotary, Scaling

_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "proportional": (),
    "prompt_ntk": ("original_max_position_embeddings",),  # our name
}
_NUMBERS = (
    "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor", "mscale",
    "mscale_all_dim", "original_max_position_embeddings", "partial_rotary_factor",
)  # fmt: skip


_DEPENDS_ON: dict[str, DependsOn] = {"dynamic": "length", "longrope": "length", "prompt_ntk": "prompt"}


def _periods(base: float, dims: int) -> mx.array:
    """Positions a radian, float32[dims / 2], rounded as transformers rounds them."""
    exponents = np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims)
    return mx.array((base ** exponents.astype(np.float64)).astype(np.float32))


def _plain(dims: int, base: float, stretch: float = 1.0) -> Scaling:
    """Frequencies that stay; positions `stretch` times as long a radian.

    MLX's own frequencies differ from transformers' in the last bit, which a thousand positions make 1e-4 of an angle.
    """
    periods = _periods(base, dims) * stretch
    return lambda total: (periods, 1.0)


def _proportional(dims: int, base: float, share: float, factor: float) -> Scaling:
    """The first `share` of the frequencies of a whole head; the others stand still (Gemma 4).

    So numbers i and dims / 2 + i of a head turn for i below share dims / 2, and not its first ones.
    """
    turning = int(share * dims // 2)
    still = mx.full(dims // 2 - turning, math.inf)
    periods = mx.concatenate([_periods(base, dims)[:turning] * factor, still])
    return lambda total: (periods, 1.0)


def _dynamic(dims: int, base: float, factor: float, length: int) -> Scaling:
    """NTK: a larger base for what is longer than pretraining was."""
    plain = _periods(base, dims)

    def scaling(total: int) -> tuple[mx.array, float]:
        if total <= length:
            return plain, 1.0
        larger = factor * total / length - (factor - 1)
        return _periods(base * larger ** (dims / (dims - 2)), dims), 1.0

    return scaling


def _longrope(dims: int, base: float, scaling: Mapping[str, Any], longest: int) -> Scaling:
    """LongRoPE (arXiv:2402.13753): short factors up to the length of pretraining, long ones beyond it.

    mlx-lm's version always takes the long ones.
    """
    original = scaling["original_max_position_embeddings"]
    factor = scaling.get("factor") or longest / original
    default = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    scale = scaling.get("attention_factor") or default
    plain = _periods(base, dims)
    short, long = (mx.array(scaling[name], dtype=mx.float32) * plain for name in ("short_factor", "long_factor"))
    mx.eval(short, long)
    return lambda total: (long if total > original else short, scale)


def prompt_step(prompt: int, length: int) -> int:
    """The factor by which the base grows for a prompt of so many tokens.

    It is 3 for 1 to 2 times the `length` of pretraining, 7 for 2 to 4 times, and so on; 1 for a shorter prompt.

    Source: modeling_qwen.py of Qwen/Qwen-VL-Chat on the Hub.
    """
    return int(max(2 ** math.ceil(math.log(max(prompt, 1) / length, 2) + 1) - 1, 1))


def _prompt_ntk(dims: int, base: float, length: int) -> Scaling:
    """A base that grows in steps with the prompt's length, and stays for the whole answer (Qwen)."""
    known: dict[int, mx.array] = {}

    def scaling(prompt: int) -> tuple[mx.array, float]:
        step = prompt_step(prompt, length)
        if step not in known:
            known[step] = _periods(base * step ** (dims / (dims - 2)), dims)
        return known[step], 1.0

    return scaling


def _borrowed(dims: int, base: float, scaling: dict[str, Any], longest: int) -> Scaling:
    """Llama 3's and YaRN's (arXiv:2309.00071), whose frequencies are mlx-lm's."""
    rope = borrow("models.rope_utils").initialize_rope(
        dims, base, False, scaling_config=scaling, max_position_embeddings=longest
    )
    scale = _yarn_scale(scaling) if scaling["rope_type"] == "yarn" else 1.0
    return lambda total: (rope._freqs, scale)


def rope_type(scaling: Mapping[str, Any] | None) -> str:
    """The scaling's name: `rope_type`, `type` in older configs; Phi-3's `su` is `longrope`."""
    name = str((scaling or {}).get("rope_type") or (scaling or {}).get("type") or "default")
    return {"su": "longrope", "mrope": "default"}.get(name, name)


def depends_on_length(config: DecoderConfig, length: int) -> bool:
    """Whether the angles of a sequence of this length are others than those of its beginning alone.

    Then a prompt cannot be read in pieces, nor can keys that were cached for a shorter one be used again.
    """
    scaling = config.rope_scaling or {}
    limit = {
        "dynamic": config.max_position_embeddings,
        "longrope": scaling.get("original_max_position_embeddings") or config.max_position_embeddings,
        "prompt_ntk": scaling.get("original_max_position_embeddings"),
    }.get(rope_type(scaling))
    return limit is not None and length > limit


def turns_while_answering(config: DecoderConfig, length: int) -> bool:
    """Whether each token of an answer that ends at this length may be turned otherwise than those before it were."""
    return rope_type(config.rope_scaling) != "prompt_ntk" and depends_on_length(config, length)


def longest_context(config: DecoderConfig) -> int:
    """Tokens that a decoder is made for: those of config.json, more where its scaling is `dynamic`."""
    stretch = (config.rope_scaling or {}).get("factor", 1) if rope_type(config.rope_scaling) == "dynamic" else 1
    return int(config.max_position_embeddings * stretch)


def make_rope(config: DecoderConfig, kind: LayerType = "full_attention") -> Rotary:
    """The rotary positions of a kind of layer; those of sliding layers may have a base of their own, without scaling.

    Raises:
        CheckpointError: the scaling is unknown or incomplete.
    """
    own = _own_base(config, kind)
    scaling, longest = dict(config.rope_scaling or {}) if own is None else {}, config.max_position_embeddings
    name, dims, base = rope_type(scaling), config.shape(kind).rotary_dims, config.rope_theta if own is None else own
    if name not in _NEEDS:
        raise CheckpointError(f"config.json: unknown rope type '{name}' (known: {', '.join(sorted(_NEEDS))})")
    missing = [key for key in _NEEDS[name] if scaling.get(key) is None]
    if missing:
        raise CheckpointError(f"config.json: rope scaling '{name}' lacks {', '.join(missing)}")
    _check_numbers(name, scaling, dims)
    if not scaling.get("truncate", True):
        raise CheckpointError("config.json: truncate=false is not supported in rope scaling")
    scaling.pop("type", None)
    scaling = {key: value for key, value in scaling.items() if value is not None} | {"rope_type": name}
    original = scaling.get("original_max_position_embeddings") or longest
    scaling["original_max_position_embeddings"] = original
    kinds: dict[str, Callable[[], Scaling]] = {
        "default": lambda: _plain(dims, base),
        "linear": lambda: _plain(dims, base, scaling["factor"]),
        "dynamic": lambda: _dynamic(dims, base, scaling["factor"], longest),
        "longrope": lambda: _longrope(dims, base, scaling, longest),
        "proportional": lambda: _proportional(
            dims, base, scaling.get("partial_rotary_factor", 1.0), scaling.get("factor", 1.0)
        ),
        "prompt_ntk": lambda: _prompt_ntk(dims, base, original),
    }
    found = kinds.get(name, lambda: _borrowed(dims, base, scaling, longest))()
    depends_on = _DEPENDS_ON.get(name, "nothing")
    axes = None if own is not None or not config.has_sections else _axes(config, dims // 2, depends_on)
    return Rotary(dims, found, depends_on=depends_on, axes=axes, neighbours=config.shape(kind).neighbours)


def make_ropes(config: DecoderConfig, kinds: Iterable[LayerType]) -> dict[LayerType, Rotary]:
    """Of several kinds of layers; those whose positions rotate alike have the same one."""
    made: dict[tuple[float | None, int, bool], Rotary] = {}
    found = {}
    for kind in kinds:
        shape = config.shape(kind)
        key = _own_base(config, kind), shape.rotary_dims, shape.neighbours
        if key not in made:
            made[key] = make_rope(config, kind)
        found[kind] = made[key]
    return found


def _own_base(config: DecoderConfig, kind: LayerType) -> float | None:
    return config.window.sliding_rope_theta if kind in SLIDING and config.window is not None else None


def _axes(config: DecoderConfig, half: int, depends_on: DependsOn) -> np.ndarray:
    """By which axis each frequency goes: int[half].

    In chunks, the first s0 frequencies go by time, the next s1 by the row, the last s2 by the column (Qwen2-VL);
    interleaved, every third by the row up to 3 s1, every third by the column up to 3 s2, the others by time (Qwen3-VL).

    Raises:
        CheckpointError: the sections do not fit the heads, or the kind of scaling.
    """
    scaling = config.rope_scaling or {}
    sections, interleaved = scaling["mrope_section"], scaling.get("mrope_interleaved", False)
    whole = isinstance(sections, list | tuple) and all(type(size) is int and size >= 0 for size in sections)
    if not whole or len(sections) != 3 or not (interleaved or sum(sections) == half):
        raise CheckpointError(f"config.json: mrope_section must be three numbers with the sum {half}, not {sections!r}")
    if depends_on != "nothing":
        raise CheckpointError("config.json: a rope scaling that depends on the length takes no mrope_section")
    if not interleaved:
        return np.repeat(np.arange(3), sections)
    axes = np.zeros(half, dtype=np.int64)
    for axis in (1, 2):
        axes[axis : 3 * sections[axis] : 3] = axis
    return axes


def _check_numbers(name: str, scaling: Mapping[str, Any], dims: int) -> None:
    def positive(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf

    for key, value in scaling.items():
        if key in ("short_factor", "long_factor"):
            if not isinstance(value, list) or len(value) != dims // 2 or not all(map(positive, value)):
                raise CheckpointError(f"config.json: rope scaling '{name}' needs {dims // 2} positive numbers as {key}")
        elif key in _NUMBERS and value is not None and not positive(value):
            raise CheckpointError(f"config.json: rope scaling '{name}' needs a positive number as {key}, not {value!r}")
    if name == "llama3" and scaling.get("low_freq_factor", 1.0) == scaling.get("high_freq_factor", 4.0):
        raise CheckpointError("config.json: rope scaling 'llama3' needs different low_freq_factor and high_freq_factor")


def _yarn_scale(scaling: Mapping[str, Any]) -> float:
    """YaRN's attention temperature (arXiv:2309.00071). mlx-lm ignores `attention_factor` and reads `mscale` alone."""
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    log = math.log(scaling["factor"]) if scaling["factor"] > 1 else 0.0
    mscale, all_dims = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if mscale and all_dims:
        return float((0.1 * mscale * log + 1) / (0.1 * all_dims * log + 1))
    return 0.1 * log + 1
