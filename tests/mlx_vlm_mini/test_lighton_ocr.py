"""LightOnOCR: patches that no token shows, layouts, its own template, configs; parity is test_parity.py's."""

import json

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import SHAPES, check_fields, edit_json, with_paths
from reference import CASES, GOLDEN

from mlx_vlm_mini import attend, load
from mlx_vlm_mini.checkpoints.describe import describe
from mlx_vlm_mini.checkpoints.folder import open_checkpoint
from mlx_vlm_mini.checkpoints.load import plan
from mlx_vlm_mini.decoder.masks import Causal
from mlx_vlm_mini.errors import CheckpointError, ImageError
from mlx_vlm_mini.families import find_family, lighton_ocr, mistral3
from mlx_vlm_mini.grounding.attend import find_boxes
from mlx_vlm_mini.preprocessing.grid import EdgeGrid
from mlx_vlm_mini.vision.tower import join_squares

FOLDER = GOLDEN / "lighton-ocr"


@pytest.fixture(scope="module")
def loaded():
    return load(FOLDER)


def own_logprobs(model, processor, case):
    """Of a prompt's last token."""
    logits = model(processor(with_paths(CASES[case])))[0, -1]
    return np.array(logits - mx.logsumexp(logits))


def check_answer(folder, case="image"):
    with np.load(FOLDER / "expected.npz") as expected:
        found = own_logprobs(*load(folder), case)
        np.testing.assert_allclose(found, expected[f"{case}/logprobs"][0], atol=1e-4)


# sizes


@pytest.mark.parametrize(
    ("step", "size", "fitted", "tokens"),
    [
        (14, (1540, 1089), (1540, 1092), 55 * 39), (14, (100, 43), (112, 56), 4 * 2), (14, (29, 28), (42, 28), 1),
        (28, (100, 43), (112, 56), 4 * 2), (28, (29, 28), (56, 28), 2), (None, (29, 28), (56, 28), 2),
        (14, (3000, 2000), (1540, 1036), 55 * 37),
    ],
)  # fmt: skip
def test_sides_are_whole_patches(step, size, fitted, tokens):
    """2000 / (3000 / 1540) is 1026.67, which becomes 1026 and then 74 patches; of 1092 pixels 78."""
    grid = EdgeGrid(patch_size=14, merge=2, max_height=1540, max_width=1540, step=step)
    assert (grid.fit(size), grid.count_tokens(size)) == (fitted, tokens)
    assert grid.max_tokens == 3025


def test_an_image_that_no_token_would_show():
    grid = EdgeGrid(patch_size=14, merge=2, max_height=1540, max_width=1540, step=14)
    with pytest.raises(ImageError, match="an image of 200x9 pixels becomes one of 210x14, of which a token"):
        grid.fit((9, 200))


def test_squares_that_are_not_whole_are_left_out():
    features = mx.arange(15).reshape(1, 3, 5, 1)
    np.testing.assert_array_equal(np.array(join_squares(features, 2))[0, 0], [[0, 1, 5, 6], [2, 3, 7, 8]])
    assert join_squares(features, 2).shape == (1, 1, 2, 4)


def test_odd_patches_are_read_and_not_shown(loaded):
    """Of 7 x 11 patches 3 x 5 tokens; the last row and column reach these through the tower's attention."""
    model, processor = loaded
    inputs = processor([SHAPES, "Hi"])
    (image,) = inputs.images
    assert image.pixel_values.shape == (1, 42, 66, 3) and image.tokens == 15
    tokens = [processor.tokenizer.id_to_token(token) for token in inputs.input_ids[0].tolist()]
    start = tokens.index("<|image_pad|>")
    assert tokens[start : start + 15] == ["<|image_pad|>"] * 15 == [each for each in tokens if "pad" in each]
    reading = model.read(inputs)
    assert (reading.visible, reading.memory) == (Causal(), None)
    pixels = mx.array(image.pixel_values)
    features = model.vision(pixels)
    assert features.shape == (1, 7, 11, 30)
    changed = mx.concatenate([pixels[:, :36], -pixels[:, 36:]], axis=1)
    moved = model.projector(model.vision(changed)) - model.projector(features)
    assert float(mx.abs(moved).max()) > 0.01
    part = mx.concatenate([features[:, :, :10], mx.zeros((1, 7, 1, 30))], axis=2)
    np.testing.assert_array_equal(np.array(model.projector(part)), np.array(model.projector(features)))


def test_places_leave_them_out(loaded):
    model, processor = loaded
    (image,) = processor([SHAPES, "Hi"]).images
    sources = model.sources(image)
    assert sources.shape == (15, 4) and sources[0].tolist() == [0, 1, 11, 12] and sources.max() == 5 * 11 + 9
    boxes = find_boxes(model, processor, image)
    height, width = image.size
    assert boxes.shape == (15, 4) and boxes[:, 2].max() == pytest.approx(width * 10 / 11)
    assert boxes[:, 3].max() == pytest.approx(height * 6 / 7)
    found = attend(model, processor, [SHAPES, "Hi"], max_tokens=2)
    assert found.images[0].weights.shape[-1] == 15


@pytest.mark.parametrize("patch", [12, {"height": 12, "width": 12}])
def test_a_file_whose_patches_are_tokens(patch, copy_of):
    """Then all sides are whole tokens."""
    folder = copy_of(FOLDER.name)
    settings = json.loads((folder / "processor_config.json").read_text())
    settings["image_processor"]["patch_size"] = patch
    (folder / "processor_config.json").write_text(json.dumps(settings))
    model, processor = load(folder)
    (image,) = processor([GOLDEN / "photo.jpg", "Hi"]).images
    assert image.pixel_values.shape == (1, 72, 48, 3) and image.tokens == 24
    assert np.isfinite(np.array(model(processor([GOLDEN / "photo.jpg", "Hi"])))).all()


# the prompt


def test_the_familys_own_template_writes_the_goldens_prompts(copy_of):
    folder = copy_of(FOLDER.name)
    (folder / "chat_template.jinja").unlink()
    own, theirs = load(folder)[1], load(FOLDER)[1]
    assert own.chat_template.source == lighton_ocr.CHAT_TEMPLATE
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    for case in ("side_by_side", "two_turns", "picture"):
        for messages in (with_paths(CASES[case]), [system, *with_paths(CASES[case])]):
            assert own(messages).input_ids.tolist() == theirs(messages).input_ids.tolist()


# configs and layouts


def test_what_configs_leave_out():
    """The class defaults of transformers 5.23."""
    check_fields(lighton_ocr.config({"model_type": "lighton_ocr"}), {
        "vision.hidden_size": 1024, "vision.num_hidden_layers": 24, "vision.hidden_act": "silu", "vision.patch_size": 14,
        "vision.image_size": 28, "vision.post_norm": False, "vision.feature_layers": (24,),
        "projector.input_size": 4096, "projector.norm_eps": 1e-6, "projector.bias": False, "projector.hidden_act": "gelu",
        "projector.merger.kind": "channels", "decoder.hidden_size": 1024, "decoder.num_hidden_layers": 28,
        "decoder.num_key_value_heads": 8, "decoder.head_dim": 128, "decoder.intermediate_size": 3072,
        "decoder.norms.qk_norm": True, "decoder.rope_theta": 1e6, "decoder.tie_word_embeddings": True,
        "image_token_id": 151655, "family": "lighton_ocr",
    })  # fmt: skip


def test_how_it_is_told():
    """Its first files call it a Mistral 3."""
    named = {"model_type": "mistral3", "architectures": ["LightOnOCRForConditionalGeneration"]}
    assert find_family(named) is find_family({"model_type": "lighton_ocr"}) is lighton_ocr
    for other in ({}, {"architectures": []}, {"architectures": ["Mistral3ForConditionalGeneration"]}):
        assert find_family({"model_type": "mistral3", **other}) is mistral3


def test_first_files(copy_of):
    folder = copy_of(FOLDER.name)
    names = ["LightOnOCRForConditionalGeneration"]
    edit_json(folder / "config.json", model_type="mistral3", architectures=names)
    check_answer(folder)


def test_another_decoder_is_refused(copy_of):
    folder = copy_of(FOLDER.name)
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit_json(folder / "config.json", text_config={**text, "model_type": "llama"})
    with pytest.raises(CheckpointError, match="decoder 'llama' is not supported"):
        load(folder)


def memory(name):
    return name.removeprefix("model.")


def community(name):
    for theirs, ours in (
        ("model.vision_encoder.", "vision_tower.vision_model."),
        ("model.vision_projection.", "multi_modal_projector."),
        ("model.language_model.", "language_model.model."),
    ):
        name = name.replace(theirs, ours)
    return name


@pytest.mark.parametrize("layout", [memory, community])
def test_tensors_go_by_many_names(layout, copy_of):
    folder = copy_of(FOLDER.name)
    tensors = {layout(key): array for key, array in mx.load(str(folder / "model.safetensors")).items()}
    if layout is community:
        kernel = "vision_tower.vision_model.patch_conv.weight"
        tensors[kernel] = mx.contiguous(tensors[kernel].transpose(0, 2, 3, 1))
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "mlx" if layout is community else "pt"})
    check_answer(folder)


def test_norms_of_heads_are_seen(copy_of):
    """Without them the answer is another."""
    folder = copy_of(FOLDER.name)
    model, processor = load(folder)
    right = own_logprobs(model, processor, "image")
    for layer in model.decoder.layers:
        layer.self_attn.pop("q_norm")
        layer.self_attn.pop("k_norm")
    assert np.abs(own_logprobs(model, processor, "image") - right).max() > 0.5


def test_what_info_says():
    found = describe(FOLDER, check=True)
    assert (found["family"], found["image_token"], found["unused"]) == ("lighton_ocr", "<|image_pad|>", 0)
    own = {"max_height": 66, "max_width": 66, "max_image_tokens": 25, "patch_size": 6}
    assert own.items() <= found["vision"].items()
    assert plan(open_checkpoint(FOLDER)).unused == ()
