"""How long a LLaVA-1.5-7B takes to convert to 4 bits, and in how much memory, beside a loop that does the least.

python benchmarks/convert.py [FOLDER [LAYERS]]      needs 9 GB of disk in FOLDER (default /tmp), 15 GB as file cache

LAYERS of the decoder are 32 unless told; with fewer it is a smaller model. Beside the seconds on the clock stand those
of the processor, which tell more where others use it, too.

The source has the shapes of llava-hf/llava-1.5-7b-hf, 14 GB in half precision in three files, which are sparse: they
read as zeros and take no room. The loop only reads each tensor and calls `mx.quantize`; it checks and writes nothing.
"""

import json
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from math import prod
from pathlib import Path

ROOT = Path(__file__).parent.parent
SMALL = ROOT / "tests" / "golden" / "llava-clip-llama"
TEXT = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "head_dim": 128, "vocab_size": 32064, "max_position_embeddings": 4096,
}  # fmt: skip
VISION = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 336, "patch_size": 14,
}  # fmt: skip
LOOP = """
import sys; from pathlib import Path; import mlx.core as mx
for file in sorted(Path(sys.argv[1]).glob("*.safetensors")):
    arrays = mx.load(str(file))
    for name in list(arrays):
        weight = arrays.pop(name)
        if name.startswith("language_model") and weight.ndim == 2:
            mx.eval(mx.quantize(weight, group_size=64, bits=4))
        else:
            mx.eval(weight)
        del weight
        mx.clear_cache()
"""


def make_source(folder: Path) -> int:
    """Write the sparse checkpoint and give its tensors' bytes."""
    from mlx.utils import tree_flatten

    from mlx_vlm_mini.checkpoints.weights import hub_name
    from mlx_vlm_mini.families import find_family
    from mlx_vlm_mini.files import read_json
    from mlx_vlm_mini.model import VLM

    folder.mkdir()
    for file in SMALL.glob("*.json"):
        shutil.copyfile(file, folder / file.name)
    config = read_json(SMALL / "config.json")
    config["text_config"] |= TEXT
    config["vision_config"] |= VISION
    (folder / "config.json").write_text(json.dumps(config))
    family = find_family(config)
    shapes = {}
    for name, array in tree_flatten(VLM(family.config(config)).parameters()):
        shape = array.shape if len(array.shape) < 4 else (array.shape[0], array.shape[3], *array.shape[1:3])
        shapes[hub_name(name, family.WEIGHTS)] = shape
        if "blocks.22." in name:  # the last block, which nothing reads
            shapes[hub_name(name.replace("blocks.22.", "blocks.23."), family.WEIGHTS)] = shape
    weight_map, parts, total = {}, [{}, {}, {}], sum(2 * prod(shape) for shape in shapes.values())
    done = 0
    for name, shape in shapes.items():
        number = min(2, 3 * done // total)
        parts[number][name] = shape
        weight_map[name] = f"model-{number + 1:05}-of-00003.safetensors"
        done += 2 * prod(shape)
    for number, part in enumerate(parts, start=1):
        header, offset = {"__metadata__": {"format": "pt"}}, 0
        for name, shape in part.items():
            header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, offset + 2 * prod(shape)]}
            offset += 2 * prod(shape)
        encoded = json.dumps(header).encode()
        with (folder / f"model-{number:05}-of-00003.safetensors").open("wb") as stream:
            stream.write(struct.pack("<Q", len(encoded)) + encoded)
            stream.truncate(8 + len(encoded) + offset)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


def measure(*command: object) -> tuple[float, float, float]:
    """Seconds of a process on the clock and on the processor, and its peak resident memory in bytes."""
    start = time.perf_counter()
    code = (
        "import resource, subprocess, sys; done = subprocess.run(sys.argv[1:], stderr=subprocess.DEVNULL); "
        "used = resource.getrusage(resource.RUSAGE_CHILDREN); "
        "print(used.ru_utime + used.ru_stime, used.ru_maxrss); sys.exit(done.returncode)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, command)], check=True, stdout=subprocess.PIPE, text=True
    )
    processor, peak = done.stdout.split()[-2:]
    return time.perf_counter() - start, float(processor), (1 if sys.platform == "darwin" else 1024) * int(peak)


def main() -> None:
    """Two rounds, because the first fills the file cache."""
    program = Path(sys.executable).with_name("mlx-vlm-mini")
    place, layers = (sys.argv[1:] + ["/tmp", "32"][len(sys.argv) - 1 :])[:2]
    TEXT["num_hidden_layers"] = int(layers)
    with tempfile.TemporaryDirectory(dir=place) as folder:
        source, out = Path(folder) / "source", Path(folder) / "out"
        print(f"source: {make_source(source) / 1e9:.2f} GB")
        for number in (1, 2):
            loop = measure(sys.executable, "-c", LOOP, source)
            ours = measure(program, "convert", source, out, "-q", "4", "--force", "--no-check")
            size = sum(file.stat().st_size for file in out.iterdir())
            for what, (clock, processor, peak) in (("loop", loop), ("convert", ours)):
                print(
                    f"round {number}, {what}: {clock / 60:.2f} min ({clock:.1f} s, processor {processor:.1f} s), "
                    f"peak {peak / 1e9:.2f} GB"
                )
            print(
                f"round {number}: {ours[0] / loop[0]:.2f} times the loop, by the processor {ours[1] / loop[1]:.2f} "
                f"times; result {size / 1e9:.2f} GB",
                flush=True,
            )


if __name__ == "__main__":
    main()
