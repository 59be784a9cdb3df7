"""Draw how the demonstration model learned: loss, and the share of right answers on the validation scenes.

python recipes/demo/plot.py FOLDER OUT      # FOLDER as recipes/demo.sh left it; needs matplotlib
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np

STAGES = ("shapes", "talk", "more", "last")
BESIDE = 25  # steps whose losses are averaged


def read_logs(folder: Path) -> list[list[dict[str, Any]]]:
    """The logs of the stages, their steps counted on from stage to stage."""
    logs, before = [], 0
    for stage in STAGES:
        lines = (folder / f"run-{stage}" / "log.jsonl").read_text(encoding="utf-8").splitlines()
        log = [json.loads(line) for line in lines]
        for entry in log:
            entry["step"] += before
        before = log[-1]["step"]
        logs.append(log)
    return logs


def draw(logs: list[list[dict[str, Any]]], file: Path, name: str, label: str, *, averaged: bool) -> None:
    figure, axes = plt.subplots(figsize=(7, 3.5), dpi=120)
    for stage, log in zip(STAGES, logs, strict=True):
        points = [(entry["step"], entry[name]) for entry in log if entry.get(name) is not None]
        steps, values = np.array(points).T
        if averaged:
            whole = len(values) // BESIDE * BESIDE
            steps, values = (part[:whole].reshape(-1, BESIDE).mean(axis=1) for part in (steps, values))
        axes.plot(steps, values if averaged else 100 * values, "-" if averaged else "o-", label=stage)
    axes.set_xlabel("steps")
    axes.set_ylabel(label)
    axes.set_yscale("log" if averaged else "linear")
    axes.legend(title="stage")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file)


def main() -> None:
    logs, out = read_logs(Path(sys.argv[1])), Path(sys.argv[2])
    draw(logs, out / "loss.png", "loss", "loss (nats a token, mean of 25 steps)", averaged=True)
    draw(logs, out / "right.png", "valid_right", "right answers of the validation set (%)", averaged=False)


if __name__ == "__main__":
    main()
