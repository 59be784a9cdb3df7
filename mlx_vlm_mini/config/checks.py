"""What every config demands of its numbers."""

import re
from collections.abc import Mapping
from typing import Any, Literal

from mlx_vlm_mini.errors import CheckpointError

Activation = Literal["gelu", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu"]
NormType = Literal["layer_norm", "rms_norm", "rms_norm_float32", "rms_norm_bare"]
"""RMS norms are computed in the vectors' type, or in float32 with the weight before anything is rounded (Gemma 4), or
have no weight."""

_LAYERS = re.compile(r"layers?$|depth$|_pattern$|frequency$|^n_layer")
_LARGEST = 10**8  # of any size in a config: far above every model, and products of two still fit 64 bits


_MOST_LAYERS = 10_000  # of a part: far above every model, and lists of so many cost nothing


def check_layers(hf: Mapping[str, Any]) -> None:
    """Refuse numbers of layers that nobody can mean, wherever in a config.json, before anything is made of them."""
    waiting: list[Any] = [hf]
    while waiting:
        part = waiting.pop()
        for key, value in part.items() if isinstance(part, Mapping) else ():
            waiting.append(value)
            if isinstance(value, int) and _LAYERS.search(str(key)) and value > _MOST_LAYERS:
                raise CheckpointError(
                    f"config.json asks for {value} layers ({key}), at most {_MOST_LAYERS} are read: each takes "
                    "thousands of bytes before its weights"
                )


def check_sizes(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _LARGEST:
            raise CheckpointError(f"config.json: {name} must be a whole number from 1 to {_LARGEST}, not {value!r}")


def check_positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise CheckpointError(f"config.json: {name} must be a positive number, not {value!r}")


def check_flags(config: object, *names: str) -> None:
    for name in names:
        if not isinstance(getattr(config, name), bool):
            raise CheckpointError(f"config.json: {name} must be true or false, not {getattr(config, name)!r}")


def check_multiple(config: object, name: str, divisor: str) -> None:
    if getattr(config, name) % getattr(config, divisor):
        raise CheckpointError(
            f"config.json: {name} {getattr(config, name)} is not a multiple of {divisor} {getattr(config, divisor)}"
        )
