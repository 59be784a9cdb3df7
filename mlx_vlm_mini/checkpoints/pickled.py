"""PyTorch's `.bin` files, read without torch and without running anything.

Format: torch/serialization.py of pytorch/pytorch: a zip archive without compression that holds a pickle, whose tensors
refer to storages by name, and each storage as a file. A pickle can call any function there is, so Python's own reader
of them is not used: one of ours follows the opcodes that tensors and plain containers need, and refuses all others by
name.
"""

import lzma
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any, NoReturn

import mlx.core as mx
import numpy as np

from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.files import check_pointer

_PICKLE_LIMIT = 16 * 2**20  # bytes; that of a model of 70 billion weights has less than one million
_MOST_STEPS = 1_000_000  # opcodes; a tensor takes about 35
MOST_AXES = 16  # of a tensor; products of more numbers only waste time

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
            try:
                flat = np.memmap(self.file, dtype=self.numpy_type, mode="r", offset=self.start, shape=(self.span,))
            except (OSError, ValueError) as error:
                raise CheckpointError(f"cannot read {self.file}: {error}") from None
        strides = [flat.itemsize * stride for stride in self.strides]
        array = mx.array(np.array(np.lib.stride_tricks.as_strided(flat, self.shape, strides)))
        return array.view(mx.bfloat16) if self.dtype == "BF16" else array


@dataclass(frozen=True)
class _Storage:
    kind: str
    start: int
    size: int  # elements


class _Mark:
    """Stands for a name that a pickle may ask for; nothing can be done to it but what `_Reader` does."""

    def __init__(self, what: str) -> None:
        self.what = what


_REBUILD, _PARAMETER, _ORDERED = _Mark("tensor"), _Mark("parameter"), _Mark("ordered dictionary")
_ALLOWED = {
    ("collections", "OrderedDict"): _ORDERED,
    ("torch._utils", "_rebuild_tensor_v2"): _REBUILD,
    ("torch._utils", "_rebuild_parameter"): _PARAMETER,
    **{("torch", kind): _Mark(kind) for kind in _STORAGES},
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = frozenset({"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"})
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Reader:
    """Follows the opcodes that torch.save writes; it has no way to import, call or change anything."""

    def __init__(self, file: Path, storages: Mapping[str, tuple[int, int]]) -> None:
        self.file = file
        self.storages = storages
        self.stack: list[Any] = []
        self.marks: list[int] = []  # places on the stack
        self.memo: dict[int, Any] = {}

    def read(self, data: bytes) -> Any:
        """What the pickle holds.

        Raises:
            CheckpointError: it asks for anything but tensors, or has more than `_MOST_STEPS` opcodes.
        """
        for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if number == _MOST_STEPS:
                raise CheckpointError(f"{self.file} has more than {_MOST_STEPS:,} steps in its pickle: it was not read")
            if opcode.name == "STOP":
                (content,) = self.stack
                return content
            self._step(opcode.name, argument)
        raise ValueError("it has no end")

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name == "TUPLE":
            stack.append(tuple(self._since_mark()))
        elif name in _TUPLES:
            stack.append(tuple([stack.pop() for _ in range(_TUPLES[name])][::-1]))
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name in ("SETITEM", "SETITEMS", "APPEND", "APPENDS"):
            self._fill(name)
        elif name in ("GLOBAL", "INST"):
            stack.append(self._find(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            last, module = stack.pop(), stack.pop()
            stack.append(self._find(str(module), str(last)))
        elif name == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif name == "REDUCE":
            arguments = stack.pop()
            stack.append(self._make(stack.pop(), arguments))
        elif name == "BUILD":
            _, target = stack.pop(), stack[-1]  # a model's dictionary has notes about its modules: not read
            if not isinstance(target, dict):
                raise CheckpointError(f"{self.file} sets the insides of what is no dictionary: it was not done")
        elif name not in ("PROTO", "FRAME"):
            raise CheckpointError(f"{self.file} has opcode {name} in its pickle, which no tensor needs: it was not run")

    def _since_mark(self) -> list[Any]:
        start = self.marks.pop()
        if start > len(self.stack):
            raise ValueError("a mark beyond the stack")
        taken = self.stack[start:]
        del self.stack[start:]
        return taken

    def _fill(self, name: str) -> None:
        many = name.endswith("S")
        count = 2 if name.startswith("SET") else 1
        taken = self._since_mark() if many else [self.stack.pop() for _ in range(count)][::-1]
        target = self.stack[-1]
        if count == 1 and isinstance(target, list):
            target.extend(taken)
        elif count == 2 and isinstance(target, dict):
            self._put(target, zip(taken[::2], taken[1::2], strict=True))
        else:
            raise ValueError("entries for something that takes none")

    def _put(self, target: dict[Any, Any], pairs: Iterable[tuple[Any, Any]]) -> None:
        for key, value in pairs:
            if not isinstance(key, str | int):  # a nest of tuples would take for ever to hash
                raise CheckpointError(f"{self.file} holds more than tensors: a name that is a {type(key).__name__}")
            target[key] = value

    def _find(self, module: str, name: str) -> _Mark:
        if (module, name) not in _ALLOWED:
            raise CheckpointError(f"{self.file} asks for {module}.{name}, which is no tensor: it was not run")
        return _ALLOWED[module, name]

    def _make(self, what: Any, arguments: Any) -> Any:
        if not isinstance(what, _Mark) or not isinstance(arguments, tuple):
            raise ValueError("a call of something that is no function")
        if what is _REBUILD:
            return self._tensor(*arguments)
        if what is _PARAMETER:
            return arguments[0]
        if what is not _ORDERED:
            raise ValueError("a call of a type")
        made: dict[Any, Any] = {}
        for entries in arguments:
            self._put(made, ((key, value) for key, value in entries))
        return made

    def _storage(self, reference: Any) -> _Storage:
        tag, kind, key, _, size = reference
        known = isinstance(kind, _Mark) and kind.what in _STORAGES
        if tag != "storage" or not known or not isinstance(key, str) or key not in self.storages:
            raise CheckpointError(f"{self.file} refers to something that is no storage of its own")
        start, nbytes = self.storages[key]
        itemsize = np.dtype(_STORAGES[kind.what][1]).itemsize
        if not isinstance(size, int) or not 0 <= size * itemsize <= nbytes:
            raise CheckpointError(f"{self.file} is truncated, or lies about the size of storage {key}")
        return _Storage(kind.what, start, size)

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Pickled:
        if not isinstance(storage, _Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
            raise CheckpointError(f"{self.file} holds a tensor without a storage")
        numbers = (offset, *shape, *strides)
        whole = len(shape) <= MOST_AXES and all(type(number) is int and 0 <= number < 2**63 for number in numbers)
        if len(shape) != len(strides) or not whole:
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
    if stream is None and file.is_file():
        with file.open("rb") as begin:
            check_pointer(begin.read(100), file)
    try:
        with zipfile.ZipFile(file if stream is None else stream) as archive:
            names = archive.namelist()
            pickles = [entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl")]
            if len(pickles) != 1 or pickles[0].file_size > _PICKLE_LIMIT or len(set(names)) < len(names):
                _refuse(file)
            folder = pickles[0].filename.removesuffix("data.pkl")
            storages = {}
            for entry in archive.infolist():
                if entry.filename.startswith(f"{folder}data/"):
                    if entry.compress_type != zipfile.ZIP_STORED:
                        _refuse(file)
                    key = entry.filename.removeprefix(f"{folder}data/")
                    storages[key] = (_data_start(archive, entry), entry.file_size)
            assert archive.fp is not None
            size = archive.fp.seek(0, 2)
            if any(start + nbytes > size for start, nbytes in storages.values()):
                _refuse(file)
            content = _Reader(file, storages).read(archive.read(pickles[0]))
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, zlib.error, lzma.LZMAError):  # or it is encrypted
        _refuse(file)
    except (EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{file} holds a broken pickle: {error}") from None
    except (MemoryError, struct.error, OverflowError):
        raise CheckpointError(f"{file} holds a broken pickle") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from None
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
