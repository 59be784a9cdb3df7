"""PDFs: their pages are images in order, chosen by numbers, within limits, and nothing of a stranger's that is served."""

import io
import random
import time
from pathlib import Path

import numpy as np
import pytest
from checkpoints import PLAIN
from PIL import Image

from mlx_vlm_mini import Chat, load
from mlx_vlm_mini.errors import ImageError, PromptError
from mlx_vlm_mini.images import pdf
from mlx_vlm_mini.images.source import LOCAL, SERVED, Picture, open_image, page_names, read_image, read_images
from mlx_vlm_mini.text.messages import images_of, to_messages

COLOURS = [(250, 20, 30), (20, 250, 30), (20, 30, 250), (240, 240, 20)]


def pdf_of(*colours: tuple[int, int, int], size: tuple[int, int] = (60, 90)) -> bytes:
    """A page of each colour, `size` in 72ths of an inch."""
    first, *rest = (Image.new("RGB", size, colour) for colour in colours)
    buffer = io.BytesIO()
    first.save(buffer, "PDF", save_all=True, append_images=rest)
    return buffer.getvalue()


def pdf_with(*objects: str, trailer: str = "/Root 1 0 R") -> bytes:
    """A PDF of these objects, numbered from 1."""
    data, places = b"%PDF-1.4\n", []
    for number, each in enumerate(objects, 1):
        places.append(len(data))
        data += f"{number} 0 obj\n{each}\nendobj\n".encode()
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    size = len(objects) + 1
    end = f"xref\n0 {size}\n0000000000 65535 f \n{table}trailer\n<< /Size {size} {trailer} >>\nstartxref\n{len(data)}\n"
    return data + f"{end}%%EOF\n".encode()


def drawing(content: str, box: str = "0 0 60 90") -> bytes:
    return pdf_with(
        "<< /Type /Catalog /Pages 2 0 R >>",
        "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        f"<< /Type /Page /Parent 2 0 R /MediaBox [{box}] /Contents 4 0 R >>",
        f"<< /Length {len(content)} >>\nstream\n{content}\nendstream",
    )


PDF = pdf_of(*COLOURS)


@pytest.fixture
def report(tmp_path):
    file = tmp_path / "report.pdf"
    file.write_bytes(PDF)
    return file


def colours_of(pictures: list[Picture]) -> list[int]:
    shown = [np.asarray(open_image(picture))[5, 5].astype(int) for picture in pictures]
    return [int(np.abs(np.array(COLOURS) - each).sum(axis=1).argmin()) + 1 for each in shown]


@pytest.mark.parametrize(
    ("chosen", "pages"),
    [("", [1, 2, 3, 4]), ("[2]", [2]), ("[2-3]", [2, 3]), ("[3-]", [3, 4]), ("[1,3-4]", [1, 3, 4]), ("[4, 1]", [4, 1])],
)
def test_pages_in_order(report, chosen, pages):
    found = read_images(f"{report}{chosen}")
    assert colours_of(found) == pages
    assert [picture.name for picture in found] == [f"{report}[{page}]" for page in pages]
    assert page_names(f"{report}{chosen}") == [f"{report}[{page}]" for page in pages]
    assert len({picture.sha256 for picture in found}) == len(pages)


def test_dots_an_inch(report):
    assert open_image(read_images(f"{report}[1]")[0]).size == (120, 180)
    (fine,) = read_images(f"{report}[1]", dpi=288)
    assert open_image(fine).size == (240, 360)
    assert fine.sha256 != read_image(f"{report}[1]").sha256


def test_what_is_drawn_shows_on_white():
    (picture,) = read_images(drawing("1 0 0 rg 0 45 60 45 re f"))
    pixels = np.asarray(open_image(picture))
    assert tuple(pixels[20, 60]) == (255, 0, 0) and tuple(pixels[160, 60]) == (255, 255, 255)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ("[5]", "report.pdf has 4 pages, and 5 is none of them"),
        ("[0]", "has 4 pages, and 0 is none of them"),
        ("[3-2]", "has 4 pages, and 3-2 is none of them"),
        ("[1,,2]", "is no choice of pages: write"),
        ("[-2]", "is no choice of pages"),
    ],
)
def test_pages_that_are_not_there(report, chosen, message):
    with pytest.raises(ImageError, match=message) as error:
        read_images(f"{report}{chosen}")
    assert str(error.value).isprintable()


def test_too_many_pages_say_how_to_choose(report):
    with pytest.raises(
        ImageError, match=r"4 pages, and the limit is 3: choose some, as in .*report.pdf\[1-3\], or raise"
    ):
        read_images(report, most_pages=3)
    with pytest.raises(ImageError, match=r"gives 4 pages, and one picture is wanted: name a page, as in .*pdf\[1\]"):
        open_image(report)
    assert open_image(f"{report}[2]").size == (120, 180)


LOCKED = "<< /Filter /Standard /V 1 /R 2 /O (aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa) /U (bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb) /P -4 >>"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (PDF[: len(PDF) // 3], "is broken, or no PDF that PDFium can read: save it anew"),
        (b"%PDF-1.7\n%%EOF", "is broken, or no PDF"),
        (
            pdf_with("<< /Type /Catalog /Pages 2 0 R >>", "<< /Type /Pages /Kids [] /Count 0 >>"),
            "has no pages|is broken",
        ),
        (
            pdf_with(
                "<< /Type /Catalog /Pages 2 0 R >>",
                "<< /Type /Pages /Kids [] /Count 0 >>",
                LOCKED,
                trailer="/Root 1 0 R /Encrypt 3 0 R /ID [<00112233445566778899aabbccddeeff> <00>]",
            ),
            "has a password: save a copy without one",
        ),
    ],
)
def test_broken_ones_are_one_line(data, message):
    with pytest.raises(ImageError, match=message) as error:
        read_images(data)
    assert str(error.value).isprintable()


def test_pixels_of_a_page_are_bounded():
    (picture,) = read_images(drawing("0 0 1 rg 0 0 14400 14400 re f", "0 0 14400 14400"))
    width, height = open_image(picture).size
    assert 0.9 * pdf.MOST_PIXELS < width * height <= 1.01 * pdf.MOST_PIXELS


def test_what_takes_too_long_ends(monkeypatch):
    monkeypatch.setattr(pdf, "SECONDS", 1)
    content = "0 0 m 60 90 l 60 0 l f\n" * 200_000
    begin = time.monotonic()
    with pytest.raises(
        ImageError, match=r"cannot be rendered: PDFium failed, or needed above 1 s or 4 GiB; choose fewer pages"
    ):
        read_images(drawing("q 0.1 w " + content + "Q", "0 0 6000 9000"), dpi=300)
    assert time.monotonic() - begin < 10


def test_broken_pages_are_one_line_each():
    drawn = random.Random(0)
    for _ in range(6):
        found = bytearray(PDF)
        for _ in range(8):
            found[drawn.randrange(9, len(found))] = drawn.randrange(256)
        try:
            read_images(bytes(found))
        except ImageError as error:
            assert str(error).isprintable()


def test_a_name_with_pages_of_no_pdf(tmp_path):
    Image.new("RGB", (5, 5)).save(tmp_path / "a.png")
    with pytest.raises(ImageError, match=r"a\.png\[2\] names pages, and .*a\.png is no PDF"):
        read_images(f"{tmp_path / 'a.png'}[2]")
    Image.new("RGB", (7, 5)).save(tmp_path / "a.png[2]", "PNG")  # a file that is called so
    assert open_image(tmp_path / "a.png[2]").size == (7, 5)


def test_messages_show_pages_in_the_place_of_the_pdf(report):
    for source in (Path(report), PDF):
        parts = to_messages(["See", source, {"type": "image", "image": f"{report}[2]"}], access=LOCAL)[0]["content"]
        assert colours_of([part["image"] for part in parts[1:]]) == [1, 2, 3, 4, 2]
    said = [{"role": "user", "content": [{"type": "image", "image": f"{report}[2-3]"}, {"type": "text", "text": "?"}]}]
    assert colours_of([part["image"] for part in images_of(to_messages(said, access=LOCAL))]) == [2, 3]
    assert len(images_of(to_messages("?", images=report, access=LOCAL))) == 4


def test_a_model_reads_them(report):
    model, processor = load(PLAIN)
    assert len(processor(["Compare", report]).images) == 4
    chat = Chat(model, processor, max_tokens=2)
    list(chat.send([{"type": "image", "image": f"{report}[3]"}, "What?"]))
    (part,) = images_of(chat.messages)
    assert part["image"].origin.name == f"{report}[3]"


def test_what_is_served_opens_none(report):
    _, processor = load(PLAIN, access="served")
    for source, message in ((report, "names a file"), (PDF, "is a PDF, and PDFs are not opened here: send its pages")):
        with pytest.raises((ImageError, PromptError), match=message):
            processor(["What?", {"type": "image", "image": source}])
    with pytest.raises(ImageError, match="PDFs are not opened here"):
        read_image(PDF, SERVED)
