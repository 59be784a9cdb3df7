"""Checkpoints in float8 as Mistral writes them, and what transformers says of their weights in float32.

Transformers computes such files on GPUs alone, so its reference is a copy whose weights are decoded by torch.
"""

import json
import shutil
from pathlib import Path

LARGEST = 448.0  # of E4M3


def to_float8(folder: Path) -> None:
    """Rewrite a folder's decoder layers in float8, with the factors and the settings that stand beside them."""
    import torch
    from safetensors.torch import load_file, save_file

    for file in folder.glob("model*.safetensors"):
        tensors = load_file(file)
        for name in [name for name in tensors if "language_model" in name and name.endswith("_proj.weight")]:
            factor = (tensors[name].abs().max() / LARGEST).bfloat16()
            tensors[name] = (tensors[name] / factor.float()).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
            tensors[name + "_scale_inv"] = factor
            tensors[name.removesuffix("weight") + "activation_scale"] = torch.tensor(0.7).bfloat16()
        save_file(tensors, file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "activation_scheme": "static", "dequantize": False, "quant_method": "fp8", "weight_block_size": None,
        "modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def is_float8(folder: Path) -> bool:
    return "quantization_config" in json.loads((folder / "config.json").read_text())


def decoded(folder: Path, target: Path) -> Path:
    """A copy of such a folder with the weights that its numbers mean, in float32."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, target)
    for file in target.glob("model*.safetensors"):
        tensors = load_file(file)
        kept = {
            name: tensor for name, tensor in tensors.items() if not name.endswith(("_scale_inv", "activation_scale"))
        }
        for name, tensor in kept.items():
            if tensor.dtype == torch.float8_e4m3fn:
                kept[name] = tensor.float() * tensors[name + "_scale_inv"].float()
        save_file(kept, file, {"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config.pop("quantization_config")
    (target / "config.json").write_text(json.dumps(config))
    return target
