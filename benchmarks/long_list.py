"""Measures a list of a million pictures: memory and time before the first answer, and the cost of the bookkeeping.

    python benchmarks/long_list.py [MODEL] [--count 1000000]

MODEL is by default the bundled one. Names are links to a thousand small pictures. Each figure is of one process:

- first: `generate --images-from LIST --output FILE`, from its start to the first line of FILE, then killed;
- all: the same with a stand-in for the model that answers at once, to the end of the list;
- again: the first command once more, the file holding all answers but the last one.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from mlx_vlm_mini.checkpoints.bundled import NAME

STAND_IN = """
import sys
from contextlib import contextmanager
from pathlib import Path
from mlx_vlm_mini.cli import batch
from mlx_vlm_mini.cli.main import main
from mlx_vlm_mini.generation.answering import Chunk, Stats
from mlx_vlm_mini.generation.engine import Request

@contextmanager
def engine(*_):
    def ask(item):
        request = Request(lambda: None)
        request._give(Chunk("an answer", 1, -0.5, "stop", Stats()))
        return request
    yield ask

batch._engine = engine
sys.argv[0] = "mlx-vlm-mini"
main()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default=NAME)
    parser.add_argument("--count", type=int, default=1_000_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), options.model, options.count)


def measure(folder: Path, model: str, count: int) -> None:
    names = make_pictures(folder, count)
    (folder / "list.txt").write_text("".join(f"{name}\n" for name in names))
    out = folder / "out.jsonl"
    listed = ["--images-from", str(folder / "list.txt"), "--output", str(out)]
    command = ["generate", model, "-p", "What is it?", "--max-tokens", "4", *listed]
    program = [str(Path(sys.executable).with_name("mlx-vlm-mini")), *command]
    seconds, memory = run(program, out, 1)
    print(f"first: {seconds:.1f} s, {memory / 1e6:.0f} MB")
    out.unlink()
    seconds, memory = run([sys.executable, "-c", STAND_IN, *command], out, None)
    lines = out.read_bytes().splitlines(keepends=True)
    assert len({line[9:41] for line in lines}) == count
    print(f"all: {seconds:.1f} s, {1e6 * seconds / count:.0f} us each, {memory / 1e6:.0f} MB")
    out.write_bytes(b"".join(lines[:-1]))
    seconds, memory = run(program, out, None)
    print(f"again: {seconds:.1f} s, {memory / 1e6:.0f} MB")


def make_pictures(folder: Path, count: int) -> list[str]:
    """Distinct names of small pictures that differ."""
    inside = folder / "pictures"
    inside.mkdir()
    each = min(count, 1000)
    for number in range(each):
        Image.new("RGB", (32, 32), (number % 256, number // 256, 99)).save(inside / f"{number}.png")
    folders = [folder / str(number) for number in range(-(-count // each))]
    for link in folders:
        link.symlink_to(inside)
    return [f"{link}/{number}.png" for link in folders for number in range(each)][:count]


def run(command: list[str], out: Path, lines: int | None) -> tuple[float, int]:
    """Seconds until a file has so many lines (None: until the command has ended), and the process's peak of memory."""
    begin, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while process.poll() is None and (lines is None or count_lines(out) < lines):
        time.sleep(0.05)
        peak = max(peak, peak_of(process.pid))
    seconds = time.perf_counter() - begin
    if lines is not None and process.poll() is not None:
        raise SystemExit(f"{command}: ended with {process.returncode}")
    process.kill()
    process.wait()
    return seconds, peak


def peak_of(pid: int) -> int:
    """Of a process that runs, in bytes; 0 where it has just ended."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


_read: dict[Path, tuple[int, int]] = {}


def count_lines(path: Path) -> int:
    """Lines of a file that grows."""
    if not path.exists():
        return 0
    done, found = _read.get(path, (0, 0))
    if path.stat().st_size < done:
        done, found = 0, 0
    with path.open("rb") as file:
        file.seek(done)
        while data := file.read(1 << 20):
            found, done = found + data.count(b"\n"), done + len(data)
    _read[path] = done, found
    return found


if __name__ == "__main__":
    main()
