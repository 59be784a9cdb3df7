"""Products with single rows in blocks: those of the whole, where they are done, and in whom."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_vlm_mini.layers import kernels
from mlx_vlm_mini.layers.cpu import rows
from mlx_vlm_mini.layers.cpu.rows import BlockedEmbedding, BlockedLinear, block_height, block_rows


@pytest.mark.parametrize(
    ("shape", "height"),
    [
        ((4096, 4096), 128), ((11008, 4096), 172), ((4096, 11008), 64), ((768, 2048), 384), ((2048, 768), 0),
        ((32064, 4096), 192), ((512, 1024), 0), ((151936, 1536), 585),
    ],
)  # fmt: skip
def test_blocks_are_as_large_as_openblas_reads_in_place(shape, height):
    """Equal ones where that is possible, of no narrow weight and no small one."""
    rows_, columns = shape
    assert block_height(rows_, columns) == height
    assert not height or rows.LEAST <= height * columns <= rows.MOST


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.plain = nn.Linear(1024, 2048), nn.Linear(1024, 2048, bias=False)
        self.small, self.embed_tokens = nn.Linear(64, 64), nn.Embedding(2048, 1024)
        self.half = nn.Linear(1024, 2048)
        self.half.set_dtype(mx.float16)
        self.layers = [nn.Linear(1024, 1031)]  # a prime: the last block is smaller


def test_how_many_rows_are_few_depends_on_the_processor(monkeypatch):
    for name, few in (("SkylakeX", 16), ("Zen", 3), ("", 3)):
        rows.few_rows.cache_clear()
        monkeypatch.setattr(rows, "core_name", lambda name=name: name)
        assert rows.few_rows() == few
    rows.few_rows.cache_clear()


@pytest.mark.parametrize("length", [1, 2, 5, 16, 17])
def test_blocked_products_are_those_of_the_whole(length, monkeypatch):
    monkeypatch.setattr(rows, "few_rows", lambda: 16)
    mx.random.seed(0)
    part, x = Part(), mx.random.normal((1, length, 1024))
    part.wide.bias = mx.random.normal((2048,))

    def products():
        layers = part.wide, part.plain, part.layers[0], part.embed_tokens.as_linear
        return [np.array(layer(x)) for layer in layers] + [np.array(part.embed_tokens(mx.array([[3, 5]])))]

    before, names = products(), {name for name, _ in part.named_modules()}
    block_rows(part)
    assert {name for name, _ in part.named_modules()} == names
    kinds = [type(each) for each in (part.wide, part.plain, part.layers[0], part.embed_tokens, part.small, part.half)]
    assert kinds == [BlockedLinear, BlockedLinear, BlockedLinear, BlockedEmbedding, nn.Linear, nn.Linear]
    for ours, whole in zip(products(), before, strict=True):
        np.testing.assert_allclose(ours, whole, atol=1e-4)
    ours, theirs = (
        mx.grad(lambda x, layer=layer: mx.sin(layer(x)).sum())(x)
        for layer in (part.wide, lambda x: x @ part.wide.weight.T + part.wide.bias)
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_nothing_is_blocked_where_mlx_is_fast():
    part = Part()
    kernels.MLX.prepare(part, part, mx.float32, False)
    assert type(part.wide) is nn.Linear
    kernels.CPU.prepare(part, part, mx.float32, False)
    assert type(part.wide) is BlockedLinear
