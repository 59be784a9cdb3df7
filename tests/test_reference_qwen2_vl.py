"""The reference suite of Qwen2-VL, 2.5-VL and 3-VL: what the goldens do not hold, live against transformers; and published
models at full size, by the names and shapes of its classes.

pytest -m reference        needs the `reference` extra
"""

import json

import mlx.core as mx
import numpy as np
import published
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import changed, check_answer
from reference import CASES, GOLDEN, SPECS, Reference

from mlx_vlm_mini import load
from mlx_vlm_mini.checkpoints.load import plan
from mlx_vlm_mini.preprocessing.grid import Grid

pytestmark = pytest.mark.reference


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 5000),
    st.integers(1, 5000),
    st.sampled_from([(14, 3136, 1003520), (16, 65536, 16777216), (6, 1, 500)]),
)
def test_sizes_equal_transformers(height, width, limits):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    patch, low, high = limits
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(ValueError, match="aspect ratio"):
            smart_resize(height, width, 2 * patch, low, high)
        return
    grid = Grid(patch_size=patch, merge=2, min_pixels=low, max_pixels=high)
    assert grid.fit((height, width)) == smart_resize(height, width, 2 * patch, low, high)


VARIANTS = {  # text config, vision config, image processor
    "a larger section for the row": ("qwen2-vl", {"rope_scaling": {"type": "mrope", "mrope_section": [0, 4, 1]}}, {}, {}),
    "yarn": ("qwen2-vl", {"rope_scaling": {
        "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "mrope_section": [1, 2, 2]}}, {}, {}),
    "one column of tokens": ("qwen2-vl", {}, {}, {"max_pixels": 600, "min_pixels": 1}),
    "large pictures": ("qwen2-vl", {}, {}, {"min_pixels": 20000}),
    "gelu in the tower": ("qwen2-vl", {}, {"hidden_act": "gelu"}, {}),
    "eps of the decoder": ("qwen2-vl", {"rms_norm_eps": 0.1}, {}, {}),
    "windows of one token": ("qwen2.5-vl", {}, {"window_size": 12}, {}),
    "windows that divide": ("qwen2.5-vl", {}, {"window_size": 24}, {}),
    "windows larger than pictures": ("qwen2.5-vl", {}, {"window_size": 400}, {}),
    "no whole block": ("qwen2.5-vl", {}, {"fullatt_block_indexes": []}, {}),
    "odd grids": ("qwen2.5-vl", {}, {}, {"size": {"shortest_edge": 9000, "longest_edge": 12000}}),
    "other taps": ("qwen3-vl", {}, {"deepstack_visual_indexes": [1, 2]}, {}),
    "positions of a large picture": ("qwen3-vl", {}, {}, {"size": {"shortest_edge": 20000, "longest_edge": 30000}}),
    "positions of a small picture": ("qwen3-vl", {}, {}, {"size": {"shortest_edge": 1, "longest_edge": 300}}),
    "sections that overlap": ("qwen3-vl", {"rope_parameters": {
        "rope_theta": 1e4, "rope_type": "default", "mrope_section": [2, 3, 3], "mrope_interleaved": True}}, {}, {}),
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(VARIANTS))
def test_variants(kind, tmp_path):
    name, *changes = VARIANTS[kind]
    folder = changed(name, tmp_path / "model", *changes)
    for case in ("side_by_side", "two_turns"):
        expected = Reference(folder, SPECS[name].chat_template).answer(CASES[case], GOLDEN, 5)
        check_answer(*load(folder), CASES[case], expected)


@pytest.mark.parametrize("name", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"])
def test_what_is_converted_transformers_reads(name, tmp_path):
    """Written back in torch's form, as `train --save` and uploads for others are; names are the source's."""
    from safetensors.torch import load_file, save_file

    from mlx_vlm_mini.convert import convert

    convert(GOLDEN / name, tmp_path / "mlx")
    tensors = load_file(tmp_path / "mlx" / "model.safetensors")
    kernels = [key for key in tensors if key.endswith("patch_embed.proj.weight")]
    for key in kernels:
        tensors[key] = tensors[key].permute(0, 4, 1, 2, 3).contiguous()
    save_file(tensors, tmp_path / "mlx" / "model.safetensors", {"format": "pt"})
    answer = Reference(tmp_path / "mlx", SPECS[name].chat_template).answer(CASES["image"], GOLDEN, 3)
    with np.load(GOLDEN / name / "expected.npz") as expected:
        np.testing.assert_allclose(answer["logprobs"], expected["image/logprobs"][:3], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "name",
    sorted(
        name for name in published.CONFIGS if name.startswith(("Qwen/Qwen2", "Qwen/Qwen3-VL")) and "B-A" not in name
    ),
)
def test_tensors_of_published_sizes(name):
    """Every name and shape that transformers' class gives its tensors has its place, as the Hub writes them."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = published.CONFIGS[name]
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**json.loads(json.dumps(config))))
    tied = config.get("tie_word_embeddings", False)
    shapes = {}
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and tied:
            continue
        if config["model_type"] != "qwen3_vl":
            key = key.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        shapes[key] = tuple(tensor.shape)
    planned = plan(published.without_data(config, shapes))
    assert planned.unused == () and set(planned.ours.values()) == set(shapes)
    made = published.published(name).tensors
    assert {key: info.shape for key, info in made.items()} == shapes
    decoder = planned.config.decoder
    assert decoder.tie_word_embeddings == tied and sum(decoder.rope_scaling["mrope_section"]) == 64


def test_a_photo_at_full_resolution():
    """A tower of one block at the published width, 37 x 37 tokens: far positions and windows, ragged at both edges."""
    import torch
    from transformers import Qwen2_5_VLConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    from mlx_vlm_mini.checkpoints.weights import rename
    from mlx_vlm_mini.families import qwen2_5_vl
    from mlx_vlm_mini.model import VLM

    vision = {
        "depth": 2,
        "hidden_size": 80,
        "intermediate_size": 64,
        "num_heads": 1,
        "out_hidden_size": 64,
        "fullatt_block_indexes": [1],
    }
    text = {"hidden_size": 64, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
            "vocab_size": 9, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}}  # fmt: skip
    torch.manual_seed(3)
    reference = Qwen2_5_VisionTransformerPretrainedModel._from_config(
        Qwen2_5_VLConfig(vision_config=vision, text_config=text).vision_config
    )
    pixels = np.random.default_rng(0).normal(size=(1036, 1036, 3)).astype(np.float32)
    cut = pixels.reshape(37, 2, 14, 37, 2, 14, 3).transpose(0, 3, 1, 4, 6, 2, 5)[:, :, :, :, :, None]
    patches = np.broadcast_to(cut, (37, 37, 2, 2, 3, 2, 14, 14)).reshape(37 * 37 * 4, -1)
    with torch.no_grad():
        expected = reference(torch.tensor(patches), torch.tensor([[1, 74, 74]])).pooler_output.numpy()
    model = VLM(qwen2_5_vl.config({"vision_config": vision, "text_config": text}))
    arrays = []
    for name, tensor in reference.state_dict().items():
        names = rename(f"visual.{name}", qwen2_5_vl.WEIGHTS)
        array = mx.array(tensor.numpy())
        array = mx.moveaxis(array, 1, -1) if array.ndim == 5 else array
        arrays += zip(names, mx.split(array, len(names)), strict=True)
    model.load_weights(arrays, strict=False)
    found = np.array(model.projector(model.vision(mx.array(pixels)[None])))[0]
    np.testing.assert_allclose(found, expected, atol=1e-4)
