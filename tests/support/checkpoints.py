"""Where the golden checkpoints are, and small things that tests do to them."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from reference import GOLDEN

from mlx_vlm_mini.checkpoints.folder import open_checkpoint
from mlx_vlm_mini.checkpoints.load import plan
from mlx_vlm_mini.checkpoints.weights import fused, hub_name, is_convolution, rename
from mlx_vlm_mini.families import find_family
from mlx_vlm_mini.model import VLM

PHOTO, SHAPES = GOLDEN / "photo.jpg", GOLDEN / "shapes.png"
PLAIN = GOLDEN / "llava-clip-llama"


def edit_json(file: Path, **changes: Any) -> None:
    """Change keys of a JSON file; `...` removes one."""
    content = json.loads(file.read_text())
    for key, value in changes.items():
        if value is ...:
            content.pop(key, None)
        else:
            content[key] = value
    file.write_text(json.dumps(content))


def check_fields(config: Any, expected: dict[str, Any]) -> None:
    """Fields of a config by their dotted names."""
    for path, value in expected.items():
        found = config
        for name in path.split("."):
            found = getattr(found, name)
        assert found == value, path


def with_paths(messages: list[dict[str, Any]], folder: Path = GOLDEN) -> list[dict[str, Any]]:
    """Messages with their images' names as paths."""
    return [
        {**message, "content": [
            {**part, "image": str(folder / part["image"])} if part["type"] == "image" else part
            for part in message["content"]
        ]}
        for message in messages
    ]  # fmt: skip


def write_names(folder: Path, family: Any, names: Callable[[str], str], *, mlx: bool = False) -> None:
    """Rewrite a folder's tensors with other names, each of which must mean the same.

    Args:
        names: what a tensor is called, from its name on the Hub (`hub_name`).
        mlx: in MLX's format.
    """
    checkpoint, tensors = open_checkpoint(folder), {}
    for ours, theirs in plan(checkpoint).ours.items():
        name = names(hub_name(ours, family.WEIGHTS))
        assert rename(name, family.WEIGHTS) == (ours,)
        array = checkpoint.read(theirs)
        tensors[name] = mx.contiguous(array.transpose(0, 2, 3, 1)) if mlx and array.ndim == 4 else array
    for file in folder.glob("model*"):
        file.unlink()
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "mlx" if mlx else "pt"})


def in_layout(name: str, *, text: str, vision: str, projector: str) -> str:
    """A tensor's name on the Hub in another of transformers' layouts, by the prefixes of its three parts."""
    part, _, rest = name.partition(".")
    prefix = {"language_model": text, "vision_tower": vision, "multi_modal_projector": projector}[part]
    return prefix + rest.removeprefix("model.").removeprefix("vision_model.")


WAYS: dict[str, dict[str, Any]] = {  # of `convert`, to be compared with mlx-vlm's reading
    "float32": {},
    "4 bits": {"bits": 4, "group_size": 32},
    "bits of each part": {
        "bits": 4, "group_size": 32, "part_bits": {"vision": 8, "projector": 8, "embeddings": 6, "head": 8},
    },
    "mxfp4": {"mode": "mxfp4"},
    "nvfp4": {"mode": "nvfp4"},
}  # fmt: skip


WIDE: dict[str, dict[str, Any]] = {  # changes to a golden's config.json
    "llava-clip-llama": {
        "text_config": {
            "hidden_size": 128, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        },
        "vision_config": {"hidden_size": 96, "intermediate_size": 72},
    },
    "paligemma-gemma": {
        "hidden_size": 128, "projection_dim": 128,
        "text_config": {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32},
        "vision_config": {"hidden_size": 80, "intermediate_size": 96, "projection_dim": 128},
    },
}  # fmt: skip


def make_wide(name: str, folder: Path, changes: dict[str, Any] | None = None) -> Path:
    """A golden's wider sister: random bfloat16 tensors in torch's layout, by the golden's names; `changes` to its
    config.json are by default those of `WIDE`."""
    shutil.copytree(GOLDEN / name, folder)
    config = json.loads((folder / "config.json").read_text())
    for key, change in (changes or WIDE[name]).items():
        config[key] = {**config[key], **change} if isinstance(change, dict) else change
    (folder / "config.json").write_text(json.dumps(config))
    planned = plan(open_checkpoint(GOLDEN / name))
    names = planned.ours
    model = VLM(find_family(config).config(config))
    mx.random.seed(11)
    arrays = {}
    for ours, array in tree_flatten(model.parameters()):
        value = mx.random.normal(array.shape) * (0.3 if array.ndim == 1 else array.shape[-1] ** -0.5)
        value = value + (1 if "norm" in ours and ours.endswith("weight") else 0)
        arrays[ours] = mx.contiguous(mx.moveaxis(value, -1, 1) if is_convolution(ours) else value).astype(mx.bfloat16)
    # A last block whose output nothing reads is in the file all the same.
    parts = {
        theirs: [arrays.get(name, arrays.get(re.sub(r"\d+", "1", name, count=1))) for name in ours]
        for theirs, ours in fused(names).items()
    }
    tensors = {theirs: part[0] if len(part) == 1 else mx.concatenate(part) for theirs, part in parts.items()}
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    for theirs in planned.unused:  # the last norm of CLIP, which LLaVA does not read
        tensors[theirs] = mx.ones(config["vision_config"]["hidden_size"], dtype=mx.bfloat16)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "pt"})
    return folder


def random_mask_decoder(file: Path) -> dict[str, np.ndarray]:
    """A file of random numbers with the names and shapes of big_vision's vae-oid.npz, its encoder's among them."""
    rng = np.random.default_rng(0)
    ups = {
        f"decoder.{4 + 2 * i}": (*sizes, 4, 4) for i, sizes in enumerate([(128, 128), (128, 64), (64, 32), (32, 16)])
    }
    shapes = {"decoder.0": (128, 512, 1, 1), "decoder.12": (1, 16, 1, 1), "encoder.0": (16, 1, 4, 4), **ups}
    for i in (2, 3):
        shapes |= {f"decoder.{i}.net.{j}": (128, 128, size, size) for j, size in ((0, 3), (2, 3), (4, 1))}
    arrays = {"_vq_vae._embedding": rng.normal(size=(128, 512))}
    for name, (first, second, height, width) in shapes.items():
        inputs, outputs = (first * 4, second) if name in ups else (second * height * width, first)
        arrays[f"{name}.weight"] = rng.normal(size=(first, second, height, width)) * (2 / inputs) ** 0.5
        arrays[f"{name}.bias"] = rng.normal(size=outputs) * 0.1
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    np.savez(file, **arrays)
    return arrays
