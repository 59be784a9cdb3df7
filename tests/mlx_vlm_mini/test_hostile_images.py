"""Pictures from strangers: each gives the right picture or one line, soon and in little memory.

benchmarks/fuzz_images.py throws a million of them; here stand the kinds, and what was found.
"""

import io
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image, ImageCms, ImageOps

import mlx_vlm_mini.images.decode as room
import mlx_vlm_mini.images.source as opening
from mlx_vlm_mini.errors import ImageError, PromptError, VLMError
from mlx_vlm_mini.families import FAMILIES
from mlx_vlm_mini.images.source import image_size, open_image, read_image
from mlx_vlm_mini.preprocessing.bars import pad_and_resize, pad_to_square
from mlx_vlm_mini.preprocessing.settings import image_settings


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.copy().save(buffer, form, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def tiff(tags: list[tuple[int, int, int, int]], size: int = 5000) -> bytes:
    table = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in sorted(tags)) + bytes(4)
    return (b"II*\0\x08\0\0\0" + table).ljust(size, b"\0")


def bmp(width: int, height: int, pixels: bytes, runs: int = 1) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, runs, len(pixels), 0, 0, 2, 0) + bytes(8)
    return b"BM" + struct.pack("<IHHI", 14 + len(head) + len(pixels), 0, 0, 14 + len(head)) + head + pixels


def jpeg_of(width: int, height: int) -> bytes:
    """A JPEG that says it has another size than it has."""
    data = bytearray(encoded(Image.new("L", (8, 8)), "JPEG"))
    place = data.index(b"\xff\xc0")
    data[place + 5 : place + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def exif_of(*tags: tuple[int, int, int, int], size: int = 0) -> bytes:
    return b"Exif\0\0" + tiff(list(tags), size)


def with_exif(jpeg: bytes, *blocks: bytes) -> bytes:
    return jpeg[:2] + b"".join(b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block for block in blocks) + jpeg[2:]


RGB = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((23, 17))
JPEG, PROGRESSIVE = encoded(RGB, "JPEG"), encoded(RGB, "JPEG", progressive=True)
SCAN = b"\xff\xda\x00\x08\x01\x01\x00\x01\x3f\x00"  # of no data, which goes through the whole picture all the same
GIF = encoded(RGB.quantize(4), "GIF")
SIZE = [(256, 4, 1, 10), (257, 4, 1, 10), (258, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1)]
LAB_PROFILE = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
LAB_PROFILE[16:20] = b"Lab "


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (JPEG[:300], "is broken: .*; get it or save it anew"),
        (png(0, 0), "not an image|is broken|0x0"),
        (png(65500, 65500), "too large: 4,290 megapixels"),
        (jpeg_of(65500, 65500), "too large: 4,290 megapixels"),
        (GIF[:6] + struct.pack("<HH", 65500, 65500) + GIF[10:], "too large"),
        (tiff([(256, 4, 1, 65500), (257, 4, 1, 65500), *SIZE[2:], (273, 4, 1, 200), (279, 4, 1, 9)]), "too large"),
        (bmp(65500, 65500, b""), "too large"),
        (b"P6 65500 65500 255\n", "too large"),
        (PROGRESSIVE[:-2] + SCAN * 200 + b"\xff\xd9", "a JPEG with .* parts, 101 of them scans"),
        (b"\xff\xd8" + b"\xff\xfe\x00\x02" * 20_000 + JPEG[2:], "a JPEG with 10001 parts"),
        (with_exif(JPEG, *[exif_of(size=60_000)] * 3), "bytes of EXIF"),
        (
            bmp(60_000_000, 1, b"\x01\x01\0\0"),
            "no side may have above 262,144",
        ),  # found by fuzzing: a row of 17 million took 1.7 s
        (tiff([*SIZE, (273, 4, 5_000_000, 8), (279, 4, 1, 9)]), "its tag 273 has 5000000 values"),
        (
            tiff([*SIZE, (259, 3, 1, 5), (322, 4, 1, 46000), (323, 4, 1, 46000), (324, 4, 1, 200), (325, 4, 1, 9)]),
            "large",
        ),
        (tiff([*SIZE, (259, 3, 1, 34925), (273, 4, 1, 200), (279, 4, 1, 9)]), "is a TIFF compressed as lzma"),
        (png(1, 1, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8)))), "is broken: Decompressed data too large"),
        (encoded(RGB, "JPEG", icc_profile=bytes(LAB_PROFILE)), "holds Lab colours"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40), "is broken: .*; get it or save it anew"),
        (b"\0\0\0\x18ftypisom\0\0\0\0" + bytes(40), "but a video"),
        (b'<?xml version="1.0"?>\n<!-- -->\n<svg xmlns="http://www.w3.org/2000/svg"/>', "but SVG"),
        (b"%PDF-1.7\n%%EOF", "is broken, or no PDF that PDFium can read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF", "but PostScript"),
        (b"\xc5\xd0\xd3\xc6" + struct.pack("<6I", 30, 40, 0, 0, 0, 0) + b"\0\0%!PS-Adobe-3.0\n", "but PostScript"),
        (b"no picture, but a text named photo.jpg", "but text"),
        (b"PK\x03\x04" + bytes(40), "but an archive"),
        (b"<!DOCTYPE html><title>404</title>", "but a web page"),
        (encoded(Image.new("F", (2, 2), -7.0), "TIFF"), "^the image bytes: pixel values run from -7"),
        (encoded(RGB, "ICO"), "not an image that Pillow can read"),  # forms that are not asked for
        (encoded(RGB, "TGA"), "not an image that Pillow can read"),
        (encoded(RGB, "JPEG2000"), "not an image that Pillow can read"),
    ],
)
def test_hostile_files(data, message, monkeypatch, capfd):
    """One line each, soon; no program runs, and no library writes to the terminal by itself."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", None)
    begin = time.thread_time()
    with pytest.raises(ImageError, match=message) as error:
        open_image(data)
    assert time.thread_time() - begin < 2
    assert str(error.value).isprintable()
    assert capfd.readouterr() == ("", "")


WRITING = """
import os, sys, threading
from pathlib import Path
from mlx_vlm_mini.errors import ImageError
from mlx_vlm_mini.images.source import open_image

ended = threading.Event()

def write():
    number = 0
    while not ended.is_set() or number < 1000:
        os.write(2, b"line %d\\n" % number)
        number += 1
    os.write(1, b"%d" % number)

writer = threading.Thread(target=write)
writer.start()
for _ in range(100):
    for name in sys.argv[1:]:
        try:
            open_image(Path(name))
        except ImageError:
            pass
ended.set()
writer.join()
"""


def test_what_others_write_meanwhile_is_not_lost(tmp_path):
    """While TIFFs are decoded, of which libtiff finds one amiss: all that another thread writes to stderr, that alone."""
    whole = encoded(RGB, "TIFF", compression="tiff_lzw")
    files = [tmp_path / "whole.tif", tmp_path / "broken.tif"]
    for file, data in zip(files, (whole, whole[:8] + bytes(40) + whole[48:]), strict=True):
        file.write_bytes(data)
    done = subprocess.run([sys.executable, "-c", WRITING, *files], capture_output=True, check=True)
    assert done.stderr.splitlines() == [b"line %d" % number for number in range(int(done.stdout))]


def test_libtiff_that_is_not_found_is_let_be(monkeypatch):
    monkeypatch.setattr(room.ctypes, "CDLL", lambda name: object())
    room._silence_libtiff.__wrapped__()


@pytest.mark.parametrize(
    "data",
    [
        png(1, 1, chunk(b"tEXt", b"a\0") * 20_000),
        GIF[:-1] + b"\x21\xfe\x01a\0" * 20_000,
        GIF[:13] + b"\x21\xfe" + (b"\xff" + bytes(255)) * 5000 + b"\0",
        b"P3 500 500 255\n" + b"1 " * 200_000,
        bmp(2000, 2000, b"\x01\x01\0\0" * 2000),
    ],
    ids=["chunks", "comments", "one comment", "numbers in words", "runs"],
)
def test_what_takes_too_long_is_stopped(monkeypatch, data):
    """At a hundredth of the real limit. (Comments behind a GIF's first picture are not even read.)"""
    monkeypatch.setattr(room, "MOST_SECONDS", 0.01)
    begin = time.thread_time()
    try:
        open_image(data)
    except ImageError as error:
        assert "takes too long to decode" in str(error) or "is broken" in str(error)
    assert time.thread_time() - begin < 0.5


def test_scans_of_a_large_picture_are_counted(monkeypatch):
    monkeypatch.setattr(room, "_MOST_SCANNED", 23 * 17 * 10)
    assert open_image(PROGRESSIVE).size == RGB.size
    with pytest.raises(ImageError, match="too large"):
        open_image(PROGRESSIVE[:-2] + SCAN + b"\xff\xd9")


@pytest.mark.parametrize(
    ("form", "mode", "options"),
    [
        ("JPEG", "RGB", {}), ("JPEG", "L", {"progressive": True}), ("JPEG", "CMYK", {}), ("MPO", "RGB", {"save_all": True}),
        ("PNG", "RGB", {}), ("PNG", "P", {}), ("PNG", "1", {}), ("PNG", "L", {"save_all": True}), ("GIF", "P", {}),
        ("WEBP", "RGB", {}), ("TIFF", "RGB", {"compression": "jpeg"}), ("TIFF", "CMYK", {}), ("BMP", "RGB", {}),
        ("TIFF", "1", {"compression": "group4"}), ("TIFF", "P", {"compression": "tiff_lzw"}), ("PPM", "RGB", {}),
        ("TIFF", "RGB", {"compression": "tiff_adobe_deflate"}), ("BMP", "P", {}), ("PPM", "L", {}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("turned", [1, 6])
def test_right_pictures(form, mode, options, turned):
    """As Pillow alone gives them, whatever their names end with; animated ones by their first frame."""
    exif, image = Image.Exif(), RGB.convert(mode)
    exif[0x0112] = turned
    if form in ("JPEG", "PNG", "WEBP", "TIFF"):
        options = options | {"exif": exif}
    if options.get("save_all"):
        options = options | {"append_images": [image.rotate(180)]}
    data = encoded(image, form, **options)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    np.testing.assert_array_equal(np.asarray(open_image(data)), np.asarray(expected))


def test_broken_exif_does_not_matter():
    """Tables that point at themselves, blocks that are cut, an orientation that is none; a good one counts all the same."""
    loop = [(0x8769, 4, 1, 8), (0x8825, 4, 1, 8), (0xA005, 4, 1, 8)]
    assert open_image(with_exif(JPEG, exif_of(*loop, (0x0112, 3, 1, 1)))).size == (23, 17)
    assert open_image(with_exif(JPEG, exif_of(*loop, (0x0112, 3, 1, 6)))).size == (17, 23)
    assert open_image(with_exif(JPEG, exif_of((0x010F, 2, 2**31, 2**31), (0x0112, 3, 1, 8)))).size == (17, 23)
    assert open_image(with_exif(JPEG, exif_of((0x0112, 3, 1, 77)))).size == (23, 17)
    assert open_image(with_exif(JPEG, exif_of((0x0112, 3, 1, 6))[:20])).size == (23, 17)
    big = [(number, 7, 30_000, 8) for number in range(1000, 2500)]  # one place, read 1,500 times
    assert open_image(with_exif(JPEG, exif_of(*big, (0x0112, 3, 1, 6), size=60_000))).size == (17, 23)
    data = encoded(RGB, "PNG")
    for block in (tiff([*loop, (0x0112, 3, 1, 6)], 0), tiff([*big, (0x0112, 3, 1, 6)], 60_000)):
        assert open_image(data[:33] + chunk(b"eXIf", block) + data[33:]).size == (17, 23)
    xmp = b'<x tiff:Orientation="6">'
    assert open_image(encoded(RGB, "WEBP", xmp=xmp)).size == (17, 23)
    assert open_image(encoded(RGB, "JPEG", xmp=xmp)).size == (17, 23)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "CMYK", "I;16", "LAB", "1"])
def test_bands_give_the_same_pixels(monkeypatch, mode):
    """A picture is converted in bands of rows, of which nothing is to be seen."""
    whole = Image.new("LAB", (30, 40), (120, 140, 90)) if mode == "LAB" else RGB.resize((30, 40))
    whole = Image.fromarray(np.asarray(RGB.convert("L")).astype(np.uint16) * 257) if mode == "I;16" else whole
    whole = whole if whole.mode == mode or mode == "I;16" else whole.convert(mode)
    expected = open_image(whole)
    monkeypatch.setattr(room, "_BAND", 100)
    np.testing.assert_array_equal(np.asarray(open_image(whole)), np.asarray(expected))


KINDS = [JPEG, PROGRESSIVE, GIF, encoded(RGB), encoded(RGB, "WEBP"), encoded(RGB, "TIFF", compression="tiff_lzw"),
         encoded(RGB.quantize(9), "BMP"), encoded(RGB, "PPM")]  # fmt: skip


@given(
    st.sampled_from(KINDS),
    st.lists(st.tuples(st.integers(0, 2000), st.binary(max_size=4)), max_size=4),
    st.integers(0, 4000),
)
@settings(max_examples=200, deadline=None)
def test_whatever_is_written_over_a_picture(data, changes, end):
    """Bytes replaced, the end cut off: a picture, or one line."""
    broken = bytearray(data)
    for place, value in changes:
        broken[place % len(data) : place % len(data) + len(value)] = value
    try:
        assert open_image(bytes(broken[:end])).mode == "RGB"
    except VLMError as error:
        assert str(error).isprintable()


@settings(deadline=None)  # a PDF's header starts PDFium
@given(st.binary(max_size=60))
def test_any_bytes(data):
    try:
        assert open_image(data).mode == "RGB"
    except VLMError as error:
        assert str(error).isprintable()


def test_what_is_no_file_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "round.jpg").symlink_to(tmp_path / "round.jpg")
    (tmp_path / "link.jpg").symlink_to("/dev/zero")
    monkeypatch.chdir(tmp_path)  # for the socket's name may not be long
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket.jpg")
        for name, message in (
            ("folder.jpg", "is a folder, not an image"),
            ("round.jpg", "cannot read image"),
            ("link.jpg", "is a device, not an image"),
            ("socket.jpg", "cannot read image"),
            ("/dev/zero", "is a device, not an image"),
            ("a\nb\x1b[2J.jpg", r"image not found: a b\\x1b\[2J.jpg"),
            ("a\0b", "cannot read image"),
            ("x" * 5000, "cannot read image"),
        ):
            with pytest.raises(ImageError, match=message) as error:
                open_image(name)
            assert str(error.value).isprintable() and len(str(error.value)) < 2100
        for name in ("folder.jpg", "link.jpg", "socket.jpg"):
            with pytest.raises(ImageError):
                image_size(tmp_path / name)


def test_pipes(tmp_path, monkeypatch):
    """What comes through one is a picture; one without a writer, or with one who is silent, is left."""
    pipe = tmp_path / "pipe.jpg"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=[JPEG])
    writer.start()
    picture = read_image(pipe)
    writer.join()
    assert picture.data == JPEG and picture.path is None
    monkeypatch.setattr(opening, "_WRITER", 0.05)
    monkeypatch.setattr(opening, "_SILENCE", 0.05)
    with pytest.raises(ImageError, match="is empty"):
        open_image(pipe)
    holder = os.open(pipe, os.O_RDWR)
    with pytest.raises(ImageError, match="a pipe, gave nothing for 0.05 s"):
        open_image(pipe)
    os.close(holder)


def test_files_without_an_end(tmp_path, monkeypatch):
    """Larger than the limit, or growing while they are read: `/proc` says of none how large it is."""
    monkeypatch.setattr(opening, "MOST_BYTES", 100_000)
    large = tmp_path / "large.jpg"
    large.write_bytes(bytes(100_001))
    with pytest.raises(ImageError, match="large.jpg has 0 MiB, and the limit"):
        open_image(large)
    with pytest.raises(ImageError, match="the image bytes has"):
        open_image(bytes(100_001))
    monkeypatch.setattr(os, "read", lambda number, size: bytes(60_000))
    small = tmp_path / "small.jpg"
    small.write_bytes(b"1")
    with pytest.raises(ImageError, match="small.jpg has"):
        open_image(small)


def test_data_urls_are_bounded(monkeypatch):
    monkeypatch.setattr(opening, "_DATA_URL_LIMIT", 2**20)
    for url in ("data:image/png;base64," + "A" * 2**20, "data:," + "%41" * 200_000):
        with pytest.raises(ImageError, match="and the limits are 1 and 100,000: give the image as a file"):
            open_image(url)


@pytest.mark.parametrize("name", sorted({family.IMAGE_PROCESSOR: name for name, family in FAMILIES.items()}.values()))
@pytest.mark.parametrize("size", [(100_000, 1), (1, 100_000), (1, 1), (3, 300)])
def test_any_shape_is_made_ready_or_refused(name, size):
    """By every family's preprocessing: at most as many pixels as it has tiles for, or one line."""
    family = FAMILIES[name]
    hf = {"do_pan_and_scan": True, "crop_size": 336} if name == "llava_next" else {"do_pan_and_scan": True}
    try:
        values = family.pixels(Image.new("RGB", size), image_settings(hf, family.IMAGE_PROCESSOR))
    except (ImageError, PromptError) as error:
        assert str(error).isprintable() and ("crop it first" in str(error) or "text alone" in str(error))
    else:
        assert len(values) <= 37 and values.nbytes < 64 * 2**20


@pytest.mark.parametrize("size", [(40, 7), (7, 40), (31, 30), (20, 20), (1, 50)])
@pytest.mark.parametrize("kernel", [2, 3])
def test_bars_in_bands_are_the_same_bars(monkeypatch, size, kernel):
    """The square is never made; each pixel is as if it had been."""
    monkeypatch.setattr("mlx_vlm_mini.preprocessing.bars._BAND", 120)
    image, color = RGB.resize(size), (122, 116, 104)
    for target in ((14, 14), (60, 60), (max(size), max(size)), (14, max(size))):
        expected = pad_to_square(image, color).resize(target, resample=Image.Resampling(kernel))
        found = pad_and_resize(image, color, target, Image.Resampling(kernel))
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


def test_messages_are_one_line():
    """Messages are one line whatever a file is called, and are cut where they are very long."""
    error = ImageError("a\nb\tc\x00\x9b\u202e\udcff" + "d" * 5000)
    assert str(error).startswith("a b c\\x00\\x9b\\u202e\\udcffddd") and len(str(error)) < 2100
    assert str(error).isprintable() and str(VLMError("Ein Bild fehlt: ü\u3000漢字")) == "Ein Bild fehlt: ü 漢字"
