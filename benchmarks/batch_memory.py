"""What answers together take of memory, beside what a batch says they may take; and whether many requests leave any.

    python benchmarks/batch_memory.py MODEL [--memory 1.5GB] [--lengths 589,1000,2000,589,...] [--requests 10000]

MODEL is a checkpoint folder, e.g. M of workloads.py. One prompt of text of each length is answered through an `Engine`
with that memory. Printed are MLX's peak while they are answered, the memory that was granted, and the most rows and
groups at a time. Then so many short requests are made of an engine; printed is the process's memory after each tenth.
"""

import argparse
from pathlib import Path

from mlx_vlm_mini.layers.cpu.blas import use_openblas

use_openblas()  # before anything imports mlx

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_vlm_mini import Engine, load
from mlx_vlm_mini.layers.memory import read_memory

LENGTHS = "589,4000,589,1000,589,2000,589,8000,589,589,589,1000"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--memory", default="1.5GB")
    parser.add_argument("--lengths", default=LENGTHS)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--requests", type=int, default=10_000)
    options = parser.parse_args()
    model, processor = load(options.model)
    word = "picture "
    each = len(processor.tokenizer.encode(word, add_special_tokens=False))
    prompts = [word * (int(length) // each) for length in options.lengths.split(",")]
    granted = read_memory(options.memory)
    mx.reset_peak_memory()
    with Engine(model, processor, batch_size=16, memory=granted, max_tokens=options.tokens) as engine:
        most = watch(engine)
        requests = [engine.submit(prompt) for prompt in prompts]
        answers = [request.result() for request in requests]
    assert all(answer.error is None for answer in answers)
    peak = mx.get_peak_memory()
    weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    print(f"weights {weights / 1e6:.0f} MB, granted {granted / 1e6:.0f}, peak {peak / 1e6:.0f}: {peak / granted:.2f}")
    print(f"at most {most['rows']} rows in {most['groups']} groups, said to take {most['bytes'] / 1e6:.0f} MB")
    del engine
    with Engine(model, processor, batch_size=16, memory=granted, max_tokens=3) as engine:
        for tenth in range(10):
            for first in range(0, options.requests // 10, 50):
                asked = [engine.submit(f"Question {tenth} {first} {number}?") for number in range(50)]
                asked[7].cancel()
                for request in asked:
                    request.result()
            done, own = (tenth + 1) * (options.requests // 10), mx.get_active_memory()
            print(f"{done} requests: {resident() / 1e6:.1f} MB, of MLX's arrays {own / 1e6:.1f}", flush=True)


def watch(engine: Engine) -> dict[str, int]:
    """The most rows, groups and bytes that the engine's batch says, kept up to date step by step."""
    most, batch = {"rows": 0, "groups": 0, "bytes": 0}, engine._batch
    step = batch.step

    def watched() -> list:
        said = step()
        nbytes = sum(group.nbytes(batch.cost) for group in batch._groups)
        now = {"rows": batch.rows, "groups": len(batch._groups), "bytes": nbytes}
        most.update({name: max(value, most[name]) for name, value in now.items()})
        return said

    batch.step = watched  # type: ignore[method-assign]
    return most


def resident() -> int:
    """Bytes of the process that are in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


if __name__ == "__main__":
    main()
