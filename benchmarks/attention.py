"""Whether a model's attention means something: is it on the object that is asked about, and does it matter there?

    python benchmarks/attention.py MODEL                      # 200 scenes; MODEL has learned to see such
    python benchmarks/attention.py MODEL --scenes 50 --json

A scene has three objects of different shapes; the model is asked for the colour of one. Two figures:

Focus, of each layer (mean of heads and of the answer's words): what part of the attention on the picture lies in the
box around that object, beside the box's part of the picture's area. Attention that is spread evenly has a ratio of 1.

Ablation: a grid of cells is laid over the picture, those with the most attention (mean of all layers) are painted in
the picture's mean colour, and the model is asked again; beside it as many cells drawn at random. A model that uses what
it looks at changes its answer more often in the first case.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx_vlm_mini

mlx_vlm_mini.load  # noqa: B018 - uses OpenBLAS where there is one, before mlx is imported

import numpy as np
from PIL import Image

from mlx_vlm_mini import attend, generate
from mlx_vlm_mini.data.questions import Asker
from mlx_vlm_mini.data.scenes import SIZES, Scene, Thing, draw, random_scene
from mlx_vlm_mini.grounding.attended import AnswerAttention, ImageAttention
from mlx_vlm_mini.grounding.places import lay_over

GRID = 8  # cells along a side


@dataclass(frozen=True)
class Focus:
    """Of one scene: the object's part of the picture's area, and by layer its part of the attention on the picture."""

    area: float
    layers: tuple[float, ...]


@dataclass(frozen=True)
class Ablation:
    """How often an answer was another one: with the most attended cells painted over, and with random ones."""

    scenes: int
    most_attended: int
    random: int
    right: int
    """Answers to the whole pictures that named the colour."""


def three_objects(rng: np.random.Generator) -> tuple[Scene, Thing]:
    """A scene with three objects of different shapes, and one of them."""
    while True:
        scene = random_scene(rng, most=3)
        if len({thing.shape for thing in scene.things}) == 3:
            return scene, scene.things[int(rng.integers(3))]


def box_of(scene: Scene, thing: Thing) -> tuple[float, float, float, float]:
    """The box around an object, in pixels."""
    side = min(scene.width, scene.height)
    x, y, radius = thing.x * side, thing.y * side, SIZES[thing.size] * side
    return x - radius, y - radius, x + radius, y + radius


def focus(image: ImageAttention, region: tuple[float, float, float, float], words: Sequence[int]) -> Focus:
    """How the attention on one picture is divided.

    Args:
        image: with weights of every layer and head.
        words: tokens of the answer that count.
    """
    height, width = image.size
    left, top, right, bottom = region
    inside, whole = image.inside(region), image.inside((0, 0, width, height))  # (layers, heads, T)
    parts = inside[..., list(words)].sum(axis=(1, 2)) / whole[..., list(words)].sum(axis=(1, 2))
    return Focus((right - left) * (bottom - top) / (width * height), tuple(parts.tolist()))


def most_attended(found: AnswerAttention, words: Sequence[int], count: int) -> np.ndarray:
    """The cells of the grid with the most attention of the answer's words: int[count]."""
    (image,) = found.mean().images
    heat = lay_over(image.weights[list(words)].mean(axis=0), image.boxes, image.size, (GRID, GRID))
    return np.argsort(-heat.ravel(), kind="stable")[:count]


def paint_over(picture: Image.Image, cells: Sequence[int] | np.ndarray) -> Image.Image:
    """The picture with cells of the grid, numbered row by row, in its mean colour."""
    pixels = np.array(picture)
    mean = pixels.mean(axis=(0, 1)).round().astype(np.uint8)
    rows, columns = (np.linspace(0, side, GRID + 1).round().astype(int) for side in pixels.shape[:2])
    for cell in cells:
        row, column = divmod(int(cell), GRID)
        pixels[rows[row] : rows[row + 1], columns[column] : columns[column + 1]] = mean
    return Image.fromarray(pixels)


def words_of(found: AnswerAttention) -> list[int]:
    """The tokens of an answer that have text; all where none has."""
    return [i for i, text in enumerate(found.texts) if text.strip()] or list(range(len(found.texts)))


def measure(model: Any, processor: Any, *, scenes: int, seed: int, painted: float, max_tokens: int) -> dict[str, Any]:
    """Ask about scenes and put the figures together."""
    rng = np.random.default_rng(seed)
    asker, found_focus = Asker(rng), []
    changed, right, count = [0, 0], 0, max(1, round(painted * GRID**2))
    for number in range(scenes):
        scene, thing = three_objects(rng)
        picture = draw(scene, rng)
        question, expected = asker.color(thing.shape, thing)

        def say(shown: Image.Image, question: str = question) -> str:
            return generate(model, processor, question, images=[shown], max_tokens=max_tokens).strip()

        found = attend(model, processor, question, images=[picture], reduce="none", max_tokens=max_tokens)
        answer, words = "".join(found.texts).strip(), words_of(found)
        found_focus.append(focus(found.images[0], box_of(scene, thing), words))
        right += answer == expected
        drawn = rng.permutation(GRID**2)[:count]
        for way, cells in enumerate((most_attended(found, words, count), drawn)):
            changed[way] += say(paint_over(picture, cells)) != answer
        if sys.stderr.isatty():
            print(f"\r{number + 1} of {scenes} scenes", end="", file=sys.stderr)
    return summarize(found_focus) | asdict(Ablation(scenes, *changed, right)) | {"painted": count / GRID**2}


def summarize(found: Sequence[Focus]) -> dict[str, Any]:
    """Means over scenes: the area's part, and by layer the attention's part, their ratio, and in how many scenes the
    first exceeds the second."""
    areas, parts = np.array([each.area for each in found]), np.array([each.layers for each in found])
    return {
        "area": float(areas.mean()),
        "attention": parts.mean(axis=0).tolist(),
        "ratio": (parts.mean(axis=0) / areas.mean()).tolist(),
        "exceeds": (parts > areas[:, None]).mean(axis=0).tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=6)
    parser.add_argument("--painted", type=float, default=0.15, help="part of the picture that is painted over")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    figures = measure(
        *mlx_vlm_mini.load(options.model), scenes=options.scenes, seed=options.seed, painted=options.painted,
        max_tokens=options.max_tokens,
    )  # fmt: skip
    if options.json:
        print(json.dumps(figures))
        return
    print("| layer | attention on the object | its area | ratio | scenes with more |\n|---|---|---|---|---|")
    rows = zip(figures["attention"], figures["ratio"], figures["exceeds"], strict=True)
    for layer, (attention, ratio, exceeds) in enumerate(rows):
        print(f"| {layer} | {attention:.1%} | {figures['area']:.1%} | {ratio:.2f} | {exceeds:.0%} |")
    print(f"\n{figures['right']} of {figures['scenes']} answers named the colour.")
    print(
        f"With {figures['painted']:.0%} of the picture painted over the answer changed "
        f"{figures['most_attended']} times where it was the most attended part, {figures['random']} times at random."
    )


if __name__ == "__main__":
    main()
