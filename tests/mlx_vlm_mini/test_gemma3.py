"""Gemma 3: sparse configs, images that see themselves inside windows, pieces of a prompt, pan and scan, its prompt."""

import json
from dataclasses import replace
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import PHOTO, SHAPES, check_fields, edit_json, in_layout, make_wide, write_names
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from published import CONFIGS, published
from reference import GOLDEN

from mlx_vlm_mini import Chat, generate, load
from mlx_vlm_mini.checkpoints.describe import describe
from mlx_vlm_mini.checkpoints.load import plan
from mlx_vlm_mini.cli.main import main
from mlx_vlm_mini.config import PoolConfig, ScaleConfig
from mlx_vlm_mini.convert import convert
from mlx_vlm_mini.decoder.masks import Blocks, ImageBlock, Rows, block_mask, causal_mask, find_blocks
from mlx_vlm_mini.errors import CheckpointError, PromptError
from mlx_vlm_mini.families import gemma3
from mlx_vlm_mini.generation.cache import make_state
from mlx_vlm_mini.generation.decode import prefill
from mlx_vlm_mini.model import VLM
from mlx_vlm_mini.preprocessing.crops import Crops, crop_boxes, crop_frames, cut_crops
from mlx_vlm_mini.preprocessing.settings import image_settings
from mlx_vlm_mini.text.template import ChatTemplate

HUB, CROPS = GOLDEN / "gemma3-hub", GOLDEN / "gemma3-crops"
PAN = Crops(min_size=256, min_ratio=1.2, max_crops=4)


def test_an_empty_config_is_transformers_own():
    """The class defaults of transformers 5.23, as its Gemma3Config gives them."""
    config = gemma3.config({"model_type": "gemma3", "mm_tokens_per_image": 49})
    decoder = config.decoder
    check_fields(config, {
        "vision.hidden_size": 768, "vision.patch_size": 16, "vision.layer_norm_eps": 1e-6, "vision.post_norm": True,
        "vision.hidden_act": "gelu_pytorch_tanh", "projector.norm_eps": 1e-6, "image_token_id": 262144,
        "projector.pool": PoolConfig(factor=2, norm_offset=1.0), "tokens_of_row": 49,
        "decoder.hidden_size": 2304, "decoder.intermediate_size": 9216, "decoder.num_hidden_layers": 26,
        "decoder.num_attention_heads": 8, "decoder.num_key_value_heads": 4, "decoder.head_dim": 256,
        "decoder.vocab_size": 262208, "decoder.max_position_embeddings": 131072, "decoder.sliding_window": 4096,
        "decoder.hidden_act": "gelu_pytorch_tanh", "decoder.tie_word_embeddings": True, "decoder.two_way": "images",
        "decoder.rope_theta": 1e6, "decoder.window.sliding_rope_theta": 1e4, "decoder.rope_scaling": None,
        "decoder.norms.rms_norm_eps": 1e-6, "decoder.norms.rms_norm_offset": 1.0,
    })  # fmt: skip
    assert decoder.norms.sandwich and decoder.norms.qk_norm
    assert decoder.layer_types == (*[*["sliding_attention"] * 5, "full_attention"] * 4, *["sliding_attention"] * 2)
    assert decoder.scales == ScaleConfig(embed_scale=48.0, query_pre_attn_scalar=256, fits_float16=False)


def test_positions_in_old_configs_and_in_new_ones():
    linear = {"rope_type": "linear", "factor": 8.0}
    for text in (
        {"rope_scaling": linear, "rope_theta": 5e5, "rope_local_base_freq": 5e3},
        {"rope_parameters": {
            "full_attention": {**linear, "rope_theta": 5e5}, "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
        }},
    ):  # fmt: skip
        decoder = gemma3.text_config(text)
        assert (decoder.rope_theta, decoder.rope_scaling, decoder.window.sliding_rope_theta) == (5e5, linear, 5e3)
    half = gemma3.text_config({"rope_parameters": {"full_attention": {"rope_type": "default"}}})
    assert (half.rope_theta, half.window.sliding_rope_theta) == (1e6, 1e4)


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        ({}, "14 x 14 patches cannot become 256 image tokens by averaging"),
        ({"mm_tokens_per_image": 50}, "14 x 14 patches cannot become 50 image tokens by averaging"),
        ({"text_config": {"use_bidirectional_attention": True}}, "use_bidirectional_attention reads and does not write"),
        ({"text_config": {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}}},
         "rope type 'linear' of sliding layers is not supported"),
        ({"text_config": {"sliding_window": None}}, "sliding_window must be a whole number"),
        ({"text_config": {"rope_local_base_freq": 0}}, "sliding_rope_theta must be a positive number"),
        ({"text_config": {"model_type": "gemma2"}}, "decoder 'gemma2' is not supported .known: gemma3_text"),
    ],
)  # fmt: skip
def test_configs_that_make_no_model(hf, message):
    with pytest.raises(CheckpointError, match=message):
        gemma3.config(hf)


@pytest.mark.parametrize(("size", "weights"), [("4b", 4.30e9), ("12b", 12.19e9), ("27b", 27.43e9)])
def test_published_models(size, weights):
    """256 tokens an image, and the weights that their cards give, embeddings once."""
    name = f"google/gemma-3-{size}-it"
    checkpoint, config = published(name), gemma3.config(CONFIGS[name])
    assert (config.tokens_of_row, config.projector.joined.factor) == (256, 4)
    assert sum(map(checkpoint.num_weights, plan(checkpoint).ours.values())) == pytest.approx(weights, rel=0.01)
    assert config.decoder.rope_scaling == {"rope_type": "linear", "factor": 8.0}
    assert config.decoder.layer_types.count("full_attention") == {"4b": 5, "12b": 8, "27b": 10}[size]


@pytest.mark.parametrize(
    ("text", "vision", "projector"),
    [
        ("language_model.model.", "vision_tower.vision_model.", "multi_modal_projector."),
        ("model.language_model.", "model.vision_tower.vision_model.", "model.multi_modal_projector."),
        ("model.language_model.", "model.vision_tower.", "model.multi_modal_projector."),
        ("language_model.model.", "vision_tower.", "multi_modal_projector."),
    ],
    ids=["L1", "L2", "L2b", "L3"],
)
def test_every_layout_is_read(text, vision, projector, copy_of):
    folder = copy_of("gemma3-hub")
    write_names(folder, gemma3, partial(in_layout, text=text, vision=vision, projector=projector))
    expected, processor = load(HUB)
    inputs = processor(["What?", PHOTO])
    assert (load(folder)[0](inputs) == expected(inputs)).all()


def picture(mask):
    return ["".join("x" if seen else "." for seen in row) for row in np.array(mask)]


def test_a_block_sees_itself_inside_the_window():
    """As the docstring draws it; without a window; and for tokens behind cached ones."""
    blocks = [ImageBlock(1, 4)]
    assert picture(block_mask(Rows(0, 5), 3, blocks)) == ["x....", "xxxx.", "xxxx.", ".xxx.", "..xxx"]
    assert picture(block_mask(Rows(0, 5), None, blocks)) == ["x....", "xxxx.", "xxxx.", "xxxx.", "xxxxx"]
    assert picture(block_mask(Rows(1, 4), 2, blocks)) == ["xxxx.", ".xxx.", "..xx.", "...xx"]
    two = [ImageBlock(0, 2), ImageBlock(3, 5)]
    assert picture(block_mask(Rows(0, 5), None, two)) == ["xx...", "xx...", "xxx..", "xxxxx", "xxxxx"]


masks = st.lists(st.booleans(), min_size=1, max_size=30).map(np.array)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(slots=masks, step=st.integers(1, 12), held=st.integers(0, 30))
def test_a_prompt_is_cut_between_blocks(slots, step, held):
    """Pieces in order, none empty, none in the middle of a block, none too long without need."""
    total = len(slots)
    blocks = find_blocks(slots)
    assert [slot for block in blocks for slot in range(block.start, block.end)] == np.flatnonzero(slots).tolist()
    done = held = min(held, total - 1)
    if any(block.start < held < block.end for block in blocks):
        return
    while done < total:
        end = Blocks(tuple(find_blocks(slots, held))).cut(done, step, total)
        assert done < end <= total and not any(block.start < end < block.end for block in blocks)
        assert end - done <= step or any(block == (done, end) for block in blocks)
        done = end


def test_a_piece_may_end_where_a_block_does():
    assert [Blocks((ImageBlock(2, 4),)).cut(0, step, 10) for step in (1, 2, 3, 4, 5)] == [1, 2, 2, 4, 5]
    assert Blocks((ImageBlock(2, 4), ImageBlock(4, 9))).cut(2, 1, 10) == 4


@pytest.mark.parametrize("golden", [HUB, CROPS], ids=["hub", "crops"])
def test_pieces_of_every_length_give_one_answer(golden):
    model, processor = load(golden)
    inputs = processor(["See ", PHOTO, " and ", SHAPES, "?"])
    reading = model.read(inputs)
    whole = np.array(prefill(model.decoder, reading, model.make_state(), step=10**6))
    for step in (1, 2, 7, 20, 50):
        pieces = np.array(prefill(model.decoder, reading, model.make_state(), step=step))
        np.testing.assert_allclose(pieces, whole, atol=1e-5)


def test_without_images_all_is_causal():
    model, processor = load(HUB)
    inputs = processor("Hi")
    reading = model.read(inputs)
    assert reading.visible == Blocks(())
    assert str(model.decoder.begin(reading).masks["full_attention"]) == str(causal_mask(Rows(0, 4))) == "causal"


CHANGES = {
    "two_way": lambda decoder: {"two_way": "nothing"},
    "sliding_rope_theta": lambda decoder: {"window": replace(decoder.window, sliding_rope_theta=1e6)},
    "rope_scaling": lambda decoder: {"rope_scaling": None},
    "sliding_window": lambda decoder: {"window": replace(decoder.window, sliding_window=8)},
    "layer_types": lambda decoder: {"layer_types": (*decoder.layer_types[1:], decoder.layer_types[0])},
    "query_pre_attn_scalar": lambda decoder: {"scales": replace(decoder.scales, query_pre_attn_scalar=None)},
    "embed_scale": lambda decoder: {"scales": replace(decoder.scales, embed_scale=1.0)},
    "rms_norm_offset": lambda decoder: {"norms": replace(decoder.norms, rms_norm_offset=0.9)},
}


@pytest.mark.parametrize("field", sorted(CHANGES))
def test_the_golden_would_notice(field):
    """Each of Gemma 3's facts moves the prompt's log-probabilities far beyond the tolerance of parity."""
    model, processor = load(HUB)
    inputs, config = processor(["What is ", PHOTO, " and ", SHAPES, "?"]), model.config.decoder

    def logprobs(vlm):
        logits = vlm(inputs)
        return logits - mx.logsumexp(logits, axis=-1, keepdims=True)

    other = VLM(replace(model.config, decoder=replace(config, **CHANGES[field](config))))
    other.update(model.parameters())
    assert mx.abs(logprobs(other) - logprobs(model)).max() > 0.01


@pytest.mark.parametrize("change", ["norm_eps", "norm_offset", "transposed"])
def test_the_golden_would_notice_another_projector(change):
    model, processor = load(HUB)
    pixels = processor(["x", PHOTO]).pixel_values
    before = model.embed_images(pixels)
    if change == "transposed":
        side = min(model.projector.projection.shape)
        model.projector.projection[:side, :side] = model.projector.projection[:side, :side].T
    elif change == "norm_eps":
        model.projector.norm.eps = 1e-2
    else:
        model.projector.norm.offset = 0.9
    assert mx.abs(model.embed_images(pixels) - before).max() > 1e-3


def test_averages_by_hand():
    """Of 6 x 6 features in squares of 2 x 2: the norm's input, whose weight and matrix are made neutral."""
    model, _ = load(HUB)
    projector = model.projector
    projector.norm.weight = mx.zeros_like(projector.norm.weight)
    width = projector.projection.shape[0]
    projector.projection = mx.eye(width)
    features = mx.random.normal((1, 36, width), key=mx.random.key(1))
    grid = np.array(features).reshape(3, 2, 3, 2, width).mean(axis=(1, 3)).reshape(9, width)
    expected = grid / np.sqrt((grid**2).mean(axis=-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(np.array(projector(features))[0], expected, atol=1e-5)


def test_a_later_turn_reads_only_what_is_new():
    """The image's slots stay in the cache, and its picture is encoded once."""
    model, processor = load(HUB)
    chat = Chat(model, processor, max_tokens=3, context=1000)
    first = list(chat.send(["See ", PHOTO, " well"]))[-1].stats
    second = list(chat.send("Why?"))[-1].stats
    assert second.cached_tokens >= first.prompt_tokens and second.encoded_images == 0
    third = list(chat.edit(["And ", SHAPES]))[-1].stats
    assert third.cached_tokens > first.prompt_tokens and third.encoded_images == 1


def prompt_of(processor, prompt):
    ids = np.array(processor(prompt).input_ids[0]).tolist()
    return processor.tokenizer.decode(ids, skip_special_tokens=False)


def test_the_prompt_with_and_without_crops():
    _, processor = load(CROPS)
    shown = "\n\n<start_of_image>" + "<image_soft_token>" * 4 + "<end_of_image>\n\n"
    crops = f"Here is the original image {shown} and here are some crops to help you see better {shown} {shown}"
    assert prompt_of(processor, [PHOTO, "What? "]) == (
        f"<bos><start_of_turn>user\n{crops}What?<end_of_turn>\n<start_of_turn>model\n"
    )
    _, processor = load(CROPS, max_tiles=1)
    assert prompt_of(processor, ["See ", PHOTO]) == (
        f"<bos><start_of_turn>user\nSee{shown}<end_of_turn>\n<start_of_turn>model\n"
    )


def test_typed_image_tokens_hold_no_place():
    model, processor = load(HUB)
    inputs = processor(["A <image_soft_token>", PHOTO])
    assert inputs.slots.sum() == 9 and (np.array(inputs.input_ids[0]) == processor.image_token_id).sum() == 9
    assert len(model.read(inputs).visible.blocks) == 1
    assert not processor("What is <start_of_image>?").slots.any()


def test_a_folder_without_a_chat_template_gets_the_familys():
    source = json.loads((HUB / "chat_template.json").read_text())["chat_template"]
    own, given = (
        ChatTemplate(text, {"bos_token": "<bos>"}, "<start_of_image>") for text in (gemma3.CHAT_TEMPLATE, source)
    )
    image, word = {"type": "image", "image": PHOTO}, {"type": "text", "text": " Hi\n"}
    said = {"role": "assistant", "content": [word]}
    for parts in ([image, word], [word, image], [word], [image, image]):
        asked = {"role": "user", "content": parts}
        for messages in ([asked], [{"role": "system", "content": [word]}, asked, said, asked]):
            assert own.render(messages) == given.render(messages)
    with pytest.raises(PromptError, match="must take turns"):
        own.render([said])


@pytest.mark.parametrize(
    ("size", "boxes"),
    [
        ((600, 700), []),  # 1.17 : 1
        ((600, 720), [(0, 0, 360, 600), (360, 0, 720, 600)]),  # 1.2 : 1, and at least two
        ((600, 1500), [(0, 0, 500, 600), (500, 0, 1000, 600), (1000, 0, 1500, 600)]),  # 2.5 rounds up
        ((600, 1320), [(0, 0, 660, 600), (660, 0, 1320, 600)]),  # 2.2 rounds down
        ((501, 300), []),  # 251 pixels a crop
        ((513, 300), [(0, 0, 300, 257), (0, 257, 300, 513)]),
        ((200, 900), []),
        ((256, 9000), [(0, 0, 2250, 256), (2250, 0, 4500, 256), (4500, 0, 6750, 256), (6750, 0, 9000, 256)]),
    ],
)  # fmt: skip
def test_crops_by_hand(size, boxes):
    assert crop_boxes(size, PAN) == boxes
    assert crop_boxes(size, replace(PAN, max_crops=1)) == []


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 200), st.integers(1, 200), st.integers(2, 6), st.integers(1, 40))
def test_crops_cover_the_image_once(height, width, most, smallest):
    crops = Crops(min_size=smallest, min_ratio=1.2, max_crops=most)
    whole, *cut = cut_crops(Image.new("RGB", (width, height)), crops)
    assert whole.size == (width, height) and len(cut) <= most and len(cut) != 1
    if cut:
        assert sum(piece.width * piece.height for piece in cut) == width * height
    frames = crop_frames((height, width), crops)
    assert [size for _, size in frames] == [piece.size[::-1] for piece in (whole, *cut)]


def test_limits_in_commands():
    """`--max-tiles` turns pan and scan on and off."""

    def answer(folder, *options):
        arguments = [
            "generate",
            str(folder),
            "-p",
            "Hi",
            "-i",
            str(GOLDEN / "strip.png"),
            "--json",
            "--max-tokens",
            "1",
        ]
        result = CliRunner().invoke(main, [*arguments, *options])
        return json.loads(result.stdout)["image_tokens"] if result.exit_code == 0 else (result.exit_code, result.stderr)

    assert (answer(CROPS), answer(CROPS, "--max-tiles", "2"), answer(CROPS, "--max-tiles", "1")) == (16, 12, 4)
    assert answer(HUB, "--max-tiles", "4") == 9  # too small a picture for crops of 256 pixels
    assert answer(HUB, "--min-tiles", "2") == (
        1, "Error: family 'gemma3' has no least number of tiles: leave --min-tiles (min_tiles) out\n"
    )  # fmt: skip
    settings = image_settings({}, "Gemma3")
    assert settings.tiling == replace(PAN, max_crops=1)
    assert image_settings({"do_pan_and_scan": True}, "Gemma3").tiling == PAN


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pan_and_scan_max_num_crops": 0, "do_pan_and_scan": True}, "a whole number of crops, 1 to 1000, not 0"),
        ({"pan_and_scan_min_crop_size": 0}, "positive numbers as pan_and_scan_min_crop_size"),
        ({"pan_and_scan_min_ratio_to_activate": 0}, "positive numbers as pan_and_scan_min_crop_size"),
        ({"pan_and_scan_min_ratio_to_activate": "x"}, "pan_and_scan_min_ratio_to_activate must be a number"),
        ({"image_processor_type": "SiglipImageProcessor"}, "the image processor gives no tiles, family 'gemma3' needs"),
    ],
)
def test_settings_that_make_no_sense(changes, message, copy_of):
    folder = copy_of("gemma3-hub")
    edit_json(folder / "preprocessor_config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_what_it_cannot_do_is_refused():
    model, _ = load(HUB)
    with pytest.raises(PromptError, match="has layers with a window of their own, which no rotating cache fits"):
        make_state(model, rotate=40)
    with pytest.raises(CheckpointError, match="float16 cannot hold what this model's decoder computes"):
        load(HUB, dtype="float16")


def test_half_precision_computes(tmp_path):
    convert(CROPS, tmp_path / "half", dtype="bfloat16")
    model, processor = load(tmp_path / "half", dtype="bfloat16")
    assert model(processor(["What?", PHOTO])).dtype == mx.bfloat16
    assert isinstance(generate(model, processor, "What?", images=[PHOTO], max_tokens=3), str)


WIDE = {
    "gemma3-hub": {
        "text_config": {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16},
        "vision_config": {"hidden_size": 80, "intermediate_size": 96},
    },
    "idefics3-markers": {
        "text_config": {"hidden_size": 96, "intermediate_size": 128, "head_dim": 16},
        "vision_config": {"hidden_size": 96, "intermediate_size": 64},
    },
}


@pytest.mark.parametrize("name", sorted(WIDE))
def test_quantized_and_checked(name, tmp_path):
    """Every part in 8 bits: close to the source in every distribution; its folder is read again."""
    source = make_wide(name, tmp_path / "source", WIDE[name])
    parts = {"vision": 8, "projector": 8}
    result = convert(source, tmp_path / "out", bits=8, group_size=32, part_bits=parts, check=True)
    assert result.check is not None and not result.check.problems and result.check.mean_kl < 0.05
    one, other = load(source), load(tmp_path / "out")
    inputs = one[1](["What?", PHOTO])
    assert mx.abs(mx.softmax(one[0](inputs)) - mx.softmax(other[0](inputs))).max() < 0.1
    assert describe(tmp_path / "out", check=True)["check"] == "every tensor has its place, name and shape"


def test_it_is_described():
    vision = describe(HUB, check=True)["vision"]
    assert vision["image_tokens"] == 9
