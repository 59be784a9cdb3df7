"""Memory and time to read an image of 896 pixels (4096 tokens) into PaliGemma 2's decoder.

    python benchmarks/prefill_memory.py [3b|10b|28b] [--layers 2]

The layers have the published width and random weights; there are few of them, for each adds nothing to the peak but its
weights and its part of the cache. The vocabulary is small for the same reason. float32 on a CPU, bfloat16 on a GPU.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent / "tests" / name) for name in ("support", "golden")]

from mlx_vlm_mini.layers.cpu.blas import use_openblas

use_openblas()  # before anything imports mlx

import mlx.core as mx
from published import CONFIGS

from mlx_vlm_mini.decoder.decoder import Decoder
from mlx_vlm_mini.decoder.masks import Prefix
from mlx_vlm_mini.decoder.reading import Reading
from mlx_vlm_mini.families import find_family
from mlx_vlm_mini.generation.decode import prefill


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="3b", choices=["3b", "10b", "28b"])
    parser.add_argument("--layers", type=int, default=2)
    options = parser.parse_args()
    hf = CONFIGS[f"google/paligemma2-{options.model}-pt-896"]
    whole = find_family(hf).config(hf)
    layers = options.layers
    decoder = Decoder(
        replace(
            whole.decoder, num_hidden_layers=layers, layer_types=whole.decoder.layer_types[:layers], vocab_size=1024
        )
    )
    dtype = mx.bfloat16 if mx.default_device().type == mx.DeviceType.gpu else mx.float32
    decoder.set_dtype(dtype)
    mx.eval(decoder.parameters())
    length = whole.vision.num_features + 16
    embeddings = mx.random.normal((1, length, whole.decoder.hidden_size)).astype(dtype)
    mx.eval(embeddings)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    start = time.perf_counter()
    mx.eval(prefill(decoder, Reading(embeddings, Prefix(length)), decoder.make_state()))
    seconds = time.perf_counter() - start
    scores = whole.decoder.num_attention_heads * length**2 * dtype.size
    print(
        f"paligemma2-{options.model} at 896: {length} tokens, {layers} layers, {dtype}: {seconds:.1f} s, "
        f"{(mx.get_peak_memory() - before) / 1e9:.2f} GB above weights and embeddings "
        f"(one layer's scores: {scores / 1e9:.2f} GB)"
    )


if __name__ == "__main__":
    main()
