"""Write safetensors one tensor at a time: the header first, since every size is known, then the data as it comes."""

import hashlib
import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_vlm_mini.errors import CheckpointError

from .quantize import Output
from .work import Workplace

CACHE_LIMIT = 2**28  # bytes that MLX may keep for tensors of the same size
SHARD_LIMIT = 10**9  # bytes a file: what a conversion that was killed has to do again at most


def split_shards(outputs: Sequence[Output], limit: int = SHARD_LIMIT) -> dict[str, list[Output]]:
    """Files by name: cut where one would pass the limit; the parts of one tensor stay together."""
    shards: list[list[Output]] = [[]]
    size = 0
    for output in outputs:
        if shards[-1] and size + output.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(output)
        size += output.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, start=1)}


def write_tensors(
    work: Workplace,
    outputs: Sequence[Output],
    progress: Callable[[int], None] | None = None,
    *,
    shard_limit: int = SHARD_LIMIT,
) -> None:
    """Write model.safetensors, or shards with an index, in MLX's format. What is finished already stays.

    Args:
        progress: called with the bytes that each tensor took.

    Raises:
        CheckpointError: a tensor cannot be read.
        OSError: the disk is full, or the folder cannot be written.
    """
    shards = split_shards(outputs, shard_limit)
    limit = mx.set_cache_limit(CACHE_LIMIT)  # clearing the cache after each tensor would wait for the next one
    try:
        _write_files(work, shards, progress)
    finally:
        mx.set_cache_limit(limit)
    if len(shards) > 1:
        weight_map = {entry[0]: name for name, shard in shards.items() for output in shard for entry in output.entries}
        index = {
            "metadata": {"total_size": sum(output.nbytes for output in outputs)},
            "weight_map": dict(sorted(weight_map.items())),
        }
        (work.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _write_files(
    work: Workplace, shards: Mapping[str, Sequence[Output]], progress: Callable[[int], None] | None
) -> None:
    for name, shard in shards.items():
        if not work.is_finished(name):
            work.add(name, lambda part, shard=shard: _write_file(part, shard, progress))  # type: ignore[misc]
        elif progress is not None:
            progress(sum(output.nbytes for output in shard))


def _write_file(file: Path, outputs: Sequence[Output], progress: Callable[[int], None] | None) -> str:
    """Write a file and give its sha256."""
    header: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    offset = 0
    for output in outputs:
        for name, dtype, shape in output.entries:
            size = Output(((name, dtype, shape),), output.make).nbytes
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
            offset += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    digest = hashlib.sha256()
    with file.open("wb") as stream:

        def write(data: bytes | memoryview) -> None:
            try:
                stream.write(data)
            except OSError as error:
                error.filename = file  # which only opening a file tells
                raise
            digest.update(data)

        write(struct.pack("<Q", len(encoded)) + encoded)
        for output, arrays in _computed(outputs):
            for array, (name, _, shape) in zip(arrays, output.entries, strict=True):
                if tuple(array.shape) != shape:
                    raise CheckpointError(f"{name} came out as {list(array.shape)} instead of {list(shape)}")
                write(_to_bytes(array))
            if progress is not None:
                progress(output.nbytes)
    return digest.hexdigest()


@cache
def _streams() -> tuple[mx.Stream, mx.Stream]:
    """Two that take turns: MLX runs each on a thread of its own, which never ends, and quantizes on a single one."""
    return mx.new_stream(mx.default_device()), mx.new_stream(mx.default_device())


def _computed(outputs: Sequence[Output]) -> Iterator[tuple[Output, tuple[mx.array, ...]]]:
    """Each output's tensors, the next ones being computed while one is written."""
    before: tuple[Output, tuple[mx.array, ...]] | None = None
    for number, output in enumerate(outputs):
        try:
            with mx.stream(_streams()[number % 2]):
                arrays = output.make()
                mx.async_eval(*arrays)
            if before is not None:
                yield before
        except RuntimeError as error:
            raise CheckpointError(f"cannot compute {output.entries[0][0]}: {error}") from None
        before = output, arrays
        del arrays
    if before is not None:
        yield before


def _to_bytes(array: mx.array) -> memoryview:
    """A tensor's bytes, row-major, little-endian."""
    flat = mx.contiguous(array).reshape(-1)
    if flat.dtype == mx.bfloat16:  # which numpy does not have
        flat = flat.view(mx.uint16)
    return np.array(flat, copy=False).data.cast("B")
