"""Images: open any of them safely, as upright RGB."""

import base64
import binascii
import hashlib
import io
import os
import re
import urllib.error
import urllib.parse
import urllib.request
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, JpegImagePlugin, UnidentifiedImageError

from .errors import ImageError

ImageSource = str | Path | bytes | Image.Image | np.ndarray
"""A path, a `data:` URL, an http(s) URL (all three may be `str`), an encoded file's bytes, a PIL image, an array."""

REDUCE_ABOVE = 50_000_000  # pixels, from which on an image is opened at a half, a quarter or an eighth of its sides
MOST_PIXELS = 500_000_000  # of a JPEG, which is reduced while it is decoded; others have Pillow's limit
_DOWNLOAD_LIMIT = 64 * 2**20  # bytes
_DOWNLOAD_TIMEOUT = 30  # seconds without an answer


@dataclass(frozen=True, eq=False)
class Picture:
    """An image as it was given: read, not yet decoded.

    Attributes:
        data: the file's bytes, or an RGB image where no file was given. None: not kept, for `path` has them.
        name: what messages call it.
        path: the absolute path of the file that it came from.
        sha256: of the file's bytes, or of the image's size and pixels, in hexadecimal.
    """

    data: bytes | Image.Image | None
    name: str
    path: Path | None
    sha256: str


def read_image(source: ImageSource) -> Picture:
    """Read an image without decoding it, so that one that was seen before is known by its bytes.

    Raises:
        ImageError: nothing is there, or it is no source of images.
    """
    path, name = None, "the image"
    data: bytes | Image.Image
    if isinstance(source, bytes | bytearray | memoryview):
        data, name = bytes(source), "the image bytes"
    elif isinstance(source, str) and re.match("data:", source, re.IGNORECASE):
        data, name = _read_data_url(source), "the data: URL"
    elif isinstance(source, str) and re.match(r"https?://", source, re.IGNORECASE):
        data, name = _download(source), source
    elif isinstance(source, str | Path):
        name = str(source)
        file = Path(os.path.expanduser(source))  # noqa: PTH111 - never raises
        data = _read_file(file)
        path = file.absolute() if file.is_file() else None  # a pipe cannot be read again
    else:
        data = open_image(source)
        sha256 = hashlib.sha256(repr(data.size).encode() + data.tobytes())
        return Picture(data, name, None, sha256.hexdigest())
    return Picture(data, name, path, hashlib.sha256(data).hexdigest())


def open_image(source: ImageSource | Picture, *, whole: bool = False) -> Image.Image:
    """Open an image as upright RGB; transparency shows white, an animation its first frame.

    An image of more than `REDUCE_ABOVE` pixels comes with a half, a quarter or an eighth of its sides: the largest of
    these that is within the limit. A JPEG is reduced while it is decoded, so that the whole never lies in memory.

    Args:
        source: see `ImageSource`. Arrays are [height, width] or [height, width, 1, 3 or 4] (or channels first): uint8,
            uint16, bool, or floats between 0 and 1.
        whole: never reduced.

    Raises:
        ImageError: nothing is there, or it is not an image, or it is too large.
    """
    if isinstance(source, Image.Image):
        image = _to_rgb(source, "the image", whole)
        image = image.copy() if image is source else image  # which may change later
    elif isinstance(source, Picture | bytes | bytearray | memoryview | str | Path):
        picture = source if isinstance(source, Picture) else read_image(source)
        data = picture.data
        image = data if isinstance(data, Image.Image) else _decode(data or b"", picture.name, whole)
    elif hasattr(source, "__array__") or hasattr(source, "__buffer__") or hasattr(source, "__array_interface__"):
        image = _from_array(np.asarray(source))
    else:
        raise ImageError(
            f"cannot open an image from {type(source).__name__}: give a path, a URL, bytes, a PIL image or an array"
        )
    return image if whole else _reduce(image)


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ImageError(f"image not found: {path}") from None
    except IsADirectoryError:
        raise ImageError(f"{path} is a folder, not an image") from None
    except (OSError, ValueError) as error:
        raise ImageError(f"cannot read image {path}: {getattr(error, 'strerror', None) or error}") from None


def _read_data_url(url: str) -> bytes:
    header, comma, data = url.partition(",")
    if not comma:
        raise ImageError("the data: URL has no comma between its header and its data")
    try:
        if header.lower().endswith(";base64"):
            text = "".join(urllib.parse.unquote(data).split())
            return base64.b64decode(text.translate({ord("-"): "+", ord("_"): "/"}), validate=True)
        return urllib.parse.unquote_to_bytes(data)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"the data: URL is not valid base64: {error}") from None


class _HttpOnly(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if not re.match(r"https?://", newurl, re.IGNORECASE):
            raise ImageError(f"{req.full_url} redirects to {newurl}, which is not http(s)")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _download(url: str) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": "mlx-vlm-mini"})
    try:
        with urllib.request.build_opener(_HttpOnly).open(request, timeout=_DOWNLOAD_TIMEOUT) as answer:
            data: bytes = answer.read(_DOWNLOAD_LIMIT + 1)
    except urllib.error.HTTPError as error:
        raise ImageError(f"cannot download {url}: HTTP {error.code} {error.reason}") from None
    except (OSError, ValueError) as error:
        raise ImageError(f"cannot download {url}: {getattr(error, 'reason', None) or error}") from None
    if len(data) > _DOWNLOAD_LIMIT:
        raise ImageError(f"{url} is larger than {_DOWNLOAD_LIMIT // 2**20} MiB; download it and give its path")
    return data


def _factor(width: int, height: int) -> int:
    """By how much an image's sides are divided: 1, 2, 4 or 8."""
    return next((factor for factor in (1, 2, 4) if -(-width // factor) * -(-height // factor) <= REDUCE_ABOVE), 8)


def _reduce(image: Image.Image) -> Image.Image:
    factor = _factor(*image.size)
    return image if factor == 1 else image.reduce(factor)


def _open_file(data: bytes, name: str, whole: bool) -> Image.Image:
    """A file opened, not decoded: a JPEG set to be reduced while it is."""
    try:
        image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError:
        if whole or not data.startswith(b"\xff\xd8\xff"):
            raise
        image = JpegImagePlugin.JpegImageFile(io.BytesIO(data))  # it opens without Pillow's limit, for which see below
    if isinstance(image, JpegImagePlugin.JpegImageFile) and not whole:
        width, height = image.size
        if width * height > MOST_PIXELS:
            raise ImageError(_too_large(name, width * height, MOST_PIXELS))
        factor = _factor(width, height)
        if factor > 1:
            image.draft(None, (width // factor, height // factor))
    return image


def _too_large(name: str, pixels: int, limit: int) -> str:
    return (
        f"{name} is too large: {pixels / 1e6:,.0f} megapixels, about {pixels * 3 / 1e9:.1f} GB, and the limit is "
        f"{limit / 1e6:,.0f}; make it smaller first"
    )


def _decode(data: bytes, name: str, whole: bool) -> Image.Image:
    if not data:
        raise ImageError(f"{name} is empty, not an image")
    if data.startswith((b"%!PS", b"\xc5\xd0\xd3\xc6")):  # Pillow would run Ghostscript on it
        raise ImageError(f"{name} is PostScript, not an image that Pillow can read")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's advice on large or odd files; its hard limit stays
            image = _open_file(data, name, whole)
            image.load()
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"{name} is not an image that Pillow can read") from None
    except Image.DecompressionBombError as error:
        found = re.search(r"\((\d+) pixels\).* (\d+) pixels", str(error))
        pixels, limit = (int(number) for number in found.groups()) if found else (2**62, 2**62)
        raise ImageError(_too_large(name, pixels, limit)) from None
    except MemoryError:
        raise ImageError(f"{name} does not fit into memory; make it smaller first") from None
    except Exception as error:  # decoders of a dozen formats raise anything on broken files
        raise ImageError(f"{name} is broken: {error or type(error).__name__}") from None
    return _to_rgb(image, name, whole)


def _to_rgb(image: Image.Image, name: str, whole: bool) -> Image.Image:
    if 0 in image.size:
        raise ImageError(f"{name} is {image.width}x{image.height} pixels large: there is nothing in it")
    try:
        with suppress(Exception):  # a broken EXIF block says nothing about the picture, which is kept as it stands
            if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # upright ones it copies, 36 MB of a photograph
                image = ImageOps.exif_transpose(image)
        if not whole and image.mode in ("L", "LA", "RGB", "RGBA", "CMYK", "YCbCr"):  # before it is copied further
            image = _reduce(image)
        if image.mode == "LAB":
            lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB")
            return converted if converted is not None else image
        if image.mode == "La":  # premultiplied, which converts only to this
            image = image.convert("LA")
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            return _from_array(np.asarray(image))
        if "A" in image.getbands() or "a" in image.getbands() or image.info.get("transparency") is not None:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            return Image.alpha_composite(white, image).convert("RGB")
        return image if image.mode == "RGB" else image.convert("RGB")
    except ImageError:
        raise
    except Exception as error:  # as in _decode: a lazily decoded PIL image fails here
        raise ImageError(f"{name} is broken: {error or type(error).__name__}") from None


def _from_array(array: np.ndarray) -> Image.Image:
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
        if np.issubdtype(array.dtype, np.floating) and low >= 0 and high <= 1:
            array = np.rint(array * 255.0)
        elif low >= 0 and 255 < high <= 65535:
            array = array / 257.0
        elif not (low >= 0 and high <= 255):  # true for NaN too
            raise ImageError(f"pixel values run from {low:g} to {high:g}: give uint8, or floats from 0 to 1")
    image = Image.fromarray(np.ascontiguousarray(array.astype(np.uint8)))
    return image if image.mode == "RGB" else _to_rgb(image, "the image", whole=True)
