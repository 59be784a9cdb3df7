"""Whether memory and open files stay flat over a long conversation and over thousands of pictures.

    python benchmarks/long_use.py [--turns 500] [--pictures 5000] [--model FOLDER]

The conversation shows a new picture in every other turn, in a context that is soon full (`on_full="drop"`), and mixes
`clear`, `undo`, `retry`, `edit`, `fork`, saving and loading. The pictures are captioned by `generate --output`. What
is kept of pictures for when they come again is limited to 4 MB here (512 MB by default), so that the limit is reached
and what grows beyond it is seen. Printed are the slope of the process's memory by least squares after a fifth of the
way, MLX's active and cached memory, and open files. No figure of time is meant here.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import os
import random
import resource
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
LIMIT = 4 << 20  # bytes


def resident() -> float:
    """Bytes of memory that the process has now; where there is no /proc its peak."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def open_files() -> int:
    return len(list(Path("/dev/fd").iterdir())) - 1


class Record:
    """Looks at the process again and again."""

    def __init__(self, what: str) -> None:
        self.what, self.rows, self.files = what, [], open_files()

    def note(self, count: int) -> None:
        import mlx.core as mx

        cache = mx.get_cache_memory()
        mx.clear_cache()
        with contextlib.suppress(OSError, AttributeError):  # of glibc: what is free goes back to the system
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        self.rows.append((count, resident(), mx.get_active_memory(), cache, open_files(), len(gc.get_objects())))

    def show(self) -> None:
        gc.collect()
        rows = np.array(self.rows, dtype=np.float64)
        late = rows[rows[:, 0] >= rows[-1, 0] / 5]
        slope = np.polyfit(late[:, 0], late[:, 1], 1)[0] / 1024
        active = np.polyfit(late[:, 0], late[:, 2], 1)[0] / 1024
        print(f"{int(rows[-1, 0])} {self.what}s, {len(rows)} looks:")
        print(f"  resident: {late[0, 1] / 1e6:.1f} MB after a fifth, {late[-1, 1] / 1e6:.1f} MB at the end, "
              f"{late[:, 1].max() / 1e6:.1f} MB at most; slope {slope:+.3f} KB a {self.what}")  # fmt: skip
        print(f"  MLX: active {late[0, 2] / 1e6:.2f} to {late[-1, 2] / 1e6:.2f} MB, slope {active:+.4f} KB a "
              f"{self.what}; cache at most {rows[:, 3].max() / 1e6:.1f} MB")  # fmt: skip
        print(f"  Python objects: {late[0, 5]:.0f} after a fifth, {late[-1, 5]:.0f} at the end")
        print(f"  open files: {self.files} before, {open_files()} after, {int(rows[:, 4].max())} at most", flush=True)


def paint(file: Path, number: int) -> Path:
    """A picture like no other one."""
    from PIL import Image

    rng = np.random.default_rng(number)
    Image.fromarray(rng.integers(0, 255, (24, 20 + number % 9, 3), dtype=np.uint8)).save(file)
    return file


def talk(model: Path, turns: int, folder: Path) -> None:
    from mlx_vlm_mini import Chat, load

    loaded = load(model)
    own: dict[str, Any] = {"context": 120, "on_full": "drop", "max_tokens": 6, "feature_memory": LIMIT}
    chat, rng, record, dropped = Chat(*loaded, **own), random.Random(1), Record("turn"), 0
    for turn in range(turns):
        said: list[Any] = [f"Number {turn}?"]
        if turn % 2:
            said.insert(0, paint(folder / f"turn-{turn}.png", turn))
        list(chat.send(said))
        for action, share in (
            ("retry", 0.1),
            ("edit", 0.1),
            ("undo", 0.1),
            ("fork", 0.1),
            ("load", 0.05),
            ("clear", 0.02),
        ):
            if rng.random() >= share or not any(message["role"] == "user" for message in chat.messages):
                continue
            if action == "retry":
                list(chat.retry())
            elif action == "edit":
                list(chat.edit(["Rather this", paint(folder / "edit.png", turn + 10**6)]))
            elif action == "fork":
                twin = chat.fork()
                list(twin.send("Another way"))
                del twin
            elif action == "load":
                chat.save(folder / "talk.json", cache=True)
                chat = Chat.load(folder / "talk.json", *loaded, max_tokens=6, feature_memory=LIMIT)
            else:
                getattr(chat, action)()
        dropped = max(dropped, chat.dropped_turns)
        if turn % 5 == 4:
            record.note(turn + 1)
    record.show()
    print(f"  at most {dropped} turns were dropped in one conversation")


def caption(model: Path, pictures: int, folder: Path) -> None:
    from mlx_vlm_mini import Chat
    from mlx_vlm_mini.cli.main import main as program

    (folder / "pictures").mkdir()
    for number in range(pictures):
        paint(folder / "pictures" / f"{number:05}.png", number)
    Chat.__init__.__kwdefaults__["feature_memory"] = LIMIT  # the command has no option for it
    out, record, over = folder / "answers.jsonl", Record("picture"), threading.Event()

    def watch() -> None:
        done, place = 0, 0
        while not over.wait(0.25):
            if out.exists():
                with out.open("rb") as stream:
                    stream.seek(place)
                    new = stream.read()
                done, place = done + new.count(b"\n"), place + len(new)
                del new
            if done:
                record.note(done)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        program(["generate", str(model), "-p", "What is it?", "-i", str(folder / "pictures"), "--max-tokens", "4",
                 "--output", str(out)], standalone_mode=False)  # fmt: skip
    finally:
        over.set()
        watcher.join()
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == pictures and not any("error" in line for line in lines)
    record.note(pictures)
    record.show()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=500)
    parser.add_argument("--pictures", type=int, default=5000)
    parser.add_argument("--model", type=Path, default=ROOT / "tests/golden/llava-clip-llama")
    options = parser.parse_args()
    from mlx_vlm_mini.layers.cpu.blas import use_openblas

    use_openblas()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        if options.turns:
            talk(options.model, options.turns, Path(folder))
        if options.pictures:
            caption(options.model, options.pictures, Path(folder))
    print(f"took {time.monotonic() - begin:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
