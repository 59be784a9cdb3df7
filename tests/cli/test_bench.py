"""The bench command: columns, JSON, errors. No time is asserted."""

import json

from checkpoints import PHOTO, PLAIN
from click.testing import CliRunner
from mlx.utils import tree_flatten
from reference import GOLDEN

from mlx_vlm_mini import load
from mlx_vlm_mini.cli.main import main
from mlx_vlm_mini.cli.measure import measure_bandwidth, weight_bytes

QUICK = ["--bandwidth", "10", "--max-tokens", "2", "--context", "40,60"]


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["bench", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_json_and_table_have_all_columns():
    code, out, err = run(PLAIN, *QUICK, "-i", PHOTO, "--json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert (found["prompt_tokens"], found["image_tokens"], found["family"], found["dtype"]) == (
        39,
        9,
        "llava",
        "float32",
    )
    assert min(found[key] for key in ("load_s", "open_s", "encode_s", "first_token_s", "follow_up_s")) > 0
    assert found["bandwidth_bytes_per_s"] == 10e9 and found["peak_rss_bytes"] > found["peak_memory_bytes"] > 0
    for one, context in zip(found["decoding"], (40, 60), strict=True):
        cached = 2 * 2 * 20 * 4 * context  # layers x (keys and values) x head x bytes
        assert (one["context"], one["bytes_per_token"]) == (context, found["bytes_per_token"] + cached)
        assert one["python_s"] > 0
        share = one["bytes_per_token"] * one["tokens_per_s"] / 10e9
        assert abs(one["bandwidth_share"] - share) < 1e-9 * share
    assert set(found["versions"]) == {"mlx-vlm-mini", "mlx", "mlx-lm", "python"}
    assert found["trace_fault"] is None
    code, out, _ = run(GOLDEN / "gemma3-text", *QUICK)
    titles = [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("|")]
    assert code == 0 and titles[2:] == [
        "loading", "picture: opening and preprocessing", "picture: encoding", "first token, warm",
        "first token, follow-up turn", "tokens of the first prompt, of the picture", "weights, those read for a token",
        "memory bandwidth", "decoding behind 40 tokens", "decoding behind 60 tokens", "peak memory: MLX, process",
    ]  # fmt: skip
    assert "| picture: encoding | - |" in out and "10.0 GB/s" in out


def test_layers_whose_memory_does_not_grow():
    """Qwen3.5: of two contexts only the layer that attends reads more."""
    context = "120,160"
    _, out, _ = run(GOLDEN / "qwen3.5", *QUICK[:-1], context, "-i", PHOTO, "--json")
    first, second = json.loads(out)["decoding"]
    assert (first["context"], second["context"]) == (120, 160)
    heads, size = 1, 32  # of the one layer in four
    assert second["bytes_per_token"] - first["bytes_per_token"] == 40 * 2 * heads * size * 4


def test_of_experts_a_token_reads_those_that_it_takes():
    model, _ = load(GOLDEN / "qwen3.5-moe")
    arrays = dict(tree_flatten(model.decoder.parameters()))
    stacks = sum(array.nbytes for name, array in arrays.items() if ".switch_mlp." in name)
    everything = sum(array.nbytes for name, array in arrays.items() if name != "embed_tokens.weight")
    assert stacks and weight_bytes(model)["token"] == everything - stacks * 3 // 5  # two of five
    _, out, _ = run(GOLDEN / "qwen3.5-moe", *QUICK[:-1], "120", "-i", PHOTO)
    assert "| experts, those of a token | 5, 2 |" in out


def test_a_trace_that_failed_is_named(monkeypatch, traced_steps):
    def fail(decoder):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr("mlx_vlm_mini.generation.step._trace", fail)
    monkeypatch.setattr("mlx_vlm_mini.generation.step.BUILT_FIRST", 0)
    code, out, _ = run(PLAIN, *QUICK)
    assert code == 0 and "| decoding steps are built by Python | tracing failed: no such kernel |" in out.splitlines()


def test_bytes_of_a_token_are_those_of_the_weights_that_it_reads(llava):
    sizes = weight_bytes(llava[0])
    block = 16_632  # of the vision tower, the last, which nothing reads
    assert sizes == {"all": 4 * (187_764 - block), "token": 4 * (102_420 - 427 * 60)}
    tied, _ = load(GOLDEN / "paligemma-gemma")
    assert weight_bytes(tied)["token"] == sum(array.nbytes for _, array in tree_flatten(tied.decoder.parameters()))


def test_prompts_can_be_longer_and_contexts_end_where_the_model_does():
    found = json.loads(
        run(
            PLAIN,
            "--bandwidth",
            1,
            "--max-tokens",
            1,
            "--context",
            "9999",
            "--prompt-tokens",
            90,
            "-i",
            PHOTO,
            "--json",
        )[1]
    )
    assert 90 <= found["prompt_tokens"] < 130 and found["decoding"][0]["context"] == 512 - 11


def test_bandwidth_is_a_plausible_number():
    assert 1e8 < measure_bandwidth(rounds=1, size=1 << 22) < 1e14


def test_errors_are_one_line():
    for code, text, arguments in (
        (1, "nowhere", ["./nowhere/at/all", *QUICK]),
        (1, "image not found: nowhere.jpg", [PLAIN, "-i", "nowhere.jpg", *QUICK]),
        (2, "600,4000", [PLAIN, "--context", "six"]),
        (2, "--bandwidth", [PLAIN, "--bandwidth", "0"]),
        (1, "the context is 512", [PLAIN, "--prompt-tokens", 2000, *QUICK]),
    ):
        found, out, err = run(*arguments)
        assert (found, out) == (code, "") and text in err and "Traceback" not in err
        assert code == 2 or len(err.splitlines()) == 1
