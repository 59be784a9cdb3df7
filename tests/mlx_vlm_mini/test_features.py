"""Pictures in a conversation: decoded once, encoded once, kept within a limit."""

import os
import shutil

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import PHOTO, SHAPES
from PIL import Image

from mlx_vlm_mini import Chat
from mlx_vlm_mini.generation.features import Features
from mlx_vlm_mini.inputs import InputImage


@pytest.fixture
def opened(monkeypatch):
    """Each decoding of a picture."""
    calls = []
    import mlx_vlm_mini.processor as room

    original = room.open_image
    monkeypatch.setattr(room, "open_image", lambda *given: calls.append(given) or original(*given))
    return calls


def test_a_file_is_decoded_and_encoded_once_whatever_its_path(llava, tmp_path, opened):
    copy = shutil.copyfile(PHOTO, tmp_path / "copy.jpg")
    chat = Chat(*llava, max_tokens=2)
    encoded = []
    for turn in (
        [PHOTO, "and ", copy],
        [PHOTO.read_bytes(), "again ", PHOTO],
        ["not ", SHAPES, " but ", str(PHOTO), copy],
    ):
        encoded.append(list(chat.send(turn))[-1].stats.encoded_images)
    assert encoded == [1, 0, 1]
    assert len(opened) == 2
    origins = [
        part["image"].origin for message in chat.messages for part in message["content"] if part["type"] == "image"
    ]
    assert [origin.path for origin in origins] == [PHOTO, copy, None, PHOTO, SHAPES, copy]


def test_a_file_that_changed_is_another_picture(llava, tmp_path):
    """Same name, same size in bytes, same time."""
    file = tmp_path / "a.bmp"
    Image.new("RGB", (42, 42), "red").save(file)
    before = file.stat()
    chat = Chat(*llava, max_tokens=2)
    red = list(chat.send([file, "What?"]))
    Image.new("RGB", (42, 42), "blue").save(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    blue = list(chat.edit([file, "What?"]))
    assert blue[-1].stats.encoded_images == 1
    assert blue[0].logprob != pytest.approx(red[0].logprob, abs=1e-4)


def image(value):
    return InputImage(pixel_values=np.zeros((1, 1, 1, 3)), tokens=1, size=(1, 1), digest=bytes([value]) * 32)


def test_what_was_used_least_recently_is_given_up():
    features, encoded = Features(limit=1000), []

    def encode(each):
        encoded.append(each.digest[0])
        return mx.zeros((100, 1))  # 400 bytes

    for value in (1, 2, 1, 3, 1, 2):
        features.encode(image(value), encode)
    assert encoded == [1, 2, 3, 2] and features.nbytes == 800
    features = Features(limit=399)
    for _ in range(2):
        features.encode(image(1), encode)
    assert encoded[-2:] == [1, 1] and features.nbytes == 0


def test_without_memory_pictures_are_encoded_again(llava):
    chat = Chat(*llava, max_tokens=2, feature_memory=0)
    assert [list(chat.send([PHOTO, "What?"]))[-1].stats.encoded_images for _ in range(3)] == [1, 1, 1]
    assert list(chat.send("And?"))[-1].stats.encoded_images == 0  # the cache has it
