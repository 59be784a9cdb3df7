"""Attention on a CPU: the exponential made of sums and products, in tiles, queries in blocks, against MLX's own."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from checkpoints import PHOTO, PLAIN

from mlx_vlm_mini.borrow import borrow
from mlx_vlm_mini.config import LayerShape, NormConfig, WindowConfig
from mlx_vlm_mini.decoder.decoder import Decoder
from mlx_vlm_mini.decoder.rope import make_rope
from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.families import llava as family
from mlx_vlm_mini.layers import attention, kernels
from mlx_vlm_mini.layers.angles import Turn
from mlx_vlm_mini.layers.attention import Attention, attend
from mlx_vlm_mini.layers.cpu import exponential, tiles


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


@pytest.mark.parametrize("size", [7, 2_560, 32_000, 152_000])
def test_log_softmax_is_exact(size, either_kernels):
    """Rows as wide as vocabularies are, against float64."""
    logits = np.random.default_rng(size).normal(size=(3, size)).astype(np.float32)
    logits[:, 5] = [9, 11, -np.inf]
    highest = logits.max(axis=-1, keepdims=True).astype(np.float64)
    exact = logits - highest - np.log(np.exp(logits - highest).sum(axis=-1, keepdims=True))
    np.testing.assert_allclose(either_kernels.log_softmax(mx.array(logits)), exact, atol=2e-6, rtol=0)
    assert either_kernels.log_softmax(mx.array(logits, dtype=mx.bfloat16)).dtype == mx.float32


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
def test_attention_in_tiles_is_attention(monkeypatch, cpu_kernels, chunk, mask, heads, shared, cached):
    monkeypatch.setattr(exponential, "CHUNK", chunk)
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


def test_one_token_behind_many_goes_through_tiles(monkeypatch, cpu_kernels):
    mx.random.seed(2)
    q, k, v = mx.random.normal((1, 6, 1, 8)), mx.random.normal((1, 2, 1100, 8)), mx.random.normal((1, 2, 1100, 8))
    seen = mx.arange(1100)[None] > 300
    for mask in (None, "causal", seen):
        theirs = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.5, mask=mask)
        np.testing.assert_allclose(attend(q, k, v, scale=0.5, mask=mask), theirs, atol=3e-6)
        with monkeypatch.context() as without:
            without.setattr(mx.fast, "scaled_dot_product_attention", None)
            attend(q, k, v, scale=0.5, mask=mask)


def test_one_token_and_half_precision_take_mlxs_own(monkeypatch, cpu_kernels):
    monkeypatch.setattr(exponential, "power", None)
    one = mx.random.normal((1, 2, 1, 8))
    attend(one, one, one, scale=1.0)
    half = mx.random.normal((1, 2, 6, 8)).astype(mx.float16)
    assert attend(half, half, half, scale=1.0, mask="causal").dtype == mx.float16


@pytest.mark.parametrize("table", [kernels.MLX, kernels.CPU], ids=["mac", "cpu"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("mask", [None, "causal", "rows", "batch"])
def test_attention_in_blocks_of_queries_is_attention(mask, softcap, table, monkeypatch):
    """With gradients; the last block is smaller than the others."""
    mx.random.seed(0)
    queries, keys, values = (mx.random.normal(shape) for shape in ((2, 4, 11, 6), (2, 2, 15, 6), (2, 2, 15, 6)))
    seen = mx.random.uniform(shape=(2, 1, 11, 15)) < 0.7
    given = {"rows": seen[0, 0], "batch": seen}.get(mask, mask)

    def attended(queries):
        return attend(queries, keys, values, scale=0.4, softcap=softcap, mask=given)

    def both():
        return np.array(attended(queries)), np.array(mx.grad(lambda queries: mx.sin(attended(queries)).sum())(queries))

    device = mx.default_device().type
    monkeypatch.setitem(kernels._chosen, device, kernels.MLX)
    whole = both()
    monkeypatch.setitem(kernels._chosen, device, table)
    for rows in (3, 5, 10):
        monkeypatch.setattr(attention, "BLOCK", 2 * 4 * 15 * rows)
        for expected, blocks in zip(whole, both(), strict=True):
            np.testing.assert_allclose(blocks, expected, atol=1e-5)


@pytest.mark.parametrize("mask", [None, "causal"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attention_holds_one_block_of_scores_at_a_time(softcap, mask, monkeypatch, cpu_kernels):
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
def test_activations_and_their_gradients_are_mlxs(monkeypatch, name, either_kernels):
    monkeypatch.setattr(exponential, "FEW", 0)
    monkeypatch.setattr(exponential, "CHUNK", 3000)
    plain = {
        "silu": lambda x: x * mx.sigmoid(x),
        "quick_gelu": lambda x: x * mx.sigmoid(1.702 * x),
        "gelu_pytorch_tanh": lambda x: 0.5 * x * (1 + mx.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))),
        "gelu": lambda x: x * (1 + mx.erf(x * 0.5**0.5)) / 2,
    }[name]
    x = mx.concatenate([mx.linspace(-12, 12, 4001), mx.array([-200.0, -1e30, 1e30, 0.0])])
    activation = either_kernels.activations[name]
    np.testing.assert_allclose(activation(x), plain(x), rtol=2e-6, atol=2e-6)
    x = x[:4001]
    ours, theirs = (mx.grad(lambda x, act=act: act(x).sum())(x) for act in (activation, plain))
    np.testing.assert_allclose(ours, theirs, atol=5e-6)
    assert np.isnan(activation(mx.array([np.nan])).item())
    np.testing.assert_array_equal(kernels.activation(name)(x), activation(x))


SCALINGS = [
    None,
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "longrope", "short_factor": [1.1] * 8, "long_factor": [3.0] * 8, "factor": 4.0,
     "original_max_position_embeddings": 30},
    {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": "prompt_ntk", "original_max_position_embeddings": 30},
]  # fmt: skip


def config_of(**text):
    given = {"vocab_size": 32, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2,
             "intermediate_size": 8, "max_position_embeddings": 30, **text}  # fmt: skip
    return family.config({"text_config": given}).decoder


@pytest.mark.parametrize("neighbours", [False, True], ids=["halves", "neighbours"])
@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: (scaling or {}).get("rope_type", "default"))
def test_angles_computed_once_turn_as_the_rope_itself(scaling, neighbours, monkeypatch):
    """A CPU's way and MLX's rope, at a position and at those of each row of a batch."""
    rotary = make_rope(config_of(head_dim=16, rope_scaling=scaling))
    rotary.neighbours = neighbours
    device = mx.default_device().type
    for offset, length in ((0, 9), (20, 10), (25, 10), (2000, 1)):
        x = mx.random.normal((2, 2, length, 16))
        for first, total in ((offset, offset + length), (mx.array([offset, offset + 3]), offset + length)):
            monkeypatch.setitem(kernels._chosen, device, kernels.CPU)
            turn = rotary.at(first, length, total=total)
            assert isinstance(turn, Turn)
            monkeypatch.setitem(kernels._chosen, device, kernels.MLX)
            theirs = rotary.at(first, length, total=total)
            assert not isinstance(theirs, Turn)
            apart = 2e-6 if isinstance(first, int) else 2e-4  # MLX's own sines of many positions on a CPU
            np.testing.assert_allclose(turn(x), theirs(mx.array(x)), atol=apart)


def test_yarn_turns_as_mlx_lms(either_kernels):
    yarn = borrow("models.rope_utils").YarnRoPE(16, max_position_embeddings=30, scaling_factor=4.0, base=10000,
                                                original_max_position_embeddings=30)  # fmt: skip
    rotary = make_rope(config_of(head_dim=16, rope_scaling={"rope_type": "yarn", "factor": 4.0}))
    for offset, length in ((0, 9), (25, 10), (2000, 1)):
        x = mx.random.normal((1, 2, length, 16))
        np.testing.assert_allclose(rotary.at(offset, length)(x), yarn(mx.array(x), offset=offset), atol=2e-6)


@pytest.mark.parametrize("factor", [0.5, 0.9, 0.2])
def test_only_the_first_numbers_of_a_head_are_rotated(factor, either_kernels):
    """`partial_rotary_factor`, against the formula: the first ones of 20, at frequencies of their number."""
    config = config_of(head_dim=20, rope_scaling={"partial_rotary_factor": factor})
    dims = int(20 * factor)
    assert config.shape("full_attention").rotary_dims == dims
    x = np.random.default_rng(0).normal(size=(1, 2, 7, 20)).astype(np.float32)
    found = np.array(make_rope(config).at(5, 7)(mx.array(x)))
    angles = np.arange(5, 12)[:, None] / 10000.0 ** (np.arange(0, dims, 2) / dims)
    one, other = x[..., : dims // 2], x[..., dims // 2 : dims]
    expected = [one * np.cos(angles) - other * np.sin(angles), other * np.cos(angles) + one * np.sin(angles)]
    np.testing.assert_allclose(found[..., :dims], np.concatenate(expected, axis=-1), atol=2e-6)
    np.testing.assert_array_equal(found[..., dims:], x[..., dims:])


@pytest.mark.parametrize("factor", [0.5, 1.0])
def test_neighbours_are_pairs(factor, either_kernels):
    """Numbers 2 i and 2 i + 1 as a complex number, times e to the power of i times an angle; by one position and by three."""
    config = config_of(head_dim=16, rope_scaling={"partial_rotary_factor": factor})
    shape = replace(config.shape("full_attention"), neighbours=True)
    config = replace(config, shapes={"full_attention": shape})
    x, dims = np.random.default_rng(0).normal(size=(1, 2, 7, 16)).astype(np.float32), int(16 * factor)
    rotary = make_rope(config)
    angles = np.arange(5, 12)[:, None] / 10000.0 ** (np.arange(0, dims, 2) / dims)
    turned = (x[..., :dims:2] + 1j * x[..., 1:dims:2]) * np.exp(1j * angles)
    expected = np.stack([turned.real, turned.imag], axis=-1).reshape(1, 2, 7, dims)
    rotary.axes = np.arange(dims // 2) % 3
    for first in (5, np.tile(np.arange(5, 12), (3, 1))):
        found = np.array(rotary.at(first, 7)(mx.array(x)))
        np.testing.assert_allclose(found[..., :dims], expected, atol=2e-6)
        np.testing.assert_array_equal(found[..., dims:], x[..., dims:])


@pytest.mark.parametrize("normed", [False, True])
def test_gated_attention_is_the_formula(normed):
    """Each head's output times the sigmoid of its gate: for each head, q_proj gives its query, then its gate."""
    mx.random.seed(3)
    heads, shared, dim, width = 4, 2, 6, 10
    layer = Attention(width, num_heads=heads, num_kv_heads=shared, head_dim=dim, gated=True)
    if normed:
        layer.q_norm, layer.k_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)
        layer.q_norm.weight = mx.random.uniform(0.5, 1.5, (dim,))
    x = mx.random.normal((1, 5, width))
    asked, k, v = (np.array(layer[name](x))[0].reshape(5, -1, size) for name, size in
                   (("q_proj", 2 * dim), ("k_proj", dim), ("v_proj", dim)))  # fmt: skip
    q, gate = asked[..., :dim], asked[..., dim:]
    if normed:
        q, k = (each / np.sqrt((each**2).mean(-1, keepdims=True) + 1e-5) for each in (q, k))
        q = q * np.array(layer.q_norm.weight)
    rows = np.zeros((5, heads, dim))
    for head in range(heads):
        scores = q[:, head] @ k[:, head // 2].T / dim**0.5
        powers = np.where(np.tri(5, dtype=bool), np.exp(scores), 0)
        rows[:, head] = powers / powers.sum(-1, keepdims=True) @ v[:, head // 2]
    rows = rows / (1 + np.exp(-gate))
    expected = np.array(layer.o_proj(mx.array(rows.reshape(1, 5, -1).astype(np.float32))))
    np.testing.assert_allclose(layer(x, mask="causal"), expected, atol=1e-5)
    weights: list[mx.array] = []
    np.testing.assert_allclose(layer(x, mask="causal", attentions=weights), expected, atol=1e-5)
    assert weights[0].shape == (1, heads, 5, 5)


def test_kinds_of_layers_have_shapes_of_their_own():
    """Gated, with other heads and rotations: the tensors are as wide, prefill and steps agree, and gates matter."""
    mx.random.seed(4)
    shape = LayerShape(num_heads=4, num_kv_heads=1, head_dim=12, rotary_dims=6, gated=True)
    kinds = ("full_attention", "sliding_attention")
    config = replace(
        config_of(sliding_window=4), layer_types=kinds, window=WindowConfig(sliding_window=4),
        norms=NormConfig(rms_norm_eps=1e-5, qk_norm=True), shapes={"full_attention": shape},
    )  # fmt: skip
    decoder = Decoder(config)
    full, sliding = (layer.self_attn for layer in decoder.layers)
    assert (full.q_proj.weight.shape, full.k_proj.weight.shape) == ((4 * 12 * 2, 16), (12, 16))
    assert (full.o_proj.weight.shape, full.q_norm.weight.shape) == ((16, 48), (12,))
    assert (sliding.q_proj.weight.shape, sliding.q_norm.weight.shape) == ((16, 16), (8,))
    assert decoder.ropes["full_attention"].dims == 6 and decoder.ropes["sliding_attention"].dims == 8
    ids = mx.array([[3, 7, 1, 9, 4, 4, 2, 8]])
    whole = np.array(decoder.logits(decoder(decoder.read(ids))))
    assert whole.shape == (1, 8, 32) and np.isfinite(whole).all()
    state = decoder.make_state()
    steps = [decoder.logits(decoder(decoder.read(ids[:, i : i + 1]), state)) for i in range(8)]
    np.testing.assert_allclose(mx.concatenate(steps, axis=1), whole, atol=1e-5)
    assert state.layers[0].keys.shape[1::2] == (1, 12) and state.layers[1].keys.shape[1::2] == (2, 8)
    full.q_proj.weight = full.q_proj.weight.reshape(4, 2, 12, 16) * mx.array([1.0, -1.0])[None, :, None, None]
    full.q_proj.weight = full.q_proj.weight.reshape(96, 16)
    assert np.abs(np.array(decoder.logits(decoder(decoder.read(ids)))) - whole).max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rotary_dims": 5}, "even number of a head's 12 numbers, not 5"),
        ({"rotary_dims": 14}, "even number of a head's 12 numbers, not 14"),
        ({"num_kv_heads": 3}, "num_kv_heads"),
        ({"gated": "yes"}, "gated"),
    ],
)
def test_shapes_that_cannot_be_are_refused(changes, message):
    with pytest.raises(CheckpointError, match=message):
        LayerShape(**{"num_heads": 4, "num_kv_heads": 1, "head_dim": 12, "rotary_dims": 6, **changes})


def test_the_environment_leaves_the_cpus_kernels_out():
    """MLX_VLM_MINI_KERNELS=mlx gives the same tokens."""
    code = (
        "import sys; from mlx_vlm_mini import load, stream_generate; from mlx_vlm_mini.layers import kernels\n"
        "import mlx.core as mx; mx.disable_compile()\n"
        "chunks = stream_generate(*load(sys.argv[1]), 'What is this?', images=[sys.argv[2]], max_tokens=12)\n"
        "print([chunk.token for chunk in chunks], kernels.kernels() is kernels.MLX)"
    )

    def said(**environment):
        done = subprocess.run(
            [sys.executable, "-c", code, PLAIN, PHOTO], capture_output=True, text=True, check=True,
            env={**{name: value for name, value in os.environ.items() if name != kernels.CHOICE}, **environment},
        )  # fmt: skip
        return done.stdout.strip().rsplit(" ", 1)

    (plain, _), (forced, is_mlx) = said(), said(**{kernels.CHOICE: "mlx"})
    assert plain == forced and len(json.loads(plain)) == 12 and is_mlx == "True"
