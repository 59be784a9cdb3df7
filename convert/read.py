"""Tensors as they leave the source: checked for NaN and infinity, and unpacked where they are quantized."""

from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_vlm_mini.checkpoints.folder import Checkpoint
from mlx_vlm_mini.checkpoints.pickled import Pickled
from mlx_vlm_mini.errors import CheckpointError

_LARGEST = {mx.float16: 0x7BFF, mx.bfloat16: 0x7F7F, mx.float32: 0x7F7FFFFF}
"""The bits of the largest finite number: as whole numbers, those of infinity and of every NaN are larger."""


_BOUNDS = (".input_min", ".input_max", ".output_min", ".output_max")
"""How tensors are called that may be infinite: bounds of what enters and leaves a layer."""


@cache
def _stream() -> mx.Stream:
    """Reading waits for no computation. One for all, for a stream is a thread that never ends."""
    return mx.new_stream(mx.cpu)


class Reader:
    """Reads a checkpoint's tensors for a conversion.

    Attributes:
        not_finite: names of tensors that hold NaN or infinity, to how many; filled while reading.
    """

    def __init__(self, checkpoint: Checkpoint, *, allow_nan: bool = False) -> None:
        self.checkpoint = checkpoint
        self.not_finite: dict[str, int] = {}
        self._allow_nan = allow_nan

    def read(self, name: str) -> mx.array:
        """A tensor, in memory.

        Raises:
            CheckpointError: it holds NaN or infinity and that was not allowed, or the file ends before it.
        """
        try:
            with mx.stream(_stream()):
                array = self.checkpoint.read(name)
                mx.eval(array)
        except RuntimeError as error:
            raise CheckpointError(f"cannot read {name}: {error}") from None
        if not name.endswith(_BOUNDS) and (count := count_not_finite(array)):
            self.not_finite[name] = count
            if not self._allow_nan:
                raise CheckpointError(
                    f"{name} holds {count:,} {'values that are' if count > 1 else 'value that is'} NaN or infinite: "
                    "the source is broken; --allow-nan converts it all the same"
                )
        return array

    def unpack(self, module: str, settings: dict[str, Any], dtype: mx.Dtype) -> mx.array:
        """The weight of a quantized module in floating point: computed in float32, so that only `dtype` rounds."""
        weight, scales = self.read(f"{module}.weight"), self.read(f"{module}.scales")
        if settings["mode"] != "affine":
            return mx.dequantize(weight, scales, **settings).astype(dtype)
        biases = self.read(f"{module}.biases").astype(mx.float32)
        return mx.dequantize(weight, scales.astype(mx.float32), biases, **settings).astype(dtype)


def are_equal(checkpoint: Checkpoint, name: str, other: str) -> bool:
    """Whether two tensors are the same, byte for byte. Of headers alone, from the Hub, equal shapes have to do."""
    one, two = checkpoint.tensors[name], checkpoint.tensors[other]
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    if isinstance(one, Pickled) or isinstance(two, Pickled):
        return one == two
    if one.factor != two.factor:
        return False
    if not one.file.is_file():
        return True
    left, right = (np.memmap(each.file, mode="r", offset=each.start, shape=(each.nbytes,)) for each in (one, two))
    step = 2**26
    return all(np.array_equal(left[i : i + step], right[i : i + step]) for i in range(0, one.nbytes, step))


def count_not_finite(array: mx.array) -> int:
    """How many numbers are NaN or infinite.

    Looks at the bits as whole numbers: the largest of them as signed and as unsigned tells it for positive and for
    negative numbers, many times faster than `mx.isfinite` on a CPU and without memory of its own.
    """
    if array.dtype not in _LARGEST or not array.size:
        return 0
    largest, unsigned = _LARGEST[array.dtype], np.uint32 if array.dtype == mx.float32 else np.uint16
    bits = np.array(array.view(mx.uint32 if unsigned is np.uint32 else mx.uint16), copy=False)
    sign = 1 << (8 * bits.itemsize - 1)
    if bits.view(np.dtype(unsigned).name.removeprefix("u")).max() <= largest and bits.max() <= sign | largest:
        return 0
    return int((bits & (sign - 1) > largest).sum())
