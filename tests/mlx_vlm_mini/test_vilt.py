"""ViLT's answers: equal to transformers' on a tiny checkpoint, through files, library and command."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import edit_json
from click.testing import CliRunner
from parity import TOLERANCE
from PIL import Image
from reference import GOLDEN
from vilt_reference import ANSWERS, CASES, FOLDER

from mlx_vlm_mini import load, load_answerer
from mlx_vlm_mini.cli.main import main
from mlx_vlm_mini.errors import CheckpointError, ImageError, PromptError


@pytest.fixture(scope="module")
def expected():
    return np.load(FOLDER / "expected.npz")


@pytest.fixture(scope="module")
def answerer():
    return load_answerer(FOLDER)


@pytest.mark.parametrize("case", CASES)
def test_everything_equals_the_reference(answerer, expected, case):
    image, question = CASES[case]
    assert answerer.tokenizer.encode(question) == expected[f"{case}/input_ids"].tolist()
    np.testing.assert_allclose(answerer.pixels(GOLDEN / image), expected[f"{case}/pixel_values"], atol=1e-5)
    np.testing.assert_allclose(answerer.logits(GOLDEN / image, question), expected[f"{case}/logits"], atol=TOLERANCE)


def test_the_explicit_attention_gives_the_same_and_is_a_distribution(answerer, expected):
    ids, pixels = (mx.array(expected[f"house/{name}"][None]) for name in ("input_ids", "pixel_values"))
    attentions: list[mx.array] = []
    logits = answerer.model(ids, pixels, attentions)
    np.testing.assert_allclose(np.array(logits[0]), expected["house/logits"], atol=TOLERANCE)
    seen = ids.shape[1] + 1 + pixels.shape[1] // 8 * (pixels.shape[2] // 8)
    assert [weights.shape for weights in attentions] == [(1, 2, seen, seen)] * 2
    np.testing.assert_allclose(np.array(attentions[0]).sum(-1), 1, atol=1e-5)


def test_the_likeliest_answers(answerer, expected):
    image, question = CASES["house"]
    found = answerer.answers(GOLDEN / image, question, top=3)
    logits = expected["house/logits"]
    best = np.argsort(-logits)[:3]
    assert [text for text, _ in found] == [ANSWERS[index] for index in best]
    np.testing.assert_allclose([odds for _, odds in found], 1 / (1 + np.exp(-logits[best])), atol=1e-5)


def test_the_command(answerer):
    image, question = GOLDEN / "photo.jpg", "What is it?"
    answers = answerer.answers(image, question)
    arguments = ["score", str(FOLDER), "-i", str(image), "-p", question, "-p", "how many?"]
    shown = CliRunner().invoke(main, arguments).stdout.splitlines()
    assert (len(shown), shown[0], shown[6]) == (12, question, "how many?")
    assert shown[1] == f"{100 * answers[0][1]:5.1f} %  {answers[0][0]}"
    found = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).stdout)
    assert [each["text"] for each in found["scores"][0]["answers"][0]] == [text for text, _ in answers]


def test_what_cannot_be_answered(answerer, tmp_path):
    with pytest.raises(PromptError, match="the model takes 24"):
        answerer.logits(GOLDEN / "photo.jpg", "how many " * 20)
    with pytest.raises(ImageError, match="too narrow"):
        answerer.logits(Image.new("RGB", (1000, 4)), "what?")
    with pytest.raises(CheckpointError, match="mlx-vlm-mini score"):
        load(FOLDER)
    with pytest.raises(CheckpointError, match="no ViLT for question answering"):
        load_answerer(_changed(tmp_path / "other", architectures=["ViltModel"]))
    with pytest.raises(CheckpointError, match="lacks"):
        load_answerer(_changed(tmp_path / "deeper", num_hidden_layers=3))
    with pytest.raises(CheckpointError, match="has shape"):
        load_answerer(_changed(tmp_path / "fewer", id2label={"0": "yes"}))
    with pytest.raises(CheckpointError, match="malformed"):
        load_answerer(_changed(tmp_path / "gap", id2label={"0": "yes", "2": "no"}))


def _changed(folder: Path, **changes: object) -> Path:
    shutil.copytree(FOLDER, folder)
    edit_json(folder / "config.json", **changes)
    return folder
