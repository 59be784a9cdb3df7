"""Files as torch.save writes them, and worse ones, without torch."""

import collections
import io
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np


class Name:
    """Pickled as a reference to `module.name`, as torch's pickles hold them."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


class Call:
    """Pickled as a call."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.function, self.arguments  # type: ignore[return-value]


class Storage:
    def __init__(self, kind: str, key: str, size: int) -> None:
        self.kind, self.key, self.size = kind, key, size


class Pickler(pickle._Pickler):  # the one in Python can write names that are not importable here
    dispatch = pickle._Pickler.dispatch.copy()

    def save(self, obj: object, save_persistent_id: bool = True) -> None:
        if isinstance(obj, Name):
            self.write(b"c" + f"{obj.module}\n{obj.name}\n".encode())
        elif isinstance(obj, Call) and isinstance(obj.function, Name):
            self.save(obj.function)
            super().save(obj.arguments)
            self.write(pickle.REDUCE)
        else:
            super().save(obj, save_persistent_id)

    def persistent_id(self, obj: object) -> object:
        if isinstance(obj, Storage):
            return ("storage", Name("torch", obj.kind), obj.key, "cpu", obj.size)
        return None


REBUILD = Name("torch._utils", "_rebuild_tensor_v2")


def tensor(
    *, key: str = "0", size: int = 4, offset: object = 0, shape: object = (2, 2), strides: object = (2, 1)
) -> Call:
    return Call(REBUILD, Storage("FloatStorage", key, size), offset, shape, strides, False, collections.OrderedDict())


def archive(
    file: Path, content: object, storages: dict[str, bytes] | None = None, compress: int = zipfile.ZIP_STORED
) -> Path:
    stream = io.BytesIO()
    Pickler(stream, 2).dump(content)
    with zipfile.ZipFile(file, "w", compress) as written:
        written.writestr("archive/data.pkl", stream.getvalue())
        for key, data in (
            storages if storages is not None else {"0": np.arange(4, dtype=np.float32).tobytes()}
        ).items():
            written.writestr(f"archive/data/{key}", data)
    return file


def write_bin(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write float32 arrays as tensors, each with a storage of its own."""
    content = {}
    for key, (name, array) in enumerate(arrays.items()):
        strides = tuple(stride // 4 for stride in array.strides)
        content[name] = tensor(key=str(key), size=array.size, shape=array.shape, strides=strides)
    archive(file, content, {str(key): array.tobytes() for key, array in enumerate(arrays.values())})
