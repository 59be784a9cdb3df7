"""Mistral 3 with Ministral 3's decoder: YaRN, queries that grow with their place, weights in float8; parity is
test_parity.py's."""

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import check_fields, edit_json, with_paths
from reference import CASES, GOLDEN

from mlx_vlm_mini import load
from mlx_vlm_mini.checkpoints.float8 import NUMBERS, decode
from mlx_vlm_mini.checkpoints.folder import open_checkpoint
from mlx_vlm_mini.checkpoints.load import plan
from mlx_vlm_mini.config import QueryScale
from mlx_vlm_mini.convert import convert
from mlx_vlm_mini.decoder import sharpness as sharp
from mlx_vlm_mini.decoder.rope import make_rope
from mlx_vlm_mini.decoder.sharpness import sharpness
from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.families import mistral3
from mlx_vlm_mini.families.parts.configs import text_decoder

NAMES = ("ministral3", "ministral3-float8")


def own_logprobs(model, processor, case):
    """Of a prompt's last token."""
    logits = model(processor(with_paths(CASES[case])))[0, -1]
    return np.array(logits - mx.logsumexp(logits))


def expected_logprobs(name, case):
    with np.load(GOLDEN / name / "expected.npz") as expected:
        return expected[f"{case}/logprobs"][0]


# config


def test_what_configs_leave_out():
    """The class defaults of transformers 5.23, which are Ministral 3 8B's sizes."""
    config = mistral3.config({"text_config": {"model_type": "ministral3"}, "vision_config": {"patch_size": 14}})
    check_fields(config, {
        "decoder.hidden_size": 4096, "decoder.intermediate_size": 14336, "decoder.num_hidden_layers": 34,
        "decoder.num_attention_heads": 32, "decoder.num_key_value_heads": 8, "decoder.head_dim": 128,
        "decoder.vocab_size": 131072, "decoder.max_position_embeddings": 262144, "decoder.rope_theta": 1e6,
        "decoder.norms.rms_norm_eps": 1e-5, "decoder.sliding_window": None, "decoder.tie_word_embeddings": True,
        "decoder.scales.query_scale": QueryScale(kind="log_steps", length=16384, beta=0.1),
        "projector.norm_eps": 1e-5, "vision.image_size": 28,
    })  # fmt: skip
    assert config.decoder.rope_scaling["factor"] == 16


def test_only_this_decoder_has_the_scale():
    rope = {"rope_type": "default", "rope_theta": 1e6, "llama_4_scaling_beta": 0.1}
    assert text_decoder({"model_type": "mistral", "rope_parameters": rope}).scales.query_scale is None
    none = {**rope, "llama_4_scaling_beta": None}
    found = text_decoder({"model_type": "ministral3", "rope_parameters": none}, proven=("ministral3",))
    assert found.scales.query_scale is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llama_4_scaling_beta": -1}, "beta must be a positive number"),
        ({"original_max_position_embeddings": 0}, "length must be a whole number from 1"),
        ({"original_max_position_embeddings": ...}, "malformed"),
        ({"factor": ...}, "rope scaling 'yarn' lacks factor"),
    ],
)
def test_configs_that_make_no_model(changes, message, copy_of):
    folder = copy_of("ministral3")
    text = json.loads((folder / "config.json").read_text())["text_config"]
    rope = {key: value for key, value in {**text["rope_parameters"], **changes}.items() if value is not ...}
    edit_json(folder / "config.json", text_config={**text, "rope_parameters": rope})
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_a_head_in_the_file_counts():
    """The outer part's class takes a silent config for a tied one."""
    config = json.loads((GOLDEN / "ministral3-float8" / "config.json").read_text())
    assert "tie_word_embeddings" not in config and not config["text_config"]["tie_word_embeddings"]
    assert "lm_head" in load(GOLDEN / "ministral3-float8")[0].decoder
    assert "lm_head" not in load(GOLDEN / "ministral3")[0].decoder


# positions


@pytest.mark.parametrize(
    ("changes", "scale"), [({}, 1.0), ({"mscale": None, "mscale_all_dim": None}, 1 + 0.1 * np.log(16))]
)
def test_yarns_factor_is_one_where_both_scales_are_equal(changes, scale):
    text = json.loads((GOLDEN / "ministral3" / "config.json").read_text())["text_config"]
    text["rope_parameters"] |= changes
    assert make_rope(mistral3.config({"text_config": text}).decoder).scaling(1)[1] == pytest.approx(scale)


def test_queries_grow_in_steps():
    scale = QueryScale(kind="log_steps", length=10, beta=0.5)
    assert sharpness(scale, 0, 10) is None
    found = np.array(sharpness(scale, 8, 4))[:, 0]
    np.testing.assert_allclose(found, [1, 1, 1 + 0.5 * np.log(2), 1 + 0.5 * np.log(2)], rtol=1e-6)
    rows = sharpness(scale, mx.array([0, 19]), 2)
    assert rows.shape == (2, 1, 2, 1)
    expected = [[1, 1], [1 + 0.5 * np.log(2), 1 + 0.5 * np.log(3)]]
    np.testing.assert_allclose(np.array(rows)[:, 0, :, 0], expected, rtol=1e-6)


WRONG = {
    "none": lambda places, scale: mx.ones(places.shape),
    "no floor": lambda places, scale: 1 + scale.beta * mx.log(1 + places / scale.length),
    "from one on": lambda places, scale: 1 + scale.beta * mx.log(1 + (places + 1) // scale.length),
}


@pytest.mark.parametrize("kind", sorted(WRONG))
def test_a_wrong_scale_is_seen(kind, monkeypatch):
    model, processor = load(GOLDEN / "ministral3")
    expected = expected_logprobs("ministral3", "two_turns")
    np.testing.assert_allclose(own_logprobs(model, processor, "two_turns"), expected, atol=1e-4)
    monkeypatch.setattr(sharp, "SHARPNESS", {"log_steps": WRONG[kind]})
    # One step later on: no token of a prompt of 109 ends on it, so the middle of the prompt shows it.
    whole = model(processor(with_paths(CASES["two_turns"])))[0]
    monkeypatch.undo()
    right = model(processor(with_paths(CASES["two_turns"])))[0]
    assert np.abs(np.array(whole - right)).max() > 0.003


def test_yarns_factor_is_seen():
    model, processor = load(GOLDEN / "ministral3")
    for rope in set(model.decoder.ropes.values()):
        periods, _ = rope.scaling(1)
        rope.scaling = lambda total, periods=periods: (periods, 1 + 0.1 * np.log(16))
    found = own_logprobs(model, processor, "image")
    assert np.abs(found - expected_logprobs("ministral3", "image")).max() > 0.1


# files


def community(name):
    return name.replace("vision_tower.", "vision_tower.vision_model.")


def memory(name):
    if name.startswith("language_model.lm_head"):
        return name.removeprefix("language_model.")
    return "model." + name.replace("language_model.model.", "language_model.", 1)


@pytest.mark.parametrize("layout", [memory, community])
def test_tensors_go_by_many_names(layout, copy_of):
    folder = copy_of("ministral3")
    tensors = {layout(key): array for key, array in mx.load(str(folder / "model.safetensors")).items()}
    if layout is community:
        kernel = "vision_tower.vision_model.patch_conv.weight"
        tensors[kernel] = mx.contiguous(tensors[kernel].transpose(0, 2, 3, 1))
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "mlx" if layout is community else "pt"})
    found = own_logprobs(*load(folder), "image")
    np.testing.assert_allclose(found, expected_logprobs("ministral3", "image"), atol=1e-4)


def test_numbers_of_eight_bits():
    assert NUMBERS.dtype == np.float32 and len(NUMBERS) == 256
    known = {0x00: 0, 0x01: 2**-9, 0x07: 7 * 2**-9, 0x08: 2**-6, 0x38: 1, 0x39: 1.125, 0x7E: 448, 0xB8: -1, 0xFE: -448}
    assert {code: float(NUMBERS[code]) for code in known} == known
    assert np.isnan(NUMBERS[[0x7F, 0xFF]]).all() and np.isfinite(np.delete(NUMBERS, [0x7F, 0xFF])).all()
    assert np.signbit(NUMBERS[128:]).all()
    found = decode(mx.arange(256).astype(mx.uint8))
    np.testing.assert_array_equal(np.array(found), NUMBERS)
    np.testing.assert_array_equal(np.array(decode(mx.array([0.5, -448], dtype=mx.bfloat16))), [0.5, -448])


def test_factors_are_no_tensors():
    checkpoint = open_checkpoint(GOLDEN / "ministral3-float8")
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    info = checkpoint.tensors[name]
    assert (info.dtype, info.nbytes, info.factor[1]) == ("BF16", 50 * 36, name + "_scale_inv")
    assert not [each for each in checkpoint.tensors if "scale" in each]
    planned = plan(checkpoint)
    assert planned.unused == () and checkpoint.quantization is None
    array = checkpoint.read(name)
    assert array.dtype == mx.float32 and 0.1 < float(mx.abs(array).max()) < 3


def test_a_source_in_float8_is_converted(tmp_path):
    """In float32 it answers as before; by default its weights get their factors' type."""
    source = GOLDEN / "ministral3-float8"
    convert(source, tmp_path / "whole", dtype="float32")
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert "quantization_config" not in config
    found = own_logprobs(*load(tmp_path / "whole"), "two_turns")
    np.testing.assert_allclose(found, expected_logprobs(source.name, "two_turns"), atol=1e-4)
    convert(source, tmp_path / "out")
    after = open_checkpoint(tmp_path / "out")
    assert after.tensors["language_model.model.layers.0.mlp.up_proj.weight"].dtype == "BF16"
    assert set(after.tensors) == set(open_checkpoint(source).tensors)
    found = own_logprobs(*load(tmp_path / "out"), "two_turns")
    np.testing.assert_allclose(found, expected_logprobs(source.name, "two_turns"), atol=0.1)


def rewrite(folder, change):
    """Change the tensors of a folder's first file, float8 as its codes."""
    file = folder / "model-00001-of-00002.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def without_factor(header):
    name = next(name for name in header if name.endswith("_scale_inv"))
    header["elsewhere"] = header.pop(name)


def whole_number(header):
    header[next(name for name in header if name.endswith("_scale_inv"))]["dtype"] = "I16"


@pytest.mark.parametrize("change", [without_factor, whole_number])
def test_a_weight_without_a_factor(change, copy_of):
    folder = copy_of("ministral3-float8")
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match="has type F8_E4M3 and no single .*weight_scale_inv beside it"):
        load(folder)


@pytest.mark.parametrize("changes", [{"weight_block_size": [128, 128]}, {"quant_method": "fbgemm_fp8"}])
def test_other_kinds_of_float8_are_refused(changes, copy_of):
    folder = copy_of("ministral3-float8")
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_json(folder / "config.json", quantization_config={**settings, **changes})
    with pytest.raises(CheckpointError, match="which MLX does not read"):
        load(folder)


def test_config_of_a_query_scale():
    scale = QueryScale(kind="log_steps", length=10)
    for changes in ({"kind": "roots"}, {"length": 0}, {"kind": "log", "length": 1}):
        with pytest.raises(CheckpointError):
            replace(scale, **changes)
