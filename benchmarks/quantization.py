"""How far quantized models are from their source: every recipe of `convert`, and the patterns of mlx-vlm 0.7.10.

    python benchmarks/quantization.py                 # a LLaVA of 75 M random weights with heavy tails
    python benchmarks/quantization.py FOLDER          # any checkpoint folder

Each row is converted by `convert`, then run on scenes that no calibration saw: the KL divergence (nats) of next-token
distributions at the answers, source to result, and how often both find the same token the likeliest. "Pattern of the
peer" means: the layers and bits that its predicates choose, rounded by `mx.quantize` as it does; the peer is not run.
"""

import argparse
import json
import re
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx_vlm_mini

mlx_vlm_mini.load  # noqa: B018 - uses OpenBLAS where there is one, before mlx is imported

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_vlm_mini.checkpoints.folder import open_checkpoint
from mlx_vlm_mini.checkpoints.load import compute_dtype, load_processor, plan
from mlx_vlm_mini.checkpoints.weights import hub_name, to_torch_layout
from mlx_vlm_mini.convert import conversion, convert
from mlx_vlm_mini.convert.calibrate import divergence, observe, scene_samples
from mlx_vlm_mini.families import llava
from mlx_vlm_mini.model import VLM

GOLDEN = Path(__file__).parent.parent / "tests" / "golden" / "llava-clip-llama"
HELD_OUT = 777  # seed
SIZES: dict[str, dict[str, Any]] = {
    "text_config": {
        "hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12, "num_key_value_heads": 4,
        "head_dim": 64, "num_hidden_layers": 8, "vocab_size": 8192,
    },
    "vision_config": {
        "hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6, "num_hidden_layers": 6,
        "image_size": 112,
    },
}  # fmt: skip


def make_heavy(folder: Path, seed: int = 0) -> None:
    """A LLaVA in bfloat16 whose weights follow Student's t with 4 degrees of freedom, with input channels of uneven
    size and, as large language models have them, a few norm weights eight times the others'."""
    folder.mkdir(parents=True)
    for file in GOLDEN.iterdir():
        if file.suffix == ".json":
            (folder / file.name).write_text(re.sub(r"\b42\b", "112", file.read_text()))
    config = json.loads((folder / "config.json").read_text()) | {
        "torch_dtype": "bfloat16",
        "vision_feature_layer": -1,
    }
    for part, sizes in SIZES.items():
        config[part] |= sizes
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    rng, tensors = np.random.default_rng(seed), {}
    understood = llava.config(config)
    whole = replace(understood.vision, feature_layers=(understood.vision.num_hidden_layers,))
    for name, array in tree_flatten(VLM(replace(understood, vision=whole)).parameters()):
        value = _heavy(rng, name, array.shape)
        tensors[hub_name(name, llava.WEIGHTS)] = mx.contiguous(
            to_torch_layout(name, mx.array(value, dtype=mx.bfloat16))
        )
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "pt"})


def _heavy(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if len(shape) == 1:
        if "norm" not in name or not name.endswith("weight"):
            return rng.normal(0, 0.1, shape)
        value = np.exp(rng.normal(0, 0.3, shape))
        value[rng.choice(shape[0], max(1, shape[0] // 100), replace=False)] *= 8
        return value
    if len(shape) > 2:
        return rng.normal(0, np.prod(shape[1:]) ** -0.5, shape)
    value = rng.standard_t(4, shape) / 2**0.5 * np.exp(rng.normal(0, 0.5, (1, shape[1])))
    scale = shape[1] ** -0.5
    if name.endswith(("o_proj.weight", "down_proj.weight", "fc2.weight")):
        scale *= 0.3
    elif "embed_tokens" in name:
        scale = 1.0
    elif "pos_embed" in name:
        scale = 0.3
    return value * scale


@dataclass(frozen=True)
class Row:
    """A way to quantize: its name, and `convert`'s settings."""

    name: str
    settings: dict[str, Any]


def everything(bits: int) -> dict[str, Any]:
    return {"bits": bits, "part_bits": {"vision": bits, "projector": bits}}


def rows() -> list[list[Row]]:
    """Groups of rows; the first of each sets the bits per weight, "auto" in the others gets the same."""
    gptq: dict[str, Any] = {"method": "gptq"}
    auto: dict[str, Any] = {"recipe": "auto"}
    both = [Row("auto", auto), Row("auto, gptq", auto | gptq)]
    return [
        [Row("uniform, 4 bits", everything(4)), Row("uniform, 4 bits, gptq", everything(4) | gptq), *both],
        [Row("mixed, 4 and 6 bits", everything(4) | {"recipe": "mixed"}),
         Row("mixed, gptq", everything(4) | {"recipe": "mixed"} | gptq), *both],
        [Row("pattern of the peer, uniform 4 bits", {"bits": 4}), Row("the same, gptq", {"bits": 4} | gptq), *both],
        [Row("pattern of the peer, mixed_4_6", {"bits": 4, "recipe": "mixed"}),
         Row("the same, gptq", {"bits": 4, "recipe": "mixed"} | gptq), *both],
        [Row("uniform, 3 bits", everything(3)), Row("uniform, 3 bits, gptq", everything(3) | gptq), *both],
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", help="a checkpoint folder; none makes a random one")
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], help="of what stays in floating point")
    parser.add_argument("--samples", type=int, default=48, help="held-out pictures")
    parser.add_argument("--groups", type=int, nargs="*", help="numbers of groups of rows, from 0; all by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        folder = options.folder
        if folder is None:
            folder = work / "heavy"
            make_heavy(folder)
        run(folder, work / "out", options)


def _measure_once() -> None:
    """What layers lose does not depend on the budget: every row gets the first one's measurement."""
    measured: dict[Any, Any] = {}
    measure = conversion.measure

    def remembered(planned: Any, names: Any, group_size: int, *rest: Any) -> Any:
        key = (tuple(names), group_size)
        if key not in measured:
            start = time.monotonic()
            measured[key] = measure(planned, names, group_size, *rest)
            say(f"measured {len(names)} layers in {time.monotonic() - start:.0f} s")
        return measured[key]

    conversion.measure = remembered


def run(folder: Path, out: Path, options: argparse.Namespace) -> None:
    planned = plan(open_checkpoint(folder))
    processor = load_processor(planned.checkpoint, planned.family, planned.config)
    held = scene_samples(processor, options.samples, seed=HELD_OUT)
    dtype = compute_dtype(planned)
    reference = np.concatenate(observe(planned, held, dtype).logprobs)
    entropy = -(np.exp(reference) * reference).sum(axis=-1).mean()
    say(f"{folder}: {len(reference)} distributions, entropy {entropy:.2f} nats")
    say("| recipe | bits per weight | MB | seconds | mean KL | to the first | same top token |")
    say("|---|---|---|---|---|---|---|")
    _measure_once()
    groups = rows()
    for number in options.groups if options.groups is not None else range(len(groups)):
        budget = first = None
        for row in groups[number]:
            settings = row.settings | ({"dtype": options.dtype} if options.dtype else {})
            if settings.get("recipe") == "auto":
                settings["bits_per_weight"] = budget
            start = time.monotonic()
            preview = convert(folder, out, **settings).preview
            seconds = time.monotonic() - start
            logprobs = np.concatenate(observe(plan(open_checkpoint(out)), held, dtype).logprobs)
            shutil.rmtree(out)
            kl = float(divergence(reference, logprobs).mean())
            same = float((reference.argmax(axis=-1) == logprobs.argmax(axis=-1)).mean())
            budget, first = budget or preview.bits_per_weight, first or kl
            say(
                f"| {row.name} | {preview.bits_per_weight:.2f} | {preview.bytes / 1e6:.1f} | {seconds:.0f} | {kl:.4f} "
                f"| {kl / first:.2f} | {100 * same:.1f} % |"
            )


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
