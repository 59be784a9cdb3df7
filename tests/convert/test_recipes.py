"""Quantization better than rounding: compensated errors, and bits where they matter."""

import json
from dataclasses import replace
from itertools import product

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import PHOTO, PLAIN
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import GOLDEN

from mlx_vlm_mini import load
from mlx_vlm_mini.checkpoints.folder import open_checkpoint
from mlx_vlm_mini.checkpoints.load import load_processor, plan
from mlx_vlm_mini.checkpoints.weights import join_rows, split_rows
from mlx_vlm_mini.convert import convert, preview
from mlx_vlm_mini.convert.calibrate import divergence, observe, read_samples, scene_samples
from mlx_vlm_mini.convert.compensate import Seen, compensate, fit, output_error, pack
from mlx_vlm_mini.convert.quantize import BITS, Quantization
from mlx_vlm_mini.convert.recipe import mixed, spend
from mlx_vlm_mini.data.questions import write_scenes
from mlx_vlm_mini.errors import CheckpointError, PromptError


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Scenes to calibrate with, fewer than the default."""
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, 6, seed=3, test=True)
    return folder / "scenes.jsonl"


def mean_kl(source, result):
    planned = plan(open_checkpoint(source))
    samples = scene_samples(load_processor(planned.checkpoint, planned.family, planned.config), 6, seed=5)
    one, other = (observe(plan(open_checkpoint(folder)), samples, mx.float32) for folder in (source, result))
    return float(divergence(np.concatenate(one.logprobs), np.concatenate(other.logprobs)).mean())


@pytest.mark.parametrize("bits", BITS)
def test_packed_codes_are_those_that_mlx_reads(bits):
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, (5, 96))
    codes[0], codes[1] = 0, 2**bits - 1
    scales, biases = mx.full((5, 3), 0.5), mx.full((5, 3), -2.0)
    read = mx.dequantize(pack(codes, bits), scales, biases, group_size=32, bits=bits)
    assert (np.array(read) == codes * 0.5 - 2).all()
    packed = mx.quantize(read, group_size=32, bits=bits)[0]
    assert pack(codes, bits).shape == packed.shape and pack(codes, bits).dtype == packed.dtype


def layer(rows=24, columns=128, tokens=300, dtype=mx.bfloat16):
    """A weight with heavy tails, and inputs that go together."""
    rng = np.random.default_rng(1)
    weight = mx.array(rng.standard_t(4, (rows, columns)).astype(np.float32)).astype(dtype)
    inputs = rng.standard_normal((tokens, columns)) @ (np.eye(columns) + rng.normal(0, 0.1, (columns, columns)))
    return weight, inputs * np.exp(rng.normal(0, 1, columns))


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 64), (4, 64), (5, 128), (6, 64), (8, 64)])
def test_compensated_outputs_are_nearer_than_rounded_ones(bits, group_size, dtype):
    weight, inputs = layer(dtype=dtype)
    quantization, seen = Quantization(bits, group_size), Seen(inputs.T @ inputs)
    packed, rounded = compensate(weight, seen, quantization), mx.quantize(weight, **quantization.as_config())
    assert [(each.shape, each.dtype) for each in packed] == [(each.shape, each.dtype) for each in rounded]
    exact = np.array(weight.astype(mx.float32))
    ours, theirs = (output_error(exact, each, seen, quantization) for each in (packed, rounded))
    values = np.array(mx.dequantize(*packed, **quantization.as_config()).astype(mx.float32))
    real = np.square(inputs @ (exact - values).T).sum(axis=0)  # what the error is, computed from the outputs themselves
    np.testing.assert_allclose(ours, real, rtol=1e-6)
    assert (ours <= theirs).all() and ours.sum() < 0.6 * theirs.sum()


def test_compensation_is_never_worse_whatever_the_inputs():
    """Inputs that never come, that are all one vector, or that are nothing at all."""
    weight, inputs = layer()
    quantization = Quantization(4, 64)
    exact = np.array(weight.astype(mx.float32))
    dead = inputs * (np.arange(128) % 3 > 0)
    for each in (dead, np.ones((1, 128)), np.zeros((2, 128)), inputs[:5], 1e-6 * inputs):
        seen = Seen(each.T @ each)
        ours, theirs = (
            output_error(exact, packed, seen, quantization)
            for packed in (compensate(weight, seen, quantization), mx.quantize(weight, **quantization.as_config()))
        )
        assert np.isfinite(ours).all() and (ours <= theirs).all()
    flat = mx.zeros((2, 128), dtype=mx.bfloat16)  # a scale of zero
    packed = compensate(flat, Seen(inputs.T @ inputs), quantization)
    assert (mx.dequantize(*packed, **quantization.as_config()) == 0).all()


def test_fitted_groups_are_nearer_than_those_of_mlx():
    weight, _ = layer()
    exact, quantization = np.array(weight.astype(mx.float32)), Quantization(4, 64)
    scales, biases = fit(exact, np.ones(128), quantization, mx.bfloat16)
    for each in (scales, biases):  # they can be stored
        assert (np.array(mx.array(each).astype(mx.bfloat16).astype(mx.float32)) == each).all()
    packed = compensate(weight, None, quantization)
    rounded = mx.quantize(weight, **quantization.as_config())
    errors = [output_error(exact, each, None, quantization).sum() for each in (packed, rounded)]
    assert errors[0] < 0.9 * errors[1]


def random_layers(seed, count=7):
    rng = np.random.default_rng(seed)
    losses = [
        {bits: float(x * 4.0**-bits * y) for bits, y in zip(BITS, rng.uniform(0.5, 2, 6), strict=True)}
        for x in rng.exponential(size=count)
    ]
    sizes = [{bits: int(n) * bits for bits in BITS} for n in rng.integers(1, 1000, count)]
    return losses, sizes


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.floats(2, 8), st.floats(2, 8))
def test_a_budget_is_kept_and_more_of_it_never_hurts(seed, one, other):
    losses, sizes = random_layers(seed)
    spent = []
    for bits in sorted((one, other)):
        budget = int(sum(each[2] for each in sizes) / 2 * bits) + 1
        chosen = spend(losses, sizes, budget)
        assert sum(size[bits] for size, bits in zip(sizes, chosen, strict=True)) <= budget
        spent.append(sum(loss[bits] for loss, bits in zip(losses, chosen, strict=True)))
    assert spent[1] <= spent[0]


def test_a_budget_is_spent_as_well_as_trying_everything():
    losses, sizes = random_layers(4, count=4)
    budget = sum(each[4] for each in sizes)

    def total(each, bits):
        return sum(one[b] for one, b in zip(each, bits, strict=True))

    best = min(total(losses, bits) for bits in product(BITS, repeat=4) if total(sizes, bits) <= budget)
    assert total(losses, spend(losses, sizes, budget)) == pytest.approx(best)


def test_mixed_gives_more_to_some_layers():
    """By its rule: of 16 layers the first and last two, and every third between them."""
    planned = plan(open_checkpoint(PLAIN))
    config = planned.config
    deep = replace(
        planned,
        config=replace(
            config, decoder=replace(config.decoder, num_hidden_layers=16, layer_types=("full_attention",) * 16)
        ),
        ours={
            f"decoder.layers.{i}.{name}.weight": f"{i}.{name}"
            for i in range(16)
            for name in ("self_attn.v_proj", "mlp.down_proj", "mlp.up_proj")
        }
        | {
            "decoder.lm_head.weight": "head",
            "decoder.embed_tokens.weight": "embed",
            "vision.blocks.0.attn.v_proj.weight": "eye",
        },
    )
    chosen = mixed(deep, {name: Quantization(4, 64) for name in deep.ours.values()})
    more = {name for name, each in chosen.items() if each.bits == 6}
    layers = (0, 1, 4, 7, 10, 13, 14, 15)
    assert more == {"head", "embed"} | {f"{i}.{name}" for i in layers for name in ("self_attn.v_proj", "mlp.down_proj")}
    assert {each.bits for each in chosen.values()} == {4, 6}


def settings_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization"]


@pytest.mark.parametrize("method", ["round", "gptq"])
def test_auto_keeps_its_budget_and_loads(method, tmp_path, wide, few):
    said, shown = [], []
    report = convert(
        wide, tmp_path / "out", recipe="auto", bits_per_weight=7.5, group_size=32, method=method, calibration=str(few),
        say=said.append, announce=shown.append,
    )  # fmt: skip
    assert report.preview.bits_per_weight <= 7.5
    assert report.preview.bits_per_weight > 7.3  # and uses it
    tensors = open_checkpoint(tmp_path / "out").tensors
    assert report.preview.bytes == sum(info.nbytes for info in tensors.values())
    assert any("measured" in each for each in said)
    guessed, measured = shown
    assert any("guess" in note for note in guessed.notes) and measured == report.preview
    model, processor = load(tmp_path / "out")
    bits = {
        each.bits for _, each in plan(open_checkpoint(tmp_path / "out")).model.named_modules() if hasattr(each, "bits")
    }
    assert len(bits) > 1
    assert np.isfinite(np.array(model(processor("Hi", [PHOTO])))).all()
    own = {name for name, each in settings_of(tmp_path / "out").items() if isinstance(each, dict)}
    assert own and all(f"{name}.scales" in tensors for name in own)


def test_auto_leaves_parts_with_bits_of_their_own_alone(tmp_path, wide, few):
    convert(
        wide, tmp_path / "out", recipe="auto", bits_per_weight=8.5, group_size=32, calibration=str(few),
        part_bits={"head": 8, "vision": 8},
    )  # fmt: skip
    model = plan(open_checkpoint(tmp_path / "out")).model
    assert (model.decoder.lm_head.bits, model.vision.blocks[0].attn.q_proj.bits) == (8, 8)


def test_compensated_models_are_nearer_than_rounded_ones(tmp_path, wide, few):
    """On pictures and words that no calibration saw."""
    for method in ("round", "gptq"):
        options = {} if method == "round" else {"calibration": str(few)}
        parts = {"vision": 4, "projector": 4}
        convert(wide, tmp_path / method, bits=4, group_size=32, method=method, part_bits=parts, **options)
    assert settings_of(tmp_path / "gptq") == settings_of(tmp_path / "round")
    rounded, compensated = (mean_kl(wide, tmp_path / method) for method in ("round", "gptq"))
    assert compensated < 0.8 * rounded


def test_a_fused_tensor_is_put_together_as_it_was_cut():
    array = mx.random.normal((24, 5))
    for rows, blocks in (([8, 8, 8], 1), ([12, 8, 4], 4), ([24], 1)):
        assert (join_rows(split_rows(array, rows, blocks), blocks) == array).all()


def test_fused_tensors_are_compensated(tmp_path, few):
    """InternVL's query, key and value in one, of which each is seen by itself."""
    source, parts = GOLDEN / "internvl-chat-llama", {"vision": 3}
    kl = {}
    for method in ("round", "gptq"):
        options = {} if method == "round" else {"calibration": str(few)}
        convert(source, tmp_path / method, bits=8, group_size=32, part_bits=parts, method=method, **options)
        kl[method] = mean_kl(source, tmp_path / method)
    assert "vision_model.encoder.layers.0.attn.qkv.scales" in open_checkpoint(tmp_path / "gptq").tensors
    assert 0 < kl["gptq"] < 0.8 * kl["round"]


def test_the_same_command_gives_the_same_files(tmp_path, wide, few):
    for name in ("one", "two"):
        convert(
            wide,
            tmp_path / name,
            recipe="auto",
            bits_per_weight=7.5,
            group_size=32,
            method="gptq",
            calibration=str(few),
        )
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_calibration_from_a_folder_or_a_file(tmp_path, few):
    planned = plan(open_checkpoint(PLAIN))
    processor = load_processor(planned.checkpoint, planned.family, planned.config)
    pictures = read_samples(processor, few.parent / "images", 4)
    assert len(pictures) == 4 and all(each.start == len(each.inputs.slots) for each in pictures)
    talks = read_samples(processor, few, 3)
    assert len(talks) == 3 and all(each.start < len(each.inputs.slots) for each in talks)
    with pytest.raises(CheckpointError, match="no pictures"):
        read_samples(processor, tmp_path, 3)
    (tmp_path / "bad.jsonl").write_text('{"messages": 3}\n')
    with pytest.raises(PromptError, match=r"bad.jsonl:1"):
        read_samples(processor, tmp_path / "bad.jsonl", 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "auto"}, "needs a budget"),
        ({"recipe": "auto", "bits_per_weight": 2.0, "group_size": 32}, "too few: with the fewest bits everywhere it takes"),
        ({"recipe": "auto", "bits_per_weight": 5, "bits": 4}, "chooses the bits itself"),
        ({"bits": 4, "bits_per_weight": 5}, "only recipe auto takes a budget"),
        ({"recipe": "mixed"}, "mixed needs bits"),
        ({"recipe": "best", "bits": 4}, "recipes are uniform, mixed, auto, not best"),
        ({"method": "awq", "bits": 4}, "methods are round, gptq, not awq"),
        ({"method": "gptq"}, "gptq needs bits"),
        ({"method": "gptq", "mode": "mxfp4"}, "mode mxfp4 goes with recipe uniform"),
        ({"bits": 4, "calibration": "pictures"}, "calibration serves"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together(wide, options, message):
    with pytest.raises(CheckpointError, match=message):
        preview(wide, **options)


def test_what_is_quantized_has_nothing_to_calibrate(tmp_path, wide):
    convert(wide, tmp_path / "four", bits=4, group_size=32)
    with pytest.raises(CheckpointError, match="needs the original weights"):
        convert(tmp_path / "four", tmp_path / "out", bits=3, group_size=32, method="gptq")
