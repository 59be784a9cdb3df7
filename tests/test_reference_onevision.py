"""The reference suite's part for LLaVA-OneVision: numbers of tokens, pixels, packed features, defaults, variants."""

import json
import shutil
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import edit_json
from parity import check_answer
from PIL import Image
from reference import CASES, GOLDEN, SPECS, Reference, make_image_processor, make_tokenizer

from mlx_vlm_mini import load
from mlx_vlm_mini.families import llava_onevision
from mlx_vlm_mini.preprocessing.anyres import count_tokens
from mlx_vlm_mini.preprocessing.pixels import preprocess
from mlx_vlm_mini.preprocessing.settings import LLAVA_ONEVISION_PINPOINTS, image_settings
from mlx_vlm_mini.projectors.arrange import pack

pytestmark = pytest.mark.reference


def sizes_of_images(number):
    """Heights and widths: most like photos, some extreme."""
    rng = np.random.default_rng(3)
    photos = np.exp(rng.uniform(np.log(30), np.log(4000), (number - 50, 2))).astype(int)
    extreme = rng.integers(1, 12, (50, 2)) * rng.integers(1, 900, (50, 2))
    return [tuple(map(int, size)) for size in np.concatenate([photos, extreme])]


def variant(name, folder, text=None, vision=None, **changes):
    """A golden checkpoint with other numbers in its config."""
    shutil.copytree(GOLDEN / name, folder)
    parts = json.loads((folder / "config.json").read_text())
    changes |= {
        "text_config": parts["text_config"] | (text or {}),
        "vision_config": parts["vision_config"] | (vision or {}),
    }
    edit_json(folder / "config.json", **changes)
    return folder


def test_numbers_of_tokens_equal_the_reference():
    from onevision_reference import StillImages

    processor = StillImages(make_image_processor("LlavaOnevision", {}), make_tokenizer("qwen2"), 729, "full")
    assert [list(size) for size in LLAVA_ONEVISION_PINPOINTS] == processor.image_processor.image_grid_pinpoints
    sizes = sizes_of_images(500)
    expected = processor._get_num_multimodal_tokens(sizes)["num_image_tokens"]
    options = {"tile_size": 384, "side": 27, "most_tiles": 9}
    assert [count_tokens(size, LLAVA_ONEVISION_PINPOINTS, **options) for size in sizes] == expected


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"height": 24, "width": 24}},
        {"size": {"shortest_edge": 24}, "image_mean": [0.5, 0.4, 0.3], "resample": 2},
        {"size": {"height": 30, "width": 30}, "crop_size": {"height": 24, "width": 24}, "do_center_crop": True},
    ],
)
def test_pixels_equal_the_reference(settings):
    """Alone, in tiles, and beside another image."""
    settings = {**settings, "image_grid_pinpoints": [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]}
    reference = make_image_processor("LlavaOnevision", settings)
    ours = image_settings(settings, "LlavaOnevision")
    rng = np.random.default_rng(2)
    for _ in range(30):
        height, width = rng.integers(1, 110, 2)
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        expected = np.moveaxis(reference([[image]])["pixel_values"][0], 1, -1)
        np.testing.assert_allclose(llava_onevision.pixels(image, ours), expected, atol=1e-5, rtol=1e-6)
        expected = np.moveaxis(reference([[image, image]])["pixel_values"][0], 1, -1)
        np.testing.assert_allclose(preprocess(image, ours.among)[None], expected, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("most", [1, 2, 5, 9])
def test_packed_features_equal_the_reference(most, tmp_path):
    import torch

    folder = variant("llava-onevision", tmp_path / "model", vision_aspect_ratio=f"anyres_max_{most}")
    reference, config = Reference(folder), load(folder)[0].config
    newline, generator = torch.arange(2.0), torch.Generator().manual_seed(0)
    for size in sizes_of_images(150)[:100]:
        tiles = reference.count_tiles(size)
        features = torch.randn(tiles, 9, 2, generator=generator)
        (expected,), _ = reference.model.model.pack_image_features([features], [size], newline, f"anyres_max_{most}")
        packed = pack(
            mx.array(features.numpy()), mx.array(newline.numpy()), size, config.image_grid_pinpoints, tile_size=24,
            most_tiles=most,
        )  # fmt: skip
        np.testing.assert_allclose(np.array(packed), expected.numpy(), atol=1e-5)


def test_defaults_equal_the_reference():
    from transformers import LlavaOnevisionConfig

    expected = llava_onevision.config(LlavaOnevisionConfig().to_dict())
    plain = replace(expected.decoder, rope_scaling=None)  # where transformers writes {"rope_type": "default"}
    assert llava_onevision.config({}) == replace(expected, decoder=plain)


VARIANTS = {
    "nothing is shrunk": ("llava-onevision", {}, {}, {"vision_aspect_ratio": "anyres_max_9"}),
    "everything is": ("llava-onevision-5", {}, {}, {"vision_aspect_ratio": "anyres_max_1"}),
    "other eps": ("llava-onevision", {"rms_norm_eps": 0.1}, {"layer_norm_eps": 0.1}, {}),
    "an early layer": ("llava-onevision", {}, {}, {"vision_feature_layer": 1}),
}


@pytest.mark.parametrize("kind", sorted(VARIANTS))
def test_variants(kind, tmp_path):
    name, text, vision, changes = VARIANTS[kind]
    folder = variant(name, tmp_path / "model", text, vision, **changes)
    edit_json(folder / "processor_config.json", **{key: value for key, value in changes.items() if "ratio" in key})
    for case in ("image", "strip", "two_images"):
        expected = Reference(folder, SPECS[name].chat_template).answer(CASES[case], GOLDEN, 6)
        check_answer(*load(folder), CASES[case], expected)
