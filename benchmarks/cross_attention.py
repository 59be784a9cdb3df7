"""What an image costs each token that Llama 3.2 Vision says: decoding with images and without, at the 11B's shapes.

    python benchmarks/cross_attention.py [--layers 8] [--steps 12] [--text 64]

The decoder's first layers, of which one in five, from the fourth on, looks at images, and its head, at full width;
float32 on a CPU, bfloat16 on a GPU. Layers of a kind share random weights: 0.9 GB in float32, which no cache of a
processor keeps, so that each is read from memory all the same. Cases take turns, a token each, so that whatever else
runs meets all of them; the figure is the median. Text alone skips the layers that look at images, whose weights are
then not read: the ratio that weights alone give stands beside the measured one. The last case is a decoder of as many
layers that all read text.
"""

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

sys.path[:0] = [str(Path(__file__).parent.parent / "tests" / name) for name in ("support", "golden")]

from mlx_vlm_mini.layers.cpu.blas import use_openblas

use_openblas()  # before anything imports mlx

import mlx.core as mx
from mlx.utils import tree_flatten
from published import CONFIGS

from mlx_vlm_mini.decoder.cross_attention import Span
from mlx_vlm_mini.decoder.decoder import Decoder
from mlx_vlm_mini.decoder.reading import Memory, Reading
from mlx_vlm_mini.decoder.state import State
from mlx_vlm_mini.families import mllama
from mlx_vlm_mini.generation.decode import prefill

IMAGES = {"text alone": (), "an image of one tile": (1,), "of four tiles": (4,), "three of four tiles": (4, 4, 4)}
PATCHES = 1601  # of a tile


def make_decoder(kinds: tuple[Any, ...], dtype: mx.Dtype, shared: dict[str, Any]) -> Decoder:
    """The 11B model's decoder with layers of these kinds, all of a kind being one."""
    whole = mllama.config(CONFIGS["meta-llama/Llama-3.2-11B-Vision-Instruct"]).decoder
    cross = whole.cross_attention if "cross_attention" in kinds else None
    decoder = Decoder(replace(whole, num_hidden_layers=len(kinds), layer_types=kinds, cross_attention=cross))
    decoder.embed_tokens = None  # embeddings are drawn
    for number, kind in enumerate(kinds):
        decoder.layers[number] = shared.setdefault(kind, decoder.layers[number])
    decoder.lm_head = shared.setdefault("head", decoder.lm_head)
    decoder.set_dtype(dtype)
    mx.eval(decoder.parameters())
    return decoder


def count(*modules: Any) -> int:
    return sum(int(array.size) for module in modules for _, array in tree_flatten(module.parameters()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--text", type=int, default=64, help="tokens of the prompt")
    options = parser.parse_args()
    dtype = mx.bfloat16 if mx.default_device().type == mx.DeviceType.gpu else mx.float32
    shared: dict[str, Any] = {}
    kinds = tuple("cross_attention" if number % 5 == 3 else "full_attention" for number in range(options.layers))
    decoder = make_decoder(kinds, dtype, shared)
    plain = make_decoder(("full_attention",) * options.layers, dtype, shared)
    size = decoder.config.hidden_size
    prompt, token = (Reading(mx.random.normal((1, length, size)).astype(dtype)) for length in (options.text, 1))

    states: dict[str, tuple[Decoder, State]] = {}
    for name, tiles in IMAGES.items():
        state, counts = decoder.make_state(), [each * PATCHES for each in tiles]
        # beside one another, so that all are seen to the end
        spans = tuple(Span(place, count, count) for place, count in enumerate(counts))
        memory = Memory(mx.random.normal((sum(counts), size)).astype(dtype), spans) if spans else None
        mx.eval(prefill(decoder, replace(prompt, memory=memory), state))
        states[name] = decoder, state
    text = plain.make_state()
    mx.eval(prefill(plain, prompt, text))
    states["text alone, all layers read text"] = plain, text

    times: dict[str, list[float]] = {name: [] for name in states}
    load = os.getloadavg()[0]
    for step in range(options.steps + 1):
        for name, (own, state) in states.items():
            start = time.perf_counter()
            mx.eval(own.logits(own(token, state)))
            if step:
                times[name].append(time.perf_counter() - start)

    cross, reads = shared["cross_attention"], shared["full_attention"]
    looked = count(cross) - count(cross.cross_attn.k_proj, cross.cross_attn.v_proj)
    used = {
        "text alone": count(reads) * kinds.count("full_attention"),
        "text alone, all layers read text": count(reads) * options.layers,
    }
    with_image = count(reads) * kinds.count("full_attention") + looked * kinds.count("cross_attention")
    print(
        f"{options.layers} layers, {kinds.count('cross_attention')} of which look at images, and the head; "
        f"{options.text} tokens of text; {dtype}; load {load:.1f} to {os.getloadavg()[0]:.1f}"
    )
    base, least = median(times["text alone"]), used["text alone"] + count(shared["head"])
    for name, taken in times.items():
        weights = used.get(name, with_image) + count(shared["head"])
        print(
            f"{name:34} {1000 * median(taken):7.1f} ms a token, ratio {median(taken) / base:.3f} "
            f"(by weights alone {weights / least:.3f}; fastest {1000 * min(taken):.1f} ms, ratio "
            f"{min(taken) / min(times['text alone']):.3f})"
        )
    head = count(shared["head"])
    print(
        "the whole model, 32 layers that read text and 8 that look at images, by weights alone: "
        f"{(32 * count(reads) + 8 * looked + head) / (32 * count(reads) + head):.3f}"
    )


if __name__ == "__main__":
    main()
