"""Same seed, same answer: in another process, among other answers, after saving and loading, in other pieces."""

import json
import random
import subprocess
import sys
import time

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import PHOTO, PLAIN, SHAPES

from mlx_vlm_mini import Chat, stream_generate

SAMPLED = {"max_tokens": 8, "temperature": 1.3, "top_p": 0.95, "seed": 11}


def ask(llava, prompt="What is it?", **options):
    return stream_generate(*llava, prompt, images=[PHOTO], **{**SAMPLED, **options})


def tokens(chunks):
    return [chunk.token for chunk in chunks]


def test_another_process_gives_the_same_answer(llava):
    program = (
        "import json, sys; from mlx_vlm_mini import load, stream_generate\n"
        "chunks = stream_generate(*load(sys.argv[1]), 'What is it?', images=[sys.argv[2]], **json.loads(sys.argv[3]))\n"
        "print(json.dumps([[chunk.token, chunk.logprob] for chunk in chunks]))"
    )
    command = [sys.executable, "-c", program, str(PLAIN), str(PHOTO), json.dumps(SAMPLED)]
    there = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=120).stdout)
    here, again = ([[chunk.token, chunk.logprob] for chunk in ask(llava)] for _ in range(2))
    assert here == again  # to the last bit
    assert [token for token, _ in there] == [token for token, _ in here]
    np.testing.assert_allclose(there, here, atol=1e-5)  # another number of threads may sum in another order


def test_what_else_draws_numbers_changes_nothing(llava):
    """A seed counts for its answer alone, however the process uses MLX's random numbers beside it."""
    alone, other = tokens(ask(llava)), tokens(ask(llava, seed=12))
    assert alone != other
    one, two = [], []
    for first, second in zip(ask(llava), ask(llava, seed=12), strict=True):
        one.append(first.token)
        mx.random.seed(99)
        two.append(second.token)
        mx.eval(mx.random.uniform(shape=(3,)))
    assert (one, two) == (alone, other)


def test_tokens_of_a_seed_are_independent(llava):
    """The seeds of an answer's tokens are as good as drawn ones: each of eight choices comes about equally often."""
    counts = np.zeros(8)
    even = mx.zeros((1, 8)) - mx.log(mx.array(8.0))
    from mlx_vlm_mini.generation.options import Options

    for seed in range(40):
        sampler = Options(temperature=1.0, seed=seed).make_sampler(8)
        for _ in range(10):
            counts[sampler(even).item()] += 1
    assert counts.min() > 25 and counts.max() < 80  # 50 each; 4 standard deviations


@pytest.mark.parametrize("step", [1, 7, 512])
def test_pieces_of_a_prompt_change_no_token(llava, step):
    """In float32 the prompt's pieces change the last bits of a log-probability and no token."""
    wanted, got = list(ask(llava)), list(ask(llava, prefill_step=step))
    assert tokens(got) == tokens(wanted)
    np.testing.assert_allclose([each.logprob for each in got], [each.logprob for each in wanted], atol=1e-4)


@pytest.mark.parametrize("cache", [True, False])
def test_a_loaded_conversation_draws_what_the_saved_one_does(llava, tmp_path, cache):
    chat = Chat(*llava, **SAMPLED)
    list(chat.send(["What is it?", PHOTO]))
    chat.save(tmp_path / "talk.json", cache=cache)
    loaded = Chat.load(tmp_path / "talk.json", *llava)
    assert loaded.notes == [] and loaded.options["seed"] == 11
    for prompt in ("And now?", ["This?", SHAPES]):
        assert tokens(loaded.send(prompt)) == tokens(chat.send(prompt))


def test_the_clock_is_not_looked_at(llava, tmp_path, monkeypatch):
    """A wall clock that jumps changes no answer, no statistics and no saved conversation."""

    def run(name):
        chat = Chat(*llava, **SAMPLED)
        chunks = list(chat.send(["What is it?", PHOTO]))
        stats = chunks[-1].stats
        assert 0 <= stats.image_s <= stats.first_token_s < 60 and 0 <= stats.decode_s < 60
        chat.save(tmp_path / f"{name}.json")
        return tokens(chunks), (tmp_path / f"{name}.json").read_bytes()

    before, jumps = run("before"), random.Random(1)
    monkeypatch.setattr(time, "time", lambda: jumps.uniform(0, 2**32))
    monkeypatch.setattr(time, "time_ns", lambda: int(jumps.uniform(0, 2**62)))
    assert run("after") == before
