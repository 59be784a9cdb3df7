"""The reference suite of Qwen3.5, its experts and Qwen3-VL's: what the goldens do not hold, live against transformers.

pytest -m reference        needs the `reference` extra
"""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import published
import pytest
from parity import changed, check_answer, check_turns
from reference import CASES, GOLDEN, SPECS, Reference
from video_reference import CASES as VIDEOS
from video_reference import LIMITS, TEMPLATE, VideoReference

from mlx_vlm_mini import load
from mlx_vlm_mini.checkpoints.load import plan
from mlx_vlm_mini.layers.delta import gated_delta

pytestmark = pytest.mark.reference

ROPE = {"rope_theta": 1e4, "rope_type": "default", "mrope_interleaved": True}
VARIANTS = {  # text config, image processor
    "sections": ("qwen3.5", {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.25, "mrope_section": [1, 1, 2]}}, {}),
    "half of a head": ("qwen3.5", {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5, "mrope_section": [4, 2, 2]}}, {}),
    "eps": ("qwen3.5", {"rms_norm_eps": 0.05}, {}),
    "large pictures": ("qwen3.5", {}, {"size": {"shortest_edge": 20000, "longest_edge": 30000}}),
    "one expert": ("qwen3.5-moe", {"num_experts_per_tok": 1}, {}),
    "all experts": ("qwen3.5-moe", {"num_experts_per_tok": 5}, {}),
    "one expert of Qwen3-VL": ("qwen3-vl-moe", {"num_experts_per_tok": 1}, {}),
    "a tie that the head in the file contradicts": ("qwen3-vl-moe", {"tie_word_embeddings": True}, {}),
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(VARIANTS))
def test_variants(kind, tmp_path):
    name, text, image = VARIANTS[kind]
    folder = changed(name, tmp_path / "model", text, {}, image)
    for case in ("side_by_side", "two_turns"):
        expected = Reference(folder, SPECS[name].chat_template).answer(CASES[case], GOLDEN, 5)
        check_answer(*load(folder), CASES[case], expected)


@pytest.mark.parametrize("step", [1, 2, 63, 64, 65, 128])
def test_pieces_of_a_long_prompt(step):
    expected = Reference(GOLDEN / "qwen3.5", SPECS["qwen3.5"].chat_template).answer(CASES["chunks"], GOLDEN, 8)
    check_answer(*load(GOLDEN / "qwen3.5"), CASES["chunks"], expected, step=step)


@pytest.mark.parametrize("name", ["qwen3.5", "qwen3.5-moe"])
def test_later_turns(name):
    """Whose states were kept from the turns before."""
    check_turns(name, Reference(GOLDEN / name, SPECS[name].chat_template))


@pytest.mark.parametrize("name", ["qwen3.5", "qwen3.5-moe", "qwen3-vl-moe"])
def test_videos(name):
    reference, (model, processor) = VideoReference(GOLDEN / name), load(GOLDEN / name)
    processor.chat_template = replace(processor.chat_template, source=TEMPLATE)
    found = processor.video_settings
    grid = replace(found.grid, min_pixels=LIMITS["shortest_edge"], max_pixels=100000)
    processor.video_settings = replace(found, images=replace(found.images, tiling=grid))
    for case, messages in VIDEOS.items():
        expected = reference.answer(messages, own_positions=case == "timed")
        check_answer(model, processor, messages, expected)


@pytest.mark.parametrize("length", [1, 7, 64, 65, 200])
def test_the_recurrence_equals_transformers(length):
    import torch
    from transformers.models.qwen3_5 import modeling_qwen3_5 as reference

    rng = np.random.default_rng(length)
    q, k = rng.normal(size=(2, 2, length, 4, 16)).astype(np.float32)
    v = rng.normal(size=(2, length, 4, 8)).astype(np.float32)
    g, b = -0.1 * rng.exponential(size=(2, length, 4)), rng.uniform(size=(2, length, 4))
    state = rng.normal(size=(2, 4, 16, 8)).astype(np.float32)
    g, b = g.astype(np.float32), b.astype(np.float32)
    expected, after = reference.torch_chunk_gated_delta_rule(
        *(torch.tensor(each) for each in (q, k, v)), g=torch.tensor(g), beta=torch.tensor(b),
        initial_state=torch.tensor(state), output_final_state=True, use_qk_l2norm_in_kernel=True,
    )  # fmt: skip
    unit = [each / np.sqrt((each**2).sum(axis=-1, keepdims=True) + 1e-6) for each in (q, k)]
    given = unit[0] * 16**-0.5, unit[1], v, g, b, state.swapaxes(2, 3)
    out, found = gated_delta(*(mx.array(each.astype(np.float32)) for each in given))
    np.testing.assert_allclose(np.array(out), expected.numpy(), atol=2e-5)
    np.testing.assert_allclose(np.array(found), after.numpy().swapaxes(2, 3), atol=2e-5)


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe", "qwen3_vl_moe"])
def test_tensors_of_the_classes_own_sizes(family):
    """Every name and shape that transformers' class has has its place; that of no config.json's numbers, too."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.for_model(family)
    config.vision_config.out_hidden_size = config.text_config.hidden_size
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    for given in (config.to_dict(), {"model_type": family, "vision_config": {"out_hidden_size": shapes["model.language_model.norm.weight"][0]}}):  # fmt: skip
        planned = plan(published.without_data(given, shapes))
        assert planned.unused == () and set(planned.ours.values()) == set(shapes)


SIZES = [name for name in published.CONFIGS if name.startswith(("Qwen/Qwen3.5", "Qwen/Qwen3-VL-2", "Qwen/Qwen3-VL-3"))]
OTHERS = ("MiniCPM", "Ministral", "Devstral", "LightOn", "granite", "Qianfan")


@pytest.mark.parametrize("name", [*SIZES, *(name for name in published.CONFIGS if any(one in name for one in OTHERS))])
def test_published_sizes(name):
    """All tensors that transformers' class of this size has on the meta device have their place, and no other is asked
    for; of those that the Hub names so, names and shapes are the same."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    given = published.CONFIGS[name]
    config = AutoConfig.for_model(**given)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    tied = set(getattr(model, "_tied_weights_keys", ())) if config.tie_word_embeddings else set()
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items() if key not in tied}
    checkpoint = published.published(name)
    found, expected = plan(published.without_data(given, shapes)), plan(checkpoint)
    assert found.unused == () and found.ours.keys() == expected.ours.keys()
    if found.family.__name__.rpartition(".")[2].startswith(tuple(published.LATER)):
        stored = {key: info.shape for key, info in checkpoint.tensors.items()}
        experts = {key for key in shapes if ".experts." in key} if given["model_type"] == "qwen3_vl_moe" else set()
        turned = {key: (shape[0], shape[2], shape[1]) for key, shape in shapes.items() if key in experts}
        assert {key: tuple(shape) for key, shape in stored.items()} == {**shapes, **turned}


@pytest.mark.parametrize("name", ["qwen3.5", "qwen3.5-moe", "qwen3-vl-moe"])
def test_what_is_converted_transformers_reads(name, tmp_path):
    """Written back in torch's form, as `train --save` and uploads for others are; names are the source's."""
    from safetensors.torch import load_file, save_file

    from mlx_vlm_mini.convert import convert

    convert(GOLDEN / name, tmp_path / "mlx")
    tensors = load_file(tmp_path / "mlx" / "model.safetensors")
    for key in tensors:
        if key.endswith(("patch_embed.proj.weight", "conv1d.weight")):
            tensors[key] = tensors[key].movedim(-1, 1).contiguous()
    save_file(tensors, tmp_path / "mlx" / "model.safetensors", {"format": "pt"})
    answer = Reference(tmp_path / "mlx", SPECS[name].chat_template).answer(CASES["image"], GOLDEN, 3)
    with np.load(GOLDEN / name / "expected.npz") as expected:
        np.testing.assert_allclose(answer["logprobs"], expected["image/logprobs"][:3], atol=2e-5, rtol=1e-5)
