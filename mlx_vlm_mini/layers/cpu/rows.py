"""Products with few rows on a CPU, as every token of an answer or of a batch of answers needs them.

OpenBLAS copies a large matrix before it multiplies it, which costs as much as the product with one row itself, and
reads a small one where it lies. So such a product is done in blocks of the weight's rows: 1.3 to 3 times faster.
"""

from functools import cache

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from .blas import core_name

MOST = 900_000  # products of numbers a block: above 1,000,000 it is copied
LEAST = 270_000  # below 262,144 OpenBLAS leaves its other threads out, and blocks cost more than they spare
NARROW = 1024  # columns, below which nothing is gained
# Rows up to which blocks are faster, by OpenBLAS's name of the processor. Measured on Zen (OpenBLAS 0.3.21): 2 rows
# gain, 4 do not. It has kernels of its own for small products where there is AVX-512; those were not measured.
FEW = {"SkylakeX": 16, "Cooperlake": 16, "SapphireRapids": 16}
FEW_ELSEWHERE = 3


@cache
def few_rows() -> int:
    """How many rows a product may have to be done in blocks on this processor."""
    return FEW.get(core_name(), FEW_ELSEWHERE)


def block_height(rows: int, columns: int, count: int = 1) -> int:
    """How many rows a block of a weight has in a product with `count` rows: if possible so many that no block is
    smaller; 0 where none are made."""
    if columns < NARROW or rows * columns <= MOST:
        return 0
    highest, lowest = MOST // (columns * count), -(-LEAST // (columns * count))
    return next((height for height in range(highest, lowest - 1, -1) if rows % height == 0), highest)


def _product(x: mx.array, weight: mx.array) -> mx.array | None:
    """x W^T of few rows, float[..., in] -> float[..., out]; None where it is not worth blocks."""
    rows, columns = weight.shape
    count = x.size // columns
    height = block_height(rows, columns, count) if count <= few_rows() else 0
    if not height:
        return None
    whole = rows - rows % height
    blocks = (weight if whole == rows else weight[:whole]).reshape(-1, height, columns)
    few = x if x.ndim == 3 and len(x) == 1 else x.reshape(1, count, columns)
    product = few @ blocks.swapaxes(-1, -2)  # (blocks, count, height)
    product = product if count == 1 else product.swapaxes(0, 1)
    product = product.reshape(*x.shape[:-1], whole)
    if whole < rows:
        product = mx.concatenate([product, x @ weight[whole:].T], axis=-1)
    return product


class BlockedLinear(nn.Linear):
    """A layer whose product with few rows is done in blocks."""

    def __call__(self, x: mx.array) -> mx.array:
        product = _product(x, self.weight)
        if product is None:
            return super().__call__(x)
        return product + self.bias if "bias" in self else product


class BlockedEmbedding(nn.Embedding):
    """Embeddings that are the head, too."""

    def as_linear(self, x: mx.array) -> mx.array:
        product = _product(x, self.weight)
        return super().as_linear(x) if product is None else product


def block_rows(decoder: nn.Module) -> None:
    """Make a decoder's products with few rows fast, where OpenBLAS computes them: in float32."""
    for path, layer in decoder.named_modules():
        if type(layer) not in (nn.Linear, nn.Embedding) or layer.weight.dtype != mx.float32:
            continue
        if not block_height(*layer.weight.shape):
            continue
        blocked = BlockedLinear(1, 1, bias=False) if type(layer) is nn.Linear else BlockedEmbedding(1, 1)
        blocked.weight = layer.weight
        if "bias" in layer:
            blocked.bias = layer.bias
        decoder.update_modules(tree_unflatten([(path, blocked)]))
