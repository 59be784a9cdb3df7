"""Llama 3.2 Vision: its configs, its canvases, what tokens see of which image, and that it is computed once."""

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import PHOTO, SHAPES, edit_json, make_wide
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from reference import GOLDEN

from mlx_vlm_mini import Chat, generate, load
from mlx_vlm_mini import attend as inspect
from mlx_vlm_mini.checkpoints.folder import open_checkpoint
from mlx_vlm_mini.checkpoints.load import plan
from mlx_vlm_mini.checkpoints.weights import hub_name, rename
from mlx_vlm_mini.cli.main import main
from mlx_vlm_mini.convert import convert
from mlx_vlm_mini.data.questions import write_scenes
from mlx_vlm_mini.decoder.cross_attention import CrossAttention, ImageCache, Span, look
from mlx_vlm_mini.decoder.state import State
from mlx_vlm_mini.errors import CheckpointError, ImageError, PromptError
from mlx_vlm_mini.families import mllama
from mlx_vlm_mini.generation.cache import make_state
from mlx_vlm_mini.generation.decode import prefill
from mlx_vlm_mini.layers import attention
from mlx_vlm_mini.model import VLM
from mlx_vlm_mini.preprocessing.canvas import Canvas, choose_canvas, cut_canvas, fit_size, place, possible_grids
from mlx_vlm_mini.preprocessing.pixels import frames
from mlx_vlm_mini.preprocessing.settings import image_settings
from mlx_vlm_mini.train.trainer import Settings, Trainer

META, OTHER = GOLDEN / "mllama-meta", GOLDEN / "mllama-transformers"
STRIP = GOLDEN / "strip.png"


@pytest.fixture(scope="module")
def meta():
    return load(META)


def test_an_empty_config_is_llama_of_eleven_billion():
    """The class defaults of transformers 5.23, as its MllamaConfig gives them; intermediate layers are Meta's."""
    config = mllama.config({"model_type": "mllama"})
    vision, decoder = config.vision, config.decoder
    assert (vision.hidden_size, vision.depth, vision.num_attention_heads, vision.intermediate_size) == (
        1280,
        32,
        16,
        5120,
    )
    assert (vision.image_size, vision.patch_size, vision.num_features, vision.feature_size) == (448, 14, 1025, 7680)
    assert vision.feature_layers == (3, 7, 15, 23, 30, 32)
    assert (vision.tiled.max_tiles, vision.tiled.num_global_layers) == (4, 8)
    assert (vision.blocks.qkv_bias, vision.blocks.o_bias, vision.hidden_act) == (False, False, "gelu")
    assert (vision.layer_norm_eps, decoder.norms.rms_norm_eps) == (1e-5, 1e-5)
    assert (decoder.hidden_size, decoder.num_hidden_layers, decoder.num_key_value_heads) == (4096, 40, 8)
    assert (decoder.vocab_size, decoder.num_embeddings, config.image_token_id) == (128256, 128264, 128256)
    assert [i for i, kind in enumerate(decoder.layer_types) if kind == "cross_attention"] == [
        3,
        8,
        13,
        18,
        23,
        28,
        33,
        38,
    ]
    assert (decoder.rope_theta, decoder.rope_scaling, decoder.max_position_embeddings) == (500000.0, None, 131072)
    assert decoder.cross_attention.blind_rows == "zero"


def test_the_switch_is_transformers_computation():
    config = mllama.config({"semantics": "transformers"})
    assert config.vision.feature_layers == (4, 8, 16, 24, 31, 32)
    assert config.decoder.cross_attention.blind_rows == "attend"


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        ({"semantics": "mine"}, "semantics must be 'meta' or 'transformers'"),
        ({"text_config": {"cross_attention_layers": [3, 40]}}, "are not all among 40 layers"),
        ({"text_config": {"cross_attention_layers": []}, "image_token_index": 0}, "supported together only"),
        ({"text_config": {"cross_attention_layers": list(range(40))}}, "needs a layer that reads text"),
        ({"text_config": {"tie_word_embeddings": True}}, "cannot be tied"),
        ({"text_config": {"model_type": "llama"}}, "decoder 'llama' is not supported"),
        ({"vision_config": {"vision_output_dim": 7000}}, "vision_output_dim is 7000"),
        ({"vision_config": {"intermediate_layers_indices": []}}, "vision_output_dim"),
        (
            {"vision_config": {"intermediate_layers_indices": [33], "vision_output_dim": 2560}},
            "layer 33 does not exist",
        ),
        ({"vision_config": {"max_num_tiles": 101}}, "at most 100 tiles"),
        ({"vision_config": {"num_global_layers": 0}}, "num_global_layers must be a whole number"),
        ({"vision_config": {"supported_aspect_ratios": [[1, 1], [2, 1]]}}, "not the 4 tiles' possible ones"),
        ({"image_token_index": 128264}, "none of the 128264 embeddings"),
    ],
)
def test_configs_that_make_no_sense(hf, message):
    with pytest.raises(CheckpointError, match=message):
        mllama.config(hf)


def test_real_folders_of_both_layouts_and_of_mlx_vlm_are_read():
    """By our names there and back; and what mlx-vlm calls the tower."""
    names = plan(open_checkpoint(META)).ours
    for ours, theirs in names.items():
        assert rename(theirs, mllama.WEIGHTS) == (ours,) and hub_name(ours, mllama.WEIGHTS) == theirs
        other = theirs.replace("vision_model.", "vision_tower.")
        assert rename(other, mllama.WEIGHTS) == (ours,)


# --- canvases


@pytest.mark.parametrize(
    ("size", "grid"),
    [((480, 640), (1, 2)), ((500, 1200), (1, 3)), ((1120, 1120), (2, 2)), ((10, 10), (1, 1)), ((4000, 300), (4, 1))],
)
def test_canvases(size, grid):
    """Three of transformers' own with tiles of 560 pixels (an aspect ratio's id is its place, from 1 on), and extremes."""
    assert choose_canvas(size, Canvas(tile_size=560, max_tiles=4)) == grid
    assert possible_grids(4) == [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)]


SIZES = st.tuples(st.integers(1, 3000), st.integers(1, 3000))


@settings(max_examples=200, deadline=None)
@given(SIZES, st.integers(1, 9), st.integers(1, 60))
def test_an_image_fits_its_canvas_and_touches_its_end(size, tiles, side):
    canvas = Canvas(tile_size=side, max_tiles=tiles)
    grid = choose_canvas(size, canvas)
    height, width = fit_size(size, grid, side)
    assert grid in possible_grids(tiles)
    assert 1 <= height <= grid[0] * side and 1 <= width <= grid[1] * side
    # it becomes as large as its canvas along a side, or keeps its own size
    assert height == grid[0] * side or width == grid[1] * side or (height, width) == size or side in (height, width)


def test_the_image_lies_in_the_corner_and_the_rest_is_black():
    canvas = Canvas(tile_size=20, max_tiles=4)
    whole = np.asarray(place(Image.new("RGB", (15, 45), "white"), canvas, 2))
    assert whole.shape == (60, 20, 3)
    assert (whole[:45, :15] == 255).all() and (whole[45:] == 0).all() and (whole[:, 15:] == 0).all()
    numbers = np.arange(40 * 60 * 3).reshape(40, 60, 3)
    tiles = cut_canvas(numbers, 20)
    assert tiles.shape == (6, 20, 20, 3)
    np.testing.assert_array_equal(tiles[4], numbers[20:, 20:40])


def test_tiles_lie_where_they_were_cut(meta):
    """A bright pixel of a picture changes the tile, and in it the place, that its frame says."""
    settings = meta[1].image_settings
    for size, grid in (((96, 70), (2, 2)), ((40, 160), (1, 3)), ((30, 30), (1, 1))):
        assert choose_canvas(size, settings.tiling) == grid
        placed, before = frames(size, settings), mllama.pixels(Image.new("RGB", size[::-1]), settings)
        assert len(placed) == len(before) == grid[0] * grid[1]
        for top, left in ((3, 4), (size[0] // 2, size[1] // 2), (size[0] - 3, size[1] - 4)):
            image = Image.new("RGB", size[::-1])
            image.putpixel((left, top), (255, 255, 255))
            changed = np.abs(mllama.pixels(image, settings) - before).sum(axis=-1)
            tile, y, x = np.unravel_index(changed.argmax(), changed.shape)
            frame = placed[tile]
            assert abs(frame.left + (x + 0.5) * frame.across - left - 0.5) <= 1
            assert abs(frame.top + (y + 0.5) * frame.down - top - 0.5) <= 1


TWO = ["What is ", PHOTO, " beside ", STRIP, "?"]


@pytest.mark.parametrize("folder", [META, OTHER])
def test_the_inspector_shows_what_cross_attention_layers_look_at(folder):
    """Each token's weights are those of one explicit pass over prompt and answer, image by image, unused tiles left out."""
    model, processor = load(folder)
    found = inspect(model, processor, TWO, max_tokens=5, reduce="none")
    kinds = model.config.decoder.layer_types
    looking = [number for number, kind in enumerate(kinds) if kind == "cross_attention"]
    assert found.layers == tuple(looking)
    inputs = processor(TWO)
    reading, weights = model.read(inputs.followed_by(found.token_ids[:-1])), []
    hidden = model.decoder(reading, attentions=weights)
    whole = np.stack([np.array(weights[number][0]) for number in looking])[:, :, len(inputs.slots) - 1 :]
    begin = 0
    for image, span in zip(found.images, reading.memory.spans, strict=True):
        np.testing.assert_allclose(image.weights, whole[..., begin : begin + span.seen], atol=1e-5)
        assert image.weights.shape[-1] == len(image.boxes) == span.seen
        begin += span.held
    np.testing.assert_allclose(sum(image.weights.sum(-1) for image in found.images), whole.sum(-1), atol=1e-5)
    logits = np.array(model.decoder.logits(hidden)[0, len(inputs.slots) - 1 :])
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(found.logprobs, logprobs[np.arange(5), list(found.token_ids)], atol=1e-4)


def test_the_inspector_reads_given_answers_and_reduces_them(meta):
    every = inspect(*meta, TWO, answer=[5, 6, 7], reduce="none")
    mean = inspect(*meta, TWO, answer=[5, 6, 7])
    for image, reduced in zip(every.images, mean.images, strict=True):
        np.testing.assert_allclose(image.weights.mean(axis=(0, 1)), reduced.weights, atol=1e-6)
    # "beside" is said between the images: what follows the second one sees that alone
    assert mean.images[0].weights.sum() == 0
    np.testing.assert_allclose(mean.shares, 1, atol=1e-5)
    together = inspect(*meta, ["What?", PHOTO, STRIP], answer=[5])
    assert all(image.weights.sum() > 0 for image in together.images)


def test_boxes_of_tiles_lie_over_the_picture(meta):
    model, processor = meta
    found = inspect(model, processor, ["What?", PHOTO], answer=[5])
    image, vision = found.images[0], model.config.vision
    placed = ~np.isnan(image.boxes[:, 0])
    assert (~placed).sum() == len(image.boxes) // vision.num_features  # a class token a tile
    inside = image.boxes[placed]
    assert inside[:, 0].min() == inside[:, 1].min() == 0
    height, width = image.size
    assert inside[:, 2].max() >= width - 1 and inside[:, 3].max() >= height - 1
    np.testing.assert_allclose(image.inside((0, 0, 10**6, 10**6)), image.weights[:, placed].sum(-1), atol=1e-6)


def test_what_the_inspector_refuses(meta):
    with pytest.raises(PromptError, match="rollout follows self-attention"):
        inspect(*meta, TWO, reduce="rollout")
    with pytest.raises(PromptError, match="layer 0 reads text alone"):
        inspect(*meta, TWO, layers=[0])


def test_recorded_blocks_are_whole_weights(meta, monkeypatch):
    """Where weights come block by block, tokens that see no image have none in any of them."""
    model, processor = meta
    inputs = processor(["What is in this ", PHOTO, "?"])
    reading = model.read(inputs)
    whole: list[mx.array] = []
    model.decoder(reading, attentions=whole)
    monkeypatch.setattr(attention, "BLOCK", 1000)
    blocks: list[mx.array] = []
    model.decoder(reading, attentions=blocks)
    length, keys = reading.length, reading.memory.spans[0].held
    cross = [each for each in blocks if each.shape[3] == keys]
    assert len(cross) > 2 and sum(each.shape[2] for each in cross) == 2 * length
    joined = np.concatenate([np.array(each) for each in cross], axis=2)
    expected = np.concatenate([np.array(each) for each in whole if each.shape[3] == keys], axis=2)
    np.testing.assert_allclose(joined, expected, atol=1e-6)
    (first,) = np.flatnonzero(inputs.slots)
    assert (expected[:, :, :first] == 0).all() and np.allclose(expected[:, :, first:length].sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"do_pad": False}, "needs do_resize and do_pad"),
        ({"do_resize": False}, "needs do_resize and do_pad"),
        ({"size": {"height": 56, "width": 42}}, "equal height and width"),
        ({"size": {"height": 10**6, "width": 10**6}}, "too large"),
        ({"max_image_tiles": 0}, "whole number of tiles"),
        ({"max_image_tiles": "4"}, "whole number of tiles"),
    ],
)
def test_image_settings_that_make_no_sense(changes, message):
    with pytest.raises(CheckpointError, match=message):
        image_settings(changes, "Mllama")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"size": {"height": 42, "width": 42}},
            ImageError,
            "takes 56x56 pixels a tile, the image processor gives 42x42",
        ),
        ({"max_image_tiles": 2}, CheckpointError, "into 2 tiles, config.json into 4"),
        ({"image_processor_type": "CLIPImageProcessor"}, CheckpointError, "gives no tiles, family 'mllama' needs them"),
    ],
)
def test_image_settings_that_do_not_fit_the_model(copy_of, changes, error, message):
    folder = copy_of(META.name)
    edit_json(folder / "preprocessor_config.json", **changes)
    with pytest.raises(error, match=message):
        generate(*load(folder), "Hi", images=[PHOTO], max_tokens=1)


# --- what sees what


def sees(spans, length):
    """Token by token, from its definition."""
    places = [span.position for span in spans]
    runs: list[list[int]] = []
    for image, place_ in enumerate(places):
        if image and place_ == places[image - 1] + 1:
            runs[-1].append(image)
        else:
            runs.append([image])
    seen = np.zeros((length, len(spans)), dtype=bool)
    for at in range(length):
        begun = [run for run in runs if places[run[0]] <= at]
        for image in begun[-1] if begun else []:
            seen[at, image] = places[image] <= at
    return seen


@settings(max_examples=200, deadline=None)
@given(
    st.sets(st.integers(0, 14), max_size=5), st.integers(0, 10), st.integers(1, 10), st.booleans(), st.booleans(),
    st.lists(st.tuples(st.integers(1, 3), st.integers(0, 2)), min_size=5, max_size=5),
)  # fmt: skip
def test_what_tokens_see(places, offset, length, blind_attend, whole, sizes):
    """Any chunk of any prompt: the keys that are left, by mask, are those of the images that each token sees."""
    spans = [Span(p, seen, seen + more) for p, (seen, more) in zip(sorted(places), sizes, strict=False)]
    seen = sees(spans, offset + length)[offset:]
    blind = ~seen.any(axis=1)
    sight = look(spans, length, offset, blind_attend=blind_attend, whole=whole)
    total = sum(span.held for span in spans)
    if sight is None:
        assert not spans or (blind.all() and not blind_attend and not whole)
        return
    mask = np.zeros((length, total), dtype=bool)
    mask[:, sight.keys] = True if sight.mask is None else np.array(sight.mask)
    expected, start = np.zeros((length, total), dtype=bool), 0
    for image, span in enumerate(spans):
        expected[:, start : start + span.seen] = seen[:, image : image + 1]
        start += span.held
    np.testing.assert_array_equal(mask[~blind], expected[~blind])
    assert blind.any() == (sight.sees is not None)
    if sight.sees is not None:
        np.testing.assert_array_equal(np.array(sight.sees)[:, 0], ~blind)
        if blind_attend:
            assert mask[blind].all()
    if whole:
        assert sight.keys == slice(0, total)


def test_a_token_that_is_decoded_needs_no_mask():
    """Nor keys of images before the last ones, which are those that it sees."""
    spans = [Span(2, 10, 10), Span(7, 10, 10), Span(8, 20, 20)]
    assert look(spans, 1, 30, blind_attend=False).__dict__ == {"keys": slice(10, 40), "mask": None, "sees": None}
    assert look([Span(2, 10, 40)], 1, 30, blind_attend=True).keys == slice(0, 10)
    assert look([], 5, 0, blind_attend=True) is None and look(spans, 2, 0, blind_attend=False) is None


def test_a_cache_of_images_is_cut_by_tokens():
    state, keys = State(lambda: [ImageCache()]), mx.arange(6, dtype=mx.float32).reshape(1, 1, 6, 1)
    (cache,) = state.layers
    cache.add(keys, keys + 1)
    cache.add(mx.array([[[[9.0]]]]), mx.array([[[[10.0]]]]))
    state.start, state.spans = 12, (Span(3, 2, 2), Span(5, 4, 4), Span(9, 1, 1))
    assert state.rewind(10) == state.length == 10
    assert cache.keys.flatten().tolist() == [0, 1, 2, 3, 4, 5, 9] and len(state.spans) == 3
    assert state.rewind(9) == 9 and cache.keys.flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert state.rewind(5) == 5
    assert cache.values.flatten().tolist() == [1, 2] and state.spans == (Span(3, 2, 2),)
    assert state.rewind(3) == 3
    assert cache.empty() and state.spans == () and cache.nbytes == 0 and state.layers == [cache]


def distributions(model, inputs, tokens=(7, 9)):
    cache = model.make_state()
    rows = [prefill(model.decoder, model.read(inputs), cache, step=6)]
    for token in tokens:
        rows.append(model.decoder.logits(model.decoder(model.decoder.read(mx.array([[token]])), cache))[:, -1])
    return np.array(mx.concatenate(rows))


def changed(model, **changes):
    """The same weights with other changes to the decoder's config, or to that of its cross-attention."""
    config = model.config.decoder
    if "blind_rows" in changes:
        changes = {"cross_attention": replace(config.cross_attention, **changes)}
    other = VLM(replace(model.config, decoder=replace(config, **changes)))
    other.update(model.parameters())
    return other


def test_tokens_before_an_image_do_not_depend_on_it(meta):
    """As Meta computes it; as transformers does, they do, which goldens of both are equal to."""
    model, processor = meta
    text = "What is in this"
    inputs = [processor([text, image]) for image in (PHOTO, SHAPES)]
    (first,) = np.flatnonzero(inputs[0].slots)
    one, other = (np.array(model(each))[0, :first] for each in inputs)
    np.testing.assert_allclose(one, other, atol=1e-5)
    ahead = changed(model, blind_rows="attend")
    one, other = (np.array(ahead(each))[0, :first] for each in inputs)
    assert np.abs(one - other).max() > 1e-2


def test_intermediate_layers_matter(meta):
    model, processor = meta
    other = VLM(replace(model.config, vision=replace(model.config.vision, feature_layers=(2, 3, 3))))
    other.update(model.parameters())
    inputs = processor(["What?", PHOTO, "Hm"])
    assert np.abs(np.array(model(inputs)) - np.array(other(inputs))).max() > 1e-2


def test_text_alone_skips_the_layers_that_look(meta):
    """Whatever their weights are; and with an image these count."""
    model, processor = meta
    broken = VLM(model.config)
    broken.update(model.parameters())
    for layer, kind in zip(broken.decoder.layers, model.config.decoder.layer_types, strict=True):
        if kind == "cross_attention":
            layer.cross_attn.o_proj.weight = layer.cross_attn.o_proj.weight * 3
            layer.mlp.down_proj.weight = layer.mlp.down_proj.weight * mx.array(float("nan"))
    text, image = processor("How many?"), processor(["How many?", PHOTO])
    np.testing.assert_array_equal(distributions(broken, text), distributions(model, text))
    assert np.isnan(distributions(broken, image)).all()


def test_keys_and_values_are_computed_once(meta, monkeypatch):
    calls = []
    plain = CrossAttention.keys_values
    monkeypatch.setattr(CrossAttention, "keys_values", lambda self, x: calls.append(x.shape[1]) or plain(self, x))
    chat = Chat(*meta, max_tokens=6)
    layers = list(meta[0].config.decoder.layer_types).count("cross_attention")
    list(chat.send([PHOTO, "What?"], prefill_step=7))
    assert calls == [4 * 17] * layers  # four tiles' rows
    entries = [entry for entry in chat._cache.state.layers if isinstance(entry, ImageCache)]
    # Head by head in memory: laid out otherwise they would be copied at each step, twelve times the cost on a CPU.
    assert all(np.asarray(each).flags.c_contiguous for entry in entries for each in entry.state)
    list(chat.send("Why?"))
    assert len(calls) == layers
    chunks = list(chat.send([SHAPES, "and", STRIP, "this?"]))
    assert calls[layers:] == [(2 + 3) * 17] * layers and chunks[-1].stats.encoded_images == 2


def test_a_step_attends_to_no_more_than_it_sees(meta, monkeypatch):
    """Of three images the last one's used tiles, without a mask."""
    seen, plain = [], CrossAttention.__call__

    def watch(self, x, **options):
        seen.append((options["memory"][0].shape[2], options["mask"]))
        return plain(self, x, **options)

    chat = Chat(*meta, max_tokens=1)
    list(chat.send([PHOTO, "a", SHAPES, "b", STRIP, "c"]))
    monkeypatch.setattr(CrossAttention, "__call__", watch)
    meta[0].decoder(meta[0].decoder.read(mx.array([[5]])), chat._cache.state)
    assert seen == [(3 * 17, None)] * 2


@pytest.mark.parametrize("kind", [{}, {"rotate": 40}])
def test_kinds_of_cache(meta, kind):
    model, processor = meta
    chat = Chat(model, processor, max_tokens=4, **kind)
    for turn in ([PHOTO, "What?"], ["And ", SHAPES, "this?"], "Why?"):
        chunks = list(chat.send(turn))
        inputs = processor(chat.messages[:-1])
        cache = make_state(model, **kind)
        logits = prefill(model.decoder, model.read(inputs), cache)
        logprobs = np.array(logits - mx.logsumexp(logits))[0]
        assert chunks[0].token == logprobs.argmax()
        assert chunks[0].logprob == pytest.approx(float(logprobs.max()), abs=1e-4)


def test_a_quantized_cache_keeps_images_whole(meta):
    """Heads of 16 numbers are too small for it; the decoder's are, not the images'."""
    with pytest.raises(PromptError, match="heads of 16 numbers"):
        Chat(*meta, kv_bits=8)


def test_a_conversation_is_saved_with_its_images(meta, tmp_path):
    model, processor = meta
    chat = Chat(model, processor, max_tokens=4)
    list(chat.send([PHOTO, "What?", SHAPES]))
    chat.save(tmp_path / "a.json", cache=True)
    other = Chat.load(tmp_path / "a.json", model, processor)
    assert other.notes == []
    ours, theirs = list(chat.send("Why?")), list(other.send("Why?"))
    assert [chunk.token for chunk in ours] == [chunk.token for chunk in theirs]
    np.testing.assert_allclose([each.logprob for each in ours], [each.logprob for each in theirs], atol=1e-5)
    assert theirs[-1].stats.encoded_images == 0 and theirs[-1].stats.cached_tokens == ours[-1].stats.cached_tokens > 20
    words = Chat(model, processor, max_tokens=2)
    list(words.send("Hi"))
    words.save(tmp_path / "b.json", cache=True)
    assert list(Chat.load(tmp_path / "b.json", model, processor).send("Go on"))[-1].stats.cached_tokens > 0


def test_a_saved_cache_with_wrong_images_is_noticed(meta, tmp_path):
    model, processor = meta
    chat = Chat(model, processor, max_tokens=2)
    list(chat.send([PHOTO, "What?"]))
    chat.save(tmp_path / "a.json", cache=True)
    file = tmp_path / "a.safetensors"
    arrays, metadata = mx.load(str(file), return_metadata=True)
    for images in ([[9, 68, 68]], [[5, 67, 67]], [[5, 0, 68]], [[5, 1, 2]]):
        mx.save_safetensors(str(file), {**arrays, "images": mx.array(images, dtype=mx.uint64)}, metadata)
        other = Chat.load(tmp_path / "a.json", model, processor)
        assert len(other.notes) == 1 and list(other.send("Why?"))[-1].stats.cached_tokens == 0


def test_a_fork_shares_images_until_it_goes_on(meta):
    chat = Chat(*meta, max_tokens=3)
    list(chat.send([PHOTO, "What?"]))
    fork = chat.fork()
    fork.undo()
    list(fork.send("Hm"))
    assert [chunk.token for chunk in chat.send("Why?")] == [chunk.token for chunk in Chat.send(_again(chat), "Why?")]
    assert fork._cache.state.spans == ()
    assert all(entry.empty() for entry in fork._cache.state.layers if isinstance(entry, ImageCache))


def _again(chat):
    """A conversation that says the same anew."""
    other = Chat(chat.model, chat.processor, max_tokens=3)
    other.messages = [dict(message) for message in chat.messages[:-2]]
    return other


# --- prompts, conversion, commands


def test_prompts(meta):
    """A template that takes a system message as a text alone gets it so; with images it takes none."""
    _, processor = meta
    text, slots = processor.expand(
        [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, {"role": "user", "content": "Hi"}], []
    )
    assert "Be brief.<|eot_id|>" in text and "type" not in text and slots == []
    inputs = processor(["See ", PHOTO, "?"])
    assert inputs.slots.sum() == 1 and inputs.images[0].tokens == 1
    assert (np.array(inputs.input_ids[0]) == processor.tokenizer.token_to_id("<|begin_of_text|>")).sum() == 1
    with pytest.raises(PromptError, match="without a system message"):
        processor(
            [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "image", "image": PHOTO}]},
            ]
        )


def test_without_a_template_the_prompt_is_llamas(copy_of):
    folder = copy_of(META.name)
    (folder / "chat_template.json").unlink()
    _, processor = load(folder)
    prepared = [processor.prepare(PHOTO)]
    text, _ = processor.expand(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}], prepared
    )
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    begin = "<|begin_of_text|>" + header.format("user")
    assert text == f"{begin}<|image|>Hi<|eot_id|>{header.format('assistant')}"


def test_the_switch_survives_conversion(tmp_path):
    convert(OTHER, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["semantics"] == "transformers"


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Whose tower's widths can be quantized, too; and scenes to calibrate with."""
    folder = tmp_path_factory.mktemp("wide")
    write_scenes(folder / "few", 3, seed=3, test=True)
    tower = {"hidden_size": 32, "attention_heads": 2, "intermediate_size": 64, "vision_output_dim": 96}
    model = make_wide(META.name, folder / "model", {"vision_config": tower})
    return model, str(folder / "few" / "scenes.jsonl")


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 8},
        {"bits": 8, "part_bits": {"vision": 8, "projector": 8}},
        {"bits": 4, "method": "gptq", "part_bits": {"vision": 4, "projector": 4}},
        {"recipe": "auto", "bits_per_weight": 12.0, "part_bits": {"vision": 8}},
        {"mode": "mxfp4"},
    ],
    ids=str,
)
def test_quantized(options, tmp_path, wide):
    """Cross-attention layers like all others; of the tower its linear layers, never its tables of positions."""
    source, few = wide
    measured = {"calibration": few} if {"method", "recipe"} & options.keys() else {}
    group = {} if "mode" in options else {"group_size": 32}
    report = convert(source, tmp_path / "out", check=True, **options, **group, **measured)
    assert report.check is not None and report.check.source_influence > 1e-3
    (model, processor), (whole, _) = load(tmp_path / "out"), load(source)
    stored = plan(open_checkpoint(tmp_path / "out")).model
    quantized = {path for path, module in stored.named_modules() if hasattr(module, "bits")}
    names = ("cross_attn.q_proj", "cross_attn.k_proj", "cross_attn.v_proj", "cross_attn.o_proj", "mlp.up_proj")
    assert {f"decoder.layers.{i}.{name}" for i in (1, 3) for name in names} <= quantized or "recipe" in options
    blocks = {path for path in quantized if path.startswith("vision")}
    assert bool(blocks) == ("vision" in options.get("part_bits", {}))
    assert all("blocks" in path for path in blocks)
    prompt = processor(["What is in this ", PHOTO, "?"])
    apart = np.abs(np.array(whole(prompt)) - np.array(model(prompt))).max()
    assert 0 < apart < (0.3 if options.get("bits") == 8 else 10)
    if options.get("bits") == 8:
        assert report.check.problems == () and report.check.cosine > 0.999


def test_info():
    done = CliRunner().invoke(main, ["info", str(META), "--check", "--json"])
    said = json.loads(done.stdout)
    assert (said["family"], said["vision"]["image_tokens"], said["vision"]["tile_keys"]) == ("mllama", 1, 17)
    assert said["vision"]["max_tiles"] == 4 and said["check"].startswith("every tensor") and said["unused"] == 0


def test_training_is_refused(meta, tmp_path):
    with pytest.raises(CheckpointError, match="has cross-attention, which cannot be trained yet"):
        Trainer(*meta, [], tmp_path, Settings())
