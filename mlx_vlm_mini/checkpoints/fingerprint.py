"""What a loaded model is, in one line: by its config and by all its weights."""

import hashlib

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_vlm_mini.model import VLM

_WIDTH = 4096  # numbers a row
_STEP = 2**22  # numbers at a time
_NUMBERS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}


def fingerprint(model: VLM) -> str:
    """SHA-256, in hexadecimal, of a model's config and of names, types, shapes and sums of its weights.

    Each weight's bits are taken as a whole number; a row of 4096 of them becomes one sum modulo 2^32 (2^64 for types of
    64 bits), with an odd factor for each place. So it costs one reading of the weights, on the device where they are,
    and one weight that changes in a row always shows. It is meant against mistakes, not against forgery.
    """
    digest = hashlib.sha256(repr(model.config).encode())
    factors = np.random.default_rng(0).integers(0, 2**31, _WIDTH, dtype=np.uint32) * 2 + 1
    for name, array in sorted(tree_flatten(model.parameters())):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        numbers = array.flatten().view(_NUMBERS[array.dtype.size])
        wide = numbers.dtype if array.dtype.size == 8 else mx.uint32
        places = mx.array(factors).astype(wide)
        for start in range(0, numbers.size, _STEP):
            part = numbers[start : start + _STEP].astype(wide)
            rows = mx.pad(part, (0, -part.size % _WIDTH)).reshape(-1, _WIDTH)
            digest.update(np.array((rows * places).sum(axis=-1)).tobytes())
    return digest.hexdigest()
