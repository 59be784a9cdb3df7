"""Steps of decoding that are traced once: whom they serve, and that they are those of the caches (test_parity.py compares
every family's with the reference)."""

import gc
import shutil
import weakref
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import PHOTO
from reference import GOLDEN

from mlx_vlm_mini import Chat, load, stream_generate
from mlx_vlm_mini.decoder.reading import Reading
from mlx_vlm_mini.decoder.rope import make_rope
from mlx_vlm_mini.generation import step as step_module
from mlx_vlm_mini.generation.cache import make_state
from mlx_vlm_mini.generation.decode import prefill
from mlx_vlm_mini.generation.step import COMPILE, compiles, make_step, trace_fault
from mlx_vlm_mini.layers import kernels

ASK = "What is in this image?"


def answer(model, processor, tokens=12, **options):
    chunks = list(stream_generate(model, processor, ASK, images=[PHOTO], max_tokens=tokens, **options))
    return [chunk.token for chunk in chunks], [chunk.logprob for chunk in chunks]


def read(model, length):
    """A state that holds so many random tokens, and the step behind them."""
    state = model.make_state()
    mx.random.seed(length)
    reading = Reading(mx.random.normal((1, length, model.config.decoder.hidden_size)))
    mx.eval(prefill(model.decoder, reading, state))
    return state, make_step(model.decoder, state)


def is_traced(step):
    return step.__name__ == "traced"


@pytest.mark.parametrize(
    ("name", "served"),
    [
        ("llava-clip-llama", True), ("gemma3-hub", True), ("qwen2.5-vl", True), ("paligemma2-gemma2", True),
        ("internvl-chat-internlm2", False), ("mllama-meta", False), ("qllama", False), ("qwen-vl-chat", False),
        ("blip2-opt", False),
    ],
)  # fmt: skip
def test_steps_are_traced_where_keys_values_and_a_position_are_all(name, served, traced_steps):
    """Not with a scaling by length (that InternVL's), cross-attention, query tokens, log n or OPT's positions."""
    model, _ = load(GOLDEN / name)
    assert is_traced(make_step(model.decoder, model.make_state())) is served


def test_quantized_and_rotating_caches_are_not_traced(traced_steps):
    model, _ = load()
    assert is_traced(make_step(model.decoder, make_state(model)))
    for cache in ({"kv_bits": 8}, {"rotate": 16}):
        assert not is_traced(make_step(model.decoder, make_state(model, **cache)))


def test_the_environment_and_the_device_decide(monkeypatch):
    for value, expected in (("1", True), ("0", False)):
        monkeypatch.setenv(COMPILE, value)
        assert compiles() is expected
    monkeypatch.delenv(COMPILE)
    assert compiles() is (mx.default_device().type == mx.DeviceType.gpu)
    monkeypatch.setenv(COMPILE, "yes")
    assert compiles() is (mx.default_device().type == mx.DeviceType.gpu)


@pytest.mark.parametrize(
    "name", ["llava-clip-llama", "gemma3-hub", "qwen2.5-vl", "mistral3", "llava-next-clip-mistral", "glm4v"]
)
def test_steps_with_mlxs_own_rope_are_the_same(name, traced_steps, monkeypatch):
    """As on a GPU, where it turns by a position that is an array."""
    model, processor = load(GOLDEN / name)
    ours = answer(model, processor)
    del model.decoder.traced_step
    ropes = []
    own = replace(kernels.CPU, rope=lambda *given: ropes.append(given) or kernels.MLX.rope(*given))
    monkeypatch.setitem(kernels._chosen, mx.default_device().type, own)
    theirs = answer(model, processor)
    assert any(isinstance(first, mx.array) for _, _, first, *_ in ropes)
    assert ours[0] == theirs[0]
    np.testing.assert_allclose(ours[1], theirs[1], atol=1e-4)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0}, {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ],
    ids=lambda scaling: scaling["rope_type"],
)  # fmt: skip
def test_a_position_may_be_an_array(scaling, llava, monkeypatch):
    rope = make_rope(replace(llava[0].config.decoder, rope_scaling=scaling))
    x = mx.random.normal((1, 2, 1, llava[0].config.decoder.head_dim))
    monkeypatch.setitem(kernels._chosen, mx.default_device().type, kernels.MLX)
    whole = rope.at(700, 1)(x)
    np.testing.assert_allclose(rope.at(mx.array([700]), 1)(x), whole, atol=1e-5)
    monkeypatch.setitem(kernels._chosen, mx.default_device().type, kernels.CPU)
    np.testing.assert_allclose(rope.at(mx.array([700]), 1)(x), whole, atol=1e-4)


def test_steps_go_on_where_the_caches_grow(llava, traced_steps):
    """Behind 250 tokens, across 256: at each step what reading the whole afresh gives; the caches hold as much."""
    model, _ = llava
    state, step = read(model, 250)
    mx.random.seed(250)
    whole = mx.random.normal((1, 250, model.config.decoder.hidden_size))
    for token in range(5, 17):
        logits = step(mx.array([token]))
        whole = mx.concatenate([whole, model.decoder.embed(mx.array([[token]]))], axis=1)
        fresh = model.decoder.logits(model.decoder(Reading(whole))[:, -1:])[:, 0]
        np.testing.assert_allclose(logits, fresh, atol=1e-4)
        assert {entry.offset for entry in state.layers} == {whole.shape[1]} == {state.length}
    assert state.layers[0].keys.shape[2] == 512


def test_short_answers_are_not_traced(traced_steps, monkeypatch):
    monkeypatch.setattr("mlx_vlm_mini.generation.step.BUILT_FIRST", 4)
    model, processor = load(GOLDEN / "llava-clip-llama")
    answer(model, processor, 5)  # whose last token no step follows
    assert not hasattr(model.decoder, "traced_step")
    answer(model, processor, 6)
    assert hasattr(model.decoder, "traced_step")


def test_what_was_cut_off_is_not_seen(llava, traced_steps):
    model, _ = llava
    state, step = read(model, 20)
    once = np.array(step(mx.array([7])))
    for token in (8, 9):
        mx.eval(step(mx.array([token])))
    assert state.rewind(state.length - 3) == 20
    np.testing.assert_allclose(make_step(model.decoder, state)(mx.array([7])), once, atol=1e-6)


def test_a_turn_after_traced_steps_finds_its_cache(llava, traced_steps, monkeypatch):
    def talk():
        chat = Chat(*llava, max_tokens=6)
        return [[chunk.token for chunk in chat.send(prompt)] for prompt in ([PHOTO, ASK], "And now?")]

    traced = talk()
    monkeypatch.setenv(COMPILE, "0")
    assert talk() == traced


def test_new_weights_are_seen(traced_steps, monkeypatch):
    """As training between two answers changes them."""
    mx.enable_compile()  # the trace itself is what is tested
    if shutil.which("g++") is None:
        pytest.skip("MLX compiles with g++ on a CPU, and there is none")
    model, processor = load(GOLDEN / "llava-clip-llama")
    before = answer(model, processor)
    layer = model.decoder.layers[0].mlp.down_proj
    layer.weight = layer.weight * -3
    after = answer(model, processor)
    monkeypatch.setenv(COMPILE, "0")
    plain = answer(model, processor)
    assert after[0] == plain[0] and before[1] != after[1]
    np.testing.assert_allclose(after[1], plain[1], atol=1e-5)


def test_a_model_with_a_trace_is_freed(traced_steps):
    model, processor = load(GOLDEN / "llava-clip-llama")
    answer(model, processor, 3)
    seen = weakref.ref(model.decoder.layers[0].mlp.down_proj)
    assert seen() is not None
    del model, processor
    gc.collect()
    assert seen() is None


def test_layers_with_a_window_read_their_window_alone(traced_steps, monkeypatch):
    """Gemma 3's, before and after its window is full, and where the store is shorter than the window."""
    model, _ = load(GOLDEN / "gemma3-hub")
    window = model.config.decoder.sliding_window
    lengths = []
    slice_of = mx.slice
    monkeypatch.setattr(
        mx, "slice", lambda array, start, axes, size: lengths.append(size[2]) or slice_of(array, start, axes, size)
    )
    for length in (3, window - 2, window + 5, 250):
        del lengths[:]
        _, step = read(model, length)
        other, _ = read(model, length)
        monkeypatch.setenv(COMPILE, "0")
        plain = make_step(model.decoder, other)
        monkeypatch.setenv(COMPILE, "1")
        for token in range(5, 5 + 4):
            np.testing.assert_allclose(step(mx.array([token])), plain(mx.array([token])), atol=1e-4)
        assert {*lengths} == {window}


@pytest.mark.parametrize("fault", ["differs", "raises"])
def test_a_trace_that_is_wrong_is_never_used(fault, traced_steps, monkeypatch):
    """The answer is the one that is built, and the fault is named."""
    model, processor = load(GOLDEN / "llava-clip-llama")
    monkeypatch.setenv(COMPILE, "0")
    expected = answer(model, processor)
    monkeypatch.setenv(COMPILE, "1")
    real, calls = step_module._trace, []

    def wrong(decoder):
        def step(*given):
            calls.append(1)
            if fault == "raises":
                raise RuntimeError("[metal] no such kernel\nmore")
            logits, held = real(decoder)(*given)
            return logits + 0.01 * mx.arange(logits.shape[1]), held

        return step

    monkeypatch.setattr(step_module, "_trace", wrong)
    assert answer(model, processor) == expected == answer(model, processor)
    assert len(calls) == 1 and not hasattr(model.decoder, "traced_step")
    assert ("differ by" if fault == "differs" else "tracing failed: [metal] no such kernel") in trace_fault(
        model.decoder
    )
    assert "more" not in trace_fault(model.decoder)
