"""Checkpoints that several tests use: the goldens, copies of them to break, and one wide enough to quantize."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from checkpoints import PLAIN
from mlx.utils import tree_flatten
from reference import GOLDEN

from mlx_vlm_mini import load
from mlx_vlm_mini.checkpoint import open_checkpoint
from mlx_vlm_mini.families import find_family
from mlx_vlm_mini.loading import plan
from mlx_vlm_mini.model import VLM


@pytest.fixture(scope="session")
def llava() -> tuple[Any, Any]:
    """A tiny CLIP + Llama model and its processor."""
    return load(PLAIN)


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[..., Path]:
    """Copy a golden checkpoint, to be broken."""

    def copy(name: str = PLAIN.name) -> Path:
        folder = tmp_path / name
        shutil.copytree(GOLDEN / name, folder)
        (folder / "expected.npz").unlink()
        return folder

    return copy


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder as on the Hub (torch layout, bfloat16) whose decoder's widths are multiples of 64, one
    excepted: `down_proj` of width 96 divides by 32 only."""
    folder = tmp_path_factory.mktemp("wide") / "llava"
    shutil.copytree(PLAIN, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {
        "hidden_size": 128, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    }  # fmt: skip
    config["vision_config"] |= {"hidden_size": 96, "intermediate_size": 72}
    (folder / "config.json").write_text(json.dumps(config))
    names = plan(open_checkpoint(PLAIN)).ours
    model = VLM(find_family(config).config(config))
    mx.random.seed(11)
    tensors = {}
    for name, array in tree_flatten(model.parameters()):
        value = mx.random.normal(array.shape) * (0.3 if array.ndim == 1 else array.shape[-1] ** -0.5)
        value = value + (1 if "norm" in name and name.endswith("weight") else 0)
        value = value.transpose(0, 3, 1, 2) if value.ndim == 4 else value
        tensors[names[name]] = mx.contiguous(value).astype(mx.bfloat16)
        if "blocks.1." in name:  # the last block, whose output nothing reads, is in the file all the same
            tensors[names[name.replace("blocks.1.", "blocks.2.")]] = tensors[names[name]]
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "pt"})
    return folder
