"""Folders that travel: what is written here loads in other MLX tools, and theirs load here.

mlx-vlm itself is too large a dependency for the suite: benchmarks/travel.py runs it, both ways, and keeps in
golden/peer.json the names and shapes of the tensors that it then asks for. mlx-lm is here: the marked suite gives it the
language model of a folder, since it has no vision-language model of these families.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import PHOTO, WAYS, WIDE, make_wide
from reference import GOLDEN

from mlx_vlm_mini import load
from mlx_vlm_mini.checkpoints.folder import open_checkpoint
from mlx_vlm_mini.convert import convert

PEER = json.loads((GOLDEN / "peer.json").read_text())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", WIDE)
def test_tensors_are_what_mlx_vlm_asks_for(tmp_path, name, way):
    """By name and shape, strictly, as mlx-vlm 0.7.10 loads; and config.json says how each is quantized in its words."""
    assert PEER["versions"]["mlx-vlm"] == "0.7.10"
    convert(make_wide(name, tmp_path / "source"), tmp_path / "out", dtype="float32", **WAYS[way])
    checkpoint = open_checkpoint(tmp_path / "out")
    expected = PEER["shapes"][f"{name}, {way}"]
    assert {tensor: list(info.shape) for tensor, info in checkpoint.tensors.items()} == expected
    assert checkpoint.is_mlx
    packed = {tensor.removesuffix(".scales") for tensor in expected if tensor.endswith(".scales")}
    settings = checkpoint.config.get("quantization")
    assert settings == checkpoint.config.get("quantization_config") and (settings is not None) == bool(packed)
    if settings is not None:
        own = {key: value for key, value in settings.items() if isinstance(value, dict)}
        assert set(own) <= packed
        assert all(set(each) == {"bits", "group_size", "mode"} for each in own.values())
        assert settings.keys() - own.keys() == {"bits", "group_size", "mode"}


def language_model(folder: Path, out: Path) -> dict[str, Any]:
    """The language model of a folder as a folder of its own, in mlx-lm's way: a prefix less, everywhere."""
    prefix = "language_model."
    out.mkdir()
    config = json.loads((folder / "config.json").read_text())
    own = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, **config["text_config"]}  # a sparse config leaves out defaults
    if "quantization" in config:
        own["quantization"] = {key.removeprefix(prefix): value for key, value in config["quantization"].items()}
    tensors = mx.load(str(folder / "model.safetensors"))
    text = {key.removeprefix(prefix): array for key, array in tensors.items() if key.startswith(prefix)}
    mx.save_safetensors(str(out / "model.safetensors"), text, {"format": "mlx"})
    (out / "config.json").write_text(json.dumps(own))
    return own


def put_back(folder: Path, text: Mapping[str, mx.array], quantization: Mapping[str, Any] | None, out: Path) -> None:
    """A folder with another language model in it."""
    shutil.copytree(folder, out)
    tensors = {
        key: array for key, array in mx.load(str(folder / "model.safetensors")).items() if "language_model" not in key
    }
    tensors |= {f"language_model.{key}": array for key, array in text.items()}
    mx.save_safetensors(str(out / "new.safetensors"), tensors, {"format": "mlx"})
    (out / "new.safetensors").replace(out / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    if quantization is not None:
        names = ("bits", "group_size", "mode")
        config["quantization"] = {
            key if key in names else f"language_model.{key}": value for key, value in quantization.items()
        }
    (out / "config.json").write_text(json.dumps(config))


# mlx-lm's Gemma has the other GELU, the one with erf; transformers' and PaliGemma's own is that with tanh.
TOLERANCE = {"llava-clip-llama": 1e-4, "paligemma-gemma": 1e-2}
IDS = mx.array([[1, 5, 9, 300, 7, 42, 11]])


def of_decoder(model: Any) -> np.ndarray:
    return np.array(model.decoder.logits(model.decoder(model.decoder.read(IDS))))


@pytest.mark.reference
@pytest.mark.parametrize("way", ["float32", "4 bits", "bits of each part"])
@pytest.mark.parametrize("name", WIDE)
def test_mlx_lm_loads_the_language_model(tmp_path, name, way):
    """As mlx-lm 0.32 loads it: strictly, each layer quantized as config.json says."""
    from mlx_lm.utils import load_model

    convert(make_wide(name, tmp_path / "source"), tmp_path / "out", dtype="float32", **WAYS[way])
    language_model(tmp_path / "out", tmp_path / "text")
    theirs, _ = load_model(tmp_path / "text")
    ours, _ = load(tmp_path / "out")
    np.testing.assert_allclose(of_decoder(ours), np.array(theirs(IDS)), atol=TOLERANCE[name])


@pytest.mark.reference
@pytest.mark.parametrize("way", ["float32", "4 bits", "mixed bits"])
@pytest.mark.parametrize("name", WIDE)
def test_what_mlx_lm_writes_loads_here(tmp_path, name, way):
    """Quantized by mlx-lm, with bits of single layers, too; and converted again, dequantized first."""
    from mlx.utils import tree_flatten
    from mlx_lm.utils import load_model, quantize_model

    def bits(path: str, _: Any) -> bool | dict[str, Any]:
        return {"bits": 6, "group_size": 32} if "v_proj" in path else "o_proj" not in path

    convert(make_wide(name, tmp_path / "source"), tmp_path / "out", dtype="float32")
    own = language_model(tmp_path / "out", tmp_path / "text")
    theirs, _ = load_model(tmp_path / "text")
    if way != "float32":
        theirs, own = quantize_model(theirs, own, 32, 4, quant_predicate=bits if way == "mixed bits" else None)
    text = dict(tree_flatten(theirs.parameters()))
    put_back(tmp_path / "out", text, own.get("quantization"), tmp_path / "back")
    ours, processor = load(tmp_path / "back")
    np.testing.assert_allclose(of_decoder(ours), np.array(theirs(IDS)), atol=TOLERANCE[name])
    convert(tmp_path / "back", tmp_path / "again", dequantize=True)
    again, _ = load(tmp_path / "again")
    inputs = processor("What is in this image?", [PHOTO])
    np.testing.assert_allclose(np.array(again(inputs)), np.array(ours(inputs)), atol=1e-4)
