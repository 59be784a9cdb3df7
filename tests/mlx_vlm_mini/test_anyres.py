"""Any resolution: which tiles an image gets, what stands in them, how their features are packed, and how many there are."""

import json

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import PHOTO, SHAPES, edit_json
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from reference import GOLDEN

from mlx_vlm_mini import Chat, load
from mlx_vlm_mini.checkpoints.describe import describe
from mlx_vlm_mini.errors import CheckpointError, ImageError, PromptError
from mlx_vlm_mini.families import llava_next
from mlx_vlm_mini.preprocessing.anyres import Tiling, choose_pinpoint, count_tokens, cut
from mlx_vlm_mini.preprocessing.settings import LLAVA_NEXT_PINPOINTS, image_settings
from mlx_vlm_mini.projectors.arrange import pack

NEXT, SHARDED = "llava-next-clip-mistral", "llava-next-siglip-qwen2"


@pytest.fixture(scope="module")
def tiled():
    return load(GOLDEN / NEXT)


@pytest.mark.parametrize(
    ("size", "pinpoint", "tokens"),
    [
        ((899, 1024), (672, 672), 2634), ((480, 640), (672, 672), 2340), ((336, 336), (336, 672), 1176),
        ((200, 300), (336, 672), 1464), ((2000, 300), (1008, 336), 1368),
        ((220, 1056), (336, 1008), 1744), ((88, 55), (336, 672), 984),  # products a hair below a whole number
    ],
)  # fmt: skip
def test_tokens_of_an_image(size, pinpoint, tokens):
    """The figures of transformers 5.23 with LLaVA-NeXT's own pinpoints. A square fits two of them equally: the first."""
    assert choose_pinpoint(size, LLAVA_NEXT_PINPOINTS) == pinpoint
    assert count_tokens(size, LLAVA_NEXT_PINPOINTS, tile_size=336, side=24) == tokens


SIDES = st.integers(1, 6)


@settings(max_examples=300)
@given(
    st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    st.lists(st.tuples(SIDES, SIDES).map(lambda pair: (pair[0] * 8, pair[1] * 8)), min_size=1, max_size=6),
    st.integers(1, 4),
)
def test_as_many_features_as_tokens(size, pinpoints, side):
    height, width = choose_pinpoint(size, pinpoints)
    features = mx.zeros((1 + height * width // 64, side * side, 2))
    packed = pack(features, mx.zeros(2), size, pinpoints, tile_size=8)
    assert len(packed) == count_tokens(size, pinpoints, tile_size=8, side=side)


def test_features_are_packed_row_by_row():
    """2 x 1 tiles of 2 x 2 features: feature 10 t + p is patch p of tile t, -1 the newline."""
    features = mx.array([[10.0 * tile + patch for patch in range(4)] for tile in range(3)])[..., None]
    pinpoints, newline = [(16, 8)], mx.array([-1.0])

    def packed(size):
        return pack(features, newline, size, pinpoints, tile_size=8)[:, 0].tolist()

    assert packed((16, 8)) == [0, 1, 2, 3, 10, 11, -1, 12, 13, -1, 20, 21, -1, 22, 23, -1]
    assert packed((8, 8)) == [0, 1, 2, 3, 12, 13, -1, 20, 21, -1]  # a bar above and one below
    across = pack(features, newline, (8, 8), [(8, 16)], tile_size=8)[:, 0].tolist()
    assert across == [0, 1, 2, 3, 11, 20, -1, 13, 22, -1]  # bars at the sides


def test_tiles_show_the_image_between_black_bars():
    image = Image.new("RGB", (20, 10), "red")
    tiling = Tiling(pinpoints=((16, 16),), tile_size=8, base_size=(8, 8))
    base, *tiles = [np.asarray(piece)[..., 0] for piece in cut(image, tiling, 3)]
    assert len(tiles) == 4 and (base == 255).all()
    for tile, rows in zip(tiles, ([4, 5, 6, 7], [4, 5, 6, 7], [0, 1, 2, 3], [0, 1, 2, 3]), strict=True):
        expected = np.zeros((8, 8))
        expected[rows] = 255
        np.testing.assert_array_equal(tile, expected)
    odd = np.asarray(cut(Image.new("RGB", (20, 7), "red"), tiling, 3)[1])[..., 0]  # 6 rows, 5 above and 5 below
    assert (odd[:5] == 0).all() and (odd[5:] == 255).all()


def test_only_the_images_that_are_missing_are_encoded(tiled, monkeypatch):
    model, processor = tiled
    inputs = processor(["See ", PHOTO, " and ", SHAPES, "!"])
    assert [image.tokens for image in inputs.images] == [46, 44]
    assert [(image.rows, image.size) for image in inputs.images] == [(3, (96, 70)), (3, (50, 81))]
    whole = np.array(model.read(inputs).embeddings)
    encoded = []
    embed_images = type(model).embed_images
    monkeypatch.setattr(
        type(model),
        "embed_images",
        lambda self, rows, *more: encoded.append(len(rows)) or embed_images(self, rows, *more),
    )
    slots = np.flatnonzero(inputs.slots)
    for start, rows in ((0, [3, 3]), (slots[45], [3, 3]), (slots[45] + 1, [3]), (slots[-1], [3]), (slots[-1] + 1, [])):
        encoded.clear()
        np.testing.assert_allclose(np.array(model.read(inputs, int(start)).embeddings), whole[:, start:], atol=1e-6)
        assert encoded == rows


def test_images_that_differ_in_size_alone_are_not_the_same():
    """Two black images with equal tiles, of which different parts count."""
    model, processor = load(GOLDEN / SHARDED)
    wide, wider = (processor.prepare(Image.new("RGB", size)) for size in ((80, 50), (90, 50)))
    assert wide.pixel_values.tobytes() == wider.pixel_values.tobytes() and wide.digest != wider.digest
    chat = Chat(model, processor, max_tokens=2)
    first = list(chat.send([wide, "What?"]))
    chat.messages.clear()
    (again,) = list(chat.send([wider, "What?"], max_tokens=1))
    assert again.stats.cached_tokens < 10 < first[0].stats.prompt_tokens


def test_prompt_and_features_must_agree(copy_of):
    folder = copy_of(NEXT)
    edit_json(folder / "config.json", image_grid_pinpoints=[[48, 24], [24, 72]])
    model, processor = load(folder)
    model(processor("Hi", [PHOTO]))
    with pytest.raises(CheckpointError, match="81x50 pixels has 3 tiles by config.json's .*image processor gives 2"):
        model(processor("Hi", [SHAPES]))
    edit_json(folder / "config.json", image_grid_pinpoints=[[24, 48]])
    model, processor = load(folder)
    with pytest.raises(PromptError, match="the prompt has 46 tokens for an image of 70x96 pixels, the image gives 28"):
        model(processor("Hi", [PHOTO]))


LAYOUTS = {
    "L2": [("language_model.lm_head", "lm_head"), ("language_model.model.", "model.language_model."),
           ("vision_tower.", "model.vision_tower."), ("multi_modal", "model.multi_modal"), ("image_", "model.image_")],
    "L2b": [("language_model.lm_head", "lm_head"), ("language_model.model.", "model.language_model."),
            ("vision_tower.vision_model.", "model.vision_tower."), ("multi_modal", "model.multi_modal"), ("image_", "model.image_")],
    "L3": [("vision_tower.vision_model.", "vision_tower.")],
}  # fmt: skip


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_every_layout_is_read(layout, copy_of, tiled):
    folder = copy_of(NEXT)

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
    assert (model(inputs) == tiled[0](inputs)).all()


def test_a_checkpoint_without_its_newline(copy_of):
    folder = copy_of(NEXT)
    tensors = mx.load(str(folder / "model.safetensors"))
    del tensors["image_newline"]
    mx.save_safetensors(str(folder / "new.safetensors"), tensors, {"format": "pt"})
    (folder / "new.safetensors").replace(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks 1 tensor \(image_newline\)"):
        load(folder)


def test_an_empty_config_is_llava_next_of_seven_billion():
    """The class defaults of transformers 5.23, as its LlavaNextConfig gives them."""
    config = llava_next.config({"model_type": "llava_next", "image_grid_pinpoints": None})
    assert (config.vision.hidden_size, config.vision.image_size, config.vision.num_features) == (1024, 336, 576)
    assert (config.decoder.hidden_size, config.decoder.num_hidden_layers, config.image_token_id) == (4096, 32, 32000)
    assert config.image_grid_pinpoints == ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


PINPOINTS = [
    ([], "must be a list of"), ("(336, 672)", "must be a list of"), ([[336]], r"has \[336\], which is no"),
    ([[336, 600]], r"has \[336, 600\], which is no .* tiles of 336x336 pixels fill"), ([[336, 0]], "has .*, which is no"),
    ([[336, 672.0]], "has .*, which is no"), ([336, 672], "has 336, which is no"), ([[336, True]], "has .*, which is no"),
]  # fmt: skip


@pytest.mark.parametrize(("pinpoints", "message"), PINPOINTS)
def test_pinpoints_that_are_none(pinpoints, message):
    with pytest.raises(CheckpointError, match=f"^config.json: image_grid_pinpoints {message}"):
        llava_next.config({"image_grid_pinpoints": pinpoints})
    with pytest.raises(CheckpointError, match=f"^preprocessor_config.json: image_grid_pinpoints {message}"):
        image_settings({"crop_size": 336, "image_grid_pinpoints": pinpoints}, "LlavaNext")


def test_a_tile_gives_a_feature_a_patch():
    with pytest.raises(CheckpointError, match="for each of their 576 patches, .* gives 577"):
        llava_next.config({"vision_feature_select_strategy": "full"})
    with pytest.raises(CheckpointError, match="for each of their 196 patches, .* gives 195"):
        llava_next.config(
            {"vision_config": {"model_type": "siglip_vision_model"}, "image_grid_pinpoints": [[224, 448]]}
        )


def test_image_settings_with_tiles():
    found = image_settings({"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}, "LlavaNext")
    assert found.tiling == Tiling(pinpoints=LLAVA_NEXT_PINPOINTS, tile_size=336, base_size=(336, 336))
    assert found.pad_color is None  # do_pad is about batches here
    with pytest.raises(CheckpointError, match="tiles need crop_size as height and width, and size as"):
        image_settings({"size": {"longest_edge": 336}}, "LlavaNext")


def test_images_are_taken_as_the_family_takes_them(copy_of):
    folder = copy_of(NEXT)
    edit_json(folder / "preprocessor_config.json", image_processor_type=...)
    assert load(folder)[1].image_settings.tiling is not None  # the family's own class, where none is named
    edit_json(folder / "preprocessor_config.json", image_processor_type="CLIPImageProcessor")
    with pytest.raises(CheckpointError, match="gives no tiles, family 'llava_next' needs them"):
        load(folder)
    folder = copy_of()
    edit_json(folder / "preprocessor_config.json", image_processor_type="LlavaNextImageProcessor", crop_size=336)
    with pytest.raises(CheckpointError, match="gives tiles, family 'llava' takes none"):
        load(folder)


def test_pieces_that_differ_in_size(copy_of):
    folder = copy_of(NEXT)
    edit_json(folder / "preprocessor_config.json", do_resize=False, do_center_crop=False, size={"shortest_edge": 30})
    with pytest.raises(CheckpointError, match="an image and its tiles differ in size"):
        load(folder)[1]("Hi", [PHOTO])
    edit_json(folder / "preprocessor_config.json", do_center_crop=True, size={"shortest_edge": 30}, crop_size=12)
    model, processor = load(folder)
    with pytest.raises(ImageError, match="the vision tower takes 24x24 pixels, the image processor gives 12x12"):
        model(processor("Hi", [PHOTO]))


def test_without_a_chat_template_there_is_no_guess(copy_of):
    folder = copy_of(NEXT)
    (folder / "chat_template.json").unlink()
    with pytest.raises(PromptError, match="has no chat template, and those of LLaVA-NeXT differ; copy chat_template"):
        load(folder)[1]("Hi")


def test_the_description_counts_the_newline_and_the_most_tokens():
    described = describe(GOLDEN / NEXT, check=True)
    assert described["vision"]["max_image_tokens"] == 16 + 12 * 5 and "image_tokens" not in described["vision"]
    assert described["weights"] == described["unused"] + sum(
        described[part]["weights"] for part in ("vision", "projector", "decoder")
    )
    assert json.dumps(described)
