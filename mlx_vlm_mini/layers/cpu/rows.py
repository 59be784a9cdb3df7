"""Products with a single row on a CPU, as every token of an answer needs them.

OpenBLAS copies a large matrix before it multiplies it, which costs as much as the product with one row itself, and
reads a small one where it lies. So such a product is done in blocks of the weight's rows: 1.3 to 3 times faster.
"""

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from . import exponential

MOST = 900_000  # numbers of a block: above 1,000,000 it is copied
LEAST = 270_000  # below 262,144 OpenBLAS leaves its other threads out, and blocks cost more than they spare
NARROW = 1024  # columns, below which nothing is gained


def block_height(rows: int, columns: int) -> int:
    """How many rows a block of a weight has: if possible so many that no block is smaller; 0 where none are made."""
    if columns < NARROW or rows * columns <= MOST:
        return 0
    highest, lowest = MOST // columns, -(-LEAST // columns)
    return next((height for height in range(highest, lowest - 1, -1) if rows % height == 0), highest)


def _product(x: mx.array, weight: mx.array) -> mx.array:
    """x W^T of a single row, float[..., 1, in] -> float[..., 1, out]."""
    rows, columns = weight.shape
    height = block_height(rows, columns)
    whole = rows - rows % height
    row = x if x.ndim == 3 else x.reshape(1, 1, columns)
    blocks = (weight if whole == rows else weight[:whole]).reshape(-1, height, columns)
    product = (row @ blocks.swapaxes(-1, -2)).reshape(*x.shape[:-1], whole)
    if whole < rows:
        product = mx.concatenate([product, x @ weight[whole:].T], axis=-1)
    return product


class BlockedLinear(nn.Linear):
    """A layer whose product with a single row is done in blocks."""

    def __call__(self, x: mx.array) -> mx.array:
        if x.size != x.shape[-1]:
            return super().__call__(x)
        product = _product(x, self.weight)
        return product + self.bias if "bias" in self else product


class BlockedEmbedding(nn.Embedding):
    """Embeddings that are the head, too."""

    def as_linear(self, x: mx.array) -> mx.array:
        return _product(x, self.weight) if x.size == x.shape[-1] else super().as_linear(x)


def block_rows(decoder: nn.Module) -> None:
    """Make a decoder's products with single rows fast, where MLX computes them in OpenBLAS: in float32 on a CPU that is
    not Apple's."""
    if not exponential.is_slow():
        return
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
