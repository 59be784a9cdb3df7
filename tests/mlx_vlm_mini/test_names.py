"""Names of files as macOS writes them and people type them."""

import errno
import os
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlx_vlm_mini.errors import ImageError
from mlx_vlm_mini.images.names import find_file, natural
from mlx_vlm_mini.images.source import SERVED, open_image, read_image
from mlx_vlm_mini.images.video import Video, list_pictures, open_video

SCREENSHOT = "Screenshot 2026-05-01 at 3.04.05\u202fPM.png"


def save(file: Path, size: tuple[int, int] = (4, 3)) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(file, "PNG")
    return file


def test_a_screenshot_is_found_by_a_plain_space(tmp_path):
    file = save(tmp_path / SCREENSHOT)
    picture = read_image(str(tmp_path / SCREENSHOT.replace("\u202f", " ")))
    assert picture.path == file
    save(tmp_path / SCREENSHOT.replace("\u202f", " "), (9, 9))  # what is there is meant
    assert open_image(tmp_path / SCREENSHOT.replace("\u202f", " ")).size == (9, 9)
    save(tmp_path / SCREENSHOT.replace("\u202f", "\xa0"))  # two look alike: neither is taken
    assert find_file(tmp_path / SCREENSHOT.replace("\u202f", "\u2009")) != file


@pytest.mark.parametrize(("there", "typed"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_accents_of_one_character_or_two(tmp_path, there, typed):
    name = "Bücher/Été à Zürich.png"
    save(tmp_path / unicodedata.normalize(there, name))
    assert open_image(tmp_path / unicodedata.normalize(typed, name)).size == (4, 3)


def test_what_is_not_there_says_what_is_near(tmp_path):
    save(tmp_path / "holiday photo.png")
    with pytest.raises(ImageError, match="image not found: .*/holidayphoto.png; there is 'holiday photo.png'"):
        open_image(tmp_path / "holidayphoto.png")
    with pytest.raises(ImageError, match=r"image not found: .*/tree\.jpg$"):
        open_image(tmp_path / "tree.jpg")


def test_privacy_settings_of_macos_are_named(tmp_path, monkeypatch):
    file = save(tmp_path / "a.png")
    monkeypatch.setattr(sys, "platform", "darwin")

    def forbidden(*_: object) -> int:
        raise PermissionError(errno.EPERM, "Operation not permitted", str(file))

    monkeypatch.setattr(os, "open", forbidden)
    with pytest.raises(
        ImageError, match="Operation not permitted: allow this terminal in System Settings > Privacy & Sec"
    ):
        open_image(file)


def test_addresses_of_files_and_the_home_folder(tmp_path, monkeypatch):
    file = save(tmp_path / "a b.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (f"file://{tmp_path}/a%20b.png", f"FILE://localhost{tmp_path}/a%20b.png", "~/a b.png"):
        assert read_image(name).path == file
        with pytest.raises(ImageError, match="files are not opened here"):
            read_image(name, SERVED)


def test_frames_in_numeric_order(tmp_path):
    for number in range(12, 0, -1):
        save(tmp_path / f"frame{number}.png", (number, 1) if number < 3 else (3, 1))
    assert [file.stem for file in list_pictures(tmp_path)] == [f"frame{number}" for number in range(1, 13)]
    assert sorted(map(Path, ("b", "a10", "a9", "10", "9"))) != sorted(
        map(Path, ("b", "a10", "a9", "10", "9")), key=natural
    )
    assert open_video(Video(f"file://{tmp_path}")).total == 12


@pytest.mark.parametrize("high", [1.0, 1.001, 255.0, 255.4])
def test_floats_of_two_ranges(high):
    top = 255 if high < 2 else 1
    pixels = np.array([[0.0, high / 2, high]])
    assert np.abs(np.asarray(open_image(pixels))[0, :, 0] - np.array([0, 127, 255])).max() <= 1, top


@pytest.mark.parametrize("high", [1.5, 256.0, 300.0, 65535.0])
def test_floats_that_may_be_either_are_refused_by_name(high):
    with pytest.raises(ImageError, match=f"from 0 to {high:g}, which may mean several things: give uint8, uint16, or"):
        open_image(np.array([[0.0, high]]))


def test_what_numpy_cannot_read_is_one_line():
    class Tensor:
        def __array__(self, *_: object, **__: object) -> np.ndarray:
            raise RuntimeError("requires grad")

    closed = Image.new("RGB", (2, 2))
    closed.close()
    for source, message in (
        (Tensor(), "the numbers of Tensor cannot be read: requires grad"),
        (closed, "the image is bro"),
    ):
        with pytest.raises(ImageError, match=message):
            open_image(source)
