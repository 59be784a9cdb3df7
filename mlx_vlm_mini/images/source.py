"""Images: open any of them safely, as upright RGB."""

import base64
import binascii
import hashlib
import os
import re
import select
import stat
import sys
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mlx_vlm_mini.errors import ImageError

from . import pdf
from .decode import MOST_BYTES, decode, factor_of, flatten, from_array, size_of
from .names import find_file, not_found, unreadable

ImageSource = str | Path | bytes | Image.Image | np.ndarray
"""A path, a `data:` URL, an http(s) URL (all three may be `str`), an encoded file's bytes, a PIL image, an array. A
page of a PDF is `report.pdf[2]`, and where several images may stand a PDF is all its pages."""

_DATA_URL_LIMIT = 64 * 2**20  # characters
_PERCENTS = 100_000  # of its characters written as %XX
_WRITER = 2  # seconds in which a named pipe finds a writer
_SILENCE = 30  # seconds in which a pipe's writer writes nothing


@dataclass(frozen=True, kw_only=True)
class Access:
    """What an image's name may reach. Who serves others gives `SERVED`, and grants no more than is meant.

    Attributes:
        files: files of this machine.
        urls: http(s) addresses of the internet.
        pdfs: PDFs, whose pages PDFium renders in a process of its own.
        private_urls: also those of this machine, its networks and its cloud; None: where the environment variable
            MLX_VLM_MINI_PRIVATE_URLS is 1.
    """

    files: bool = False
    urls: bool = False
    pdfs: bool = False
    private_urls: bool | None = False


SERVED = Access()
"""Bytes, `data:` URLs, PIL images and arrays alone: a name that another sends opens nothing here."""
LOCAL = Access(files=True, urls=True, pdfs=True, private_urls=None)
"""The user of this machine, who names what is theirs."""
ACCESS: dict[str, Access] = {"local": LOCAL, "served": SERVED}


@dataclass(frozen=True, eq=False)
class Picture:
    """An image as it was given: read, not yet decoded.

    Attributes:
        data: the file's bytes, or an RGB image where no file was given, or a page of one. None: not kept, for `path`
            has them.
        name: what messages call it.
        path: the absolute path of the file that it came from.
        sha256: of the file's bytes, or of the image's size and pixels, in hexadecimal; of a page see `page_digest`.
    """

    data: bytes | Image.Image | None
    name: str
    path: Path | None
    sha256: str


def read_image(source: ImageSource, access: Access = LOCAL, *, dpi: int = pdf.DPI) -> Picture:
    """Read an image without decoding it, so that one that was seen before is known by its bytes; of a PDF one page,
    which `report.pdf[2]` names where there are several.

    Raises:
        ImageError: nothing is there, or it is no source of images, or `access` does not reach it.
    """
    pages = _read(source, access, dpi, most=1)
    return pages[0]


def read_images(
    source: ImageSource, access: Access = LOCAL, *, dpi: int = pdf.DPI, most_pages: int = pdf.MOST_PAGES
) -> list[Picture]:
    """The same for what may be several: a PDF is its pages, all or those that `report.pdf[2-5]` names.

    Args:
        dpi: pixels an inch of a page.
        most_pages: of one PDF.

    Raises:
        ImageError: as `read_image`, or there are more pages than that.
    """
    return _read(source, access, dpi, most_pages)


def may_have_pages(source: object) -> bool:
    """Whether it is a PDF by its bytes or its name, or names pages of one."""
    if isinstance(source, bytes | bytearray | memoryview):
        return pdf.is_pdf(bytes(source[:1024]))
    if not isinstance(source, str | Path) or (isinstance(source, str) and source[:5].lower() == "data:"):
        return isinstance(source, str) and source[:21].lower() == "data:application/pdf;"
    file, pages = pdf.split_name(str(source))
    return pages is not None or file.partition("?")[0].lower().endswith(".pdf")


def page_names(name: str, *, most_pages: int = pdf.MOST_PAGES) -> list[str]:
    """A file's name, or the names of a PDF's pages, each as `report.pdf[2]`; the user's own files alone are looked at.

    Raises:
        ImageError: the pages cannot be told.
    """
    file, pages = pdf.split_name(name)
    if pages is None and not file.lower().endswith(".pdf"):
        return [name]
    data, _, _ = _read_bytes(file, LOCAL)
    _check_pages(data, file, pages)
    if not pdf.is_pdf(data):
        return [name]
    return [f"{file}[{page}]" for page in pdf.choose_pages(pages, pdf.count_pages(data, file), file, most_pages)]


def page_digest(sha256: str, page: int, dpi: int) -> str:
    """What a page of a PDF is known by: its file's SHA-256, its number and how it is rendered."""
    return hashlib.sha256(f"{sha256} page {page} at {dpi} dpi".encode()).hexdigest()


def _read(source: ImageSource, access: Access, dpi: int, most: int) -> list[Picture]:
    if not isinstance(source, str | Path | bytes | bytearray | memoryview):
        image = open_image(source)
        sha256 = hashlib.sha256(repr(image.size).encode() + image.tobytes())
        return [Picture(image, "the image", None, sha256.hexdigest())]
    chosen = None
    if isinstance(source, str) or (isinstance(source, Path) and access.files):
        file, chosen = pdf.split_name(str(source)) if access.files else (str(source), None)
        source = source if chosen is None else file
    data, name, path = _read_bytes(source, access)
    sha256_of_file = hashlib.sha256(data).hexdigest()
    _check_pages(data, name, chosen)
    if not pdf.is_pdf(data):
        return [Picture(data, name, path, sha256_of_file)]
    if not access.pdfs:
        raise ImageError(f"{name} is a PDF, and PDFs are not opened here: send its pages as images")
    if most == 1 and not (chosen or "").strip().isdecimal():
        count = len(pdf.choose_pages(chosen, pdf.count_pages(data, name), name, 10**6))
        if count > 1:
            raise ImageError(f"{name} gives {count} pages, and one picture is wanted: name a page, as in {name}[1]")
    return [
        Picture(image, f"{name}[{page}]", None, page_digest(sha256_of_file, page, dpi))
        for page, image in pdf.render_pages(data, name, chosen, dpi=dpi, most=most)
    ]


def _check_pages(data: bytes, name: str, pages: str | None) -> None:
    if pages is not None and not pdf.is_pdf(data):
        raise ImageError(f"{name}[{pages}] names pages, and {name} is no PDF")


def _read_bytes(source: str | Path | bytes | bytearray | memoryview, access: Access) -> tuple[bytes, str, Path | None]:
    """A file's bytes, what messages call it, and the absolute path where they can be read again."""
    if isinstance(source, bytes | bytearray | memoryview):
        check_size(len(source), "the image bytes")
        return bytes(source), "the image bytes", None
    if isinstance(source, str) and re.match("data:", source, re.IGNORECASE):
        return _read_data_url(source), "the data: URL", None
    if isinstance(source, str) and re.match(r"https?://", source, re.IGNORECASE):
        if not access.urls:
            raise ImageError(f"{source[:200]} is an address, and addresses are not opened here: send the image itself")
        from . import web  # http.client and ssl, which few commands need

        private = web.private_allowed() if access.private_urls is None else access.private_urls
        return web.download(source, private=private), source, None
    if not access.files:
        raise ImageError(f"{str(source)[:200]} names a file, and files are not opened here: send the image itself")
    file = find_file(source)
    data, again = _read_file(file)
    return data, str(source), file.absolute() if again else None


def open_image(source: ImageSource | Picture, *, whole: bool = False, access: Access = LOCAL) -> Image.Image:
    """Open an image as upright RGB; transparency shows white, an animation its first frame.

    An image of more than `decode.REDUCE_ABOVE` pixels comes with a half, a quarter or an eighth of its sides: the
    largest of these that is within the limit. A JPEG is reduced while it is decoded, so that the whole never lies in
    memory.

    Args:
        source: see `ImageSource`. Arrays are [height, width] or [height, width, 1, 3 or 4] (or channels first): uint8,
            uint16, bool, or floats from 0 to 1 or from 0 to 255.
        whole: never reduced.
        access: what a name may reach.

    Raises:
        ImageError: nothing is there, or it is not an image, or it is too large.
    """
    if isinstance(source, Image.Image):
        image = flatten(source, "the image", whole)
        image = image.copy() if image is source else image  # which may change later
    elif isinstance(source, Picture | bytes | bytearray | memoryview | str | Path):
        picture = source if isinstance(source, Picture) else read_image(source, access)
        data = picture.data
        image = data if isinstance(data, Image.Image) else decode(data or b"", picture.name, whole)
    elif hasattr(source, "__array__") or hasattr(source, "__buffer__") or hasattr(source, "__array_interface__"):
        try:
            array = np.asarray(source)
        except Exception as error:  # of a tensor that keeps its gradient, or numbers that numpy does not have
            raise ImageError(f"the numbers of {type(source).__name__} cannot be read: {error}; give float32") from None
        image = from_array(array)
    else:
        raise ImageError(
            f"cannot open an image from {type(source).__name__}: give a path, a URL, bytes, a PIL image or an array"
        )
    factor = 1 if whole else factor_of(*image.size)
    return image if factor == 1 else image.reduce(factor)


def check_size(size: int, name: object) -> None:
    """Raises ImageError where a file is too large to be read."""
    if size > MOST_BYTES:
        raise ImageError(
            f"{name} has {size / 2**20:,.0f} MiB, and the limit for an image is {MOST_BYTES // 2**20}: save it smaller"
        )


def _read_file(path: Path) -> tuple[bytes, bool]:
    """Its bytes, and whether they can be read again. Devices are not read, and pipes not waited for without an end."""
    try:
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(number)
            if stat.S_ISREG(status.st_mode):
                check_size(status.st_size, path)
                return _drain(lambda size: os.read(number, size), path), True
            if stat.S_ISFIFO(status.st_mode):
                return _drain(_pipe(number, path), path), False
            what = "a folder" if stat.S_ISDIR(status.st_mode) else "a device"
            raise ImageError(f"{path} is {what}, not an image")
        finally:
            os.close(number)
    except FileNotFoundError:
        raise ImageError(not_found(path)) from None
    except (OSError, ValueError) as error:
        raise ImageError(f"cannot read image {unreadable(path, error)}") from None


def image_size(path: Path) -> tuple[int, int]:
    """Width and height as the file says, which is not decoded.

    Raises:
        ImageError: nothing is there, or it is not an image.
    """
    path = find_file(path)
    try:
        if not path.is_file():  # a device might never end
            raise ImageError(f"{path} is no file, and no image" if path.exists() else not_found(path))
    except OSError as error:  # a name that is too long
        raise ImageError(f"cannot read image {unreadable(path, error)}") from None
    try:
        with path.open("rb") as file:
            return size_of(file)
    except Exception as error:  # plugins raise anything on broken files
        raise ImageError(f"{path} is not an image: {error or type(error).__name__}") from None


def read_stdin() -> bytes:
    """An image's bytes from stdin, or as many more than the limit as show that it is too large."""
    return sys.stdin.buffer.read(MOST_BYTES + 1)


def _drain(read: Callable[[int], bytes], path: Path) -> bytes:
    """All that `read` gives, within `MOST_BYTES`: a file may grow while it is read."""
    data = bytearray()
    while part := read(1 << 20):
        data += part
        check_size(len(data), path)
    return bytes(data)


def _pipe(number: int, path: Path) -> Callable[[int], bytes]:
    """Reads a pipe that was opened without waiting."""
    opened, begun = time.monotonic(), False

    def read(size: int) -> bytes:
        nonlocal begun
        while True:
            try:
                part = os.read(number, size)
            except BlockingIOError:  # its writer is there
                if not select.select([number], [], [], _SILENCE)[0]:
                    raise ImageError(f"{path}, a pipe, gave nothing for {_SILENCE} s: give a file") from None
                continue
            begun = begun or bool(part)
            if begun or time.monotonic() - opened > _WRITER:
                return part
            time.sleep(0.01)

    return read


def _read_data_url(url: str) -> bytes:
    if len(url) > _DATA_URL_LIMIT or url.count("%") > _PERCENTS:
        raise ImageError(
            f"the data: URL has {len(url) / 2**20:,.1f} MiB, {url.count('%'):,} characters as %XX, and the limits are "
            f"{_DATA_URL_LIMIT // 2**20} and {_PERCENTS:,}: give the image as a file"
        )
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
