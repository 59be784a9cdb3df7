"""How long Qwen2.5-VL's tower and merger take for a picture, ours and mlx-vlm's, on the same random weights and pixels.

    python benchmarks/grid_vision.py [--peer PYTHON] [--side 1024] [--blocks 8] [--rounds 3]

The published width, the first blocks only, of which the last sees the whole picture, as one in eight does; float32 on
a CPU.
PYTHON is the interpreter of an environment with mlx-vlm 0.7.10; OpenBLAS serves both. They take turns, each in a
process of its own that encodes once before it is timed; the figures are medians of the processor's seconds, all threads
together, which other programs on the machine change less than the clock's. That both give the same is checked.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

PEER = """
import ctypes, json, sys, time
try: ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)
except OSError: pass
import mlx.core as mx
from mlx_vlm.models.qwen2_5_vl.config import VisionConfig
from mlx_vlm.models.qwen2_5_vl.vision import VisionModel
folder, blocks = sys.argv[1], int(sys.argv[2])
given = mx.load(folder + "/inputs.safetensors")
model = VisionModel(VisionConfig(depth=blocks, out_hidden_size=2048, fullatt_block_indexes=[blocks - 1]))
model.load_weights(list(mx.load(folder + "/weights.safetensors").items()))
mx.eval(model.parameters())
for _ in range(2):
    begin = time.process_time()
    found = model(given["patches"], given["grid"], output_hidden_states=False)
    found = found[0] if isinstance(found, tuple) else found
    mx.eval(found)
    seconds = time.process_time() - begin
mx.save_safetensors(folder + "/peer.safetensors", {"features": found})
print(json.dumps(seconds))
"""


def ours(folder: Path, blocks: int) -> None:
    """Encode twice and print the processor's seconds of the second time."""
    from mlx_vlm_mini.layers.cpu.blas import use_openblas

    use_openblas()  # before anything imports mlx
    import mlx.core as mx

    model = make_model(blocks)
    given = mx.load(str(folder / "inputs.safetensors"))
    model.load_weights(str(folder / "ours.safetensors"), strict=False)
    mx.eval(model.vision.parameters(), model.projector.parameters())
    for _ in range(2):
        begin = time.process_time()
        found = model.projector(model.vision(given["pixels"]))
        mx.eval(found)
        seconds = time.process_time() - begin
    mx.save_safetensors(str(folder / "found.safetensors"), {"features": found[0]})
    print(json.dumps(seconds))


def make_model(blocks: int):  # type: ignore[no-untyped-def]
    from mlx_vlm_mini.families import qwen2_5_vl
    from mlx_vlm_mini.model import VLM

    text = {"hidden_size": 2048, "num_hidden_layers": 1, "num_attention_heads": 16, "num_key_value_heads": 1}
    vision = {"hidden_size": 1280, "depth": blocks, "out_hidden_size": 2048, "fullatt_block_indexes": [blocks - 1]}
    return VLM(
        qwen2_5_vl.config({"text_config": {**text, "intermediate_size": 8, "vocab_size": 8}, "vision_config": vision})
    )


def prepare(folder: Path, side: int, blocks: int) -> int:
    """Write weights by both names, and a picture in both forms; return its tokens."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from mlx_vlm_mini.preprocessing.grid import Grid

    model = make_model(blocks)
    mx.random.seed(0)
    arrays, theirs = {}, {}
    for name, array in tree_flatten({"vision": model.vision.parameters(), "projector": model.projector.parameters()}):
        small = 0.02 * mx.random.normal(array.shape)
        arrays[name] = small + 1 if "norm" in name and name.endswith("weight") else small
    names = {"o_proj": "proj", "projector.norm": "merger.ln_q", "projector.layers.0": "merger.mlp.0"}
    names |= {"projector.layers.1": "merger.mlp.2", "vision.patch_embed": "patch_embed.proj", "vision.": ""}
    for name, array in arrays.items():
        if ".k_proj" in name or ".v_proj" in name:
            continue
        if ".q_proj" in name:
            array = mx.concatenate([arrays[name.replace(".q_proj", f".{each}_proj")] for each in "qkv"])
            name = name.replace("q_proj", "qkv")
        for ours_, hub in names.items():
            name = name.replace(ours_, hub)
        theirs[name] = array
    mx.save_safetensors(str(folder / "ours.safetensors"), arrays)
    mx.save_safetensors(str(folder / "weights.safetensors"), theirs)
    height, width = Grid(patch_size=14, merge=2, min_pixels=3136, max_pixels=12845056).fit((side, side))
    pixels = mx.random.normal((1, height, width, 3))
    rows, columns = height // 28, width // 28
    patches = pixels.reshape(rows, 2, 14, columns, 2, 14, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    patches = mx.repeat(patches[:, :, :, :, :, None], 2, axis=5).reshape(rows * columns * 4, -1)
    grid = mx.array([[1, 2 * rows, 2 * columns]])
    mx.save_safetensors(str(folder / "inputs.safetensors"), {"pixels": pixels, "patches": patches, "grid": grid})
    return rows * columns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="Python of an environment with mlx-vlm")
    parser.add_argument("--side", type=int, default=1024, help="of the square picture, in pixels")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        return ours(options.child, options.blocks)
    seconds: dict[str, list[float]] = {"mlx-vlm-mini": [], "mlx-vlm": []}
    with tempfile.TemporaryDirectory() as temporary:
        tokens = prepare(Path(temporary), options.side, options.blocks)
        own = [sys.executable, __file__, "--child", temporary, "--blocks", str(options.blocks)]
        commands = {"mlx-vlm-mini": own}
        if options.peer is not None:
            commands["mlx-vlm"] = [options.peer, "-c", PEER, temporary, str(options.blocks)]
        for number in range(options.rounds):
            for who, command in commands.items():
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                seconds[who].append(json.loads(done.stdout.splitlines()[-1]))
                print(f"round {number + 1}, {who}: {seconds[who][-1]:.2f} s", file=sys.stderr, flush=True)
        if options.peer is not None:
            import mlx.core as mx

            one, other = (mx.load(f"{temporary}/{name}.safetensors")["features"] for name in ("found", "peer"))
            print(f"largest difference of features {float(mx.abs(one - other).max()):.1e}, of {tokens} tokens")
    for who, found in seconds.items():
        if found:
            print(
                f"{who:<14} {median(found):6.2f} s for {options.blocks} blocks ({min(found):.2f} to {max(found):.2f})"
            )


if __name__ == "__main__":
    main()
