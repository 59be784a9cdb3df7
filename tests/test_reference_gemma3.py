"""The reference suite for Gemma 3: crops, pixels, defaults and variants against transformers.

pytest -m reference        needs the `reference` extra
"""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from checkpoints import edit_json
from gemma3_text import FOLDER, expected_outputs
from parity import check_answer, check_golden
from PIL import Image
from reference import CASES, GOLDEN, SPECS, Reference, make_image_processor

from mlx_vlm_mini import Chat, load
from mlx_vlm_mini.families import gemma3
from mlx_vlm_mini.preprocessing.crops import Crops, crop_boxes
from mlx_vlm_mini.preprocessing.settings import image_settings

pytestmark = pytest.mark.reference


@pytest.mark.parametrize(("smallest", "most", "ratio"), [(256, 4, 1.2), (40, 3, 1.0), (100, 9, 1.5)])
def test_crops_equal_the_reference(smallest, most, ratio):
    """Of 500 sizes, extreme ones among them: each crop's place is read off a picture that holds its own coordinates."""
    rng = np.random.default_rng(5)
    sizes = np.concatenate(
        [rng.integers(1, 1500, (300, 2)), rng.integers(1, 12, (200, 2)) * rng.integers(1, 150, (200, 2))]
    )
    crops = Crops(min_size=smallest, min_ratio=ratio, max_crops=most)
    processor = make_image_processor("Gemma3", {})
    for height, width in sizes.tolist():
        rows, columns = np.mgrid[0:height, 0:width]
        options = {
            "pan_and_scan_min_crop_size": smallest, "pan_and_scan_max_num_crops": most,
            "pan_and_scan_min_ratio_to_activate": ratio,
        }  # fmt: skip
        found = processor.pan_and_scan(np.stack([columns, rows, rows]), **options)
        expected = [(p[0].min(), p[1].min(), p[0].max() + 1, p[1].max() + 1) for p in found]
        assert crop_boxes((height, width), crops) == expected, (height, width)


@pytest.mark.parametrize("size", [(96, 70), (33, 200), (1, 90), (64, 64), (300, 50)])
def test_pixels_equal_the_reference(size):
    options = {"size": {"height": 56, "width": 56}, "do_pan_and_scan": True, "pan_and_scan_min_crop_size": 20,
               "pan_and_scan_max_num_crops": 5, "pan_and_scan_min_ratio_to_activate": 1.2}  # fmt: skip
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    expected = make_image_processor("Gemma3", options)(image, return_tensors="np")["pixel_values"]
    found = gemma3.pixels(image, image_settings(options, "Gemma3"))
    np.testing.assert_allclose(found, np.moveaxis(expected, 1, -1), atol=1e-6)


def test_defaults_equal_the_reference():
    from transformers import Gemma3Config

    whole = Gemma3Config(mm_tokens_per_image=49).to_dict()
    expected = gemma3.config(whole)
    plain = replace(expected.decoder, rope_scaling=None)  # where transformers writes {"rope_type": "default"}
    assert gemma3.config({"mm_tokens_per_image": 49}) == replace(expected, decoder=plain)


FULL, NEAR = "full_attention", "sliding_attention"
VARIANTS = {
    "window of one image": ("gemma3-hub", {"text_config": {"sliding_window": 9}}),
    "window of two": ("gemma3-hub", {"text_config": {"sliding_window": 2}}),
    "a window beyond the prompt": ("gemma3-hub", {"text_config": {"sliding_window": 1000}}),
    "all but one slide": ("gemma3-hub", {"text_config": {"layer_types": [NEAR, NEAR, FULL, NEAR, NEAR]}}),
    "another pattern": ("gemma3-hub", {"text_config": {"sliding_window_pattern": 2}}),
    "other bases": ("gemma3-hub", {"text_config": {"rope_theta": 500.0, "rope_local_base_freq": 50.0}}),
    "yarn": ("gemma3-hub", {"text_config": {"rope_scaling": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}}}),
    "other eps": ("gemma3-hub", {"text_config": {"rms_norm_eps": 0.1}, "vision_config": {"layer_norm_eps": 0.1}}),
    "other activations": ("gemma3-crops", {
        "text_config": {"hidden_activation": "silu"}, "vision_config": {"hidden_act": "gelu"}}),
    "caps that nobody applies": ("gemma3-hub", {"text_config": {
        "attn_logit_softcapping": 0.5, "final_logit_softcapping": 0.5}}),
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(VARIANTS))
def test_variants(kind, tmp_path):
    name, parts = VARIANTS[kind]
    folder = shutil.copytree(GOLDEN / name, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    edit_json(folder / "config.json", **{part: {**config[part], **changes} for part, changes in parts.items()})
    reference = Reference(folder, SPECS[name].chat_template)
    model, processor = load(folder)
    for case in ("two_images", "text"):
        check_answer(model, processor, CASES[case], reference.answer(CASES[case], GOLDEN, 6))


def test_a_system_message_and_a_second_turn_equal_the_reference():
    """Of a chat that keeps its cache, the answer put into the reference's mouth as text."""
    model, processor = load(GOLDEN / "gemma3-hub")
    reference = Reference(GOLDEN / "gemma3-hub", SPECS["gemma3-hub"].chat_template)
    chat = Chat(model, processor, system="Be brief.", max_tokens=4, context=10**6)
    list(chat.send(["See ", GOLDEN / "photo.jpg", " well"]))
    chunks = list(chat.send(["And ", GOLDEN / "shapes.png", "?"]))
    plain = [
        {**message, "content": [
            {"type": "image", "image": part["image"].origin.path.name} if part["type"] == "image" else part
            for part in message["content"]
        ]}
        for message in chat.messages[:-1]
    ]  # fmt: skip
    expected = reference.answer(plain, GOLDEN, 4)
    assert [chunk.token for chunk in chunks] == expected["token_ids"].tolist()
    own = expected["logprobs"][np.arange(4), expected["token_ids"]]
    np.testing.assert_allclose([chunk.logprob for chunk in chunks], own, atol=1e-4)
    assert chunks[-1].stats.cached_tokens > 20


def test_text_alone_is_what_the_reference_gives_today():
    check_golden(FOLDER, expected_outputs())
