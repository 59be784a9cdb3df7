"""Attention on a CPU: the exponential made of sums and products, in tiles, queries in blocks, against MLX's own."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_mini.borrow import borrow
from mlx_vlm_mini.decoder.rope import LongRoPE, RoPE
from mlx_vlm_mini.layers import attention
from mlx_vlm_mini.layers.activation import ACTIVATIONS
from mlx_vlm_mini.layers.attention import attend
from mlx_vlm_mini.layers.cpu import exponential, tiles
from mlx_vlm_mini.layers.rotary import Turn, turn_once


def test_the_power_is_the_power():
    t = np.linspace(-126, 126, 200_001, dtype=np.float32)
    exact = np.exp2(t.astype(np.float64))
    error = np.abs(np.array(exponential.power(mx.array(t))) / exponential.ONE / exact - 1)
    assert error.max() < 5e-7
    assert np.all(np.array(exponential.power(mx.array([-127.0, -1e30, -mx.inf]))) / exponential.ONE < 2e-38)
    ours, theirs = (
        mx.grad(lambda t, of=of: of(t).sum())(mx.array(t))
        for of in (lambda t: exponential.power(t) / exponential.ONE, lambda t: mx.power(2.0, t))
    )
    np.testing.assert_allclose(ours, theirs, rtol=2e-5)


def test_the_sigmoid_is_the_sigmoid():
    x = mx.concatenate([mx.linspace(-30, 30, 20_001), mx.array([-1e30, -200.0, 200.0, 1e30])])
    np.testing.assert_allclose(exponential.sigmoid(x, 1.5), mx.sigmoid(1.5 * x), atol=1e-6)
    ours, theirs = (
        mx.grad(lambda x, sigmoid=sigmoid: sigmoid(x).sum())(x)
        for sigmoid in (lambda x: exponential.sigmoid(x, 1.5), lambda x: mx.sigmoid(1.5 * x))
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("size", [7, 2_560, 32_000, 152_000])
def test_log_softmax_is_exact(size, slow, monkeypatch):
    """Rows as wide as vocabularies are, against float64."""
    monkeypatch.setattr(exponential, "is_slow", lambda: slow)
    logits = np.random.default_rng(size).normal(size=(3, size)).astype(np.float32)
    logits[:, 5] = [9, 11, -np.inf]
    highest = logits.max(axis=-1, keepdims=True).astype(np.float64)
    exact = logits - highest - np.log(np.exp(logits - highest).sum(axis=-1, keepdims=True))
    np.testing.assert_allclose(exponential.log_softmax(mx.array(logits)), exact, atol=2e-6, rtol=0)
    assert exponential.log_softmax(mx.array(logits, dtype=mx.bfloat16)).dtype == mx.float32


def test_a_row_that_sees_nothing_sees_all_alike():
    """As padding does."""
    mx.random.seed(0)
    q, k, v = (mx.random.normal((1, 2, 9, 8)) for _ in range(3))
    seen = mx.random.uniform(shape=(9, 9)) < 0.5
    seen[4] = False
    np.testing.assert_allclose(attend(q, k, v, scale=1.0, mask=seen)[:, :, 4], v.mean(axis=2), atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 5000, 1 << 18])
@pytest.mark.parametrize("mask", ["causal", "none", "window", "batch"])
@pytest.mark.parametrize(("heads", "shared", "cached"), [(4, 4, 0), (6, 2, 9), (4, 1, 3)])
def test_attention_in_tiles_is_attention(monkeypatch, chunk, mask, heads, shared, cached):
    monkeypatch.setattr(exponential, "CHUNK", chunk)
    monkeypatch.setattr(exponential, "is_slow", lambda: True)
    mx.random.seed(1)
    B, L, D = 3, 17, 8
    S = L + cached
    q, k, v = (mx.random.normal((B, n, length, D)) for n, length in ((heads, L), (shared, S), (shared, S)))
    seen = {
        "causal": "causal",
        "none": None,
        "window": (mx.arange(S) <= mx.arange(cached, S)[:, None]) & (mx.arange(S) > mx.arange(cached, S)[:, None] - 4),
        "batch": mx.random.uniform(shape=(B, 1, L, S)) < 0.7,
    }[mask]
    ours = attend(q, k, v, scale=D**-0.5, mask=seen)
    theirs = mx.fast.scaled_dot_product_attention(q, k, v, scale=D**-0.5, mask=seen)
    np.testing.assert_allclose(ours, theirs, atol=3e-6)
    explicit: list[mx.array] = []
    np.testing.assert_allclose(attend(q, k, v, scale=D**-0.5, mask=seen, attentions=explicit), theirs, atol=3e-6)
    assert explicit[0].shape == (B, heads, L, S)


def test_one_token_behind_many_goes_through_tiles(monkeypatch):
    monkeypatch.setattr(exponential, "is_slow", lambda: True)
    mx.random.seed(2)
    q, k, v = mx.random.normal((1, 6, 1, 8)), mx.random.normal((1, 2, 1100, 8)), mx.random.normal((1, 2, 1100, 8))
    seen = mx.arange(1100)[None] > 300
    for mask in (None, "causal", seen):
        theirs = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.5, mask=mask)
        np.testing.assert_allclose(attend(q, k, v, scale=0.5, mask=mask), theirs, atol=3e-6)
        with monkeypatch.context() as without:
            without.setattr(mx.fast, "scaled_dot_product_attention", None)
            attend(q, k, v, scale=0.5, mask=mask)


def test_one_token_and_half_precision_take_mlxs_own(monkeypatch):
    monkeypatch.setattr(exponential, "power", None)
    monkeypatch.setattr(exponential, "is_slow", lambda: True)
    one = mx.random.normal((1, 2, 1, 8))
    attend(one, one, one, scale=1.0)
    half = mx.random.normal((1, 2, 6, 8)).astype(mx.float16)
    assert attend(half, half, half, scale=1.0, mask="causal").dtype == mx.float16


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("mask", [None, "causal", "rows", "batch"])
def test_attention_in_blocks_of_queries_is_attention(mask, softcap, slow, monkeypatch):
    """With gradients; the last block is smaller than the others."""
    mx.random.seed(0)
    queries, keys, values = (mx.random.normal(shape) for shape in ((2, 4, 11, 6), (2, 2, 15, 6), (2, 2, 15, 6)))
    seen = mx.random.uniform(shape=(2, 1, 11, 15)) < 0.7
    given = {"rows": seen[0, 0], "batch": seen}.get(mask, mask)

    def attended(queries):
        return attend(queries, keys, values, scale=0.4, softcap=softcap, mask=given)

    def both():
        return np.array(attended(queries)), np.array(mx.grad(lambda queries: mx.sin(attended(queries)).sum())(queries))

    monkeypatch.setattr(exponential, "is_slow", lambda: False)
    whole = both()
    monkeypatch.setattr(exponential, "is_slow", lambda: slow)
    for rows in (3, 5, 10):
        monkeypatch.setattr(attention, "BLOCK", 2 * 4 * 15 * rows)
        for expected, blocks in zip(whole, both(), strict=True):
            np.testing.assert_allclose(blocks, expected, atol=1e-5)


@pytest.mark.parametrize("mask", [None, "causal"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attention_holds_one_block_of_scores_at_a_time(softcap, mask, monkeypatch):
    monkeypatch.setattr(exponential, "is_slow", lambda: True)
    keys = mx.random.normal((1, 8, 2000, 4))
    mx.eval(keys)

    def peak():
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(attend(keys, keys, keys, scale=1.0, softcap=softcap, mask=mask))
        return mx.get_peak_memory() - before

    def limit(scores):
        monkeypatch.setattr(attention, "BLOCK", scores)
        monkeypatch.setattr(exponential, "CHUNK", scores)

    scores = 4 * 8 * 2000**2  # bytes
    monkeypatch.setattr(tiles, "CAUSAL_ROWS", 2000)
    limit(2**30)
    assert peak() > scores
    limit(2**17)
    assert peak() < scores / 4


@pytest.mark.parametrize("name", ["silu", "quick_gelu", "gelu_pytorch_tanh", "gelu"])
@pytest.mark.parametrize("slow", [True, False])
def test_activations_and_their_gradients_are_mlxs(monkeypatch, name, slow):
    monkeypatch.setattr(exponential, "is_slow", lambda: slow)
    monkeypatch.setattr(exponential, "FEW", 0)
    monkeypatch.setattr(exponential, "CHUNK", 3000)
    plain = {
        "silu": lambda x: x * mx.sigmoid(x),
        "quick_gelu": lambda x: x * mx.sigmoid(1.702 * x),
        "gelu_pytorch_tanh": lambda x: 0.5 * x * (1 + mx.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))),
        "gelu": lambda x: x * (1 + mx.erf(x * 0.5**0.5)) / 2,
    }[name]
    x = mx.concatenate([mx.linspace(-12, 12, 4001), mx.array([-200.0, -1e30, 1e30, 0.0])])
    np.testing.assert_allclose(ACTIVATIONS[name](x), plain(x), rtol=2e-6, atol=2e-6)
    x = x[:4001]
    ours, theirs = (mx.grad(lambda x, act=act: act(x).sum())(x) for act in (ACTIVATIONS[name], plain))
    np.testing.assert_allclose(ours, theirs, atol=5e-6)
    assert np.isnan(ACTIVATIONS[name](mx.array([np.nan])).item())


def test_angles_computed_once_turn_as_the_rope_itself():
    scaling = {
        "original_max_position_embeddings": 30,
        "factor": 4.0,
        "short_factor": [1.1] * 8,
        "long_factor": [3.0] * 8,
    }
    yarn = borrow("models.rope_utils").YarnRoPE(16, scaling_factor=4.0)
    for rope in (
        RoPE(16, 1e4),
        RoPE(16, 1e6, stretch=4),
        RoPE(16, 1e4, growth=(2, 30)),
        LongRoPE(16, 1e4, scaling, 120),
        yarn,
    ):
        for offset, length in ((0, 9), (20, 10), (25, 10), (2000, 1)):
            x = mx.random.normal((1, 2, length, 16))
            turn = turn_once(rope, offset, length)
            assert isinstance(turn, Turn)
            np.testing.assert_allclose(turn(x), rope(mx.array(x), offset=offset), atol=2e-6)
    unknown = object()
    assert turn_once(unknown, 0, 1) is unknown
