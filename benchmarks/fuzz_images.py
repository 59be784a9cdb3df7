"""Throws broken pictures at `open_image`: each must give a picture or one line, within 2 s of computing and 1 GB.

    python benchmarks/fuzz_images.py --executions 1000000 --log fuzz.jsonl     # goes on where the log ends
    python benchmarks/fuzz_images.py --report --log fuzz.jsonl
    python benchmarks/fuzz_images.py --one 123456                              # repeats an execution by its number
    python benchmarks/fuzz_images.py --atheris 100000 --log fuzz.jsonl         # guided by coverage; needs `atheris`

The inputs are small pictures of every form that is opened, and of many that are not, made here; execution N truncates,
flips, overwrites, splices and repeats bytes of one of them as N says, and mends PNG's checksums every other time. They
run in a worker, so that a crash or a hang of a decoder is seen, too: it is a failure with its number.
"""

import argparse
import base64
import io
import json
import os
import random
import re
import resource
import signal
import struct
import sys
import tempfile
import time
import zlib
from collections import Counter
from contextlib import nullcontext
from functools import cache
from mmap import mmap
from pathlib import Path
from typing import Any

import numpy as np

if "--atheris" in sys.argv:  # which has to see these being imported
    import atheris

    watching = atheris.instrument_imports(include=["PIL", "mlx_vlm_mini"])
else:
    watching = nullcontext()
with watching:
    import pillow_heif
    from PIL import Image, ImageCms

    Image.init()

    from mlx_vlm_mini.errors import VLMError
    from mlx_vlm_mini.images.source import open_image

MOST_SECONDS, MOST_MEGABYTES = 2.0, 1000
BLOCK = 20_000  # executions between two lines of the log
INTERESTING = [0, 1, 2, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0xFFFF, 0x10000, 0xFFFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]


@cache
def corpus() -> list[tuple[str, bytes]]:
    """Names and files, the same each time."""
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (5, 7, 4), dtype=np.uint8)).resize((23, 17))
    rgb, grey, found = smooth.convert("RGB"), smooth.convert("L"), []

    def add(name: str, image: Image.Image, form: str, **options: Any) -> None:
        buffer = io.BytesIO()
        if "append_images" in options:  # saving leaves its marks on them
            options["append_images"] = [each.copy() for each in options["append_images"]]
        image.copy().save(buffer, form, **options)
        found.append((name, buffer.getvalue()))

    lab = ImageCms.profileToProfile(
        rgb, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    palette = rgb.quantize(16)
    frames: dict[str, Any] = {"save_all": True, "append_images": [rgb.rotate(90), rgb.rotate(180)]}
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a picture"
    exif.get_ifd(0x8769)[0x9286] = b"comment"
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="8"/></x:xmpmeta>'
    for mode in ("RGB", "L", "CMYK"):
        add(f"{mode}.jpg", rgb.convert(mode), "JPEG", quality=90)
        add(f"progressive {mode}.jpg", rgb.convert(mode), "JPEG", progressive=True, subsampling=0)
    add("exif.jpg", rgb, "JPEG", exif=exif, icc_profile=profile, comment=b"c" * 9, xmp=xmp, dpi=(3, 3))
    add("restarts.jpg", rgb, "JPEG", restart_marker_blocks=1)
    add("mpo.jpg", rgb, "MPO", **frames)
    for mode in ("RGB", "RGBA", "L", "LA", "P", "1"):
        add(f"{mode}.png", rgb.convert(mode) if mode != "RGBA" else smooth, "PNG")
    add("16 bit.png", Image.fromarray(np.asarray(grey).astype(np.uint16) * 257), "PNG")
    add("palette.png", palette, "PNG", transparency=bytes(range(16)), exif=exif, icc_profile=profile)
    add("animated.png", rgb, "PNG", **frames)
    for name, image in (("P", palette), ("RGB", rgb)):
        add(f"{name}.gif", image, "GIF", transparency=1, comment=b"hello")
        add(
            f"animated {name}.gif",
            image,
            "GIF",
            **{**frames, "append_images": [palette.rotate(90)]},
            loop=0,
            duration=9,
        )
    add("lossy.webp", rgb, "WEBP", exif=exif.tobytes(), icc_profile=profile, xmp=xmp)
    add("lossless.webp", smooth, "WEBP", lossless=True)
    add("animated.webp", smooth, "WEBP", **frames, duration=9)
    if "AVIF" in Image.SAVE or (Image.init() and "AVIF" in Image.SAVE):
        add("a.avif", smooth, "AVIF", speed=10, exif=exif.tobytes())
    for name, shown in (("a", [smooth]), ("burst", [rgb, grey]), ("grey", [grey])):
        buffer, written = io.BytesIO(), pillow_heif.HeifFile()
        for image in shown:
            written.add_from_pillow(image)
        written.save(buffer, quality=60)
        found.append((f"{name}.heic", buffer.getvalue()))
    for how in ("raw", "packbits", "tiff_lzw", "tiff_adobe_deflate", "jpeg", "zstd"):
        add(f"{how}.tif", rgb, "TIFF", compression=how, exif=exif)
    for how in ("group3", "group4"):
        add(f"{how}.tif", grey.convert("1"), "TIFF", compression=how)
    for mode, image in (("lab", lab), ("cmyk", rgb.convert("CMYK")), ("rgba", smooth), ("f", grey.convert("F"))):
        add(f"{mode}.tif", image, "TIFF")
    add("16 bit.tif", Image.fromarray(np.asarray(grey).astype(np.uint16) * 257), "TIFF", big_tiff=True)
    add("pages.tif", rgb, "TIFF", **frames)
    for mode in ("RGB", "L", "P", "1", "RGBA"):
        add(f"{mode}.bmp", palette if mode == "P" else smooth.convert(mode), "BMP")
    header = struct.pack("<IiiHHIIiiII", 40, 6, 3, 1, 8, 1, 14, 0, 0, 4, 0)
    runs = header + bytes(range(16)) + b"\x06\x01\x00\x00\x00\x04\x01\x02\x03\x01\x02\x02\x00\x01"
    found.append(("runs.bmp", b"BM" + struct.pack("<IHHI", 14 + len(runs), 0, 0, 14 + 40 + 16) + runs))
    for mode in ("1", "L", "RGB", "I", "F"):
        add(f"{mode}.ppm", grey.convert("I") if mode == "I" else smooth.convert(mode), "PPM")
    found += [
        ("plain.pgm", b"P2 # grey\n3 2 9\n0 4 9\n1 2 3\n"), ("plain.ppm", b"P3 2 1 255\n255 0 0 0 9 99\n"),
        ("plain.pbm", b"P1\n4 2\n1010\n0 1 0 1\n"), ("few.ppm", b"P6 2 2 9\n" + bytes(12)),
        ("zero.png", b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", struct.pack(">IIBBBBB", 0, 0, 8, 2, 0, 0, 0))),
        ("bomb.png", b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", struct.pack(">IIBBBBB", 65500, 65500, 8, 2, 0, 0, 0))),
        ("a.svg", b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><rect width="9"/></svg>'),
        ("a.pdf", b"%PDF-1.7\n1 0 obj<<>>endobj\n%%EOF"), ("a.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%EOF\n"),
        ("none.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40)), ("a.mp4", b"\0\0\0\x18ftypisom" + bytes(40)),
        ("a.txt", b"no picture at all, but a text named .jpg " * 3), ("empty", b""), ("loop.jpg", _looping_exif()),
    ]  # fmt: skip
    for form in ("TGA", "ICO", "PCX", "SGI", "JPEG2000", "IM", "DDS", "ICNS", "MSP", "SPIDER"):  # not opened
        add(
            f"a.{form.lower()}",
            grey.convert("1") if form == "MSP" else grey if form in ("SGI", "SPIDER") else rgb,
            form,
        )
    return found


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _looping_exif() -> bytes:
    """A JPEG whose EXIF tables point at themselves and at one another."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "JPEG")
    data = buffer.getvalue()
    tags = [(0x0112, 3, 1, 1), (0x8769, 4, 1, 8), (0x8825, 4, 1, 8), (0xA005, 4, 1, 8)]
    table = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    block = b"Exif\0\0" + table + struct.pack("<I", 8)
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + data[2:]


def mutate(number: int) -> tuple[str, bytes]:
    """The input of an execution."""
    rng, files = random.Random(number), corpus()
    name, data = files[rng.randrange(len(files))]
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3, 5, 9))):
        place, how = rng.randrange(len(found) + 1), rng.randrange(10)
        if how == 0:
            del found[place:]
        elif how == 1 and found:
            found[place % len(found)] ^= 1 << rng.randrange(8)
        elif how == 2 and found:
            found[place % len(found)] = rng.randrange(256)
        elif how in (3, 4):
            size = rng.choice((1, 2, 4, 4, 8))
            value = rng.choice(INTERESTING) + rng.choice((0, 0, -1, 1, rng.randrange(300)))
            found[place : place + size] = (value % 256**size).to_bytes(size, rng.choice(("little", "big")))
        elif how == 5:
            found[place:place] = rng.randbytes(rng.choice((1, 2, 4, 12, 60)))
        elif how == 6:
            del found[place : place + rng.choice((1, 2, 4, 30))]
        elif how == 7:
            found[place:place] = found[place : place + rng.choice((4, 12, 100))] * rng.choice((1, 2, 50))
        elif how == 8:
            other = files[rng.randrange(len(files))][1]
            start = rng.randrange(len(other) + 1)
            found[place:] = other[start : start + rng.choice((8, 60, 5000))]
        elif how == 9 and found:
            size = rng.choice((2, 8, 30))
            found[place : place + size] = bytes(rng.choice((0, 255)) for _ in range(size))
    data = bytes(found)
    return name, _mend(data) if number % 2 else data


def _mend(data: bytes) -> bytes:
    """A PNG's checksums put right, without which nothing behind them is looked at."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    parts, place = [data[:8]], 8
    while place + 12 <= len(data):
        size = int.from_bytes(data[place : place + 4], "big")
        body = data[place + 4 : place + 8 + size]
        if len(body) < size + 4:
            break
        parts += [data[place : place + 4], body, zlib.crc32(body).to_bytes(4, "big")]
        place += 12 + size
    return b"".join(parts) + data[place:]


def execute(data: bytes) -> tuple[str, float, str | None]:
    """What came of it, in words without numbers; the seconds it took; and what is wrong with that."""
    begin, wrong = time.thread_time(), None
    try:
        image = open_image(data)
        outcome = "a picture"
        if image.mode != "RGB" or 0 in image.size or len(image.tobytes()) != 3 * image.width * image.height:
            wrong = f"it is {image.mode} of {image.size}"
    except VLMError as error:
        outcome = re.sub(r"[\d,.]+", "#", re.sub(r"b?'.*'|\[.*\]|\(.*\)", "...", str(error)))[:120]
        wrong = "its message has several lines" if "\n" in str(error) else None
    except Exception as error:
        outcome, wrong = f"{type(error).__name__} escaped", repr(error)[:300]
    seconds = time.thread_time() - begin
    if seconds > MOST_SECONDS:
        wrong = f"it took {seconds:.1f} s"
    return outcome, seconds, wrong


def peak() -> float:
    """Megabytes of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1024)


def work(start: int, end: int, log: Path, shared: mmap) -> None:
    """Executions `start` to `end`, and a line about them; in a process of its own."""
    outcomes: Counter[str] = Counter()
    failures, slowest, begin = [], (0.0, 0), time.time()
    for number in range(start, end):
        shared[:8] = struct.pack("<q", number)
        name, data = mutate(number)
        outcome, seconds, wrong = execute(data)
        outcomes[outcome] += 1
        slowest = max(slowest, (round(seconds, 3), number))
        if wrong is None and peak() > MOST_MEGABYTES:
            wrong = f"the process has {peak():.0f} MB"
        if wrong is not None:
            failures.append([number, name, wrong])
    _write(log, start, end, time.time() - begin, outcomes, slowest, failures)


def _write(log: Path, start: Any, end: int, seconds: float, outcomes: Any, slowest: Any, failures: Any) -> None:
    line = {"start": start, "end": end, "seconds": round(seconds, 1), "outcomes": outcomes, "slowest": slowest,
            "peak_mb": round(peak()), "failures": failures}  # fmt: skip
    with log.open("a") as file:
        file.write(json.dumps(line) + "\n")


def run(executions: int, log: Path) -> None:
    """All executions, a worker a block; one that dies or stands still is a failure at the number where it was."""
    done = max((line["end"] for line in read(log) if isinstance(line["start"], int)), default=0)
    shared = mmap(-1, 8)
    while done < executions:
        end, start = min(done + BLOCK, executions), done
        worker = os.fork()
        if not worker:
            work(start, end, log, shared)
            os._exit(0)
        seen, since = b"", time.time()
        while not os.waitpid(worker, os.WNOHANG)[0]:
            time.sleep(0.2)
            now = shared[:8]
            seen, since = (now, time.time()) if now != seen else (seen, since)
            if time.time() - since > 60:
                os.kill(worker, signal.SIGKILL)
        if read(log)[-1:] and read(log)[-1]["end"] == end:
            done = end
        else:
            number = struct.unpack("<q", shared[:8])[0]
            _write(log, start, number + 1, 0, {"died": 1}, (0, 0), [[number, mutate(number)[0], "it died or hung"]])
            done = number + 1
        print(f"\r{done:,} of {executions:,}", end="", file=sys.stderr, flush=True)


def read(log: Path) -> list[Any]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def report(log: Path) -> None:
    lines, outcomes = read(log), Counter[str]()
    for line in lines:
        outcomes.update(line["outcomes"])
    failures = [failure for line in lines for failure in line["failures"]]
    total, seconds = sum(outcomes.values()), sum(line["seconds"] for line in lines)
    guided = sum(sum(line["outcomes"].values()) for line in lines if not isinstance(line["start"], int))
    print(f"executions         {total:,} ({guided:,} of them guided by coverage)")
    print(f"a second           {total / max(seconds, 1):,.0f}")
    print(f"pictures           {outcomes['a picture']:,}")
    print(f"distinct outcomes  {len(outcomes):,}")
    slowest, which = max(line["slowest"] for line in lines)
    print(f"slowest            {slowest:.3f} s (execution {which})")
    print(
        f"peak memory        {max(line['peak_mb'] for line in lines):,} MB, the interpreter and its libraries included"
    )
    print(f"failures           {len(failures):,}")
    for number, name, wrong in failures[:40]:
        print(f"  {number}: {name}: {wrong}")
    for outcome, count in outcomes.most_common(25):
        print(f"{count:>9,} {outcome}")


def guided(runs: int, log: Path) -> None:
    """The same through atheris, whose choice of inputs follows the coverage of Pillow's and our Python code."""
    folder = tempfile.mkdtemp()
    for number, (_, data) in enumerate(corpus()):
        (Path(folder) / str(number)).write_bytes(data)
    state: dict[str, Any] = {"outcomes": Counter(), "failures": [], "slowest": (0.0, 0), "begin": time.time()}

    def one(data: bytes) -> None:
        outcome, seconds, wrong = execute(data)
        state["outcomes"][outcome] += 1
        state["slowest"] = max(state["slowest"], (round(seconds, 3), 0))
        if wrong is not None:
            state["failures"].append([base64.b64encode(data).decode()[:4000], "guided", wrong])
        if sum(state["outcomes"].values()) == BLOCK // 4:
            _write(
                log, "guided", 0, time.time() - state["begin"], state["outcomes"], state["slowest"], state["failures"]
            )
            state.update(outcomes=Counter(), failures=[], begin=time.time())

    atheris.Setup([sys.argv[0], f"-runs={runs}", "-max_len=4096", "-rss_limit_mb=2000", "-timeout=20", folder], one)
    atheris.Fuzz()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--executions", type=int, default=1_000_000)
    parser.add_argument("--log", type=Path, default=Path("fuzz.jsonl"))
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--one", type=int)
    parser.add_argument("--atheris", type=int, metavar="RUNS")
    given = parser.parse_args()
    if given.one is not None:
        print(mutate(given.one)[0], *execute(mutate(given.one)[1]), sep="\n")
    elif given.atheris:
        guided(given.atheris, given.log)
    else:
        if not given.report:
            run(given.executions, given.log)
        report(given.log)
