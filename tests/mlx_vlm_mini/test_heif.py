"""HEIC, as phones write it: upright once, the first picture, within the limits of other images."""

import io
import random
import struct
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pillow_heif
import pytest
from PIL import Image

import mlx_vlm_mini.images.decode as room
from mlx_vlm_mini.errors import ImageError
from mlx_vlm_mini.images.source import image_size, open_image

PIXELS = np.zeros((48, 80, 3), np.uint8)
PIXELS[:24, :40] = 250, 20, 30  # the upper left quarter is red
PIXELS[24:] = 20, 30, 220


def heic(*images: Image.Image, **options: Any) -> bytes:
    """A file whose pictures are these, the first one shown."""
    buffer, written = io.BytesIO(), pillow_heif.HeifFile()
    for image in images:
        written.add_from_pillow(image)
    written.save(buffer, quality=95, chroma=444, **options)
    return buffer.getvalue()


HEIC = heic(Image.fromarray(PIXELS))


def near(image: Image.Image, expected: np.ndarray) -> None:
    assert image.mode == "RGB" and image.size == expected.shape[1::-1]
    assert np.abs(np.asarray(image).astype(int) - expected).mean() < 6


def test_a_photo_opens_without_a_step_of_the_caller(tmp_path):
    """In a process in which nobody has registered anything; and nothing is imported for other files."""
    (tmp_path / "IMG_1.HEIC").write_bytes(HEIC)
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    code = (
        "import sys\nfrom mlx_vlm_mini.images.source import open_image\n"
        "open_image(sys.argv[1])\nassert 'pi_heif' not in sys.modules\n"
        "from PIL import Image\nprint(open_image(sys.argv[2]).getpixel((5, 5)), 'HEIF' in Image.OPEN)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "a.png", tmp_path / "IMG_1.HEIC"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("(2") and done.stdout.endswith("False\n")
    assert image_size(tmp_path / "IMG_1.HEIC") == (80, 48)


@pytest.mark.parametrize("brand", [b"heic", b"heix", b"hevc", b"mif1", b"msf1", b"heim", b"heis"])
def test_brands(brand):
    near(open_image(HEIC[:8] + brand + HEIC[12:]), PIXELS)


def test_avif_that_calls_itself_mif1_stays_pillows():
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "AVIF", quality=90)
    data = buffer.getvalue()
    near(open_image(data[:8] + b"mif1" + data[12:]), PIXELS)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_it_is_turned_once(orientation):
    """By what turns the picture in HEIF; the tag of EXIF, which phones write besides, turns it no second time."""
    turned = {
        1: PIXELS, 2: PIXELS[:, ::-1], 3: PIXELS[::-1, ::-1], 4: PIXELS[::-1], 5: PIXELS.transpose(1, 0, 2),
        6: np.rot90(PIXELS), 7: PIXELS[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(PIXELS, -1),
    }[orientation]  # fmt: skip
    image = Image.fromarray(np.ascontiguousarray(turned))
    exif = image.getexif()
    exif[0x0112] = orientation
    image.info["exif"] = exif.tobytes()
    image.encoderinfo = {"quality": 95, "chroma": 444}
    buffer = io.BytesIO()
    pillow_heif.as_plugin._save_heif(image, buffer, "")  # registered nowhere, as in the program
    data = buffer.getvalue()
    assert (b"irot" in data or b"imir" in data) == (orientation > 1)
    place = data.index(b"Exif\0\0MM") if b"Exif\0\0MM" in data else data.index(b"Exif\0\0II")
    order = "little" if data[place + 6 : place + 8] == b"II" else "big"
    found = data.index((0x0112).to_bytes(2, order), place) + 8
    data = data[:found] + orientation.to_bytes(2, order) + data[found + 2 :]  # as phones leave it
    near(open_image(data), PIXELS)


def test_the_first_of_several():
    near(open_image(heic(Image.fromarray(PIXELS), Image.new("RGB", (16, 16), "green"))), PIXELS)


def test_ten_bits():
    deep = (PIXELS.astype(np.uint16) << 8) | PIXELS
    written = pillow_heif.from_bytes(mode="RGB;16", size=(80, 48), data=deep.tobytes())
    buffer = io.BytesIO()
    written.save(buffer, quality=95, chroma=444)
    assert pillow_heif.open_heif(io.BytesIO(buffer.getvalue()), convert_hdr_to_8bit=False).info["bit_depth"] == 10
    near(open_image(buffer.getvalue()), PIXELS)


def test_transparency_shows_white_and_grey_stays_grey():
    alpha = np.dstack([PIXELS, np.full((48, 80), 255, np.uint8)])
    alpha[24:, :, 3] = 0
    expected = PIXELS.copy()
    expected[24:] = 255
    near(open_image(heic(Image.fromarray(alpha))), expected)
    near(open_image(heic(Image.new("L", (18, 16), 77))), np.full((16, 18, 3), 77))


def test_limits_hold_before_pixels_are_decoded(monkeypatch):
    monkeypatch.setitem(room.MOST_ELSEWHERE, "HEIF", 3000)
    with pytest.raises(ImageError, match="the image bytes is too large: .* limit is 0"):
        open_image(HEIC)
    monkeypatch.setattr(room, "MOST_HEIF_BYTES", 100)
    with pytest.raises(ImageError, match="the limit for HEIC is 0: save it as JPEG"):
        open_image(HEIC)


def test_a_size_that_is_a_lie_is_no_way_around_the_limit():
    """The coded picture is large, the file says that it is small: libheif bounds the one by the other."""
    data = bytearray(heic(Image.new("RGB", (500, 400), "red")))
    place = data.index(b"ispe")
    data[place + 8 : place + 16] = struct.pack(">II", 16, 16)
    with pytest.raises(ImageError, match=r"^the image bytes is broken: .*get it or save it anew$"):
        open_image(bytes(data))


def test_grey_whose_bits_are_a_lie():
    """Found by fuzzing: 10 bits said, 8 there. pi-heif's own plugin for Pillow writes past the end of the plane."""
    data = heic(Image.new("L", (140, 90), 77))
    place = data.index(b"pixi")
    lie = data[: place + 9] + b"\x0a" + data[place + 10 :]
    hvc = lie.index(b"hvcC") + 4 + 17
    lie = lie[:hvc] + bytes([0xF8 | 2, 0xF8 | 2]) + lie[hvc + 2 :]
    assert pillow_heif.open_heif(io.BytesIO(lie)).info["bit_depth"] == 10
    with pytest.raises(ImageError, match=r"^the image bytes is broken: it says 10 bits of grey and has others"):
        open_image(lie)
    deep = pillow_heif.from_bytes(mode="L;16", size=(80, 48), data=(np.full((48, 80), 77, np.uint16) * 257).tobytes())
    buffer = io.BytesIO()
    deep.save(buffer, quality=95)
    near(open_image(buffer.getvalue()), np.full((48, 80, 3), 77))


def test_broken_files_are_one_line_each(capfd):
    drawn = random.Random(0)
    inputs = [HEIC[:end] for end in range(12, len(HEIC), 31)]
    for _ in range(150):
        found = bytearray(HEIC)
        for _ in range(drawn.choice((1, 2, 5))):
            place = drawn.randrange(len(found))
            found[place : place + drawn.choice((0, 1, 4))] = drawn.randbytes(drawn.choice((1, 1, 4)))
        inputs.append(bytes(found))
    refused = 0
    for data in inputs:
        begin = time.process_time()
        try:
            assert open_image(data).mode == "RGB"
        except ImageError as error:
            refused += 1
            assert str(error).isprintable() and len(str(error)) < 500
        assert time.process_time() - begin < 2
    assert refused > 40
    assert capfd.readouterr() == ("", "")
