"""Mixtures of experts: how they are chosen, where they lie in files, what conversion makes of them, what is refused."""

import json
import re

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import edit_json, with_paths
from click.testing import CliRunner
from reference import CASES, GOLDEN

from mlx_vlm_mini import load
from mlx_vlm_mini.checkpoints.describe import describe
from mlx_vlm_mini.checkpoints.folder import open_checkpoint
from mlx_vlm_mini.checkpoints.load import plan
from mlx_vlm_mini.checkpoints.weights import load_weights
from mlx_vlm_mini.cli.main import main
from mlx_vlm_mini.config import ExpertConfig
from mlx_vlm_mini.convert import convert, preview
from mlx_vlm_mini.convert.quantize import find_layers
from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.families import qwen3_vl
from mlx_vlm_mini.layers.experts import MoE, is_stack

MOE, VL_MOE = "qwen3.5-moe", "qwen3-vl-moe"
TOLERANCE = 1e-4


def last(folder, case="two_images"):
    model, processor = load(folder)
    logits = model(processor(with_paths(CASES[case])))[0, -1]
    return np.array(logits - mx.logsumexp(logits))


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("tokens", [1, 40])  # above 64 choices mlx-lm sorts them
def test_experts_equal_plain_arithmetic(normed, tokens):
    config = ExpertConfig(
        num_experts=6, num_experts_per_tok=3, moe_intermediate_size=5, norm_topk_prob=normed,
        shared_expert_intermediate_size=7,
    )  # fmt: skip
    mx.random.seed(2)
    layer, x = MoE(8, config, "silu"), mx.random.normal((2, tokens, 8))
    weights = {name: np.array(layer.switch_mlp[f"{name}_proj"].weight, np.float64) for name in ("gate", "up", "down")}
    shared = {name: np.array(layer.shared_expert[f"{name}_proj"].weight, np.float64) for name in ("gate", "up", "down")}

    def silu(x):
        return x / (1 + np.exp(-x))

    def expert(x, gate, up, down):
        return down @ (silu(gate @ x) * (up @ x))

    expected = []
    for row in np.array(x, np.float64).reshape(-1, 8):
        shares = np.exp(np.array(layer.gate.weight, np.float64) @ row)
        shares /= shares.sum()
        chosen = np.argsort(-shares)[:3]
        whole = shares[chosen].sum() if normed else 1
        y = sum(shares[i] / whole * expert(row, *(weights[name][i] for name in weights)) for i in chosen)
        gate = 1 / (1 + np.exp(-(np.array(layer.shared_expert_gate.weight, np.float64) @ row)))
        expected.append(y + gate * expert(row, *shared.values()))
    np.testing.assert_allclose(np.array(layer(x)).reshape(-1, 8), np.stack(expected), atol=1e-5)


def rewrite(folder, change, kind="pt"):
    """Change a folder's tensors, given as a dict."""
    checkpoint = open_checkpoint(folder)
    tensors = change({name: checkpoint.read(name) for name in checkpoint.tensors})
    mx.eval(tensors)
    for file in folder.glob("model*"):
        file.unlink()
    mx.save_safetensors(
        str(folder / "model.safetensors"), {k: mx.contiguous(v) for k, v in tensors.items()}, {"format": kind}
    )


def fuse(tensors):
    """Experts that lie one by one as one tensor, as the Hub has Qwen3.5-MoE's."""
    found, parts = {}, {}
    for name, array in tensors.items():
        match = re.fullmatch(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name)
        if match is None:
            found[name] = array
        else:
            parts.setdefault(match[1], {}).setdefault(match[3], {})[int(match[2])] = array
    for name, kinds in parts.items():
        gate, up, down = (mx.stack([kinds[kind][i] for i in sorted(kinds[kind])]) for kind in ("gate", "up", "down"))
        found |= {f"{name}.gate_up_proj": mx.concatenate([gate, up], axis=1), f"{name}.down_proj": down}
    return found


def transpose(tensors):
    """(experts, in, out), as the Hub has Qwen3-VL-MoE's."""
    return {k: v.swapaxes(1, 2) if k.endswith(("gate_up_proj", "experts.down_proj")) else v for k, v in tensors.items()}


def as_mlx(tensors):
    """As mlx-community has them: other names, experts stacked, norms with their 1."""
    found = {}
    for name, array in tensors.items():
        shifted = name.endswith("norm.weight") and "linear_attn" not in name and "visual" not in name
        array = array + 1 if shifted and any("linear_attn" in each for each in tensors) else array
        if name.endswith(("conv1d.weight", "patch_embed.proj.weight")):
            array = mx.moveaxis(array, 1, -1)
        name = name.replace("model.language_model.", "language_model.model.").replace("model.visual.", "vision_tower.")
        name = name.replace(".experts.", ".switch_mlp.")
        if name.endswith("gate_up_proj"):
            gate, up = mx.split(array, 2, axis=1)
            stem = name.removesuffix("gate_up_proj")
            found |= {f"{stem}gate_proj.weight": gate, f"{stem}up_proj.weight": up}
            continue
        name = f"{name}.weight" if name.endswith("switch_mlp.down_proj") else name
        found["language_model.lm_head.weight" if name == "lm_head.weight" else name] = array
    return found


LAYOUTS = {
    "one tensor": (fuse, "pt"),
    "transposed": (lambda tensors: transpose(fuse(tensors)), "pt"),
    "mlx": (lambda tensors: as_mlx(fuse(tensors)), "mlx"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [MOE, VL_MOE])
def test_experts_are_found_however_they_lie(copy_of, name, layout):
    """Also where gate and up together are as wide as the hidden size, and their shape does not tell."""
    folder = copy_of(name)
    change, kind = LAYOUTS[layout]
    rewrite(folder, change, kind)
    np.testing.assert_allclose(last(folder), last(GOLDEN / name), atol=TOLERANCE)


@pytest.mark.parametrize("layout", ["one by one", *LAYOUTS])
def test_conversion_quantizes_experts_and_no_router(copy_of, tmp_path, layout):
    """The result answers as the source does but for its rounding; routers and gates stay what they are."""
    folder = copy_of(MOE)
    config = json.loads((folder / "config.json").read_text())
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    text = {**config["text_config"], **sizes}
    vision = {**config["vision_config"], "out_hidden_size": 64}
    edit_json(folder / "config.json", text_config=text, vision_config=vision)
    rng = np.random.default_rng(3)

    def widen(tensors):
        wide = {16: 64, 12: 32}
        found = {}
        for name, array in tensors.items():
            shape = array.shape
            if "language_model" in name or name == "lm_head.weight":
                own = (
                    "linear_attn.norm" in name or "conv1d" in name or name.endswith(("q_norm.weight", "k_norm.weight"))
                )
                shape = shape if own else tuple(wide.get(side, side) for side in shape)
            if name.startswith("model.visual.merger.linear_fc2"):
                shape = (64, *shape[1:])
            array = array if shape == array.shape else mx.array(rng.normal(size=shape).astype(np.float32)) / 8
            found[name] = array
        return found

    rewrite(folder, widen)
    change, kind = LAYOUTS.get(layout, (lambda tensors: tensors, "pt"))
    rewrite(folder, change, kind)
    convert(folder, tmp_path / "out", bits=8, group_size=32)
    converted = plan(open_checkpoint(tmp_path / "out"))
    load_weights(converted.model, converted.ours, converted.checkpoint, mx.float32, converted.family.WEIGHTS)
    exact = dict(load(folder)[0].named_modules())
    stacks = {path: module for path, module in converted.model.named_modules() if is_stack(module)}
    assert len(stacks) == 9 and all(module.bits == 8 for module in stacks.values())
    for path, module in stacks.items():  # a router decides otherwise where little changes, so that answers tell less
        values = mx.dequantize(module.weight, module.scales, module.biases, group_size=32, bits=8)
        np.testing.assert_allclose(np.array(values), np.array(exact[path].weight), atol=0.005)
    packed = {name.removesuffix(".scales") for name in converted.checkpoint.tensors if name.endswith(".scales")}
    assert any("expert" in name or "switch_mlp" in name for name in packed)
    assert not any(name.endswith((".mlp.gate", "expert_gate", "in_proj_a", "in_proj_b", "conv1d")) for name in packed)
    convert(tmp_path / "out", tmp_path / "back", dequantize=True)
    np.testing.assert_allclose(last(tmp_path / "back"), last(tmp_path / "out"), atol=1e-3)


@pytest.mark.parametrize("settings", [{"recipe": "auto", "bits_per_weight": 6.0}, {"method": "gptq", "bits": 8}])
def test_what_measures_layers_refuses_experts_by_name(settings, tmp_path):
    with pytest.raises(CheckpointError, match=r"do not measure experts \(model.language_model.layers.0.mlp.exp"):
        convert(GOLDEN / MOE, tmp_path / "out", group_size=32, **settings)


def test_weights_of_a_token_are_counted(tmp_path):
    """By `info` and by the plan of a conversion: of three layers with five experts of 3 x 16 x 12 weights two each."""
    decoder = describe(GOLDEN / MOE)["decoder"]
    idle = 3 * 3 * 3 * 16 * 12
    assert (decoder["experts"], decoder["experts_per_token"], decoder["linear_attention_layers"]) == (5, 2, 2)
    assert decoder["active_weights"] == decoder["weights"] - idle
    assert "experts" not in describe(GOLDEN / "qwen3.5")["decoder"]
    convert(GOLDEN / MOE, tmp_path / "out", bits=8, group_size=32)
    assert describe(tmp_path / "out")["decoder"]["active_weights"] == decoder["active_weights"]
    (note,) = preview(GOLDEN / MOE).notes
    assert note.startswith("a token takes 2 of 5 experts: ") and note.endswith(" billion weights")


def test_layers_to_quantize_are_named_once_each():
    layers = find_layers(plan(open_checkpoint(GOLDEN / MOE)))
    assert sum(".experts." in name for name in layers) == 3 * 5 * 3
    assert not any(name.endswith((".mlp.gate.weight", "shared_expert_gate.weight")) for name in layers)
    whole = find_layers(plan(open_checkpoint(GOLDEN / VL_MOE)))
    assert sorted(name for name in whole if ".experts." in name)[:2] == [
        f"model.language_model.layers.0.mlp.experts.{part}_proj" for part in ("down", "gate_up")
    ]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (MOE, {"num_experts": 6}, r"lacks 9 tensors \(model.language_model.layers.0.mlp.experts.5.down_proj.weight"),
        (MOE, {"num_experts": 4}, r"has 9 tensors \(.*experts.4.*which config.json has no place for"),
        (MOE, {"num_experts_per_tok": 6}, "a token cannot have 6 of 5 experts"),
        (MOE, {"num_experts_per_tok": 0}, "num_experts_per_tok must be a whole number"),
        (MOE, {"num_experts": 10**9}, "num_experts must be a whole number from 1 to 100000000"),
        (MOE, {"num_experts": 10**8}, "the files do not belong together"),
        (MOE, {"moe_intermediate_size": 8}, "has shape"),
        (MOE, {"mlp_only_layers": [1]}, "layers without experts"),
        (MOE, {"layer_types": ["linear_attention", "full_attention", "mamba"]}, "not 'mamba'"),
        (VL_MOE, {"num_local_experts": 7}, r"has shape \[6, 16\], config.json asks for \[7, 16\]"),
        (VL_MOE, {"moe_intermediate_size": 9}, "has shape"),
        (VL_MOE, {"decoder_sparse_step": 2}, "layers without experts"),
    ],
)
def test_experts_that_do_not_fit_are_refused_in_a_line(copy_of, name, changes, message):
    folder = copy_of(name)
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit_json(folder / "config.json", text_config={**text, **changes})
    with pytest.raises(CheckpointError, match=message) as error:
        load(folder)
    assert "\n" not in str(error.value)
    for command in (["generate", folder, "-p", "What?"], ["convert", folder, folder / "out"]):
        result = CliRunner().invoke(main, [*map(str, command)])
        assert (result.exit_code, result.stdout) == (1, "") and re.fullmatch(r"Error: .*\n", result.stderr)


def test_a_missing_expert_is_named(copy_of):
    folder, name = copy_of(MOE), "model.language_model.layers.1.mlp.experts.2.up_proj.weight"
    rewrite(folder, lambda tensors: {each: array for each, array in tensors.items() if each != name})
    with pytest.raises(CheckpointError, match=f"lacks 1 tensor .{name}"):
        load(folder)


def test_experts_some_of_which_lie_otherwise_are_refused(copy_of):
    folder = copy_of(MOE)
    down = "experts.down_proj"
    rewrite(folder, lambda tensors: {k: v.swapaxes(1, 2) if down in k else v for k, v in fuse(tensors).items()})
    with pytest.raises(CheckpointError, match="gate_up_proj has shape"):
        load(folder)


def test_a_dense_family_takes_no_experts():
    with pytest.raises(CheckpointError, match="experts"):
        qwen3_vl.config({"text_config": {"num_experts": 4}})
