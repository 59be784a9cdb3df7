"""Writing a model that was made or trained here as a checkpoint folder that other tools load, too."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_vlm_mini.checkpoints.folder import Checkpoint
from mlx_vlm_mini.checkpoints.hub import SMALL_FILES
from mlx_vlm_mini.checkpoints.load import Plan
from mlx_vlm_mini.checkpoints.weights import to_torch_layout
from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.files import written_whole


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
    if source.quantization is not None or any(getattr(info, "factor", None) for info in source.tensors.values()):
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
