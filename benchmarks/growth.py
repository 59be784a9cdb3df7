"""How the first token's cost grows with the number of pictures and with the length of the prompt.

    python benchmarks/growth.py [--torch PYTHON] [--limit 30] [--out FOLDER]

M of workloads.py, with 1 to 16 pictures and a short question, and with one picture and 1,000 to 16,000 tokens. OUT
gets `growth.json`, `growth.md` and `growth.png` (needs matplotlib). `exponent` is the growth from the point before, as
a power of the tokens: 1 is linear. Memory is the process's peak during the call less what it held with the model
loaded, so the exponent of a linear cost is 1 there, too. A side that took longer than `--limit` seconds for a point is
not asked for the next.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from speed import FOLDER, SIDES, Sample, Side, find_workloads, own_environment

IMAGES = (1, 2, 4, 8, 16)
CONTEXTS = (1000, 2000, 4000, 8000, 16000)


def measure(side: Side, folder: Path, pictures: list[str], limit: float) -> dict[str, list[Sample]]:
    questions = json.loads((folder / "questions.json").read_text())
    loaded = side.load(folder)
    side.ask("first", images=pictures[:1], question=questions["589"])
    points = {
        "pictures": [(count, pictures[:count], questions["589"]) for count in IMAGES],
        "tokens": [(count, pictures[:1], questions[str(count)]) for count in CONTEXTS],
    }
    found: dict[str, list[Sample]] = {}
    for kind, asked in points.items():
        found[kind] = []
        for count, images, question in asked:
            reply = side.ask("first", images=images, question=question)
            if "error" in reply:
                print(f"{side.name}, {count} {kind}: {reply['error']}", file=sys.stderr)
                break
            reply = {"count": count, **reply, "memory": reply["rss"] - loaded["rss"]}
            print(f"{side.name}, {count} {kind}: {reply['seconds']:.1f} s", file=sys.stderr)
            found[kind].append(reply)
            if reply["seconds"] > limit:
                break
    return found


def exponent(points: list[Sample], number: int, key: str) -> str:
    if number == 0:
        return ""
    before, now = points[number - 1], points[number]
    if min(before[key], now[key]) <= 0:
        return ""
    return f"{math.log(now[key] / before[key]) / math.log(now['prompt'] / before['prompt']):.2f}"


def table(results: dict[str, dict[str, list[Sample]]]) -> str:
    lines = ["| | | tokens | first token | exponent | memory | exponent |", "|---|---|---|---|---|---|---|"]
    for name, kinds in results.items():
        for kind, points in kinds.items():
            for number, one in enumerate(points):
                lines.append(
                    f"| {SIDES[name]} | {one['count']:,} {kind} | {one['prompt']:,} | {one['seconds']:.2f} s "
                    f"| {exponent(points, number, 'seconds')} | {one['memory'] / 1e6:,.0f} MB "
                    f"| {exponent(points, number, 'memory')} |"
                )
    return "\n".join(lines) + "\n"


def plot(results: dict[str, dict[str, list[Sample]]], file: Path) -> None:
    try:
        import matplotlib
    except ModuleNotFoundError:
        print("no plot: pip install matplotlib", file=sys.stderr)
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9, 6), constrained_layout=True)
    for row, (key, unit, label) in zip(
        axes, (("seconds", 1, "first token, s"), ("memory", 1e6, "memory, MB")), strict=True
    ):
        for axis, kind in zip(row, ("pictures", "tokens"), strict=True):
            for name, kinds in results.items():
                points: Any = kinds[kind]
                axis.plot(
                    [one["count"] for one in points], [one[key] / unit for one in points], "o-", label=SIDES[name]
                )
            axis.set(xlabel=kind, ylabel=label, xlim=(0, None), ylim=(0, None))
            axis.grid(alpha=0.3)
    axes[0][0].legend()
    figure.savefig(file, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", metavar="PYTHON")
    parser.add_argument("--limit", type=float, default=30)
    parser.add_argument("--out", type=Path, default=FOLDER / "results")
    parser.add_argument("--workloads", type=Path, default=FOLDER)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    found = find_workloads(options.workloads, False)
    pictures = [str(file) for file in sorted(found["pictures"].glob("small-*.jpg"))]
    plain = own_environment()
    sides = {"ours": sys.executable} | ({"torch": options.torch} if options.torch else {})
    results = {}
    for name, python in sides.items():
        side = Side(name, python, plain, options.out / f"{name}.log")
        try:
            results[name] = measure(side, found["M"], pictures, options.limit)
        finally:
            side.stop()
    (options.out / "growth.json").write_text(json.dumps(results, indent=1))
    (options.out / "growth.md").write_text(table(results))
    plot(results, options.out / "growth.png")
    print(table(results))


if __name__ == "__main__":
    main()
