"""Opening any image, and preparing it as the checkpoint says."""

import base64
import io
import subprocess
import sys
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import PHOTO, SHAPES
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, JpegImagePlugin

import mlx_vlm_mini.images.decode as room
from mlx_vlm_mini.errors import CheckpointError, ImageError
from mlx_vlm_mini.images.source import open_image
from mlx_vlm_mini.preprocessing.pixels import preprocess
from mlx_vlm_mini.preprocessing.settings import image_settings

PIXELS = np.array(
    [[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (10, 20, 30)], [(250, 250, 250), (0, 0, 0)]], dtype=np.uint8
)  # three rows, two columns


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


PNG = encoded(Image.fromarray(PIXELS))


@pytest.mark.parametrize(
    "source",
    [
        PNG,
        bytearray(PNG),
        Image.fromarray(PIXELS),
        PIXELS,
        PIXELS / 255,
        PIXELS.astype(np.uint16) * 257,
        PIXELS.transpose(2, 0, 1),
        mx.array(PIXELS),
        "data:image/png;base64," + base64.b64encode(PNG).decode(),
        "data:;base64," + base64.b64encode(PNG).decode(),
        "DATA:image/png;BASE64," + base64.encodebytes(PNG).decode(),
        "data:;base64," + base64.urlsafe_b64encode(PNG).decode(),
    ],
    ids=lambda source: type(source).__name__,
)
def test_every_source_gives_the_same_pixels(source):
    image = open_image(source)
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), PIXELS)


def test_paths_as_text_and_as_paths(tmp_path):
    (tmp_path / "a b.png").write_bytes(PNG)
    for source in (tmp_path / "a b.png", str(tmp_path / "a b.png")):
        np.testing.assert_array_equal(np.asarray(open_image(source)), PIXELS)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    """The file is stored so that turning it by the tag gives PIXELS upright."""
    stored = {
        1: PIXELS, 2: PIXELS[:, ::-1], 3: PIXELS[::-1, ::-1], 4: PIXELS[::-1],
        5: PIXELS.transpose(1, 0, 2), 6: np.rot90(PIXELS), 7: PIXELS[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(PIXELS, -1),
    }[orientation]  # fmt: skip
    image = Image.fromarray(np.ascontiguousarray(stored))
    exif = image.getexif()
    exif[0x0112] = orientation
    opened = open_image(encoded(image, exif=exif))
    np.testing.assert_array_equal(np.asarray(opened), PIXELS)


def test_transparency_shows_white():
    pixels = np.zeros((1, 3, 4), dtype=np.uint8)
    pixels[0] = (0, 0, 0, 0), (100, 50, 0, 255), (200, 100, 0, 128)
    expected = [(255, 255, 255), (100, 50, 0), (227, 177, 127)]
    rgba = Image.fromarray(pixels)
    for image in (rgba, rgba.convert("RGBa"), Image.open(io.BytesIO(encoded(rgba)))):
        np.testing.assert_allclose(np.asarray(open_image(image))[0].astype(int), expected, atol=1)
    palette = Image.new("P", (2, 1))
    palette.putpalette([9, 9, 9, 200, 0, 0])
    palette.putdata([0, 1])
    for form in ("PNG", "GIF"):
        opened = open_image(encoded(palette, form, transparency=0))
        np.testing.assert_array_equal(np.asarray(opened)[0], [(255, 255, 255), (200, 0, 0)])
    grey = Image.fromarray(np.array([[[80, 255], [80, 0]]], dtype=np.uint8))
    np.testing.assert_array_equal(np.asarray(open_image(encoded(grey)))[0], [(80,) * 3, (255,) * 3])


def test_modes_without_transparency():
    ramp = np.array([[0, 100, 255]], dtype=np.uint8)
    for image in (
        Image.fromarray(ramp),
        Image.fromarray(ramp.astype(np.uint16) * 257),
        Image.fromarray(ramp.astype(np.int32) * 257),
        Image.fromarray(ramp.astype(np.int32)),
        Image.fromarray(ramp.astype(np.float32) / 255),
    ):
        np.testing.assert_array_equal(np.asarray(open_image(image)), np.stack([ramp] * 3, axis=-1), image.mode)
    bits = Image.fromarray(np.array([[True, False]]))
    np.testing.assert_array_equal(np.asarray(open_image(bits))[0], [(255,) * 3, (0,) * 3])
    sixteen = encoded(Image.fromarray(np.array([[0, 0x8000, 0xFFFF]], dtype=np.uint16)))
    np.testing.assert_array_equal(np.asarray(open_image(sixteen))[0, :, 0], [0, 128, 255])
    red = np.asarray(open_image(encoded(Image.new("RGB", (8, 8), (255, 0, 0)).convert("CMYK"), "JPEG")))
    assert (red.mean(axis=(0, 1)) > (240, -1, -1)).all() and (red.mean(axis=(0, 1)) < (256, 15, 15)).all()


def test_lab_is_converted():
    lab = Image.new("LAB", (1, 1), (255, 128, 128))
    np.testing.assert_allclose(np.asarray(open_image(lab))[0, 0], (255, 255, 255), atol=2)


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    for form in ("GIF", "WEBP", "PNG"):
        data = encoded(
            frames[0], form, save_all=True, append_images=frames[1:], **({"lossless": True} if form == "WEBP" else {})
        )
        np.testing.assert_array_equal(np.asarray(open_image(data))[0, 0], (255, 0, 0))


JPEG = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)), "JPEG")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/no/such/picture.png", "image not found: /no/such/picture.png"),
        ("/tmp", "is a folder, not an image"),
        (b"", "is empty"),
        (b"not a picture at all", "not an image that Pillow can read"),
        (JPEG[: len(JPEG) // 2], "is broken"),
        (PNG[:45], "is broken"),
        ("data:image/png;base64,@@@", "not valid base64"),
        ("data:image/png", "no comma"),
        (np.zeros((5, 5, 2)), "[5, 5, 2]"),
        (np.zeros((0, 4, 3)), "[0, 4, 3]"),
        (np.full((2, 2, 3), -1.0), "from -1 to -1"),
        (np.full((2, 2, 3), np.nan), "from nan to nan"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "but PostScript"),
        ("~nobody-of-this-name/x.png", "image not found"),
        (np.array([["a"]]), "holds numbers"),
        (Image.new("RGB", (0, 5)), "0x5 pixels"),
        (17, "cannot open an image from int"),
        ("http://127.0.0.1:9/x.png", "only public addresses are opened"),
    ],
)
def test_what_is_no_image_is_refused_with_one_line(source, message):
    with pytest.raises(ImageError) as error:
        open_image(source)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_decompression_bomb_is_refused():
    header = encoded(Image.new("1", (1, 1)), "PNG")
    import struct
    import zlib

    size = b"IHDR" + struct.pack(">II5B", 65500, 65500, 8, 2, 0, 0, 0)
    bomb = header[:8] + struct.pack(">I", 13) + size + struct.pack(">I", zlib.crc32(size)) + header[33:]
    with pytest.raises(ImageError, match="too large"):
        open_image(bomb)


@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 60), st.integers(1, 60))
def test_shortest_edge_then_crop_always_gives_the_crop_size(width, height, edge, crop):
    settings = image_settings({"size": {"shortest_edge": edge}, "crop_size": crop}, "CLIP")
    values = preprocess(Image.new("RGB", (width, height), "white"), settings)
    assert values.shape == (crop, crop, 3)
    assert values.dtype == np.float32


def test_padding_keeps_the_whole_picture_in_the_middle():
    settings = image_settings(
        {"do_pad": True, "do_resize": False, "do_center_crop": False, "do_rescale": False, "do_normalize": False},
        "Llava",
    )
    values = preprocess(Image.new("RGB", (2, 5), "white"), settings)
    assert values.shape == (5, 5, 3)
    np.testing.assert_array_equal(values[0, 0], (122, 116, 104))  # the colour of LLaVA's bars
    np.testing.assert_array_equal(values[:, 1:3], np.full((5, 2, 3), 255.0))


def test_a_flag_that_is_null_is_off():
    assert image_settings({"do_resize": None, "do_normalize": None, "resample": None}, "CLIP").size is None


def test_a_picture_too_narrow_to_resize():
    settings = image_settings({"size": {"max_height": 20, "max_width": 20}, "do_center_crop": False}, "CLIP")
    with pytest.raises(ImageError, match="1x500 pixels is too narrow"):
        preprocess(Image.new("RGB", (1, 500)), settings)


def test_class_defaults_and_old_forms():
    clip = image_settings({"feature_extractor_type": "CLIPFeatureExtractor", "size": 336, "crop_size": 336}, "Siglip")
    assert clip.size == {"shortest_edge": 336} and clip.crop_size == (336, 336) and clip.resample == 3
    siglip = image_settings({"image_processor_type": "SiglipImageProcessorFast"}, "CLIP")
    assert siglip.size == {"height": 224, "width": 224} and siglip.crop_size is None and siglip.image_mean == (0.5,) * 3


def test_filters_go_by_their_number_or_their_name():
    for name, number in (("bicubic", 3), ("LANCZOS", 1), ("bilinear", 2), (3, 3)):
        assert image_settings({"resample": name}, "CLIP").resample == number


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_processor_type": "FancyImageProcessor"}, "unknown image processor 'FancyImageProcessor'"),
        ({"size": "large"}, "'large' is not an image size"),
        ({"size": {"shortest_edge": -3}}, "is not an image size"),
        ({"image_mean": [0.5, 0.5]}, "image_mean has 3 channels, not 2"),
        ({"resample": 99}, "resample 99"),
        ({"resample": "nearest neighbour"}, "resample 'nearest neighbour' is none of Pillow's filters"),
        ({"resample": [3]}, r"resample \[3\] is none"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(CheckpointError, match=message):
        image_settings(settings, "CLIP")


def test_pictures_of_the_goldens_open():
    assert open_image(PHOTO).size == (70, 96)
    assert np.asarray(open_image(SHAPES))[0, 0].tolist() == [255, 255, 255]


@pytest.fixture
def small_limits(monkeypatch):
    """Limits a thousandth of the real ones."""
    monkeypatch.setattr(room, "REDUCE_ABOVE", 50_000)
    monkeypatch.setattr(room, "MOST_PIXELS", 500_000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 89_000)


def gradient(width, height):
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(
        np.stack([rows * 255 // height, columns * 255 // width, rows * 0 + 128], axis=-1).astype(np.uint8)
    )


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((250, 200), (250, 200)),
        ((251, 200), (126, 100)),
        ((501, 399), (126, 100)),
        ((500, 400), (250, 200)),
        ((800, 600), (200, 150)),
        ((63, 5000), (16, 1250)),
    ],
)
def test_a_large_jpeg_is_reduced_while_it_is_decoded(small_limits, monkeypatch, size, expected):
    """Above Pillow's limit for other formats, too; its middle stays where it was."""
    whole, loaded = gradient(*size), []
    load = JpegImagePlugin.JpegImageFile.load
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "load", lambda self: loaded.append(self.size) or load(self))
    opened = open_image(encoded(whole, "JPEG", quality=95))
    assert opened.size == expected and set(loaded) == {expected}
    if expected == size:
        assert opened.tobytes() == Image.open(io.BytesIO(encoded(whole, "JPEG", quality=95))).tobytes()
    np.testing.assert_allclose(np.asarray(opened.resize((8, 8))), np.asarray(whole.resize((8, 8))), atol=8)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK", "I;16"])
def test_other_large_pictures_are_reduced_too(small_limits, mode):
    whole = gradient(400, 300).convert("RGBA" if mode == "RGBA" else "L" if mode == "I;16" else mode)
    if mode == "I;16":
        whole = Image.fromarray(np.asarray(whole).astype(np.uint16) * 257)
    for source in (whole, encoded(whole, "TIFF")):
        opened = open_image(source)
        assert opened.size == (200, 150) and opened.mode == "RGB"
        expected = np.asarray(open_image(source, whole=True).resize((8, 8))).astype(int)
        np.testing.assert_allclose(np.asarray(opened.resize((8, 8))), expected, atol=3)
        assert open_image(source, whole=True).size == (400, 300)
    assert open_image(np.asarray(gradient(400, 300))).size == (200, 150)


def test_a_reduced_picture_is_upright(small_limits):
    exif = Image.Exif()
    exif[0x0112] = 6
    for form in ("JPEG", "TIFF"):
        assert open_image(encoded(gradient(400, 300), form, exif=exif)).size == (150, 200)


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_what_is_too_large_is_refused_with_its_size(monkeypatch, form):
    monkeypatch.setattr(room, "MOST_PIXELS", 2_000_000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    with pytest.raises(ImageError) as error:
        open_image(encoded(Image.new("RGB", (2000, 2500)), form))
    assert str(error.value) == (
        "the image bytes is too large: 5 megapixels, about 0.0 GB, and the limit is 2; make it smaller first"
    )


def test_a_photo_of_a_hundred_megapixels_takes_little_memory(tmp_path):
    """In a process of its own, whose peak says it: 300 MB would be the whole in RGB."""
    file = tmp_path / "large.jpg"
    Image.new("L", (12000, 9000), 90).save(file, quality=30)
    code = (
        "import resource, sys; from mlx_vlm_mini.images.source import open_image; "
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; image = open_image(sys.argv[1]); "
        "print(image.size, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True, check=True)
    size, megabytes = done.stdout.rsplit(maxsplit=1)
    assert size == "(6000, 4500)"
    assert int(megabytes) / (1024 if sys.platform == "darwin" else 1) < 180


@pytest.mark.parametrize(
    "settings", [{"do_pad": True}, {"size": {"shortest_edge": 336}}], ids=["padded to a square", "short side"]
)
def test_a_strip_that_would_grow_to_gigabytes_is_refused(settings):
    strip = Image.new("RGB", (60000, 3))
    with pytest.raises(ImageError, match=r"60000x3 pixels becomes one of .* GB: crop it first"):
        preprocess(strip, image_settings(settings, "Llava"))
