"""attend: what it records is what the model computes, for the query that predicts each token."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import PHOTO, PLAIN, SHAPES, edit_json
from PIL import Image
from reference import GOLDEN

from mlx_vlm_mini import Chat, attend, load, stream_generate
from mlx_vlm_mini.errors import ImageError, PromptError, VLMError
from mlx_vlm_mini.generation.decode import prefill
from mlx_vlm_mini.generation.features import Features
from mlx_vlm_mini.grounding.attend import Rows, _record, encode_answer
from mlx_vlm_mini.grounding.heat import open_pictures
from mlx_vlm_mini.layers import attention
from mlx_vlm_mini.text.messages import to_messages

FAMILIES = (
    "llava-clip-llama", "llava-clip-mistral", "llava-next-clip-mistral", "internvl-qwen2", "internvl-chat-phi3", "idefics3-words",
    "gemma3-hub", "llava-onevision", "llava-original-v0", "paligemma2-gemma2", "qwen2.5-vl", "qwen3-vl",
)  # fmt: skip
ROPES = [
    {"rope_type": "dynamic", "factor": 3.0},
    {
        "rope_type": "longrope",
        "short_factor": [1.0] * 10,
        "long_factor": [3.0] * 10,
        "original_max_position_embeddings": 40,
    },
]
PROMPT = ["What is ", PHOTO, " and ", SHAPES, "?"]


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request):
    return load(GOLDEN / request.param)


def explicit(model, processor, tokens):
    """Weights float[layers, H, S, S] and logits of prompt and answer in one explicit pass, and the prompt's length."""
    inputs = processor(PROMPT)
    weights: list[mx.array] = []
    hidden = model.decoder(model.read(inputs.followed_by(tokens[:-1])), attentions=weights)
    return np.stack([np.array(each[0]) for each in weights]), np.array(model.decoder.logits(hidden)[0]), inputs


def test_the_explicit_path_gives_the_fused_ones_log_probabilities(loaded, either_kernels):
    model, processor = loaded
    chunks = list(stream_generate(model, processor, PROMPT, max_tokens=6))
    heard = []
    found = attend(model, processor, PROMPT, max_tokens=6, listen=heard.append)
    assert found.token_ids == tuple(chunk.token for chunk in chunks) == tuple(chunk.token for chunk in heard)
    assert "".join(found.texts).strip() == "".join(chunk.text for chunk in chunks).strip()
    np.testing.assert_allclose(found.logprobs, [chunk.logprob for chunk in chunks], atol=1e-5)
    given = attend(model, processor, PROMPT, answer=found.token_ids)
    np.testing.assert_allclose(given.logprobs, found.logprobs, atol=1e-5)
    for one, other in zip(given.images, found.images, strict=True):
        np.testing.assert_allclose(one.weights, other.weights, atol=1e-6)


def test_each_token_is_explained_by_the_query_that_predicts_it(loaded, mac_kernels):
    """Row t is the query before token t: the prompt's last one for the first token. What is fused is MLX's own."""
    model, processor = loaded
    tokens = [7, 9, 8, 7]
    found = attend(model, processor, PROMPT, answer=tokens, reduce="none")
    weights, logits, inputs = explicit(model, processor, tokens)
    first, slots = len(inputs.slots) - 1, np.flatnonzero(inputs.slots)
    rows = Rows(slots, [0], [0], "mean")
    cache = model.make_state()
    prefill(model.decoder, model.read(inputs), cache)
    recorded, _ = _record(model, inputs, tokens, cache, Features(), rows)
    np.testing.assert_allclose(recorded, fused(model, inputs, tokens)[first:], rtol=1e-5, atol=1e-5)
    own = np.concatenate([image.weights for image in found.images], axis=-1)
    np.testing.assert_allclose(own, weights[:, :, first:, slots], atol=1e-6)
    np.testing.assert_allclose(found.logprobs, _log_softmax(logits[first:])[range(4), tokens], atol=1e-5)
    if model.config.decoder.sliding_window == 11:  # in which no image is left
        assert not own.any()
        return
    changed = attend(model, processor, PROMPT, answer=[7, 9, 11, 7], reduce="none")
    for one, other in zip(found.images, changed.images, strict=True):
        np.testing.assert_allclose(one.weights[:, :, :3], other.weights[:, :, :3], atol=1e-6)  # token 2 is not read yet
        assert np.abs(one.weights[:, :, 3] - other.weights[:, :, 3]).max() > 1e-5


def fused(model, inputs, tokens):
    """Logits float[S, vocab_size] of prompt and answer by the fused attention, all at once."""
    return np.array(model(inputs.followed_by(tokens[:-1]))[0])


def _log_softmax(logits):
    return (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )


@pytest.mark.parametrize("name", ["llava-clip-llama", "paligemma2-gemma2"])
def test_means_of_layers_and_heads(name):
    model, processor = load(GOLDEN / name)
    config = model.config.decoder
    whole = attend(model, processor, PROMPT, answer=[7, 9], reduce="none")
    assert whole.layers == tuple(range(config.num_hidden_layers)) and len(whole.heads) == config.num_attention_heads
    for layers, heads in ((None, None), ([-1], None), ([0, -1], [1]), (None, [0, -1])):
        found = attend(model, processor, PROMPT, answer=[7, 9], layers=layers, heads=heads)
        same = whole.mean(layers, heads)
        assert (found.layers, found.heads) == (same.layers, same.heads)
        for one, other, all_of_it in zip(found.images, same.images, whole.images, strict=True):
            assert one.weights.dtype == np.float32
            np.testing.assert_allclose(one.weights, other.weights, atol=1e-6)
            rows = all_of_it.weights[list(found.layers)][:, list(found.heads)]
            np.testing.assert_allclose(one.weights, rows.mean(axis=(0, 1)), atol=1e-6)
    assert np.all(whole.shares <= 1) and np.all(whole.shares > 0)


def test_rollout_is_abnars_and_zuidemas(loaded):
    """The product, first layer first, of half the mean of the heads and half the identity."""
    model, processor = loaded
    tokens = [7, 9, 8]
    weights, logits, inputs = explicit(model, processor, tokens)
    flow = np.eye(weights.shape[-1])
    for layer in weights:
        flow = (0.5 * layer.mean(axis=0) + 0.5 * np.eye(len(flow))) @ flow
    first, slots = len(inputs.slots) - 1, np.flatnonzero(inputs.slots)
    found = attend(model, processor, PROMPT, answer=tokens, reduce="rollout")
    own = np.concatenate([image.weights for image in found.images], axis=-1)
    np.testing.assert_allclose(own, flow[first:, slots], atol=1e-6)
    np.testing.assert_allclose(found.logprobs, _log_softmax(logits[first:])[range(3), tokens], atol=1e-5)


@pytest.mark.parametrize("scaling", ROPES, ids=lambda scaling: scaling["rope_type"])
def test_keys_that_turn_with_the_length(copy_of, scaling):
    """Each token is read at its own length, as it is when the model answers; rollout has no such thing."""
    folder = copy_of()
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit_json(folder / "config.json", text_config={**text, "rope_scaling": scaling, "max_position_embeddings": 40})
    model, processor = load(folder)
    prompt = [PHOTO, "What is it?"]
    chunks = list(stream_generate(model, processor, prompt, max_tokens=9))
    length = chunks[-1].stats.prompt_tokens
    assert length < 40 < length + 7
    found = attend(model, processor, prompt, answer=[chunk.token for chunk in chunks])
    np.testing.assert_allclose(found.logprobs, [chunk.logprob for chunk in chunks], atol=1e-5)
    with pytest.raises(PromptError, match=rf"rollout needs keys that stay .* turns them anew at {length} tokens"):
        attend(model, processor, prompt, answer=found.token_ids, reduce="rollout")


@pytest.mark.parametrize("reduce", ["none", "mean", "rollout"])
@pytest.mark.parametrize("name", ["llava-clip-llama", "paligemma2-gemma2"])
def test_weights_that_come_in_blocks_of_queries_are_the_same(name, reduce, monkeypatch):
    model, processor = load(GOLDEN / name)
    whole = attend(model, processor, PROMPT, answer=[7, 9, 8, 7, 9], reduce=reduce)
    monkeypatch.setattr(attention, "BLOCK", 250)
    blocks = attend(model, processor, PROMPT, answer=[7, 9, 8, 7, 9], reduce=reduce)
    for one, other in zip(whole.images, blocks.images, strict=True):
        np.testing.assert_allclose(one.weights, other.weights, atol=1e-6)


@pytest.mark.parametrize("name", ["llava-clip-llama", "paligemma-gemma"])
def test_only_the_answers_queries_are_recorded(name, monkeypatch):
    """None of the prompt's L x L weights is kept or made; answering without attend makes none at all."""
    model, processor = load(GOLDEN / name)
    seen = []
    append = Rows.append
    monkeypatch.setattr(Rows, "append", lambda self, weights: (seen.append(weights.shape), append(self, weights)))
    found = attend(model, processor, PROMPT, answer=[7, 9, 8])
    length, config = len(processor(PROMPT).slots), model.config.decoder
    assert seen == [(1, config.num_attention_heads, 3, length + 2)] * config.num_hidden_layers
    assert sum(image.weights.nbytes for image in found.images) == 4 * 3 * processor(PROMPT).slots.sum()
    seen.clear()
    list(stream_generate(model, processor, PROMPT, max_tokens=3))
    assert not seen


def test_an_answer_of_one_token_and_a_picture_alone(llava):
    found = attend(*llava, [PHOTO], answer=[7])
    assert found.images[0].weights.shape == (1, 9) and found.prompt == ""


@pytest.mark.parametrize("name", ["llava-clip-llama", "llava-original-v1.5", "internvl-qwen2", "paligemma-gemma"])
def test_a_text_becomes_the_tokens_of_an_answer(name):
    """Behind the prompt's own tokens, as the template would write it: with the space that stands there."""
    model, processor = load(GOLDEN / name)
    messages = to_messages([PHOTO, "What is it?"])
    messages[0]["content"][0]["image"] = processor.prepare(PHOTO)
    inputs = processor(messages)
    ids = encode_answer(processor, messages, inputs, "A house.")
    assert processor.tokenizer.decode(ids).strip() == "A house."
    whole = [*messages, {"role": "assistant", "content": "A house."}]
    if name != "paligemma-gemma":  # whose template shows no answer
        told = processor(whole, add_generation_prompt=False).input_ids[0].tolist()
        assert told[: len(inputs.slots) + len(ids)] == [*inputs.input_ids[0].tolist(), *ids]
    found = attend(model, processor, [PHOTO, "What is it?"], answer="A house.")
    assert found.token_ids == tuple(ids) and "".join(found.texts).strip() == "A house."


def test_an_image_token_in_an_answer_is_text(llava):
    found = attend(*llava, [PHOTO, "What?"], answer="an <image> here")
    assert "".join(found.texts).count("<image>") <= 1 and len(found.images) == 1


def test_a_conversations_last_answer(llava):
    chat = Chat(*llava, max_tokens=5)
    assert chat.last_tokens is None
    said = [chunk.token for chunk in chat.send(["What is ", PHOTO, "?"])]
    assert chat.last_tokens == said
    logprobs = [chunk.logprob for chunk in chat.send(["And ", SHAPES, "?"])]
    found = attend(*llava, chat.messages[:-1], answer=chat.last_tokens, features=chat.features)
    np.testing.assert_allclose(found.logprobs, logprobs, atol=1e-4)
    assert len(found.images) == 2 and found.prompt == "And ?"
    chat.undo()
    assert chat.last_tokens is None
    chat.clear()
    assert chat.last_tokens is None


def test_pictures_are_encoded_once(llava, monkeypatch):
    model, processor = llava
    encoded, encode = [], type(model).encode
    monkeypatch.setattr(type(model), "encode", lambda self, image: (encoded.append(1), encode(self, image))[1])
    features = Features()
    attend(model, processor, PROMPT, max_tokens=3, features=features)
    attend(model, processor, PROMPT, answer="x", features=features)
    assert len(encoded) == 2


BAD = [
    ({"prompt": "What is it?"}, "the prompt has no image, so there are no patches to look at: give one"),
    ({"answer": ""}, "the answer is empty: there is no token to explain"),
    ({"answer": []}, "the answer is empty: there is no token to explain"),
    ({"answer": [10**6]}, r"the answer has the token id 1000000, the vocabulary has \d+"),
    ({"layers": [2]}, "layer 2 does not exist: the decoder has 2, 0 to 1"),
    ({"layers": [-3]}, "layer -3 does not exist: the decoder has 2, 0 to 1"),
    ({"layers": []}, "no layer is chosen: the decoder has 2, 0 to 1"),
    ({"heads": [0, 7]}, "head 7 does not exist: the decoder has 3, 0 to 2"),
    ({"reduce": "rollout", "layers": [0]}, "rollout goes through all layers and heads: leave them out"),
    ({"reduce": "max"}, "reduce must be one of none, mean, rollout, not 'max'"),
    ({"max_tokens": 0}, "max_tokens must be 1 or more, not 0"),
    ({"prompt": [Path("nowhere.jpg")]}, "image not found: nowhere.jpg"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=lambda value: str(value)[:40])
def test_what_cannot_be_looked_at(llava, options, message):
    with pytest.raises(VLMError, match=message):
        attend(*llava, **{"prompt": [PHOTO, "What is it?"], **options})


def test_what_was_reduced_stays_so(llava):
    found = attend(*llava, [PHOTO], answer=[7, 9])
    assert found.mean() is found
    with pytest.raises(PromptError, match="layers and heads are already reduced"):
        found.mean([0])
    part = attend(*llava, [PHOTO], answer=[7, 9], reduce="none", layers=[1])
    with pytest.raises(PromptError, match="layer 0 was not looked at, only 1"):
        part.mean([0])


def test_arrays_for_researchers(llava, tmp_path):
    found = attend(*llava, PROMPT, answer=[7, 9, 8], reduce="none")
    found.save(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays["tokens"].tolist() == list(found.tokens) and str(arrays["reduce"]) == "none"
        assert arrays["layers"].tolist() == [0, 1] and arrays["token_ids"].tolist() == [7, 9, 8]
        for i, image in enumerate(found.images):
            np.testing.assert_array_equal(arrays[f"weights_{i}"], image.weights)
            np.testing.assert_array_equal(arrays[f"boxes_{i}"], image.boxes)
            assert tuple(arrays[f"size_{i}"]) == image.size


def test_a_picture_that_was_exchanged_is_refused(llava, tmp_path):
    file = tmp_path / "picture.png"
    Image.new("RGB", (60, 40)).save(file)
    found = attend(*llava, [file], answer=[7])
    assert open_pictures(found, 30)[0].size == (30, 20)
    Image.new("RGB", (40, 60)).save(file)
    with pytest.raises(ImageError, match=r"picture.png is 40x60 pixels now, it was another picture before"):
        open_pictures(found, 30)
    file.unlink()
    with pytest.raises(ImageError, match="image not found"):
        open_pictures(found, 30)


def test_a_plain_list_still_takes_whole_layers():
    model, _ = load(PLAIN)
    weights: list[mx.array] = []
    model.decoder(model.decoder.read(mx.array([[5, 6, 7]])), attentions=weights)
    assert [each.shape for each in weights] == [(1, 3, 3, 3)] * 2
