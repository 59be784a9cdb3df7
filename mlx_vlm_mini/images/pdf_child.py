"""Run as a program by pdf.py: a PDF on stdin, pages as RGB on stdout. PDFium is a large parser of a stranger's bytes,
which nothing can stop: here it can crash, or take too much, without harm to who asked.

    python pdf_child.py DPI MOST_PIXELS SECONDS BYTES

It reads 8 bytes, how long the PDF is, and the PDF; answers a line of JSON, {"pages": n} or {"error": ...}; reads a line
of JSON, the pages that are wanted, numbered from 1; and answers for each {"page": n, "size": [width, height]} and its
pixels.
"""

import contextlib
import json
import os
import resource
import sys
from typing import Any


def main() -> None:
    dpi, most_pixels, seconds, limit = (int(argument) for argument in sys.argv[1:])
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    answers = os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # what libraries write goes nowhere
    os.dup2(nowhere, 2)

    given = sys.stdin.buffer

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer).encode() + b"\n")

    import pypdfium2

    try:
        document = pypdfium2.PdfDocument(given.read(int.from_bytes(given.read(8), "big")))
    except pypdfium2.PdfiumError as error:
        locked = getattr(error, "err_code", None) in (pypdfium2.raw.FPDF_ERR_PASSWORD, pypdfium2.raw.FPDF_ERR_SECURITY)
        say({"error": "locked" if locked else "broken"})
        return answers.flush()
    document.init_forms()  # what was filled in shows; nothing of it runs
    say({"pages": len(document)})
    answers.flush()
    for number in json.loads(given.readline() or b"[]"):
        try:
            page = document[number - 1]
            width, height = page.get_size()  # in 72ths of an inch
            scale = dpi / 72
            if not (width > 0 and height > 0):
                raise ValueError
            scale = min(scale, (most_pixels / (width * height)) ** 0.5)
            bitmap = page.render(scale=scale, rev_byteorder=True, fill_color=(255, 255, 255, 255))
        except (pypdfium2.PdfiumError, ValueError, IndexError, OverflowError):
            say({"error": "broken page", "page": number})
            return answers.flush()
        row = bitmap.width * 3
        pixels, stride = memoryview(bitmap.buffer).cast("B"), bitmap.stride
        if bitmap.n_channels != 3:
            say({"error": "broken page", "page": number})
            return answers.flush()
        say({"page": number, "size": [bitmap.width, bitmap.height]})
        for line in range(bitmap.height):
            answers.write(pixels[line * stride : line * stride + row])
        page.close()
    answers.flush()


if __name__ == "__main__":
    main()
