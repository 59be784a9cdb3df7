"""CLIP's scores: equal to transformers' on a tiny checkpoint, through files, library and command."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import edit_json
from click.testing import CliRunner
from clip_reference import FOLDER, IMAGES, TEXTS
from parity import TOLERANCE
from reference import GOLDEN
from tokenizers import Tokenizer as Backend
from tokenizers import models

from mlx_vlm_mini import load, load_scorer
from mlx_vlm_mini.cli.main import main
from mlx_vlm_mini.errors import CheckpointError, ImageError, PromptError
from mlx_vlm_mini.files import read_json
from mlx_vlm_mini.text.tokenizer import Tokenizer

CONFIG = read_json(FOLDER / "config.json")
TEXT, VISION = CONFIG["text_config"], CONFIG["vision_config"]
PICTURES = [GOLDEN / name for name in IMAGES]


@pytest.fixture(scope="module")
def expected():
    return np.load(FOLDER / "expected.npz")


@pytest.fixture(scope="module")
def scorer():
    return load_scorer(FOLDER)


def score(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["score", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def test_logits_equal_the_reference(scorer, expected):
    assert np.array_equal(np.array(scorer.tokenize(TEXTS)), expected["input_ids"])
    logits = scorer.logits(PICTURES, TEXTS)
    np.testing.assert_allclose(logits, expected["logits"], atol=TOLERANCE)
    odds = np.exp(expected["logits"])
    np.testing.assert_allclose(scorer.probabilities(PICTURES, TEXTS), odds / odds.sum(-1, keepdims=True), atol=1e-5)


def test_the_model_alone_equals_the_reference(scorer, expected):
    logits = scorer.model(mx.array(expected["pixel_values"]), mx.array(expected["input_ids"]))
    np.testing.assert_allclose(np.array(logits), expected["logits"], atol=TOLERANCE)


def test_a_text_does_not_depend_on_its_company(scorer, expected):
    alone = np.concatenate([scorer.logits(PICTURES, [text]) for text in TEXTS], axis=1)
    np.testing.assert_allclose(alone, expected["logits"], atol=TOLERANCE)


def test_an_end_token_by_its_id(tmp_path, expected):
    """Newer configs name the token; tokens of a higher id behind it do not count."""
    folder = tmp_path / "clip"
    shutil.copytree(FOLDER, folder)
    end = int(expected["input_ids"][0, -1])
    edit_json(folder / "config.json", text_config={**TEXT, "eos_token_id": end})
    scorer = load_scorer(folder)
    np.testing.assert_allclose(scorer.logits(PICTURES, TEXTS), expected["logits"], atol=TOLERANCE)
    ids = expected["input_ids"].copy()
    ids[:, -1] = 0
    lengths = (expected["input_ids"] == end).argmax(axis=1)
    kept = lengths < ids.shape[1] - 1
    np.testing.assert_allclose(
        np.array(scorer.model(mx.array(expected["pixel_values"]), mx.array(ids)))[:, kept],
        expected["logits"][:, kept],
        atol=TOLERANCE,
    )


def test_the_command(expected):
    status, out, _ = score(FOLDER, "-i", PICTURES[0], *(each for text in TEXTS for each in ("-p", text)), "--json")
    found = json.loads(out)
    assert status == 0 and found["texts"] == list(TEXTS)
    np.testing.assert_allclose(found["scores"][0]["logits"], expected["logits"][0], atol=TOLERANCE)
    assert sum(found["scores"][0]["probabilities"]) == pytest.approx(1)
    status, out, _ = score(FOLDER, "-i", PICTURES[0], "-i", PICTURES[1], "-p", TEXTS[0], "-p", TEXTS[1])
    lines = out.splitlines()
    assert (status, len(lines), lines[0], lines[3]) == (0, 6, str(PICTURES[0]), str(PICTURES[1]))
    for row, shown in zip(expected["logits"][:, :2], (lines[1:3], lines[4:6]), strict=True):
        odds = np.exp(row) / np.exp(row).sum()
        best = int(odds.argmax())
        assert shown[0] == f"{100 * odds[best]:5.1f} %  {TEXTS[best]}"
        assert shown[1].endswith(TEXTS[1 - best])


def test_what_cannot_be_scored(scorer, tmp_path):
    with pytest.raises(PromptError, match="the model takes 40"):
        scorer.logits(PICTURES, ["shapes " * 60])
    with pytest.raises(PromptError, match="an image and a text"):
        scorer.logits([], ["a"])
    with pytest.raises(ImageError, match="not found"):
        scorer.logits(["nowhere.jpg"], ["a"])
    with pytest.raises(CheckpointError, match="only CLIP"):
        load_scorer(GOLDEN / "llava-clip-llama")
    with pytest.raises(CheckpointError, match="mlx-vlm-mini score"):
        load(FOLDER)
    assert score(FOLDER, "-i", tmp_path / "none.png", "-p", "a")[0] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_config": {**TEXT, "hidden_size": 16}}, "has shape"),
        ({"text_config": {**TEXT, "num_hidden_layers": 3}}, "lacks"),
        ({"vision_config": {**VISION, "num_hidden_layers": 1}}, "no place for"),
        ({"text_config": {**TEXT, "hidden_size": "x"}}, "whole number"),
        ({"projection_dim": None}, "malformed"),
        ({"text_config": {**TEXT, "num_hidden_layers": 10**9}}, "layers"),
    ],
)
def test_a_broken_config_is_named(tmp_path, changes, message):
    folder = tmp_path / "clip"
    shutil.copytree(FOLDER, folder)
    edit_json(folder / "config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        load_scorer(folder)


def test_settings_of_images_are_needed(tmp_path):
    folder = tmp_path / "clip"
    shutil.copytree(FOLDER, folder)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no preprocessor_config\.json"):
        load_scorer(folder)


def test_a_vocabulary_with_gaps_is_one_line():
    backend = Backend(models.WordPiece({"a": 0}, unk_token="[UNK]"))
    assert Tokenizer(backend, {}).encode("a") == [0]
    with pytest.raises(CheckpointError, match=r"the tokenizer cannot read 'b': .*Missing \[UNK\]"):
        Tokenizer(backend, {}).encode("b")
