"""What an answer says about places: its text -> labelled boxes and masks in the image's pixels.

PaliGemma's form (arXiv:2407.07726, section 3.2.3): four tokens `<loc0000>` to `<loc1023>`, the box's top, left, bottom
and right in 1024ths of the image's sides; for a mask sixteen tokens `<seg000>` to `<seg127>`, codes that `MaskDecoder`
turns into 64x64 pixels, stretched over the box; the label. Several objects are separated by " ; ".
Source: big_vision's demo (paligemma_parse.py) for boxes, its segmentation evaluator for masks. Its training data was
binned in 1023rds; the demo's rule, which everybody follows, is at most a 1024th of the side beside that.

Qwen-VL's form (arXiv:2308.12966, section 2.2; README.md of github.com/QwenLM/Qwen-VL): `<ref>label</ref>`, and behind
it `<box>(x1,y1),(x2,y2)</box>`, left top and right bottom, or `<quad>` with four corners, in 1000ths of the image's
sides. Several in a row share the label in front of them; a place may have none.

Qwen2-VL's form (arXiv:2409.12191, section 2.2): `<|object_ref_start|>label<|object_ref_end|>` and
`<|box_start|>(x1,y1),(x2,y2)<|box_end|>`, left top and right bottom in 1000ths of the sides. Its special tokens are not
in an answer's text; where nothing but labels and boxes is left of it, these are read all the same.

Qwen2.5-VL's and 3-VL's form (cookbooks of github.com/QwenLM/Qwen3-VL): JSON objects with `bbox_2d` [x1, y1, x2, y2] or
`point_2d` [x, y], and a `label`; in pixels of the picture as the model saw it, in 3-VL in 1000ths of its sides.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

MASK_CODES = 16  # tokens a mask

_OBJECT = re.compile(r"((?:<loc\d{4}>){4})\s*((?:<seg\d{3}>)*)\s*([^;<>]*)")
_NUMBER = re.compile(r"\d+")
_POINT = r"\s*\(\s*\d{1,4}\s*,\s*\d{1,4}\s*\)\s*"
_TAGS = re.compile(
    rf"<ref>(?P<label>[^<]*)</ref>|<box>(?P<box>{_POINT},{_POINT})</box>"
    rf"|<quad>(?P<quad>{_POINT}(?:,{_POINT}){{3}})</quad>"
)
_CORNERS = r"\((\d{1,4}),\s*(\d{1,4})\),\s*\((\d{1,4}),\s*(\d{1,4})\)"
_MARKED = re.compile(
    rf"(?:<\|object_ref_start\|>([^<]*)<\|object_ref_end\|>\s*)?<\|box_start\|>\s*{_CORNERS}\s*<\|box_end\|>"
)
_BARE = re.compile(rf"([^()]*){_CORNERS}")
_JSON = re.compile(r"\{[^{}]*\}")
_THOUSANDTHS = (1000, 1000)


@dataclass(frozen=True, eq=False)
class Detection:
    """Something in an image that an answer names.

    Attributes:
        label: what it is; empty where the answer does not say.
        box: left, top, right and bottom in pixels, right and bottom exclusive; as the answer says it, which may be
            empty or inside out.
        points: x and y in pixels.
        corners: of a region with four, x and y in pixels; `box` is then the one around them.
        mask: bool[height, width] of the whole image.
        mask_codes: the answer's mask before it is decoded.
    """

    label: str
    box: tuple[int, int, int, int] | None = None
    points: tuple[tuple[float, float], ...] = ()
    corners: tuple[tuple[int, int], ...] = ()
    mask: np.ndarray | None = None
    mask_codes: tuple[int, ...] = ()


def find_detections(
    text: str,
    *,
    height: int,
    width: int,
    decode_masks: Callable[[np.ndarray], np.ndarray] | None = None,
    scale: tuple[int, int] | None = None,
) -> list[Detection]:
    """The objects that an answer gives places to, in its order.

    Args:
        text: an answer; what says no place in it is passed over.
        height, width: of the image in pixels, as it was opened.
        decode_masks: int[N, 16] codes -> float[N, 64, 64], above 0 inside: a `MaskDecoder`. Without one `mask_codes`
            are given and no `mask`.
        scale: height and width of the image in the numbers of an answer in JSON, see `Processor.answer_scale`; None:
            they are 1000ths.
    """
    found = _find_tags(text, height, width) + _find_marked(text, height, width)
    found += _find_json(text, height, width, scale or _THOUSANDTHS)
    for match in _OBJECT.finditer(text):
        places, codes = ([int(number) for number in _NUMBER.findall(group)] for group in match.groups()[:2])
        if max(places) > 1023:
            continue
        top, left, bottom, right = (
            round(place / 1024 * side) for place, side in zip(places, (height, width) * 2, strict=True)
        )
        whole = len(codes) >= MASK_CODES and max(codes[:MASK_CODES]) < 128
        found.append(
            Detection(
                label=" ".join(match[3].split()),
                box=(left, top, right, bottom),
                mask_codes=tuple(codes[:MASK_CODES]) if whole else (),
            )
        )
    return found if decode_masks is None else _with_masks(found, height, width, decode_masks)


def _find_tags(text: str, height: int, width: int) -> list[Detection]:
    """What Qwen-VL's tags say; fractions of pixels are cut off, as its own code does."""
    found, label, end = [], "", 0
    for match in _TAGS.finditer(text):
        if text[end : match.start()].strip():
            label = ""  # was of something before
        end = match.end()
        if match["label"] is not None:
            label = " ".join(match["label"].split())
            continue
        places = [int(number) for number in _NUMBER.findall(match["box"] or match["quad"])]
        if max(places) > 1000:
            continue
        x, y = ([int(place / 1000 * side) for place in places[axis::2]] for axis, side in ((0, width), (1, height)))
        if match["box"] is not None:
            found.append(Detection(label, box=(x[0], y[0], x[1], y[1])))
        else:
            corners = tuple(zip(x, y, strict=True))
            found.append(Detection(label, box=(min(x), min(y), max(x), max(y)), corners=corners))
    return found


def _find_marked(text: str, height: int, width: int) -> list[Detection]:
    matches = list(_MARKED.finditer(text))
    if not matches and re.fullmatch(rf"(?:{_BARE.pattern})+\s*", text):
        matches = list(_BARE.finditer(text))
    found = []
    for label, *corners in (match.groups() for match in matches):
        box = _box([int(number) for number in corners], height, width, _THOUSANDTHS)
        found.append(Detection(" ".join((label or "").split()), box=box))
    return found


def _box(corners: Sequence[float], height: int, width: int, scale: tuple[int, int]) -> tuple[int, int, int, int]:
    left, top, right, bottom = (
        round(place / whole * side)
        for place, whole, side in zip(corners, scale[::-1] * 2, (width, height) * 2, strict=True)
    )
    return left, top, right, bottom


def _find_json(text: str, height: int, width: int, scale: tuple[int, int]) -> list[Detection]:
    """Objects one by one, so that an answer that was cut off gives those that are whole."""
    found = []
    for match in _JSON.finditer(text):
        try:
            said = json.loads(match[0])
        except ValueError:
            continue
        name = said.get("label", said.get("text_content"))
        label = " ".join(name.split()) if isinstance(name, str) else ""
        box, point = _numbers(said.get("bbox_2d"), 4), _numbers(said.get("point_2d"), 2)
        if box is not None:
            found.append(Detection(label, box=_box(box, height, width, scale)))
        elif point is not None:
            place = (point[0] / scale[1] * width, point[1] / scale[0] * height)
            found.append(Detection(label, points=(place,)))
    return found


def _numbers(value: object, count: int) -> list[float] | None:
    """A list of so many numbers of a size that a picture may have."""
    if not isinstance(value, list) or len(value) != count:
        return None
    if not all(isinstance(each, int | float) and not isinstance(each, bool) and abs(each) < 1e6 for each in value):
        return None
    return value


def _with_masks(
    found: Sequence[Detection], height: int, width: int, decode_masks: Callable[[np.ndarray], np.ndarray]
) -> list[Detection]:
    coded = [each for each in found if each.mask_codes]
    small = iter(decode_masks(np.array([each.mask_codes for each in coded])) if coded else ())
    return [
        replace(each, mask=_stretch(next(small), each.box, height, width)) if each.mask_codes and each.box else each
        for each in found
    ]


def _stretch(small: np.ndarray, box: tuple[int, int, int, int], height: int, width: int) -> np.ndarray:
    """A mask of a box as one of the whole image."""
    left, top, right, bottom = box
    mask = np.zeros((height, width), dtype=bool)
    if right > left and bottom > top:
        part = Image.fromarray(np.asarray(small, dtype=np.float32))
        part = part.resize((right - left, bottom - top), Image.Resampling.BILINEAR)
        mask[top:bottom, left:right] = np.asarray(part) > 0
    return mask
