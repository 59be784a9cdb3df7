"""The commands: transcripts, exit codes, one line for each error, and a light start."""

import base64
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from checkpoints import PHOTO, PLAIN, SHAPES, edit_json
from click.testing import CliRunner, Result
from reference import GOLDEN

import mlx_vlm_mini
from mlx_vlm_mini.cli.main import main
from mlx_vlm_mini.generation.engine import Request

ASK = ["generate", str(PLAIN), "-p", "What is in this image?"]


def run(*arguments: object, **options: object) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], **options)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def expected(case: str) -> tuple[list[int], np.ndarray]:
    with np.load(PLAIN / "expected.npz") as arrays:
        return arrays[f"{case}/token_ids"].tolist(), arrays[f"{case}/logprobs"]


@pytest.mark.parametrize(("owner", "name"), [(mlx_vlm_mini, "stream_generate"), (Request, "__iter__")])
def test_ctrl_c_counts_where_its_error_is_lost(owner, name, monkeypatch, tmp_path):
    """As in `mx.array` of an array of numpy's, which drops what is raised meanwhile: for one answer, and for many."""
    begin = getattr(owner, name)

    def losing(*given, **options):
        for number, chunk in enumerate(begin(*given, **options)):
            if number == 2:
                with suppress(KeyboardInterrupt):
                    signal.raise_signal(signal.SIGINT)
            yield chunk

    monkeypatch.setattr(owner, name, losing)
    (tmp_path / "prompts.txt").write_text("Hello\n")
    asked = ASK if name == "stream_generate" else [*ASK[:2], "--prompt-file", tmp_path / "prompts.txt"]
    assert run(*asked, "--max-tokens", 10, "-t", 0).exit_code == 128 + signal.SIGINT


def test_generate_as_json_gives_the_references_tokens():
    result = run(*ASK, "-i", PHOTO, "--max-tokens", 10, "-t", 0, "--json")
    assert result.exit_code == 0 and result.stderr == ""
    answer = json.loads(result.stdout)
    tokens, logprobs = expected("image")
    assert answer["token_ids"] == tokens
    np.testing.assert_allclose(answer["logprobs"], logprobs[np.arange(10), tokens], atol=1e-4)
    assert (answer["finish_reason"], answer["prompt_tokens"], answer["image_tokens"], answer["cached_tokens"]) == (
        "length",
        37,
        9,
        0,
    )
    assert set(answer["timings"]) == {"load_s", "image_s", "prefill_s", "first_token_s", "decode_s"}
    assert answer["images"] == [str(PHOTO)]
    assert answer["peak_memory_bytes"] > 0 and set(answer) == {
        "images", "text", "token_ids", "logprobs", "finish_reason", "prompt_tokens", "image_tokens", "cached_tokens", "timings",
        "peak_memory_bytes",
    }  # fmt: skip


def test_the_same_after_conversion(tmp_path):
    result = run("convert", PLAIN, tmp_path / "out")
    assert result.exit_code == 0
    line = f"{tmp_path / 'out'}: 0.8 MB from 0.8 MB, 32.00 bits per weight, in "
    assert re.fullmatch(re.escape(line) + r"\d+\.\d s\n", result.stdout)
    assert result.stderr.splitlines()[0] == "part        weights  stored as  bits per weight    size"
    answer = json.loads(run("generate", tmp_path / "out", *ASK[2:], "-i", PHOTO, "--max-tokens", 10, "--json").stdout)
    assert answer["token_ids"] == expected("image")[0]


def test_generate_prints_the_text():
    text = json.loads(run(*ASK, "-i", PHOTO, "--max-tokens", 10, "--json").stdout)["text"]
    result = run(*ASK, "-i", PHOTO, "--max-tokens", 10)
    assert (result.stdout, result.stderr, result.exit_code) == (text + "\n", "", 0)
    data_url = "data:image/jpeg;base64," + base64.b64encode(PHOTO.read_bytes()).decode()
    assert run(*ASK, "-i", data_url, "--max-tokens", 10).stdout == text + "\n"


def test_stdin_gives_the_prompt_or_an_image():
    text = run(*ASK, "-i", PHOTO, "--max-tokens", 5).stdout
    piped = run("generate", PLAIN, "-p", "-", "-i", PHOTO, "--max-tokens", 5, input="What is in this image?")
    assert piped.stdout == text
    assert run(*ASK, "-i", "-", "--max-tokens", 5, input=PHOTO.read_bytes()).stdout == text
    assert run("generate", PLAIN, "-p", "-", "-i", "-", input="x").exit_code == 2
    for command in (["generate", PLAIN, "-p", "-"], ["chat", PLAIN]):
        refused = run(*command, input=b"\xff\xfe\n")
        assert "not valid UTF-8" in refused.stderr and refused.stdout == ""


def test_a_conversation():
    lines = f"/image {SHAPES}\nWhat is it?\n/image '{PHOTO}'\nAnd this?\n\n/help\n/nonsense\n/image /no/such.png\n/clear\nHello\n/quit\nnever read\n"
    result = run("chat", PLAIN, "--max-tokens", 4, input=lines)
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == 3
    notes = result.stderr.splitlines()
    assert notes[:2] == ["1 image will be shown with your next message."] * 2
    assert notes[2].startswith("/image PATH")
    assert notes[-3:] == [
        "unknown command /nonsense; /help lists them, // begins a message with a slash",
        "Error: image not found: /no/such.png",
        "The conversation is forgotten.",
    ]
    shown = run("chat", PLAIN, "-i", SHAPES, "--max-tokens", 4, input="What is it?\n").stdout
    assert shown == result.stdout.splitlines(keepends=True)[0]


def test_info():
    described = json.loads(run("info", PLAIN, "--json", "--check").stdout)
    assert (described["family"], described["format"], described["types"]) == ("llava", "torch", "F32")
    parts = [described[part] for part in ("vision", "projector", "decoder")]
    assert sum(part["weights"] for part in parts) + described["unused"] == described["weights"] == 187860
    assert sum(part["bytes"] for part in parts) + 4 * described["unused"] == described["bytes"] == 4 * 187860
    assert parts[0]["image_tokens"] == 9 and described["image_token"] == "<image>"
    text = run("info", PLAIN, "--check").stdout
    assert "family           llava\n" in text and "every tensor has its place, name and shape" in text


def test_info_of_a_quantized_folder(tmp_path, wide):
    run("convert", wide, tmp_path / "out", "-q", 4, "--group-size", 32)
    described = json.loads(run("info", tmp_path / "out", "--json", "--check").stdout)
    assert described["quantization"] == {"bits": 4, "group_size": 32, "mode": "affine"}
    assert described["vision"]["bits_per_weight"] == 16
    assert 5.0 <= described["decoder"]["bits_per_weight"] < 5.2  # 4 bits, and a scale and a bias of 16 bits for 32


def test_bits_of_single_parts(tmp_path, wide):
    """Each option of the command reaches its part."""
    options = (
        "-q",
        4,
        "--group-size",
        32,
        "--vision-bits",
        8,
        "--projector-bits",
        6,
        "--embedding-bits",
        5,
        "--head-bits",
        3,
        "--decoder-bits",
        2,
        "--no-check",  # which finds random weights in 2 bits broken
    )
    assert run("convert", wide, tmp_path / "out", *options).exit_code == 0
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    own = {name: entry["bits"] for name, entry in settings.items() if isinstance(entry, dict)}
    names = (
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1",
        "multi_modal_projector.linear_2",
        "language_model.model.embed_tokens",
        "language_model.lm_head",
    )
    assert [own.get(name, settings["bits"]) for name in names] == [8, 6, 5, 3]
    assert own.get("language_model.model.layers.0.mlp.up_proj", settings["bits"]) == 2
    assert run("convert", wide, tmp_path / "bad", "--mode", "mxfp4", "-q", 8).exit_code == 1


def test_info_check_finds_what_is_broken(copy_of):
    folder = copy_of()
    edit_json(folder / "config.json", vision_feature_select_strategy="full")
    assert run("info", folder, "--check").exit_code == 0
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 99
    (folder / "config.json").write_text(json.dumps(config))
    assert run("info", folder).exit_code == 0
    result = run("info", folder, "--check")
    assert result.exit_code == 1 and "config.json asks for [99, 60]" in result.stderr


def test_what_is_not_quantized_is_listed(tmp_path, wide):
    result = run("convert", wide, tmp_path / "out", "-q", "4")
    assert result.exit_code == 0
    lines = [line for line in result.stderr.splitlines() if line.startswith("not quantized: ")]
    name = "language_model.model.layers.*.mlp.down_proj.weight"
    assert lines == [f"not quantized: 2 times {name}, its width 96 is no multiple of 64"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "/no/such", "-p", "x"], "folder not found: /no/such"),
        (["generate", GOLDEN, "-p", "x"], "has no config.json: it is not a checkpoint folder"),
        (["generate", PLAIN, "-p", ""], "the prompt is empty"),
        (["generate", PLAIN, "-p", "x", "-i", "/no/such.png"], "image not found: /no/such.png"),
        (["generate", PLAIN, "-p", "x", "-i", PLAIN / "config.json"], "is not an image that Pillow can read, but text"),
        (["generate", PLAIN, "-p", "a\udcff"], "not valid UTF-8"),
        (["generate", "~nobody-of-this-name/x", "-p", "x"], "folder not found"),
        (["chat", "/no/such"], "folder not found: /no/such"),
        (["info", "/no/such"], "folder not found: /no/such"),
        (["convert", "/no/such", "/tmp/never"], "folder not found: /no/such"),
        (["convert", PLAIN, PLAIN.parent / "paligemma-gemma"], "exists and is not empty"),
        (["convert", PLAIN, PLAIN], "is the source, or lies in it, or holds it"),
        (["convert", PLAIN, "/proc/no/way"], "/proc"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_1(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("Error: ")
    assert message in result.stderr


def test_a_template_without_room_for_images(copy_of):
    folder = copy_of()
    edit_json(
        folder / "chat_template.json", chat_template="{% for m in messages %}{{ m.content[-1].text }}{% endfor %}"
    )
    result = run("generate", folder, "-p", "x", "-i", PHOTO)
    assert result.exit_code == 1 and "has 0 places for an image (<image>), the messages hold 1 images" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [["generate", PLAIN], ["nonsense"], ["generate", PLAIN, "-p", "x", "--max-tokens", "0"], ["convert", PLAIN, "x", "-q", "7"], ["eval"]],
)  # fmt: skip
def test_wrong_usage_is_exit_code_2(arguments):
    result = run(*arguments)
    assert result.exit_code == 2 and result.stderr.startswith("Usage: ")


def python(code: str) -> str:
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    return done.stdout.strip()


HEAVY = "sorted({'mlx', 'numpy', 'PIL', 'torch', 'transformers', 'mlx_lm', 'jinja2', 'huggingface_hub', 'prompt_toolkit', 'rich'} & set(sys.modules))"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["generate", "--help"], ["chat", "--help"], ["nonsense"], ["convert"]]
)
def test_help_and_usage_errors_import_nothing_heavy(arguments):
    code = (
        "import sys; from click.testing import CliRunner; from mlx_vlm_mini.cli.main import main\n"
        f"CliRunner().invoke(main, {arguments!r}); print({HEAVY})"
    )
    assert python(code) == "[]"


def test_answering_never_imports_torch_transformers_or_the_hub():
    code = (
        "import sys; from mlx_vlm_mini import load, generate\n"
        f"generate(*load({str(PLAIN)!r}), 'Hi', images=[{str(PHOTO)!r}], max_tokens=3); print({HEAVY})"
    )
    assert python(code) == "['PIL', 'jinja2', 'mlx', 'numpy']"


def test_version():
    assert run("--version").stdout == f"mlx-vlm-mini, version {mlx_vlm_mini.__version__}\n"


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "model.safetensors"))

    monkeypatch.setattr("mlx_vlm_mini.convert.conversion.write_tensors", full)
    result = run("convert", PLAIN, tmp_path / "out")
    error = result.stderr.splitlines()[-1]
    assert (
        result.exit_code == 1 and error == f"Error: cannot write {tmp_path}/model.safetensors: No space left on device"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_closed_pipe_is_no_traceback():
    program = Path(sys.executable).with_name("mlx-vlm-mini")
    command = f"{program} generate {PLAIN} -p Hi --max-tokens 400 | head -c 5"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr
