"""Kinds of cache: rotating and quantized ones equal a fresh run with the same, forks cost nothing until they go on."""

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import PHOTO
from reference import GOLDEN

from mlx_vlm_mini import Chat, load
from mlx_vlm_mini.decoder.masks import Rotating, Rows
from mlx_vlm_mini.errors import PromptError
from mlx_vlm_mini.generation.cache import KEEP, make_state
from mlx_vlm_mini.generation.decode import prefill
from mlx_vlm_mini.generation.options import Options
from mlx_vlm_mini.generation.stream import stream_inputs


def check(chat, chunks, **kind):
    """An answer equals that of a new cache of the same kind."""
    model, processor = chat.model, chat.processor
    inputs = processor(chat.messages[:-1])
    options = Options(max_tokens=len(chunks))
    fresh = list(stream_inputs(model, processor, inputs, make_state(model, **kind), options=options))
    assert [chunk.token for chunk in chunks] == [chunk.token for chunk in fresh]
    np.testing.assert_allclose([chunk.logprob for chunk in chunks], [chunk.logprob for chunk in fresh], atol=1e-4)


def test_a_rotating_cache_is_used_again_as_long_as_it_need_not_go_back(llava):
    chat = Chat(*llava, max_tokens=5, rotate=100)
    cached = []
    for turn in ([PHOTO, "What?"], "And now?", "Why?", "How come?"):
        chunks = list(chat.send(turn))
        check(chat, chunks, rotate=100)
        cached.append(chunks[-1].stats.cached_tokens)
    assert cached[0] == 0 and cached[1] > 0 and len(chat.processor(chat.messages).slots) > 100
    chat.undo()
    chunks = list(chat.send("What else?"))
    check(chat, chunks, rotate=100)
    assert chunks[-1].stats.cached_tokens == 0  # it is full, and would have had to go back


def test_what_a_rotating_cache_shows(llava):
    """Prefill in whatever chunks, and token by token, equals reading everything with the mask that is meant."""
    model, processor = llava
    reading, size = model.read(processor([PHOTO, "What is to be seen in this picture, and where?"])), 20
    length = reading.length
    at = np.arange(length)
    meant = (at <= at[:, None]) & ((at > at[:, None] - (size - KEEP)) | (at < KEEP))
    assert (~meant).sum() > length * (length - 1) // 2 + 400
    whole = Rotating(size, KEEP).mask(None, Rows(0, length))
    np.testing.assert_array_equal(np.array(whole), meant)
    states = [make_state(model, rotate=size) for _ in range(4)]
    logits = [
        np.array(prefill(model.decoder, reading, each, step=step))
        for each, step in zip(states, (1, 7, 19, 1000), strict=True)
    ]
    assert np.abs(logits[0] - np.array(prefill(model.decoder, reading, model.make_state()))).max() > 1e-3
    for other in logits[1:]:
        np.testing.assert_allclose(other, logits[0], atol=1e-4)
    tokens = [np.array(model.decoder(model.decoder.read(mx.array([[7]])), each)) for each in states]
    for other in tokens[1:]:
        np.testing.assert_allclose(other, tokens[0], atol=1e-4)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_cache_is_read_anew_each_turn(wide, bits):
    model, processor = load(wide)
    chat = Chat(model, processor, max_tokens=4, kv_bits=bits)
    plain = Chat(model, processor, max_tokens=4)
    for turn in ([PHOTO, "What?"], "And now?"):
        chunks = list(chat.send(turn))
        check(chat, chunks, kv_bits=bits)
        assert chunks[-1].stats.cached_tokens == 0
        apart = [abs(one.logprob - other.logprob) for one, other in zip(chunks, plain.send(turn), strict=True)]
        assert 1e-5 < max(apart) < (0.1 if bits == 8 else 2)
    assert chunks[-1].stats.encoded_images == 0
    assert chat._cache.state.nbytes < plain._cache.state.nbytes / (32 / bits - 2 if bits == 8 else 3)
    other = chat.fork()
    for each in (chat, other):
        check(each, list(each.send("More")), kv_bits=bits)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llava-clip-llama", {"kv_bits": 8}, "heads of 20 numbers cannot be quantized"),
        ("llava-clip-llama", {"kv_bits": 3}, "kv_bits must be 2, 4 or 8"),
        ("llava-clip-llama", {"kv_bits": 4, "rotate": 100}, "choose kv_bits or rotate"),
        ("llava-clip-llama", {"rotate": 3}, "more than 8 tokens"),
        ("llava-clip-mistral", {"rotate": 100}, "a window of their own"),
        ("paligemma-gemma", {"rotate": 100}, "reads a prompt both ways"),
        ("llava-clip-llama", {"on_full": "burst"}, "on_full must be"),
        ("llava-clip-llama", {"context": -1}, "context must be"),
    ],
    ids=str,
)
def test_what_does_not_go_with_a_model_is_refused(name, options, message):
    with pytest.raises(PromptError, match=message):
        Chat(*load(GOLDEN / name), **options)


def test_a_quantized_or_rotating_cache_is_not_saved(llava, tmp_path):
    chat = Chat(*llava, max_tokens=2, rotate=100)
    list(chat.send("Hi"))
    with pytest.raises(PromptError, match="without its cache"):
        chat.save(tmp_path / "a.json", cache=True)
    chat.save(tmp_path / "a.json")
    assert [chunk.token for chunk in Chat.load(tmp_path / "a.json", *llava).send("Go on")] == [
        chunk.token for chunk in chat.send("Go on")
    ]


def test_a_fork_copies_nothing_until_it_goes_on(llava):
    chat = Chat(*llava, max_tokens=3)
    list(chat.send([PHOTO, "What?"]))
    chat._cache.state.evaluate()
    before = mx.get_active_memory()
    forks = [chat.fork() for _ in range(50)]
    mx.eval([entry.state for fork in forks for entry in fork._cache.state.layers])
    kept = chat._cache.state.nbytes
    assert mx.get_active_memory() - before < kept  # of 50 copies
    turn = list(forks[0].send("Hm")), list(chat.send("Hm")), list(forks[1].send("Hm"))
    assert len({tuple(chunk.token for chunk in chunks) for chunks in turn}) == 1
    assert {chunks[-1].stats.cached_tokens for chunks in turn} == {turn[0][-1].stats.cached_tokens} != {0}
