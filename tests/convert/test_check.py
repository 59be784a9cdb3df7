"""The check of a result: what works passes, what is broken exits 1."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import edit_json
from click.testing import CliRunner
from reference import GOLDEN, SPECS

from mlx_vlm_mini.checkpoints.folder import open_checkpoint
from mlx_vlm_mini.checkpoints.load import load_processor, plan
from mlx_vlm_mini.cli.main import main
from mlx_vlm_mini.convert import convert
from mlx_vlm_mini.convert.calibrate import Observed, divergence, observe
from mlx_vlm_mini.convert.check import check_samples, compare, look
from mlx_vlm_mini.data.questions import write_scenes


def run(*arguments):
    return CliRunner().invoke(main, ["convert", *map(str, arguments)])


def check(source, result, say=None):
    return compare(look(open_checkpoint(source), "source", say), look(open_checkpoint(result), "result", say))


def samples_of(folder):
    planned = plan(open_checkpoint(folder))
    return planned, check_samples(load_processor(planned.checkpoint, planned.family, planned.config))


@pytest.mark.parametrize("name", sorted(SPECS))
def test_layer_by_layer_equals_the_whole_model(name):
    from mlx_vlm_mini import load

    planned, samples = samples_of(GOLDEN / name)
    observed = observe(planned, samples, mx.float32)
    model, _ = load(GOLDEN / name)
    for sample, logprobs in list(zip(samples, observed.logprobs, strict=True))[::3]:
        logits = model(sample.inputs)[0, sample.start - 1 :]
        whole = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        np.testing.assert_allclose(logprobs, np.array(whole), atol=1e-5)
        assert len(logprobs) == len(sample.inputs.slots) - sample.start + 1


def test_a_faithful_conversion_works(tmp_path, wide):
    convert(wide, tmp_path / "out")
    said = []
    found = check(wide, tmp_path / "out", said.append)
    assert (found.problems, found.mean_kl, found.top1) == ((), 0.0, 1.0)
    assert found.cosine == pytest.approx(1) and found.influence == found.source_influence > 0.01
    assert {"checking: source, vision", "checking: result, layer 2 of 2"} <= set(said)


def test_quantized_models_are_checked_as_they_compute(tmp_path, wide):
    """The check dequantizes on a CPU; the model itself multiplies by packed weights."""
    from mlx_vlm_mini import load

    convert(wide, tmp_path / "out", bits=4, group_size=32, part_bits={"vision": 8, "projector": 8})
    planned, samples = samples_of(tmp_path / "out")
    logprobs = observe(planned, samples[:1], mx.float32).logprobs[0]
    model, _ = load(tmp_path / "out")
    logits = model(samples[0].inputs)[0, samples[0].start - 1 :]
    np.testing.assert_allclose(logprobs, np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True)), atol=1e-3)


def break_tensors(folder, wanted, change, made_by="mlx"):
    """Change tensors of a folder whose names contain a text."""
    tensors = dict(mx.load(str(folder / "model.safetensors")))
    names = [name for name in tensors if wanted in name]
    assert names
    for name in names:
        tensors[name] = change(tensors[name])
    mx.save_safetensors(str(folder / "new.safetensors"), tensors, {"format": made_by})
    (folder / "new.safetensors").replace(folder / "model.safetensors")


def shuffled(array):
    return mx.array(
        np.random.default_rng(0).permutation(np.array(array.astype(mx.float32)).ravel()).reshape(array.shape)
    )


@pytest.mark.parametrize(
    ("wanted", "change", "problem"),
    [
        ("multi_modal_projector.linear_2.weight", shuffled, "image features' cosine"),
        ("layers.0.self_attn.v_proj.scales", lambda array: array * mx.inf, "not finite"),
        (".scales", lambda array: -array, "nats from the source's"),
        ("multi_modal_projector", lambda array: array * 0, "another picture does not change its answers"),
    ],
)
def test_broken_results(wanted, change, problem, tmp_path, wide):
    convert(wide, tmp_path / "out", bits=8, group_size=32)
    assert check(wide, tmp_path / "out").problems == ()
    break_tensors(tmp_path / "out", wanted, change)
    found = check(wide, tmp_path / "out")
    assert any(problem in each for each in found.problems), found
    json.dumps(found.as_json(), allow_nan=False)
    assert found.as_json()["verdict"] == "broken"


def test_pictures_without_influence_in_the_source_are_no_fault():
    """A source that is blind cannot be made blinder."""
    rng = np.random.default_rng(0)
    logprobs = np.log(rng.dirichlet(np.ones(7), 5)).astype(np.float32)
    blind = Observed([np.ones((2, 3))] * 4, [logprobs] * 4)
    assert compare(blind, blind).problems == ()
    seeing = Observed(blind.features, [np.log(rng.dirichlet(np.ones(7), 5)) for _ in range(4)])
    assert any("another picture" in each for each in compare(seeing, blind).problems)


def test_divergence():
    one, other = np.log([[0.5, 0.5], [0.9, 0.1]]), np.log([[0.25, 0.75], [0.9, 0.1]])
    np.testing.assert_allclose(divergence(one, other), [0.5 * np.log(2) + 0.5 * np.log(2 / 3), 0], atol=1e-12)


def test_convert_checks_and_writes_down_what_it_found(tmp_path, wide):
    result = run(wide, tmp_path / "out", "-q", 8, "--group-size", 32)
    assert result.exit_code == 0
    assert "KL divergence, mean" in result.stderr and "verdict                  works" in result.stderr
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert record["check"]["verdict"] == "works" and 0 < record["check"]["mean_kl"] < 0.1
    assert record["check"]["cosine"] == pytest.approx(1, abs=1e-3) and record["check"]["problems"] == []
    assert record["bits_per_weight"] == pytest.approx(8 * sum(
        info.nbytes for info in open_checkpoint(tmp_path / "out").tensors.values()
    ) / sum(map(open_checkpoint(wide).num_weights, open_checkpoint(wide).tensors)))  # fmt: skip
    assert set(record["source"]["sha256"]) == {"model.safetensors"}
    identity = record["identity"]
    assert set(identity["versions"]) >= {"mlx_vlm_mini", "mlx"}
    assert (identity["settings"]["bits"], identity["settings"]["method"]) == (8, "round")


def test_no_check(tmp_path, wide):
    result = run(wide, tmp_path / "out", "--no-check")
    assert result.exit_code == 0 and "KL divergence" not in result.stderr
    assert json.loads((tmp_path / "out" / "conversion.json").read_text())["check"] is None


def test_a_broken_result_exits_1_and_says_why(tmp_path, wide, monkeypatch):
    from mlx_vlm_mini.convert import conversion

    plan_outputs = conversion.plan_outputs

    def sabotage(*arguments, **options):
        """Scales of a thousand times their size, written as if nothing were the matter."""
        outputs, quantized, skipped = plan_outputs(*arguments, **options)
        for output in outputs:
            if len(output.entries) == 3 and "v_proj" in output.entries[0][0]:
                object.__setattr__(
                    output, "make", lambda make=output.make: (lambda w, s, b: (w, s * 1000, b * 0))(*make())
                )
        return outputs, quantized, skipped

    monkeypatch.setattr(conversion, "plan_outputs", sabotage)
    result = run(wide, tmp_path / "out", "-q", 8, "--group-size", 32)
    assert result.exit_code == 1
    assert f"Error: {tmp_path / 'out'} is broken: its answers are" in result.stderr.splitlines()[-1]
    assert json.loads((tmp_path / "out" / "conversion.json").read_text())["check"]["verdict"] == "broken"
    shutil.rmtree(tmp_path / "out")
    assert run(wide, tmp_path / "out", "-q", 8, "--group-size", 32, "--no-check").exit_code == 0


def test_recipes_from_the_terminal(tmp_path, wide):
    """A budget alone means auto; the plan shows what each part got."""
    write_scenes(tmp_path / "scenes", 4, seed=1)
    result = run(
        wide, tmp_path / "out", "--bits-per-weight", 7, "--group-size", 32, "--method", "gptq",
        "--calibration", tmp_path / "scenes" / "images",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    settings = json.loads((tmp_path / "out" / "conversion.json").read_text())["identity"]["settings"]
    assert (settings["recipe"], settings["bits_per_weight"], settings["method"]) == ("auto", 7.0, "gptq")
    assert " bits + " in result.stderr and "these bits are a guess" in result.stderr


def test_a_source_that_does_not_run_is_found_before_the_work(tmp_path, copy_of):
    folder = copy_of()
    edit_json(folder / "preprocessor_config.json", size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    result = run(folder, tmp_path / "out")
    assert result.exit_code == 1
    assert "takes 42x42 pixels, the image processor gives 56x56" in result.stderr
    assert "found while checking the source; --no-check does without" in result.stderr
    assert not (tmp_path / "out").exists()
    assert run(folder, tmp_path / "out", "--no-check").exit_code == 0


def test_a_source_with_nan_is_said_to_be_broken(tmp_path, wide):
    folder = tmp_path / "nan"
    shutil.copytree(wide, folder)
    break_tensors(folder, "layers.0.self_attn.v_proj", lambda array: array * mx.nan, "pt")
    result = run(folder, tmp_path / "out", "--allow-nan")
    assert result.exit_code == 1 and "gives values that are not finite" in result.stderr
