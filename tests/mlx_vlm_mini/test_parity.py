"""Golden parity, the test of most worth: image file and messages -> our token ids and log-probabilities, equal to the
reference's (tests/golden/reference.py made checkpoints and outputs) within 1e-4 in float32."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import with_paths
from goldens import CASES_OF_GOLDENS, SPECS, one_case
from reference import CASES, GOLDEN, STEPS

from mlx_vlm_mini import load
from mlx_vlm_mini.decoder.state import State
from mlx_vlm_mini.generation.decode import Chooser, decode, prefill
from mlx_vlm_mini.generation.features import Features
from mlx_vlm_mini.generation.options import Options
from mlx_vlm_mini.generation.stream import stream_generate, stream_inputs

TOLERANCE = 1e-4
every_case = pytest.mark.parametrize(("golden", "case"), CASES_OF_GOLDENS, indirect=["golden"], scope="module")


@pytest.fixture(scope="module", params=sorted(SPECS))
def golden(request: pytest.FixtureRequest) -> Iterator[tuple[Any, Any, dict[str, np.ndarray]]]:
    model, processor = load(GOLDEN / request.param)
    with np.load(GOLDEN / request.param / "expected.npz") as expected:
        yield model, processor, dict(expected)


def log_softmax(logits: mx.array) -> np.ndarray:
    """In float64, as MLX's sum on a CPU is not exact enough to be compared by."""
    exact = np.array(logits.astype(mx.float32)).astype(np.float64)
    exact -= exact.max(axis=-1, keepdims=True)
    return exact - np.log(np.exp(exact).sum(axis=-1, keepdims=True))


@every_case
def test_inputs_equal_the_reference(golden, case):
    _, processor, expected = golden
    inputs = processor(with_paths(CASES[case]))
    np.testing.assert_array_equal(np.array(inputs.input_ids[0]), expected[f"{case}/prompt_ids"])
    if f"{case}/pixel_values" in expected:
        kept = expected[f"{case}/pixel_values"]
        if kept.shape[2] == 1:  # of images of different sizes, pixel after pixel
            pieces = [piece.reshape(-1, 3) for image in inputs.images for piece in image.pieces]
            pixels = np.concatenate(pieces)[None, :, None]
        else:
            pixels = np.array(inputs.pixel_values)
        step = -(-pixels.shape[1] // kept.shape[1])
        np.testing.assert_allclose(pixels[:, ::step, ::step], kept, atol=1e-5)
    else:
        assert inputs.pixel_values is None


@pytest.mark.parametrize("golden", sorted(SPECS), indirect=True, scope="module")
def test_each_image_is_encoded_once(golden, monkeypatch):
    """By the runs of the vision tower, read whole or for an answer, also where no features are kept; one run for rows of
    one size."""
    model, processor, expected = golden
    found = [processor(with_paths(CASES[case])) for case in {key.partition("/")[0] for key in expected} & set(CASES)]
    inputs = max(found, key=lambda each: len(each.images))
    calls, tower = [], type(model.vision)
    run = tower.__call__
    monkeypatch.setattr(tower, "__call__", lambda *given: calls.append(1) or run(*given))

    def count(call: Callable[[], Any]) -> int:
        calls.clear()
        call()
        return len(calls)

    once = sum({image.digest: len(image.pieces) for image in inputs.images}.values())
    every = sum(len(image.pieces) for image in inputs.images)
    assert once >= 1 and count(lambda: [model.encode(image) for image in inputs.images]) == every
    assert count(lambda: model(inputs)) == once
    options, none = Options(max_tokens=2), Features(0)
    answer = partial(stream_inputs, model, processor, inputs, options=options, features=none)
    assert count(lambda: list(answer(model.make_state()))) == once


@every_case
def test_every_prompt_logit_equals_the_reference(golden, case):
    model, processor, expected = golden
    inputs = processor(with_paths(CASES[case]))
    logprobs = log_softmax(model(inputs)[0])
    read = np.minimum(np.array(inputs.input_ids[0, 1:]), logprobs.shape[1] - 1)  # an image token may have no score
    own = np.take_along_axis(logprobs[:-1], read[:, None], axis=-1)[:, 0]
    np.testing.assert_allclose(own, expected[f"{case}/prompt_logprobs"], atol=TOLERANCE)
    np.testing.assert_allclose(logprobs[-1], expected[f"{case}/logprobs"][0], atol=TOLERANCE)


@pytest.mark.parametrize("step", [5, 512])
@every_case
def test_cached_decoding_equals_the_reference(golden, case, step):
    """Prefill in chunks of `step`, then every token's whole distribution."""
    model, processor, expected = golden
    cache = model.make_state()
    inputs = processor(with_paths(CASES[case]))
    logits = prefill(model.decoder, model.read(inputs), cache, step=step)
    for i, token in enumerate(expected[f"{case}/token_ids"].tolist()):
        logprobs = log_softmax(logits[0])
        np.testing.assert_allclose(logprobs, expected[f"{case}/logprobs"][i], atol=TOLERANCE)
        assert int(logprobs.argmax()) == token
        logits = model.decoder.logits(model.decoder(model.decoder.read(mx.array([[token]])), cache))[:, -1]


def check_stream(golden, case):
    """Tokens and log-probabilities as the reference's; returns the chunks."""
    model, processor, expected = golden
    chunks = list(stream_generate(model, processor, with_paths(CASES[case]), max_tokens=STEPS))
    tokens = expected[f"{case}/token_ids"].tolist()
    assert [chunk.token for chunk in chunks] == tokens
    chosen = expected[f"{case}/logprobs"][np.arange(STEPS), tokens]
    np.testing.assert_allclose([chunk.logprob for chunk in chunks], chosen, atol=TOLERANCE)
    return chunks


@every_case
def test_streaming_equals_the_reference(golden, case):
    chunks, tokens = check_stream(golden, case), golden[2][f"{case}/token_ids"].tolist()
    assert [chunk.finish_reason for chunk in chunks] == [None] * (STEPS - 1) + ["length"]
    whole = golden[1].tokenizer.decode(tokens)
    if "\ufffd" not in whole:  # bytes that are no UTF-8 decode differently once more of them follow
        assert "".join(chunk.text for chunk in chunks) == whole


@pytest.mark.parametrize(("golden", "case"), one_case.values(), indirect=["golden"], scope="module")
def test_streaming_by_traced_steps_equals_the_reference(golden, case, traced_steps):
    check_stream(golden, case)


def test_cached_equals_uncached(golden):
    """Token by token: decoding with the cache gives what reading the whole sequence afresh gives."""
    model, processor, _ = golden
    inputs = processor(with_paths(CASES["image"]))
    state = model.make_state()
    logits = prefill(model.decoder, model.read(inputs), state, step=7)
    choose = Chooser(mx.zeros(0, dtype=mx.int32), lambda logprobs: mx.argmax(logprobs, axis=-1))
    tokens = decode(model.decoder, logits, state, max_tokens=STEPS, choose=choose)
    for token in tokens:
        fresh = log_softmax(model(inputs)[0, -1])
        assert int(fresh.argmax()) == token.id
        assert fresh[token.id] == pytest.approx(token.logprob, abs=TOLERANCE)
        inputs = inputs.followed_by([token.id])


@pytest.mark.parametrize("golden", sorted(SPECS), indirect=True, scope="module")
def test_rows_of_a_batch_equal_the_rows_alone(golden):
    """Sequences of different lengths, with different images, decoded together; then fewer of them, in another order."""
    model, processor, expected = golden
    cases = sorted({key.partition("/")[0] for key in expected} & set(CASES))[:4]
    tokens = [expected[f"{case}/token_ids"].tolist() for case in cases]
    states = [model.make_state() for _ in cases]
    for case, state in zip(cases, states, strict=True):
        mx.eval(prefill(model.decoder, model.read(processor(with_paths(CASES[case]))), state))
    kept = model.decoder

    def step(state, column, rows):
        logits = kept.logits(kept(kept.read(mx.array([[tokens[row][column]] for row in rows])), state))[:, -1]
        return [log_softmax(row) for row in logits]

    rows = [*range(len(cases))]
    batch = State.merge(states)
    assert np.array(batch.length).tolist() == [state.start for state in states] or batch.length == states[0].start
    for column in range(STEPS):
        if column == 3 and len(rows) > 1:
            rows = rows[:0:-1]
            batch.keep(rows)
        together = step(batch, column, rows)
        for place, row in enumerate(rows):
            (alone,) = step(states[row], column, [row])
            np.testing.assert_allclose(together[place], alone, atol=TOLERANCE)
            assert int(together[place].argmax()) == int(alone.argmax())
    one = batch.extract(0)
    assert one.length == states[rows[0]].start
    np.testing.assert_allclose(step(one, 0, rows[:1])[0], step(states[rows[0]], 0, rows[:1])[0], atol=TOLERANCE)


def test_the_image_matters(golden):
    model, processor, _ = golden
    one, other = (
        log_softmax(model(processor([GOLDEN / name, "What is in this image?"]))[0, -1])
        for name in ("photo.jpg", "shapes.png")
    )
    assert np.abs(one - other).max() > 0.01


def test_explicit_attention_equals_the_fused_one(golden):
    model, processor, _ = golden
    inputs = processor(with_paths(CASES["image"]))
    reading = model.read(inputs)
    weights: list[mx.array] = []
    explicit = model.decoder(reading, attentions=weights)
    fused = model.decoder(reading)
    np.testing.assert_allclose(np.array(explicit), np.array(fused), atol=TOLERANCE)
    length, config = reading.length, model.config.decoder
    spans = () if reading.memory is None else reading.memory.spans
    keys = {"cross_attention": sum(span.held for span in spans), "linear_attention": 0}
    assert [layer.shape for layer in weights] == [
        (1, config.num_attention_heads, length, keys.get(kind, length)) for kind in config.layer_types
    ]
    last = [each for each in weights if each.shape[-1]][-1]  # a linear layer has none
    np.testing.assert_allclose(np.array(last.sum(axis=-1))[..., -1], 1, atol=1e-5)
    seen: list[mx.array] = []
    pixels, tiled, more = mx.array(inputs.images[0].pieces[-1]), model.config.vision.tiled, ()
    if tiled is not None:
        rows = inputs.images[0].rows
        pixels = mx.pad(pixels, [(0, tiled.max_tiles - rows), (0, 0), (0, 0), (0, 0)])[None]
        more = ([(rows // 2, 2)] if rows == 4 else [(rows, 1)],)  # of the photo
    explicit, fused = model.vision(pixels, *more, attentions=seen), model.vision(pixels, *more)
    np.testing.assert_allclose(np.array(explicit), np.array(fused), atol=TOLERANCE)
    if model.config.vision.grid is not None:  # windows come in groups of equal ones
        patches = pixels[..., 0].size // model.config.vision.patch_size**2
        whole, after = model.config.vision.depth, model.config.vision.grid.merged_after
        if after is not None:  # the merger's windows are all patches once more, and then there are a quarter of them
            whole = after + 1 + (whole - after) / 4
        assert sum(part.shape[0] * part.shape[2] for part in seen) == whole * patches
        return
    assert len(seen) == model.config.vision.depth + (0 if tiled is None else tiled.num_global_layers)
