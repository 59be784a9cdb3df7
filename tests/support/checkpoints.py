"""Where the golden checkpoints are, and small things that tests do to them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from reference import GOLDEN

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
