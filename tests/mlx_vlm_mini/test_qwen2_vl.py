"""Qwen2-VL, 2.5-VL and 3-VL: sizes, windows, positions, layouts, answers with places; parity is test_parity.py's."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import PHOTO, SHAPES, check_fields, edit_json, with_paths
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from quantized import check_compensation, check_eight_bits, make_wide_with
from reference import CASES, GOLDEN

from mlx_vlm_mini import Chat, find_detections, load, stream_generate
from mlx_vlm_mini.checkpoints.describe import describe
from mlx_vlm_mini.checkpoints.folder import open_checkpoint
from mlx_vlm_mini.checkpoints.load import plan
from mlx_vlm_mini.cli.main import main
from mlx_vlm_mini.decoder.positions import Axes, PlacedImage, token_positions
from mlx_vlm_mini.errors import CheckpointError, ImageError
from mlx_vlm_mini.families import find_family, qwen2_5_vl, qwen2_vl, qwen3_vl
from mlx_vlm_mini.grounding.attend import find_boxes
from mlx_vlm_mini.layers.angles import Turn, grid_angles
from mlx_vlm_mini.preprocessing.grid import Grid
from mlx_vlm_mini.preprocessing.settings import image_settings
from mlx_vlm_mini.vision.grid import window_order

NAMES = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl")


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module", params=NAMES)
def loaded(request):
    return load(GOLDEN / request.param)


def answers(folder, name, cases=("image", "text")):
    """Whether a folder answers as the golden of this name does."""
    model, processor = load(folder)
    with np.load(GOLDEN / name / "expected.npz") as expected:
        for case in cases:
            chunks = list(stream_generate(model, processor, with_paths(CASES[case]), max_tokens=6))
            tokens = expected[f"{case}/token_ids"][:6].tolist()
            assert [chunk.token for chunk in chunks] == tokens
            chosen = expected[f"{case}/logprobs"][np.arange(6), tokens]
            np.testing.assert_allclose([chunk.logprob for chunk in chunks], chosen, atol=1e-4)


def copy_of(name, folder):
    return Path(shutil.copytree(GOLDEN / name, folder))


def rewrite(folder, rename):
    """Give a folder's tensors other names, in one file."""
    tensors = {}
    for file in sorted(folder.glob("model*.safetensors")):
        tensors |= mx.load(str(file))
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    return {rename(name): array for name, array in tensors.items()}


# sizes


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 640), (476, 644)), ((42, 70), (56, 56)), ((70, 98), (56, 112)), ((10, 100), (28, 196)),
        ((2000, 3000), (812, 1204)), ((1, 200), (28, 812)), ((20, 20), (56, 56)), ((28, 112), (28, 112)),
    ],
)  # fmt: skip
def test_sides_are_rounded_to_whole_tokens(size, expected):
    """Halves to the even number (42 is one and a half tokens, 70 two and a half), within the limits."""
    grid = Grid(patch_size=14, merge=2, min_pixels=3136, max_pixels=1003520)
    assert grid.fit(size) == expected
    assert grid.count_tokens(size) == expected[0] * expected[1] // 784
    assert grid.max_tokens == 1280


@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 10**5), st.integers(0, 10**6))
def test_every_size_fits(height, width, low, more):
    grid = Grid(patch_size=6, merge=2, min_pixels=low, max_pixels=low + more)
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(ImageError, match=f"an image of {width}x{height} pixels is too long and narrow"):
            grid.fit((height, width))
        return
    rows, columns = (side / 12 for side in grid.fit((height, width)))
    assert rows == int(rows) >= 1 and columns == int(columns) >= 1


@pytest.mark.parametrize(
    ("hf", "limits"),
    [
        ({}, (3136, 1003520)),
        ({"min_pixels": 100, "max_pixels": 12845056}, (100, 12845056)),
        ({"size": {"shortest_edge": 65536, "longest_edge": 16777216}, "min_pixels": None}, (65536, 16777216)),
        ({"size": {"min_pixels": 3136, "max_pixels": 12845056}}, (3136, 12845056)),
        ({"size": {"shortest_edge": 5, "longest_edge": 7}, "max_pixels": 9}, (5, 9)),
    ],
)
@pytest.mark.parametrize(
    "name", ["Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2_5_VLImageProcessor", None]
)
def test_limits_go_by_three_names(hf, limits, name):
    settings = image_settings({**hf, "image_processor_type": name}, "Qwen2VL")
    assert isinstance(settings.tiling, Grid) and settings.size is None and settings.resample == 3
    assert (settings.tiling.min_pixels, settings.tiling.max_pixels) == limits


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        ({"min_pixels": 0}, "a whole number above 0 as min_pixels, not 0"),
        ({"size": {"shortest_edge": 9, "longest_edge": 3}}, "9 pixels at least and 3 at most"),
        ({"patch_size": "14"}, "a whole number above 0 as patch_size, not '14'"),
        ({"do_resize": False}, "images in patches need do_resize"),
        ({"size": 5}, "5 names no limits of pixels"),
    ],
)
def test_settings_that_make_no_grid(hf, message):
    with pytest.raises(CheckpointError, match=message):
        image_settings({**hf, "image_processor_type": "Qwen2VLImageProcessor"}, "Qwen2VL")


def test_limits_may_be_chosen(tmp_path):
    folder = GOLDEN / "qwen2-vl"
    model, processor = load(folder, min_pixels=6000, max_pixels=7000)
    assert processor([PHOTO, "Hi"]).images[0].pixel_values.shape[1:3] == (96, 72)
    _, processor = load(folder, max_pixels=1000)
    inputs = processor([PHOTO, "Hi"])
    assert inputs.images[0].pixel_values.shape[1:3] == (36, 24) and inputs.images[0].tokens == 6
    assert np.isfinite(np.array(model(inputs))).all()
    done = run("generate", folder, "-p", "Hi", "-i", PHOTO, "--max-pixels", 1000, "--max-tokens", 1, "--json")
    assert json.loads(done.stdout)["image_tokens"] == 6
    with pytest.raises(CheckpointError, match="9000 pixels at least and 8000 at most"):
        load(folder, min_pixels=9000, max_pixels=8000)
    done = run("generate", GOLDEN / "llava-clip-llama", "-p", "Hi", "--max-pixels", 1000)
    assert (done.exit_code, done.stderr) == (1, "Error: family 'llava' has no limits of pixels: leave them out\n")


def test_an_image_that_is_too_long(tmp_path):
    Image.new("RGB", (2010, 10)).save(tmp_path / "long.png")
    done = run("generate", GOLDEN / "qwen2-vl", "-p", "Hi", "-i", tmp_path / "long.png")
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: an image of 2010x10 pixels is too long and narrow: at most 200 times")


def test_settings_of_another_patch_size_do_not_fit(tmp_path):
    folder = copy_of("qwen2-vl", tmp_path / "model")
    edit_json(folder / "preprocessor_config.json", patch_size=7)
    _, processor = load(folder)
    with pytest.raises(CheckpointError, match="makes a token of 14 pixels a side, config.json of 12"):
        processor([PHOTO, "Hi"])


# windows


@given(st.integers(1, 23), st.integers(1, 23), st.integers(1, 8))
def test_windows_hold_each_patch_once_in_few_groups(rows, columns, side):
    order, groups = window_order(rows, columns, side)
    assert sorted(order.tolist()) == list(range(rows * columns)) and len(groups) <= 4
    done = 0
    for count, size in groups:
        for _ in range(count):
            own = order[done : done + size]
            done += size
            cells = {(number // columns // side, number % columns // side) for number in own.tolist()}
            assert len(cells) == 1
    assert done == rows * columns
    windows = -(-rows // side) * -(-columns // side)
    assert sum(count for count, _ in groups) == windows


@pytest.mark.parametrize("size", [(48, 96), (60, 84), (36, 24), (108, 12)])
def test_windows_equal_a_mask(size):
    """All patches at once, row by row, which see only those of their own window."""
    model, _ = load(GOLDEN / "qwen2.5-vl")
    tower, side = model.vision, model.vision.grid.window
    assert side == 6
    pixels = mx.random.normal((1, *size, 3), key=mx.random.key(1))
    row, column = (place.ravel() for place in np.mgrid[: size[0] // 6, : size[1] // 6])
    window = row // side * 99 + column // side
    mask, rope = mx.array(window[:, None] == window), Turn(grid_angles(row, column, 12))
    x = tower.patch_embed(pixels)
    for number, block in enumerate(tower.blocks):
        x = block(x, mask=None if number in (1, 3) else mask, rope=rope)
    np.testing.assert_allclose(np.array(tower(pixels)).reshape(x.shape), np.array(x), atol=1e-4)


def test_pixels_that_are_no_patches(loaded):
    model, _ = loaded
    with pytest.raises(ImageError, match="an image of 13x12 pixels is not made of patches of 6"):
        model.vision(mx.zeros((1, 12, 13, 3)))


# positions


def test_positions_of_a_picture_among_text():
    image = PlacedImage(2, 2, 3)
    expected = [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]
    np.testing.assert_array_equal(token_positions([image], 0, 10), expected)
    for start in range(10):
        for length in range(1, 11 - start):
            part = token_positions([image], start, length)
            np.testing.assert_array_equal(part, np.array(expected)[:, start : start + length])
    two = [PlacedImage(0, 4, 1), PlacedImage(5, 1, 2)]
    assert token_positions(two, 0, 8)[0].tolist() == [0, 0, 0, 0, 4, 5, 5, 7]
    placed = Axes(tuple(two))
    np.testing.assert_array_equal(placed.at(3, 5), token_positions(two, 3, 5))
    assert (placed.at(7, 3), placed.shift, placed.within(6), placed.within(7)) == (7, 0, Axes(tuple(two[:1])), placed)
    assert Axes((image,)).at(8, 2) == 5


def test_taps_go_to_their_tokens():
    """Whether a prompt is read from its beginning, from within a picture on, or in parts; zeros beside text."""
    model, processor = load(GOLDEN / "qwen3-vl")
    inputs = processor(["See ", PHOTO, " and ", SHAPES, "!"])
    width, slots = model.config.decoder.hidden_size, np.flatnonzero(inputs.slots)
    features = np.array(mx.concatenate([model.encode(image) for image in inputs.images]))
    levels = features.shape[1] // width - 1
    assert levels == len(model.config.vision.feature_layers) - 1 > 0
    expected = np.zeros((levels, len(inputs.slots), width), dtype=np.float32)
    expected[:, slots] = features[:, width:].reshape(-1, levels, width).swapaxes(0, 1)
    whole = model.read(inputs)
    np.testing.assert_array_equal(np.array(whole.embeddings)[0, slots], features[:, :width])
    for start in (0, int(slots[0]) + 1, int(slots[-1]), int(slots[-1]) + 1):
        beside = model.read(inputs, start).beside
        assert len(beside) == (levels if start <= slots[-1] else 0)
        for layer, rows in enumerate(beside):
            np.testing.assert_array_equal(rows[0], expected[layer, start:])
    part = whole.part(3, int(slots[0]) + 4)
    for layer, rows in enumerate(part.beside):
        np.testing.assert_array_equal(rows[0], expected[layer, 3 : slots[0] + 4])
    run, x, layers = model.decoder.begin(whole), whole.embeddings, model.decoder.layers
    for number, layer in enumerate(layers):
        added = np.array(model.decoder.run_layer(number, x, run)) - np.array(layer(x, run, None))
        np.testing.assert_allclose(added[0], expected[number] if number < levels else 0, atol=1e-5)


def test_the_offset_is_kept_and_forgotten(loaded):
    """An answer about a picture, then the picture taken back: what follows has plain positions again."""
    chat = Chat(*loaded, max_tokens=2)
    list(chat.send("Begin"))
    list(chat.send([PHOTO, "What?"]))
    placed = chat._cache.state.positions.images
    assert len(placed) == 1 and placed[0].rows * placed[0].columns > 20
    chat.undo()
    chunks = list(chat.send("What?"))
    assert chat._cache.state.positions.images == () and chunks[-1].stats.cached_tokens > 10
    fresh = list(stream_generate(*loaded, chat.messages[:-1], max_tokens=2))
    np.testing.assert_allclose([c.logprob for c in chunks], [c.logprob for c in fresh], atol=1e-4)


def test_a_saved_cache_goes_on(loaded, tmp_path):
    chat = Chat(*loaded, max_tokens=3)
    list(chat.send([PHOTO, "What?"]))
    chat.save(tmp_path / "talk.json", cache=True)
    again = Chat.load(tmp_path / "talk.json", *loaded)
    assert again.notes == []
    chunks = list(again.send([SHAPES, "And this?"]))
    assert chunks[-1].stats.cached_tokens > 20 and chunks[-1].stats.encoded_images == 1
    fresh = list(stream_generate(*loaded, again.messages[:-1], max_tokens=3))
    np.testing.assert_allclose([c.logprob for c in chunks], [c.logprob for c in fresh], atol=1e-4)


def test_a_rotating_cache_keeps_positions(loaded):
    """One that is large enough answers as one that does not rotate."""
    chat = Chat(*loaded, max_tokens=3, rotate=400)
    for prompt in ([PHOTO, "What?"], "Why?"):
        chunks = list(chat.send(prompt))
        fresh = list(stream_generate(*loaded, chat.messages[:-1], max_tokens=3))
        np.testing.assert_allclose([c.logprob for c in chunks], [c.logprob for c in fresh], atol=1e-4)


def test_a_picture_is_encoded_once_an_answer(loaded):
    chunks = list(stream_generate(*loaded, [PHOTO, "and", SHAPES], max_tokens=1))
    assert chunks[-1].stats.encoded_images == 2


# layouts


HUB = {"qwen2-vl": "", "qwen2.5-vl": "", "qwen3-vl": "model."}


def community(name):
    """A Hub or golden name as mlx-community's files have it."""
    name = name.removeprefix("model.") if "visual." in name else name
    if name.startswith("visual."):
        return "vision_tower." + name.removeprefix("visual.")
    return "language_model." + name.replace("model.language_model.", "model.")


def memory(name):
    if name.startswith("visual."):
        return "model." + name
    if name.startswith("model.") and "language_model" not in name and "visual" not in name:
        return "model.language_model." + name.removeprefix("model.")
    return name


def hub(name):
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", [community, memory, hub])
def test_tensors_go_by_many_names(name, layout, tmp_path):
    folder = copy_of(name, tmp_path / "model")
    tensors = rewrite(folder, layout)
    if layout is community:  # whose convolutions are in MLX's form
        kernel = "vision_tower.patch_embed.proj.weight"
        tensors[kernel] = mx.contiguous(tensors[kernel].transpose(0, 2, 3, 4, 1))
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "mlx" if layout is community else "pt"})
    answers(folder, name)


@pytest.mark.parametrize("name", ["qwen2-vl", "qwen2.5-vl"])
def test_configs_are_flat_or_nested(name, tmp_path):
    folder = copy_of(name, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    if "text_config" in config:
        text = config.pop("text_config")
        rope = text.pop("rope_parameters")
        text.pop("model_type")
        config |= text | {
            "rope_theta": rope["rope_theta"],
            "rope_scaling": {"type": "mrope", "mrope_section": [1, 2, 3]},
        }
    else:
        text = {key: value for key, value in config.items() if key not in ("vision_config", "model_type")}
        rope = {"rope_theta": text.pop("rope_theta"), "rope_type": "default", "mrope_section": [1, 2, 2]}
        text.pop("rope_scaling")
        config["text_config"] = text | {"rope_parameters": rope, "model_type": "qwen2_vl_text"}
        for key in text:
            config.pop(key) if key not in ("image_token_id",) else None
    (folder / "config.json").write_text(json.dumps(config))
    answers(folder, name)


@pytest.mark.parametrize(
    ("family", "hf", "expected"),
    [
        (qwen2_vl, {}, {
            "vision.hidden_size": 1280, "vision.num_hidden_layers": 32, "vision.intermediate_size": 5120,
            "vision.layer_norm_eps": 1e-6, "vision.hidden_act": "quick_gelu", "vision.patch_bias": False,
            "vision.grid.window": None, "vision.blocks.norm_type": "layer_norm", "vision.image_size": 28,
            "projector.norm_eps": 1e-6, "projector.input_size": 5120, "projector.hidden_act": "gelu",
            "projector.merger.norm_type": "layer_norm", "decoder.norms.rms_norm_eps": 1e-5, "decoder.rope_theta": 1e6,
            "decoder.biases.qkv_bias": True, "decoder.norms.qk_norm": False, "image_token_id": 151655,
        }),
        (qwen2_5_vl, {"vision_config": {"hidden_size": 1280}}, {
            "vision.hidden_size": 1280, "vision.intermediate_size": 3420, "vision.layer_norm_eps": 1e-6,
            "vision.hidden_act": "silu", "vision.grid.window": 8, "vision.grid.full_blocks": (7, 15, 23, 31),
            "vision.blocks.norm_type": "rms_norm", "vision.blocks.gated_mlp": True,
            "projector.merger.norm_type": "rms_norm", "projector.norm_eps": 1e-6, "decoder.hidden_size": 8192,
        }),
        (qwen3_vl, {}, {
            "vision.hidden_size": 1152, "vision.intermediate_size": 4304, "vision.layer_norm_eps": 1e-6,
            "vision.hidden_act": "gelu_pytorch_tanh", "vision.grid.position_side": 48, "vision.patch_bias": True,
            "vision.feature_layers": (27, 9, 17, 25), "projector.merger.taps": 3, "projector.hidden_act": "gelu",
            "projector.norm_eps": 1e-6, "vision.image_size": 32, "decoder.rope_theta": 5e5, "decoder.head_dim": 128,
            "decoder.norms.qk_norm": True, "decoder.biases.qkv_bias": False, "decoder.norms.rms_norm_eps": 1e-6,
        }),
    ],
    ids=["2", "2.5", "3"],
)  # fmt: skip
def test_what_configs_leave_out(family, hf, expected):
    """The class defaults of transformers 5.23; of the widths that these do not fit together the decoder's counts."""
    out = {"hidden_size": 8192} if family is qwen2_vl else {"out_hidden_size": 8192 if family is qwen2_5_vl else 4096}
    config = family.config({**hf, "vision_config": {**out, **hf.get("vision_config", {})}})
    check_fields(config, expected)
    interleaved = family is qwen3_vl
    scaling = {"mrope_section": (24, 20, 20) if interleaved else (16, 24, 24), "mrope_interleaved": interleaved}
    assert config.decoder.rope_scaling == scaling


TEXT = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qwen2-vl", {"rope_scaling": {"type": "mrope", "mrope_section": [1, 2]}}, "three numbers with the sum 5"),
        ("qwen2-vl", {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 1]}}, "three numbers with the sum 5"),
        ("qwen2-vl", {"rope_scaling": {"type": "dynamic", "factor": 2.0, "mrope_section": [1, 2, 2]}}, "depends on the length"),
        ("qwen2-vl", {"vision_config": {"embed_dim": 32, "hidden_size": 48}}, "merger's width 48 differs from the decoder's 40"),
        ("qwen2-vl", {"vision_config": {"in_channels": 1, "hidden_size": 40}}, "in_channels 3"),
        ("qwen2-vl", {"num_experts": 8}, "experts .MoE. is not supported"),
        ("qwen2-vl", {"model_type": "qwen9_vl"}, "says model_type 'qwen9_vl'; this version knows: "),
        ("qwen3-vl", {"vision_config": {"deepstack_visual_indexes": [2, 0], "out_hidden_size": 32}}, "do not fit the decoder's layers"),
        ("qwen3-vl", {"vision_config": {"num_position_embeddings": 24, "out_hidden_size": 32}}, "must be a square, not 24"),
        ("qwen2.5-vl", {"vision_config": {"window_size": 5, "out_hidden_size": 36}}, "a window of 5 pixels holds no token"),
        ("qwen2.5-vl", {"vision_config": {"patch_size": [6, 7], "out_hidden_size": 36}}, "patch_size"),
    ],
)  # fmt: skip
def test_configs_that_make_no_model(name, changes, message, tmp_path):
    folder = copy_of(name, tmp_path / "model")
    edit_json(folder / "config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


# places


@pytest.mark.parametrize("name", NAMES)
def test_tokens_show_their_part_of_the_picture(name):
    model, processor = load(GOLDEN / name)
    (image,) = processor([PHOTO, "Hi"]).images
    boxes = find_boxes(model, processor, image)
    rows, columns = (side // 12 for side in image.pixel_values.shape[1:3])
    top, left = (np.linspace(0, side, count + 1) for side, count in ((96, rows), (70, columns)))
    expected = [(left[j], top[i], left[j + 1], top[i + 1]) for i in range(rows) for j in range(columns)]
    np.testing.assert_allclose(boxes, expected, atol=1e-9)


def test_what_a_token_shows_is_what_it_is_made_of():
    """A patch that changes moves the token whose sources name it and no other, as long as they do not see one another."""
    model, processor = load(GOLDEN / "qwen2-vl")
    (image,) = processor([PHOTO, "Hi"]).images
    sources = model.sources(image)
    patches = mx.random.normal((1, 16, 12, 8), key=mx.random.key(0))
    numbers = mx.arange(16 * 12).reshape(1, 16, 12, 1)
    assert sources.shape == (48, 4) and sorted(sources.ravel().tolist()) == numbers.flatten().tolist()
    patches = mx.tile(patches, (1, 1, 1, 4))
    before = np.array(model.projector(patches))
    for patch in (0, 13, 100):
        changed = np.array(model.projector(mx.where(numbers == patch, -patches, patches)))
        (moved,) = np.flatnonzero(np.abs(changed - before).max(axis=-1)[0] > 1e-6)
        assert patch in sources[moved]


@pytest.mark.parametrize(
    ("text", "scale", "expected"),
    [
        ("<|object_ref_start|>the  cat<|object_ref_end|><|box_start|>(100,200),(500,800)<|box_end|><|im_end|>", None,
         [("the cat", (20, 20, 100, 80))]),
        ("<|box_start|>(0,0),(1000,1000)<|box_end|>", None, [("", (0, 0, 200, 100))]),
        ("a cat(100,200),(500, 800) a dog(0,0),(10,10)", None, [("a cat", (20, 20, 100, 80)), ("a dog", (0, 0, 2, 1))]),
        ("The points (1,2),(3,4) lie near it.", None, []),
        ('```json\n[{"bbox_2d": [10, 20, 50, 80], "label": "cat"},\n{"bbox_2d": [0, 0, 1', (200, 100),
         [("cat", (20, 10, 100, 40))]),
        ('{"bbox_2d": [100, 200, 500, 800], "label": "a {cat}"}', None, []),
        ('[{"bbox_2d": [100, 200, 500, 800]}, {"text_content": "OPEN", "bbox_2d": [0, 0, 1000, 1000]}]', None,
         [("", (20, 20, 100, 80)), ("OPEN", (0, 0, 200, 100))]),
        ('{"bbox_2d": [1, 2, 3], "label": "x"} {"bbox_2d": "no"} {"bbox_2d": [1e99, 0, 1, true]} {1}', None, []),
    ],
)  # fmt: skip
def test_boxes_of_answers(text, scale, expected):
    found = find_detections(text, height=100, width=200, scale=scale)
    assert [(each.label, each.box) for each in found] == expected


def test_points_of_answers():
    (found,) = find_detections('[{"point_2d": [500, 250], "label": "tip"}]', height=100, width=200)
    assert (found.label, found.box, found.points) == ("tip", None, ((100.0, 25.0),))
    (found,) = find_detections('[{"point_2d": [5, 8]}]', height=100, width=200, scale=(50, 20))
    assert found.points == ((50.0, 16.0),)


def test_only_one_family_answers_in_its_own_pixels():
    scales = [load(GOLDEN / name)[1].answer_scale((96, 70)) for name in NAMES]
    assert scales == [None, (72, 48), None]


def test_an_answer_is_drawn(tmp_path, monkeypatch):
    """The command, with the model's words put into its mouth."""
    from mlx_vlm_mini.text.tokenizer import Tokenizer

    said = '[{"bbox_2d": [12, 18, 24, 36], "label": "roof"}, {"point_2d": [24, 36], "label": "door"}]'
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids, *, skip_special_tokens=True: said)
    out = tmp_path / "out.png"
    done = run(
        "generate", GOLDEN / "qwen2.5-vl", "-p", "Where?", "-i", PHOTO, "--max-tokens", 1, "--draw", out, "--json"
    )
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["detections"] == [  # seen at 48 x 72 pixels of 70 x 96
        {"label": "roof", "box": [18, 24, 35, 48], "mask_codes": []},
        {"label": "door", "box": None, "mask_codes": [], "points": [[35.0, 48.0]]},
    ]
    with Image.open(out) as drawn, Image.open(PHOTO) as photo:
        assert drawn.size == photo.size and drawn.tobytes() != photo.tobytes()


# files


WIDE = {
    "qwen2-vl": {"hidden_size": 128, "intermediate_size": 192, "vision_config": {"embed_dim": 64, "hidden_size": 128},
                 "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}},
    "qwen2.5-vl": {"text_config": {
        "hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}},
        "vision_config": {"hidden_size": 64, "intermediate_size": 96, "out_hidden_size": 128}},
    "qwen3-vl": {"text_config": {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32},
                 "vision_config": {"hidden_size": 64, "intermediate_size": 96, "out_hidden_size": 128}},
}  # fmt: skip


def small(settings):
    if "patch_size" in settings:
        settings.update(min_pixels=500, max_pixels=1500)


@pytest.mark.parametrize("name", NAMES)
def test_quantized(name, tmp_path):
    """Fused tensors, three kinds of kernels, and the check layer by layer, which sees no harm at 8 bits."""
    model = check_eight_bits(make_wide_with(small, name, tmp_path / "wide", WIDE[name]), tmp_path / "out")
    assert (model.vision.blocks[0].attn.q_proj.bits, model.projector.layers[0].bits) == (8, 8)


def test_rounding_with_compensation(tmp_path):
    """The tower's layers, too, whose inputs come picture by picture and window by window."""
    check_compensation(make_wide_with(small, "qwen2.5-vl", tmp_path / "wide", WIDE["qwen2.5-vl"]), tmp_path)


def test_what_info_says():
    found = describe(GOLDEN / "qwen2.5-vl", check=True)
    assert (found["family"], found["image_token"], found["unused"]) == ("qwen2_5_vl", "<|image_pad|>", 0)
    own = {"min_pixels": 576, "max_pixels": 4000, "max_image_tokens": 27, "patch_size": 6}
    assert own.items() <= found["vision"].items() and "image_size" not in found["vision"]


def test_all_tensors_are_used():
    for name in NAMES:
        planned = plan(open_checkpoint(GOLDEN / name))
        assert planned.unused == () and find_family(planned.checkpoint.config) is planned.family


def test_training_is_refused(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text(
        json.dumps(
            {
                "image": str(PHOTO),
                "messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A."}],
            }
        )
        + "\n"
    )
    done = run("train", GOLDEN / "qwen2-vl", "--data", data, "--output", tmp_path / "out")
    assert done.exit_code == 1 and "family 'qwen2_vl' joins image features, which cannot be trained yet" in done.stderr
