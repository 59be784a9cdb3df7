"""Conversations that are saved and loaded: the same answers, what changed is noticed, what is hostile is refused."""

import json

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import PHOTO, PLAIN, SHAPES
from PIL import Image

from mlx_vlm_mini import Chat, load
from mlx_vlm_mini.checkpoints.fingerprint import fingerprint
from mlx_vlm_mini.errors import ImageError, PromptError


def answer(chat, prompt="And now?"):
    chunks = list(chat.send(prompt))
    return [chunk.token for chunk in chunks], [chunk.logprob for chunk in chunks], chunks[-1].stats


def same(one, other):
    assert one[0] == other[0]
    np.testing.assert_allclose(one[1], other[1], atol=1e-4)


@pytest.fixture
def saved(llava, tmp_path):
    """A conversation about three pictures: one from a file, one from memory, one from bytes."""
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(PHOTO.read_bytes())
    chat = Chat(*llava, system="Be brief.", max_tokens=4, temperature=0.0, stop=["xyz"])
    answer(chat, ["See ", photo, " and ", Image.new("RGB", (30, 20), "red"), "."])
    answer(chat, [SHAPES.read_bytes(), "too"])
    return chat, tmp_path / "talk.json"


def test_a_loaded_conversation_goes_on_as_it_would_have(llava, saved):
    chat, file = saved
    chat.save(file, cache=True)
    assert sorted(path.suffix for path in file.parent.iterdir()) == [".image", ".jpg", ".json", ".png", ".safetensors"]
    with_cache = Chat.load(file, *llava)
    chat.save(file.parent / "folder")
    assert not (file.parent / "folder" / "conversation.safetensors").exists()
    without = Chat.load(file.parent / "folder", *llava, max_tokens=3)
    assert with_cache.notes == without.notes == []
    assert (
        with_cache.options == {"max_tokens": 4, "temperature": 0.0, "stop": ["xyz"]}
        and without.options["max_tokens"] == 3
    )
    assert with_cache.system == without.system == "Be brief."
    expected = answer(chat)
    reused, read = answer(with_cache), answer(without)
    same(expected, reused)
    same([part[:3] for part in expected[:2]], read)
    assert reused[2].cached_tokens == expected[2].cached_tokens > 40 and reused[2].encoded_images == 0
    assert read[2].cached_tokens == 0 and read[2].encoded_images == 3


def test_saving_without_the_cache_takes_an_older_one_away(saved):
    chat, file = saved
    chat.save(file, cache=True)
    chat.save(file)
    assert not file.with_suffix(".safetensors").exists()


def test_another_picture_in_its_place_is_noticed(llava, saved):
    chat, file = saved
    chat.save(file, cache=True)
    (file.parent / "photo.jpg").write_bytes(SHAPES.read_bytes())
    other = Chat.load(file, *llava)
    assert len(other.notes) == 1 and "photo.jpg has changed" in other.notes[0]
    _, logprobs, stats = answer(other)
    assert stats.cached_tokens < 45 and stats.encoded_images == 2  # the changed picture is one that is there already
    assert logprobs != pytest.approx(answer(chat)[1], abs=1e-3)


def test_a_picture_that_is_gone_is_named(llava, saved):
    chat, file = saved
    chat.save(file)
    (file.parent / "photo.jpg").unlink()
    with pytest.raises(ImageError, match=r"image not found: .*photo\.jpg"):
        Chat.load(file, *llava)


def test_another_model_is_noticed(llava, saved, copy_of):
    chat, file = saved
    chat.save(file, cache=True)
    folder = copy_of()
    arrays = mx.load(str(folder / "model.safetensors"))
    name = next(name for name in arrays if name.endswith("layers.1.mlp.up_proj.weight"))
    arrays[name][3, 5] += 0.5
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "pt"})
    changed = load(folder)
    assert fingerprint(changed[0]) != fingerprint(llava[0]) == fingerprint(load(PLAIN)[0])
    other = Chat.load(file, *changed)
    assert len(other.notes) == 1 and "another model" in other.notes[0]
    assert answer(other)[2].cached_tokens == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays, meta: arrays.pop("layers.0.keys"), "not the layers of this model"),
        (
            lambda arrays, meta: arrays.update({"layers.0.keys": arrays["layers.0.keys"][:, :, :, :4]}),
            "layers.0.keys is F32",
        ),
        (
            lambda arrays, meta: arrays.update({"layers.1.values": arrays["layers.1.values"].astype(mx.float16)}),
            "is F16",
        ),
        (lambda arrays, meta: arrays.update(held=arrays["held"][:, :4]), "which tokens it holds"),
        (lambda arrays, meta: arrays.update(held=arrays["held"] + 1), "another conversation"),
        (lambda arrays, meta: meta.update(model="0"), "another model"),
    ],
)
def test_a_cache_that_does_not_fit_is_not_used(llava, saved, change, message):
    chat, file = saved
    chat.save(file, cache=True)
    cache = file.with_suffix(".safetensors")
    arrays, metadata = mx.load(str(cache), return_metadata=True)
    mx.eval(arrays)
    change(arrays, metadata)
    cache.unlink()
    mx.save_safetensors(str(cache), {name: mx.contiguous(array) for name, array in arrays.items()}, metadata)
    other = Chat.load(file, *llava)
    assert len(other.notes) == 1 and message in other.notes[0] and "\n" not in other.notes[0]
    repeated = answer(other)
    assert repeated[2].cached_tokens == 0
    same(answer(chat), repeated)


def test_a_broken_or_missing_cache_is_noticed(llava, saved):
    chat, file = saved
    chat.save(file, cache=True)
    cache = file.with_suffix(".safetensors")
    cache.write_bytes(cache.read_bytes()[:-10])
    assert "truncated" in Chat.load(file, *llava).notes[0]
    cache.unlink()
    assert "missing" in Chat.load(file, *llava).notes[0]


TEXT = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "not a conversation"),
        ({"version": 2}, "not a conversation"),
        ({"messages": "Hi"}, "lacks its messages"),
        ({"messages": [17]}, "message 1 is not a role"),
        ({"messages": [TEXT, {"role": "user"}]}, "message 2 is not a role"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "neither text nor an image"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "path": "a.png"}]}]},
            "neither text nor an image",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "path": "/dev/zero", "sha256": ""}]}]},
            "is not a file",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image", "path": "a\0b", "sha256": ""}]}]}, "not"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "path": "none.png", "sha256": ""}]}]},
            "not found",
        ),
        ({"model": None}, "lacks its messages"),
        ({"cache": 5}, "lacks its messages"),
        ({"options": []}, "options must be an object"),
        ({"options": {"max_tokens": "9"}}, 'max_tokens="9" is none'),
        ({"options": {"max_tokens": True}}, "max_tokens=true is none"),
        ({"options": {"stop": [1]}}, "stop=[1] is none"),
        ({"options": {"sampler": "exec"}}, "sampler="),
        ({"options": {"model": "x"}}, "model="),
        ({"settings": {"context": -5}}, "context must be"),
        ({"settings": {"rotate": 1e99}}, "rotate=1e+99 is none"),
        ({"settings": {"on_full": "explode"}}, "on_full must be"),
        ({"settings": {"feature_memory": 5}}, "feature_memory=5 is none"),
    ],
    ids=str,
)
def test_a_hostile_file_gives_one_line(llava, tmp_path, change, message):
    file = tmp_path / "talk.json"
    Chat(*llava).save(file)
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises((PromptError, ImageError)) as error:
        Chat.load(file, *llava)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 10**5, "\xff"])
def test_what_is_no_conversation_is_refused(llava, tmp_path, text):
    file = tmp_path / "talk.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(PromptError, match=r"talk\.json"):
        Chat.load(file, *llava)
    with pytest.raises(PromptError, match="is missing"):
        Chat.load(tmp_path / "none", *llava)


def test_what_cannot_be_written_leaves_what_was_there(saved, monkeypatch):
    chat, file = saved
    chat.save(file)
    before = file.read_text()
    answer(chat)
    monkeypatch.setattr("pathlib.Path.write_text", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(PromptError, match="cannot save .*No space left"):
        chat.save(file)
    assert file.read_text() == before and not [path for path in file.parent.iterdir() if path.name.startswith(".")]
