"""An estimate, for lack of a Mac: tokens a second that the memory of Apple's chips allows at most.

    python benchmarks/metal.py [--context 600]

Every token of an answer reads all weights of the decoder once, its head included, and all keys and values before it.
Bandwidth divided by these bytes is a ceiling, not a forecast: nothing here was measured on a Mac. Bandwidths are
Apple's figures. Affine quantization of groups of 64 adds half a bit a weight (a scale and a bias of 16 bits); norms
and biases stay at 16 bits, as do keys and values. What a Mac reaches is measured there by

    mlx-vlm-mini bench MODEL --bandwidth GB/S
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent.parent / "tests" / name) for name in ("support", "golden")]

from mlx.utils import tree_flatten
from published import CONFIGS

from mlx_vlm_mini.families import find_family
from mlx_vlm_mini.model import VLM

GB_PER_S = {
    "M1": 68, "M2": 100, "M3": 100, "M4": 120, "M3 Pro": 150, "M1 Pro": 200, "M4 Pro": 273, "M1 Max": 400,
    "M4 Max": 546, "M1 Ultra": 800, "M3 Ultra": 819,
}  # fmt: skip
MODELS = {
    "HuggingFaceTB/SmolVLM-256M-Instruct": (16,),
    "Qwen/Qwen2-VL-2B-Instruct": (4, 8, 16),
    "Qwen/Qwen2.5-VL-7B-Instruct": (4,),
    "llava-hf/llava-1.5-7b-hf": (4, 8, 16),
    "google/gemma-3-12b-it": (4,),
}


def bytes_read(hf: dict[str, Any], bits: int, context: int) -> int:
    """Bytes that a token reads: weights, and keys and values of `context` tokens before it."""
    config = find_family(hf).config(hf).decoder
    model = VLM(find_family(hf).config(hf))  # arrays that are never computed
    total = 0.0
    for name, array in tree_flatten(model.decoder.parameters()):
        if name.startswith("embed_tokens") and not config.tie_word_embeddings:
            continue
        total += array.size * ((bits + 0.5 if bits < 16 else 16) if array.ndim > 1 else 16) / 8
    return int(total + 4 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers * context)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=600)
    options = parser.parse_args()
    print(
        f"Estimate from bytes and Apple's bandwidths, not measured: tokens/s at most, behind {options.context} tokens\n"
    )
    print(f"| model | GB a token | {' | '.join(f'{chip}, {rate} GB/s' for chip, rate in GB_PER_S.items())} |")
    print("|---" * (len(GB_PER_S) + 2) + "|")
    for name, each in MODELS.items():
        for bits in each:
            read = bytes_read(CONFIGS[name], bits, options.context) / 1e9
            kind = "bf16" if bits == 16 else f"{bits}-bit"
            cells = " | ".join(f"{rate / read:.0f}" for rate in GB_PER_S.values())
            print(f"| {name.partition('/')[2]}, {kind} | {read:.2f} | {cells} |")


if __name__ == "__main__":
    main()
