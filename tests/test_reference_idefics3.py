"""The reference suite for Idefics3 and SmolVLM: sizes, pixels, limits and variants against transformers.

pytest -m reference        needs the `reference` extra
"""

import io
import json
import shutil

import numpy as np
import pytest
from checkpoints import edit_json
from parity import check_answer
from PIL import Image
from reference import CASES, GOLDEN, SPECS, Reference, make_image_processor

from mlx_vlm_mini import load
from mlx_vlm_mini.families import idefics3
from mlx_vlm_mini.preprocessing.settings import image_settings
from mlx_vlm_mini.preprocessing.splits import Splits, choose_split

pytestmark = pytest.mark.reference


def altered(name, folder, **parts):
    """A golden checkpoint with other numbers in parts of its config, which ask for no other tensors."""
    shutil.copytree(GOLDEN / name, folder)
    config = json.loads((folder / "config.json").read_text())
    edit_json(folder / "config.json", **{part: {**config[part], **changes} for part, changes in parts.items()})
    return folder


@pytest.mark.parametrize(("tile", "longest"), [(512, 2048), (384, 1536), (364, 1456), (27, 100), (64, 5000)])
def test_numbers_of_tiles_equal_the_reference(tile, longest):
    """Of 500 sizes. The reference's own count of an image's tiles is of the same arithmetic but for one line, in which
    the shorter side goes up to whole tiles from where it was before: its pixels decide."""
    options = {"size": {"longest_edge": longest}, "max_image_size": {"longest_edge": tile}}
    processor = make_image_processor("Idefics3", options)
    splits = Splits(tile_size=tile, longest_edge=longest, split=True)
    rng = np.random.default_rng(3)
    photos = np.exp(rng.uniform(np.log(30), np.log(4000), (400, 2))).astype(int)
    extreme = rng.integers(1, 12, (100, 2)) * rng.integers(1, 900, (100, 2))
    for height, width in np.concatenate([photos, extreme]).tolist():
        count, rows, columns = processor.get_number_of_image_patches(height, width)
        own = choose_split((height, width), splits)
        if own != ((rows, columns) if count else (1, 1)):
            pixels = processor(Image.new("RGB", (width, height)), return_row_col_info=True)
            assert own == (pixels["rows"][0][0] or 1, pixels["cols"][0][0] or 1), (height, width)


SIZES = [(96, 70), (33, 200), (7, 5), (1, 90), (64, 64), (65, 63), (300, 299), (31, 17), (211, 3), (2, 2)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("tile", "longest", "split"), [(16, 64, True), (27, 81, True), (16, 40, False)])
def test_pixels_equal_the_reference(size, tile, longest, split):
    options = {
        "size": {"longest_edge": longest}, "max_image_size": {"longest_edge": tile}, "do_image_splitting": split,
    }  # fmt: skip
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    expected = make_image_processor("Idefics3", options)(image, return_tensors="np")["pixel_values"][0]
    found = idefics3.pixels(image, image_settings(options, "Idefics3"))
    np.testing.assert_allclose(found, np.moveaxis(expected, 1, -1), atol=1e-6)


@pytest.mark.parametrize(("most", "edge"), [(12, 64), (11, 48), (9, 48), (5, 32), (3, 0), (1, 0)])
def test_limits_of_tiles_are_the_references_smaller_edges(most, edge, tmp_path):
    """Of photo.jpg in tiles of 16: what `max_tiles` gives is transformers' `size` of that edge; 0 is no splitting."""
    picture = GOLDEN / "photo.jpg"
    folder = altered("idefics3-markers", tmp_path / "model")
    changes = {"size": {"longest_edge": edge}} if edge else {"do_image_splitting": False}
    edit_json(folder / "preprocessor_config.json", **changes)
    reference = Reference(folder, SPECS["idefics3-markers"].chat_template)
    expected = reference.answer(CASES["image"], GOLDEN, 2)
    model, processor = load(GOLDEN / "idefics3-markers", max_tiles=most)
    np.testing.assert_allclose(processor([picture]).pixel_values, expected["pixel_values"], atol=1e-6)
    check_answer(model, processor, CASES["image"], expected)


VARIANTS = {
    "other eps": ("idefics3-words", {"text_config": {"rms_norm_eps": 0.1}, "vision_config": {"layer_norm_eps": 0.1}}),
    "gelu in the tower": ("smolvlm-whole", {"vision_config": {"hidden_act": "gelu"}}),
    "scaled positions": ("smolvlm-whole", {"text_config": {
        "rope_parameters": {"rope_theta": 1e3, "rope_type": "linear", "factor": 3.0}}}),
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(VARIANTS))
def test_variants(kind, tmp_path):
    name, changes = VARIANTS[kind]
    folder = altered(name, tmp_path / "model", **changes)
    reference = Reference(folder, SPECS[name].chat_template)
    model, processor = load(folder)
    for case in ("two_images", "text"):
        check_answer(model, processor, CASES[case], reference.answer(CASES[case], GOLDEN, 4))


def test_a_jpeg_of_a_real_photos_size(tmp_path):
    """3000 x 2000 pixels, as SmolVLM-256M cuts them: 3 x 4 tiles of 512."""
    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).resize((3000, 2000))
    data = io.BytesIO()
    image.save(data, "JPEG")
    image = Image.open(data).convert("RGB")
    options = {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}}
    expected = make_image_processor("Idefics3", options)(image, return_tensors="np")["pixel_values"][0]
    found = idefics3.pixels(image, image_settings(options, "Idefics3"))
    assert found.shape == (13, 512, 512, 3)
    np.testing.assert_allclose(found, np.moveaxis(expected, 1, -1), atol=1e-6)
