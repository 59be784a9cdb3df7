"""Opens pictures that were made to cost time or memory, at full size: what each costs, and what it gives.

    python benchmarks/image_bombs.py            # some minutes, 1.5 GB of memory to make them
    python benchmarks/image_bombs.py jpg        # those with that in their names

Each is opened in a process of its own, whose computing time (of all threads) and peak memory, above what it began with,
are told. Exits 1 where one costs more than 2 s or 1 GB.
"""

import io
import os
import resource
import struct
import sys
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from mlx_vlm_mini.errors import VLMError
from mlx_vlm_mini.images.source import open_image

MOST_SECONDS, MOST_MEGABYTES = 2.0, 1000
Image.MAX_IMAGE_PIXELS = None  # for making them


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def noise(width: int, height: int, channels: int, low: int = 0, high: int = 256) -> Image.Image:
    tile = np.random.default_rng(0).integers(low, high, (1000, 1000, channels), dtype=np.uint8)
    array = np.tile(tile, (-(-height // 1000), -(-width // 1000), 1))[:height, :width]
    return Image.fromarray(array[..., 0] if channels == 1 else array)


def scans(width: int, height: int, mode: str, count: int) -> bytes:
    """A progressive JPEG with empty scans added, each of which goes through all of it."""
    data = encoded(
        Image.new(mode, (width, height)), "JPEG", progressive=True, **({"subsampling": 0} if mode == "RGB" else {})
    )
    empty = b"\xff\xda\x00\x08\x01\x01\x00\x01\x3f\x00"
    return data[:-2] + empty * (count - data.count(b"\xff\xda")) + b"\xff\xd9"


def overlapping(tags: int, size: int) -> bytes:
    """A table whose tags all have the same bytes as their value."""
    entries = b"".join(struct.pack("<HHII", 1000 + number, 7, size, 8) for number in range(tags))
    return (b"II*\0\x08\0\0\0" + struct.pack("<H", tags) + entries + bytes(4)).ljust(size + 8, b"\0")


def jpeg_with_exif(block: bytes, times: int) -> bytes:
    data, block = encoded(Image.new("L", (8, 8)), "JPEG"), b"Exif\0\0" + block
    return data[:2] + (b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block) * times + data[20:]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*chunks: bytes, width: int = 1, height: int = 1, depth: int = 8, color: int = 0, pixels: bytes = b"") -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    body = chunk(b"IDAT", pixels or zlib.compress(b"\0\0"))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + body + chunk(b"IEND", b"")


def zeros(size: int) -> bytes:
    """So many, packed."""
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(2**20)) for _ in range(size >> 20)) + packer.flush()


def hidden_exif() -> bytes:
    text = f"\nexif\n   500000\n{(b'Exif' + bytes(2) + overlapping(20_000, 250_000)).hex()}"
    return png(chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text.encode())))


def gif(comments: bytes) -> bytes:
    data = encoded(Image.new("P", (4, 4)), "GIF")
    head = 13 + 3 * 2 ** ((data[10] & 7) + 1)
    return data[:head] + comments + data[head:]


def runs(width: int, height: int, pixels: bytes) -> bytes:
    """A BMP in run lengths."""
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(pixels), 0, 0, 2, 0) + bytes(8)
    return b"BM" + struct.pack("<IHHI", 14 + len(head) + len(pixels), 0, 0, 14 + len(head)) + head + pixels


def tiff(width: int, height: int, *tags: tuple[int, int, int, int], size: int, following: int = 0) -> bytes:
    basic = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1)]
    table = sorted([*basic, *tags])
    entries = b"".join(struct.pack("<HHII", *tag) for tag in table)
    return (b"II*\0\x08\0\0\0" + struct.pack("<H", len(table)) + entries + struct.pack("<I", following)).ljust(
        size, b"\0"
    )


def animated(form: str, side: int, count: int) -> bytes:
    frames = [Image.new("P" if form == "GIF" else "RGB", (side, side), number) for number in range(count)]
    return encoded(frames[0], form, save_all=True, append_images=frames[1:])


STRIP = ((273, 4, 1, 200), (278, 4, 1, 100), (279, 4, 1, 10_000))
BOMBS: dict[str, Callable[[], bytes]] = {
    "photo of 200 megapixels.jpg": lambda: encoded(noise(2000, 1560, 3).resize((16000, 12480)), "JPEG", quality=90),
    "noise in scans.jpg": lambda: encoded(noise(8000, 8000, 3, 100, 140), "JPEG", progressive=True, subsampling=0),
    "18 scans of 64 megapixels.jpg": lambda: scans(8000, 8000, "RGB", 18),
    "100 scans of 12 megapixels.jpg": lambda: scans(3900, 3000, "RGB", 100),
    "9000 scans.jpg": lambda: scans(3900, 3000, "L", 9000),
    "5 million segments.jpg": lambda: (
        b"\xff\xd8" + b"\xff\xfe\x00\x02" * 5_000_000 + encoded(Image.new("L", (8, 8)), "JPEG")[2:]
    ),
    "EXIF.jpg": lambda: jpeg_with_exif(overlapping(2700, 32_000), 1),
    "EXIF forty times.jpg": lambda: jpeg_with_exif(overlapping(2700, 32_000), 40),
    "EXIF.png": lambda: png(chunk(b"eXIf", overlapping(60_000, 20_000_000))),
    "packed EXIF.png": hidden_exif,
    "3 million texts.png": lambda: png(chunk(b"tEXt", b"a\0") * 3_000_000),
    "3 million chunks.png": lambda: png(chunk(b"aaAa", b"") * 3_000_000),
    "packed text.png": lambda: png(chunk(b"zTXt", b"a\0\0" + zeros(10**9))),
    "packed profile.png": lambda: png(chunk(b"iCCP", b"a\0\0" + zeros(10**9))),
    "16 bits.png": lambda: png(width=8000, height=8000, depth=16, color=6, pixels=zeros(2**29 + 2**20)),
    "noise.png": lambda: encoded(noise(8000, 8000, 4, 0, 64), "PNG", compress_level=1),
    "noise, LZW.tif": lambda: encoded(noise(8000, 8000, 4, 0, 16), "TIFF", compression="tiff_lzw"),
    "noise, fax.tif": lambda: encoded(noise(8000, 8000, 1).convert("1"), "TIFF", compression="group4"),
    "noise, JPEG.tif": lambda: encoded(noise(4000, 4000, 3), "TIFF", compression="jpeg"),
    "50 million strips.tif": lambda: tiff(
        100, 100, (273, 4, 50_000_000, 8), (278, 4, 1, 1), (279, 4, 1, 9), size=200_000_000
    ),
    "130,000 strips.tif": lambda: tiff(
        100, 130_000, (273, 4, 130_000, 200), (278, 4, 1, 1), (279, 4, 1, 9), size=1_000_000
    ),
    "overlapping tags.tif": lambda: tiff(
        100, 100, *STRIP, *((number, 7, 20_000_000, 8) for number in range(1000, 30_000)), size=20_000_000
    ),
    "huge tile.tif": lambda: tiff(
        10, 10, (259, 3, 1, 5), (322, 4, 1, 46_000), (323, 4, 1, 46_000), (324, 4, 1, 200), (325, 4, 1, 9), size=4000
    ),
    "looping directory.tif": lambda: tiff(100, 100, *STRIP, size=20_000, following=8),
    "one comment.gif": lambda: gif(b"\x21\xfe" + (b"\xff" + b"a" * 255) * 200_000 + b"\0"),
    "5 million comments.gif": lambda: gif(b"\x21\xfe\x01a\0" * 5_000_000),
    "200 pictures.gif": lambda: animated("GIF", 2000, 200),
    "6 pictures.webp": lambda: animated("WEBP", 4000, 6),
    "noise.webp": lambda: encoded(noise(8000, 5000, 4), "WEBP", lossless=True, method=0, quality=0),
    "noise.avif": lambda: encoded(noise(6000, 4000, 3, 90, 160), "AVIF", speed=10, quality=90, subsampling="4:4:4"),
    "rows in runs.bmp": lambda: runs(8000, 8000, b"\x01\x01\0\0" * 8000),
    "a row of 60 million.bmp": lambda: runs(60_000_000, 1, b"\x01\x01\0\0"),
    "few colours.ppm": lambda: b"P6 8000 8000 100\n" + bytes(96_000_000),
    "numbers in words.ppm": lambda: b"P3 8000 8000 255\n" + b"1 " * 60_000_000,
}


def measure(name: str, make: Callable[[], bytes]) -> bool:
    """In two processes, for making a picture takes more than opening it. Whether it kept to the limits."""
    file = f"/tmp/bomb-{os.getpid()}"
    if not (child := os.fork()):
        with open(file, "wb") as out:  # noqa: PTH123
            out.write(make())
        os._exit(0)
    os.waitpid(child, 0)
    if not (child := os.fork()):
        usage = resource.getrusage(resource.RUSAGE_SELF)
        before, begin = usage.ru_maxrss, time.process_time()
        try:
            found = "a picture of {}x{}".format(*open_image(file).size)
        except VLMError as error:
            found = str(error).removeprefix(file + " ")
        seconds = time.process_time() - begin
        unit = 1e6 if sys.platform == "darwin" else 1024
        megabytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / unit
        size = os.stat(file).st_size / 1e6  # noqa: PTH116
        print(f"{name:32} {size:7.1f} MB {seconds:5.2f} s {megabytes:5.0f} MB  {found}", flush=True)
        os._exit(seconds > MOST_SECONDS or megabytes > MOST_MEGABYTES)
    kept = os.waitpid(child, 0)[1] == 0
    os.remove(file)  # noqa: PTH107
    return kept


if __name__ == "__main__":
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    results = [measure(name, make) for name, make in BOMBS.items() if wanted in name]
    print(f"{sum(results)} of {len(results)} within {MOST_SECONDS:g} s and {MOST_MEGABYTES} MB")
    sys.exit(not all(results))
