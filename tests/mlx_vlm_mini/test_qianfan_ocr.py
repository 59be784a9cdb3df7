"""Qianfan-OCR: a place that is no token, layouts, its own template, configs; parity is test_parity.py's."""

import json

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import PHOTO, check_fields, edit_json, with_paths
from reference import CASES, GOLDEN

from mlx_vlm_mini import load
from mlx_vlm_mini.checkpoints.describe import describe
from mlx_vlm_mini.checkpoints.folder import open_checkpoint
from mlx_vlm_mini.checkpoints.load import plan
from mlx_vlm_mini.checkpoints.weights import rename
from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.families import qianfan_ocr

FOLDER = GOLDEN / "qianfan-ocr"


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


# the prompt


def test_the_place_of_an_image_is_no_token(loaded):
    """`<image>` of the template becomes `<img>`, four tokens a tile, `</img>`; what an answer or a question
    says of it stays text."""
    processor = loaded[1]
    assert processor.tokenizer.token_to_id("<image>") is None
    said = {"role": "assistant", "content": "Is <image> a word?"}
    user = {"role": "user", "content": [{"type": "image", "image": str(PHOTO)}]}
    inputs = processor([user, said, {"role": "user", "content": "Yes."}])
    tokens = [processor.tokenizer.id_to_token(token) for token in inputs.input_ids[0].tolist()]
    count = 4 * len(inputs.images[0].pixel_values)
    start = tokens.index("<img>")
    assert tokens[start : start + count + 2] == ["<img>", *["<IMG_CONTEXT>"] * count, "</img>"]
    assert tokens.count("<IMG_CONTEXT>") == count == int(inputs.slots.sum()) and count > 4
    assert "Is <image> a word?" in processor.tokenizer.decode(inputs.input_ids[0].tolist())
    asked = processor("Is <image> a word?")
    assert not asked.slots.any() and "<image>" in processor.tokenizer.decode(asked.input_ids[0].tolist())


def test_a_typed_image_token_is_no_image(loaded):
    inputs = loaded[1]([PHOTO, "<IMG_CONTEXT>"])
    assert int((np.array(inputs.input_ids[0]) == loaded[1].image_token_id).sum()) == int(inputs.slots.sum())


def test_the_familys_own_template_writes_the_goldens_prompts(copy_of):
    folder = copy_of(FOLDER.name)
    (folder / "chat_template.jinja").unlink()
    own, theirs = load(folder)[1], load(FOLDER)[1]
    assert own.chat_template.source == qianfan_ocr.CHAT_TEMPLATE
    for case in ("two_images", "two_turns"):
        messages = with_paths(CASES[case])
        assert own(messages).input_ids.tolist() == theirs(messages).input_ids.tolist()


# configs and layouts


def test_what_configs_leave_out():
    """The class defaults of transformers 5.23; a tower as InternViT-300M and its class's decoder."""
    check_fields(qianfan_ocr.config({"model_type": "qianfan_ocr"}), {
        "vision.hidden_size": 1024, "vision.num_hidden_layers": 24, "vision.num_attention_heads": 16,
        "vision.image_size": 448, "vision.patch_size": 14, "vision.blocks.qkv_bias": True, "vision.blocks.qk_norm_eps": None,
        "vision.blocks.layer_scale": True, "vision.layer_norm_eps": 1e-6, "vision.post_norm": False,
        "vision.feature_layers": (24,), "vision.drop_first_feature": True, "projector.norm_eps": 1e-5,
        "projector.hidden_act": "gelu", "projector.shuffle.factor": 2, "projector.shuffle.transposed": False,
        "decoder.norms.qk_norm": True, "decoder.tie_word_embeddings": False, "image_token_id": 151667,
        "image_place": "<image>", "family": "qianfan_ocr",
    })  # fmt: skip


def test_other_decoders_are_refused(copy_of):
    folder = copy_of(FOLDER.name)
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit_json(folder / "config.json", text_config={**text, "model_type": "qwen2"})
    with pytest.raises(CheckpointError, match="decoder 'qwen2' is not supported"):
        load(folder)


def in_memory(tensors):
    """As transformers has them: other names, queries, keys and values apart."""
    found = {}
    pairs = (
        ("vision_model.", "model.vision_tower."), ("encoder.layers.", "layers."), (".ls1", ".lambda_1"),
        (".ls2", ".lambda_2"), (".attn.proj.", ".attention.projection_layer."), (".norm1.", ".layernorm_before."),
        (".norm2.", ".layernorm_after."), ("class_embedding", "cls_token"), ("position_embedding", "position_embeddings"),
        ("patch_embedding.", "patch_embeddings.projection."), ("language_model.model.", "model.language_model."),
        ("language_model.lm_head.", "lm_head."), ("mlp1.0.", "model.multi_modal_projector.layer_norm."),
        ("mlp1.1.", "model.multi_modal_projector.linear_1."), ("mlp1.3.", "model.multi_modal_projector.linear_2."),
    )  # fmt: skip
    for name, array in tensors.items():
        for theirs, ours in pairs:
            name = name.replace(theirs, ours)
        parts = mx.split(array, 3) if ".attn.qkv." in name else [array]
        names = [name.replace(".attn.qkv.", f".attention.{each}_proj.") for each in "qkv"] if len(parts) > 1 else [name]
        found |= dict(zip(names, parts, strict=True))
    return found


def as_saved(tensors):
    """As transformers 5.23 saves them, which writes the decoder's layers into an `encoder`."""
    layers = "language_model.model."
    return {key.replace(f"{layers}layers.", f"{layers}encoder.layers."): array for key, array in tensors.items()}


@pytest.mark.parametrize("layout", [in_memory, as_saved])
def test_tensors_go_by_many_names(layout, copy_of):
    folder = copy_of(FOLDER.name)
    tensors = layout(mx.load(str(folder / "model.safetensors")))
    assert all(rename(name, qianfan_ocr.WEIGHTS) for name in tensors)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "pt"})
    check_answer(folder)


def test_the_goldens_names_are_the_hubs():
    names = set(open_checkpoint(FOLDER).tensors)
    for name in (
        "vision_model.encoder.layers.1.attn.qkv.weight", "vision_model.encoder.layers.0.attn.proj.bias",
        "vision_model.encoder.layers.0.norm1.weight", "vision_model.encoder.layers.0.ls2",
        "vision_model.encoder.layers.0.mlp.fc1.weight", "vision_model.embeddings.class_embedding",
        "vision_model.embeddings.position_embedding", "vision_model.embeddings.patch_embedding.weight",
        "mlp1.0.weight", "mlp1.1.bias", "mlp1.3.weight", "language_model.model.layers.1.self_attn.q_norm.weight",
        "language_model.lm_head.weight",
    ):  # fmt: skip
        assert name in names
    assert plan(open_checkpoint(FOLDER)).unused == ()


def test_norms_of_heads_are_seen():
    model, processor = load(FOLDER)
    right = own_logprobs(model, processor, "image")
    for layer in model.decoder.layers:
        layer.self_attn.pop("q_norm")
        layer.self_attn.pop("k_norm")
    assert np.abs(own_logprobs(model, processor, "image") - right).max() > 0.5


def test_what_info_says():
    found = describe(FOLDER, check=True)
    assert (found["family"], found["image_token"], found["unused"]) == ("qianfan_ocr", "<IMG_CONTEXT>", 0)
    _, processor = load(FOLDER, max_tiles=2)
    assert len(processor([PHOTO, "Hi"]).images[0].pixel_values) == 3
