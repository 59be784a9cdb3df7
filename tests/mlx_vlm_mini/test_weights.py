"""Strictness: each checkpoint that is not whole, with the message it gives; and the layouts that are read."""

import json
import shutil
import struct
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import PHOTO, PLAIN, edit_json

from mlx_vlm_mini import load
from mlx_vlm_mini.checkpoints.load import load as load_model
from mlx_vlm_mini.checkpoints.weights import rename
from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.families import llava

HEAD = "language_model.lm_head.weight"
QUERY = "language_model.model.layers.1.self_attn.q_proj.weight"
KERNEL = "vision_tower.vision_model.embeddings.patch_embedding.weight"


def tensors_of(folder: Path) -> dict[str, mx.array]:
    return dict(mx.load(str(folder / "model.safetensors")))


def save(folder: Path, tensors: dict[str, mx.array], form: str = "pt") -> None:
    mx.save_safetensors(str(folder / "new.safetensors"), tensors, {"format": form})
    (folder / "new.safetensors").replace(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("language_model.model.layers.3.mlp.up_proj.weight", "decoder.layers.3.mlp.up_proj.weight"),
        ("model.language_model.layers.3.mlp.up_proj.scales", "decoder.layers.3.mlp.up_proj.scales"),
        ("lm_head.weight", "decoder.lm_head.weight"),
        ("model.vision_tower.vision_model.pre_layrnorm.bias", "vision.norm_pre.bias"),
        ("vision_tower.encoder.layers.0.self_attn.out_proj.bias", "vision.blocks.0.attn.o_proj.bias"),
        ("vision_tower.embeddings.class_embedding", "vision.class_token"),
        ("vision_tower.post_layernorm.weight", None),
        ("vision_tower.vision_model.embeddings.position_ids", None),
        ("model.multi_modal_projector.linear_2.weight", "projector.layers.1.weight"),
    ],
)
def test_names(theirs, ours):
    assert rename(theirs, llava.WEIGHTS) == (() if ours is None else (ours,))


def test_a_missing_tensor(copy_of):
    folder = copy_of()
    tensors = tensors_of(folder)
    del tensors[QUERY]
    save(folder, tensors)
    with pytest.raises(
        CheckpointError, match=r"lacks 1 tensor \(language_model.model.layers.1.self_attn.q_proj.weight\)"
    ):
        load(folder)


def test_an_unknown_tensor(copy_of):
    folder = copy_of()
    save(folder, {**tensors_of(folder), "language_model.model.layers.0.mlp.router.weight": mx.zeros(3)})
    with pytest.raises(CheckpointError, match=r"has 1 tensor \(language_model.model.layers.0.mlp.router.weight\)"):
        load(folder)


def test_a_superfluous_layer(copy_of):
    folder = copy_of()
    tensors = tensors_of(folder)
    save(folder, {**tensors, QUERY.replace("layers.1", "layers.2"): tensors[QUERY]})
    with pytest.raises(CheckpointError, match="which config.json has no place for"):
        load(folder)


def test_integers_are_no_weights(copy_of):
    folder = copy_of()
    tensors = tensors_of(folder)
    save(folder, {**tensors, QUERY: tensors[QUERY].astype(mx.int32)})
    with pytest.raises(CheckpointError, match="q_proj.weight has type I32 instead of floating-point numbers"):
        load(folder)


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_the_vision_block_that_nobody_reads_is_checked_too(copy_of, change):
    folder = copy_of()
    tensors = tensors_of(folder)
    name = "vision_tower.vision_model.encoder.layers.2.mlp.fc1.weight"
    tensors[name] = mx.zeros((3, 3))
    if change == "missing":
        del tensors[name]
    save(folder, tensors)
    message = f"lacks 1 tensor .{name}" if change == "missing" else f"{name} has shape .3, 3., config.json asks for"
    with pytest.raises(CheckpointError, match=message):
        load(folder)


@pytest.mark.parametrize("part", ["vision_config", "text_config"])
def test_a_billion_layers_are_refused_at_once(copy_of, part):
    folder = copy_of()
    config = json.loads((folder / "config.json").read_text())
    config[part]["num_hidden_layers"] = 10**8
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="100000000 layers"):
        load(folder)


def test_a_file_that_mlx_saved_without_metadata(copy_of):
    folder = copy_of()
    mx.save_safetensors(str(folder / "new.safetensors"), tensors_of(folder))
    (folder / "new.safetensors").replace(folder / "model.safetensors")
    assert (load(folder)[0].decoder.norm.weight == load(PLAIN)[0].decoder.norm.weight).all()


@pytest.mark.parametrize(
    ("old", "new"), [("language_model.model.", "language_model."), ("language_model.", "model.language_model.")]
)
def test_more_layouts(copy_of, old, new):
    """Without `model.`, and a decoder whose head is `lm_head`; buffers of rotary positions are dropped."""
    folder = copy_of()
    tensors = {
        name.replace(old, new) if name != HEAD else "lm_head.weight": array
        for name, array in tensors_of(folder).items()
    }
    if new == "model.language_model.":
        tensors = {name.replace("model.language_model.model.", new): array for name, array in tensors.items()}
    save(folder, {**tensors, f"{new}rotary_emb.inv_freq": mx.zeros(10)})
    inputs = load(PLAIN)[1]("Hi", [PHOTO])
    assert (load(folder)[0](inputs) == load(PLAIN)[0](inputs)).all()


def test_a_wrong_shape_names_both(copy_of):
    folder = copy_of()
    save(folder, {**tensors_of(folder), QUERY: mx.zeros((60, 59))})
    with pytest.raises(CheckpointError, match=r"q_proj.weight has shape \[60, 59\], config.json asks for \[60, 60\]"):
        load(folder)


def test_two_names_for_one_tensor(copy_of):
    folder = copy_of()
    tensors = tensors_of(folder)
    save(folder, {**tensors, "lm_head.weight": tensors[HEAD]})
    with pytest.raises(CheckpointError, match="has both .* which mean the same tensor"):
        load(folder)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file(copy_of, keep):
    folder = copy_of()
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="truncated|download it again"):
        load(folder)


@pytest.mark.parametrize(
    "header",
    [
        b"[]", b"{", b'{"a": 1}', b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}',
        b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "b": {"dtype": "F32", "shape": [1], "data_offsets": [2, 6]}}',
    ],
)  # fmt: skip
def test_a_header_that_lies(copy_of, header):
    folder = copy_of()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 16)
    with pytest.raises(CheckpointError):
        load(folder)


def test_a_missing_shard_and_an_index_that_points_elsewhere(copy_of):
    folder = copy_of("llava-clip-llama-layers")
    index = folder / "model.safetensors.index.json"
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00002.safetensors is missing"):
        load(folder)
    index.write_text(json.dumps({"weight_map": {"x": "../elsewhere.safetensors"}}))
    with pytest.raises(CheckpointError, match="outside its folder"):
        load(folder)


def test_no_tensors_at_all(copy_of):
    folder = copy_of()
    (folder / "model.safetensors").rename(folder / "training_args.bin")
    with pytest.raises(CheckpointError, match=r"has neither model.safetensors nor pytorch_model.bin"):
        load(folder)


def test_a_head_in_the_file_counts_and_a_tied_one_may_be_absent(copy_of):
    folder = copy_of()
    edit_json(folder / "config.json", tie_word_embeddings=True)
    inputs = load(PLAIN)[1]("Hi", [PHOTO])
    assert (load(folder)[0](inputs) == load(PLAIN)[0](inputs)).all()
    tensors = tensors_of(folder)
    del tensors[HEAD]
    save(folder, tensors)
    assert not (load(folder)[0](inputs) == load(PLAIN)[0](inputs)).all()
    edit_json(folder / "config.json", tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"lacks 1 tensor \(language_model.lm_head.weight\)"):
        load(folder)


def test_the_layout_of_kernels_is_read_from_the_metadata(copy_of):
    """A kernel of (out, 3, 14, 14) says by its file whether it is MLX's: also where every side is equal."""
    folder = copy_of()
    expected = load(PLAIN)[0].vision.patch_embed.weight
    tensors = tensors_of(folder)
    tensors[KERNEL] = tensors[KERNEL].transpose(0, 2, 3, 1)
    save(folder, tensors, form="mlx")
    assert (load(folder)[0].vision.patch_embed.weight == expected).all()
    save(folder, tensors, form="pt")
    with pytest.raises(CheckpointError, match=r"patch_embedding.weight has shape \[48, 14, 14, 3\]"):
        load(folder)


def test_half_precision_is_computed_as_float32_on_a_cpu(wide):
    model, processor = load_model(wide)
    assert model.dtype == (mx.float32 if mx.default_device() == mx.Device(mx.cpu) else mx.bfloat16)
    half, _ = load_model(wide, dtype="bfloat16")
    assert half.dtype == mx.bfloat16
    inputs = processor("Hi", [PHOTO])
    assert half(inputs).dtype == mx.bfloat16
    difference = np.abs(np.array(half(inputs).astype(mx.float32)) - np.array(model(inputs)))
    assert 0 < difference.max() < 1.0


def test_files_that_are_missing_or_broken(copy_of, tmp_path):
    cases = {
        "config.json": "has no config.json",
        "tokenizer.json": "has no tokenizer.json",
    }
    for name, message in cases.items():
        folder = copy_of()
        (folder / name).unlink()
        with pytest.raises(CheckpointError, match=message):
            load(folder)
        shutil.rmtree(folder)
    broken = (
        "config.json",
        "tokenizer.json",
        "generation_config.json",
        "preprocessor_config.json",
        "chat_template.json",
    )
    for name in broken:
        folder = copy_of()
        (folder / name).write_text("{ not json")
        with pytest.raises(CheckpointError, match=name.split(".")[0]):
            load(folder)
        shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match="folder not found: /no/such"):
        load("/no/such")
    with pytest.raises(CheckpointError, match="is a file, not a folder"):
        load(PHOTO)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"quantization": "x"}, "quantization must be an object"),
        ("config.json", {"model_type": ["llava"]}, "says model_type"),
        ("generation_config.json", {"eos_token_id": 1.5}, "eos_token_id must be a token id or a list, not 1.5"),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}, "tokenizer_config.json is malformed"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": "y"}}, "tokenizer_config.json is malformed"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"7": {"content": "<new>"}}}, "gives '<new>' the id 7"),
        ("preprocessor_config.json", {"image_std": 0}, "image_std must not be 0"),
        ("preprocessor_config.json", {"rescale_factor": "x"}, "rescale_factor must be a number"),
        ("preprocessor_config.json", {"image_mean": "abc"}, "image_mean must be a number"),
        ("preprocessor_config.json", {"size": 0}, "0 is not an image size"),
        ("preprocessor_config.json", {"do_resize": "false"}, "do_resize must be true or false"),
    ],
)
def test_files_with_nonsense_in_them(copy_of, file, changes, message):
    folder = copy_of()
    edit_json(folder / file, **changes)
    if "quantization" in changes:
        save(folder, {**tensors_of(folder), QUERY.replace("weight", "scales"): mx.zeros((60, 1))})
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_deeply_nested_json(copy_of):
    for name in ("config.json", "tokenizer_config.json", "chat_template.json"):
        folder = copy_of()
        (folder / name).write_text("[" * 100000)
        with pytest.raises(CheckpointError, match=name):
            load(folder)
        shutil.rmtree(folder)


def test_tokens_that_only_tokenizer_config_lists(copy_of):
    folder = copy_of()
    content = {
        "content": "<new>",
        "special": True,
        "lstrip": True,
        "rstrip": False,
        "normalized": False,
        "single_word": False,
    }
    edit_json(
        folder / "tokenizer_config.json", added_tokens_decoder={"422": content}, additional_special_tokens=["<other>"]
    )
    tokenizer = load(folder)[1].tokenizer
    assert tokenizer.encode("a  <new><other>", add_special_tokens=False)[-2:] == [422, 423]


def test_an_unknown_family_lists_the_known_ones(copy_of):
    folder = copy_of()
    edit_json(folder / "config.json", model_type="gpt5")
    with pytest.raises(CheckpointError, match="says model_type 'gpt5'; this version knows: blip-2, gemma3, "):
        load(folder)
    edit_json(folder / "config.json", model_type=...)
    with pytest.raises(CheckpointError, match="has no model_type"):
        load(folder)
    edit_json(folder / "config.json", model_type="llava", text_config=[1, 2])
    with pytest.raises(CheckpointError, match="malformed"):
        load(folder)


def test_without_image_settings_only_text_is_answered(copy_of):
    folder = copy_of()
    (folder / "preprocessor_config.json").unlink()
    _, processor = load(folder)
    assert processor("Hi").pixel_values is None
    with pytest.raises(CheckpointError, match="how it takes images is unknown"):
        processor("Hi", [PHOTO])


def test_weights_quantized_by_others_are_refused(copy_of):
    folder = copy_of()
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    save(folder, {**tensors_of(folder), QUERY.replace("weight", "scales"): mx.zeros((60, 1))})
    with pytest.raises(CheckpointError, match="quantized by 'gptq'"):
        load(folder)
