"""The reference suite of Pixtral and Mistral 3: what the goldens do not hold, live against transformers.

pytest -m reference        needs the `reference` extra
"""

import json
import shutil

import mlx.core as mx
import numpy as np
import published
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import check_answer
from reference import CASES, GOLDEN, SPECS, Reference

from mlx_vlm_mini import load
from mlx_vlm_mini.checkpoints.float8 import NUMBERS
from mlx_vlm_mini.checkpoints.load import plan
from mlx_vlm_mini.errors import ImageError
from mlx_vlm_mini.preprocessing.grid import EdgeGrid

pytestmark = pytest.mark.reference


@settings(max_examples=500, deadline=None)
@given(
    st.integers(1, 5000),
    st.integers(1, 5000),
    st.sampled_from([(16, 1024, 1024), (28, 1540, 1540), (12, 100, 70)]),
)
def test_sizes_equal_transformers(height, width, limits):
    from transformers.models.pixtral.image_processing_pil_pixtral import get_resize_output_image_size

    factor, *frame = limits
    found = get_resize_output_image_size(np.zeros((height, width, 3), bool), tuple(frame), factor, "channels_last")
    grid = EdgeGrid(patch_size=factor, merge=1, max_height=frame[0], max_width=frame[1])
    if 0 in found:
        with pytest.raises(ImageError, match="too long and narrow"):
            grid.fit((height, width))
    else:
        assert grid.fit((height, width)) == found


VARIANTS = {  # the model's config, text config, vision config, image processor
    "gelu in the tower": ("pixtral", {}, {}, {"hidden_act": "gelu"}, {}),
    "a sliding window shorter than the prompt": ("pixtral", {}, {"sliding_window": 9}, {}, {}),
    "an earlier layer": ("pixtral", {"vision_feature_layer": -2}, {}, {}, {}),
    "a list of one layer": ("pixtral", {"vision_feature_layer": [2]}, {}, {}, {}),
    "larger pictures": ("pixtral", {}, {}, {}, {"size": {"longest_edge": 300}}),
    "one token a picture": ("pixtral", {}, {}, {}, {"size": {"longest_edge": 8}}),
    "a frame": ("mistral3", {}, {}, {}, {"size": {"height": 30, "width": 77}}),
    "an earlier layer of Mistral 3": ("mistral3", {"vision_feature_layer": 1}, {}, {}, {}),
    "eps of decoder and merger": ("mistral3", {}, {"rms_norm_eps": 0.1}, {}, {}),
    "silu in the projector": ("mistral3", {"projector_hidden_act": "silu"}, {}, {}, {}),
    "Ministral 3 without mscale": ("ministral3", {}, {"rope_parameters": {"mscale": None, "mscale_all_dim": None}}, {}, {}),
    "Ministral 3, other turns of YaRN": ("ministral3", {}, {"rope_parameters": {"beta_fast": 2.0, "beta_slow": 0.5}}, {}, {}),
    "queries that grow faster": ("ministral3", {}, {"rope_parameters": {
        "llama_4_scaling_beta": 0.3, "original_max_position_embeddings": 7}}, {}, {}),
    "queries that never grow": ("ministral3", {}, {"rope_parameters": {"original_max_position_embeddings": 300}}, {}, {}),
    "plain rotary positions": ("ministral3", {}, {"rope_parameters": {"rope_type": "default", "type": "default"}}, {}, {}),
    "a window in Ministral 3": ("ministral3", {}, {"sliding_window": 9}, {}, {}),
    "LightOnOCR, patches that are tokens": ("lighton-ocr", {}, {}, {}, {"patch_size": {"height": 12, "width": 12}}),
    "LightOnOCR, larger pictures": ("lighton-ocr", {}, {}, {}, {"size": {"longest_edge": 90}}),
    "LightOnOCR, eps of decoder and merger": ("lighton-ocr", {}, {"rms_norm_eps": 0.1}, {}, {}),
    "other means": ("mistral3", {}, {}, {}, {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}),
}  # fmt: skip


def check_folder(folder, name):
    for case in ("side_by_side", "two_turns"):
        expected = Reference(folder, SPECS[name].chat_template).answer(CASES[case], GOLDEN, 5)
        check_answer(*load(folder), CASES[case], expected)


@pytest.mark.parametrize("kind", sorted(VARIANTS))
def test_variants(kind, tmp_path):
    name, changes, text, vision, image = VARIANTS[kind]
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / name, folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    rope = {**config["text_config"].get("rope_parameters", {}), **text.get("rope_parameters", {})}
    config["text_config"].update(text | ({"rope_parameters": rope} if "rope_parameters" in text else {}))
    config["vision_config"].update(vision)
    (folder / "config.json").write_text(json.dumps(config))
    file = folder / ("preprocessor_config.json" if name == "pixtral" else "processor_config.json")
    content = json.loads(file.read_text())
    content.get("image_processor", content).update(image)
    file.write_text(json.dumps(content))
    check_folder(folder, name)


def test_numbers_in_float8_are_torchs():
    import torch

    theirs = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(NUMBERS, theirs)


def test_a_folder_that_transformers_saves_tied(tmp_path):
    """A Mistral 3 whose config says nothing of a tie: the class's default, and no head in the file."""
    import torch
    from transformers import AutoModelForImageTextToText

    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / "mistral3", folder)
    reference = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    reference.config.tie_word_embeddings = True
    reference.tie_weights()
    for file in folder.glob("model*"):
        file.unlink()
    reference.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("tie_word_embeddings")
    config["text_config"].pop("tie_word_embeddings", None)
    (folder / "config.json").write_text(json.dumps(config))
    model, _ = load(folder)
    assert "lm_head" not in model.decoder
    check_folder(folder, "mistral3")


@pytest.mark.parametrize("name", ["pixtral", "mistral3", "ministral3"])
def test_what_is_converted_transformers_reads(name, tmp_path):
    """Written back in torch's form; names are the source's."""
    from safetensors.torch import load_file, save_file

    from mlx_vlm_mini.convert import convert

    convert(GOLDEN / name, tmp_path / "mlx")
    tensors = load_file(tmp_path / "mlx" / "model.safetensors")
    (kernel,) = (key for key in tensors if key.endswith("patch_conv.weight"))
    tensors[kernel] = tensors[kernel].permute(0, 3, 1, 2).contiguous()
    save_file(tensors, tmp_path / "mlx" / "model.safetensors", {"format": "pt"})
    answer = Reference(tmp_path / "mlx", SPECS[name].chat_template).answer(CASES["image"], GOLDEN, 3)
    with np.load(GOLDEN / name / "expected.npz") as expected:
        np.testing.assert_allclose(answer["logprobs"], expected["image/logprobs"][:3], atol=2e-5, rtol=1e-5)


def _on_the_hub(name):
    if name.startswith("lm_head"):
        return "language_model." + name
    return name.removeprefix("model.").replace("language_model.", "language_model.model.")


@pytest.mark.parametrize("name", ["mistral-community/pixtral-12b", "mistralai/Mistral-Small-3.1-24B-Instruct-2503"])
def test_tensors_of_published_sizes(name):
    """Every name and shape that transformers' class gives its tensors has its place, in memory's names and in the Hub's."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = published.CONFIGS[name]
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**json.loads(json.dumps(config))))
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    hub = {_on_the_hub(key): shape for key, shape in shapes.items()}
    for each in (shapes, hub):
        planned = plan(published.without_data(config, each))
        assert planned.unused == () and set(planned.ours.values()) == set(each)
    made = published.published(name).tensors
    assert {key: info.shape for key, info in made.items()} == hub


def test_a_photo_at_full_resolution():
    """A tower of two blocks at the published width and 1540 pixels: 110 x 110 patches, far positions."""
    import torch
    from transformers import AutoModel, Mistral3Config
    from transformers.models.mistral3.modeling_mistral3 import Mistral3MultiModalProjector

    from mlx_vlm_mini.checkpoints.weights import rename
    from mlx_vlm_mini.families import mistral3
    from mlx_vlm_mini.model import VLM

    vision = {"model_type": "pixtral", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
              "num_attention_heads": 1, "patch_size": 14, "image_size": 1540}  # fmt: skip
    text = {"model_type": "mistral", "hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 9}  # fmt: skip
    torch.manual_seed(3)
    config = Mistral3Config(vision_config=vision, text_config=text)
    tower, projector = AutoModel.from_config(config.vision_config).eval(), Mistral3MultiModalProjector(config).eval()
    pixels = np.random.default_rng(0).normal(size=(1, 1036, 1540, 3)).astype(np.float32)
    with torch.no_grad():
        features = tower(torch.tensor(pixels).permute(0, 3, 1, 2), image_sizes=torch.tensor([[1036, 1540]]))
        expected = projector(features.last_hidden_state[0], torch.tensor([[1036, 1540]])).numpy()
    model = VLM(mistral3.config({"vision_config": vision, "text_config": text}))
    arrays = []
    for prefix, part in (("vision_tower.", tower), ("multi_modal_projector.", projector)):
        for name, tensor in part.state_dict().items():
            (ours,) = rename(prefix + name, mistral3.WEIGHTS)
            array = mx.array(tensor.numpy())
            arrays.append((ours, mx.moveaxis(array, 1, -1) if array.ndim == 4 else array))
    model.load_weights(arrays, strict=False)
    found = np.array(model.projector(model.vision(mx.array(pixels))))[0]
    np.testing.assert_allclose(found, expected, atol=1e-4)
