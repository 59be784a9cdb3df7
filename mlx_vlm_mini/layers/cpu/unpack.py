"""Quantized layers on a CPU, where MLX multiplies packed weights slowly.

A product with one row takes 2 to 3 times as long as with floats, one with many rows 40 times, by the processor's time;
unpacking costs as much as four rows. So a model's layers are unpacked once, where memory allows it, and otherwise for
each product of several rows. On a GPU packed weights are the faster ones, and stay.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_vlm_mini.layers import memory

ROWS = 4  # from which on a product is faster with unpacked weights
SHARE = 0.5  # of the free memory that unpacked weights may take


class UnpackingLinear(nn.QuantizedLinear):
    """A layer whose weights stay packed, and are unpacked for each product of several rows."""

    def __call__(self, x: mx.array) -> mx.array:
        if x.size < ROWS * x.shape[-1]:
            return super().__call__(x)
        product = x @ _floats(self, x.dtype).T
        return product + self.bias if "bias" in self else product


def _floats(layer: nn.Module, dtype: mx.Dtype) -> mx.array:
    """A quantized layer's weights."""
    settings = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
    return mx.dequantize(layer.weight, layer.scales, layer.get("biases"), **settings).astype(dtype)


def unpack(module: nn.Module, dtype: mx.Dtype, *, embeddings: bool = False) -> None:
    """Replace quantized linear layers by unpacked ones, and embeddings where these are a head, too: otherwise a token
    reads one row of them."""
    for path, layer in _packed(module, embeddings):
        plain = nn.Linear(1, 1, bias=False) if isinstance(layer, nn.QuantizedLinear) else nn.Embedding(1, 1)
        plain.weight = _floats(layer, dtype)
        mx.eval(plain.weight)  # one after the other, so that no more than a layer is there twice
        if "bias" in layer:
            plain.bias = layer.bias
        module.update_modules(tree_unflatten([(path, plain)]))


def _packed(module: nn.Module, embeddings: bool) -> list[tuple[str, Any]]:
    return [
        (path, layer)
        for path, layer in module.named_modules()
        if isinstance(layer, nn.QuantizedLinear)
        or (embeddings and isinstance(layer, nn.QuantizedEmbedding) and path.endswith("embed_tokens"))
    ]


def unpack_for_cpu(model: nn.Module, dtype: mx.Dtype, *, tied: bool) -> None:
    """Make a loaded model's quantized layers fast on a CPU. `tied`: its embeddings are its head."""
    layers = [layer for _, layer in _packed(model, tied)]
    if sum(layer.weight.size * 32 // layer.bits for layer in layers) * dtype.size <= SHARE * memory.free_memory():
        unpack(model, dtype, embeddings=tied)
        return
    for layer in layers:
        if isinstance(layer, nn.QuantizedLinear):
            layer.__class__ = UnpackingLinear
