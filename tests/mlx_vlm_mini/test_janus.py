"""Janus: pictures in squares, its system prompt, checkpoints that cannot draw, configs; parity is test_parity.py's."""

import json

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import edit_json
from janus_cases import BEGIN
from PIL import Image
from reference import GOLDEN

from mlx_vlm_mini import load
from mlx_vlm_mini.checkpoints.describe import describe
from mlx_vlm_mini.checkpoints.folder import open_checkpoint
from mlx_vlm_mini.checkpoints.load import plan
from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.families import janus
from mlx_vlm_mini.grounding.attend import find_boxes
from mlx_vlm_mini.preprocessing.bars import Letterbox
from mlx_vlm_mini.preprocessing.pixels import preprocess, to_image
from mlx_vlm_mini.preprocessing.settings import image_settings

FOLDER = GOLDEN / "janus"
SETTINGS = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


@pytest.fixture(scope="module")
def loaded():
    return load(FOLDER)


@pytest.fixture
def folder(tmp_path):
    for file in FOLDER.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


# pictures in a square


@pytest.mark.parametrize(
    ("size", "fitted"),
    [((600, 800), (288, 384)), ((800, 3), (384, 14)), ((1024, 1), (384, 14)), ((768, 513), (384, 256)), ((5, 5), (384,) * 2)],
)  # fmt: skip
def test_sides_are_rounded_half_to_even(size, fitted):
    """513 * (384 / 768) is 256.5."""
    assert Letterbox(side=384, least=14, color=(127,) * 3).fit(size) == fitted


def test_bars_are_the_mean_colour_not_zero():
    settings = image_settings(SETTINGS, "Janus")
    pixels = preprocess(Image.new("RGB", (768, 384), "white"), settings)
    assert pixels.shape == (384, 384, 3)
    np.testing.assert_allclose(pixels[:96], 127 / 127.5 - 1, atol=1e-6)
    np.testing.assert_allclose(pixels[96:288], 1, atol=1e-6)
    np.testing.assert_allclose(pixels[288:], 127 / 127.5 - 1, atol=1e-6)


def test_pixels_become_an_image_again():
    photo = np.random.default_rng(1).integers(0, 256, (384, 384, 3), dtype=np.uint8)
    settings = image_settings(SETTINGS, "Janus")
    found = np.array(to_image(preprocess(Image.fromarray(photo), settings) + np.float32(1e-6), settings))
    assert np.abs(found.astype(int) - photo).max() <= 1


def test_boxes_lie_in_the_picture_without_its_bars(loaded):
    model, processor = loaded
    inputs = processor(["What?", Image.new("RGB", (200, 100))])
    boxes = find_boxes(model, processor, inputs.images[0]).reshape(4, 4, 4)
    np.testing.assert_allclose(boxes[1, 0], [0, 0, 50, 50])  # rows 0 and 3 are bars
    np.testing.assert_allclose(boxes[2, 3], [150, 50, 200, 100])
    np.testing.assert_allclose(boxes[0, 0], [0, -50, 50, 0])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"do_pad": False}, "a picture in a square needs do_resize and do_pad"),
        ({"size": {"height": 30, "width": 32}}, "a square needs as size equal height and width"),
        ({"min_size": 0}, "min_size must be from 1 to 384 pixels, not 0"),
        ({"min_size": 385}, "min_size must be from 1 to 384 pixels, not 385"),
        ({"size": {"height": 10**5, "width": 10**5}}, "too large"),
    ],
)
def test_settings_that_make_no_square(given, message):
    with pytest.raises(CheckpointError, match=message):
        image_settings(given, "Janus")


# prompts


def test_the_system_prompt_comes_from_the_processor(folder):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    (_, processor) = load(folder)
    text, _ = processor.expand(messages, [])
    assert text == janus.PREAMBLE + "System: Be brief.<｜end▁of▁sentence｜><|User|>: Why?\n\n<|Assistant|>:"  # noqa: RUF001
    edit_json(folder / "processor_config.json", use_default_system_prompt=False)
    text, _ = load(folder)[1].expand(messages[1:], [])
    assert text == "<|User|>: Why?\n\n<|Assistant|>:"


def test_the_begin_token_comes_once(loaded):
    _, processor = loaded
    (begin,) = [token for token in [processor.tokenizer.token_to_id(BEGIN)] if token is not None]
    ids = np.array(processor("Why?").input_ids[0])
    assert ids[0] == begin and (ids == begin).sum() == 1


def test_typed_marks_are_text(loaded):
    _, processor = loaded
    marks = [processor.tokenizer.token_to_id(name) for name in ("<begin_of_image>", "<|User|>", "<image_placeholder>")]
    ids = np.array(processor("<begin_of_image> <|User|> <image_placeholder>").input_ids[0])
    assert [(ids == mark).sum() for mark in marks] == [0, 1, 0]  # the template's own


# checkpoints


def test_description():
    found = describe(FOLDER)
    assert found["family"] == "janus"


def test_a_checkpoint_without_what_draws(folder):
    tensors = mx.load(str(folder / "model.safetensors"))
    rest = {name: array for name, array in tensors.items() if "vqmodel" not in name}
    mx.save_safetensors(str(folder / "model.safetensors"), rest)
    model, processor = load(folder)
    assert model.config.drawing is None
    with np.load(FOLDER / "expected.npz") as expected:
        inputs = processor(["What is in this image?"], [GOLDEN / "photo.jpg"])
        logits = model(inputs)[0, -1]
        found = np.array(logits - mx.logsumexp(logits))
        np.testing.assert_allclose(found, expected["image/logprobs"][0], atol=1e-4)
    rest = {name: array for name, array in rest.items() if "generation" not in name}
    mx.save_safetensors(str(folder / "model.safetensors"), rest)
    assert load(folder)[0].config.drawing is None


@pytest.mark.parametrize(
    ("part", "given", "message"),
    [
        ("vq_config", {"num_embeddings": 91}, r"shape \[90, 8\], config.json asks for \[91, 8\]"),
        ("vq_config", {"embed_dim": 7}, r"shape \[90, 8\], config.json asks for \[90, 7\]"),
        ("vq_config", {"base_channels": 20}, "are no multiple of 32"),
        ("vq_config", {"channel_multiplier": []}, "channel_multiplier must be whole numbers above 0"),
        ("vq_config", {"channel_multiplier": [1, 0]}, "channel_multiplier must be whole numbers above 0"),
        ("vq_config", {"channel_multiplier": [1] * 9}, "9 levels, 8 are most"),
        ("vq_config", {"channel_multiplier": 3}, "malformed"),
        ("vq_config", {"num_res_blocks": -1}, "num_res_blocks must be a whole number"),
        ("vq_config", {"out_channels": 4}, "pictures have 3 channels"),
        ("vq_config", {"projection_dim": 24}, "is not its image_token_embed_dim 36"),
        ("vq_config", {"projection_dim": 24, "image_token_embed_dim": 24}, "its hidden size is 36"),
        ("vq_config", {"num_hidden_layers": 9}, "must be from 1 to 4 layers, not 9"),
        ("vision_config", {"depth": 0}, "depth of vision_config must be from 1 to 4 layers, not 0"),
        ("vision_config", {"use_qk_norm": True}, "use_qk_norm of the vision tower is not supported"),
        ("vision_config", {"image_size": 32 * 2**20}, "whole number|at most|square|larger|asks for"),
        ("text_config", {"model_type": "qwen2"}, "decoder 'qwen2' is not supported"),
    ],
)  # fmt: skip
def test_configs_that_do_not_fit(folder, part, given, message):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, part: {**values[part], **given}}))
    with pytest.raises(CheckpointError, match=message) as caught:
        plan(open_checkpoint(folder))
    assert "\n" not in str(caught.value)


def test_a_missing_tensor_goes_by_its_own_name(folder):
    tensors = mx.load(str(folder / "model.safetensors"))
    tensors.pop("model.vqmodel.decoder.up.1.block.0.conv1.weight")
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    with pytest.raises(CheckpointError, match=r"lacks 1 tensor \(model.vqmodel.decoder.up.1.block.0.conv1.weight\)"):
        plan(open_checkpoint(folder))
