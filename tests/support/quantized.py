"""Quantized models whose pictures have any size: near their source, and nearer with compensation."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from checkpoints import PHOTO, SHAPES, make_wide
from reference import GOLDEN

from mlx_vlm_mini import load
from mlx_vlm_mini.checkpoints.folder import open_checkpoint
from mlx_vlm_mini.checkpoints.load import plan
from mlx_vlm_mini.checkpoints.weights import load_weights
from mlx_vlm_mini.convert import convert
from mlx_vlm_mini.model import VLM


def make_wide_with(change: Callable[[dict[str, Any]], None], name: str, folder: Path, sizes: Any) -> Path:
    """A wide sister whose picture settings are changed, so that pictures are small."""
    make_wide(name, folder, sizes)
    for file in (folder / "preprocessor_config.json", folder / "processor_config.json"):
        if file.exists():
            settings = json.loads(file.read_text())
            change(settings.get("image_processor", settings))
            file.write_text(json.dumps(settings))
    return folder


def load_packed(folder: Path) -> VLM:
    """A quantized model as it is stored, not unpacked as `load` does on a CPU."""
    planned = plan(open_checkpoint(folder))
    load_weights(planned.model, planned.ours, planned.checkpoint, mx.float32, planned.family.WEIGHTS)
    return planned.model


def check_eight_bits(wide: Path, out: Path) -> Any:
    """All parts at 8 bits, and the check layer by layer, which sees no harm; returns the model as it is stored, for
    more to be asked."""
    convert(wide, out, bits=8, group_size=32, part_bits={"vision": 8, "projector": 8}, check=True)
    report = json.loads((out / "conversion.json").read_text())["check"]
    assert report["problems"] == [] and 0 < report["mean_kl"] < 0.05
    model, processor = load(out)
    whole, _ = load(wide)
    for prompt in ([PHOTO, "What is it?"], "Hi"):
        one, other = (np.array(each(processor(prompt))[0]) for each in (model, whole))
        assert 0 < np.abs(one - other).max() < 0.5
    return load_packed(out)


def check_compensation(wide: Path, folder: Path) -> None:
    """GPTQ at 3 bits loses less than rounding, its inputs coming picture by picture."""
    (folder / "pictures").mkdir()
    for picture in (PHOTO, SHAPES, GOLDEN / "strip.png"):
        shutil.copy(picture, folder / "pictures")
    options: dict[str, Any] = {"bits": 3, "group_size": 32, "part_bits": {"vision": 3, "projector": 3}, "check": True}
    kl = {}
    for method in ("round", "gptq"):
        calibration = {} if method == "round" else {"calibration": str(folder / "pictures")}
        convert(wide, folder / method, method=method, **calibration, **options)
        kl[method] = json.loads((folder / method / "conversion.json").read_text())["check"]["mean_kl"]
    assert kl["gptq"] < kl["round"]
