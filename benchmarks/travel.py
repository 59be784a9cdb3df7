"""Whether folders travel between this project and mlx-vlm: both read the other's, and give the same logits.

python benchmarks/travel.py PEERS_PYTHON [--write]

PEERS_PYTHON is the interpreter of a virtual environment with mlx-vlm (1.1 GB, so no part of the test suite):
`python3 -m venv peer && peer/bin/pip install mlx-vlm==0.7.10 'mlx[cpu]'`. `--write` keeps in tests/golden/peer.json
what the peer expects of a folder: the names and shapes of its tensors, which the suite compares with what is written
here.

Models: LLaVA-1.5 and PaliGemma 1, random and small, in float32 as the peer computes on a CPU. The peer's processors are
left out (that of LLaVA fails with the newest transformers): both get the same token ids and pixels.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT / "tests" / "golden")]
LOADS = """
import json, sys; from importlib.metadata import version; from pathlib import Path
import mlx.core as mx; from mlx.utils import tree_flatten; from mlx_vlm.utils import load_model
model = load_model(Path(sys.argv[1]))
inputs = mx.load(sys.argv[2])
# PaliGemma's takes the padding's mask here, LLaVA's the attention's own.
mask = mx.ones(inputs["input_ids"].shape) if model.config.model_type == "paligemma" else None
logits = model(inputs["input_ids"], inputs["pixel_values"], mask=mask).logits
mx.savez(sys.argv[3], logits=logits.astype(mx.float32))
shapes = {name: array.shape for name, array in tree_flatten(model.parameters())}
print(json.dumps({"versions": {name: version(name) for name in ("mlx-vlm", "mlx", "transformers")}, "shapes": shapes}))
"""
CONVERTS = """
import sys; from mlx_vlm.convert import convert
quantized = {"quantize": True, "q_bits": 4, "q_group_size": 32} if sys.argv[3] == "4 bits" else {}
convert(sys.argv[1], sys.argv[2], dtype="float32", **quantized)
"""
SAVES = """
import sys; from pathlib import Path; import mlx.core as mx; import mlx.nn as nn
from mlx_vlm.utils import load_model, load_config, save_weights, save_config
from mlx_vlm.quant_utils import quantize_model
from mlx.utils import tree_map
model, config = load_model(Path(sys.argv[1]), lazy=True), load_config(Path(sys.argv[1]))
model.update(tree_map(lambda array: array.astype(mx.float32), model.parameters()))
if sys.argv[3] == "4 bits":
    model, config = quantize_model(model, config, 32, 4, mode="affine")
save_weights(Path(sys.argv[2]), model)
save_config(config, Path(sys.argv[2]) / "config.json")
"""


def run(python: str, code: str, *arguments: object) -> str:
    done = subprocess.run([python, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


def logprobs(logits: mx.array) -> np.ndarray:
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


def main() -> None:
    import shutil

    from checkpoints import PHOTO, WAYS, WIDE, make_wide

    from mlx_vlm_mini import load
    from mlx_vlm_mini.convert import convert

    peer, expectations = sys.argv[1], {}
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        for name in WIDE:
            source = make_wide(name, work / name)
            for way, options in WAYS.items():
                folder = work / f"{name} {way}"
                convert(source, folder, dtype="float32", **options)
                model, processor = load(folder)
                inputs = processor("What is in this image?", [PHOTO])
                pixels = inputs.pixel_values.transpose(0, 3, 1, 2)
                mx.savez(str(work / "inputs.npz"), input_ids=inputs.input_ids, pixel_values=pixels)
                own = logprobs(model(inputs))
                said = json.loads(run(peer, LOADS, folder, work / "inputs.npz", work / "logits.npz"))
                theirs = logprobs(mx.load(str(work / "logits.npz"))["logits"])
                print(f"{name}, {way}, ours -> mlx-vlm: {np.abs(own - theirs).max():.1e}", flush=True)
                expectations[f"{name}, {way}"] = said["shapes"]
                if way not in ("float32", "4 bits"):
                    continue
                back = work / f"{name} {way} peer"
                how = "its convert"
                try:
                    run(peer, CONVERTS, source, back, way)
                except RuntimeError as error:
                    how = f"its load and save (its convert fails: {error})"
                    shutil.rmtree(back, ignore_errors=True)
                    run(peer, SAVES, source, back, way)
                    for file in source.glob("*.json"):
                        if not (back / file.name).exists():
                            shutil.copyfile(file, back / file.name)
                run(peer, LOADS, back, work / "inputs.npz", work / "logits.npz")
                theirs = logprobs(mx.load(str(work / "logits.npz"))["logits"])
                model, _ = load(back)
                print(f"{name}, {way}, mlx-vlm -> ours: {np.abs(logprobs(model(inputs)) - theirs).max():.1e}; {how}")
                again = convert(back, work / f"{name} {way} again", bits=8, group_size=32)
                print(f"{name}, {way}, its folder converted again: {again.preview.bits_per_weight:.2f} bits per weight")
    print(said["versions"])
    if "--write" in sys.argv:
        kept = {"versions": said["versions"], "shapes": expectations}
        file = ROOT / "tests" / "golden" / "peer.json"
        file.write_text(json.dumps(kept, separators=(",", ":")).replace('},"', '},\n"') + "\n")


if __name__ == "__main__":
    main()
