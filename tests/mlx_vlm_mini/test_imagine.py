"""Pictures from words: tokens and pixels as the reference's, seeds, batches, guidance, the VQ decoder's parts, refusals."""

import math
import threading

import mlx.core as mx
import numpy as np
import pytest
from janus_cases import PROMPTS
from reference import GOLDEN

from mlx_vlm_mini import generate, imagine, load
from mlx_vlm_mini.drawing.drawn import DrawStats, read_drawn
from mlx_vlm_mini.drawing.imagine import DrawOptions, _draw_tokens, drawing_reading
from mlx_vlm_mini.drawing.parts import vq
from mlx_vlm_mini.errors import CheckpointError, ImageError, PromptError
from mlx_vlm_mini.layers.cpu import convolve

FOLDER = GOLDEN / "janus"
DRAWINGS = [(name, guidance) for name in PROMPTS for guidance in (5, 1)]


@pytest.fixture(scope="module")
def loaded():
    return load(FOLDER)


@pytest.fixture(scope="module")
def expected():
    with np.load(FOLDER / "expected.npz") as arrays:
        return dict(arrays)


@pytest.mark.parametrize(("name", "guidance"), DRAWINGS)
def test_greedy_drawing_equals_the_reference(loaded, expected, name, guidance):
    """The prompt's ids, every image token, and pixels within 1 of 255."""
    own = {key.split("/")[1]: array for key, array in expected.items() if key.startswith(f"draw-{name}-{guidance}/")}
    assert loaded[1].drawing_prompt(PROMPTS[name])[0] == own["prompt_ids"].tolist()
    (drawn,) = imagine(*loaded, PROMPTS[name], guidance=guidance, temperature=0)
    assert list(drawn.token_ids) == own["token_ids"].tolist()
    pixels = np.array(drawn.image)
    assert pixels.shape == own["pixels"].shape == (8, 8, 3)
    assert np.abs(pixels.astype(int) - own["pixels"]).max() <= 1
    assert len({*drawn.token_ids}) > 4  # not one colour


def test_a_batch_equals_one_by_one_and_a_seed_repeats(loaded):
    """Six, of which four are drawn together."""
    steps: list[tuple[int, int]] = []
    many = imagine(*loaded, "a red circle", seed=7, count=6, progress=lambda *step: steps.append(step))
    alone = [imagine(*loaded, "a red circle", seed=7 + number)[0] for number in range(6)]
    assert [each.seed for each in many] == [7, 8, 9, 10, 11, 12]
    for together, single in zip(many, alone, strict=True):
        assert together.token_ids == single.token_ids
        np.testing.assert_array_equal(np.array(together.image), np.array(single.image))
    assert len({each.token_ids for each in many}) == 6
    assert steps == [(number, 32) for number in range(1, 33)]
    assert [each.stats.together for each in many] == [4, 4, 4, 4, 2, 2]
    assert many[0].stats.generated_tokens == 16 and many[0].stats.prompt_tokens == 13 and many[0].stats.decode_s > 0


def test_without_a_seed_the_picture_says_the_one_it_had(loaded):
    one, other = (imagine(*loaded, "a red circle")[0] for _ in range(2))
    assert one.seed != other.seed
    assert imagine(*loaded, "a red circle", seed=one.seed)[0].token_ids == one.token_ids


def test_drawing_leaves_the_processes_own_numbers_alone(loaded):
    mx.random.seed(3)
    first = mx.random.uniform(shape=(4,)).tolist()
    mx.random.seed(3)
    imagine(*loaded, "a red circle", seed=5)
    assert mx.random.uniform(shape=(4,)).tolist() == first


def test_no_guidance_at_all_is_the_unconditional_row(loaded):
    """g = 0 draws the same whatever the words are, as long as there are as many."""
    one, other = (imagine(*loaded, words, guidance=0, temperature=0)[0] for words in ("a red circle", "a red square"))
    length = [len(loaded[1].drawing_prompt(words)[0]) for words in ("a red circle", "a red square")]
    if length[0] == length[1]:
        assert one.token_ids == other.token_ids
    assert one.token_ids != imagine(*loaded, "a red circle", guidance=1, temperature=0)[0].token_ids


def test_guidance_is_continuous_at_one_and_zero(loaded):
    """The two ends that take one row are limits of the formula with two."""
    for end in (0.0, 1.0):
        near = imagine(*loaded, PROMPTS["long"], guidance=end + 1e-6, temperature=0)[0]
        assert near.token_ids == imagine(*loaded, PROMPTS["long"], guidance=end, temperature=0)[0].token_ids


def test_samples_follow_the_scores(loaded):
    """First tokens of many seeds against the distribution that the scores give."""
    model, processor = loaded
    ids, _ = processor.drawing_prompt("a red circle")
    hidden = model.decoder(drawing_reading(model, ids, []))[:, -1]
    probs = np.array(mx.softmax(model.drawing.logits(hidden)[0] / 0.7))
    tokens, stats = [], DrawStats(generated_tokens=2)
    options = DrawOptions(guidance=1, temperature=0.7)
    next(_draw_tokens(model, ids, processor.drawing_tokens, range(300), options, stats, tokens))
    counts = np.bincount(np.array(tokens[0]), minlength=len(probs)) / 300
    assert np.abs(counts - probs).max() < 5 * math.sqrt(0.25 / 300)
    assert np.abs(counts - probs).sum() < 0.7


def test_the_whole_sequence_at_once_gives_the_same_tokens(loaded):
    model, processor = loaded
    (drawn,) = imagine(model, processor, "a red circle", guidance=1, temperature=0)
    ids, _ = processor.drawing_prompt("a red circle")
    hidden = model.decoder(drawing_reading(model, ids, drawn.token_ids[:-1]))
    assert mx.argmax(model.drawing.logits(hidden[0, len(ids) - 1 :]), axis=-1).tolist() == list(drawn.token_ids)


def test_typed_marks_draw_as_text(loaded):
    _, processor = loaded
    ids, places = processor.drawing_prompt("  <begin_of_image> User <|Assistant|> ")
    assert ids.count(processor.drawing_tokens.image) == 1
    text = "  <begin_of_image> User <|Assistant|> "
    assert "".join(text[start:end] for start, end in places).replace(" ", "") == text.replace(" ", "")


def test_two_threads_draw_and_answer(loaded):
    alone = imagine(*loaded, "a red circle", seed=1)[0].token_ids, generate(*loaded, "Why?", max_tokens=8)
    found: dict[str, object] = {}
    calls = [
        threading.Thread(target=lambda: found.update(drawn=imagine(*loaded, "a red circle", seed=1)[0].token_ids)),
        threading.Thread(target=lambda: found.update(said=generate(*loaded, "Why?", max_tokens=8))),
    ]
    for call in calls:
        call.start()
    for call in calls:
        call.join()
    assert (found["drawn"], found["said"]) == alone


# files


def test_a_png_says_what_it_was_drawn_of(loaded):
    (drawn,) = imagine(*loaded, "ein grüner Würfel, ☃", seed=2, guidance=3.5, temperature=0.5)
    again = read_drawn(drawn.to_png("deepseek-community/Janus-Pro-1B"), "out.png")
    assert again == drawn or np.array_equal(np.array(again.image), np.array(drawn.image))
    assert (again.prompt, again.seed, again.token_ids) == (drawn.prompt, 2, drawn.token_ids)
    assert (again.guidance, again.temperature) == (3.5, 0.5)
    for data in (b"", (GOLDEN / "shapes.png").read_bytes(), (GOLDEN / "photo.jpg").read_bytes(), drawn.to_png()[:200]):
        with pytest.raises(ImageError, match=r"x\.png is no picture that mlx-vlm-mini imagine drew"):
            read_drawn(data, "x.png")


# the VQ decoder


def naive_norm(x, norm, groups=32):
    height, width, channels = x.shape
    grouped = x.reshape(height, width, groups, channels // groups)
    mean, var = (getattr(grouped, name)(axis=(0, 1, 3), keepdims=True) for name in ("mean", "var"))
    return ((grouped - mean) / np.sqrt(var + 1e-6)).reshape(x.shape) * np.array(norm.weight) + np.array(norm.bias)


def naive_conv(x, conv):
    weight, bias = np.array(conv.weight, dtype=np.float64), np.array(conv.bias)
    reach = weight.shape[1] // 2
    padded = np.pad(x, [(reach, reach), (reach, reach), (0, 0)])
    rows = [
        [
            np.einsum("oijc,ijc->o", weight, padded[r : r + 2 * reach + 1, c : c + 2 * reach + 1])
            for c in range(x.shape[1])
        ]
        for r in range(x.shape[0])
    ]
    return np.array(rows) + bias


def randomize(module):
    noise = {name: 0.3 * mx.random.normal(array.shape) for name, array in flat(module)}
    module.load_weights([*noise.items()])
    return module


def flat(module):
    from mlx.utils import tree_flatten

    return tree_flatten(module.parameters())


def swish(x):
    return x / (1 + np.exp(-x))


def test_a_block_that_changes_channels_by_hand():
    block = randomize(vq.Block(32, 64))
    x = np.random.default_rng(1).normal(size=(3, 4, 32))
    y = naive_conv(swish(naive_norm(x, block.norm1)), block.conv1)
    y = naive_conv(swish(naive_norm(y, block.norm2)), block.conv2)
    expected = naive_conv(x, block.nin_shortcut) + y
    found = block(mx.array(x[None].astype(np.float32)))[0]
    np.testing.assert_allclose(np.array(found), expected, atol=1e-3)


def test_attention_of_cells_by_hand():
    layer = randomize(vq.CellAttention(32))
    x = np.random.default_rng(2).normal(size=(3, 4, 32))
    normed = naive_norm(x, layer.norm)
    q, k, v = (naive_conv(normed, part).reshape(12, 32) for part in (layer.q, layer.k, layer.v))
    scores = q @ k.T / math.sqrt(32)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    expected = x + naive_conv((weights @ v).reshape(3, 4, 32), layer.proj_out)
    np.testing.assert_allclose(np.array(layer(mx.array(x[None].astype(np.float32)))[0]), expected, atol=1e-3)


@pytest.mark.parametrize("band", [1, 3 * 32 * 6 * 2 * 5, 1 << 23])
def test_a_convolution_in_bands_is_the_whole_one(monkeypatch, band):
    """A row at a time, three of seven, and all at once."""
    x, weight = mx.random.normal((2, 7, 6, 32)), mx.random.normal((8, 3, 3, 32))
    monkeypatch.setattr(convolve, "BAND", band)
    whole = mx.conv2d(x, weight, padding=1)
    np.testing.assert_allclose(np.array(convolve.convolve(x, weight)), np.array(whole), atol=1e-4)


def test_codes_are_normalised(loaded):
    """Rows of the codebook count by their direction alone."""
    model, _ = loaded
    before = np.array(model.drawing.pixels([*range(16)]))
    kept = model.drawing.vq.codebook
    try:
        model.drawing.vq.codebook = kept * 3
        np.testing.assert_allclose(np.array(model.drawing.pixels([*range(16)])), before, atol=1e-4)
    finally:
        model.drawing.vq.codebook = kept


# refusals


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": " \n"}, "the prompt is empty: say what the picture should show"),
        ({"prompt": ["a circle like this", str(GOLDEN / "photo.jpg")]}, "after a text alone"),
        ({"prompt": [{"role": "user", "content": "a circle"}]}, "after a text alone"),
        ({"guidance": -0.1}, "guidance must be a number from 0, not -0.1"),
        ({"guidance": math.inf}, "guidance must be a number from 0, not inf"),
        ({"guidance": math.nan}, "guidance must be a number from 0, not nan"),
        ({"guidance": "5"}, "guidance must be a number from 0, not '5'"),
        ({"temperature": -1}, "temperature must be a number from 0, not -1"),
        ({"temperature": 1e-9}, "temperature must be 0 or from 0.0001 to 10000"),
        ({"count": 0}, "count must be a whole number from 1 to 1000, not 0"),
        ({"count": True}, "count must be a whole number from 1 to 1000, not True"),
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"seed": 2**64}, "seed must be a whole number from 0"),
    ],
)
def test_what_cannot_be_drawn(loaded, given, message):
    options = {"prompt": "a circle", **given}
    with pytest.raises(PromptError, match=message) as caught:
        imagine(*loaded, **options)
    assert "\n" not in str(caught.value)


def test_models_that_cannot_draw(tmp_path):
    with pytest.raises(
        CheckpointError, match="family 'llava' answers in words alone; take a model of the family 'janus'"
    ):
        imagine(*load(GOLDEN / "llava-siglip-qwen2"), "a circle")
    for file in FOLDER.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = mx.load(str(tmp_path / "model.safetensors"))
    rest = {name: array for name, array in tensors.items() if "vqmodel" not in name}
    mx.save_safetensors(str(tmp_path / "model.safetensors"), rest)
    with pytest.raises(CheckpointError, match="answers and cannot draw: its files lack the VQ decoder"):
        imagine(*load(tmp_path), "a circle")


def test_numbers_that_are_not_finite(tmp_path):
    for file in FOLDER.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = mx.load(str(tmp_path / "model.safetensors"))
    tensors["model.generation_head.vision_head.bias"] = mx.full(90, math.nan, dtype=mx.bfloat16)
    mx.save_safetensors(str(tmp_path / "model.safetensors"), tensors)
    with pytest.raises(CheckpointError, match="log-probability of nan in float32"):
        imagine(*load(tmp_path), "a circle")
