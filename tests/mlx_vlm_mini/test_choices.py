"""How probable each of several answers is: one prompt read once, and the same as each answer run by itself."""

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import PHOTO
from goldens import SPECS
from reference import GOLDEN

from mlx_vlm_mini import Chat, Engine, batch_generate, load, score, stream_generate
from mlx_vlm_mini.decoder.decoder import Decoder
from mlx_vlm_mini.errors import PromptError
from mlx_vlm_mini.generation.cache import make_state
from mlx_vlm_mini.generation.constraints import Constraint, Vocabulary
from mlx_vlm_mini.generation.decode import prefill, score_continuations
from mlx_vlm_mini.generation.options import Options

ASK = ["Look", PHOTO]
CHOICES = ["yes", "no", "maybe so", "ça 🙂"]
CHECKED = ("llava-clip-llama", "qwen2.5-vl", "qwen3.5", "mllama-meta", "paligemma-gemma", "qwen-vl-chat")


def ways_of(model, processor, choices):
    """Each choice's ways to be written."""
    count = model.config.decoder.vocab_size
    form = Options(choices=choices).form
    constraint = Constraint(form, lambda: Vocabulary(processor.tokenizer, count, processor.eos_token_ids, ()))
    return [constraint.ways(choice) for choice in choices]


def run_each(model, processor, tokens, ends=()):
    """The log-probability of these tokens after the prompt, by reading prompt and tokens at once."""
    inputs = processor(ASK).followed_by([*tokens])
    logits = np.array(model(inputs)[0, -len(tokens) - 1 :].astype(mx.float32)).astype(np.float64)
    logprobs = logits - logits.max(axis=-1, keepdims=True)
    logprobs -= np.log(np.exp(logprobs).sum(axis=-1, keepdims=True))
    total = sum(logprobs[place, token] for place, token in enumerate(tokens))
    return total + (np.log(np.exp(logprobs[-1][[*ends]]).sum()) if ends else 0)


def check(name, choices=CHOICES):
    model, processor = load(GOLDEN / name)
    found = score(model, processor, ASK, choices=choices, prefill_step=9)
    assert [each.text for each in found] == list(choices)
    expected = [
        np.logaddexp.reduce([run_each(model, processor, way) for way in each])
        for each in ways_of(model, processor, choices)
    ]
    np.testing.assert_allclose([each.logprob for each in found], expected, atol=1e-4)
    odds = np.exp(np.array(expected) - np.max(expected))
    np.testing.assert_allclose([each.probability for each in found], odds / odds.sum(), atol=1e-4)
    assert sum(each.probability for each in found) == pytest.approx(1)


@pytest.mark.parametrize("name", CHECKED)
def test_each_equals_its_own_run(name):
    check(name)


@pytest.mark.reference
@pytest.mark.parametrize("name", sorted(SPECS))
def test_each_equals_its_own_cached_run_in_every_family(name):
    compare_with_decoding(name)


@pytest.mark.parametrize("name", ["internvl-chat-internlm2", "llava-clip-llama"])
def test_each_equals_its_own_cached_run(name):
    compare_with_decoding(name)


def compare_with_decoding(name):
    """Token by token after a prompt that is read anew for each."""
    model, processor = load(GOLDEN / name)
    found = score(model, processor, ASK, choices=CHOICES)
    for one, ways in zip(found, ways_of(model, processor, CHOICES), strict=True):
        totals = []
        for way in ways:
            state, total = model.make_state(), 0.0
            logits = prefill(model.decoder, model.read(processor(ASK)), state)
            for token in way:
                logprobs = logits[0] - mx.logsumexp(logits[0])
                total += logprobs[token].item()
                logits = model.decoder.logits(model.decoder(model.decoder.read(mx.array([[token]])), state))[:, -1]
            totals.append(total)
        assert one.logprob == pytest.approx(np.logaddexp.reduce(totals), abs=1e-4)


def test_a_choice_that_begins_another_has_to_end(llava):
    """Else the shorter one could only be the more probable."""
    model, processor = llava
    choices = ["1", "12", "2"]
    ways = ways_of(model, processor, choices)
    assert ways[1][0][: len(ways[0][0])] == ways[0][0]
    ends = [*processor.eos_token_ids]
    expected = [np.logaddexp.reduce([run_each(model, processor, way, ends) for way in each]) for each in ways]
    np.testing.assert_allclose([each.logprob for each in score(*llava, ASK, choices=choices)], expected, atol=1e-4)


def test_what_choices_share_is_read_once(llava, monkeypatch):
    """The prompt in one piece, and after it no token twice."""
    read = []
    run = Decoder.__call__
    monkeypatch.setattr(
        Decoder, "__call__", lambda self, reading, *given: read.append(reading.length) or run(self, reading, *given)
    )
    choices = ["yes it is", "yes it was", "yes"]
    ways = [way for each in ways_of(*llava, choices) for way in each]
    score(*llava, ASK, choices=choices)
    prompt = len(llava[1](ASK).slots)
    needed = {way[: place + 1] for way in ways for place in range(len(way))}  # their ends count
    assert read[0] == prompt and sum(read[1:]) == len(needed)
    read.clear()
    score(*llava, ASK, choices=["a", "b"])
    assert sum(read[1:]) == len({way[:-1] for each in ways_of(*llava, ["a", "b"]) for way in each} - {()})


def test_the_state_holds_the_prompt_afterwards(llava):
    """Answers are what they are without: alone, in a conversation, in a batch; and choices are the same in all."""
    model, processor = llava
    asked = {"choices": CHOICES, "max_tokens": 20}
    plain = [chunk.token for chunk in stream_generate(model, processor, ASK, **asked)]
    chunks = [*stream_generate(model, processor, ASK, **asked, probabilities=True)]
    assert [chunk.token for chunk in chunks] == plain and len({chunk.choices for chunk in chunks}) == 1
    assert not next(iter(stream_generate(model, processor, ASK, **asked))).choices
    (row,) = batch_generate(model, processor, [ASK], **asked, probabilities=True)
    with Engine(model, processor) as engine:
        request = [*engine.submit(ASK, **asked, probabilities=True)]
    for others in (row.choices, request[0].choices):
        np.testing.assert_allclose(
            [each.logprob for each in others], [each.logprob for each in chunks[0].choices], atol=1e-4
        )
    assert row.token_ids == plain
    chat = Chat(model, processor)
    talked = [*chat.send(ASK, **asked, probabilities=True)]
    assert [chunk.token for chunk in talked] == plain
    again = [chunk.token for chunk in chat.send("And?", max_tokens=8)]
    assert again == [chunk.token for chunk in stream_generate(model, processor, chat.messages[:-1], max_tokens=8)]


@pytest.mark.parametrize("cache", [{"rotate": 24}, {"kv_bits": 8}], ids=["rotating", "quantized"])
def test_other_caches(llava, cache):
    """One that gives tokens up is read on in copies; the state is as it was."""
    model, processor = load()
    inputs = processor(["Is there a star?" * 3])
    sequences = [[5, 6, 7], [5, 6, 8], [9]]

    def begin():
        state = make_state(model, **cache)
        return prefill(model.decoder, model.read(inputs), state), state

    logits, state = begin()
    found = score_continuations(model.decoder, logits, state, sequences)
    for wanted, total in zip(sequences, found, strict=True):
        logits, fresh = begin()
        alone = 0.0
        for token in wanted:
            alone += (logits[0] - mx.logsumexp(logits[0]))[token].item()
            logits = model.decoder.logits(model.decoder(model.decoder.read(mx.array([[token]])), fresh))[:, -1]
        assert total == pytest.approx(alone, abs=1e-4)
    assert state.start == len(inputs.slots)
    after = [
        np.array(model.decoder.logits(model.decoder(model.decoder.read(mx.array([[3]])), each))[0, -1])
        for each in (state, begin()[1])
    ]
    np.testing.assert_allclose(*after, atol=1e-4)


def test_what_is_refused(llava):
    with pytest.raises(PromptError, match="choice 2 is empty"):
        score(*llava, ASK, choices=["a", ""])
    with pytest.raises(PromptError, match="probabilities are those of choices"):
        Options(probabilities=True)
    with pytest.raises(PromptError, match="there must be 1 to"):
        score(*llava, ASK, choices=[])
