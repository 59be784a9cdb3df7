"""Checkpoints that several tests use: the goldens, copies of them to break, and one wide enough to quantize."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from checkpoints import PLAIN
from hub import serve
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


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[Any, Callable[..., subprocess.CompletedProcess[str]]]]:
    """A stand-in for the Hub with two models, and the program run with it as its Hub and an empty cache."""
    folder = tmp_path / "served"
    shutil.copytree(PLAIN, folder)
    (folder / "modeling_evil.py").write_text("1/0")
    (folder / "pytorch_model.bin").write_bytes(b"0" * 1000)
    program = Path(sys.executable).with_name("mlx-vlm-mini")
    with serve() as (address, kind):
        kind.folders.update({"tiny/llava": folder, "tiny/llava-in-shards": GOLDEN / "llava-clip-llama-layers"})
        kind.gated.add("meta/secret")

        def run(*arguments: object, program: Path = program, **environment: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [program, *map(str, arguments)], capture_output=True, text=True, timeout=60, cwd=tmp_path,
                env={**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache"),
                     "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **environment},
            )  # fmt: skip

        yield kind, run
