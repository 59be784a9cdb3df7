"""Sources that are quantized already: kept as they are, unpacked, or quantized again."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import PHOTO, edit_json
from click.testing import CliRunner

from mlx_vlm_mini import load
from mlx_vlm_mini.checkpoints.folder import open_checkpoint
from mlx_vlm_mini.checkpoints.load import plan
from mlx_vlm_mini.cli.main import main
from mlx_vlm_mini.convert import convert
from mlx_vlm_mini.errors import CheckpointError

UP = "language_model.model.layers.0.mlp.up_proj"
PACKINGS: list[dict[str, Any]] = [
    {"bits": 4, "group_size": 32}, {"bits": 3, "group_size": 64}, {"mode": "mxfp4"}, {"mode": "mxfp8"}, {"mode": "nvfp4"},
]  # fmt: skip


def logits(folder: Path) -> np.ndarray:
    model, processor = load(folder)
    return np.array(model(processor("What is in this image?", [PHOTO])))


def files(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_dequantized_answers_as_the_quantized_does(tmp_path, wide, packing):
    convert(wide, tmp_path / "small", **packing, part_bits={"vision": 8})
    report = convert(tmp_path / "small", tmp_path / "large", dequantize=True)
    after = open_checkpoint(tmp_path / "large")
    assert {info.dtype for info in after.tensors.values()} == {"BF16"}
    assert {name: info.shape for name, info in after.tensors.items()} == {
        name: info.shape if len(info.shape) < 4 else (info.shape[0], *info.shape[2:], info.shape[1])
        for name, info in open_checkpoint(wide).tensors.items()
    }
    assert "quantization" not in after.config and "quantization_config" not in after.config
    assert report.preview.notes == ("the source is quantized: what its rounding lost stays lost",)
    convert(tmp_path / "small", tmp_path / "exact", dequantize=True, dtype="float32")
    np.testing.assert_allclose(logits(tmp_path / "exact"), logits(tmp_path / "small"), atol=1e-4)


def test_dequantized_weights_are_what_mlx_gives(tmp_path, wide):
    convert(wide, tmp_path / "small", bits=4, group_size=32)
    convert(tmp_path / "small", tmp_path / "large", dequantize=True, dtype="float32")
    packed = mx.load(str(tmp_path / "small" / "model.safetensors"))
    parts = (packed[f"{UP}.{name}"].astype(mx.float32) for name in ("scales", "biases"))
    expected = mx.dequantize(packed[f"{UP}.weight"], *parts, group_size=32, bits=4)
    assert mx.array_equal(mx.load(str(tmp_path / "large" / "model.safetensors"))[f"{UP}.weight"], expected)


@pytest.mark.parametrize("method", [{}, {"quant_method": "mlx"}])
def test_the_settings_may_stand_under_quantization_config_alone(tmp_path, wide, method):
    convert(wide, tmp_path / "small", bits=4, group_size=32)
    expected = logits(tmp_path / "small")
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    settings = {**config["quantization_config"], **method}
    edit_json(tmp_path / "small" / "config.json", quantization=..., quantization_config=settings)
    assert np.array_equal(logits(tmp_path / "small"), expected)


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_quantized_again_in_the_same_way_nothing_changes(tmp_path, wide, packing):
    """Rounding twice is left out where once is enough."""
    convert(wide, tmp_path / "one", **packing)
    convert(tmp_path / "one", tmp_path / "two", **packing)
    convert(tmp_path / "one", tmp_path / "copy")
    assert files(tmp_path / "one") == files(tmp_path / "two") == files(tmp_path / "copy")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("one", "two", "copy")]
    assert configs[0] == configs[1] == configs[2]


@pytest.mark.parametrize("second", [{"bits": 4, "group_size": 64}, {"mode": "mxfp4"}])
def test_quantized_again_in_another_way(tmp_path, wide, second):
    """Through floating point, exactly as in two steps; what is not asked for stays packed."""
    convert(wide, tmp_path / "eight", bits=8, group_size=32, part_bits={"vision": 8})
    convert(tmp_path / "eight", tmp_path / "four", **second)
    convert(tmp_path / "eight", tmp_path / "float", dequantize=True)
    convert(tmp_path / "float", tmp_path / "other", **second)
    direct, steps = (mx.load(str(tmp_path / name / "model.safetensors")) for name in ("four", "other"))
    assert {name for name in steps if name.startswith("language_model")} == {
        name for name in direct if name.startswith("language_model")
    }
    assert all(
        mx.array_equal(direct[name], array) for name, array in steps.items() if name.startswith("language_model")
    )
    model = plan(open_checkpoint(tmp_path / "four")).model
    assert (model.decoder.embed_tokens.bits, model.vision.blocks[0].mlp.fc1.bits) == (4, 8)
    assert np.isfinite(logits(tmp_path / "four")).all()


def test_a_width_that_the_new_groups_do_not_divide_becomes_floating_point(tmp_path, wide):
    convert(wide, tmp_path / "one", bits=4, group_size=32)
    report = convert(tmp_path / "one", tmp_path / "two", bits=4, group_size=64)
    narrow = [f"language_model.model.layers.{i}.mlp.down_proj.weight" for i in range(2)]
    assert report.preview.skipped == tuple((name, "its width 96 is no multiple of 64") for name in narrow)
    tensors = open_checkpoint(tmp_path / "two").tensors
    assert tensors[narrow[0]].dtype == "BF16" and tensors[narrow[0]].shape == (128, 96)
    assert report.preview.weights == sum(map(open_checkpoint(wide).num_weights, open_checkpoint(wide).tensors))


def test_quantized_by_other_tools_it_says_why_not(tmp_path, wide):
    source = tmp_path / "source"
    shutil.copytree(wide, source)
    edit_json(source / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(
        CheckpointError, match="is quantized by 'gptq', which MLX does not read; use the original weights"
    ):
        convert(source, tmp_path / "out", bits=4)


def test_the_command(tmp_path, wide):
    def run(*arguments: object) -> Any:
        return CliRunner().invoke(main, ["convert", *map(str, arguments)])

    assert run(wide, tmp_path / "four", "-q", "4", "--group-size", "32").exit_code == 0
    shown = run(tmp_path / "four", "--dequantize", "--dry-run")
    assert "note: the source is quantized: what its rounding lost stays lost" in shown.stdout
    assert "4 bits" not in shown.stdout and "4 bits" in run(tmp_path / "four", "--dry-run").stdout
    assert run(tmp_path / "four", tmp_path / "large", "--dequantize").exit_code == 0
    assert {info.dtype for info in open_checkpoint(tmp_path / "large").tensors.values()} == {"BF16"}


# Embeddings that are the head, too.
EMBEDDINGS, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"


@pytest.fixture
def tied(tmp_path: Path, wide: Path) -> Path:
    """A folder whose config ties the head to the embeddings, and whose file holds both."""
    folder = tmp_path / "tied"
    shutil.copytree(wide, folder)
    config = json.loads((folder / "config.json").read_text())
    edit_json(folder / "config.json", text_config={**config["text_config"], "tie_word_embeddings": True})
    tensors = mx.load(str(folder / "model.safetensors"))
    tensors[HEAD] = tensors[EMBEDDINGS]
    mx.eval(tensors)
    mx.save_safetensors(str(folder / "new.safetensors"), tensors, {"format": "pt"})
    (folder / "new.safetensors").replace(folder / "model.safetensors")
    return folder


def test_tied_embeddings_are_stored_once(tmp_path, tied):
    report = convert(tied, tmp_path / "out")
    assert HEAD not in open_checkpoint(tmp_path / "out").tensors
    assert report.preview.notes == (f"{HEAD} repeats the embeddings: it is stored once",)
    np.testing.assert_array_equal(logits(tmp_path / "out"), logits(tied))
    report = convert(tied, tmp_path / "four", bits=4, part_bits={"embeddings": 8, "head": 5})
    assert "the head is the embeddings, so bits of its own change nothing" in report.preview.notes
    model = plan(open_checkpoint(tmp_path / "four")).model
    assert model.decoder.embed_tokens.bits == 8 and not hasattr(model.decoder, "lm_head")


def test_a_head_that_differs_stays(tmp_path, tied):
    """Whatever the flag says: by one bit of one number."""
    file = tied / "model.safetensors"
    info, content = open_checkpoint(tied).tensors[HEAD], bytearray(file.read_bytes())
    content[info.end - 2] ^= 1
    file.write_bytes(content)
    report = convert(tied, tmp_path / "out")
    assert HEAD in open_checkpoint(tmp_path / "out").tensors and report.preview.notes == ()
    np.testing.assert_array_equal(logits(tmp_path / "out"), logits(tied))
