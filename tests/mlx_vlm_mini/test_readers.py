"""The document readers: PaddleOCR-VL, GLM-OCR, GLM-4V, Granite-Docling 500M: sizes, layouts, templates, configs, quantization; parity is test_parity.py's, turns
are test_conversations.py's."""

import json
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import PHOTO, check_fields, edit_json, with_paths
from PIL import Image
from quantized import check_eight_bits, make_wide_with
from reference import CASES, GOLDEN

from mlx_vlm_mini import load
from mlx_vlm_mini.checkpoints.describe import describe
from mlx_vlm_mini.checkpoints.folder import open_checkpoint
from mlx_vlm_mini.checkpoints.load import plan
from mlx_vlm_mini.errors import CheckpointError, ImageError
from mlx_vlm_mini.families import find_family, glm4v, glm_ocr, granite_docling, paddleocr_vl
from mlx_vlm_mini.preprocessing.grid import FramesGrid, Grid, RaisedGrid
from mlx_vlm_mini.preprocessing.settings import image_settings
from mlx_vlm_mini.preprocessing.tiles import PageTiles, choose_grid
from mlx_vlm_mini.vision.positions import RESIZES, resize

NAMES = {"paddleocr-vl": paddleocr_vl, "glm-ocr": glm_ocr, "glm4v": glm4v, "granite-docling-500m": granite_docling}

Tensors = dict[str, mx.array]


def last(model, processor, case):
    """Log-probabilities after a prompt's last token."""
    logits = model(processor(with_paths(CASES[case])))[0, -1]
    return np.array(logits - mx.logsumexp(logits))


def check_answer(folder, name, case="two_images"):
    """Whether a folder answers as the golden of this name does."""
    with np.load(GOLDEN / name / "expected.npz") as expected:
        np.testing.assert_allclose(last(*load(folder), case), expected[f"{case}/logprobs"][0], atol=1e-4)


# layouts


def fuse(tensors: Tensors, parts: tuple[str, ...], whole: str) -> Tensors:
    """Tensors whose names have one of these parts, joined by rows under one name."""
    found = {}
    for name, array in tensors.items():
        if parts[0] in name:
            array = mx.concatenate([tensors[name.replace(parts[0], part)] for part in parts])
            name = name.replace(parts[0], whole)
        if not any(part in name for part in parts[1:]):
            found[name] = array
    return found


def replaced(tensors: Tensors, *pairs: tuple[str, str]) -> Tensors:
    """Tensors whose names begin otherwise: the first pair counts that fits."""
    found = {}
    for name, array in tensors.items():
        begin, ours = next((pair for pair in pairs if name.startswith(pair[0])), ("", ""))
        found[ours + name.removeprefix(begin)] = array
    return found


def paddle_memory(tensors: Tensors) -> Tensors:
    read = {name: array for name, array in tensors.items() if "packing" not in name and ".head." not in name}
    return replaced(
        read, ("visual.", "model.visual."), ("mlp_AR.", "model.projector."), ("model.", "model.language_model.")
    )


def paddle_mlx(tensors: Tensors) -> Tensors:
    read = {name: array for name, array in tensors.items() if "packing" not in name and ".head." not in name}
    found = replaced(
        read, ("visual.vision_model.encoder.", "visual."), ("visual.vision_model.", "visual."),
        ("mlp_AR.", "visual.projector."), ("model.", "language_model.model."), ("lm_head.", "language_model.lm_head."),
    )  # fmt: skip
    tower = {name: array for name, array in found.items() if name.startswith("visual.")}
    others = {name: array for name, array in found.items() if name not in tower}
    tower = fuse(tower, tuple(f"self_attn.{each}_proj." for each in "qkv"), "self_attn.qkv.")
    kernel = "visual.embeddings.patch_embedding.weight"
    return others | tower | {kernel: mx.contiguous(tower[kernel].transpose(0, 2, 3, 1))}


def glm_mlx(tensors: Tensors) -> Tensors:
    """Without the layer that drafts; both convolutions channel-last."""
    read = {name: array for name, array in tensors.items() if ".layers.2." not in name}
    found = replaced(
        read, ("model.visual.", "vision_tower."), ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
    )  # fmt: skip
    return {name: mx.contiguous(mx.moveaxis(a, 1, -1)) if a.ndim > 2 else a for name, a in found.items()}


LAYOUTS: list[tuple[str, Callable[[Tensors], Tensors], bool]] = [
    ("paddleocr-vl", paddle_memory, False),
    ("paddleocr-vl", paddle_mlx, True),
    ("glm-ocr", glm_mlx, True),
    ("glm4v", glm_mlx, True),
]


@pytest.mark.parametrize(("name", "layout", "mlx"), LAYOUTS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_tensors_go_by_many_names(name, layout, mlx, copy_of):
    folder = copy_of(name)
    tensors = {}
    for file in folder.glob("model*.safetensors"):
        tensors |= mx.load(str(file))
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), layout(tensors), {"format": "mlx" if mlx else "pt"})
    assert plan(open_checkpoint(folder)).unused == ()
    check_answer(folder, name)


UNREAD = {  # of another way to resize and a head; of a layer that drafts; of what guesses a page's way
    "paddleocr-vl": 3, "glm-ocr": 16, "granite-docling-500m": 8,
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_what_no_model_reads_is_dropped(name):
    planned = plan(open_checkpoint(GOLDEN / name))
    assert len(planned.unused) == UNREAD.get(name, 0)
    assert find_family(planned.checkpoint.config) is NAMES[name] is planned.family


# prompts


@pytest.mark.parametrize("name", NAMES)
def test_the_familys_own_template_writes_the_goldens_prompts(name, copy_of):
    folder = copy_of(name)
    for file in ("chat_template.jinja", "chat_template.json"):
        (folder / file).unlink(missing_ok=True)
    own, theirs = load(folder)[1], load(GOLDEN / name)[1]
    assert own.chat_template.source == NAMES[name].CHAT_TEMPLATE
    for case in ("side_by_side", "two_turns", "text"):
        messages = with_paths(CASES[case])
        assert own(messages).input_ids.tolist() == theirs(messages).input_ids.tolist()


def test_glms_turns():
    _, processor = load(GOLDEN / "glm-ocr")
    messages = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "image", "image": str(PHOTO)}, {"type": "text", "text": "Text Recognition:"}],
        },
    ]
    ids = processor(messages).input_ids[0].tolist()
    text = processor.tokenizer.decode(ids, skip_special_tokens=False).replace("<|image|>", "*")
    assert text == (
        "[gMASK]<sop><|system|>\nBe brief.<|user|>\n<|begin_of_image|>" + "*" * 24 + "<|end_of_image|>"
        "Text Recognition:<|assistant|>\n"
    )
    assert processor.eos_token_ids == {processor.tokenizer.token_to_id("<|user|>")}


def test_pictures_come_before_words():
    _, processor = load(GOLDEN / "paddleocr-vl")
    ids = processor([PHOTO, "OCR:"]).input_ids[0].tolist()
    text = processor.tokenizer.decode(ids, skip_special_tokens=False).replace("<|IMAGE_PLACEHOLDER|>", "*")
    assert text == "<|begin_of_sentence|>User: <|IMAGE_START|>" + "*" * 24 + "<|IMAGE_END|>OCR:\nAssistant: "
    assert processor(["OCR:", PHOTO]).input_ids[0].tolist() == ids
    assert processor.tokenizer.token_to_id("</s>") in processor.eos_token_ids


def test_granites_pages():
    """Markers of each tile by row and column; four times the tokens by the fine way."""
    text = {}
    for name in ("granite-docling-500m", "granite-docling-fine"):
        _, processor = load(GOLDEN / name)
        ids = processor([PHOTO, "Convert."]).input_ids[0].tolist()
        text[name] = processor.tokenizer.decode(ids, skip_special_tokens=False).replace("<image>", "*")
        assert processor.eos_token_ids == {processor.tokenizer.token_to_id("<|end_of_text|>")}
    around, tile = "<fake_token_around_image>", "*" * 4
    assert text["granite-docling-500m"] == (
        "<|start_of_role|>user<|end_of_role|>"
        + "".join(f"{around}<row_{r}_col_1>{tile}{around}<row_{r}_col_2>{tile}\n" for r in (1, 2, 3))
        + f"\n{around}<global-img>{tile}{around}Convert.<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>"
    )
    assert text["granite-docling-fine"] == text["granite-docling-500m"].replace(tile, 4 * tile)


def test_a_page_of_one_tile_has_no_second_view(tmp_path):
    Image.new("RGB", (30, 31)).save(tmp_path / "small.png")
    _, processor = load(GOLDEN / "granite-docling-500m", max_tiles=1)
    ids = processor([tmp_path / "small.png"]).input_ids[0].tolist()
    text = processor.tokenizer.decode(ids, skip_special_tokens=False)
    assert "<fake_token_around_image><row_1_col_1>" + "<image>" * 4 + "\n<|end_of_text|>" in text


def test_a_way_that_the_model_has_not(copy_of):
    folder = copy_of("granite-docling-500m")
    file = folder / "processor_config.json"
    edit_json(file, image_processor={**json.loads(file.read_text())["image_processor"], "fine_route": True})
    model, processor = load(folder)
    model(processor([PHOTO, "Hi"]))  # both ways are there
    config = json.loads((folder / "config.json").read_text())
    edit_json(folder / "config.json", vision_config={**config["vision_config"], "use_fine_route": False})
    tensors = mx.load(str(folder / "model.safetensors"))
    kept = {name: array for name, array in tensors.items() if ".connector.fine." not in name}
    mx.save_safetensors(str(folder / "model.safetensors"), kept, {"format": "pt"})
    model, processor = load(folder)
    with pytest.raises(CheckpointError, match="16 tokens, config.json 4$"):
        model(processor([PHOTO, "Hi"]))


@pytest.mark.parametrize(
    ("size", "budget", "grid"),
    [
        ((2339, 1654), 12, (3, 2)), ((1654, 2339), 12, (3, 4)), ((3000, 4700), 12, (2, 3)), ((3000, 6100), 24, (3, 6)),
        ((400, 900), 12, (1, 2)), ((200, 9000), 12, (1, 12)),
    ],
)  # fmt: skip
def test_wide_pages_get_more_tiles(size, budget, grid):
    """Only those wider than twice their height, up to eight times, whose width the grid makes less than half."""
    tiles = PageTiles(
        tile_size=512, min_tiles=1, max_tiles=12, thumbnail=True, fine=False, dense_tiles=24, dense_scale=0.5,
        dense_aspects=(2, 8),
    )  # fmt: skip
    assert (tiles.budget(size), choose_grid(size, tiles)) == (budget, grid)


# sizes


@pytest.mark.parametrize(
    ("size", "fitted", "unraised"),
    [
        ((1000, 700), (1008, 700), (1008, 700)), ((3508, 2480), (1988, 1400), (1988, 1400)),
        ((28, 28), (392, 392), (392, 392)), ((17, 87), (196, 868), (196, 896)), ((7, 1351), (28, 5404), (28, 5348)),
        ((20, 1716), (56, 3556), (56, 3584)),
    ],
)  # fmt: skip
def test_a_short_side_becomes_a_tokens(size, fitted, unraised):
    """17 x 87 is 28 x 143 before the least number of pixels is asked for."""
    limits = {"patch_size": 14, "merge": 2, "min_pixels": 147384, "max_pixels": 2822400}
    assert RaisedGrid(**limits).fit(size) == fitted and Grid(**limits).fit(size) == unraised


def test_an_image_that_stays_too_narrow():
    grid = RaisedGrid(patch_size=14, merge=2, min_pixels=147384, max_pixels=2822400)
    with pytest.raises(ImageError, match="too long and narrow"):
        grid.fit((1, 300))


@pytest.mark.parametrize(
    ("size", "fitted"),
    [
        ((1000, 700), (1008, 700)), ((3508, 2480), (2604, 1820)), ((4000, 3000), (2520, 1876)), ((28, 28), (84, 84)),
        ((10, 100), (28, 280)), ((3, 400), (28, 3724)), ((27, 28), (84, 84)),
    ],
)  # fmt: skip
def test_both_frames_of_a_picture_count(size, fitted):
    """9633792 pixels of two frames are 4816896 of a picture: 12 MP are 2520 x 1876."""
    grid = FramesGrid(patch_size=14, merge=2, min_pixels=12544, max_pixels=9633792, frames=2, step=2)
    assert grid.fit(size) == fitted and grid.max_tokens == 6144


def test_limits_of_a_picture_are_given_by_its_own_pixels():
    _, processor = load(GOLDEN / "glm4v", max_pixels=2000, min_pixels=1000)
    (image,) = processor([PHOTO, "Hi"]).images
    assert processor.image_settings.tiling.max_pixels == 4000
    height, width = image.pixel_values.shape[1:3]
    assert 1000 < height * width <= 2000


def test_class_defaults_of_image_settings():
    for name in ("Glm4vImageProcessor", "Glm46VImageProcessor"):
        grid = image_settings({"image_processor_type": name}, "Glm4v").tiling
        frames = {"frames": 2, "step": 2}
        assert grid == FramesGrid(patch_size=14, merge=2, min_pixels=12544, max_pixels=28**2 * 15000, **frames)
    tiles = image_settings({"image_processor_type": "GraniteDoclingImageProcessor"}, "GraniteDocling").tiling
    assert tiles == PageTiles(
        tile_size=512, min_tiles=1, max_tiles=32, thumbnail=True, fine=False, dense_tiles=0, dense_scale=0.0,
        dense_aspects=(0.0, 0.0),
    )  # fmt: skip
    assert choose_grid((100, 3200), tiles) == (1, 16)
    grid = image_settings({"image_processor_type": "PaddleOCRVLImageProcessor"}, "PaddleOCRVL").tiling
    assert grid == RaisedGrid(patch_size=14, merge=2, min_pixels=384**2, max_pixels=1536**2)


# positions


@pytest.mark.parametrize("kind", RESIZES)
@pytest.mark.parametrize(("side", "count"), [(5, 5), (5, 12), (12, 5), (3, 1), (1, 4), (27, 142)])
def test_resizing_keeps_what_is_flat(kind, side, count):
    """Weights of each new position add up to 1, and lie around it; as many as there were stay."""
    weights = RESIZES[kind](side, count)
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    if kind != "floor" and (count > 1 or kind != "corners"):
        np.testing.assert_allclose(weights, weights[::-1, ::-1], atol=1e-12)
    if side == count:
        np.testing.assert_allclose(weights, np.eye(side), atol=1e-12)


def test_resizing_by_hand():
    """Two positions to four: centres at -0.25, 0.25, 0.75, 1.25, or from corner to corner."""
    np.testing.assert_allclose(RESIZES["linear"](2, 4)[:, 1], [0, 0.25, 0.75, 1])
    np.testing.assert_allclose(RESIZES["antialiased"](2, 4)[:, 1], [0, 0.25, 0.75, 1])
    np.testing.assert_allclose(RESIZES["corners"](2, 4)[:, 1], [0, 1 / 3, 2 / 3, 1])
    np.testing.assert_allclose(RESIZES["linear"](4, 2)[0], [0.5, 0.5, 0, 0])
    np.testing.assert_allclose(RESIZES["antialiased"](4, 2)[0], np.array([3, 3, 1, 0]) / 7)
    np.testing.assert_allclose(RESIZES["cubic"](4, 2)[0], [0.5 - 0.09375, 0.5 + 0.09375, -0.09375, 0], atol=0.1)
    found = resize(mx.array([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0], [4.0, 40.0]]), 1, 4, "linear")
    np.testing.assert_allclose(np.array(found)[:, 0], [2, 2.25, 2.75, 3])


@pytest.mark.parametrize("kind", [kind for kind in RESIZES if kind != "linear"])
def test_another_way_to_resize_changes_the_answer(kind):
    model, processor = load(GOLDEN / "paddleocr-vl")
    right = last(model, processor, "strip")
    object.__setattr__(model.vision.grid, "position_resize", kind)
    assert np.abs(last(model, processor, "strip") - right).max() > 1e-3


# configs


def test_what_paddles_configs_leave_out():
    """The class defaults of transformers 5.23, flat and nested."""
    fields = {
        "vision.hidden_size": 1152, "vision.num_hidden_layers": 27, "vision.num_attention_heads": 16, "vision.patch_size": 14,
        "vision.image_size": 28, "vision.post_norm": True, "vision.layer_norm_eps": 1e-6, "vision.patch_bias": True,
        "vision.grid.position_side": 27, "vision.grid.position_resize": "linear", "vision.grid.frames": None,
        "projector.input_size": 4608, "projector.norm_eps": 1e-5, "decoder.hidden_size": 1024,
        "decoder.num_hidden_layers": 18, "decoder.head_dim": 128, "decoder.num_key_value_heads": 2,
        "decoder.rope_theta": 5e5, "decoder.tie_word_embeddings": True, "decoder.biases.qkv_bias": False,
        "image_token_id": 100295, "family": "paddleocr_vl",
    }  # fmt: skip
    for hf in ({}, {"text_config": {"vocab_size": 103424}, "vision_config": {}}):
        config = paddleocr_vl.config({"model_type": "paddleocr_vl", **hf})
        check_fields(config, fields)
        assert config.decoder.rope_scaling["mrope_section"] == (16, 24, 24)
    biased = paddleocr_vl.config({"use_bias": True}).decoder.biases
    assert biased.qkv_bias and biased.o_bias and biased.mlp_bias


def test_what_glms_configs_leave_out():
    """The class defaults of transformers 5.23; the Hub's configs say more (`tests/support/published.py`)."""
    fields = {
        "vision.num_hidden_layers": 24, "vision.patch_size": 14, "vision.image_size": 28, "vision.post_norm": True,
        "vision.layer_norm_eps": 1e-5, "vision.patch_bias": True, "vision.grid.frames": 2, "vision.hidden_act": "silu",
        "vision.blocks.norm_type": "rms_norm", "vision.blocks.gated_mlp": True, "projector.norm_eps": 1e-5,
        "projector.bias": False, "projector.hidden_act": "silu", "projector.merger.kind": "gated",
        "decoder.norms.sandwich": True, "decoder.norms.rms_norm_eps": 1e-5,
        "decoder.tie_word_embeddings": False, "decoder.rope_theta": 1e4, "draft_layers": 0,
    }  # fmt: skip
    rope = {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_type": "default"}}
    config = glm4v.config({"model_type": "glm4v", "text_config": rope})
    check_fields(config, {
        **fields, "vision.hidden_size": 1536, "vision.intermediate_size": 4096, "vision.pre_norm": True,
        "vision.grid.position_side": 24, "vision.grid.position_resize": "cubic", "vision.blocks.qkv_bias": False,
        "vision.blocks.o_bias": False, "vision.blocks.mlp_bias": False, "vision.blocks.qk_norm_eps": None,
        "projector.merger.inner_size": 13696, "decoder.biases.qkv_bias": True, "decoder.biases.o_bias": False,
        "decoder.hidden_size": 4096, "decoder.num_hidden_layers": 40, "image_token_id": 151343, "family": "glm4v",
    })  # fmt: skip
    assert config.decoder.shape("full_attention").rotary_dims == 64
    text = {"hidden_size": 1536, "head_dim": 128, "rope_parameters": {"mrope_section": [16, 24, 24]}}
    check_fields(glm_ocr.config({"model_type": "glm_ocr", "text_config": text}), {
        **fields, "vision.hidden_size": 1024, "vision.intermediate_size": 4096, "vision.pre_norm": False,
        "vision.grid.position_side": None, "vision.blocks.qkv_bias": True, "vision.blocks.o_bias": True,
        "vision.blocks.mlp_bias": True, "vision.blocks.qk_norm_eps": 1e-5, "vision.blocks.qk_norm_heads": True,
        "projector.merger.inner_size": 4608, "decoder.biases.qkv_bias": False, "decoder.num_hidden_layers": 16,
        "decoder.head_dim": 128, "image_token_id": 59280, "family": "glm_ocr",
    })  # fmt: skip


def test_glm46v_is_the_same_model(copy_of):
    """With rope_parameters, and types of its own."""
    folder = copy_of("glm4v")
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"]
    rope = {**text.pop("rope_scaling"), "rope_theta": text.pop("rope_theta"), "rope_type": "default"}
    text["rope_parameters"] = {**rope, "partial_rotary_factor": text.pop("partial_rotary_factor")}
    edit_json(folder / "config.json", model_type="glm46v", text_config=text)
    check_answer(folder, "glm4v")
    assert describe(folder)["family"] == "glm46v"


@pytest.mark.parametrize("name", ["glm-ocr", "glm4v"])
def test_halves_in_place_of_neighbours_change_the_answer(name):
    model, processor = load(GOLDEN / name)
    right = last(model, processor, "text")
    model.decoder.ropes["full_attention"].neighbours = False
    assert np.abs(last(model, processor, "text") - right).max() > 0.1


def test_what_granites_configs_leave_out():
    config = granite_docling.config({"model_type": "granite_docling"})
    check_fields(config, {
        "vision.hidden_size": 768, "vision.intermediate_size": 3072, "vision.num_hidden_layers": 12,
        "vision.num_attention_heads": 12, "vision.image_size": 512, "vision.patch_size": 16, "vision.post_norm": True,
        "vision.feature_layers": (12, 4, 8, 11), "vision.hidden_act": "gelu_pytorch_tanh", "vision.layer_norm_eps": 1e-6,
        "projector.input_size": 4 * 768 * 16, "projector.hidden_size": 1024, "projector.norm_eps": 1e-5,
        "projector.connector.taps": 3, "projector.connector.fine": True, "decoder.hidden_size": 1024,
        "decoder.intermediate_size": 2048, "decoder.num_hidden_layers": 28, "decoder.num_attention_heads": 16,
        "decoder.num_key_value_heads": 4, "decoder.max_position_embeddings": 32768, "decoder.vocab_size": 133800,
        "decoder.norms.rms_norm_eps": 1e-5, "decoder.tie_word_embeddings": True, "decoder.scales.embed_scale": 12.0,
        "decoder.scales.image_scale": 12.0, "decoder.scales.residual_scale": 0.263, "decoder.scales.logits_scaling": 4.0,
        "decoder.scales.query_pre_attn_scalar": 4096.0, "image_token_id": 100337, "tokens_of_row": 64,
        "family": "granite_docling",
    })  # fmt: skip


def test_granites_drafting_heads_are_dropped(copy_of):
    folder = copy_of("granite-docling-500m")
    tensors = mx.load(str(folder / "model.safetensors"))
    mx.save_safetensors(
        str(folder / "model.safetensors"), tensors | {"mtp.0.proj.weight": mx.ones((2, 2))}, {"format": "pt"}
    )
    check_answer(folder, "granite-docling-500m")


@pytest.mark.parametrize("field", ["image_scale", "residual_scale", "logits_scaling"])
def test_scales_change_the_answer(field):
    model, processor = load(GOLDEN / "granite-docling-500m")
    right = last(model, processor, "image")
    object.__setattr__(model.config.decoder.scales, field, 1.0)
    for layer in model.decoder.layers:
        layer.residual_scale = model.config.decoder.scales.residual_scale
    assert np.abs(last(model, processor, "image") - right).max() > 1e-3


REFUSED: list[tuple[str, str, dict[str, Any], str]] = [
    ("paddleocr-vl", "vision_config", {"rope_parameters": {"rope_theta": 100.0}}, "tower's rope_theta must be 10000"),
    ("paddleocr-vl", "vision_config", {"num_channels": 1}, "in_channels 3"),
    ("paddleocr-vl", "vision_config", {"image_size": 64}, "position_embedding.weight has shape"),
    ("glm-ocr", "text_config", {"num_nextn_predict_layers": -1}, "draft_layers must be a whole number"),
    ("glm4v", "vision_config", {"out_hidden_size": 40}, "the merger's width 40 differs from the decoder's 48"),
    ("glm4v", "vision_config", {"intermediate_size": 48}, "merger.gate_proj.weight has shape"),
    ("glm4v", "text_config", {"partial_rotary_factor": 1.0}, "three numbers with the sum 8"),
    ("glm-ocr", "text_config", {"num_nextn_predict_layers": 0}, "which config.json has no place for"),
    ("glm-ocr", "vision_config", {"patch_size": [6, 7]}, "patch_size must be square"),
    (
        "granite-docling-500m",
        "vision_config",
        {"scale_factor": 3},
        "squares of scale_factor 3 do not fit tiles of 8 x 8",
    ),
    ("granite-docling-500m", "vision_config", {"out_hidden_size": 24}, "out_hidden_size do not fit the decoder"),
    ("granite-docling-500m", "vision_config", {"deepstack_visual_indexes": [3]}, "feature layer 4 does not exist"),
    ("granite-docling-500m", "text_config", {"logits_scaling": 0}, "logits_scaling"),
    ("granite-docling-500m", "text_config", {"residual_multiplier": "a"}, "residual_scale"),
    ("paddleocr-vl", "", {"rope_scaling": {"mrope_section": [2, 2, 2]}}, "three numbers with the sum 8"),
]


@pytest.mark.parametrize(("name", "part", "changes", "message"), REFUSED)
def test_configs_that_cannot_be_are_refused_in_a_line(name, part, changes, message, copy_of):
    folder = copy_of(name)
    config = json.loads((folder / "config.json").read_text())
    edit_json(folder / "config.json", **({part: {**config[part], **changes}} if part else changes))
    with pytest.raises(CheckpointError, match=message) as error:
        load(folder)
    assert "\n" not in str(error.value)


# files


WIDE: dict[str, dict[str, Any]] = {
    "paddleocr-vl": {
        "hidden_size": 128, "intermediate_size": 192, "head_dim": 32,
        "rope_scaling": {"mrope_section": [4, 6, 6], "rope_type": "default"},
        "vision_config": {"hidden_size": 64, "intermediate_size": 96},
    },
    "glm4v": {
        "text_config": {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 8},
        "vision_config": {"hidden_size": 64, "intermediate_size": 96, "out_hidden_size": 128},
    },
    "glm-ocr": {
        "text_config": {
            "hidden_size": 128, "intermediate_size": 192, "head_dim": 32,
            "rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "mrope_section": [4, 6, 6]},
        },
        "vision_config": {"hidden_size": 64, "intermediate_size": 96, "out_hidden_size": 128},
    },
    "granite-docling-500m": {
        "text_config": {"hidden_size": 128, "intermediate_size": 192},
        "vision_config": {"hidden_size": 64, "intermediate_size": 96, "out_hidden_size": 128},
    },
}  # fmt: skip


def small(settings):
    if "patch_size" in settings:
        settings.update(min_pixels=500, max_pixels=1500)


@pytest.mark.parametrize("name", NAMES)
def test_quantized(name, tmp_path):
    """Of the wide sister at 8 bits, with the check layer by layer."""
    model = check_eight_bits(make_wide_with(small, name, tmp_path / "wide", WIDE[name]), tmp_path / "out")
    projector = model.projector
    joined = {
        "layers": lambda: projector.layers[0], "mlp": lambda: projector.mlp.up_proj,
        "coarse": lambda: projector.coarse.projection,
    }  # fmt: skip
    first = next(find() for name, find in joined.items() if name in projector)
    assert (model.vision.blocks[0].attn.q_proj.bits, first.bits) == (8, 8)


INFO = {
    name: (token, {"min_pixels": 576, "max_pixels": 4000, "max_image_tokens": 27})
    for name, token in (("paddleocr-vl", "<|IMAGE_PLACEHOLDER|>"), ("glm-ocr", "<|image|>"), ("glm4v", "<|image|>"))
} | {"granite-docling-500m": ("<image>", {"image_size": 32, "tile_tokens": 4, "max_image_tokens": 28})}


@pytest.mark.parametrize("name", NAMES)
def test_what_info_says(name):
    found = describe(GOLDEN / name, check=True)
    token, own = INFO[name]
    assert found["image_token"] == token and own.items() <= found["vision"].items()
