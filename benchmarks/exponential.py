"""Attention on a CPU, with mlx_vlm_mini/layers/cpu/exponential.py and as MLX computes it, in turns in one process.

python benchmarks/exponential.py
"""

import time
from collections.abc import Callable
from statistics import median

from mlx_vlm_mini.layers.cpu.blas import use_openblas

use_openblas()

import mlx.core as mx

from mlx_vlm_mini.layers.attention import attend

SHAPES = {  # batch, heads, heads of keys, length, head_dim, mask
    "CLIP ViT-B/14 at 336 pixels": (1, 12, 12, 577, 64, None),
    "decoder, prompt of 589 tokens": (1, 12, 12, 589, 64, "causal"),
    "decoder, 16 dialogues of 288 tokens": (16, 4, 2, 288, 64, "causal"),
}


def seconds(compute: Callable[[], mx.array]) -> float:
    start = time.perf_counter()
    mx.eval(compute())
    return time.perf_counter() - start


def main() -> None:
    print("| shapes | pass | MLX's, ms | ours, ms | ratio |\n|---|---|---|---|---|")
    for name, (B, H, shared, L, D, mask) in SHAPES.items():
        q, k, v = (mx.random.normal((B, heads, L, D)) for heads in (H, shared, shared))
        mx.eval(q, k, v)
        ways = [
            lambda q, mask=mask, k=k, v=v: mx.fast.scaled_dot_product_attention(q, k, v, scale=0.125, mask=mask),
            lambda q, mask=mask, k=k, v=v: attend(q, k, v, scale=0.125, mask=mask),
        ]
        for what in ("forward", "and backward"):
            done = ways if what == "forward" else [mx.grad(lambda q, way=way: (way(q) ** 2).sum()) for way in ways]
            pairs = [[seconds(lambda way=way, q=q: way(q)) for way in done] for _ in range(12)][2:]
            theirs, ours = (median(times) * 1000 for times in zip(*pairs, strict=True))
            ratio = median(their / our for their, our in pairs)
            print(f"| {name} | {what} | {theirs:.0f} | {ours:.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
