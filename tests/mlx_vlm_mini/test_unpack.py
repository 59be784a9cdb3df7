"""Quantized layers on a CPU: unpacked, once or for each product, they give what packed ones give."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from checkpoints import PHOTO
from quantized import load_packed

from mlx_vlm_mini import load
from mlx_vlm_mini.convert import convert
from mlx_vlm_mini.layers import memory
from mlx_vlm_mini.layers.cpu import unpack


@pytest.mark.parametrize("free", [1 << 40, 0])
@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_unpacked_models_answer_as_packed_ones(wide, tmp_path, monkeypatch, free, mode):
    convert(wide, tmp_path / "out", bits=4, mode=mode, group_size=32, part_bits={"vision": 4})
    packed = load_packed(tmp_path / "out")
    monkeypatch.setattr(memory, "free_memory", lambda: free)
    model, processor = load(tmp_path / "out")
    kinds = {type(layer) for _, layer in model.named_modules()}
    assert (unpack.UnpackingLinear in kinds) == (free == 0) and nn.QuantizedLinear not in kinds
    inputs = processor([PHOTO, "What is it?"])
    np.testing.assert_allclose(model(inputs), packed(inputs), atol=2e-5)


def test_a_tied_head_is_unpacked_with_the_embeddings_and_others_stay_packed():
    layer = nn.QuantizedEmbedding(96, 64, 32, 4)
    holder = nn.Module()
    holder.embed_tokens, holder.lin = layer, nn.QuantizedLinear(64, 32, True, 32, 4)
    x = mx.random.normal((3, 64))
    head, product = layer.as_linear(x), holder.lin(x)
    unpack.unpack(holder, mx.float32)
    assert holder.embed_tokens is layer and type(holder.lin) is nn.Linear
    np.testing.assert_allclose(holder.lin(x), product, atol=1e-5)
    unpack.unpack(holder, mx.float32, embeddings=True)
    assert type(holder.embed_tokens) is nn.Embedding
    np.testing.assert_allclose(holder.embed_tokens.as_linear(x), head, atol=1e-5)
    ids = mx.array([[5, 95]])
    np.testing.assert_allclose(holder.embed_tokens(ids), layer(ids), atol=1e-6)


def test_free_memory_is_the_systems(monkeypatch):
    assert 1 << 20 < memory.free_memory() < 1 << 50
    monkeypatch.setattr(memory, "_memory_lines", lambda: iter(["MemTotal: 9 kB", "MemAvailable:  12 kB"]))
    assert memory.free_memory() == 12 * 1024
