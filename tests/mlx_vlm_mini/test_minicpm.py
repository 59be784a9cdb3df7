"""MiniCPM-V 4.6: slices, their places, numbers of pictures, layouts, its own template, what is refused; parity is
test_parity.py's."""

import json

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import PHOTO, SHAPES, check_fields, edit_json, make_wide, with_paths
from reference import CASES, GOLDEN

from mlx_vlm_mini import Chat, attend, load
from mlx_vlm_mini.checkpoints.describe import describe
from mlx_vlm_mini.checkpoints.folder import open_checkpoint
from mlx_vlm_mini.checkpoints.load import plan
from mlx_vlm_mini.convert import convert
from mlx_vlm_mini.errors import CheckpointError, ImageError, PromptError
from mlx_vlm_mini.families import minicpmv4_6
from mlx_vlm_mini.grounding.attend import find_boxes
from mlx_vlm_mini.images.video import Video
from mlx_vlm_mini.preprocessing.slices import Slices
from mlx_vlm_mini.vision.positions import RESIZES

FOLDER = GOLDEN / "minicpm-v-4.6"
STRIP = GOLDEN / "strip.png"


@pytest.fixture(scope="module")
def loaded():
    return load(FOLDER)


def last(model, processor, case="two_images"):
    logits = model(processor(with_paths(CASES[case])))[0, -1]
    return np.array(logits - mx.logsumexp(logits))


# slices


@pytest.mark.parametrize(
    ("size", "grid", "whole", "piece"),
    [
        ((448, 448), None, (448, 448), None), ((100, 200), None, (336, 616), None), ((30, 30), None, (448, 448), None),
        ((449, 448), (2, 1), (448, 448), (336, 616)), ((768, 1024), (2, 2), (392, 504), (392, 504)),
        ((3000, 2000), (4, 2), (560, 392), (392, 504)), ((1000, 1000), (2, 2), (448, 448), (448, 448)),
        ((448, 4480), (1, 9), (168, 1400), (448, 448)), ((2, 4000), None, (56, 19992), None),
    ],
)  # fmt: skip
def test_sizes(size, grid, whole, piece):
    """As published: 448 pixels, 9 slices, 56 pixels a token."""
    slices = Slices(patch_size=14, merge=4, scale=448, max_tiles=9, numbered=True)
    assert (slices.grid(size), slices.whole(size)) == (grid, whole)
    if grid is not None:
        assert slices.cut(size, grid) == piece


def test_of_equal_grids_that_with_more_rows():
    """A square picture as two slices."""
    slices = Slices(patch_size=14, merge=4, scale=448, max_tiles=2, numbered=True)
    assert slices.grid((2000, 2000)) == (2, 1)


def test_what_a_picture_becomes(loaded):
    """Its whole, and two slices of another size; slots of all of them; the second picture is number 1."""
    model, processor = loaded
    inputs = processor([SHAPES, PHOTO, "Hi"])
    first, second = inputs.images
    assert (first.pixel_values.shape, first.slices, first.tokens) == ((1, 48, 80, 3), None, 15)
    assert (second.pixel_values.shape, second.slices.shape) == ((1, 80, 48, 3), (2, 48, 80, 3)) and second.rows == 3
    assert second.tokens == 15 + 2 * 15 == len(model.encode(second))
    text = processor.tokenizer.decode(inputs.input_ids[0].tolist(), skip_special_tokens=False).replace(" ", "")
    pad = "<|image_pad|>" * 15
    assert f"<image_id>0</image_id><image>{pad}</image>\n<image_id>1</image_id><image>{pad}</image><slice>" in text
    assert f"<slice>{pad}</slice>\n<slice>{pad}</slice>" in text


def test_slices_of_a_row_stand_beside_one_another(loaded):
    _, processor = loaded
    text, _ = processor.expand([{"role": "user", "content": [{"type": "image"}]}], [processor.prepare(STRIP)])
    assert text.count("</slice><slice>") == 2 and "</slice>\n" not in text


def test_fewer_slices(copy_of):
    """--max-tiles."""
    _, processor = load(FOLDER)
    processor.limit_tiles(most=2)
    assert processor.prepare(STRIP).slices.shape[0] == 2
    processor.limit_tiles(most=1)
    assert processor.prepare(STRIP).slices is None
    with pytest.raises(CheckpointError, match="has no least number of tiles"):
        processor.limit_tiles(fewest=2)
    with pytest.raises(CheckpointError, match="a whole number from 1 to 1000 as max_tiles, not 0"):
        processor.limit_tiles(most=0)


def test_boxes_lie_in_the_picture(loaded):
    """Those of the whole cover it, and so do those of the slices together."""
    model, processor = loaded
    (image,) = processor([PHOTO, "Hi"]).images
    boxes, (height, width) = find_boxes(model, processor, image), image.size
    assert boxes.shape == (45, 4)
    for part in (boxes[:15], boxes[15:]):
        areas = (part[:, 2] - part[:, 0]) * (part[:, 3] - part[:, 1])
        assert areas.sum() == pytest.approx(height * width)
        assert part.min() == pytest.approx(0) and part[:, 2].max() == pytest.approx(width)
        assert part[:, 3].max() == pytest.approx(height)
    assert boxes[15:30, 3].max() == pytest.approx(height / 2) == boxes[30:, 1].min()
    found = attend(model, processor, [PHOTO, "Hi"], max_tokens=2)
    assert found.images[0].weights.shape[-1] == 45


def test_a_slot_shows_its_place(loaded):
    """What changes in a corner of a slice changes most in the slot whose box it is."""
    model, processor = loaded
    (image,) = processor([PHOTO, "Hi"]).images
    before = model.embed_images(mx.array(image.slices))
    changed = np.array(image.slices)
    changed[1, -16:, -16:] *= -1
    moved = np.abs(np.array(model.embed_images(mx.array(changed)) - before)).sum(axis=-1)
    assert moved[0].max() == 0 and moved[1].argmax() == 14
    assert model.sources(image)[15 + 29].tolist() == [60 + 60 + each for each in (48, 49, 58, 59)]


@pytest.mark.parametrize(("side", "count"), [(10, 16), (10, 20), (70, 32), (70, 100), (7, 7)])
def test_patches_take_a_stored_position(side, count):
    expected = [number * side // count for number in range(count)]
    assert RESIZES["floor"](side, count).argmax(axis=1).tolist() == expected


def test_an_image_that_is_not_whole_pairs_of_patches(loaded):
    with pytest.raises(ImageError, match="20x16 pixels is not made of pairs of patches of 4"):
        loaded[0].vision(mx.zeros((1, 16, 20, 3)))


def test_positions_have_one_axis(loaded):
    """Tokens of pictures count like others."""
    model, _ = loaded
    assert not model.config.decoder.has_sections
    assert model.config.decoder.shapes["full_attention"].rotary_dims == 8


def test_later_turns_read_only_what_is_new(loaded):
    model, processor = loaded
    chat = Chat(model, processor, max_tokens=4)
    list(chat.send(["What?", PHOTO]))
    before = [*chat.messages]
    tokens, fresh = [chunk.token for chunk in chat.send("Why?")], Chat(model, processor, max_tokens=4)
    assert chat.last_stats.cached_tokens > 60
    fresh.messages = before
    assert [chunk.token for chunk in fresh.send("Why?")] == tokens


def test_typed_tokens_are_text(loaded):
    """What stands around pictures is no token where somebody wrote it."""
    _, processor = loaded
    special = {processor.tokenizer.token_to_id(name) for name in ("<image>", "</slice>", "<image_id>")}
    ids = processor("See <image> and </slice><image_id>").input_ids[0].tolist()
    assert None not in special and not special & set(ids)


def test_videos_are_refused_in_a_line(loaded):
    with pytest.raises(PromptError, match="'minicpmv4_6' takes no videos: give some of its frames"):
        loaded[1].prepare(Video([PHOTO, SHAPES]))


# the prompt


def test_the_familys_own_template_writes_the_goldens_prompts(copy_of):
    folder = copy_of(FOLDER.name)
    (folder / "chat_template.jinja").unlink()
    own, theirs = load(folder)[1], load(FOLDER)[1]
    assert own.chat_template.source == minicpmv4_6.CHAT_TEMPLATE
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    for case in ("side_by_side", "two_turns"):
        for messages in (with_paths(CASES[case]), [system, *with_paths(CASES[case])]):
            assert own(messages).input_ids.tolist() == theirs(messages).input_ids.tolist()


# configs and layouts


def test_what_configs_leave_out():
    """The class defaults of transformers 5.23."""
    check_fields(minicpmv4_6.config({"model_type": "minicpmv4_6", "text_config": {"hidden_size": 1024}}), {
        "vision.hidden_size": 768, "vision.num_hidden_layers": 12, "vision.hidden_act": "gelu_pytorch_tanh",
        "vision.patch_size": 16, "vision.image_size": 64, "vision.grid.position_side": 14, "vision.grid.merged_after": 7,
        "vision.post_norm": True, "vision.layer_norm_eps": 1e-6, "projector.input_size": 3072,
        "projector.norm_eps": 1e-6, "projector.hidden_act": "gelu", "projector.merger.norm_joined": True,
        "decoder.num_hidden_layers": 32, "decoder.head_dim": 256, "decoder.tie_word_embeddings": False,
        "family": "minicpmv4_6",
    })  # fmt: skip


def community(tensors):
    """As mlx-vlm writes them."""
    found = {}
    for name, array in tensors.items():
        if name.startswith("model.language_model.") and name.endswith("norm.weight") and "linear_attn" not in name:
            array = array + 1
        if name.endswith(("conv1d.weight", "patch_embedding.weight")):
            array = mx.moveaxis(array, 1, -1)
        name = name.replace("model.language_model.", "language_model.model.").removeprefix("model.")
        found[name.replace("vision_tower.vit_merger.", "vit_merger.")] = mx.contiguous(array)
    return found


def older(tensors):
    for theirs, ours in (
        ("model.vision_tower.", "vpm."),
        ("model.language_model.", "llm."),
        ("model.merger.", "merger."),
    ):
        tensors = {name.replace(theirs, ours): array for name, array in tensors.items()}
    return tensors


@pytest.mark.parametrize("layout", [community, older])
def test_tensors_go_by_many_names(loaded, layout, copy_of, tmp_path):
    folder = copy_of(FOLDER.name)
    tensors = layout(mx.load(str(folder / "model.safetensors")))
    tensors["mtp.layers.0.self_attn.q_proj.weight"] = mx.zeros((3, 5))
    kind = "mlx" if layout is community else "pt"
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": kind})
    assert len(plan(open_checkpoint(folder)).unused) == 1
    np.testing.assert_allclose(last(*load(folder)), last(*loaded), atol=1e-4)
    convert(folder, tmp_path / "out")
    np.testing.assert_allclose(last(*load(tmp_path / "out")), last(*loaded), atol=1e-4)


def test_quantized(tmp_path):
    """8 bits answer as their numbers written out do; the narrow projections and the convolution stay what they are."""
    text = json.loads((FOLDER / "config.json").read_text())["text_config"]
    wide = {"text_config": {**text, "hidden_size": 64, "linear_key_head_dim": 32, "linear_value_head_dim": 32}}
    source = make_wide(FOLDER.name, tmp_path / "wide", wide)
    convert(source, tmp_path / "out", bits=8, group_size=32)
    packed = {name for name in open_checkpoint(tmp_path / "out").tensors if name.endswith(".scales")}
    assert any("in_proj_qkv" in name for name in packed) and any("embed_tokens" in name for name in packed)
    assert not any(part in name for name in packed for part in ("in_proj_a", "in_proj_b", "conv1d", "vit_merger"))
    convert(tmp_path / "out", tmp_path / "back", dequantize=True, dtype="float32")
    found = last(*load(tmp_path / "out"))
    np.testing.assert_allclose(found, last(*load(tmp_path / "back")), atol=1e-3)
    np.testing.assert_allclose(found, last(*load(source)), atol=1.5)
    described = describe(tmp_path / "out", check=True)
    assert described["vision"]["max_image_tokens"] == 160 and described["check"]


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        (None, {"downsample_mode": "4x"}, "downsample_mode must be 16x, not '4x'"),
        (None, {"merger_times": 2}, "merger_times must be 1, not 2"),
        (None, {"merge_kernel_size": [3, 3]}, r"merge_kernel_size must be \[2, 2\]"),
        (None, {"insert_layer_id": 3}, "insert_layer_id 3 is none of the tower's 3 layers"),
        (None, {"insert_layer_id": True}, "insert_layer_id True is none"),
        ("vision_config", {"window_kernel_size": [4, 4]}, r"window_kernel_size \[2, 2\]"),
        ("vision_config", {"num_channels": 1}, "num_channels 3"),
        ("vision_config", {"patch_size": 5}, "has shape"),
        ("vision_config", {"image_size": 44}, "has shape"),
        ("text_config", {"layer_types": ["mamba"] * 3}, "not 'mamba'"),
    ],
)
def test_configs_that_are_refused(part, changes, message, copy_of):
    folder = copy_of(FOLDER.name)
    given = changes if part is None else {part: json.loads((folder / "config.json").read_text())[part] | changes}
    edit_json(folder / "config.json", **given)
    with pytest.raises(CheckpointError, match=message) as error:
        load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"downsample_mode": "4x"}, "downsample_mode must be 16x"),
        ({"scale_resolution": 0}, "as scale, not 0"),
        ({"max_slice_nums": 10**9}, "from 1 to 1000 as max_tiles"),
        ({"patch_size": "4"}, "as patch_size, not '4'"),
        ({"do_resize": False}, "need do_resize"),
        ({"image_processor_type": "CLIPImageProcessor"}, "gives no tiles, family 'minicpmv4_6' needs them"),
    ],
)
def test_settings_that_are_refused(changes, message, copy_of):
    folder = copy_of(FOLDER.name)
    settings = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    edit_json(folder / "processor_config.json", image_processor={**settings, **changes})
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_settings_of_other_patches(copy_of):
    folder = copy_of(FOLDER.name)
    settings = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    edit_json(folder / "processor_config.json", image_processor={**settings, "patch_size": 5})
    with pytest.raises(CheckpointError, match="a token of 20 pixels a side, config.json of 16"):
        load(folder)[1]([PHOTO, "Hi"])
