"""The reference suite, QLLaMA: the golden anew, and more variants than it holds, against our writing of the authors' code."""

import copy
import random

import numpy as np
import pytest
from parity import check_answer, check_golden
from pieces import texts
from qllama_cases import CAPTION, CONFIG, IMAGES
from reference import GOLDEN

from mlx_vlm_mini import load, load_scorer

pytestmark = pytest.mark.reference
TOLERANCE = 1e-4


def changed(*, vision=None, text=None, **changes):
    config = {**copy.deepcopy(CONFIG), **changes}
    config["vision_config"] |= vision or {}
    config["qllama_config"] |= text or {}
    return config


VARIANTS = {
    "every layer looks": changed(cross_attention_frequency=1),
    "every third layer looks": changed(cross_attention_frequency=3, num_query_token=11),
    "one query": changed(num_query_token=1),
    "a larger image": changed(force_image_size=42),
    "other heads": changed(
        attn_pool_num_heads=8, clip_embed_dim=17, vision={"num_attention_heads": 4}, text={"num_attention_heads": 2}
    ),
    "other eps": changed(vision={"layer_norm_eps": 0.1}, text={"rms_norm_eps": 0.1}),
    "biases and no norms of queries and keys": changed(vision={"qkv_bias": True, "qk_normalization": False}),
}


def test_the_golden_is_what_the_reference_gives_today():
    from qllama_reference import FOLDER, expected

    check_golden(FOLDER, expected())


@pytest.mark.parametrize("settings", [True, False], ids=["preprocessor_config.json", "none"])
@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_variants(name, settings, tmp_path):
    from qllama_reference import Reference, save

    folder = tmp_path / "model"
    save(folder, VARIANTS[name], seed=len(name), settings=settings)
    reference, (model, processor) = Reference(folder), load(folder)
    for image in ("photo.jpg", "strip.png"):
        expected = reference.answer(image, CAPTION, 6)
        parts = [{"type": "image", "image": image}, {"type": "text", "text": CAPTION}]
        check_answer(model, processor, [{"role": "user", "content": parts}], expected)
        (prepared,) = processor(CAPTION, [GOLDEN / image]).images
        np.testing.assert_allclose(prepared.pixel_values, expected["pixel_values"], atol=1e-5)
        np.testing.assert_allclose(model.mixing(prepared), reference.mixing(image), atol=1e-5)
    said = ("a red circle", "nothing")
    for mode, logits in reference.scores(IMAGES, said).items():
        own = load_scorer(folder, mode=mode).logits([GOLDEN / image for image in IMAGES], said)
        logits = logits[..., 1] - logits[..., 0] if mode == "match" else logits
        np.testing.assert_allclose(own, logits, atol=TOLERANCE)


def test_texts_become_the_tokens_that_sentencepiece_gives():
    from qllama_reference import FOLDER, Reference

    reference = Reference(FOLDER)
    _, processor = load(FOLDER)
    vectors, pairs = load_scorer(FOLDER), load_scorer(FOLDER, mode="match")
    for text in [*texts(300, seed=5), *(" " * random.Random(number).randint(1, 4) + "a" for number in range(4))]:
        assert vectors.tokenize(text) == reference.whole("summarize:" + text)
        assert pairs.tokenize(text) == reference.whole(text)
        if text.strip():
            asked = processor(text, [GOLDEN / "photo.jpg"])
            assert asked.input_ids[0].tolist() == [0] * CONFIG["num_query_token"] + reference.ids(text)
