"""Runs of `generate --output` killed at random moments, with a changing number of parts: nothing lost, nothing twice.

    python benchmarks/kills.py [MODEL] [--runs 2000] [--questions 400] [--seed 1]

MODEL is by default a golden of the tests. Each run is the command in a process of its own, forked from one that has
imported everything and computed nothing; two run at a time, each a part K of an N that changes, or one without a part,
which takes the others' files in. Most are killed (SIGKILL) after a random time, so also while answers are written or
files are taken in. When a file holds all answers, it is compared with that of a run that was not killed, and the next
file starts.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from mlx_vlm_mini.layers.cpu.blas import use_openblas

use_openblas()  # before anything imports mlx

from mlx_vlm_mini import Engine, load
from mlx_vlm_mini.cli.main import main as command
from mlx_vlm_mini.cli.part import part_files

GOLDEN = Path(__file__).parent.parent / "tests" / "golden" / "llava-clip-llama"
PARTS = 4  # at most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", type=Path, default=GOLDEN)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--questions", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    assert Engine and load  # imported, not used: forks find them
    with tempfile.TemporaryDirectory() as folder:
        check(Path(folder), options.model, options.runs, options.questions, random.Random(options.seed))


def check(folder: Path, model: Path, runs: int, count: int, draw: random.Random) -> None:
    (folder / "prompts.txt").write_text("".join(f"Question {number % (count - 3)}?\n" for number in range(count)))

    def arguments(out: Path, part: str | None) -> list[str]:
        asked = ["generate", str(model), "--prompt-file", str(folder / "prompts.txt"), "--max-tokens", "4"]
        return [*asked, "--output", str(out), *([] if part is None else ["--part", part])]

    whole = folder / "whole.jsonl"
    for _ in range(2):
        whole.unlink(missing_ok=True)
        begin = time.monotonic()
        wait(start(arguments(whole, None)))
    longest = time.monotonic() - begin
    expected = said(whole)
    assert len(expected) == count
    done = killed = files = torn = 0
    while done < runs:
        files += 1
        out = folder / f"out-{files}.jsonl"
        while not is_whole(out, count):
            parts = draw.choice([None, 1, 2, 3, PARTS])
            chosen = [None] if parts is None else [f"{draw.randint(1, parts)}/{parts}" for _ in range(2)]
            running = [start(arguments(out, part)) for part in dict.fromkeys(chosen)]
            left = 1 - sum(file.read_bytes().count(b"\n") for file in files_of(out)) / count
            time.sleep(draw.uniform(0, longest * (0.3 + 0.7 * max(left, 0)) / (parts or 1)))
            for process in running if draw.random() < 0.9 else ():
                os.kill(process, signal.SIGKILL)
            codes = [wait(process) for process in running]
            assert all(code in (0, 1, -signal.SIGKILL) for code in codes), codes
            done, killed = done + len(codes), killed + codes.count(-signal.SIGKILL)
            torn += sum(not file.read_bytes().endswith(b"\n") for file in files_of(out) if file.stat().st_size)
        assert said(out) == expected, f"{out} differs from {whole}"
        assert {file.name for file in folder.iterdir()} == {"prompts.txt", whole.name, out.name}
        out.unlink()
        print(f"{done} runs, {killed} killed, {files} files of {count} answers whole, {torn} torn lines", flush=True)


def start(arguments: list[str]) -> int:
    """Run the command in a fork; gives its process id."""
    process = os.fork()
    if process:
        return process
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null, 2)
    sys.argv = ["mlx-vlm-mini", *arguments]
    code = 70
    try:
        command(standalone_mode=True)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        os._exit(code)


def wait(process: int) -> int:
    """Its exit code, below 0 that of the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def files_of(out: Path) -> list[Path]:
    return [file for file in (out, *(file for _, file in part_files(out))) if file.exists()]


def is_whole(out: Path, count: int) -> bool:
    """Whether one file has all answers, and no part is left."""
    return out.exists() and not part_files(out) and out.read_bytes().count(b"\n") >= count and not notes(out)


def notes(out: Path) -> list[Path]:
    return list(out.parent.glob(f".{out.name}*"))


def said(file: Path) -> dict[str, tuple]:
    """What was answered, by key; each key stands once."""
    found = {}
    for line in file.read_text().splitlines():
        entry = json.loads(line)
        assert entry["key"] not in found, f"{file}: {entry['key']} stands twice"
        found[entry["key"]] = entry["prompt"], entry["text"], tuple(entry["token_ids"]), entry["finish_reason"]
    return found


if __name__ == "__main__":
    main()
