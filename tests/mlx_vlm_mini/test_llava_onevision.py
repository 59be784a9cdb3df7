"""LLaVA-OneVision: grids that are shrunk, images that are not alone, and what a second one does to a conversation."""

import json
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import PHOTO, SHAPES, make_wide
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from reference import GOLDEN, ONEVISION

from mlx_vlm_mini import Chat, attend, load
from mlx_vlm_mini.checkpoints.describe import describe
from mlx_vlm_mini.convert import convert
from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.families import llava_onevision
from mlx_vlm_mini.grounding.attend import find_boxes
from mlx_vlm_mini.grounding.places import join
from mlx_vlm_mini.preprocessing.anyres import choose_pinpoint, count_tokens, most_tokens
from mlx_vlm_mini.preprocessing.pixels import frames
from mlx_vlm_mini.preprocessing.settings import LLAVA_ONEVISION_PINPOINTS, image_settings
from mlx_vlm_mini.projectors.arrange import pack

HUB, NEW, STRIP = "llava-onevision", "llava-onevision-5", GOLDEN / "strip.png"


@pytest.fixture(scope="module")
def tiny():
    return load(GOLDEN / HUB)


@pytest.mark.parametrize(
    ("size", "tokens"),
    [
        ((384, 384), 1485), ((480, 640), 2929), ((1080, 1920), 7269), ((2304, 2304), 7371), ((300, 3000), 3500),
        ((1512, 1384), 7359), ((56, 60), 1429), ((4000, 30), 1053),
    ],
)  # fmt: skip
def test_tokens_of_an_image(size, tokens):
    """The figures of transformers 5.23, with nine tiles of 27x27 features and the 36 grids."""
    found = count_tokens(size, LLAVA_ONEVISION_PINPOINTS, tile_size=384, side=27, most_tiles=9)
    assert found == tokens


def test_the_longest_image():
    """A grid may have 1.21 times nine tiles' features before it is shrunk: its longest fills most of 11 tiles."""
    assert most_tokens(LLAVA_ONEVISION_PINPOINTS, tile_size=384, side=27, most_tiles=9) == 8829
    filled = [count_tokens(size, [size], tile_size=384, side=27, most_tiles=9) for size in LLAVA_ONEVISION_PINPOINTS]
    assert max(filled) < 8829
    random = np.random.default_rng(0).integers(1, 3000, (300, 2)).tolist()
    counts = [count_tokens(size, LLAVA_ONEVISION_PINPOINTS, tile_size=384, side=27, most_tiles=9) for size in random]
    assert max(counts) <= 8829


SIDES = st.integers(1, 6)


@settings(max_examples=200, deadline=None)
@given(
    st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    st.lists(st.tuples(SIDES, SIDES).map(lambda pair: (pair[0] * 8, pair[1] * 8)), min_size=1, max_size=6),
    st.integers(2, 5),
    st.integers(1, 9),
)
def test_as_many_features_as_tokens(size, pinpoints, side, most):
    height, width = choose_pinpoint(size, pinpoints)
    features = mx.zeros((1 + height * width // 64, side * side, 2))
    packed = pack(features, mx.zeros(2), size, pinpoints, tile_size=8, most_tiles=most)
    assert len(packed) == count_tokens(size, pinpoints, tile_size=8, side=side, most_tiles=most)


def test_a_grid_is_shrunk_between_its_features():
    """4 x 4 features, of which nine may stay (ratio 4/3): places 1/6, 3/2 and 17/6 of each axis, by hand."""
    rows, columns = np.mgrid[0:4, 0:4]
    grid = (10.0 * rows + columns).reshape(2, 2, 2, 2).transpose(0, 2, 1, 3).reshape(4, 4)
    features = mx.array(np.concatenate([np.full((1, 4), 99.0), grid]))[..., None]
    packed = pack(features, mx.array([-1.0]), (16, 16), [(16, 16)], tile_size=8, most_tiles=2)[:, 0]
    # ratio sqrt(16 / 8) = 1.41: 2 x 2 remain, at 0.5 and 2.5
    np.testing.assert_allclose(packed.tolist(), [99, 99, 99, 99, 5.5, 7.5, -1, 25.5, 27.5, -1], atol=1e-5)
    whole = pack(features, mx.array([-1.0]), (16, 16), [(16, 16)], tile_size=8, most_tiles=4)
    assert len(whole) == 4 + 4 * 5  # 16 features are not more than 16
    alone = pack(features[:1], mx.array([-1.0]), (16, 16), [(16, 16)], tile_size=8, most_tiles=2)[:, 0]
    assert alone.tolist() == [99, 99, 99, 99, -1]
    with pytest.raises(CheckpointError, match="has 4 tiles by config.json's"):
        pack(features[:1], mx.array([-1.0]), (16, 16), [(16, 16)], tile_size=8)


def test_what_shrunk_features_show(tiny):
    """Each lies between the four that it was made of, and its box around theirs; not one feature is left out."""
    model, processor = tiny
    (image,) = processor(["What?", PHOTO]).images
    sources = model.sources(image)
    assert sources.shape == (image.tokens, 4)
    assert (sources[:9] == np.arange(9)[:, None]).all()  # the whole image, as it is
    numbers = mx.random.normal((image.rows, 9, 5), key=mx.random.key(3))
    mixed, single = np.array(model._arrange(numbers, mx.zeros(5), image)), np.array(numbers).reshape(-1, 5)
    newlines = (sources < 0).all(axis=1)
    assert newlines.sum() == 4 and not mixed[newlines].any()
    four = single[sources[~newlines]]
    assert (mixed[~newlines] <= four.max(axis=1) + 1e-5).all() and (mixed[~newlines] >= four.min(axis=1) - 1e-5).all()
    boxes = find_boxes(model, processor, image)
    patches = np.concatenate([frame.patches(24, 24, 8) for frame in frames(image.size, processor.image_settings)])
    np.testing.assert_array_equal(boxes, join(patches, sources))
    assert np.isnan(boxes[newlines]).all()
    grid = boxes[9:][~newlines[9:]].reshape(4, -1, 4)
    assert all((one[:, 1] < other[:, 1]).all() for one, other in pairwise(grid))
    assert grid[:, 0, 0].max() <= 0 and grid[:, -1, 2].min() >= 70  # bars left and right are not shown


def test_an_image_that_is_not_alone(tiny):
    model, processor = tiny
    alone = processor(["What?", PHOTO]).images
    both = processor(["What?", PHOTO, SHAPES]).images
    assert [(image.rows, image.tokens) for image in alone] == [(10, 25)]
    assert [(image.rows, image.tokens) for image in both] == [(1, 10), (1, 10)]
    assert alone[0].digest != both[0].digest
    pixels = both[1].pixel_values[0]  # a banner: bars of int(0.5 * 255) above and below
    grey = (int(0.5 * 255) / 255 - 0.5) / 0.5
    np.testing.assert_allclose(pixels[[0, 1, -2, -1]], grey, atol=1e-6)
    boxes = find_boxes(model, processor, both[1])
    np.testing.assert_allclose(boxes[0], [0, -15, 27, 12])
    assert np.isnan(boxes[-1]).all() and len(boxes) == 10
    found = attend(model, processor, ["What?", PHOTO, " and ", SHAPES], answer=[7, 9])
    assert [image.weights.shape for image in found.images] == [(2, 10), (2, 10)]


def test_a_second_image_changes_the_slots_of_the_first(tiny):
    """Nothing behind them is used again; what follows without a further image is; undone, the first is alone again."""
    chat = Chat(*tiny, max_tokens=4)
    first = list(chat.send(["See ", PHOTO, "!"]))[-1].stats
    again = list(chat.send("Why?"))[-1].stats
    # the template joins a newline to what is said, which becomes another token
    assert again.encoded_images == 0 and again.cached_tokens >= first.prompt_tokens - 1
    second = list(chat.send(["And ", SHAPES, "?"]))[-1].stats
    before = int(np.flatnonzero(chat.processor(chat.messages[:1]).slots)[0])
    assert second.cached_tokens == before and second.encoded_images == 2 and second.image_tokens == 20
    third = list(chat.send("Why?"))[-1].stats
    assert third.cached_tokens >= second.prompt_tokens - 1 and third.encoded_images == 0
    chat.undo(), chat.undo()
    alone = list(chat.send("Why not?"))[-1].stats
    assert alone.image_tokens == first.image_tokens and alone.encoded_images == 0
    assert alone.cached_tokens >= before


def test_an_image_that_is_left_alone_is_cut(tiny):
    """When the oldest turn is dropped, the image behind it is the only one."""
    chat = Chat(*tiny, max_tokens=4, context=105, on_full="drop")
    list(chat.send(["See ", PHOTO, "!"]))
    assert list(chat.send([STRIP, "What?"]))[-1].stats.image_tokens == 20
    last = list(chat.send("Tell me of it in a great many words, please, and then again."))[-1].stats
    assert chat.dropped_turns == 1 and last.image_tokens == chat.processor(["x", STRIP]).images[0].tokens != 10


LAYOUTS = {
    "in memory": [("language_model.lm_head", "lm_head"), ("language_model.model.", "model.language_model."),
                  ("vision_tower.vision_model.", "model.vision_tower."), ("multi_modal", "model.multi_modal"),
                  ("image_", "model.image_")],
    "transformers 5": [("vision_tower.vision_model.", "vision_tower.")],
}  # fmt: skip


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_every_layout_is_read(layout, copy_of, tiny):
    folder = copy_of(HUB)

    def renamed(name):
        for old, new in LAYOUTS[layout]:
            if name.startswith(old):
                return new + name.removeprefix(old)
        return name

    tensors = {renamed(name): array for name, array in mx.load(str(folder / "model.safetensors")).items()}
    mx.save_safetensors(str(folder / "new.safetensors"), tensors, {"format": "pt"})
    (folder / "new.safetensors").replace(folder / "model.safetensors")
    model, processor = load(folder)
    inputs = processor("Hi", [PHOTO])
    assert (model(inputs) == tiny[0](inputs)).all()


def test_an_empty_config_has_the_class_defaults():
    config = llava_onevision.config({"model_type": "llava_onevision"})
    vision = config.vision
    assert (vision.hidden_size, vision.num_hidden_layers, vision.depth, vision.num_features) == (1152, 26, 26, 729)
    assert not vision.post_norm and vision.layer_norm_eps == 1e-6 and vision.hidden_act == "gelu_pytorch_tanh"
    assert (config.decoder.hidden_size, config.decoder.vocab_size, config.image_token_id) == (4096, 151936, 151646)
    assert config.image_grid_pinpoints == LLAVA_ONEVISION_PINPOINTS and config.most_tiles == 9
    assert config.decoder.biases.qkv_bias and not config.decoder.tie_word_embeddings
    tied = llava_onevision.config({"text_config": {"tie_word_embeddings": True}})
    assert tied.decoder.tie_word_embeddings


@pytest.mark.parametrize("ratio", ["anyres", "anyres_max_0", "anyres_max_", "anyres_max_99999", 9, None, "pad"])
def test_aspect_ratios_that_are_none(ratio):
    with pytest.raises(CheckpointError, match="vision_aspect_ratio must be anyres_max_9 or the like, not"):
        llava_onevision.config({"vision_aspect_ratio": ratio})


def test_image_settings():
    found = image_settings({"image_processor_type": "LlavaOnevisionImageProcessor"}, "")
    assert found.tiling.tile_size == 384 and found.tiling.pinpoints == LLAVA_ONEVISION_PINPOINTS
    assert found.among.tiling is None and found.among.pad_color == (122, 116, 104)
    assert image_settings({"image_processor_type": "LlavaOnevisionImageProcessor", "image_mean": [0.5] * 3}, "").among
    with pytest.raises(CheckpointError, match="tiles of 384x384 pixels fill"):
        image_settings({"image_grid_pinpoints": [[384, 500]]}, "LlavaOnevision")


def test_without_a_template_the_prompt_is_qwens(copy_of):
    folder = copy_of(HUB)
    (folder / "chat_template.json").unlink()
    _, processor = load(folder)
    inputs = processor("Hi", [PHOTO])
    text = processor.tokenizer.decode(inputs.input_ids[0].tolist(), skip_special_tokens=False)
    assert text.replace("<image>", "") == "<|im_start|>user\n\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert processor.chat_template.source != ONEVISION


def test_the_description():
    described = describe(GOLDEN / HUB, check=True)
    assert described["family"] == "llava_onevision" and described["check"]
    assert described["vision"]["max_image_tokens"] == most_tokens(
        [(24 * h, 24 * w) for h in range(1, 4) for w in range(1, 4)], tile_size=24, side=3, most_tiles=2
    )
    assert json.dumps(described)


WIDE = {
    "text_config": {"hidden_size": 128, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2},
    "vision_config": {"hidden_size": 96, "intermediate_size": 72, "num_attention_heads": 4},
}


def test_quantized(tmp_path):
    wide = make_wide(HUB, tmp_path / "wide", WIDE)
    report = convert(wide, tmp_path / "mlx", bits=8, group_size=32)
    (original, processor), (model, _) = load(wide), load(tmp_path / "mlx")
    assert report.preview.bits_per_weight < 14 and "image_newline" in dict(tree_flatten(model.parameters()))
    for parts in (["What?", PHOTO], ["What?", PHOTO, SHAPES]):
        one, other = (np.array(each(processor(parts))[0]) for each in (original, model))
        assert 0 < np.abs(one - other).max() < 0.3
