"""Where patches lie in the picture: a bright square in it changes the patch most whose box holds it."""

from dataclasses import replace

import numpy as np
import pytest
from checkpoints import PLAIN
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from reference import GOLDEN

from mlx_vlm_mini import load
from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.grounding.attend import find_boxes
from mlx_vlm_mini.grounding.places import join, lay_over, weight_inside
from mlx_vlm_mini.preprocessing.frame import Frame
from mlx_vlm_mini.preprocessing.splits import Splits
from mlx_vlm_mini.preprocessing.tiles import Tiles

LAYOUTS = {  # golden, changes to its config, changes to its image settings
    "crop": ("llava-clip-llama", {}, {}),
    "a crop larger than the image": ("llava-clip-llama", {}, {"size": {"height": 30, "width": 35}}),
    "pad": ("llava-original-v1.5", {}, {}),
    "squashed, class token": ("llava-clip-llama-layers", {}, {}),
    "unpad": ("llava-next-clip-mistral", {}, {}),
    "unpad, cropped tiles": ("llava-next-siglip-qwen2", {}, {}),
    "unpad, alone": ("llava-onevision-5", {}, {}),
    "unpad_floor": ("llava-original-v1.6-mistral", {"tile_merge": "unpad_floor"}, {}),
    "grid": ("llava-original-v1.6-mistral", {"tile_merge": "grid"}, {}),
    "flat": ("llava-original-v1.6-mistral", {"tile_merge": "flat"}, {}),
    "tiles, shuffled, thumbnail": ("internvl-qwen2", {}, {}),
    "averaged crops": ("gemma3-crops", {}, {}),
    "split, the whole behind": ("idefics3-words", {}, {}),
    "split at its own size": (
        "idefics3-markers",
        {},
        {"tiling": Splits(tile_size=16, longest_edge=None, split=True, max_tiles=9)},
    ),
    "shuffled column by column": (
        "internvl-chat-llama",
        {},
        {"tiling": Tiles(tile_size=24, min_tiles=2, max_tiles=6, thumbnail=True)},
    ),
    "InternViT": ("llava-original-internvit", {}, {}),
    "squashed": ("paligemma-gemma", {}, {}),
}


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request):
    name, config, images = LAYOUTS[request.param]
    model, processor = load(GOLDEN / name)
    model.config = processor.config = replace(model.config, **config)
    processor.image_settings = replace(processor.image_settings, **images)
    return model, processor


def changes(model, before, after):
    """How much the pixels of each vision feature changed: float[rows of pixels, features]."""
    p = model.config.vision.patch_size
    difference = np.abs(after.pixel_values - before.pixel_values).sum(axis=-1)
    rows, height, width = difference.shape
    down, across = height // p, width // p
    patches = difference[:, : down * p, : across * p].reshape(rows, down, p, across, p).sum(axis=(2, 4))
    vision = model.config.vision
    lead = int(vision.class_token and not vision.drop_first_feature)
    return np.pad(patches.reshape(rows, -1), ((0, 0), (lead, 0)))


def image_of(processor, pixels):
    (image,) = processor(["x", Image.fromarray(pixels)]).images
    return image


def test_a_bright_square_lights_up_the_patch_that_holds_it(layout):
    model, processor = layout
    checked = []

    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(st.integers(20, 190), st.integers(20, 190), st.floats(0, 1), st.floats(0, 1))
    def check(height, width, x, y):
        grey = np.full((height, width, 3), 90, dtype=np.uint8)
        before = image_of(processor, grey)
        boxes, sources = find_boxes(model, processor, before), model.sources(before)
        assert boxes.shape == (before.tokens, 4)
        extent = boxes[:, 2:] - boxes[:, :2]
        side = max(2, int(np.nanmin(extent) / 2))
        left, top = int(x * (width - side)), int(y * (height - side))
        square = (left, top, left + side, top + side)
        bright = grey.copy()
        bright[top : top + side, left : left + side] = 250
        change = changes(model, before, image_of(processor, bright))
        held = (
            weight_inside(np.diag(np.nan_to_num(extent.prod(axis=-1))), boxes, square) / side**2
        )  # parts of the square
        for row, changed in enumerate(change):
            own = np.flatnonzero((sources >= 0).all(axis=-1) & (sources[:, 0] // len(changed) == row))
            if len(own) and held[own].max() > 0.7:
                lit = changed[sources[own] % len(changed)].sum(axis=-1)
                assert lit.argmax() == held[own].argmax(), (row, square, boxes[own][lit.argmax()])
                checked.append(row)

    check()
    assert len(checked) >= 10 and (len(set(checked)) > 1 or processor.image_settings.tiling is None)


@pytest.mark.parametrize("size", [(60, 200), (200, 60), (97, 101)])
def test_a_pictures_every_pixel_is_in_a_box_unless_it_is_cropped(layout, size):
    """And no feature is shown twice."""
    model, processor = layout
    image = image_of(processor, np.zeros((*size, 3), dtype=np.uint8))
    boxes = find_boxes(model, processor, image)
    covered = lay_over(np.nan_to_num(np.prod(boxes[:, 2:] - boxes[:, :2], axis=-1)), boxes, size, size)
    cropped = processor.image_settings.crop_size is not None and "shortest_edge" in processor.image_settings.size
    if not cropped:
        assert covered.min() > 0.9  # a hair at the edges of unpadded rows
    shown = model.sources(image)
    shown = shown[shown >= 0]
    assert len(np.unique(shown)) == len(shown)


def test_frames_by_hand():
    """A picture of 100x50, padded to a square, shown at 20 pixels, cropped to 10 in the middle."""
    frame = Frame().cut(0, -25).resize((100, 100), (20, 20)).cut(5, 5)
    assert frame == Frame(left=25, top=0, across=5, down=5)
    np.testing.assert_array_equal(
        frame.patches(10, 11, 5), [[25, 0, 50, 25], [50, 0, 75, 25], [25, 25, 50, 50], [50, 25, 75, 50]]
    )
    joined = join(frame.patches(10, 10, 5), np.array([[0, 1, 2, 3], [-1, -1, -1, -1], [1, 1, 1, 1]]))
    np.testing.assert_array_equal(joined, [[25, 0, 75, 50], [np.nan] * 4, [50, 0, 75, 25]])


boxes_of = st.lists(st.tuples(st.floats(-9, 25), st.floats(-9, 25), st.floats(0.5, 20), st.floats(0.5, 20)), min_size=1)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(drawn=boxes_of, region=st.tuples(*[st.integers(0, 10)] * 4))
def test_weight_is_neither_made_nor_lost(drawn, region):
    """Pixels together hold what lies inside the picture, and a region what its pixels hold."""
    boxes = np.array([(x, y, x + w, y + h) for x, y, w, h in drawn] + [(np.nan,) * 4])
    weights = np.random.default_rng(0).random(len(boxes)).astype(np.float32)
    heat = lay_over(weights, boxes, (20, 16), (20, 16))
    assert heat.sum() == pytest.approx(weight_inside(weights, boxes, (0, 0, 16, 20)))
    left, top = min(region[0], region[2]), min(region[1], region[3])
    right, bottom = left + 3, top + 5
    inside = weight_inside(weights, boxes, (left, top, right, bottom))
    assert heat[top:bottom, left:right].sum() == pytest.approx(inside)
    assert lay_over(weights, boxes, (20, 16), (5, 4)).sum() == pytest.approx(heat.sum())
    everywhere = weight_inside(weights, boxes, (-99, -99, 99, 99))
    assert everywhere == pytest.approx(weights[:-1].sum())


def test_settings_that_cut_otherwise_than_the_image_was(copy_of):
    model, processor = load(copy_of("internvl-qwen2"))
    image = image_of(processor, np.zeros((50, 200, 3), dtype=np.uint8))
    processor.limit_tiles(1, 1)
    with pytest.raises(CheckpointError, match=r"cuts an image into 5 pieces, its settings say 1"):
        find_boxes(model, processor, image)


def test_pictures_are_as_they_are_opened(tmp_path):
    """Turned by its EXIF tag: boxes speak of the upright picture."""
    model, processor = load(PLAIN)
    file, exif = tmp_path / "turned.jpg", Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (90, 40)).save(file, exif=exif)
    (image,) = processor(["x", file]).images
    assert image.size == (90, 40) and np.nanmax(find_boxes(model, processor, image)[:, 2]) <= 40
