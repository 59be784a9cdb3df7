"""Converting models that draw: what stays in floating point, what follows the head's bits, and the same pictures after."""

import numpy as np
import pytest
from published import published
from reference import GOLDEN

from mlx_vlm_mini import imagine, load
from mlx_vlm_mini.checkpoints.folder import open_checkpoint
from mlx_vlm_mini.checkpoints.load import plan
from mlx_vlm_mini.convert import convert
from mlx_vlm_mini.convert.quantize import choose, plan_outputs, spread

NAME = "deepseek-community/Janus-Pro-1B"
DRAWS = ("model.vqmodel.", "model.generation_")
HEADS = {"model.generation_head.proj_out", "model.generation_head.vision_head"}


@pytest.fixture(scope="module")
def planned():
    return plan(published(NAME))


def quantized(planned, bits, **parts):
    _, found, skipped = plan_outputs(planned, spread(planned, choose(bits, 64, "affine", parts)), None)
    assert not skipped
    return {name: each.bits for name, each in found.items()}


def test_what_draws_stays_in_floating_point_but_its_head(planned):
    found = quantized(planned, 4)
    assert {name for name in found if name.startswith(DRAWS)} == HEADS
    assert {found[name] for name in HEADS} == {4} and found["lm_head"] == 4


def test_the_head_that_draws_follows_the_heads_bits(planned):
    found = quantized(planned, 4, head=8)
    assert {found[name] for name in HEADS} == {8} and found["lm_head"] == 8
    assert found["model.language_model.layers.0.mlp.up_proj"] == 4


def test_the_projectors_bits_reach_wide_layers_alone(planned):
    found = quantized(planned, 4, projector=8)
    wide = {"model.generation_aligner.hidden_layers.0", "model.aligner.fc1", "model.aligner.hidden_layers.0"}
    assert {name for name, bits in found.items() if bits == 8} == wide
    assert not [
        name
        for name in found
        if "vqmodel" in name
        or "generation_embeddings" in name
        or (name.endswith("aligner.fc1") and "generation" in name)
    ]


def test_a_converted_model_draws_the_same(tmp_path):
    """In MLX's layout of convolutions, and back in the Hub's names."""
    convert(GOLDEN / "janus", tmp_path / "out")
    names = open_checkpoint(tmp_path / "out").tensors
    assert names["model.vqmodel.decoder.conv_in.weight"].shape == (32, 3, 3, 16)
    with np.load(GOLDEN / "janus" / "expected.npz") as expected:
        tokens, pixels = (expected[f"draw-circle-5/{what}"] for what in ("token_ids", "pixels"))
    (drawn,) = imagine(*load(tmp_path / "out"), "a red circle", temperature=0)
    assert list(drawn.token_ids) == tokens.tolist()
    assert np.abs(np.array(drawn.image).astype(int) - pixels).max() <= 1
