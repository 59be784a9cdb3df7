"""What quantization costs the bundled model, a trained one: size, time, memory, KL divergence and right answers.

    python benchmarks/bundled.py [--questions 1000] [--rows 0 1 2]        # ten minutes on two free cores

Each row is a run of `mlx-vlm-mini convert` as a user starts it, with its peak memory (resident, of the whole program).
KL divergence (nats) is that of next-token distributions at the answers of 48 conversations that no calibration saw,
source to result. Right answers are those of `mlx-vlm-mini eval --no-blank` on the model card's questions (seed 2026).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlx_vlm_mini

mlx_vlm_mini.load  # noqa: B018 - uses OpenBLAS where there is one, before mlx is imported

import numpy as np

from mlx_vlm_mini.checkpoints import bundled
from mlx_vlm_mini.checkpoints.folder import open_checkpoint
from mlx_vlm_mini.checkpoints.load import compute_dtype, load_processor, plan
from mlx_vlm_mini.convert.calibrate import divergence, observe, scene_samples
from mlx_vlm_mini.data.questions import write_scenes

PROGRAM = str(Path(sys.executable).with_name("mlx-vlm-mini"))
HELD_OUT = 777  # seed
EVERYTHING = "--vision-bits {0} --projector-bits {0} -q {0}"
ROWS = (
    "",
    EVERYTHING.format(8),
    "-q 8",
    EVERYTHING.format(6),
    EVERYTHING.format(4),
    EVERYTHING.format(4) + " --method gptq",
    EVERYTHING.format(4) + " --recipe mixed --method gptq",
    "--bits-per-weight 4.6",
    "--bits-per-weight 4.6 --method gptq",
    "-q 4",
    "-q 4 --method gptq",
    EVERYTHING.format(3) + " --method gptq",
)


def run(*arguments: str) -> tuple[str, float, float]:
    """Run the program: what it wrote to stdout, seconds, and MB that it took at most."""
    start = time.monotonic()
    process = subprocess.Popen([PROGRAM, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(arguments)}: exit status {status}")
    return said, time.monotonic() - start, usage.ru_maxrss / (1024 if sys.platform == "linux" else 1024**2)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--rows", type=int, nargs="*", default=range(len(ROWS)))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        write_scenes(work / "test", options.questions, seed=2026, digits=0.1, test=True)
        planned = plan(open_checkpoint(bundled.FOLDER))
        processor = load_processor(planned.checkpoint, planned.family, planned.config)
        held = scene_samples(processor, 48, seed=HELD_OUT)
        reference = np.concatenate(observe(planned, held, compute_dtype(planned)).logprobs)
        print("| `convert demo OUT` with | bits per weight | MB | seconds | peak MB | KL | same token | right |")
        print("|---|---|---|---|---|---|---|---|")
        for number in options.rows:
            show(ROWS[number], work, held, reference)


def show(options: str, work: Path, held: list, reference: np.ndarray) -> None:
    folder = work / "out"
    _, seconds, peak = run("convert", "demo", str(folder), *options.split(), "--no-check", "--force")
    answers = run("eval", str(folder), "--data", str(work / "test" / "scenes.jsonl"), "--no-blank", "--json")[0]
    score = json.loads(answers)["all"]
    result = plan(open_checkpoint(folder))
    logprobs = np.concatenate(observe(result, held, compute_dtype(result)).logprobs)
    kl = divergence(reference, logprobs).mean()
    same = (reference.argmax(axis=-1) == logprobs.argmax(axis=-1)).mean()
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    weights = sum(np.prod(info.shape) for info in open_checkpoint(bundled.FOLDER).tensors.values())
    print(
        f"| `{options}` | {8 * size / weights:.2f} | {size / 1e6:.2f} | {seconds:.0f} | {peak:.0f} | {kl:.4f} "
        f"| {100 * same:.1f} % | {100 * score['right'] / score['questions']:.1f} % |",
        flush=True,
    )


if __name__ == "__main__":
    main()
