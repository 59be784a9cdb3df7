"""A checkpoint folder: its JSON files, and its tensors by the headers of its files.

Format: https://huggingface.co/docs/safetensors: 8 bytes with the header's length, a JSON header, then the tensors.
"""

import json
import os
import re
import struct
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Set
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.files import _LARGEST, _check_size, check_pointer, read_json

from .float8 import FACTOR, FLOAT8, UNREAD, decode, is_float8
from .pickled import MOST_AXES, Pickled, read_pickled

DTYPES: dict[str, tuple[mx.Dtype, int]] = {  # safetensors' name -> MLX's type, bytes an element
    "F32": (mx.float32, 4), "F16": (mx.float16, 2), "BF16": (mx.bfloat16, 2),
    "I64": (mx.int64, 8), "I32": (mx.int32, 4), "I16": (mx.int16, 2), "I8": (mx.int8, 1),
    "U64": (mx.uint64, 8), "U32": (mx.uint32, 4), "U16": (mx.uint16, 2), "U8": (mx.uint8, 1), "BOOL": (mx.bool_, 1),
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `start` and `end` are bytes from the start of the file.

    `factor` is the file and the name of what a tensor in float8 is multiplied by; its `dtype` is then the factor's.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    factor: tuple[Path, str] | None = None

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def is_float(self) -> bool:
        return self.dtype in ("F32", "F16", "BF16")


Header = tuple[Mapping[str, TensorInfo | Pickled], dict[str, str]]
"""Of a file: its tensors by name, and its metadata."""


def parse_header(header: bytes, file: Path, data_start: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors and metadata of a safetensors header whose data begins `data_start` bytes into the file.

    Raises:
        CheckpointError: the header does not follow the format.
    """
    tensors = {}
    try:
        _check_size(header, file)
        content = json.loads(header.decode(), object_pairs_hook=lambda pairs: _without_doubles(pairs, file))
        metadata = content.pop("__metadata__", None)
        for name, entry in content.items():
            shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
            numbers = (*shape, start, end)
            if len(shape) > MOST_AXES or not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
                raise ValueError("no whole numbers of 63 bits")
            dtype = str(entry["dtype"])
            check_dtype(dtype, name, file)
            if end - start != prod(shape) * (1 if dtype == FLOAT8 else DTYPES[dtype][1]):
                raise CheckpointError(f"{file}: the header gives {name} another size than its shape {list(shape)}")
            tensors[name] = TensorInfo(file, dtype, shape, data_start + start, data_start + end)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise CheckpointError(f"{file} has a broken safetensors header; download it again") from None
    front = TensorInfo(file, "U8", (0,), data_start, data_start)
    for before, after in pairwise([front, *sorted(tensors.values(), key=lambda info: (info.start, info.end))]):
        if after.start < before.end:
            raise CheckpointError(f"{file}: two tensors lie in one place; download it again")
        if after.start > before.end:
            raise CheckpointError(f"{file}: {after.start - before.end} bytes belong to no tensor; download it again")
    # A file that MLX saves without metadata says null.
    return tensors, metadata if isinstance(metadata, dict) else {}


def check_dtype(dtype: str, name: str, file: Path) -> None:
    """Raises CheckpointError where MLX has no such type."""
    if dtype not in DTYPES and dtype != FLOAT8:
        raise CheckpointError(f"{file}: tensor {name} has type {dtype}; MLX reads {', '.join(DTYPES)}")


def _without_doubles(pairs: list[tuple[str, Any]], file: Path) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        name = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise CheckpointError(f"{file} holds {name} twice; download it again")
    return content


def read_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors and metadata of a safetensors file; reads nothing but the header.

    Raises:
        CheckpointError: the file is missing, not of this format, or truncated.
    """
    try:
        with file.open("rb") as stream:
            start = stream.read(8)
            check_pointer(start, file)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 2**64
            if length > _LARGEST:
                raise CheckpointError(f"{file} is not a safetensors file, or is truncated; download it again")
            header = stream.read(length)
            size = stream.seek(0, 2)
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing; download it again") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from None
    if len(header) < length:
        raise CheckpointError(f"{file} is truncated: {size} of at least {8 + length} bytes; download it again")
    tensors, metadata = parse_header(header, file, 8 + length)
    end = max((info.end for info in tensors.values()), default=8 + length)
    if size < end:
        raise CheckpointError(f"{file} is truncated: {size} of {end} bytes; download it again")
    if size > end:
        raise CheckpointError(f"{file} has {size - end} bytes behind its last tensor; download it again")
    return tensors, metadata


def find_tensor_files(folder: Path) -> list[Path]:
    """The files of tensors, see `choose_tensor_files`.

    Raises:
        CheckpointError: an index is broken, or names a file outside the folder.
    """
    names = {file.name for file in folder.iterdir() if not file.is_dir()}
    return [folder / name for name in choose_tensor_files(names, lambda index: read_index(folder / index))]


def choose_tensor_files(names: Set[str], read: Callable[[str], list[str]]) -> list[str]:
    """Which of a folder's files hold its tensors: safetensors where there are any, else PyTorch's.

    Those that an index names count, the missing ones included, but not where none of them is there, or where
    `model.safetensors` stands beside: an index is often left behind when its shards were joined or cut anew. Without
    files of the usual names, other safetensors that are no adapters do.

    Args:
        names: the files that are there.
        read: gives what an index names.
    """
    stale: list[str] = []
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index, single = f"{stem}.{suffix}.index.json", f"{stem}.{suffix}"
        named = read(index) if index in names else []
        held = names & set(named)
        if named and len(held) == len(named):
            return named
        if single in names:
            return [single]
        if held:
            return named
        found = sorted(name for name in names if fnmatchcase(name, f"{stem}*.{suffix}"))
        if found:
            return found
        stale = stale or named
    others = (name for name in names if name.endswith(".safetensors") and not name.startswith(_OTHER_TENSORS))
    return sorted(others) or stale


_OTHER_TENSORS = ("adapter", "consolidated", "mm_projector", "optimizer", ".")
"""How safetensors begin that are no model of this form: Mistral's own, a trainer's, parts."""


def read_index(index: Path) -> list[str]:
    """The files that an index names.

    Raises:
        CheckpointError: it is broken, or names a file outside its folder.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    if any(Path(name).name != name or "\0" in name for name in names):
        raise CheckpointError(f"{index} names a file outside its folder")
    if any(len(name.encode(errors="replace")) > 255 for name in names):
        raise CheckpointError(f"{index} names a file that no file system has: {names[-1][:40]}...")
    return names


def what_else(names: Collection[str]) -> str | None:
    """What a folder is that holds no checkpoint, by its files, as the end of a sentence; None where none says."""
    gguf = min((name for name in names if name.lower().endswith(".gguf")), default=None)
    if gguf is not None:
        return f"holds a GGUF model ({gguf}), llama.cpp's format: give the repository that it was made from"
    if "adapter_config.json" in names:
        return (
            "holds adapters alone (LoRA): merge them into their model with peft (merge_and_unload) and give the result"
        )
    return None


@dataclass
class Checkpoint:
    """A folder with config.json, tensors and whatever else came with them.

    Attributes:
        folder: the folder, or the part of the Hub's cache that holds it.
        config: config.json.
        headers: of the tensor files, where they are known from elsewhere than the folder.
    """

    folder: Path
    config: dict[str, Any]
    headers: list[Header] | None = None
    _arrays: dict[Path, dict[str, mx.array]] = field(default_factory=dict, repr=False)

    @cached_property
    def _headers(self) -> list[Header]:
        if self.headers is not None:
            return self.headers
        return [
            (read_pickled(file), {"format": "pt"}) if file.suffix == ".bin" else read_header(file)
            for file in self._files()
        ]

    def _files(self) -> list[Path]:
        files = find_tensor_files(self.folder)
        missing = [file for file in files if not file.is_file()]
        if missing:
            raise CheckpointError(f"{missing[0]} is missing; download it again")
        if not files:
            reason = what_else([file.name for file in self.folder.iterdir()])
            raise CheckpointError(f"{self.folder} {reason or 'has neither model.safetensors nor pytorch_model.bin'}")
        return files

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo | Pickled]:
        """Every tensor by its name in the checkpoint; factors of tensors in float8 are no tensors of their own.

        Raises:
            CheckpointError: a file is missing or broken, two files hold one name, or a tensor in float8 has no factor.
        """
        found: dict[str, TensorInfo | Pickled] = {}
        for tensors, _ in self._headers:
            for name, info in tensors.items():
                if name in found:
                    raise CheckpointError(f"{info.file} and {found[name].file.name} both hold {name}")
                found[name] = info
        return _with_factors(found)

    @cached_property
    def is_mlx(self) -> bool:
        """Whether convolutions lie in MLX's layout: said by the files' metadata, never guessed from shapes."""
        return any(metadata.get("format") == "mlx" for _, metadata in self._headers)

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """The quantization of config.json in mlx-lm's form, None where nothing is quantized.

        Raises:
            CheckpointError: another tool quantized the checkpoint.
        """
        quantization, other = self.config.get("quantization"), self.config.get("quantization_config")
        if not isinstance(quantization, Mapping | None) or not isinstance(other, Mapping | None):
            raise CheckpointError(f"{self.folder}/config.json: quantization must be an object")
        if quantization is None and other is not None and not is_float8(other):
            if other.get("quant_method", "mlx") == "mlx" and {"bits", "group_size"} <= other.keys():
                return other
            method = other.get("quant_method", "unknown")
            raise CheckpointError(
                f"{self.folder} is quantized by '{method}', which MLX does not read; use the original weights"
            )
        return quantization

    def num_weights(self, name: str) -> int:
        """Weights that a tensor holds: of a quantized one as many as are packed into it, of its scales none."""
        info, (module, _, parameter) = self.tensors[name], name.rpartition(".")
        if f"{module}.scales" not in self.tensors:
            return prod(info.shape)
        if parameter in ("scales", "biases"):
            return 0
        settings = self.quantization or {}
        own = settings.get(module)
        bits = (own if isinstance(own, Mapping) else settings).get("bits", 4)
        if type(bits) is not int or not 1 <= bits <= 32:
            raise CheckpointError(f"{self.folder}/config.json: weights have 1 to 32 bits, not {bits!r}")
        return prod(info.shape) * 32 // bits if parameter == "weight" else prod(info.shape)

    def read(self, name: str) -> mx.array:
        """A tensor, read when it is evaluated; no reference to it is kept here, so its memory is the caller's."""
        info = self.tensors[name]
        if isinstance(info, Pickled):
            return info.read()
        array = self._take(info.file, name)
        if info.factor is None:
            return array
        return decode(array) * self._take(*info.factor).astype(mx.float32).reshape(())

    def _take(self, file: Path, name: str) -> mx.array:
        if name not in self._arrays.get(file, {}):
            try:
                self._arrays[file] = cast(dict[str, mx.array], mx.load(str(file), format="safetensors"))
            except (RuntimeError, ValueError, TypeError) as error:
                raise CheckpointError(f"MLX cannot read {file}: {error}") from None
        if name not in self._arrays[file]:
            raise CheckpointError(f"{file} no longer holds {name}: it was changed while it was read")
        return self._arrays[file].pop(name)


def _with_factors(tensors: dict[str, TensorInfo | Pickled]) -> dict[str, TensorInfo | Pickled]:
    """Tensors, those in float8 with their factors, which are then no tensors of their own."""
    found = {name: info for name, info in tensors.items() if isinstance(info, TensorInfo) and info.dtype == FLOAT8}
    if not found:
        return tensors
    kept, beside = dict(tensors), set()
    for name, info in found.items():
        factor = tensors.get(name + FACTOR)
        if not isinstance(factor, TensorInfo) or not factor.is_float or prod(factor.shape) != 1:
            raise CheckpointError(f"{info.file}: {name} has type {FLOAT8} and no single {name}{FACTOR} beside it")
        kept[name] = replace(info, dtype=factor.dtype, factor=(factor.file, name + FACTOR))
        beside |= {name + FACTOR, *(f"{name.rpartition('.')[0]}.{other}" for other in UNREAD)}
    return {name: info for name, info in kept.items() if name not in beside}


def is_folder(path: Path) -> bool:
    """Whether it is one; not where the name is too long for any, for which Path's own raises."""
    return os.path.isdir(path)  # noqa: PTH112


def open_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint from a folder on disk.

    Raises:
        CheckpointError: the folder or its config.json is missing or broken.
    """
    if not is_folder(folder):
        if not os.path.exists(folder):  # noqa: PTH110 - never raises
            raise CheckpointError(f"folder not found: {folder}")
        raise CheckpointError(f"checkpoint folder {folder} {what_else([folder.name]) or 'is a file, not a folder'}")
    if not (folder / "config.json").is_file():
        reason = what_else([file.name for file in folder.iterdir()])
        raise CheckpointError(f"{folder} {reason or 'has no config.json: it is not a checkpoint folder'}")
    _check_links(folder)
    return Checkpoint(folder, read_json(folder / "config.json"))


_BLOB = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")


def _is_blob(file: Path) -> bool:
    """Whether a file lies where the Hub's cache keeps those of a model."""
    blobs = file.parent
    return blobs.name == "blobs" and blobs.parent.name.startswith("models--") and bool(_BLOB.fullmatch(file.name))


def _check_links(folder: Path) -> None:
    """Refuse a folder with links that lead out of it: what they name would be read, and copied by a conversion.

    The files of a model that the Hub's cache keeps in its `blobs` are none of these.
    """
    try:
        whole = folder.resolve()
        parts = [part for part in folder.iterdir() if part.is_dir() and not part.is_symlink()]
        for file in [each for part in (folder, *parts) for each in part.iterdir()]:
            if not file.is_symlink():
                continue
            target = file.resolve()
            if not target.is_relative_to(whole) and not _is_blob(target):
                raise CheckpointError(
                    f"{file} is a link to {target}, outside its folder: put the file itself in its place"
                )
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise CheckpointError(f"cannot read {folder}: {getattr(error, 'strerror', None) or error}") from None
