"""The reference suite's part for Janus: the golden anew, variants that answer and draw, pictures' sizes, full-size names."""

import copy
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from janus_cases import SPECS
from parity import check_answer, check_golden
from published import CONFIGS, without_data
from reference import CASES, GOLDEN

from mlx_vlm_mini import imagine, load
from mlx_vlm_mini.checkpoints.load import plan
from mlx_vlm_mini.families import janus
from mlx_vlm_mini.preprocessing.bars import Letterbox

pytestmark = pytest.mark.reference


def test_the_golden_is_what_the_reference_gives_today():
    from janus_reference import expected

    check_golden(GOLDEN / "janus", expected("janus"))


def changed(*, vision=None, text=None, vq=None, **more):
    spec = copy.deepcopy(SPECS["janus"])
    return replace(
        spec, vision={**spec.vision, **(vision or {})}, text={**spec.text, **(text or {})}, vq={**spec.vq, **(vq or {})},
        seed=7, **more,
    )  # fmt: skip


VARIANTS = {
    "three levels, three blocks": changed(vq={"channel_multiplier": [1, 2, 1], "num_res_blocks": 2}),
    "one level": changed(vq={"channel_multiplier": [2]}),
    "no spare blocks": changed(vq={"num_res_blocks": 0}),
    "deeper MLPs": changed(vision={"depth": 3}, vq={"num_hidden_layers": 3}),
    "no biases of queries, keys and values": changed(vision={"attention_bias": False}),
    "grouped queries": changed(text={"num_key_value_heads": 2}),
    "other activations": changed(vision={"hidden_act": "relu"}, vq={"hidden_act": "silu"}),
    "no system prompt": changed(default_system=False),
    "in shards": changed(shards=2),
}


@pytest.mark.parametrize("kind", sorted(VARIANTS))
def test_variants_answer_and_draw(kind, tmp_path):
    from janus_reference import Reference, save

    spec, folder = VARIANTS[kind], tmp_path / "model"
    save(spec, folder)
    reference, (model, processor) = Reference(folder), load(folder)
    for case in ("image", "two_turns"):
        check_answer(model, processor, CASES[case], reference.answer(CASES[case], 5))
    for guidance in (5, 1):
        expected = reference.draw("a red circle", guidance)
        (drawn,) = imagine(model, processor, "a red circle", guidance=guidance, temperature=0)
        assert list(drawn.token_ids) == expected["token_ids"].tolist()
        assert np.abs(np.array(drawn.image).astype(int) - expected["pixels"]).max() <= 1


sides = st.integers(1, 60) | st.integers(1, 5000)


@settings(max_examples=500, deadline=None)
@given(sides, sides, st.sampled_from([(384, 14), (32, 4), (100, 1)]))
def test_sizes_of_pictures(height, width, square):
    from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

    side, least = square
    processor = JanusImageProcessorPil(size={"height": side, "width": side}, min_size=least)
    tiny = np.zeros((3, height, width), dtype=np.uint8)
    shape = processor.resize(tiny, processor.size, least).shape[1:]
    assert Letterbox(side=side, least=least, color=(127,) * 3).fit((height, width)) == shape


def test_defaults_equal_the_reference():
    from transformers import JanusConfig

    ours = janus.config({"model_type": "janus", "text_config": {"hidden_size": 2048, "vocab_size": 32000}})
    theirs = JanusConfig().to_dict()
    theirs["text_config"] |= {"hidden_size": 2048, "head_dim": None}
    found = janus.config(theirs)
    assert (found.vision, found.projector, found.drawing) == (ours.vision, ours.projector, ours.drawing)


@pytest.mark.parametrize("name", [name for name in CONFIGS if "Janus" in name])
def test_full_size_tensors_equal_the_reference(name):
    """Names and shapes that the reference's class gives, on the meta device, all find their place."""
    import torch
    from transformers import JanusConfig, JanusForConditionalGeneration

    hf = CONFIGS[name]
    with torch.device("meta"):
        reference = JanusForConditionalGeneration(JanusConfig(**copy.deepcopy(hf)))
    shapes = {theirs: tuple(tensor.shape) for theirs, tensor in reference.state_dict().items()}
    planned = plan(without_data(hf, shapes))  # refuses what is missing, superfluous or of another shape
    assert all(name.startswith(("model.vqmodel.encoder.", "model.vqmodel.quant_conv.")) for name in planned.unused)
    assert {*planned.ours.values(), *planned.unused} == set(shapes)
