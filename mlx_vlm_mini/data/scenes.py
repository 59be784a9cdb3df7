"""Pictures of simple objects, and of handwritten digits, from a seed.

A scene has 1 to 4 objects that do not overlap, on a plain or softly textured background of any size; `questions.py`
asks about it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from mlx_vlm_mini.errors import VLMError

SHAPES = ("circle", "square", "triangle", "star")
COLORS = {
    "red": (214, 40, 40), "green": (44, 160, 64), "blue": (36, 90, 214), "yellow": (246, 210, 40),
    "purple": (140, 56, 190), "orange": (246, 136, 30), "black": (20, 20, 20), "white": (250, 250, 250),
}  # fmt: skip
SIZES = {"small": 0.12, "large": 0.21}  # radius, in shorter sides of the picture
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CLOSE = (0.2, 0.45)  # the same of what fills much of a picture
ROWS, COLUMNS = ("top", "", "bottom"), ("left", "", "right")


@dataclass(frozen=True)
class Thing:
    """An object: its centre and radius in shorter sides of the picture, counted from the left and from the top."""

    shape: str
    color: str
    size: str
    x: float
    y: float
    radius: float

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What a picture shows. `width` and `height` are pixels; `texture` is the strength of the background's noise.

    Things stand in reading order: by thirds of the picture's height, then by thirds of its width, then from the left.
    """

    things: tuple[Thing, ...]
    width: int
    height: int
    background: tuple[int, int, int]
    texture: float

    def cell(self, thing: Thing) -> tuple[int, int]:
        """Row and column of a thing's place, in thirds of the picture."""
        side = min(self.width, self.height)
        return min(int(3 * thing.y * side / self.height), 2), min(int(3 * thing.x * side / self.width), 2)

    def place(self, thing: Thing) -> str:
        """Where a thing stands: "at the top left", "at the top", "on the left", "in the centre", ..."""
        row, column = self.cell(thing)
        if ROWS[row]:
            return f"at the {ROWS[row]} {COLUMNS[column]}".rstrip()
        return f"on the {COLUMNS[column]}" if COLUMNS[column] else "in the centre"


@dataclass(frozen=True)
class Digit:
    """A picture of one handwritten digit: `grid` is float[8, 8], 0 where there is no ink, 1 where there is most."""

    value: int
    grid: np.ndarray
    width: int
    height: int


def random_scene(rng: np.random.Generator, *, most: int = 4, sides: tuple[int, int] = (64, 192)) -> Scene:
    """A scene of 1 to `most` things, no two alike in both shape and colour, its sides between `sides` pixels."""
    width = int(rng.integers(sides[0], sides[1] + 1))
    height = int(np.clip(width * math.exp(rng.uniform(-0.5, 0.5)), *sides))
    side = min(width, height)
    room = (width / side, height / side)
    names = list(COLORS)
    while True:
        background = tuple(int(value) for value in rng.integers(60, 236, 3))
        things: list[Thing] = []
        for _ in range(int(rng.integers(1, most + 1))):
            thing = _place_thing(rng, things, names, room, background)
            if thing is not None:
                things.append(thing)
        if things:
            scene = Scene(tuple(things), width, height, background, float(rng.choice([0.0, 6.0, 14.0])))  # type: ignore[arg-type]
            ordered = sorted(things, key=lambda thing: (*scene.cell(thing), thing.x))
            return Scene(tuple(ordered), width, height, scene.background, scene.texture)


def _place_thing(
    rng: np.random.Generator,
    things: Sequence[Thing],
    names: Sequence[str],
    room: tuple[float, float],
    background: tuple[int, ...],
) -> Thing | None:
    """One more thing that touches no other, stands out from the background, and is not in between two places."""
    for _ in range(40):
        size = str(rng.choice(list(SIZES)))
        radius = SIZES[size]
        x, y = (float(rng.uniform(radius, side - radius)) for side in room)
        thing = Thing(str(rng.choice(SHAPES)), str(rng.choice(names)), size, x, y, radius)
        apart = all(
            math.hypot(x - other.x, y - other.y) > radius + other.radius + 0.03 and thing.name != other.name
            for other in things
        )
        visible = _stands_out(thing, background)
        clear = all(
            min(abs(3 * at / side - edge) for edge in (1, 2)) > 0.12 for at, side in ((x, room[0]), (y, room[1]))
        )
        if apart and visible and clear:
            return thing
    return None


def _stands_out(thing: Thing, background: Sequence[int]) -> bool:
    return math.dist(COLORS[thing.color], background) > 90


def random_close_up(
    rng: np.random.Generator, *, radii: tuple[float, float] = CLOSE, sides: tuple[int, int] = (64, 192)
) -> Scene:
    """A lone thing that fills much of its picture, of which a tower learns shapes soonest: 3,000 such pictures do what
    25,000 of small things far from the centre do not."""
    width = int(rng.integers(sides[0], sides[1] + 1))
    height = int(np.clip(width * math.exp(rng.uniform(-0.4, 0.4)), *sides))
    side = min(width, height)
    while True:
        background = tuple(int(value) for value in rng.integers(60, 236, 3))
        radius = math.exp(rng.uniform(*np.log(radii)))
        x, y = (float(rng.uniform(radius, length / side - radius)) for length in (width, height))
        thing = Thing(str(rng.choice(SHAPES)), str(rng.choice(list(COLORS))), "close", x, y, radius)
        if _stands_out(thing, background):
            return Scene((thing,), width, height, background, float(rng.choice([0.0, 6.0, 14.0])))  # type: ignore[arg-type]


def draw(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """The picture of a scene, its objects drawn at four times their size and reduced, so that edges are smooth."""
    side = min(scene.width, scene.height)
    image = Image.new("RGB", (scene.width, scene.height), scene.background)
    if scene.texture:
        noise = rng.normal(0, scene.texture, (scene.height // 4 + 2, scene.width // 4 + 2, 1)) + scene.background
        small = Image.fromarray(np.clip(noise, 0, 255).astype(np.uint8))
        image = small.resize(image.size, Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(1))
    for thing in scene.things:
        radius = thing.radius * side
        left, top = math.floor(thing.x * side - radius) - 1, math.floor(thing.y * side - radius) - 1
        edge = math.ceil(2 * radius) + 3
        mask = Image.new("L", (4 * edge, 4 * edge))
        centre = (4 * (thing.x * side - left), 4 * (thing.y * side - top))
        _outline(ImageDraw.Draw(mask), thing.shape, *centre, 4 * radius, float(rng.uniform(-0.2, 0.2)))
        color = tuple(int(np.clip(value + rng.normal(0, 8), 0, 255)) for value in COLORS[thing.color])
        image.paste(color, (left, top), mask.reduce(4))
    return image


def _outline(draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, turn: float) -> None:
    if shape == "circle":
        radius *= 0.9
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        return
    corners, start = {"square": (4, math.pi / 4), "triangle": (3, -math.pi / 2), "star": (10, -math.pi / 2)}[shape]
    points = []
    for corner in range(corners):
        reach = radius * (0.42 if shape == "star" and corner % 2 else 1.0)
        angle = start + turn + 2 * math.pi * corner / corners
        points.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
    draw.polygon(points, fill=255)


@lru_cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise VLMError("digits come from scikit-learn: pip install scikit-learn, or draw none (--digits 0)") from None
    grids, values = load_digits(return_X_y=True)
    return grids.reshape(-1, 8, 8) / 16, values


def random_digit(rng: np.random.Generator, *, held_out: bool, sides: tuple[int, int] = (64, 192)) -> Digit:
    """A digit of scikit-learn's `load_digits` (E. Alpaydin and C. Kaynak, 1998).

    Those of odd number are `held_out`, for tests alone; training sees those of even number.
    """
    grids, values = _digits()
    index = 2 * int(rng.integers(len(values) // 2)) + held_out
    width = int(rng.integers(sides[0], sides[1] + 1))
    height = int(np.clip(width * math.exp(rng.uniform(-0.3, 0.3)), *sides))
    return Digit(int(values[index]), grids[index], width, height)


def draw_digit(digit: Digit, rng: np.random.Generator) -> Image.Image:
    """The picture of a digit: dark ink on light ground or the other way round, turned and moved a little."""
    side = int(min(digit.width, digit.height) * rng.uniform(0.7, 1.0))
    ink = Image.fromarray((digit.grid * 255).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    ink = ink.rotate(float(rng.uniform(-10, 10)), Image.Resampling.BICUBIC)
    mask = Image.new("L", (digit.width, digit.height))
    mask.paste(ink, (int(rng.integers(digit.width - side + 1)), int(rng.integers(digit.height - side + 1))))
    dark, light = (tuple(int(value) for value in rng.integers(*range_, 3)) for range_ in ((0, 70), (190, 256)))
    if rng.random() < 0.5:
        dark, light = light, dark
    image = Image.new("RGB", mask.size, light)
    image.paste(dark, (0, 0), mask)
    return image
