"""Writing a model that was made or trained here as a checkpoint folder that other tools load, too."""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_vlm_mini.checkpoint import Checkpoint
from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.hub import SMALL_FILES
from mlx_vlm_mini.loading import Plan
from mlx_vlm_mini.weights import to_torch_layout


@contextmanager
def one_process(folder: Path) -> Iterator[None]:
    """Lock a folder, which is made where it is missing; the lock (flock) ends with the process.

    Raises:
        CheckpointError: another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        for left in reversed(range(10)):  # one that was just killed may take a moment to let go
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not left:
                    raise CheckpointError(f"another process is writing to {folder} right now") from None
                time.sleep(0.1)
        yield
    finally:
        os.close(lock)


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A hidden folder beside `folder`, to be written to; it becomes `folder` in one step.

    Where that is there already, each file of it is replaced in one step, config.json last, and others stay.
    """
    work = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        yield work
        if not folder.exists():
            work.rename(folder)
            return
        for file in sorted(work.iterdir(), key=lambda file: file.name == "config.json"):
            file.replace(folder / file.name)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_text(file: Path, text: str) -> None:
    """Replace a file of text in one step."""
    part = file.with_name(f"{file.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)


def save_tensors(file: Path, tensors: Mapping[str, mx.array], dtype: mx.Dtype | None) -> None:
    """Write tensors by the Hub's names in torch's layout, floats as `dtype`.

    Raises:
        CheckpointError: they cannot be written.
    """
    cast = {
        name: array.astype(dtype) if dtype is not None and mx.issubdtype(array.dtype, mx.floating) else array
        for name, array in tensors.items()
    }
    write_arrays(file, {name: mx.contiguous(array) for name, array in cast.items()}, "pt")


def write_arrays(file: Path, arrays: dict[str, mx.array], form: str) -> None:
    """Write safetensors; `form` says whose layout convolutions have.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        mx.save_safetensors(str(file), arrays, {"format": form})
    except RuntimeError as error:  # so MLX tells of a full disk
        raise CheckpointError(f"cannot write {file}: {error}; is the disk full?") from None


def save_trained(planned: Plan, folder: Path, dtype: mx.Dtype | None = None) -> None:
    """Write a trained model and the small files of the checkpoint that it came from; the folder is whole or not there.

    Tensors that the model does not use are taken over, so that the folder is whole for other tools.

    Args:
        planned: the checkpoint as it was loaded; its model is the trained one.
        dtype: type of the tensors in the file; by default each has the source's.

    Raises:
        CheckpointError: the source is quantized.
    """
    source: Checkpoint = planned.checkpoint
    if source.quantization is not None:
        raise CheckpointError(f"{source.folder} is quantized: train the original weights")
    trained = dict(tree_flatten(planned.model.parameters()))
    names = {theirs: ours for ours, theirs in planned.ours.items()}
    tensors = {}
    for theirs in source.tensors:
        ours = names.get(theirs, "")
        if ours in trained:
            array = to_torch_layout(ours, trained[ours])
            stored = source.read(theirs).dtype
            tensors[theirs] = array.astype(stored) if dtype is None else array
        else:
            array = source.read(theirs)
            tensors[theirs] = array.transpose(0, 3, 1, 2) if source.is_mlx and array.ndim == 4 else array
    with written_whole(folder) as work:
        save_tensors(work / "model.safetensors", tensors, dtype)
        for pattern in SMALL_FILES:
            for file in sorted(source.folder.glob(pattern)):
                if not file.name.endswith(".index.json"):
                    shutil.copyfile(file, work / file.name)
        config = json.dumps(source.config, indent=2, ensure_ascii=False)  # which may say more than the file
        (work / "config.json").write_text(config, encoding="utf-8")
