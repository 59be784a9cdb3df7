"""The state of a sequence: how far back it goes where a layer's cache goes only to some of its tokens."""

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import PHOTO, SHAPES
from reference import GOLDEN

from mlx_vlm_mini import Chat, load
from mlx_vlm_mini.borrow import borrow
from mlx_vlm_mini.decoder.cross_attention import ImageCache, Span
from mlx_vlm_mini.decoder.positions import Axes, Counting, PlacedImage
from mlx_vlm_mini.decoder.reading import Memory, Reading
from mlx_vlm_mini.decoder.state import State
from mlx_vlm_mini.generation.decode import prefill


class Snapshots:
    """A layer's cache that can go back to some lengths only."""

    def __init__(self, *lengths, offset=0):
        self.lengths, self.offset, self.rewound = lengths, offset, []

    def reach(self, length):
        return length if length >= self.offset else max((each for each in self.lengths if each <= length), default=0)

    def rewind(self, length):
        assert length == self.reach(length) > 0  # it is never asked to go where it cannot
        self.offset = length
        self.rewound.append(length)

    def empty(self):
        return not self.offset

    @property
    def state(self):
        return []

    nbytes = 0

    def update_and_fetch(self, keys, values):
        self.offset += keys.shape[2]
        return keys, values


def state_of(*layers, length=40):
    made = []

    def make():
        made.append([Snapshots() for _ in layers])
        return made[-1]

    for each in layers:
        each.offset = length
    return State(make, layers=[*layers], start=length), made


@pytest.mark.parametrize(
    ("snapshots", "length", "reached"),
    [
        ([(16, 32)], 40, 40),  # where it is already
        ([(16, 32)], 50, 40),  # further than it is
        ([(16, 32)], 39, 32),
        ([(16, 32)], 32, 32),
        ([(16, 32)], 31, 16),
        ([(16, 32)], 15, 0),
        ([()], 39, 0),
        ([(16, 32), (8, 16, 24)], 39, 16),  # the first layer goes to 32, the second then to 24, both to 16
        ([(16, 32), (10, 20, 30)], 39, 0),  # 30, 16, 10, 0
        ([(12, 30), (12, 30, 35)], 38, 30),
        ([(16, 32), (16, 32)], 0, 0),
    ],
)  # fmt: skip
def test_a_state_goes_back_to_the_nearest_snapshot_of_all_layers(snapshots, length, reached):
    layers = [Snapshots(*lengths) for lengths in snapshots]
    state, made = state_of(*layers)
    assert state.rewind(length) == reached == state.length == state.start
    if reached:
        assert state.layers == layers and not made and all(layer.offset == reached for layer in layers)
    else:
        assert state.layers == made[-1] and all(layer.empty() for layer in state.layers)
        assert all(not layer.rewound for layer in layers)


def test_layers_of_all_kinds_go_back_together():
    """One that can go anywhere, images, and one with snapshots, by which positions and images go as well."""
    anywhere, images = borrow("models.cache").KVCache(), ImageCache()
    anywhere.update_and_fetch(mx.random.normal((1, 1, 40, 4)), mx.random.normal((1, 1, 40, 4)))
    images.add(mx.random.normal((1, 1, 9, 4)), mx.random.normal((1, 1, 9, 4)))
    snapshots = Snapshots(10, 20, offset=40)
    state = State(lambda: [], layers=[anywhere, images, snapshots], start=40, prompt_length=30)
    state.spans = (Span(5, 4, 4), Span(19, 2, 2), Span(20, 3, 3))
    state.positions = Axes((PlacedImage(5, 2, 2), PlacedImage(18, 2, 2)))
    assert state.rewind(35) == 20
    assert (anywhere.offset, images.keys.shape[2], snapshots.offset) == (20, 6, 20)
    assert state.spans == (Span(5, 4, 4), Span(19, 2, 2)) and state.prompt_length == 30
    assert state.positions == Axes((PlacedImage(5, 2, 2),))


def test_a_full_rotating_cache_goes_nowhere():
    caches = borrow("models.cache")
    state = State(lambda: [caches.KVCache(), caches.RotatingKVCache(max_size=8, keep=2)])
    for entry in state.layers:
        entry.update_and_fetch(mx.zeros((1, 1, 6, 4)), mx.zeros((1, 1, 6, 4)))
    state.start = 6
    assert state.rewind(4) == 4 and [entry.offset for entry in state.layers] == [4, 4]
    for entry in state.layers:
        entry.update_and_fetch(mx.zeros((1, 1, 6, 4)), mx.zeros((1, 1, 6, 4)))
    state.start = 10
    assert state.rewind(10) == 10 and state.rewind(9) == 0
    assert all(entry.empty() for entry in state.layers) and state.positions == Counting()


def test_a_fork_of_a_state_goes_on_by_itself(llava):
    model, processor = llava
    state = model.make_state()
    logits = np.array(prefill(model.decoder, model.read(processor([PHOTO, "What?"])), state))
    length, twin = state.length, state.fork()
    token = model.decoder.read(mx.array([[7]]))
    one = np.array(model.decoder(token, twin))
    assert (state.length, twin.length) == (length, length + 1)
    assert twin.rewind(length - 3) == length - 3 and state.length == length == state.layers[0].offset
    np.testing.assert_array_equal(model.decoder(token, state), one)
    assert np.isfinite(logits).all() and state.nbytes == sum(entry.nbytes for entry in state.layers) > 0


def test_parts_of_a_reading():
    """The first one alone brings the images; what stands beside the tokens goes with them."""
    x, memory = mx.arange(12, dtype=mx.float32).reshape(1, 6, 2), Memory(mx.zeros((3, 2)))
    reading = Reading(x, memory=memory, beside=(x + 100,), prompt_length=6)
    first, second = reading.part(0, 4), reading.part(4, 6)
    assert (first.length, second.length, first.memory, second.memory) == (4, 2, memory, None)
    np.testing.assert_array_equal(second.embeddings, x[:, 4:])
    np.testing.assert_array_equal(second.beside[0], x[:, 4:] + 100)
    assert first.prompt_length == second.prompt_length == 6 and second.visible == reading.visible


STEP = 16


def make_stepping(strict):
    class Stepping(borrow("models.cache").KVCache):
        """mlx-lm's cache, as that of a layer whose state can only be what it was at certain lengths; where that is
        strict, what it is now is given up as well unless it is one of them."""

        def reach(self, length):
            return self.offset if length >= self.offset and not strict else length // STEP * STEP

        def rewind(self, length):
            assert length == self.offset or length % STEP == 0
            self.trim(self.offset - length)

        def is_trimmable(self):
            raise AssertionError("a layer that says how far back it goes is not asked this")

    return Stepping()


@pytest.fixture(params=[False, True], ids=["", "strict"])
def strict(request):
    return request.param


@pytest.fixture(params=["llava-clip-llama", "gemma3-hub", "qwen2.5-vl", "qwen3-vl", "llava-clip-mistral"])
def stepping(request, strict, monkeypatch):
    """A model whose last layer goes back in steps of tokens."""
    model, processor = load(GOLDEN / request.param)
    layer = model.decoder.layers[-1]
    monkeypatch.setattr(
        type(layer), "make_cache", lambda self, make: make_stepping(strict) if self is layer else make()
    )
    assert hasattr(model.make_state().layers[-1], "reach") and not hasattr(model.make_state().layers[0], "reach")
    return model, processor


def check(chat, chunks):
    """As a conversation that says the same anew; return the tokens that were there already."""
    fresh = Chat(chat.model, chat.processor, max_tokens=5)
    fresh.messages = [dict(message) for message in chat.messages[:-2]]
    content = chat.messages[-2]["content"]
    again = list(fresh.send(content if isinstance(content, str) else _prompt(content)))
    assert again[-1].stats.cached_tokens == 0
    assert [chunk.token for chunk in chunks] == [chunk.token for chunk in again]
    np.testing.assert_allclose([c.logprob for c in chunks], [c.logprob for c in again], atol=1e-4)
    return chunks[-1].stats.cached_tokens


def _prompt(content):
    return [part["text"] if part["type"] == "text" else part["image"] for part in content]


def test_conversations_with_a_layer_that_goes_back_in_steps(stepping, strict):
    """Their answers are those of conversations that begin anew; kept is as much as the layer can keep."""
    chat = Chat(*stepping, max_tokens=5)
    assert check(chat, list(chat.send([PHOTO, "What is to be seen in this picture, and where is it?"]))) == 0
    held = len(chat._cache.held)
    second = list(chat.send(["And in this one, ", SHAPES, "?"]))
    cached = check(chat, second)
    assert 0 < cached <= held and (cached % STEP == 0 or (cached == held and not strict))
    held = len(chat._cache.held)
    third = check(chat, list(chat.send("Why?")))
    assert third > cached and (third % STEP == 0 or (third == held and not strict))
    chat.undo()  # back into what is held, to a length that the layer may not know
    after_undo = list(chat.send("Which of them is larger, and what else is there?"))
    cached = check(chat, after_undo)
    assert cached % STEP == 0 and cached > 0
    chat.undo()
    after_edit = list(chat.edit("Nothing of all that."))
    cached = check(chat, after_edit)
    assert cached % STEP == 0 and 0 < cached <= held
    other = chat.fork()
    assert check(other, list(other.send("Go on"))) >= cached
