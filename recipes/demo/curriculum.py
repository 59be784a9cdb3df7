"""The first stage's curriculum: what shape, what digit, from pictures that a thing fills to small things anywhere.

python recipes/demo/curriculum.py FOLDER    # which has the sets near, wider, both, alone and small

It goes into shapes.jsonl; small.jsonl, to measure on, asks the same of small things anywhere.

Whole descriptions come last: where they come first, a fresh tower learns colours and sizes, tells shapes by their
areas, and stays there.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_vlm_mini.data.scenes import SHAPES

Line = dict[str, Any]


def read(folder: Path, name: str) -> Iterator[Line]:
    """The lines of a set, their images relative to the folder of all sets."""
    for text in (folder / name / "scenes.jsonl").read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        for message in line["messages"]:
            for part in message["content"]:
                if part["type"] == "image":
                    part["image"] = f"{name}/{part['image']}"
        yield line


def said(line: Line) -> list[str]:
    answer: str = line["messages"][1]["content"][0]["text"]
    return answer.lower().removesuffix(".").split()


def ask_one_thing(line: Line) -> Line:
    """The same picture, asked for its shape or its digit instead of a description."""
    asked, answered = line["messages"]
    shape = next((word for word in said(line) if word in SHAPES), None)
    for part in asked["content"]:
        if part["type"] == "text":
            part["text"] = "What digit is this?" if shape is None else "What shape is it?"
    answered["content"][0]["text"] = f"{(shape or said(line)[-1]).capitalize()}."
    return line


def main() -> None:
    folder = Path(sys.argv[1])
    near, wider = (
        [ask_one_thing(line) for line in read(folder, name) if "handwritten" not in said(line)]
        for name in ("near", "wider")
    )
    both = [ask_one_thing(line) for line in read(folder, "both")]
    alone = list(read(folder, "alone"))
    half = len(alone) // 2
    write(folder / "shapes.jsonl", [*near, *wider, *both, *map(ask_one_thing, alone[:half]), *alone[half:]])
    write(folder / "small.jsonl", [ask_one_thing(line) for line in read(folder, "small")])


def write(file: Path, lines: list[Line]) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
