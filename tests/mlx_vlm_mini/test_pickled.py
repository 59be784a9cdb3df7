"""PyTorch's `.bin` files: every form of tensor, and no form of code."""

import collections
import json
import os
import pickle
import zipfile

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import PHOTO, PLAIN
from pickles import REBUILD, Call, Name, archive, tensor, write_bin
from reference import GOLDEN

from mlx_vlm_mini import load
from mlx_vlm_mini.checkpoints.pickled import read_pickled
from mlx_vlm_mini.errors import CheckpointError


def test_what_torch_wrote():
    """tests/golden/tensors.bin is torch's own."""
    tensors = read_pickled(GOLDEN / "tensors.bin")
    with np.load(GOLDEN / "tensors.npz") as expected:
        assert set(tensors) == set(expected)
        for name, array in expected.items():
            own = tensors[name].read()
            assert own.shape == array.shape == tensors[name].shape, name
            np.testing.assert_array_equal(np.array(own.astype(mx.float32)), array, name)
    types = {name: tensors[name].dtype for name in ("whole", "bfloat16", "float16", "int64", "uint8", "bool")}
    assert list(types.values()) == ["F32", "BF16", "F16", "I64", "U8", "BOOL"]


def test_what_this_file_writes_is_read(tmp_path):
    tensors = read_pickled(archive(tmp_path / "x.bin", {"a": tensor()}))
    assert tensors["a"].read().tolist() == [[0, 1], [2, 3]]
    nested = read_pickled(archive(tmp_path / "y.bin", {"state_dict": {"a": tensor(strides=(1, 2))}}))
    assert nested["a"].read().tolist() == [[0, 2], [1, 3]]


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"), ("posix", "system"), ("builtins", "eval"), ("builtins", "exec"), ("subprocess", "Popen"),
        ("builtins", "getattr"), ("operator", "attrgetter"), ("importlib", "import_module"), ("torch", "load"),
        ("torch.hub", "load"), ("torch._utils", "_rebuild_qtensor"), ("collections", "Counter"), ("__builtin__", "eval"),
        ("functools", "partial"), ("pickle", "loads"), ("runpy", "run_path"), ("webbrowser", "open"), ("torch", "os.system"),
    ],
)  # fmt: skip
def test_code_is_refused_by_name_and_not_run(tmp_path, module, name):
    file = archive(tmp_path / "x.bin", {"a": Call(Name(module, name), "touch " + str(tmp_path / "ran"))})
    with pytest.raises(CheckpointError, match=f"asks for {module}.{name}, which is no tensor: it was not run"):
        read_pickled(file)
    assert not (tmp_path / "ran").exists()


def test_a_real_exploit(tmp_path):
    class Evil:
        def __reduce__(self) -> object:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    with zipfile.ZipFile(tmp_path / "x.bin", "w") as written:
        written.writestr("archive/data.pkl", pickle.dumps({"a": Evil()}))
    with pytest.raises(CheckpointError, match="system, which is no tensor"):
        read_pickled(tmp_path / "x.bin")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": tensor(shape=(3, 2))}, "reaches beyond its storage"),
        ({"a": tensor(offset=1)}, "reaches beyond its storage"),
        ({"a": tensor(offset=-1)}, "shape makes no sense"),
        ({"a": tensor(shape=(2, -2))}, "shape makes no sense"),
        ({"a": tensor(shape=(2, True))}, "shape makes no sense"),
        ({"a": tensor(strides=(2,))}, "shape makes no sense"),
        ({"a": tensor(shape=[2, 2])}, "without a storage"),
        ({"a": tensor(size=5)}, "is truncated, or lies"),
        ({"a": tensor(size=10**30)}, "is truncated, or lies"),
        ({"a": tensor(key="7")}, "no storage of its own"),
        ({"a": tensor(shape=(10**9, 10**9), strides=(0, 0))}, "reaches beyond its storage"),
        ({"a": 3}, "holds more than tensors: 'a'"),
        ({3: tensor()}, "holds more than tensors: 3"),
        ([tensor()], "holds no dictionary of tensors"),
        ({"a": Call(REBUILD, 1, 0, (1,), (1,))}, "without a storage"),
        ({"a": Call(REBUILD)}, "broken pickle"),
        ({"a": Call(collections.OrderedDict, 5)}, "broken pickle"),
    ],
)
def test_lies(tmp_path, content, message):
    file = archive(tmp_path / "x.bin", content)
    with pytest.raises(CheckpointError, match=message):
        read_pickled(file)


def test_broken_files(tmp_path):
    good = archive(tmp_path / "x.bin", {"a": tensor()}).read_bytes()
    for name, data in (("empty", b""), ("text", b"hello"), ("old", pickle.dumps(0)), ("cut", good[: len(good) // 2])):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(CheckpointError, match="no checkpoint of torch 1.6 or later, or is truncated"):
            read_pickled(tmp_path / name)
    with pytest.raises(CheckpointError, match="no checkpoint of torch"):
        read_pickled(archive(tmp_path / "z.bin", {"a": tensor()}, compress=zipfile.ZIP_DEFLATED))


@pytest.mark.parametrize("shards", [1, 2])
def test_a_checkpoint_that_has_nothing_else(copy_of, shards):
    folder = copy_of()
    tensors = {name: np.array(array) for name, array in mx.load(str(folder / "model.safetensors")).items()}
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = ["pytorch_model.bin"] if shards == 1 else [f"pytorch_model-0000{i + 1}-of-00002.bin" for i in range(2)]
    for i, file in enumerate(files):
        chosen = names[i::shards]
        write_bin(folder / file, {name: tensors[name] for name in chosen})
    if shards > 1:
        index = {"weight_map": {name: files[i % 2] for i, name in enumerate(names)}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    inputs = load(PLAIN)[1]("Hi", [PHOTO])
    assert (load(folder)[0](inputs) == load(PLAIN)[0](inputs)).all()
