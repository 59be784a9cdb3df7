"""Idefics3 and SmolVLM: split images, their announcements in the prompt, sparse configs, names of other tools."""

import json

import numpy as np
import pytest
from checkpoints import PHOTO, SHAPES, check_fields, edit_json, write_names
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from published import CONFIGS
from reference import GOLDEN

from mlx_vlm_mini import load
from mlx_vlm_mini.checkpoints.describe import describe
from mlx_vlm_mini.checkpoints.load import plan
from mlx_vlm_mini.cli.main import main
from mlx_vlm_mini.errors import CheckpointError, ImageError
from mlx_vlm_mini.families import find_family, idefics3
from mlx_vlm_mini.preprocessing.settings import image_settings
from mlx_vlm_mini.preprocessing.splits import Splits, choose_split, cut_splits, split_frames, steps
from mlx_vlm_mini.text.template import ChatTemplate

MARKERS, WORDS, WHOLE = GOLDEN / "idefics3-markers", GOLDEN / "idefics3-words", GOLDEN / "smolvlm-whole"
SMOL = Splits(tile_size=512, longest_edge=2048, split=True)
SHOWN = {"tile_size": 8, "longest_edge": 32, "split": True}


def test_an_empty_config_is_transformers_own():
    """The class defaults of transformers 5.23, as its Idefics3Config gives them."""
    config = idefics3.config({"model_type": "idefics3", "vision_config": {"image_size": 256}})
    check_fields(config, {
        "vision.hidden_size": 1152, "vision.depth": 12, "vision.intermediate_size": 3072, "vision.patch_size": 32,
        "vision.hidden_act": "gelu_pytorch_tanh", "vision.layer_norm_eps": 1e-6, "vision.post_norm": True,
        "decoder.hidden_size": 4096, "decoder.norms.rms_norm_eps": 1e-5, "projector.input_size": 4608,
        "projector.bias": False, "image_token_id": 128257,
    })  # fmt: skip
    assert idefics3.config({"vision_config": {"image_size": 256}, "text_config": {}}).decoder.norms.rms_norm_eps == 1e-6
    with pytest.raises(CheckpointError, match=r"patches of a tile, 7 along a side, cannot be joined.*scale_factor 2$"):
        idefics3.config({"model_type": "idefics3"})


@pytest.mark.parametrize(
    ("name", "tokens", "weights"),
    [
        ("HuggingFaceTB/SmolVLM-256M-Instruct", 64, 256e6),
        ("HuggingFaceTB/SmolVLM-500M-Instruct", 64, 507e6),
        ("HuggingFaceTB/SmolVLM-Instruct", 81, 2.25e9),
        ("HuggingFaceTB/SmolVLM2-500M-Video-Instruct", 64, 507e6),
        ("HuggingFaceTB/SmolVLM2-2.2B-Instruct", 81, 2.25e9),
        ("HuggingFaceM4/Idefics3-8B-Llama3", 169, 8.46e9),
    ],
)
def test_published_models(name, tokens, weights):
    """Tokens of a tile, and weights as the models are named or counted."""
    from published import published

    config = find_family(CONFIGS[name]).config(CONFIGS[name])
    side = config.vision.image_size
    given = image_settings({"max_image_size": {"longest_edge": side}, "size": {"longest_edge": 4 * side}}, "Idefics3")
    assert idefics3.image_text(config, given, "\0", (100, 1)).count("\0") == tokens * 5  # 4 x 1 tiles and the whole
    checkpoint = published(name)
    assert sum(map(checkpoint.num_weights, plan(checkpoint).ours.values())) == pytest.approx(weights, rel=0.01)


OTHERS = {"model.text_model.": "language_model.", "lm_head.": "language_model.lm_head.", "model.": ""}


@pytest.mark.parametrize("mlx", [False, True], ids=["Hub, transformers", "mlx-community"])
def test_every_layout_is_read(mlx, copy_of):
    """mlx-community's with MLX's convolutions, which the metadata tells."""

    def name(hub: str) -> str:
        begin = next(begin for begin in OTHERS if hub.startswith(begin))
        return OTHERS[begin] + hub.removeprefix(begin) if mlx else hub

    folder = copy_of("idefics3-markers")
    write_names(folder, idefics3, name, mlx=mlx)
    expected, processor = load(MARKERS)
    inputs = processor(["What?", PHOTO])
    assert (load(folder)[0](inputs) == expected(inputs)).all()


@pytest.mark.parametrize(
    ("size", "taken", "grid"),
    [
        ((600, 800), [(1536, 2048), (1536, 2048)], (3, 4)),
        ((100, 100), [(2048, 2048), (2048, 2048)], (4, 4)),
        ((1080, 1920), [(1152, 2048), (1536, 2048)], (3, 4)),  # 1152 is not whole tiles
        ((3000, 100), [(2048, 68), (2048, 512)], (4, 1)),  # 68.27
        ((4096, 63), [(2048, 32), (2048, 512)], (4, 1)),  # 31.5 becomes 31, which is odd
        ((1, 5000), [(1, 2048), (512, 2048)], (1, 4)),  # 0.41 becomes 0, which is even, and then one row
    ],
)
def test_sizes_by_hand(size, taken, grid):
    assert steps(size, SMOL) == taken and choose_split(size, SMOL) == grid


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 20), st.sampled_from([None, 8, 30, 32, 40]))
def test_limits_of_tiles(height, width, most, longest):
    """Never more tiles; and no fewer than as few tiles a side as can be would give."""
    splits = Splits(tile_size=8, longest_edge=longest, split=True, max_tiles=most)
    free = Splits(tile_size=8, longest_edge=longest, split=True)
    rows, columns = choose_split((height, width), splits)
    assert rows * columns <= most
    whole = np.prod(choose_split((height, width), free))
    assert rows * columns <= whole and (whole > most or (rows, columns) == choose_split((height, width), free))
    cut = list(cut_splits(Image.new("RGB", (width, height)), splits, 1))
    assert {tile.size for tile in cut} == {(8, 8)} and len(cut) == rows * columns + (rows * columns > 1)
    assert len(split_frames((height, width), splits)) == len(cut)


def test_a_split_image_shows_its_colours_in_order():
    """Four quarters of different grey, then the whole."""
    pixels = np.kron([[10, 60], [110, 160]], np.ones((20, 20)))
    image = Image.fromarray(np.stack([pixels] * 3, axis=-1).astype(np.uint8))
    *tiles, whole = cut_splits(image, Splits(tile_size=8, longest_edge=16, split=True), 1)
    assert [np.asarray(tile)[3, 3, 0].item() for tile in tiles] == [10, 60, 110, 160]
    assert [np.asarray(whole)[y, x, 0].item() for y in (1, 6) for x in (1, 6)] == [10, 60, 110, 160]


def prompt_of(processor, prompt):
    ids = np.array(processor(prompt).input_ids[0]).tolist()
    return processor.tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("folder", [MARKERS, WORDS], ids=["markers", "words"])
def test_the_prompt_names_rows_and_columns(folder):
    _, processor = load(folder, max_tiles=4)
    tile, around = "<image>" * 4, "<fake_token_around_image>"
    places = [[f"{around}<row_{row}_col_{column}>{tile}" for column in (1, 2)] for row in (1, 2)]
    image = "\n".join("".join(row) for row in places) + f"\n\n{around}<global-img>{tile}{around}"
    assert prompt_of(processor, [PHOTO, "What?"]) == (f"<|im_start|>User:{image}What?<end_of_utterance>\nAssistant:")
    _, processor = load(folder, max_tiles=1)
    whole = f"{around}<global-img>{tile}{around}"
    assert prompt_of(processor, ["See ", PHOTO]) == f"<|im_start|>User: See {whole}<end_of_utterance>\nAssistant:"


def test_a_folder_without_a_chat_template_gets_the_familys():
    text = (MARKERS / "chat_template.json").read_text()
    own, given = (
        ChatTemplate(source, {"bos_token": "<s>"}, "<image>")
        for source in (idefics3.CHAT_TEMPLATE, json.loads(text)["chat_template"])
    )
    image, word = {"type": "image", "image": PHOTO}, {"type": "text", "text": "Hi"}
    said = {"role": "assistant", "content": [word]}
    for parts in ([image, word], [word, image], [word], [image, image]):
        messages = [{"role": "system", "content": [word]}, {"role": "user", "content": parts}, said]
        for more in (True, False):
            assert own.render(messages, add_generation_prompt=more) == given.render(
                messages, add_generation_prompt=more
            )


def test_limits_in_commands():
    def answer(*options):
        arguments = ["generate", str(MARKERS), "-p", "Hi", "-i", str(PHOTO), "--json", "--max-tokens", "1", *options]
        result = CliRunner().invoke(main, arguments)
        return json.loads(result.stdout)["image_tokens"] if result.exit_code == 0 else (result.exit_code, result.stderr)

    assert (answer(), answer("--max-tiles", "6"), answer("--max-tiles", "1")) == (52, 20, 4)
    assert answer("--min-tiles", "2") == (
        1, "Error: family 'idefics3' has no least number of tiles: leave --min-tiles (min_tiles) out\n"
    )  # fmt: skip


def test_what_it_costs_is_described():
    assert {key: describe(MARKERS)["vision"][key] for key in ("tile_tokens", "max_image_tokens")} == {
        "tile_tokens": 4, "max_image_tokens": 68,
    }  # fmt: skip
    whole = describe(WHOLE)["vision"]
    assert (whole["tile_tokens"], whole["max_image_tokens"]) == (9, 9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": {"height": 64, "width": 64}}, "split images need size and max_image_size as longest_edge"),
        ({"max_image_size": {"height": 9, "width": 9}}, "split images need size and max_image_size as longest_edge"),
        ({"max_image_size": {"longest_edge": 10**6}}, "tiles of 1000000 pixels a side are too large"),
        ({"image_processor_type": "CLIPImageProcessor"}, "the image processor gives no tiles, family 'idefics3' needs them"),
    ],
)  # fmt: skip
def test_settings_that_make_no_tiles(changes, message, copy_of):
    folder = copy_of("idefics3-markers")
    edit_json(folder / "preprocessor_config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_tiles_that_do_not_fit_the_tower(copy_of):
    folder = copy_of("idefics3-markers")
    edit_json(folder / "preprocessor_config.json", max_image_size={"longest_edge": 24})
    model, processor = load(folder)
    with pytest.raises(ImageError, match="takes 16x16 pixels, the image processor gives 24x24"):
        model(processor([SHAPES]))


def test_a_ribbon_that_would_take_gigabytes(copy_of):
    folder = copy_of("idefics3-markers")
    edit_json(folder / "preprocessor_config.json", do_resize=False)
    _, processor = load(folder)
    assert processor([Image.new("RGB", (33, 20)), "x"]).images[0].rows == 7
    with pytest.raises(ImageError, match=r"an image of 30000000x1 pixels becomes one of 30000000x16: crop it first"):
        processor([Image.new("RGB", (30_000_000, 1))])


def test_typed_image_tokens_are_no_images():
    _, processor = load(MARKERS)
    assert not processor("What is <image>?").slots.any()
