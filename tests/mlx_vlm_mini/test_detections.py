"""Answers that name places: their text, the mask decoder, and the picture they are drawn on."""

import io

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import PHOTO, random_mask_decoder
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mlx_vlm_mini import draw_detections, find_detections
from mlx_vlm_mini.errors import CheckpointError, ImageError
from mlx_vlm_mini.grounding.detections import Detection
from mlx_vlm_mini.grounding.draw import COLOURS
from mlx_vlm_mini.grounding.mask_decoder import FILE, load_mask_decoder

CODES = tuple(range(100, 116))
SEGMENTS = "".join(f"<seg{code:03d}>" for code in CODES)


def labels_and_boxes(text, height=1024, width=2048):
    return [(each.label, each.box) for each in find_detections(text, height=height, width=width)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<loc0256><loc0512><loc0768><loc1023> cat", [("cat", (1024, 256, 2046, 768))]),
        ("<loc0001><loc0002><loc0003><loc0004> a red cat ; <loc0005><loc0006><loc0007><loc0008> dog",
         [("a red cat", (4, 1, 8, 3)), ("dog", (12, 5, 16, 7))]),
        ("<loc0001><loc0002><loc0003><loc0004>cat;<loc0005><loc0006><loc0007><loc0008>",
         [("cat", (4, 1, 8, 3)), ("", (12, 5, 16, 7))]),
        ("There is <loc0001><loc0002><loc0003><loc0004> one\n thing", [("one thing", (4, 1, 8, 3))]),
        ("<loc0005><loc0002><loc0003><loc0004> inside out", [("inside out", (4, 5, 8, 3))]),
        ("<loc0001><loc0002><loc0003> cut off", []),
        ("<loc1024><loc0000><loc0000><loc0000> no such token", []),
        ("no place", []),
        ("", []),
    ],
)  # fmt: skip
def test_boxes(text, expected):
    assert labels_and_boxes(text) == expected


def test_codes_of_masks():
    place = "<loc0001><loc0002><loc0003><loc0004>"
    texts = (SEGMENTS + " cat", SEGMENTS.replace("><", "> <", 1) + " cat", SEGMENTS[:-8] + " cat", SEGMENTS + "<seg001> cat",
             SEGMENTS.replace("100", "128") + " cat")  # fmt: skip
    found = find_detections(" ; ".join(place + text for text in texts), height=9, width=9)
    assert [each.mask_codes for each in found] == [CODES, (), (), CODES, ()]
    assert [each.label for each in found] == ["cat", "", "cat", "cat", "cat"]  # codes apart from one another are text


def test_a_mask_is_stretched_over_its_box():
    def decode(codes):
        assert codes.tolist() == [list(CODES)]
        left = np.where(np.arange(64) < 32, 1.0, -1.0).astype(np.float32)
        return np.broadcast_to(left, (1, 64, 64))

    text = f"<loc0000><loc0000><loc0100><loc0100> none ; <loc0256><loc0256><loc0768><loc0768>{SEGMENTS} half"
    none, half = find_detections(text, height=40, width=80, decode_masks=decode)
    assert none.mask is None and half.box == (20, 10, 60, 30)
    expected = np.zeros((40, 80), dtype=bool)
    expected[10:30, 20:40] = True
    np.testing.assert_array_equal(half.mask, expected)
    (empty,) = find_detections(
        f"<loc0500><loc0000><loc0500><loc0100>{SEGMENTS}", height=40, width=80, decode_masks=decode
    )
    assert not empty.mask.any()


@given(st.text("<>locseg0123456789; \nx", max_size=60) | st.lists(st.sampled_from(
    ["<loc0000>", "<loc1023>", "<seg000>", "<seg127>", " ", " ; ", "cat", "<"]), max_size=60).map("".join))  # fmt: skip
def test_whatever_a_model_says_is_read_and_drawn(text):
    def decode(codes):
        return np.ones((len(codes), 64, 64), dtype=np.float32)

    found = find_detections(text, height=7, width=5, decode_masks=decode)
    for each in found:
        assert each.box is not None and all(0 <= place <= 7 for place in each.box)
    assert draw_detections(np.zeros((7, 5, 3), np.uint8), found).size == (5, 7)


def convolve(x, weight, bias, padding):
    """A convolution by its definition: float[N, H, W, in], float[out, in, h, w] -> float[N, H, W, out]."""
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, weight.shape[2:], axis=(1, 2))
    return np.einsum("nyxihw,oihw->nyxo", windows, weight, optimize=True) + bias


def spread(x, weight, bias):
    """A transposed one by its: each pixel adds its 4x4 kernel, float[in, out, h, w], at twice its place, less 1."""
    N, height, width, _ = x.shape
    out = np.zeros((N, 2 * height + 2, 2 * width + 2, weight.shape[1]))
    for row in range(height):
        for column in range(width):
            out[:, 2 * row : 2 * row + 4, 2 * column : 2 * column + 4] += np.einsum(
                "ni,iohw->nhwo", x[:, row, column], weight, optimize=True
            )
    return out[:, 1:-1, 1:-1] + bias


def test_the_mask_decoder_computes_what_it_says(tmp_path):
    arrays = random_mask_decoder(tmp_path / FILE)
    codes = np.random.default_rng(1).integers(0, 128, (2, 16))

    def layer(name, x, padding=0):
        return convolve(x, arrays[f"{name}.weight"], arrays[f"{name}.bias"], padding)

    x = arrays["_vq_vae._embedding"][codes].reshape(2, 4, 4, 512)
    x = np.maximum(layer("decoder.0", x), 0)
    for block in ("decoder.2.net", "decoder.3.net"):
        y = np.maximum(layer(f"{block}.0", x, 1), 0)
        x = x + layer(f"{block}.4", np.maximum(layer(f"{block}.2", y, 1), 0))
    for i in (4, 6, 8, 10):
        x = np.maximum(spread(x, arrays[f"decoder.{i}.weight"], arrays[f"decoder.{i}.bias"]), 0)
    expected = layer("decoder.12", x)[..., 0]
    masks = load_mask_decoder(tmp_path / FILE)(codes)
    assert masks.shape == (2, 64, 64) and 0.05 < (expected > 0).mean() < 0.95
    np.testing.assert_allclose(masks, expected, atol=1e-5 * np.abs(expected).max())


def test_files_that_are_no_mask_decoder(tmp_path):
    file = tmp_path / FILE
    with pytest.raises(CheckpointError, match=r"mask decoder not found: .* from https://huggingface.co/spaces/"):
        load_mask_decoder(file)
    arrays = random_mask_decoder(file)
    weight = arrays["decoder.8.weight"]
    for change in (
        {"decoder.8.weight": weight.swapaxes(0, 1)},
        {"decoder.8.weight": weight.astype(int)},
        {"decoder.8.weight": weight.astype(object)},
        {"decoder.8.weight": weight[0]},
        {"_vq_vae._embedding": weight},
    ):
        np.savez(file, **{**arrays, **change}, allow_pickle=True)
        with pytest.raises(CheckpointError, match=f"{FILE} is not {FILE}, PaliGemma's mask decoder"):
            load_mask_decoder(file)
    buffer = io.BytesIO()
    np.save(buffer, weight)
    for content in (b"", b"nothing", b"PK\x03\x04 no zip", buffer.getvalue()):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{FILE} is not {FILE}, PaliGemma's mask decoder"):
            load_mask_decoder(file)


def test_nothing_pickled_is_loaded(tmp_path):
    class Evil:
        def __reduce__(self):
            return (exec, ("raise SystemExit('it ran')",))

    file = tmp_path / FILE
    arrays = random_mask_decoder(file)
    np.savez(file, **{**arrays, "decoder.0.bias": np.array([Evil()], dtype=object)})
    with pytest.raises(CheckpointError, match="Object arrays cannot be loaded"):
        load_mask_decoder(file)


BACKGROUNDS = [(0, 0, 0), (255, 255, 255), *COLOURS]


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_a_box_can_be_seen_on_any_ground(background):
    image = Image.new("RGB", (200, 150), background)
    for i in range(len(COLOURS)):
        found = [Detection("", (1, 1, 2, 2))] * i + [Detection("cat", (50, 40, 120, 100))]
        column = np.asarray(draw_detections(image, found))[70, 45:55].astype(int)  # across the left side
        assert np.abs(column - background).sum(axis=-1).max() > 200


def test_what_is_drawn_and_what_is_not():
    image = Image.new("RGB", (200, 150), (255, 255, 255))
    found = [Detection("cat", (50, 40, 120, 100))]
    drawn = np.asarray(draw_detections(image, found))
    touched = (drawn != 255).any(axis=-1)
    rows, columns = np.nonzero(touched)
    assert (columns.min(), columns.max(), rows.max()) == (49, 120, 100)  # the box, with its rim of a pixel
    assert rows.min() > 20 and not touched[45:95, 55:115].any()  # its label is above it, its inside free
    assert (drawn[70, 50] == COLOURS[0]).all() and (drawn[99, 90] == COLOURS[0]).all()
    assert (np.asarray(image) == 255).all()
    assert draw_detections(image, []).tobytes() == image.tobytes()


def test_masks_and_points():
    image = Image.new("RGB", (60, 40), (255, 255, 255))
    mask = np.zeros((40, 60), dtype=bool)
    mask[10:20, 10:30] = True
    drawn = np.asarray(draw_detections(image, [Detection("", mask=mask), Detection("", points=((45.0, 30.0),))]))
    assert (drawn[10, 10:30] == COLOURS[0]).all() and (drawn[15, 15] == (244, 151, 174)).all()
    assert (drawn[30, 45] == COLOURS[1]).all()
    assert ((drawn != 255).any(axis=-1)[:20] == mask[:20]).all()


def test_labels_keep_out_of_one_anothers_way_and_in_the_picture():
    image = Image.new("RGB", (300, 200), (255, 255, 255))
    same = [Detection("one and the same", (0, 0, 300, 200)) for _ in range(4)]
    drawn = np.asarray(draw_detections(image, same)).reshape(-1, 3)
    grounds = [(drawn == colour).all(axis=-1).sum() for colour in COLOURS[:4]]
    assert min(grounds) > 600  # none of them is covered by the next
    long = Detection("a label that is far longer than the picture is wide and never seems to end", (280, 190, 299, 199))
    assert draw_detections(image, [long]).size == (300, 200)
    draw_detections(Image.new("RGB", (1, 1)), [long])


def test_it_is_drawn_on_the_image_as_it_was_opened(tmp_path):
    turned = Image.open(PHOTO)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert draw_detections(tmp_path / "turned.jpg", []).size == turned.size[::-1]
    with pytest.raises(ImageError, match="image not found"):
        draw_detections(tmp_path / "none.jpg", [])


def test_a_decoder_takes_what_the_text_gives(tmp_path):
    random_mask_decoder(tmp_path / FILE)
    decode = load_mask_decoder(str(tmp_path / FILE))
    assert decode.first.weight.dtype == mx.float32
    (found,) = find_detections(
        f"<loc0000><loc0000><loc1023><loc1023>{SEGMENTS} x", height=50, width=70, decode_masks=decode
    )
    assert found.mask.shape == (50, 70) and 0 < found.mask.sum() < 3500
