"""Rotary positions (arXiv:2104.09864) with the scalings of mlx-lm, equal to transformers' modeling_rope_utils.py."""

import math
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_vlm_mini.borrow import borrow
from mlx_vlm_mini.config import DecoderConfig
from mlx_vlm_mini.errors import CheckpointError

_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "prompt_ntk": ("original_max_position_embeddings",),  # our name
}
_NUMBERS = (
    "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor", "mscale",
    "mscale_all_dim", "original_max_position_embeddings", "partial_rotary_factor",
)  # fmt: skip


def _periods(base: float, dims: int) -> mx.array:
    """Positions a radian, float32[dims / 2], rounded as transformers rounds them."""
    exponents = np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims)
    return mx.array((base ** exponents.astype(np.float64)).astype(np.float32))


class RoPE(nn.Module):
    """Plain positions, `linear` ones, and `dynamic` ones (NTK: a larger base for what is longer than pretraining was).

    MLX's own frequencies differ from transformers' in the last bit, which a thousand positions make 1e-4 of an angle.
    """

    def __init__(
        self, dims: int, base: float, *, stretch: float = 1.0, growth: tuple[float, int] | None = None
    ) -> None:
        super().__init__()
        self.dims, self.base, self.growth = dims, base, growth
        self._freqs = _periods(base, dims) * stretch
        mx.eval(self._freqs)  # what is left to be computed belongs to the thread that asked for it

    def periods(self, total: int) -> mx.array:
        """Positions a radian where so many tokens are read at last, float32[dims / 2]."""
        if self.growth is None or total <= self.growth[1]:
            return self._freqs
        factor, length = self.growth
        larger = factor * total / length - (factor - 1)
        return _periods(self.base * larger ** (self.dims / (self.dims - 2)), self.dims)

    def __call__(self, x: mx.array, offset: int = 0) -> mx.array:
        freqs = self.periods(x.shape[-2] + offset)
        return mx.fast.rope(x, self.dims, traditional=False, base=None, scale=1.0, offset=offset, freqs=freqs)


class LongRoPE(nn.Module):
    """LongRoPE (arXiv:2402.13753): short factors up to the length of pretraining, long ones beyond it.

    mlx-lm's version always takes the long ones.
    """

    def __init__(self, dims: int, base: float, scaling: Mapping[str, Any], max_position_embeddings: int) -> None:
        super().__init__()
        self.dims = dims
        self.original_length = scaling["original_max_position_embeddings"]
        factor = scaling.get("factor") or max_position_embeddings / self.original_length
        default = math.sqrt(1 + math.log(factor) / math.log(self.original_length)) if factor > 1 else 1.0
        self.scale = scaling.get("attention_factor") or default
        frequencies = _periods(base, dims)
        self._short = mx.array(scaling["short_factor"], dtype=mx.float32) * frequencies
        self._long = mx.array(scaling["long_factor"], dtype=mx.float32) * frequencies

    def periods(self, total: int) -> mx.array:
        """As of `RoPE`."""
        return self._long if total > self.original_length else self._short

    def __call__(self, x: mx.array, offset: int = 0) -> mx.array:
        freqs = self.periods(x.shape[-2] + offset)
        return mx.fast.rope(
            self.scale * x, self.dims, traditional=False, base=None, scale=1.0, offset=offset, freqs=freqs
        )


class PromptRoPE(nn.Module):
    """Positions whose base grows in steps with the prompt's length, and stays for the whole answer (Qwen).

    A prompt of 1 to 2 times the length of pretraining has step 3, one of 2 to 4 times 7, and so on; a shorter one 1.
    Source: modeling_qwen.py of Qwen/Qwen-VL-Chat on the Hub.
    """

    def __init__(self, dims: int, base: float, length: int) -> None:
        super().__init__()
        self.dims, self.base, self.length = dims, base, length
        self._begun: dict[int, RoPE] = {}

    def step(self, prompt: int) -> int:
        """The factor of a prompt of so many tokens."""
        return int(max(2 ** math.ceil(math.log(max(prompt, 1) / self.length, 2) + 1) - 1, 1))

    def begun(self, prompt: int) -> RoPE:
        """The positions of a sequence that begins with a prompt of so many tokens."""
        step = self.step(prompt)
        if step not in self._begun:
            self._begun[step] = RoPE(self.dims, self.base * step ** (self.dims / (self.dims - 2)))
        return self._begun[step]


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


def make_rope(config: DecoderConfig, own: float | None = None) -> Any:
    """What turns float[B, H, L, D] by its positions: called with `(x, offset=tokens before x)`; or a `PromptRoPE`,
    which gives that for a prompt.

    Args:
        own: a base in place of the config's, without its scaling.

    Raises:
        CheckpointError: the scaling is unknown or incomplete.
    """
    if own is not None:
        return RoPE(config.head_dim, own)
    scaling, dims, base = dict(config.rope_scaling or {}), config.head_dim, config.rope_theta
    name = rope_type(scaling)
    if name not in _NEEDS:
        raise CheckpointError(f"config.json: unknown rope type '{name}' (known: {', '.join(sorted(_NEEDS))})")
    missing = [key for key in _NEEDS[name] if scaling.get(key) is None]
    if missing:
        raise CheckpointError(f"config.json: rope scaling '{name}' lacks {', '.join(missing)}")
    _check_numbers(name, scaling, dims)
    if scaling.get("partial_rotary_factor", 1.0) != 1.0 or not scaling.get("truncate", True):
        raise CheckpointError("config.json: partial_rotary_factor and truncate=false are not supported in rope scaling")
    scaling.pop("type", None)
    scaling["rope_type"] = name
    if not scaling.get("original_max_position_embeddings"):
        scaling["original_max_position_embeddings"] = config.max_position_embeddings
    if name == "longrope":
        return LongRoPE(dims, base, scaling, config.max_position_embeddings)
    if name == "prompt_ntk":
        return PromptRoPE(dims, base, scaling["original_max_position_embeddings"])
    if name in ("default", "linear"):
        return RoPE(dims, base, stretch=scaling["factor"] if name == "linear" else 1.0)
    if name == "dynamic":
        return RoPE(dims, base, growth=(scaling["factor"], config.max_position_embeddings))
    rope = borrow("models.rope_utils").initialize_rope(
        dims, base, False, scaling_config=scaling, max_position_embeddings=config.max_position_embeddings
    )
    if name == "yarn":
        rope.mscale = _yarn_scale(scaling)
    return rope


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
