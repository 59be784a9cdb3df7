"""Questions about scenes, each with one right answer in plain English, and data files of them."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_vlm_mini.errors import PromptError

from .scenes import (
    CLOSE,
    COLORS,
    NUMBERS,
    SHAPES,
    Digit,
    Scene,
    Thing,
    draw,
    draw_digit,
    random_close_up,
    random_digit,
    random_scene,
)

Question = tuple[str, str]
"""A question and its answer."""

Exchange = tuple[str, list[Question]]
"""What kind of question it is, and the question; where it refers back, those before it, which it needs."""


def _list(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


class Asker:
    """Asks about pictures, in phrasings drawn at random."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def say(self, *phrasings: str) -> str:
        return str(self.rng.choice(phrasings))

    def describe(self, scene: Scene) -> Question:
        """Every thing with size, colour, shape and place, in reading order."""
        things = [f"{_article(f'{thing.size} {thing.name}')} {scene.place(thing)}" for thing in scene.things]
        return self.ask_all(), _sentence(_list(things))

    def ask_all(self) -> str:
        return self.say(
            "Describe the picture.", "What do you see?", "What is in this image?", "Describe what you see.",
            "What does the picture show?", "What is in the picture?",
        )  # fmt: skip

    def how_many(self, nouns: str, count: int, where: str = "") -> Question:
        question = self.say(
            f"How many {nouns} are there{where}?", f"How many {nouns} do you see{where}?", f"Count the {nouns}{where}.",
        )  # fmt: skip
        return question, _sentence(NUMBERS[count])

    def color(self, noun: str, thing: Thing, where: str = "") -> Question:
        question = self.say(
            f"What colour is the {noun}{where}?", f"What color is the {noun}{where}?",
            f"Which colour does the {noun}{where} have?",
        )  # fmt: skip
        return question, _sentence(thing.color)

    def where(self, noun: str, scene: Scene, thing: Thing) -> Question:
        return self.say(f"Where is the {noun}?", f"Where do you see the {noun}?"), _sentence(scene.place(thing))

    def size(self, noun: str, thing: Thing) -> Question:
        return self.say(f"Is the {noun} small or large?", f"How big is the {noun}?"), _sentence(thing.size)

    def shape(self, noun: str, thing: Thing) -> Question:
        question = self.say(f"What shape is the {noun} object?", f"What is the {noun} thing?")
        return question, _sentence(_article(thing.shape))

    def presence(self, name: str, here: bool) -> Question:
        name = _article(name)
        question = self.say(f"Is there {name}?", f"Do you see {name}?", f"Can you see {name} here?")
        return question, "Yes." if here else "No."

    def about(self, scene: Scene) -> list[Exchange]:
        """Everything that can be asked about a scene with one right answer."""
        asked: list[Exchange] = [
            ("describe", [self.describe(scene)]),
            ("count", [self.how_many(self.say("objects", "things"), len(scene.things))]),
        ]
        for shape in SHAPES:
            same = [thing for thing in scene.things if thing.shape == shape]
            asked.append(("count", [self.how_many(f"{shape}s", len(same))]))
            if len(same) == 1:
                thing = same[0]
                asked += [
                    ("colour", [self.color(shape, thing)]),
                    ("where", [self.where(shape, scene, thing)]),
                    ("size", [self.size(shape, thing)]),
                    ("follow-up", self.follow_up(scene, thing)),
                ]
        for color in COLORS:
            same = [thing for thing in scene.things if thing.color == color]
            if len(same) == 1:
                asked.append(("shape", [self.shape(color, same[0])]))
                asked.append(("where", [self.where(f"{color} {self.say('object', 'thing')}", scene, same[0])]))
        names = {thing.name for thing in scene.things}
        one = scene.things[int(self.rng.integers(len(scene.things)))]
        other = self.say(*SHAPES), self.say(*COLORS)
        absent = replace(one, shape=other[0]) if self.rng.random() < 0.5 else replace(one, color=other[1])
        for name in (one.name, absent.name, f"{other[1]} {other[0]}"):
            asked.append(("presence", [self.presence(name, name in names)]))
        shape, color = self.say(*SHAPES), self.say(one.color, other[1])
        asked += [
            ("presence", [self.presence(shape, any(thing.shape == shape for thing in scene.things))]),
            ("presence", [self.presence(f"{color} object", any(thing.color == color for thing in scene.things))]),
        ]
        return asked

    def about_close_up(self, scene: Scene) -> list[Exchange]:
        """What can be asked about a thing that fills its picture: nothing of its size and place."""
        thing = scene.things[0]
        other = f"{thing.color} {self.say(*SHAPES)}"
        return [
            ("describe", [(self.ask_all(), _sentence(_article(thing.name)))]),
            ("colour", [self.color(thing.shape, thing)]),
            ("shape", [self.shape(thing.color, thing)]),
            ("presence", [self.presence(other, other == thing.name)]),
        ]

    def follow_up(self, scene: Scene, thing: Thing) -> list[Question]:
        """A question about a thing that one can name, and one that calls it "it"."""
        ways: list[tuple[Question, Question]] = [
            (
                self.color(thing.shape, thing),
                (self.say("What colour is it?", "And its colour?"), _sentence(thing.color)),
            ),
            (
                self.where(thing.shape, scene, thing),
                (self.say("Where is it?", "And where is it?"), _sentence(scene.place(thing))),
            ),
            (
                self.size(thing.shape, thing),
                (self.say("Is it small or large?", "How big is it?"), _sentence(thing.size)),
            ),
        ]
        first, second = self.rng.permutation(3)[:2]
        return [ways[first][0], ways[second][1]]

    def compare(self, first: Scene, second: Scene) -> list[Exchange]:
        """Questions about two pictures."""

        def which(left: bool, right: bool) -> str:
            return "Both." if left and right else "The first." if left else "The second." if right else "Neither."

        counts = len(first.things), len(second.things)
        more = which(counts[0] > counts[1], counts[1] > counts[0])
        name = self.say(*(thing.name for thing in (*first.things, *second.things)))
        shape, color = self.say(*SHAPES), self.say(*COLORS)
        asked = [
            (self.say("Which picture has more objects?", "Which one has more objects?"), more),
            self._which(f"{_article(name)}", which, first, second, lambda thing: thing.name == name),
            self._which(f"{_article(shape)}", which, first, second, lambda thing: thing.shape == shape),
            self._which(f"{_article(color)} object", which, first, second, lambda thing: thing.color == color),
        ]
        for number, scene in (("first", first), ("second", second)):
            where = f" in the {number} {self.say('picture', 'one')}"
            asked.append(self.how_many("objects", len(scene.things), where))
            alone = [each for each in scene.things if sum(other.shape == each.shape for other in scene.things) == 1]
            if alone:
                thing = alone[int(self.rng.integers(len(alone)))]
                asked.append(self.color(thing.shape, thing, where))
        return [("compare", [each]) for each in asked]

    def _which(
        self, what: str, which: Callable[[bool, bool], str], first: Scene, second: Scene, fits: Callable[[Thing], bool]
    ) -> Question:
        question = self.say(f"Which picture has {what}?", f"In which picture do you see {what}?")
        return question, which(any(map(fits, first.things)), any(map(fits, second.things)))

    def digit(self, digit: Digit) -> list[Exchange]:
        name = NUMBERS[digit.value]
        read = self.say("What digit is this?", "Which digit do you see?", "What number is this?", "Read the digit.")
        look = self.say("Describe the picture.", "What do you see?", "What is in this image?")
        return [("digit", [(read, _sentence(name))]), ("digit", [(look, f"A handwritten {name}.")])]


def user(*parts: str | Mapping[str, Any]) -> dict[str, Any]:
    """A user's message; text parts are `str`, images are what stands for them in the data."""
    content = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image", **part} for part in parts]
    return {"role": "user", "content": content}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def dialogue(asked: Sequence[Question], opening: Callable[[str], dict[str, Any]]) -> list[dict[str, Any]]:
    """Questions and answers as a conversation; `opening` makes the first message, which shows the picture."""
    messages = []
    for number, (question, answer) in enumerate(asked):
        messages += [user(question) if number else opening(question), assistant(answer)]
    return messages


def write_scenes(
    folder: Path,
    count: int,
    *,
    seed: int,
    first: int = 0,
    most: int = 4,
    pairs: float = 0.2,
    digits: float = 0.0,
    close: float = 0.0,
    radii: tuple[float, float] = CLOSE,
    words: int = 60,
    test: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write `scenes.jsonl` and its pictures: a line a picture, or a pair of them.

    Each line is made from `seed` and its number alone, so that a longer set begins with a shorter one.

    Args:
        first: number of the first line.
        most: things in a picture at most.
        pairs: share of lines that show two pictures and compare them.
        digits: share of lines that show a handwritten digit; they need scikit-learn.
        close: share of lines that show a lone thing which fills much of its picture.
        radii: of these things, from the smallest to the largest, in shorter sides of the picture.
        words: of a dialogue, about; 0 leaves one question alone, of a scene the description.
        test: one question a line, with its kind, as `eval` wants it, the kinds of one picture equally often, and digits
            that training never sees. Else many questions in one dialogue, as training wants it: what is scarce there
            is supervision per picture.
        progress: called with lines written and lines in all.

    Raises:
        PromptError: radii or shares that cannot be.
    """
    if not 0 < radii[0] <= radii[1] <= 0.5:
        raise PromptError(
            f"radii go from the smallest to the largest, above 0 and up to 0.5, not {radii[0]} to {radii[1]}"
        )
    if digits + pairs + close > 1:
        raise PromptError(
            f"shares of digits, pairs and close-ups are more than all lines: {digits} + {pairs} + {close}"
        )
    (folder / "images").mkdir(parents=True, exist_ok=True)
    with (folder / "scenes.jsonl").open("w", encoding="utf-8") as lines:
        for number in range(first, first + count):
            rng = np.random.default_rng([seed, number])
            line = _line(rng, folder, f"images/{number:06}", most, pairs, digits, close, radii, None if test else words)
            lines.write(json.dumps(line) + "\n")
            if progress is not None:
                progress(number + 1 - first, count)


def _line(
    rng: np.random.Generator,
    folder: Path,
    name: str,
    most: int,
    pairs: float,
    digits: float,
    close: float,
    radii: tuple[float, float],
    words: int | None,
) -> dict[str, Any]:
    asker, sort = Asker(rng), rng.random()
    if sort < digits:
        digit = random_digit(rng, held_out=words is None)
        pictures, asked = [draw_digit(digit, rng)], asker.digit(digit)
    elif sort > 1 - close:
        scene = random_close_up(rng, radii=radii)
        pictures, asked = [draw(scene, rng)], asker.about_close_up(scene)
    else:
        scenes = [random_scene(rng, most=most) for _ in range(1 + (sort < digits + pairs))]
        pictures = [draw(scene, rng) for scene in scenes]
        asked = asker.about(scenes[0]) if len(scenes) == 1 else asker.compare(scenes[0], scenes[1])
    shown = []
    for place, picture in enumerate(pictures):
        file = f"{name}{'ab'[place]}.png"
        picture.save(folder / file)
        shown.append({"image": file})
    opening = _opening(shown, rng)
    if words is None:
        kind = asker.say(*dict.fromkeys(kind for kind, _ in asked))
        of_kind = [questions for each, questions in asked if each == kind]
        return {"messages": dialogue(of_kind[int(rng.integers(len(of_kind)))], opening), "kind": kind}
    picked = _pick(asked, rng, words) if words else asked[0][1]
    return {"messages": dialogue(picked, opening)}


def _pick(asked: Sequence[Exchange], rng: np.random.Generator, words: int) -> list[Question]:
    """Questions for a dialogue of up to about so many words, in any order; a fifth of them ask one thing alone.

    A description stands first or last or not at all: behind it, every answer could be copied from what was said.
    """
    exchanges = [asked[index][1] for index in rng.permutation(len(asked))]
    way = rng.random()
    if way < 0.2:
        return exchanges[0]
    whole = asked[0][1] if asked[0][0] == "describe" and way < 0.8 else []
    picked: list[Question] = []
    for exchange in exchanges:
        used = sum(len(text.split()) for question in (*picked, *exchange, *whole) for text in question)
        if used <= words and exchange is not asked[0][1]:
            picked += exchange
    return [*whole, *picked] if way < 0.5 else [*picked, *whole]


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
