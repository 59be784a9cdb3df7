"""Puts what run.sh measured into README.md, benchmarks/README.md, docs/speed.png and docs/growth.png.

python benchmarks/publish.py [--out FOLDER]
"""

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

from speed import FOLDER, SIDES

ROOT = Path(__file__).parent.parent


def put(file: Path, name: str, text: str) -> None:
    """Replace what stands between a file's marks of this name."""
    marks = re.compile(rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- /{name} -->)", re.DOTALL)
    old = file.read_text()
    if not marks.search(old):
        raise SystemExit(f"{file} has no marks <!-- {name}: ... --> and <!-- /{name} -->")
    file.write_text(marks.sub(lambda found: found[1] + text.strip() + "\n" + found[2], old))


def ratio(name: str, sides: dict[str, Any], side: str) -> float:
    """How many times ours a side takes; of Python's rows in building the graph. 0: not measured."""
    if name.startswith("python") and "building" in sides.get(side, {}):
        return float(sides[side]["building"] / sides["ours"]["building"])
    return float(sides.get(side, {}).get("ratio", 0))


def plot(results: dict[str, Any], file: Path) -> None:
    """How many times ours the others take, a bar a side, for rows that the issue sets against others."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = {
        name: row for name, row in results["rows"].items()
        if any("ratio" in one for side, one in row["sides"].items() if side != "ours")
    }  # fmt: skip
    others = [side for side in SIDES if side != "ours"]
    figure, axis = plt.subplots(figsize=(9, 0.42 * len(rows) + 1.2), constrained_layout=True)
    for number, side in enumerate(others):
        places = [place + 0.27 * (number - 1) for place in range(len(rows))]
        ratios = [ratio(name, row["sides"], side) for name, row in rows.items()]
        bars = axis.barh(places, ratios, height=0.25, label=SIDES[side])
        axis.bar_label(bars, [f"{ratio:.1f}" if ratio else "" for ratio in ratios], fontsize=7, padding=2)
    axis.axvline(1, color="black", linewidth=1)
    axis.set(xscale="log", xlabel="times ours (time, memory or size; of rates ours by theirs)")
    axis.set_yticks(range(len(rows)), [row["title"] for row in rows.values()], fontsize=8)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.legend(fontsize=8)
    figure.savefig(file, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=FOLDER / "results")
    out = parser.parse_args().out
    put(ROOT / "README.md", "speed", (out / "speed.md").read_text())
    put(ROOT / "benchmarks" / "README.md", "growth", (out / "growth.md").read_text())
    plot(json.loads((out / "speed.json").read_text()), ROOT / "docs" / "speed.png")
    shutil.copyfile(out / "growth.png", ROOT / "docs" / "growth.png")


if __name__ == "__main__":
    main()
