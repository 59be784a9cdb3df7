"""A file's bytes -> upright RGB, within limits of time and memory: what it claims is checked before it is decoded."""

import ctypes
import io
import re
import time
import warnings
from functools import cache
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageCms, JpegImagePlugin, UnidentifiedImageError, _imaging

from mlx_vlm_mini.errors import ImageError

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "AVIF", "TIFF", "BMP", "PPM")
"""What Pillow opens for us; HEIF is opened by pi-heif. Others of Pillow's are hardly ever met, run programs (EPS), or
decode without a bound (FITS)."""
REDUCE_ABOVE = 50_000_000  # pixels, from which on an image is opened at a half, a quarter or an eighth of its sides
MOST_SECONDS = 1.5  # of this thread's computing time, until the last byte is read
MOST_BYTES = 256 * 2**20  # of a file
MOST_PIXELS = 250_000_000  # of a JPEG of one scan, which is reduced while it is decoded
MOST_ELSEWHERE = {"PROGRESSIVE": 64_000_000, "WEBP": 40_000_000, "AVIF": 24_000_000, "HEIF": 50_000_000}  # pixels
MOST_HEIF_BYTES = (
    32 * 2**20
)  # three times a phone's largest picture: libheif cannot be stopped, and takes 0.1 s for 1 MB
MOST_WHOLE = 110_000_000  # of such a JPEG that is not
MOST_OTHERWISE = 64_000_000
MOST_SIDE = 2**18  # pixels: Pillow fills up rows of some forms byte by byte
MOST_WIDE = 16_000_000  # of numbers of 32 bits
_MOST_SCANS = 100
_MOST_SCANNED = 1_200_000_000  # pixels times scans
_MOST_EXIF = 2**17  # bytes in a JPEG, where it may come in pieces
_MOST_SEGMENTS = 10_000
_MOST_VALUES = 2**17  # of a TIFF's tag, texts and bytes excepted
_COMPRESSIONS = (
    "raw", "tiff_raw_16", "packbits", "tiff_lzw", "tiff_deflate", "tiff_adobe_deflate", "zstd", "jpeg", "tiff_ccitt",
    "group3", "group4",
)  # fmt: skip
_ONE = 1 + 1 / 510  # what rounding makes of floats up to 1
_RANGES = "give uint8, uint16, or floats from 0 to 1 or from 0 to 255"
_BAND = 1 << 22  # pixels that are converted at a time

_HEIF = re.compile(
    rb"(?s)....ftyp(hei[cxms]|hev[cxms]|(?:mif1|msf1)(?!.{4}(?:.{4}){0,9}avi[fs]))"
)  # not AVIF of that name
_SEGMENT = re.compile(rb"\xff([\xc0-\xcf\xd9-\xfe])")
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_KINDS = (
    (rb"%!PS|\xc5\xd0\xd3\xc6", "PostScript"),
    (rb"%PDF", "a PDF"),
    (rb"(?s)\s*<.{0,2000}?<svg|\s*<svg", "SVG"),
    (rb"(?i)\s*<(!doctype )?html", "a web page"),
    (rb"....ftyp", "a video"),
    (rb"PK\x03\x04|\x1f\x8b|7z\xbc\xaf|Rar!", "an archive"),
    (rb"[\t\n\f\r -~]{1,64}\Z|[\t\n\f\r -~]{64}", "text"),
)  # of what is no image; by its first bytes


class _Watched(io.BytesIO):
    """A file whose reader is stopped when it has computed too long, or has read all of it again and again.

    Attributes:
        left: bytes that may still be read.
    """

    def __init__(self, data: bytes, name: str) -> None:
        super().__init__(data)
        self._name, self._until, self.left = name, time.thread_time() + MOST_SECONDS, 8.0 * len(data) + 2**20

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.left -= len(data)
        if self.left < 0:
            raise ImageError(f"{self._name} is broken: its parts overlap; save it anew as PNG")
        if time.thread_time() > self._until:
            raise ImageError(f"{self._name} takes too long to decode, above {MOST_SECONDS:g} s: save it anew as PNG")
        return data


@cache
def _silence_libtiff() -> None:
    """libtiff writes what it finds amiss to stderr by itself: from now on it does not, where it can be told so.

    It is found through the module of Pillow's that needs it, whose own copy it mostly is.
    """
    try:
        library = ctypes.CDLL(_imaging.__file__)
        setters = library.TIFFSetWarningHandler, library.TIFFSetErrorHandler
    except (OSError, AttributeError, TypeError):  # linked into that module, or none at all
        return
    for setter in setters:
        setter.argtypes, setter.restype = [ctypes.c_void_p], ctypes.c_void_p
        setter(None)


def decode(data: bytes, name: str, whole: bool) -> Image.Image:
    """Decode a picture; `open_image` says how.

    Raises:
        ImageError: it is no image, or broken, or too large.
    """
    if not data:
        raise ImageError(f"{name} is empty, not an image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's advice on large or odd files; our limits are below its own
            if data[:2] in (b"II", b"MM"):
                _silence_libtiff()
            image = _open(data, name, whole)
            _check(image, name)
            image.load()
            return flatten(image, name, whole)
    except ImageError:
        raise
    except UnidentifiedImageError:
        kind = next((f", but {kind}" for start, kind in _KINDS if re.match(start, data)), "")
        raise ImageError(
            f"{name} is not an image that Pillow can read{kind}: save it as JPEG or PNG, and give that"
        ) from None
    except Image.DecompressionBombError as error:
        found = re.search(r"\((\d+) pixels\).* (\d+) pixels", str(error))
        pixels, limit = (int(number) for number in found.groups()) if found else (2**62, 2**62)
        raise ImageError(_too_large(name, pixels, limit)) from None
    except MemoryError:
        raise ImageError(f"{name} does not fit into memory; make it smaller first") from None
    except Exception as error:  # decoders of a dozen formats raise anything on broken files
        raise ImageError(f"{name} is broken: {error or type(error).__name__}; get it or save it anew") from None


def size_of(file: BinaryIO) -> tuple[int, int]:
    """Width and height that a file's header says.

    Raises:
        Exception: it is no image, or broken.
    """
    start = file.read(64)
    file.seek(0)
    if _HEIF.match(start):
        from .heif import Heif

        return Heif(file.read(MOST_HEIF_BYTES)).size
    with Image.open(file, formats=_known_formats()) as image:
        return image.size


def _known_formats() -> list[str]:
    """What `FORMATS` names and this Pillow opens."""
    Image.init()
    return [form for form in FORMATS if form in Image.OPEN]


def factor_of(width: int, height: int) -> int:
    """By how much an image's sides are divided: 1, 2, 4 or 8."""
    return next((factor for factor in (1, 2, 4) if -(-width // factor) * -(-height // factor) <= REDUCE_ABOVE), 8)


def _open(data: bytes, name: str, whole: bool) -> Image.Image:
    """A file opened, not decoded: a JPEG set to be reduced while it is."""
    limit = None
    if _HEIF.match(data):
        if len(data) > MOST_HEIF_BYTES:
            size, most = len(data) / 2**20, MOST_HEIF_BYTES // 2**20
            raise ImageError(f"{name} has {size:,.0f} MiB, and the limit for HEIC is {most}: save it as JPEG")
        from .heif import Heif  # libheif, for its files alone

        heif = Heif(data)
        _check_side(heif.size, name)
        if heif.size[0] * heif.size[1] > MOST_ELSEWHERE["HEIF"]:
            raise ImageError(_too_large(name, heif.size[0] * heif.size[1], MOST_ELSEWHERE["HEIF"]))
        return heif.decode(name)
    if data.startswith(b"\xff\xd8\xff"):
        limit = _check_jpeg(data, name, whole)
    else:
        _check_tiff(data, name)
    file = _Watched(data, name)
    try:
        image: Image.Image = Image.open(file, formats=_known_formats())
    except Image.DecompressionBombError:
        if limit is None or whole:
            raise
        file.seek(0)
        image = JpegImagePlugin.JpegImageFile(file)  # it opens without Pillow's limit, ours being kept
    file.left = float("inf")  # pixels may be read in blocks that overlap
    if isinstance(image, JpegImagePlugin.JpegImageFile) and not whole:
        factor = factor_of(*image.size)
        if factor > 1:
            image.draft(None, (image.width // factor, image.height // factor))
    return image


def _check_jpeg(data: bytes, name: str, whole: bool) -> int:
    """Walk through a JPEG's segments as libjpeg does. Several scans keep the whole in memory, and each goes through it.

    Returns:
        How many pixels it may have.
    """
    place, segments, scans, exif, pixels, progressive = 2, 0, 0, 0, 0, False
    while (found := _SEGMENT.search(data, place)) and found[1] != b"\xd9":
        marker, start = found[1][0], found.end()
        length = int.from_bytes(data[start : start + 2], "big")
        place, segments = start + length, segments + 1
        if marker == 0xDA:
            scans += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = (int.from_bytes(data[at : at + 2], "big") for at in (start + 3, start + 5))
            pixels, progressive = max(pixels, height * width), progressive or marker not in (0xC0, 0xC1)
        elif marker == 0xE1 and data.startswith(b"Exif", start + 2):
            exif += length
        if segments > _MOST_SEGMENTS or scans > _MOST_SCANS or exif > _MOST_EXIF:
            what = f"{exif} bytes of EXIF" if exif > _MOST_EXIF else f"{segments} parts, {scans} of them scans"
            raise ImageError(f"{name} is broken: a JPEG with {what}; save it anew")
    progressive = progressive or scans > 1
    limit = MOST_ELSEWHERE["PROGRESSIVE"] if progressive else MOST_WHOLE if whole else MOST_PIXELS
    limit = min(limit, _MOST_SCANNED // scans) if progressive and scans else limit
    if pixels > limit:
        raise ImageError(_too_large(name, pixels, limit))
    return limit


def _check_tiff(data: bytes, name: str) -> None:
    """The numbers of values of a TIFF's tags, of which Pillow makes Python numbers; other files are left alone."""
    orders: dict[bytes, Any] = {b"II": "little", b"MM": "big"}
    order = orders.get(data[:2])
    if order is None:
        return

    def number(place: int, size: int) -> int:
        return int.from_bytes(data[place : place + size], order)

    first, head, entry, wide = (number(8, 8), 8, 20, 8) if data[2:3] == b"+" else (number(4, 4), 2, 12, 4)
    for place in range(first + head, first + head + entry * min(number(first, head), 2**16), entry):
        if place > len(data):
            return
        tag, kind, count = number(place, 2), number(place + 2, 2), number(place + 4, wide)
        if count > _MOST_VALUES and kind not in (1, 2, 7):
            raise ImageError(f"{name} is broken: its tag {tag} has {count} values; save it anew as PNG")


def _check(image: Image.Image, name: str) -> None:
    """What can be known of an opened image before it is decoded."""
    pixels, form = image.width * image.height, str(image.format)
    _check_side(image.size, name)
    limit = MOST_ELSEWHERE.get(form, MOST_OTHERWISE)
    if image.mode in ("I", "F"):
        limit = min(limit, MOST_WIDE)
    if form == "TIFF":
        tags: Any = image.tag_v2  # type: ignore[attr-defined]
        if image.info.get("compression") not in _COMPRESSIONS:
            raise ImageError(f"{name} is a TIFF compressed as {image.info.get('compression')}: save it anew as PNG")
        if image.info.get("compression") == "jpeg":
            limit = min(limit, MOST_WIDE)
        pixels = max(pixels, int(tags.get(322, 0)) * int(tags.get(323, 0)))  # a tile's size
    if pixels > limit and not isinstance(image, JpegImagePlugin.JpegImageFile):
        raise ImageError(_too_large(name, pixels, limit))
    profile = image.info.get("icc_profile")
    if isinstance(profile, bytes) and profile[16:20] == b"Lab " and image.mode != "LAB":
        raise ImageError(f"{name} holds Lab colours in a format that has none: save it anew as sRGB")


def _check_side(size: tuple[int, int], name: str) -> None:
    if max(size) > MOST_SIDE:
        raise ImageError(f"{name} has {size[0]}x{size[1]} pixels, and no side may have above {MOST_SIDE:,}: cut it")


def _too_large(name: str, pixels: int, limit: int) -> str:
    return (
        f"{name} is too large: {pixels / 1e6:,.0f} megapixels, about {pixels * 3 / 1e9:.1f} GB, and the limit is "
        f"{limit / 1e6:,.0f}; make it smaller first"
    )


def flatten(image: Image.Image, name: str, whole: bool) -> Image.Image:
    """An image as upright RGB on white, reduced as `open_image` says; in bands, so that no second whole is needed."""
    if 0 in image.size:
        raise ImageError(f"{name} is {image.width}x{image.height} pixels large: there is nothing in it")
    try:
        image.load()  # a caller's may be closed, or broken
        turn = _TURNS.get(_orientation(image))
        factor = 1 if whole else factor_of(*image.size)
        rows = max(_BAND // image.width // factor, 1) * factor
        if image.mode == "RGB" and image.info.get("transparency") is None:  # as most photos are: nothing to convert
            flat = image if factor == 1 else image.reduce(factor)
        elif rows >= image.height or image.mode in ("I", "F"):
            flat = _to_rgb(image)
            flat = flat if factor == 1 else flat.reduce(factor)
        else:
            flat = Image.new("RGB", (-(-image.width // factor), -(-image.height // factor)))
            for top in range(0, image.height, rows):
                band = _to_rgb(image.crop((0, top, image.width, min(top + rows, image.height))))
                flat.paste(band if factor == 1 else band.reduce(factor), (0, top // factor))
        return flat if turn is None else flat.transpose(turn)
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from None
    except Exception as error:  # as in `decode`: a lazily decoded PIL image fails here
        raise ImageError(f"{name} is broken: {error or type(error).__name__}; get it or save it anew") from None


def _orientation(image: Image.Image) -> int:
    """How an image is turned by EXIF, or by XMP where that says nothing: 1 to 8, other numbers say nothing.

    Read by ourselves: entry by entry, so that no file makes it long, and what is broken elsewhere does not matter.
    """
    if image.format == "HEIF":  # a plugin of the caller's has turned it
        return 1
    if getattr(image, "_exif", None) or hasattr(image, "tag_v2"):  # read by Pillow, or set by the caller
        found = image.getexif().get(0x0112, 1)
        return found if isinstance(found, int) else 1
    exif = image.info.get("exif")
    if not isinstance(exif, bytes):
        lines = str(image.info.get("Raw profile type exif", "")).split("\n")[3:]
        digits = "".join(lines)
        exif = bytes.fromhex(digits) if re.fullmatch(r"(?:[0-9a-fA-F]{2})+", digits) else b""
    found = _exif_orientation(exif.removeprefix(b"Exif\0\0"))
    if found:
        return found
    xmp = image.info.get("XML:com.adobe.xmp") or image.info.get("xmp") or b""
    said = _XMP_ORIENTATION.search(xmp if isinstance(xmp, bytes) else str(xmp).encode(errors="replace"))
    return int(said[1]) if said else 1


def _exif_orientation(exif: bytes) -> int | None:
    """Of a block that is a TIFF without pixels: a short number in the first table."""
    orders: dict[bytes, Any] = {b"II": "little", b"MM": "big"}
    order = orders.get(exif[:2])
    if order is None:
        return None
    first = int.from_bytes(exif[4:8], order)
    for place in range(first + 2, first + 2 + 12 * int.from_bytes(exif[first : first + 2], order), 12):
        entry = exif[place : place + 12]
        if len(entry) < 12:
            return None
        if int.from_bytes(entry[:2], order) == 0x0112:
            return int.from_bytes(entry[8:10], order) if int.from_bytes(entry[2:4], order) == 3 else None
    return None


def _to_rgb(image: Image.Image) -> Image.Image:
    """Transparency shows white."""
    if image.mode == "LAB":
        lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB")
        return converted if converted is not None else image
    if image.mode == "La":  # premultiplied, which converts only to this
        image = image.convert("LA")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return from_array(np.asarray(image))
    if "A" in image.getbands() or "a" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def from_array(array: np.ndarray) -> Image.Image:
    """See `open_image`.

    Raises:
        ImageError: it is none of the forms.
    """
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (1, 3, 4)) or not array.size:
        raise ImageError(f"an image array is [height, width] or [height, width, 1, 3 or 4], not {list(array.shape)}")
    if array.dtype.kind not in "buif":
        raise ImageError(f"an image array holds numbers, not {array.dtype}")
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.dtype == np.bool_:
        array = array * np.uint8(255)
    elif array.dtype == np.uint16:
        array = array >> 8
    elif array.dtype != np.uint8:
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 65535):  # true for NaN too
            raise ImageError(f"pixel values run from {low:g} to {high:g}: {_RANGES}")
        if array.dtype.kind in "iu":
            array = array / 257.0 if high > 255 else array
        elif high <= _ONE:
            array = np.rint(np.minimum(array, 1) * 255.0)
        elif 2 <= high < 255.5:  # what resizing makes of 255
            array = np.minimum(array, 255)
        else:
            raise ImageError(f"pixel values run from {low:g} to {high:g}, which may mean several things: {_RANGES}")
    image = Image.fromarray(np.ascontiguousarray(array.astype(np.uint8)))
    return _to_rgb(image)
