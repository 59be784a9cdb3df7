"""Generation: chunks, seeds, stops, end tokens, processors; and text as it streams."""

import json

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import PHOTO, with_paths
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import CASES, GOLDEN

from mlx_vlm_mini import generate, load, stream_generate
from mlx_vlm_mini.decoder.masks import Rows, causal_mask
from mlx_vlm_mini.decoder.reading import Reading
from mlx_vlm_mini.errors import PromptError
from mlx_vlm_mini.families import llava as family
from mlx_vlm_mini.generation.answering import _StopFilter
from mlx_vlm_mini.generation.decode import prefill
from mlx_vlm_mini.generation.options import Options
from mlx_vlm_mini.text.tokenizer import TextStream

ASK = "What is in this image?"


def test_prefill_scores_the_last_token_only(llava):
    """Whatever the chunks: the logits of one row, and the cache holds the prompt."""
    model, processor = llava
    reading = model.read(processor(ASK, [PHOTO]))
    reference = model(processor(ASK, [PHOTO]))[:, -1]
    for step in (1, 4, 36, 37, 38, 1000):
        state, seen = model.make_state(), list[tuple[int, int]]()
        logits = prefill(model.decoder, reading, state, step=step, progress=lambda *at, seen=seen: seen.append(at))
        assert logits.shape == (1, model.config.decoder.vocab_size)
        np.testing.assert_allclose(np.array(logits), np.array(reference), atol=1e-4)
        assert [entry.offset for entry in state.layers] == [37] * len(model.decoder.layers) and state.length == 37
        assert seen == [(done, 37) for done in range(step, 37, step)]


def test_generate_is_stream_generate_joined(llava):
    chunks = list(stream_generate(*llava, ASK, images=[PHOTO], max_tokens=12))
    assert generate(*llava, ASK, images=[PHOTO], max_tokens=12) == "".join(chunk.text for chunk in chunks)
    assert len(chunks) == 12
    stats = chunks[-1].stats
    assert (stats.prompt_tokens, stats.image_tokens, stats.cached_tokens, stats.generated_tokens) == (37, 9, 0, 12)
    assert 0 < stats.image_s < stats.first_token_s and stats.decode_s > 0 and stats.peak_memory_bytes > 0
    assert stats.prefill_s == pytest.approx(stats.first_token_s - stats.image_s)


def test_a_seed_repeats_an_answer(llava):
    def tokens(**options):
        chunks = stream_generate(*llava, ASK, images=[PHOTO], max_tokens=12, temperature=1.5, **options)
        return [chunk.token for chunk in chunks]

    assert tokens(seed=1) == tokens(seed=1) == tokens(seed=1, top_k=10**6)
    assert tokens(seed=1) != tokens(seed=2)
    assert tokens(seed=1) != [chunk.token for chunk in stream_generate(*llava, ASK, images=[PHOTO], max_tokens=12)]
    assert tokens(seed=1, top_k=1) == [
        chunk.token for chunk in stream_generate(*llava, ASK, images=[PHOTO], max_tokens=12)
    ]


def test_the_logprob_is_the_models_whatever_the_temperature(llava):
    model, processor = llava
    for chunk in stream_generate(model, processor, ASK, images=[PHOTO], max_tokens=1, temperature=3.0, seed=5):
        logits = np.array(model(processor(ASK, [PHOTO]))[0, -1]).astype(np.float64)
        assert chunk.logprob == pytest.approx(logits[chunk.token] - np.log(np.exp(logits).sum()), abs=1e-5)


def test_every_end_token_ends_the_answer(llava):
    model, processor = llava
    tokens = [chunk.token for chunk in stream_generate(model, processor, ASK, images=[PHOTO], max_tokens=6)]
    before = processor.eos_token_ids
    try:
        processor.eos_token_ids = frozenset({99999, tokens[3]})
        chunks = list(stream_generate(model, processor, ASK, images=[PHOTO], max_tokens=6))
    finally:
        processor.eos_token_ids = before
    assert [chunk.token for chunk in chunks] == tokens[:4]
    assert [chunk.finish_reason for chunk in chunks] == [None, None, None, "stop"]
    assert "".join(chunk.text for chunk in chunks) == processor.tokenizer.decode(tokens[:3])


@pytest.mark.parametrize(
    ("listed", "ends"),
    [([7, 9], {2, 7, 9}), (7, {2, 7}), (2, {2}), ([], {2}), (-1, {2}), ([7, -1], {2, 7}), (None, {2})],
)
def test_the_tokenizers_end_and_those_of_the_files(copy_of, listed, ends):
    """A chat model ends a turn with its eos_token, and some files list only what ends a document, or nothing."""
    folder = copy_of()
    assert load(folder)[1].eos_token_ids == {2}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
    assert load(folder)[1].eos_token_ids == ends


def test_stop_strings_end_the_answer_before_them(llava):
    whole = generate(*llava, ASK, images=[PHOTO], max_tokens=5)
    stop = whole[3:5]
    assert stop and whole.index(stop) == 3
    chunks = list(stream_generate(*llava, ASK, images=[PHOTO], max_tokens=5, stop=["never", stop]))
    assert "".join(chunk.text for chunk in chunks) == whole[:3]
    assert chunks[-1].finish_reason == "stop"
    assert generate(*llava, ASK, images=[PHOTO], max_tokens=5, stop="never") == whole


@given(st.lists(st.text("abc", max_size=4), max_size=8), st.lists(st.text("abc", min_size=1, max_size=3), max_size=3))
def test_stop_filter_shows_all_before_the_first_stop(pieces, stops):
    stop_filter, shown, stopped = _StopFilter(tuple(stops)), "", False
    for piece in pieces:
        text, stopped = stop_filter.add(piece)
        shown += text
        if stopped:
            break
    shown += stop_filter.held
    whole = "".join(pieces)
    if stopped:
        assert whole.startswith(shown) and not any(stop in shown for stop in stops)
        assert any(whole[len(shown) :].startswith(stop) for stop in stops)
    else:
        assert shown == whole and not any(stop in whole for stop in stops)


def test_logits_processors_see_the_tokens(llava):
    seen = []

    def forbid(tokens, logits):
        seen.append(len(tokens))
        return mx.where(mx.arange(logits.shape[-1]) == 5, 1e9, logits)

    chunks = list(stream_generate(*llava, ASK, images=[PHOTO], max_tokens=3, logits_processors=[forbid]))
    assert [chunk.token for chunk in chunks] == [5, 5, 5]
    assert seen == [37, 38, 39]


def test_a_repetition_penalty_avoids_repetition():
    """Without it this checkpoint repeats one token over and over."""
    model, processor = load(GOLDEN / "llava-siglip-qwen2")
    messages = with_paths(CASES["two_images"])

    def different(**options):
        return len({chunk.token for chunk in stream_generate(model, processor, messages, max_tokens=10, **options)})

    assert different() < 7
    assert different(repetition_penalty=5.0) > 7


@pytest.mark.parametrize(
    "options",
    [{"max_tokens": 0}, {"temperature": -1}, {"top_p": 2}, {"min_p": -1}, {"prefill_step": 0}, {"seed": 2**70}],
)
def test_options_out_of_range(options):
    with pytest.raises(PromptError, match=next(iter(options))):
        Options(**options)


@pytest.mark.parametrize(
    "text", ["A red circle stands left of a blue square.", "naïve, 漢字 🙂 done", "  two  spaces "]
)
@pytest.mark.parametrize("name", ["llava-clip-llama", "llava-siglip-qwen2"])
def test_text_streams_as_it_decodes(text, name):
    from mlx_vlm_mini.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(GOLDEN / name)
    ids = tokenizer.encode(text, add_special_tokens=False)
    special = tokenizer.token_to_id("<image>")
    for tokens in (ids, [*ids[:3], special, *ids[3:]]):
        stream = TextStream(tokenizer)
        pieces = [stream.add(token) for token in tokens]
        assert not any("\ufffd" in piece for piece in pieces)
        assert "".join(pieces) + stream.finish() == tokenizer.decode(tokens)
    stream = TextStream(tokenizer)
    half = tokenizer.encode("🙂", add_special_tokens=False)[:-1]
    assert "".join(stream.add(token) for token in half).strip() == ""
    assert stream.finish() == tokenizer.decode(half)


@settings(max_examples=50)
@given(st.integers(1, 9), st.integers(0, 9), st.one_of(st.none(), st.integers(1, 9)))
def test_causal_mask(num_queries, offset, window):
    mask = causal_mask(Rows(offset, num_queries), window)
    expected = [
        [key <= query and (window is None or query - key < window) for key in range(offset + num_queries)]
        for query in range(offset, offset + num_queries)
    ]
    if mask is None:
        assert all(map(all, expected))
    elif isinstance(mask, str):
        assert mask == "causal" and expected == np.tri(num_queries, offset + num_queries, offset, bool).tolist()
    else:
        assert mask.tolist() == expected


@pytest.mark.parametrize(
    "scaling",
    [{"rope_type": "dynamic", "factor": 2.0},
     {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "original_max_position_embeddings": 16}],
)  # fmt: skip
def test_a_length_dependent_rope_is_never_cut(scaling):
    """Chunks would turn the first tokens by the angles of a shorter prompt."""
    from mlx_vlm_mini.decoder.decoder import Decoder

    mx.random.seed(0)
    hf = {"vocab_size": 32, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 8,
          "max_position_embeddings": 16, "rope_scaling": scaling}  # fmt: skip
    decoder = Decoder(family.config({"text_config": hf}).decoder)
    reading = Reading(mx.random.normal((1, 40, 16)))
    whole = decoder.logits(decoder(reading))[:, -1]
    pieces = prefill(decoder, reading, decoder.make_state(), step=8)
    np.testing.assert_allclose(np.array(pieces), np.array(whole), atol=1e-4)
