"""Gemma 3 that reads text alone: parity, a window, and everywhere that there are no images."""

import json

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import PHOTO
from click.testing import CliRunner
from gemma3_text import CASES, FOLDER
from mlx.utils import tree_flatten
from parity import TOLERANCE, check_answer
from published import without_data

from mlx_vlm_mini import Chat, attend, load
from mlx_vlm_mini.checkpoints.describe import describe
from mlx_vlm_mini.checkpoints.load import plan
from mlx_vlm_mini.checkpoints.weights import hub_name
from mlx_vlm_mini.cli.main import main
from mlx_vlm_mini.convert import convert
from mlx_vlm_mini.errors import PromptError
from mlx_vlm_mini.families import gemma3_text
from mlx_vlm_mini.model import VLM


@pytest.mark.parametrize("step", [5, 512])
@pytest.mark.parametrize("case", sorted(CASES))
def test_answers_equal_the_reference(case, step):
    model, processor = load(FOLDER)
    with np.load(FOLDER / "expected.npz") as stored:
        expected = {
            what: stored[f"{case}/{what}"] for what in ("prompt_ids", "prompt_logprobs", "token_ids", "logprobs")
        }
    check_answer(model, processor, CASES[case], expected, step=step)
    logits = model(processor(CASES[case]))[0]
    logprobs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    own = np.take_along_axis(logprobs[:-1], expected["prompt_ids"][1:, None], axis=-1)[:, 0]
    np.testing.assert_allclose(own, expected["prompt_logprobs"], atol=TOLERANCE)


def test_images_are_refused_where_they_come():
    model, processor = load(FOLDER)
    message = "^family 'gemma3_text' reads text alone: leave the image out$"
    with pytest.raises(PromptError, match=message):
        processor(["What?", PHOTO])
    chat = Chat(model, processor, max_tokens=2, context=500)
    list(chat.send("Hi"))
    with pytest.raises(PromptError, match=message):
        list(chat.send([PHOTO]))
    assert len(chat.messages) == 2 and list(chat.send("Why?"))[-1].stats.cached_tokens > 5
    with pytest.raises(PromptError, match=message):
        attend(model, processor, [PHOTO])
    with pytest.raises(PromptError, match="has no image"):
        attend(model, processor, "Hi")


def test_it_is_described():
    found = describe(FOLDER, check=True)
    assert found["family"] == "gemma3_text" and "vision" not in found and found["image_token"] is None
    result = CliRunner().invoke(main, ["info", str(FOLDER), "--check"])
    assert result.exit_code == 0 and "projector" not in result.stdout and "kv heads 1" in result.stdout
    assert json.loads(CliRunner().invoke(main, ["info", str(FOLDER), "--json"]).stdout)["decoder"]["layers"] == 4


def test_quantized_and_checked(tmp_path):
    result = convert(FOLDER, tmp_path / "out", bits=8, group_size=16 * 2, check=True, dtype="float32")
    assert result.check is not None and not result.check.problems and result.check.mean_kl < 0.05
    model, processor = load(tmp_path / "out")
    assert model(processor("Hi")).shape[0] == 1


def test_the_one_of_a_billion():
    """google/gemma-3-1b-it: sizes from a copy of its config; 1.00 * 10^9 weights."""
    hf = {
        "model_type": "gemma3_text", "head_dim": 256, "hidden_size": 1152, "intermediate_size": 6912,
        "max_position_embeddings": 32768, "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "rope_local_base_freq": 10000, "rope_scaling": None,
        "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6, "vocab_size": 262144,
    }  # fmt: skip
    config = gemma3_text.config(hf)
    shapes = {name: tuple(array.shape) for name, array in tree_flatten(VLM(config).parameters())}
    checkpoint = without_data(hf, {hub_name(name, gemma3_text.WEIGHTS): shape for name, shape in shapes.items()})
    assert sum(map(checkpoint.num_weights, plan(checkpoint).ours.values())) == pytest.approx(1.0e9, rel=0.01)
    assert (config.decoder.two_way, config.decoder.rope_theta, config.decoder.window.sliding_rope_theta) == (
        "nothing",
        1e6,
        1e4,
    )
