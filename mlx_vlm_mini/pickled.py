"""PyTorch's `.bin` files, read without torch and without running anything.

Format: torch/serialization.py of pytorch/pytorch: a zip archive without compression that holds a pickle, whose tensors
refer to storages by name, and each storage as a file. A pickle can call any function there is; here it gets stand-ins
for tensors, storages and plain containers, and everything else is refused by name.
"""

import collections
import io
import pickle
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any, NoReturn

import mlx.core as mx
import numpy as np

from .errors import CheckpointError

_PICKLE_LIMIT = 100 * 2**20  # bytes; that of a model of 70 billion weights has less than one million

_STORAGES = {  # torch's storage class -> safetensors' type, numpy's type of the same size
    "FloatStorage": ("F32", np.float32), "HalfStorage": ("F16", np.float16), "BFloat16Storage": ("BF16", np.uint16),
    "LongStorage": ("I64", np.int64), "IntStorage": ("I32", np.int32), "ShortStorage": ("I16", np.int16),
    "CharStorage": ("I8", np.int8), "ByteStorage": ("U8", np.uint8), "BoolStorage": ("BOOL", np.bool_),
}  # fmt: skip


@dataclass(frozen=True)
class Pickled:
    """A tensor in a `.bin` file.

    Attributes:
        file: the archive.
        dtype: safetensors' name of its type.
        start: byte of the file at which its first element lies.
        strides: in elements.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int
    numpy_type: type[np.generic]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * np.dtype(self.numpy_type).itemsize

    @property
    def is_float(self) -> bool:
        return self.dtype in ("F32", "F16", "BF16")

    @property
    def span(self) -> int:
        """Elements from the first to the last."""
        steps = zip(self.shape, self.strides, strict=True)
        return 0 if 0 in self.shape else 1 + sum((side - 1) * stride for side, stride in steps)

    def read(self) -> mx.array:
        """The tensor; copies it out of the file."""
        flat = np.zeros(0, dtype=self.numpy_type)
        if self.span:
            flat = np.memmap(self.file, dtype=self.numpy_type, mode="r", offset=self.start, shape=(self.span,))
        strides = [flat.itemsize * stride for stride in self.strides]
        array = mx.array(np.array(np.lib.stride_tricks.as_strided(flat, self.shape, strides)))
        return array.view(mx.bfloat16) if self.dtype == "BF16" else array


@dataclass(frozen=True)
class _Storage:
    kind: str
    start: int
    size: int  # elements


class _StorageClass:
    def __init__(self, kind: str) -> None:
        self.kind = kind


class _Unpickler(pickle.Unpickler):
    """Knows tensors, their storages and ordered dictionaries; calls nothing of what the pickle names."""

    def __init__(self, data: bytes, file: Path, storages: Mapping[str, tuple[int, int]]) -> None:
        super().__init__(io.BytesIO(data))
        self.file = file
        self.storages = storages

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _StorageClass(name)
        allowed = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): self._rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
        }
        if (module, name) not in allowed:
            raise CheckpointError(f"{self.file} asks for {module}.{name}, which is no tensor: it was not run")
        return allowed[module, name]

    def persistent_load(self, reference: Any) -> _Storage:
        tag, kind, key, _, size = reference
        if tag != "storage" or not isinstance(kind, _StorageClass) or key not in self.storages:
            raise CheckpointError(f"{self.file} refers to something that is no storage of its own")
        start, nbytes = self.storages[key]
        itemsize = np.dtype(_STORAGES[kind.kind][1]).itemsize
        if not isinstance(size, int) or not 0 <= size * itemsize <= nbytes:
            raise CheckpointError(f"{self.file} is truncated, or lies about the size of storage {key}")
        return _Storage(kind.kind, start, size)

    def _rebuild_tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Pickled:
        if not isinstance(storage, _Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
            raise CheckpointError(f"{self.file} holds a tensor without a storage")
        numbers = (offset, *shape, *strides)
        if len(shape) != len(strides) or not all(type(number) is int and number >= 0 for number in numbers):
            raise CheckpointError(f"{self.file} holds a tensor whose shape makes no sense")
        dtype, numpy_type = _STORAGES[storage.kind]
        start = storage.start + offset * np.dtype(numpy_type).itemsize
        tensor = Pickled(self.file, dtype, shape, strides, start, numpy_type)
        if offset + tensor.span > storage.size or prod(shape) > storage.size:
            raise CheckpointError(f"{self.file} holds a tensor that reaches beyond its storage")
        return tensor


def read_pickled(file: Path, stream: IO[bytes] | None = None) -> dict[str, Pickled]:
    """The tensors of a `.bin` file by name; reads the pickle, not the tensors.

    Args:
        stream: the file's content, where it is elsewhere.

    Raises:
        CheckpointError: the file is broken, of the form before torch 1.6, or holds anything but tensors.
    """
    try:
        with zipfile.ZipFile(file if stream is None else stream) as archive:
            pickles = [entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl")]
            if len(pickles) != 1 or pickles[0].file_size > _PICKLE_LIMIT:
                _refuse(file)
            folder = pickles[0].filename.removesuffix("data.pkl")
            storages = {}
            for entry in archive.infolist():
                if entry.filename.startswith(f"{folder}data/"):
                    if entry.compress_type != zipfile.ZIP_STORED:
                        _refuse(file)
                    key = entry.filename.removeprefix(f"{folder}data/")
                    storages[key] = (_data_start(archive, entry), entry.file_size)
            content = _Unpickler(archive.read(pickles[0]), file, storages).load()
    except zipfile.BadZipFile:
        _refuse(file)
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{file} holds a broken pickle: {error}") from None
    except (RecursionError, MemoryError, struct.error, OverflowError):
        raise CheckpointError(f"{file} holds a broken pickle") from None
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{file} holds no dictionary of tensors")
    others = [name for name, value in content.items() if not isinstance(name, str) or not isinstance(value, Pickled)]
    if others:
        raise CheckpointError(f"{file} holds more than tensors: {others[0]!r}")
    return dict(content)


def _refuse(file: Path) -> NoReturn:
    raise CheckpointError(f"{file} is no checkpoint of torch 1.6 or later, or is truncated; download it again")


def _data_start(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> int:
    """Byte at which an uncompressed entry's data begins: behind its local header, with an extra field of its own."""
    assert archive.fp is not None
    archive.fp.seek(entry.header_offset)
    header = archive.fp.read(30)
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    return int(entry.header_offset + 30 + name_length + extra_length)
