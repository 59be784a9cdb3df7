"""Images: open any of them safely, as upright RGB."""

import base64
import binascii
import io
import os
import re
import urllib.error
import urllib.parse
import urllib.request
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from .errors import ImageError

ImageSource = str | Path | bytes | Image.Image | np.ndarray
"""A path, a `data:` URL, an http(s) URL (all three may be `str`), an encoded file's bytes, a PIL image, an array."""

_DOWNLOAD_LIMIT = 64 * 2**20  # bytes
_DOWNLOAD_TIMEOUT = 30  # seconds without an answer


def open_image(source: ImageSource) -> Image.Image:
    """Open an image as upright RGB; transparency shows white, an animation its first frame.

    Args:
        source: see `ImageSource`. Arrays are [height, width] or [height, width, 1, 3 or 4] (or channels first): uint8,
            uint16, bool, or floats between 0 and 1.

    Raises:
        ImageError: nothing is there, or it is not an image.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, "the image")
    if isinstance(source, bytes | bytearray | memoryview):
        return _decode(bytes(source), "the image bytes")
    if isinstance(source, str) and re.match("data:", source, re.IGNORECASE):
        return _decode(_read_data_url(source), "the data: URL")
    if isinstance(source, str) and re.match(r"https?://", source, re.IGNORECASE):
        return _decode(_download(source), source)
    if isinstance(source, str | Path):
        return _decode(_read_file(Path(os.path.expanduser(source))), str(source))  # noqa: PTH111 - never raises
    if hasattr(source, "__array__") or hasattr(source, "__buffer__") or hasattr(source, "__array_interface__"):
        return _from_array(np.asarray(source))
    raise ImageError(
        f"cannot open an image from {type(source).__name__}: give a path, a URL, bytes, a PIL image or an array"
    )


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


def _decode(data: bytes, name: str) -> Image.Image:
    if not data:
        raise ImageError(f"{name} is empty, not an image")
    if data.startswith((b"%!PS", b"\xc5\xd0\xd3\xc6")):  # Pillow would run Ghostscript on it
        raise ImageError(f"{name} is PostScript, not an image that Pillow can read")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's advice on large or odd files; its hard limit stays
            image = Image.open(io.BytesIO(data))
            image.load()
    except UnidentifiedImageError:
        raise ImageError(f"{name} is not an image that Pillow can read") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} is too large: {str(error).partition(',')[0]}; make it smaller first") from None
    except Exception as error:  # decoders of a dozen formats raise anything on broken files
        raise ImageError(f"{name} is broken: {error or type(error).__name__}") from None
    return _to_rgb(image, name)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if 0 in image.size:
        raise ImageError(f"{name} is {image.width}x{image.height} pixels large: there is nothing in it")
    try:
        with suppress(Exception):  # a broken EXIF block says nothing about the picture, which is kept as it stands
            image = ImageOps.exif_transpose(image)
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
    return image if image.mode == "RGB" else _to_rgb(image, "the image")
