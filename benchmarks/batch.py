"""What many answers together cost, in turns within one run: beside one alone, beside mlx-vlm and torch.

    python benchmarks/batch.py MODEL [--rows 1,4,8,16] [--context 600] [--rounds 5] [--pictures 16] [--tokens 128]
                               [--peer PYTHON] [--torch PYTHON]

MODEL is a checkpoint folder, e.g. M of workloads.py. PYTHON: interpreters with mlx-vlm, and with torch.

- rows: tokens a second in total, of copies of a prompt of `context` tokens that was read, over those of one answer of
  `stream_generate`; steps of decoding alone, with all the work that an answer does for a token;
- engine: one request of an `Engine` beside `stream_generate`, from the call to the end;
- again: the first token of a second question about a photo, over that of the first, through an `Engine`;
- photos: photos of different sizes with so many tokens each, at 8 rows over one after the other; and the same by
  mlx-vlm's `batch_generate` (OpenBLAS preloaded) and by transformers' `generate` on torch.

Ratios are of neighbours in time, medians and in brackets the extremes; of wall time and of the processor's time, which
other programs on the machine disturb less.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from mlx_vlm_mini.layers.cpu.blas import use_openblas

use_openblas()  # before anything imports mlx

import mlx.core as mx
from speed import OPENBLAS, Side
from workloads import draw_picture

from mlx_vlm_mini import Engine, batch_generate, load, stream_generate
from mlx_vlm_mini.generation.batch import Batch, Job
from mlx_vlm_mini.generation.cache import Prefixes
from mlx_vlm_mini.generation.features import Features
from mlx_vlm_mini.generation.options import Options

STEPS = 24
QUESTION = "Is it a red house?"
Cost = tuple[float, float]
"""Seconds of wall and of processor time."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--rows", default="1,4,8,16")
    parser.add_argument("--context", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--peer")
    parser.add_argument("--torch")
    options = parser.parse_args()
    one = Ours(options.model, options.context)
    counts = [int(count) for count in options.rows.split(",") if count]
    if counts:
        one.rows(counts[0])
    found: dict[str, list[tuple[Cost, Cost]]] = {}
    for _ in range(options.rounds):
        base = one.decoding() if counts else (0.0, 0.0)
        for rows in counts:
            found.setdefault(f"tokens/s of {rows} rows", []).append((base, one.rows(rows)))
        found.setdefault("one request of an engine, cost of it", []).append((one.request(), one.alone()))
    with tempfile.TemporaryDirectory() as folder:
        photos = make_photos(Path(folder), options.pictures)
        for _ in range(options.rounds):
            first, second = one.twice(photos[0])
            found.setdefault("second question about a photo, cost of it", []).append((second, first))
        show(options.model, found)
        if photos:
            compare_photos(one, photos, options, Path(folder))


def compare_photos(one: "Ours", photos: list[Path], options: argparse.Namespace, folder: Path) -> None:
    """Print what answers about photos cost on each side."""
    sides = {}
    if options.peer:
        preloaded = os.environ | {"LD_PRELOAD": OPENBLAS}
        sides["mlx-vlm"] = Side("peer", options.peer, preloaded, folder / "peer.log")
    if options.torch:
        sides["torch"] = Side("torch", options.torch, {**os.environ}, folder / "torch.log")
    job = {"images": [*map(str, photos)], "question": QUESTION, "tokens": options.tokens, "rows": 8}
    costs: dict[str, list[Cost]] = {}
    for number in range(max(options.rounds // 2, 1)):
        costs.setdefault("ours, 8 rows", []).append(one.photos(photos, options.tokens, 8))
        costs.setdefault("ours, one by one", []).append(one.photos(photos, options.tokens, 1))
        for name, side in sides.items():
            side.load(Path(options.model))
            reply = side.ask("together", **job)
            if "error" in reply:
                print(f"{name}: {reply['error']}; {side.log.read_text()[-2000:]}")
                continue
            costs.setdefault(name, []).append((reply["seconds"], reply["cpu"] / len(photos)))
        print(f"round {number + 1}", {name: round(each[-1][0], 2) for name, each in costs.items()}, flush=True)
    for side in sides.values():
        side.stop()
    print(f"{len(photos)} photos of {len(photos)} sizes, {options.tokens} tokens each: seconds a photo, times ours")
    for name, each in costs.items():
        least = min(wall for wall, _ in each)
        base = costs["ours, 8 rows"]
        print(f"  {name}: {least:.2f} s, {ratios([*zip(each, base, strict=False)])}")


def show(model: str, found: dict[str, list[tuple[Cost, Cost]]]) -> None:
    print(f"{model}: ratios")
    for name, pairs in found.items():
        print(f"  {name}: {ratios(pairs)}", flush=True)


def ratios(pairs: list[tuple[Cost, Cost]]) -> str:
    """What the first of each pair costs over what the second does."""
    wall, cpu = ([one[kind] / other[kind] for one, other in pairs] for kind in (0, 1))
    return f"{median(wall):.2f} by wall ({min(wall):.2f} to {max(wall):.2f}), {median(cpu):.2f} by processor time"


def timed(work: Callable[[], object]) -> Cost:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


class Ours:
    """One model, and the measurements of it that run in this process."""

    def __init__(self, folder: str, context: int) -> None:
        self.model, self.processor = load(folder)
        word = "picture "
        self.text = word * max(1, context // len(self.processor.tokenizer.encode(word, add_special_tokens=False)))
        self.inputs = self.processor(self.text)
        mx.eval(self.inputs.input_ids)
        self.features, self.prefixes = Features(), Prefixes(1 << 32)

    def rows(self, rows: int) -> Cost:
        """A token, of `rows` answers decoded together."""
        batch = Batch(
            self.model, self.processor, size=rows, memory=1 << 40, features=self.features, prefixes=self.prefixes
        )
        for _ in range(rows):
            batch.add(Job(self.inputs, Options(max_tokens=STEPS + rows + 4)))
        while batch.rows < rows or batch.waiting:
            batch.step()
        batch.step()
        wall, cpu = timed(lambda: [batch.step() for _ in range(STEPS)])
        batch.clear()
        return wall / (STEPS * rows), cpu / (STEPS * rows)

    def decoding(self) -> Cost:
        """A token of `stream_generate`."""
        chunks = stream_generate(self.model, self.processor, self.text, max_tokens=STEPS + 2)
        next(chunks), next(chunks)
        count = STEPS
        wall, cpu = timed(lambda: [*chunks])
        return wall / count, cpu / count

    def alone(self) -> Cost:
        """An answer of `stream_generate`, from the call to its end."""
        return timed(lambda: [*stream_generate(self.model, self.processor, self.text, max_tokens=STEPS)])

    def request(self) -> Cost:
        """An answer of an engine that has nothing else to do, and has not read the prompt."""
        with Engine(self.model, self.processor, max_tokens=STEPS, prefix_memory=0) as engine:
            return timed(lambda: engine.submit(self.text).result())

    def twice(self, photo: Path) -> tuple[Cost, Cost]:
        """The first token of two questions about a photo, one after the other."""
        with Engine(self.model, self.processor, max_tokens=1) as engine:
            first, second = (timed(lambda q=q: engine.submit([photo, q]).result()) for q in (QUESTION, "Why?"))
        return first, second

    def photos(self, photos: list[Path], tokens: int, rows: int) -> Cost:
        """An answer about each photo, a photo."""
        prompts = [[photo, QUESTION] for photo in photos]
        wall, cpu = timed(
            lambda: batch_generate(self.model, self.processor, prompts, max_tokens=tokens, batch_size=rows)
        )
        return wall / len(photos), cpu / len(photos)


def make_photos(folder: Path, count: int) -> list[Path]:
    """JPEGs of different sizes."""
    photos = [folder / f"{number}.jpg" for number in range(count)]
    for number, photo in enumerate(photos):
        draw_picture(number, 480 + 32 * number, 360 + 40 * number).save(photo, quality=90)
    return photos


if __name__ == "__main__":
    main()
