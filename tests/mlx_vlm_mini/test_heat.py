"""Heat maps and the page: a known attention is drawn where its boxes are, and the page needs nothing but itself."""

import base64
import io
from html.parser import HTMLParser

import numpy as np
import pytest
from checkpoints import PHOTO, SHAPES
from PIL import Image

from mlx_vlm_mini import attend, attention_page, draw_attention
from mlx_vlm_mini.grounding.attended import AnswerAttention, ImageAttention
from mlx_vlm_mini.grounding.heat import heat_of, mean_token
from mlx_vlm_mini.images.source import read_image

EVIL = '<script src="https://evil.example/x.js">\'"&'


def answer(weights, *, size=(40, 80), texts=None, prompt="Where?"):
    """An answer about a grey picture of four quarters, and a token of the image that shows none of it."""
    height, width = size
    halves = [(x, y) for y in (0, height / 2) for x in (0, width / 2)]
    boxes = np.array([(x, y, x + width / 2, y + height / 2) for x, y in halves] + [(np.nan,) * 4])
    weights = np.array(weights, dtype=np.float32)
    picture = read_image(Image.new("RGB", (width, height), (120, 120, 120)))
    count = weights.shape[-2]
    return AnswerAttention(
        prompt=prompt, token_ids=tuple(range(count)), tokens=tuple(f"t{i}" for i in range(count)),
        texts=texts or tuple(f" w{i}" for i in range(count)), logprobs=np.zeros(count, np.float32), reduce="mean",
        layers=(0, 1, 2, 5), heads=(0,), images=(ImageAttention(weights=weights, boxes=boxes, size=size, origin=picture),),
    )  # fmt: skip


def test_the_brightest_place_is_the_one_that_was_looked_at():
    found = answer([[0.1, 0, 0, 0.3, 0.5], [0, 0.2, 0, 0, 0]])
    for token, quarter in enumerate(((1, 1), (0, 1))):
        drawn = np.array(draw_attention(found, token).convert("L")).astype(float)
        assert drawn.shape == (40, 80)
        quarters = drawn.reshape(2, 20, 2, 40).mean(axis=(1, 3))
        assert np.unravel_index(quarters.argmax(), (2, 2)) == quarter and drawn.std(axis=(0, 1)) > 10
    np.testing.assert_allclose(heat_of(found, 0, [(2, 2)])[0], [[1 / 3, 0], [0, 1]])
    np.testing.assert_allclose(found.shares, [0.9, 0.2], rtol=1e-6)
    np.testing.assert_allclose(mean_token(found).images[0].weights, [[0.05, 0.1, 0, 0.15, 0.25]])
    np.testing.assert_allclose(found.images[0].inside((0, 0, 80, 20)), [0.1, 0.2], rtol=1e-6)
    assert np.array_equal(draw_attention(found, -1), draw_attention(found, 1))


def test_a_token_that_looks_at_nothing_is_dark():
    found = answer([[0, 0, 0, 0, 0.0]])
    assert np.array(draw_attention(found, 0)).std() < 10
    assert draw_attention(found).size and "0%" in attention_page(found)


@pytest.mark.parametrize(("size", "drawn"), [((3000, 1500), (1024, 512)), ((30, 60), (30, 60))])
def test_large_pictures_are_drawn_smaller(size, drawn):
    image = draw_attention(answer([[1, 0, 0, 0, 0]], size=size), 0)
    assert (image.height, image.width) == drawn


@pytest.mark.parametrize("count", [1, 2, 30])
def test_a_sheet_has_a_cell_for_every_token_and_their_mean(count):
    texts = ("a caption that is far too long for the cell that it is written into", "\n", " 中文 é")
    sheet = draw_attention(answer(np.full((count, 5), 0.1), texts=(texts * 10)[:count]))
    cells = (sheet.width // 190) * (sheet.height // 120)
    assert cells >= count + 1 and sheet.width <= 3 * sheet.height + 400


class Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text, self._open = [], {}, []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("img", "meta"):
            self._open.append(dict(attrs).get("class") or tag)

    def handle_endtag(self, tag):
        self._open.pop()

    def handle_data(self, data):
        for name in self._open:
            self.text[name] = self.text.get(name, "") + data


def read(page):
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader._open == []
    return reader


def test_the_page_shows_a_map_for_each_word_and_loads_nothing(llava):
    found = attend(*llava, ["What is ", PHOTO, " and ", SHAPES, "?"], max_tokens=4)
    page = attention_page(found)
    reader = read(page)
    words = [attributes["data-token"] for tag, attributes in reader.tags if tag == "span"]
    maps = [attributes["data-token"] for tag, attributes in reader.tags if attributes.get("class") == "heat"]
    assert words == ["0", "1", "2", "3"] and maps == ["all", *words] * 2
    for tag, attributes in reader.tags:
        assert not {"href", "srcset", "onclick", "onload"} & attributes.keys() and tag not in ("link", "iframe", "base")
        if "src" in attributes:
            kind, data = attributes["src"].split(",")
            assert kind in ("data:image/png;base64", "data:image/jpeg;base64")
            Image.open(io.BytesIO(base64.b64decode(data))).load()
    policy = next(attributes["content"] for _, attributes in reader.tags if attributes.get("http-equiv"))
    assert policy.startswith("default-src 'none'") and "http" not in page.replace("http-equiv", "")
    assert "mean of layers 0-1 and heads 0-2" in reader.text["note"]


def test_words_on_the_page_cannot_become_markup():
    found = answer([[0.1] * 5, [0.2] * 5, [0.1] * 5], texts=(EVIL, "", "</span>"), prompt=EVIL)
    reader = read(attention_page(found))
    assert reader.text["prompt"] == EVIL and reader.text["answer"] == f"{EVIL}t1</span>"
    assert [attributes for tag, attributes in reader.tags if tag == "script"] == [{}]
    titles = [attributes["title"] for tag, attributes in reader.tags if tag == "span"]
    assert titles[0] == f"{EVIL!r}: 50% of its attention is on the images"
    assert "layers 0-2, 5 and heads 0" in reader.text["note"]


def test_the_map_on_the_page_is_the_attention():
    reader = read(attention_page(answer([[0, 0.1, 0, 0, 0.0]])))
    (source,) = [
        attributes["src"]
        for _, attributes in reader.tags
        if attributes.get("data-token") == "0" and "src" in attributes
    ]
    with Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) as image:
        alpha = np.array(image)[..., 3]
    rows, columns = alpha.shape
    assert image.size == (160, 80)
    assert alpha[: rows // 2, columns // 2 :].min() > alpha[rows // 2 :].max()
