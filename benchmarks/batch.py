"""How many tokens a second several answers together give, beside one alone; all of it in turns in one process.

    python benchmarks/batch.py MODEL [--rows 1,4,8,16] [--context 600] [--rounds 5]

MODEL is a checkpoint folder, e.g. M of workloads.py. Rows are copies of one prompt of `context` tokens, read once.
Timed are steps of decoding, with all the work that an answer does for a token. Ratios are of wall time and of the
processor's time, which other programs on the machine disturb less.
"""

import argparse
import time
from statistics import median

from mlx_vlm_mini.layers.cpu.blas import use_openblas

use_openblas()  # before anything imports mlx

import mlx.core as mx

from mlx_vlm_mini import load, stream_generate
from mlx_vlm_mini.generation.batch import Batch, Job
from mlx_vlm_mini.generation.cache import Prefixes
from mlx_vlm_mini.generation.features import Features
from mlx_vlm_mini.generation.options import Options

STEPS = 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--rows", default="1,4,8,16")
    parser.add_argument("--context", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    model, processor = load(options.model)
    word = "picture "
    text = word * max(1, options.context // max(len(processor.tokenizer.encode(word, add_special_tokens=False)), 1))
    inputs = processor(text)
    mx.eval(inputs.input_ids)
    features, prefixes = Features(), Prefixes(1 << 32)

    def together(rows: int) -> tuple[float, float]:
        """Seconds of wall and of processor time a token, of `rows` answers decoded together."""
        batch = Batch(model, processor, size=rows, memory=1 << 40, features=features, prefixes=prefixes)
        for _ in range(rows):
            batch.add(Job(inputs, Options(max_tokens=STEPS + rows + 4)))
        while batch.rows < rows or batch.waiting:
            batch.step()
        batch.step()
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(STEPS):
            batch.step()
        return (time.perf_counter() - wall) / (STEPS * rows), (time.process_time() - cpu) / (STEPS * rows)

    def alone() -> tuple[float, float]:
        chunks = stream_generate(model, processor, text, max_tokens=STEPS + 2)
        next(chunks), next(chunks)
        wall, cpu = time.perf_counter(), time.process_time()
        count = sum(1 for _ in chunks)
        return (time.perf_counter() - wall) / count, (time.process_time() - cpu) / count

    counts = [int(count) for count in options.rows.split(",")]
    found: dict[int, list[tuple[float, float]]] = {rows: [] for rows in counts}
    together(counts[0])
    for _ in range(options.rounds):
        base = alone()
        for rows in counts:
            own = together(rows)
            found[rows].append((base[0] / own[0], base[1] / own[1]))
    print(f"{options.model}, behind {len(inputs.slots)} tokens: times the tokens/s of one answer alone, medians")
    for rows, ratios in found.items():
        wall, cpu = (median(each) for each in zip(*ratios, strict=True))
        print(f"{rows:3} rows: {wall:.2f} by wall, {cpu:.2f} by processor time")


if __name__ == "__main__":
    main()
