"""Conversion: equal outputs unquantized, stated tolerance quantized, and nothing half-written."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import PHOTO, edit_json, with_paths
from llava_original import SPECS as ORIGINALS
from qwen_vl_oracle import SPECS as QWEN
from reference import CASES, GOLDEN, SPECS, STEPS

from mlx_vlm_mini import load, stream_generate
from mlx_vlm_mini.checkpoints.folder import open_checkpoint
from mlx_vlm_mini.checkpoints.load import plan
from mlx_vlm_mini.convert import convert
from mlx_vlm_mini.convert.quantize import Output
from mlx_vlm_mini.convert.work import Workplace
from mlx_vlm_mini.convert.write import split_shards, write_tensors
from mlx_vlm_mini.errors import CheckpointError


def logprobs(folder: Path) -> np.ndarray:
    model, processor = load(folder)
    logits = model(processor("What is in this image?", [PHOTO]))[0]
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


@pytest.mark.parametrize("name", sorted({**SPECS, **ORIGINALS, **QWEN}))
def test_converted_equals_the_reference(name, tmp_path):
    """And converted again: a folder in MLX's format is a source like any other."""
    # Weights in float8 get their factors' type, bfloat16, unless another is asked for.
    convert(GOLDEN / name, tmp_path / "once", dtype="float32" if "float8" in name else None)
    convert(tmp_path / "once", tmp_path / "twice")
    with np.load(GOLDEN / name / "expected.npz") as expected:
        for folder in (tmp_path / "once", tmp_path / "twice"):
            model, processor = load(folder)
            for case in {**SPECS, **ORIGINALS, **QWEN}[name].cases:
                tokens = expected[f"{case}/token_ids"].tolist()
                chunks = list(stream_generate(model, processor, with_paths(CASES[case]), max_tokens=STEPS))
                assert [chunk.token for chunk in chunks] == tokens
                chosen = expected[f"{case}/logprobs"][np.arange(STEPS), tokens]
                np.testing.assert_allclose([chunk.logprob for chunk in chunks], chosen, atol=1e-4)


@pytest.mark.parametrize("name", sorted(SPECS))
def test_names_stay_and_the_format_is_mlx(name, tmp_path):
    convert(GOLDEN / name, tmp_path / "out")
    before, after = open_checkpoint(GOLDEN / name), open_checkpoint(tmp_path / "out")
    assert set(after.tensors) == set(before.tensors)
    assert after.is_mlx and not before.is_mlx
    assert after.config == {key: value for key, value in before.config.items() if key != "quantization_config"}
    files = {file.name for file in (tmp_path / "out").iterdir()}
    others = {file.name for file in (GOLDEN / name).iterdir() if not file.name.startswith(("model", "expected"))}
    assert files == others | {"model.safetensors", "conversion.json"}


def test_what_is_written_mlx_reads_itself(tmp_path, wide):
    convert(wide, tmp_path / "out")
    arrays, metadata = mx.load(str(tmp_path / "out" / "model.safetensors"), return_metadata=True)
    assert metadata == {"format": "mlx"}
    for name, array in mx.load(str(wide / "model.safetensors")).items():
        same = array.transpose(0, 2, 3, 1) if array.ndim == 4 else array
        assert arrays[name].dtype == mx.bfloat16 and (arrays[name] == same).all(), name


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_cast(dtype, tmp_path, wide):
    report = convert(wide, tmp_path / "out", dtype=dtype)
    types = {info.dtype for info in open_checkpoint(tmp_path / "out").tensors.values()}
    assert types == {{"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]}
    assert report.preview.bits_per_weight == (32 if dtype == "float32" else 16)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == dtype
    # bfloat16 to float16 loses nothing of weights of this size, to itself and to float32 nothing at all
    np.testing.assert_allclose(logprobs(tmp_path / "out"), logprobs(wide), atol=1e-4)


@pytest.mark.parametrize(
    ("bits", "group_size", "tolerance"), [(8, 32, 0.25), (8, 64, 0.25), (4, 32, 3.0), (4, 64, 3.0)]
)
def test_quantized(bits, group_size, tolerance, tmp_path, wide):
    report = convert(wide, tmp_path / "out", bits=bits, group_size=group_size)
    tensors = open_checkpoint(tmp_path / "out").tensors
    packed = {name.removesuffix(".scales") for name in tensors if name.endswith(".scales")}
    assert all(name.startswith("language_model.") for name in packed)
    assert {"language_model.model.embed_tokens", "language_model.lm_head"} <= packed
    narrow = [f"language_model.model.layers.{i}.mlp.down_proj.weight" for i in range(2)]  # width 96
    assert [name for name, _ in report.preview.skipped] == ([] if group_size == 32 else narrow)
    assert all("its width 96 is no multiple of 64" in reason for _, reason in report.preview.skipped)
    assert report.preview.bytes == sum(info.nbytes for info in tensors.values())
    settings = {"group_size": group_size, "bits": bits, "mode": "affine"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization"] == settings
    difference = np.abs(logprobs(tmp_path / "out") - logprobs(wide)).max()
    assert 1e-4 < difference < tolerance
    model = plan(open_checkpoint(tmp_path / "out")).model
    row = model.decoder.layers[0].self_attn.q_proj
    assert (row.bits, row.group_size) == (bits, group_size)


@pytest.mark.parametrize("bits", [2, 3, 5, 6])
def test_every_number_of_bits(bits, tmp_path, wide):
    report = convert(wide, tmp_path / "out", bits=bits, group_size=32)
    assert report.preview.skipped == ()
    model, processor = load(tmp_path / "out")
    assert model.decoder.embed_tokens.bits == bits
    assert np.isfinite(np.array(model(processor("Hi", [PHOTO])))).all()


@pytest.mark.parametrize(("mode", "bits", "group_size"), [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)])
def test_floating_point_modes(mode, bits, group_size, tmp_path, wide):
    convert(wide, tmp_path / "out", mode=mode, part_bits={"vision": 8})
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert {key: settings[key] for key in ("mode", "bits", "group_size")} == {
        "mode": mode,
        "bits": bits,
        "group_size": group_size,
    }
    model = plan(open_checkpoint(tmp_path / "out")).model
    row = model.decoder.layers[0].mlp.up_proj
    assert (row.mode, row.bits, row.group_size) == (mode, bits, group_size)
    difference = np.abs(logprobs(tmp_path / "out") - logprobs(wide)).max()
    assert 1e-4 < difference < (0.6 if bits == 8 else 4.0)
    with pytest.raises(CheckpointError, match=f"{mode} has {bits} bits, not 6"):
        convert(wide, tmp_path / "other", mode=mode, bits=6)


def test_parts_may_have_bits_of_their_own(tmp_path, wide):
    bits = {"vision": 8, "projector": 6, "embeddings": 8, "head": 5}
    report = convert(wide, tmp_path / "out", bits=4, group_size=32, part_bits=bits)
    fc2 = [f"vision_tower.vision_model.encoder.layers.{i}.mlp.fc2.weight" for i in range(2)]
    assert report.preview.skipped == tuple((name, "its width 72 is no multiple of 32") for name in fc2)
    model = plan(open_checkpoint(tmp_path / "out")).model
    block = model.vision.blocks[0]
    layers = block.attn.q_proj, block.mlp.fc1, model.decoder.embed_tokens, model.decoder.lm_head
    assert [layer.bits for layer in (*layers, model.decoder.layers[0].mlp.up_proj)] == [8, 8, 8, 5, 4]
    assert not hasattr(block.mlp.fc2, "bits") and not hasattr(model.vision.patch_embed, "scales")
    assert model.projector.layers[1].bits == 6
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert settings["language_model.lm_head"] == {"group_size": 32, "bits": 5, "mode": "affine"}
    assert (settings["bits"], "language_model.model.layers.0.mlp.up_proj" in settings) == (4, False)


def test_bits_per_weight_of_a_quantized_folder_counts_its_weights(tmp_path, wide):
    report = convert(wide, tmp_path / "out", bits=4, group_size=32)
    again = convert(tmp_path / "out", tmp_path / "again")
    assert (again.preview.weights, again.preview.bytes) == (report.preview.weights, report.preview.bytes)
    assert report.preview.weights == sum(map(open_checkpoint(wide).num_weights, open_checkpoint(wide).tensors))


def test_a_module_with_settings_of_its_own_is_loaded_by_them(tmp_path, wide):
    """mlx-lm's form: one entry in config.json per module that differs."""
    convert(wide, tmp_path / "out", bits=4, group_size=64)
    name = "language_model.model.layers.0.self_attn.q_proj"
    tensors = dict(mx.load(str(tmp_path / "out" / "model.safetensors")))
    original = mx.load(str(wide / "model.safetensors"))[f"{name}.weight"]
    for part, array in zip(("weight", "scales", "biases"), mx.quantize(original, group_size=32, bits=8), strict=True):
        tensors[f"{name}.{part}"] = array
    mx.save_safetensors(str(tmp_path / "new.safetensors"), tensors, {"format": "mlx"})
    (tmp_path / "new.safetensors").replace(tmp_path / "out" / "model.safetensors")
    settings = {"group_size": 64, "bits": 4, name: {"group_size": 32, "bits": 8}}
    edit_json(tmp_path / "out" / "config.json", quantization=settings)
    model = plan(open_checkpoint(tmp_path / "out")).model
    assert [(layer.self_attn.q_proj.bits, layer.self_attn.q_proj.group_size) for layer in model.decoder.layers] == [
        (8, 32),
        (4, 64),
    ]
    edit_json(tmp_path / "out" / "config.json", quantization={"group_size": 64, "bits": 4})
    with pytest.raises(CheckpointError, match="q_proj"):
        load(tmp_path / "out")


def test_shards(tmp_path):
    def output(name: str, count: int) -> Output:
        return Output(((name, "F32", (count,)),), lambda: (mx.full((count,), count, dtype=mx.float32),))

    outputs = [output(f"t{i}", count) for i, count in enumerate((10, 20, 100, 1, 2, 29))]
    shards = split_shards(outputs, 130)
    names = [[output.entries[0][0] for output in shard] for shard in shards.values()]
    assert names == [["t0", "t1"], ["t2"], ["t3", "t4", "t5"]]
    with Workplace(tmp_path / "out") as work:
        work.start({})
        write_tensors(work, outputs, shard_limit=130)
        work.finish()
    tmp_path = tmp_path / "out"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert {file.name for file in tmp_path.iterdir()} == {*shards, "model.safetensors.index.json", "conversion.json"}
    assert index["metadata"]["total_size"] == 4 * 162
    for i, count in enumerate((10, 20, 100, 1, 2, 29)):
        array = mx.load(str(tmp_path / index["weight_map"][f"t{i}"]))[f"t{i}"]
        assert array.tolist() == [count] * count


def test_the_destination_is_never_overwritten(tmp_path, wide):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("keep me")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        convert(wide, tmp_path / "out")
    with pytest.raises(CheckpointError, match="is a file"):
        convert(wide, tmp_path / "out" / "precious.txt")
    assert (tmp_path / "out" / "precious.txt").read_text() == "keep me"
    (tmp_path / "empty").mkdir()
    convert(wide, tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").is_file()


def test_a_failure_leaves_nothing(tmp_path, wide):
    def fail(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(wide, tmp_path / "out", progress=fail)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_stopped_process_leaves_no_destination(tmp_path, wide, sent):
    """After SIGKILL at most the hidden work folder is left."""
    code = (
        "import sys, time; from mlx_vlm_mini.convert import write; from mlx_vlm_mini.cli.main import main\n"
        "to_bytes = write._to_bytes\n"
        "def slow(array): print('.', flush=True); time.sleep(0.05); return to_bytes(array)\n"
        "write._to_bytes = slow; main()"
    )
    command = [sys.executable, "-c", code, "convert", str(wide), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None and process.stdout.readline()
        time.sleep(0.1)
        os.kill(process.pid, sent)
        assert process.wait(timeout=30) == (-sent if sent == signal.SIGKILL else 128 + sent)
        assert "Traceback" not in process.stderr.read()
    left = [] if sent != signal.SIGKILL else [".out.partial"]
    assert [file.name for file in tmp_path.iterdir()] == left


def test_what_cannot_be_quantized_is_said(tmp_path, wide):
    with pytest.raises(CheckpointError, match="nothing in .* can be quantized in groups of 64"):
        convert(GOLDEN / "llava-clip-llama", tmp_path / "out", bits=4)


def test_a_folder_that_could_not_answer_is_refused_before_the_work(tmp_path, copy_of):
    folder = copy_of()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer.json"):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 7}, "bits, not to 7"),
        ({"bits": 4, "group_size": 48}, "weights, not 48"),
        ({"part_bits": {"head": 1}}, "bits, not to 1"),
    ],
)
def test_bits_and_groups_that_mlx_does_not_have(tmp_path, wide, options, message):
    with pytest.raises(CheckpointError, match=message):
        convert(wide, tmp_path / "out", **options)


def test_code_is_not_copied(tmp_path, copy_of):
    folder = copy_of()
    (folder / "modeling_evil.py").write_text("1/0")
    convert(folder, tmp_path / "out")
    assert not (tmp_path / "out" / "modeling_evil.py").exists()


def test_conversions_share_their_streams(tmp_path, monkeypatch):
    """Each stream of MLX is a thread that never ends."""
    convert(GOLDEN / "llava-clip-llama", tmp_path / "first", dtype="float16")
    monkeypatch.setattr(mx, "new_stream", None)
    convert(GOLDEN / "llava-clip-llama", tmp_path / "second", dtype="float16")
