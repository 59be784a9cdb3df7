"""Draw the pictures of examples/: two scenes, and a handwritten digit that training never sees.

python recipes/demo/examples.py FOLDER      # needs scikit-learn
"""

import sys
from pathlib import Path

import numpy as np

from mlx_vlm_mini.data.scenes import SIZES, Scene, Thing, draw, draw_digit, random_digit


def thing(shape: str, color: str, size: str, x: float, y: float) -> Thing:
    return Thing(shape, color, size, x, y, SIZES[size])


SCENES = {
    "scene": Scene(
        (
            thing("circle", "red", "large", 0.27, 0.28),
            thing("star", "yellow", "small", 1.15, 0.2),
            thing("square", "blue", "large", 0.75, 0.76),
        ),
        240, 180, (120, 170, 150), 6.0,
    ),
    "other": Scene(
        (thing("triangle", "green", "large", 0.28, 0.5), thing("star", "white", "small", 0.82, 0.84)),
        180, 180, (96, 82, 140), 0.0,
    ),
}  # fmt: skip


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(4)
    for name, scene in SCENES.items():
        draw(scene, rng).save(folder / f"{name}.png")
    while (digit := random_digit(rng, held_out=True, sides=(128, 160))).value != 4:
        pass
    draw_digit(digit, rng).save(folder / "digit.png")


if __name__ == "__main__":
    main()
