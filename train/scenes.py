"""Pictures of simple objects and questions about them, from a seed: data to train a small model on and to test it with.

A scene has 1 to 4 objects that do not overlap, on a plain or softly textured background of any size. Everything that is
asked has one right answer, in plain English.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SHAPES = ("circle", "square", "triangle", "star")
COLORS = {
    "red": (214, 40, 40), "green": (44, 160, 64), "blue": (36, 90, 214), "yellow": (246, 210, 40),
    "purple": (140, 56, 190), "orange": (246, 136, 30), "black": (20, 20, 20), "white": (250, 250, 250),
}  # fmt: skip
SIZES = {"small": 0.10, "large": 0.20}  # radius, in shorter sides of the picture
NUMBERS = ("zero", "one", "two", "three", "four")

Question = tuple[str, str, str]
"""What kind of question it is, the question, and its answer."""


@dataclass(frozen=True)
class Thing:
    """An object: its centre and radius in shorter sides of the picture, counted from the left and from the top."""

    shape: str
    color: str
    size: str
    x: float
    y: float

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What a picture shows. `width` and `height` are pixels; `texture` is the strength of the background's noise."""

    things: tuple[Thing, ...]
    width: int
    height: int
    background: tuple[int, int, int]
    texture: float

    def place(self, thing: Thing) -> str:
        """Where a thing stands, in thirds of the picture: "at the top left", "in the centre", ..."""
        side = min(self.width, self.height)
        column = ("left", "", "right")[min(int(3 * thing.x * side / self.width), 2)]
        row = ("top", "", "bottom")[min(int(3 * thing.y * side / self.height), 2)]
        if row:
            return f"at the {row} {column}".rstrip()
        return f"on the {column}" if column else "in the centre"


def random_scene(rng: np.random.Generator, *, most: int = 4, sides: tuple[int, int] = (64, 224)) -> Scene:
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
            return Scene(tuple(things), width, height, background, float(rng.choice([0.0, 6.0, 14.0])))  # type: ignore[arg-type]


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
        thing = Thing(str(rng.choice(SHAPES)), str(rng.choice(names)), size, x, y)
        apart = all(
            math.hypot(x - other.x, y - other.y) > radius + SIZES[other.size] + 0.03 and thing.name != other.name
            for other in things
        )
        visible = math.dist(COLORS[thing.color], background) > 90
        clear = all(
            min(abs(3 * at / side - edge) for edge in (1, 2)) > 0.12 for at, side in ((x, room[0]), (y, room[1]))
        )
        if apart and visible and clear:
            return thing
    return None


def draw(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """The picture of a scene, drawn at four times its size and reduced, so that edges are smooth."""
    scale = 4
    side = min(scene.width, scene.height) * scale
    image = Image.new("RGB", (scene.width, scene.height), scene.background)
    if scene.texture:
        noise = rng.normal(0, scene.texture, (scene.height // 4 + 2, scene.width // 4 + 2, 1)) + scene.background
        small = Image.fromarray(np.clip(noise, 0, 255).astype(np.uint8))
        image = small.resize(image.size, Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(1))
    for thing in scene.things:
        mask = Image.new("L", (scene.width * scale, scene.height * scale))
        turn = float(rng.uniform(-0.2, 0.2))
        _outline(ImageDraw.Draw(mask), thing.shape, thing.x * side, thing.y * side, SIZES[thing.size] * side, turn)
        color = tuple(int(np.clip(value + rng.normal(0, 8), 0, 255)) for value in COLORS[thing.color])
        image.paste(color, (0, 0), mask.resize(image.size, Image.Resampling.BOX))
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


def _list(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def describe(scene: Scene) -> str:
    """One sentence: every thing with size, colour, shape and place, in reading order."""
    things = sorted(scene.things, key=lambda thing: (round(thing.y, 3), round(thing.x, 3)))
    text = _list([f"{_article(f'{thing.size} {thing.name}')} {scene.place(thing)}" for thing in things])
    return f"{text[0].upper()}{text[1:]}."


def questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Everything that can be asked about a scene with one right answer, each in a phrasing drawn at random."""

    def say(*phrasings: str) -> str:
        return str(rng.choice(phrasings))

    count = len(scene.things)
    asked: list[Question] = [
        ("describe", say("Describe the picture.", "What do you see?", "What is in this image?"), describe(scene)),
        (
            "count",
            say("How many objects are there?", "How many objects do you see?", "Count the objects."),
            f"{NUMBERS[count].capitalize()}.",
        ),
    ]
    for shape in SHAPES:
        of_shape = [thing for thing in scene.things if thing.shape == shape]
        asked.append(
            (
                "count",
                say(f"How many {shape}s are there?", f"How many {shape}s do you see?", f"Count the {shape}s."),
                f"{NUMBERS[len(of_shape)].capitalize()}.",
            )
        )
        if len(of_shape) == 1:
            thing = of_shape[0]
            asked += [
                (
                    "colour",
                    say(f"What colour is the {shape}?", f"Which colour does the {shape} have?"),
                    f"{thing.color.capitalize()}.",
                ),
                (
                    "where",
                    say(f"Where is the {shape}?", f"Where do you see the {shape}?"),
                    f"{scene.place(thing).capitalize()}.",
                ),
                (
                    "size",
                    say(f"Is the {shape} small or large?", f"How big is the {shape}?"),
                    f"{thing.size.capitalize()}.",
                ),
            ]
    for color in COLORS:
        of_color = [thing for thing in scene.things if thing.color == color]
        if len(of_color) == 1:
            shape = of_color[0].shape
            asked.append(
                (
                    "shape",
                    say(f"What shape is the {color} object?", f"What is the {color} thing?"),
                    f"{_article(shape).capitalize()}.",
                )
            )
    thing = scene.things[int(rng.integers(count))]
    absent = replace(thing, shape=str(rng.choice(SHAPES)), color=str(rng.choice(list(COLORS))))
    here = {each.name for each in scene.things}
    for name in (thing.name, absent.name):
        question = say(
            f"Is there {_article(name)}?", f"Do you see {_article(name)}?", f"Can you see {_article(name)} here?"
        )
        asked.append(("presence", question, "Yes." if name in here else "No."))
    return asked


def compare(first: Scene, second: Scene, rng: np.random.Generator) -> list[Question]:
    """Questions about two pictures."""

    def say(*phrasings: str) -> str:
        return str(rng.choice(phrasings))

    def which(left: bool, right: bool) -> str:
        return "Both." if left and right else "The first." if left else "The second." if right else "Neither."

    counts = len(first.things), len(second.things)
    more = "The first." if counts[0] > counts[1] else "The second." if counts[1] > counts[0] else "Neither."
    name = str(rng.choice([thing.name for thing in (*first.things, *second.things)]))
    shape = str(rng.choice(SHAPES))
    names, shapes = (
        ({thing.name for thing in each.things} for each in (first, second)),
        ({thing.shape for thing in each.things} for each in (first, second)),
    )
    return [
        ("compare", say("Which picture has more objects?", "Which one has more objects?"), more),
        (
            "compare",
            say(f"Which picture shows {_article(name)}?", f"Where is {_article(name)}, in the first or the second?"),
            which(*(name in each for each in names)),
        ),
        (
            "compare",
            say(f"Which picture has a {shape}?", f"In which picture do you see a {shape}?"),
            which(*(shape in each for each in shapes)),
        ),
    ]


def user(*parts: Any) -> dict[str, Any]:
    """A user's message; text parts are `str`, images are what stands for them in the data."""
    content = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image", **part} for part in parts]
    return {"role": "user", "content": content}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def dialogue(asked: Sequence[Question], opening: Callable[[str], dict[str, Any]]) -> list[dict[str, Any]]:
    """Questions and answers as a conversation; `opening` makes the first message, which shows the picture."""
    messages = []
    for number, (_, question, answer) in enumerate(asked):
        messages += [user(question) if number else opening(question), assistant(answer)]
    return messages


def write_scenes(
    folder: Path,
    count: int,
    *,
    seed: int,
    most: int = 4,
    pairs: float = 0.2,
    single: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write `scenes.jsonl` and its pictures: a line a picture, or a pair of them.

    Each line is made from `seed` and its number alone, so that a longer set begins with a shorter one.

    Args:
        most: things in a picture at most.
        pairs: share of lines that show two pictures and compare them.
        single: one question a line, with its kind, as `eval` wants it; else many in one dialogue, in any order, as
            training wants it: what is scarce there is supervision per picture.
        progress: called with lines written and lines in all.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    with (folder / "scenes.jsonl").open("w", encoding="utf-8") as lines:
        for number in range(count):
            rng = np.random.default_rng([seed, number])
            scenes = [random_scene(rng, most=most) for _ in range(1 + (rng.random() < pairs))]
            shown = []
            for place, scene in enumerate(scenes):
                name = f"images/{number:06}{'ab'[place]}.png"
                draw(scene, rng).save(folder / name)
                shown.append({"image": name})
            asked = questions(scenes[0], rng) if len(scenes) == 1 else compare(scenes[0], scenes[1], rng)
            chosen = rng.permutation(len(asked))
            if single:
                chosen = chosen[:1]
            elif rng.random() < 0.3:
                chosen = chosen[: int(rng.integers(1, len(asked) + 1))]
            picked = [asked[index] for index in chosen]
            opening = _opening(shown, rng)
            line: dict[str, Any] = {"messages": dialogue(picked, opening)}
            if single:
                line["kind"] = picked[0][0]
            lines.write(json.dumps(line) + "\n")
            if progress is not None:
                progress(number + 1, count)


def _opening(shown: Sequence[dict[str, str]], rng: np.random.Generator) -> Callable[[str], dict[str, Any]]:
    """How the first message shows its pictures: before or behind the question, two of them between words."""
    way = int(rng.integers(3))

    def opening(question: str) -> dict[str, Any]:
        if len(shown) == 1:
            return user(question, shown[0]) if way == 0 else user(shown[0], question)
        if way == 0:
            return user("First: ", shown[0], " Second: ", shown[1], " " + question)
        return user(*shown, question) if way == 1 else user("Compare ", shown[0], " with ", shown[1], ". " + question)

    return opening
