"""Write safetensors one tensor at a time: the header first, since every size is known, then the data as it comes."""

import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_vlm_mini.errors import CheckpointError

from .quantize import Output

SHARD_LIMIT = 5 * 10**9  # bytes a file, as on the Hub


def split_shards(outputs: Sequence[Output], limit: int = SHARD_LIMIT) -> list[list[Output]]:
    """Cut a list of outputs where a file would pass the limit; the parts of one tensor stay together."""
    shards: list[list[Output]] = [[]]
    size = 0
    for output in outputs:
        if shards[-1] and size + output.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(output)
        size += output.nbytes
    return shards


def write_tensors(
    folder: Path,
    outputs: Sequence[Output],
    progress: Callable[[int], None] | None = None,
    *,
    shard_limit: int = SHARD_LIMIT,
) -> None:
    """Write model.safetensors, or shards with an index, in MLX's format.

    Args:
        progress: called with the bytes that each tensor took.

    Raises:
        CheckpointError: a tensor cannot be read.
        OSError: the disk is full, or the folder cannot be written.
    """
    shards = split_shards(outputs, shard_limit)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        single = len(shards) == 1
        name = "model.safetensors" if single else f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map.update({entry[0]: name for output in shard for entry in output.entries})
        _write_file(folder / name, shard, progress)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(output.nbytes for output in outputs)},
            "weight_map": dict(sorted(weight_map.items())),
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _write_file(file: Path, outputs: Sequence[Output], progress: Callable[[int], None] | None) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    offset = 0
    for output in outputs:
        for name, dtype, shape in output.entries:
            size = Output(((name, dtype, shape),), output.make).nbytes
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
            offset += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        for output in outputs:
            try:
                arrays = output.make()
                mx.eval(*arrays)
            except RuntimeError as error:
                raise CheckpointError(f"cannot read {output.entries[0][0]}: {error}") from None
            for array, (name, _, shape) in zip(arrays, output.entries, strict=True):
                if tuple(array.shape) != shape:
                    raise CheckpointError(f"{name} came out as {list(array.shape)} instead of {list(shape)}")
                stream.write(_to_bytes(array))
            del arrays
            mx.clear_cache()
            if progress is not None:
                progress(output.nbytes)


def _to_bytes(array: mx.array) -> memoryview:
    """A tensor's bytes, row-major, little-endian."""
    flat = mx.contiguous(array).reshape(-1)
    if flat.dtype == mx.bfloat16:  # which numpy does not have
        flat = flat.view(mx.uint16)
    return np.array(flat, copy=False).data.cast("B")
