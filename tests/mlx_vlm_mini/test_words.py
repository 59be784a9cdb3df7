"""`attend_drawn`: each word's attention in the picture that was drawn of it, against weights recorded by hand."""

from dataclasses import replace

import numpy as np
import pytest
from janus_cases import PROMPTS
from reference import GOLDEN

from mlx_vlm_mini import attend_drawn, attention_page, draw_attention, imagine, load
from mlx_vlm_mini.drawing.imagine import drawing_reading
from mlx_vlm_mini.errors import CheckpointError, PromptError


@pytest.fixture(scope="module")
def loaded():
    return load(GOLDEN / "janus")


@pytest.fixture(scope="module")
def drawn(loaded):
    return imagine(*loaded, "  Describe a small\nhouse. ", seed=3)[0]


def by_hand(loaded, drawn):
    """The weights of all layers and heads, float32[layers, heads, words, N], from a pass over the whole sequence."""
    model, processor = loaded
    ids, places = processor.drawing_prompt(drawn.prompt)
    weights = []
    model.decoder(drawing_reading(model, ids, drawn.token_ids), None, weights)
    recorded = np.stack([np.array(layer[0]) for layer in weights])  # (layers, heads, L + N, L + N)
    words = []
    for word in drawn.prompt.split():
        start = drawn.prompt.index(word)
        inside = [
            t
            for t, (first, last) in enumerate(places)
            if drawn.prompt[first:last].strip() and start < last and first < start + len(word)
        ]
        words.append(recorded[:, :, len(ids) - 1 : len(ids) + 15, inside].sum(axis=-1) / 16)
    return np.stack(words, axis=2)


def test_weights_are_those_of_the_queries_that_chose(loaded, drawn):
    found = attend_drawn(*loaded, drawn, reduce="none")
    expected = by_hand(loaded, drawn)
    assert found.tokens == ("Describe", "a", "small", "house.") and expected.shape == (2, 4, 4, 16)
    np.testing.assert_allclose(found.images[0].weights, expected, atol=1e-5)
    mean = attend_drawn(*loaded, drawn)
    np.testing.assert_allclose(mean.images[0].weights, expected.mean(axis=(0, 1)), atol=1e-5)
    np.testing.assert_allclose(mean.shares, expected.mean(axis=(0, 1)).sum(axis=-1), atol=1e-5)
    one = attend_drawn(*loaded, drawn, layers=[-1], heads=[0, 2])
    np.testing.assert_allclose(one.images[0].weights, expected[1, [0, 2]].mean(axis=0), atol=1e-5)
    assert 0 < mean.shares.sum() < 1 and "".join(mean.texts) == "Describe a small\nhouse. "


def test_every_token_of_the_prompt_is_counted_once(loaded, drawn):
    """Words and the tokens around them together have all attention that is not on image tokens."""
    model, processor = loaded
    ids, _ = processor.drawing_prompt(drawn.prompt)
    weights = []
    model.decoder(drawing_reading(model, ids, drawn.token_ids), None, weights)
    first = np.stack([np.array(layer[0]) for layer in weights]).mean(axis=(0, 1))[len(ids) - 1]
    found = attend_drawn(model, processor, drawn).images[0].weights[:, 0] * 16
    assert found.sum() <= first[: len(ids)].sum() + 1e-5


def test_logprobs_are_those_under_the_prompt(loaded):
    (picture,) = imagine(*loaded, PROMPTS["circle"], guidance=1, temperature=0)
    found = attend_drawn(*loaded, picture)
    assert found.token_ids == picture.token_ids and found.logprobs.shape == (16,)
    other = attend_drawn(*loaded, replace(picture, token_ids=tuple(89 - t for t in picture.token_ids)))
    assert found.logprobs.mean() > other.logprobs.mean()


def test_boxes_fill_the_picture(loaded, drawn):
    boxes = attend_drawn(*loaded, drawn).images[0].boxes
    np.testing.assert_allclose(boxes[[0, 1, 4, 15]], [[0, 0, 2, 2], [2, 0, 4, 2], [0, 2, 2, 4], [6, 6, 8, 8]])


def test_what_can_be_drawn_of_it(loaded, drawn, tmp_path):
    found = attend_drawn(*loaded, drawn)
    assert draw_attention(found, 2).size == (8, 8)
    assert draw_attention(found).width > 176
    page = attention_page(found)
    assert "of the picture&#x27;s attention went to" in page and page.count('class="heat"') == 5
    found.save(tmp_path / "found.npz")
    with np.load(tmp_path / "found.npz") as arrays:
        assert arrays["weights_0"].shape == (4, 16) and arrays["tokens"].tolist()[0] == "Describe"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduce": "rollout"}, "reduce must be mean or none for a drawn picture"),
        ({"layers": [2]}, "layer 2 does not exist"),
        ({"heads": [-5]}, "head -5 does not exist"),
    ],
)
def test_options_that_do_not_fit(loaded, drawn, options, message):
    with pytest.raises(PromptError, match=message):
        attend_drawn(*loaded, drawn, **options)


def test_pictures_of_other_models(loaded, drawn):
    for tokens in (drawn.token_ids[:-1], (*drawn.token_ids[:-1], 90)):
        with pytest.raises(PromptError, match="this model draws 16 of 90: give the model that drew it"):
            attend_drawn(*loaded, replace(drawn, token_ids=tokens))
    with pytest.raises(CheckpointError, match="cannot draw"):
        attend_drawn(*load(GOLDEN / "llava-siglip-qwen2"), drawn)
