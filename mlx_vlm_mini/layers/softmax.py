"""Log-probabilities as exact as float32 holds them."""

from collections.abc import Callable

import mlx.core as mx

_SUMMED = 512  # numbers that are added one after the other, at most


def log_softmax(logits: mx.array, exponential: Callable[[mx.array], mx.array] = mx.exp, unit: float = 1.0) -> mx.array:
    """float[..., n] -> float32[..., n]; lazy.

    On a CPU `mx.logsumexp` adds all n numbers one after the other, and is off by 1e-4 where they are 150,000.

    Args:
        exponential: gives `unit` times e^x.
    """
    logits = logits.astype(mx.float32)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    powers = exponential(shifted)
    powers = mx.pad(powers, [(0, 0)] * (powers.ndim - 1) + [(0, -powers.shape[-1] % _SUMMED)])
    total = powers.reshape(*powers.shape[:-1], -1, _SUMMED).sum(axis=-1).sum(axis=-1, keepdims=True)
    return shifted - mx.log(total if unit == 1 else total / unit)
