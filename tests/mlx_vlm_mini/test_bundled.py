"""The model that comes with the package: it is there, small, the default everywhere, and it sees."""

import json
import socket
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlx_vlm_mini import generate, load
from mlx_vlm_mini.checkpoints import bundled
from mlx_vlm_mini.checkpoints.folder import open_checkpoint
from mlx_vlm_mini.cli.main import main
from mlx_vlm_mini.data.examples import read_examples
from mlx_vlm_mini.data.questions import write_scenes
from mlx_vlm_mini.train.evaluate import evaluate

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


@pytest.fixture(scope="module")
def demo():
    return load()


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_its_files():
    sizes = {file.name: file.stat().st_size for file in bundled.FOLDER.iterdir()}
    assert sum(sizes.values()) <= 12e6
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"} <= set(sizes)
    checkpoint = open_checkpoint(bundled.FOLDER)
    assert {info.dtype for info in checkpoint.tensors.values()} == {"F16"}
    config = checkpoint.config
    kinds = config["model_type"], config["vision_config"]["model_type"], config["text_config"]["model_type"]
    assert kinds == ("llava", "clip_vision_model", "llama")


def test_a_stranger_asks_about_a_picture_without_a_network(no_network):
    scene = str(EXAMPLES / "scene.png")
    asked = CliRunner().invoke(main, ["generate", "-i", scene, "-p", "What colour is the circle?"])
    assert (asked.exit_code, asked.stdout) == (0, "Red.\n")
    talk = CliRunner().invoke(main, ["chat", "-i", scene], input="How many objects are there?\nIs there a star?\n")
    assert (talk.exit_code, talk.stdout) == (0, "Three.\nYes.\n")
    assert talk.stderr.startswith("This is a small demonstration model")


def test_it_compares_and_reads_digits(demo):
    images = [EXAMPLES / "scene.png", EXAMPLES / "other.png"]
    assert generate(*demo, "Which picture has more objects?", images=images) == "The first."
    assert generate(*demo, "What digit is this?", images=[EXAMPLES / "digit.png"]) == "Four."


def test_a_photo_gets_an_answer(demo):
    photo = Path(__file__).parent.parent / "golden" / "photo.jpg"
    assert generate(*demo, "What do you see?", images=[photo], max_tokens=60)


def test_new_questions(demo, tmp_path):
    """On scenes of a seed that nothing else uses: well above the floor, and no better than guessing when blind."""
    write_scenes(tmp_path, 40, seed=31337, digits=0.1, test=True)
    score = evaluate(*demo, read_examples(tmp_path / "scenes.jsonl"))["all"]
    assert score.right / score.questions > 0.8
    assert score.right_blank / score.questions < 0.5


def test_a_folder_of_its_name_comes_first(tmp_path, monkeypatch):
    assert bundled.is_bundled("demo")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert not bundled.is_bundled("demo")
    refused = CliRunner().invoke(main, ["info"])
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "demo" in refused.stderr


def test_the_default_of_every_command(tmp_path):
    described = CliRunner().invoke(main, ["info", "--check", "--json"])
    assert json.loads(described.stdout)["family"] == "llava"
    write_scenes(tmp_path / "test", 2, seed=1, test=True)
    asked = CliRunner().invoke(main, ["eval", "--data", str(tmp_path / "test" / "scenes.jsonl"), "--json"])
    assert json.loads(asked.stdout)["all"]["questions"] == 2
    converted = CliRunner().invoke(main, ["convert", "demo", str(tmp_path / "small"), "-q", "8", "--no-check"])
    assert converted.exit_code == 0, converted.stderr
