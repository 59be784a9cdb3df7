"""Large photos: what the attention of vision towers needs for them in one piece, for every published model."""

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from published import CONFIGS

from mlx_vlm_mini.config import VisionConfig
from mlx_vlm_mini.families import find_family
from mlx_vlm_mini.layers import blocks
from mlx_vlm_mini.layers.attention import attend
from mlx_vlm_mini.vision import make_tower

BOUND = 2**30
PHOTOS = {"12 MP": (3024, 4032), "24 MP": (4000, 6000)}


def towers() -> dict[str, VisionConfig]:
    """Those that differ in what their attention takes, by the name of a published model that has it; two blocks of each."""
    found: dict[VisionConfig, str] = {}
    for name, published in CONFIGS.items():
        config = find_family(published).config(published).vision
        changes: dict[str, Any] = {"intermediate_size": 8}
        if config.tiled is None:
            changes.update(num_hidden_layers=2, feature_layers=(2,))
        if config.grid is not None and config.grid.window is not None:
            changes["grid"] = replace(config.grid, full_blocks=(0,))
        found.setdefault(replace(config, **changes), name)
    return {name: config for config, name in found.items()}


def encode(config: VisionConfig, size: tuple[int, int]) -> mx.array:
    """Features of a photo, as large as the tower takes it; nothing is computed yet."""
    tower, channels = make_tower(config), 3
    if config.tiled is not None:
        pixels = mx.zeros((1, config.tiled.max_tiles, config.image_size, config.image_size, 3))
        return tower(pixels, [(1, 1)])
    if config.grid is None:
        height = width = config.image_size
    else:
        height, width = (side // config.image_size * config.image_size for side in size)
    return tower.encode(mx.zeros((1, height, width, channels)))


@pytest.mark.parametrize("photo", ["12 MP", pytest.param("24 MP", marks=pytest.mark.reference)])
def test_no_tower_asks_for_a_large_buffer_of_scores(photo, monkeypatch, mac_kernels):
    """From shapes alone: as where no head size is fused, in half precision and in float32."""
    largest = 0

    def note(queries, keys, values, **_):
        nonlocal largest
        largest = max(
            largest, queries.shape[0] * queries.shape[1] * queries.shape[2] * keys.shape[2] * queries.dtype.size
        )
        return queries

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", note)
    for name, config in towers().items():
        largest = 0
        encode(config, PHOTOS[photo])
        assert 0 < largest <= BOUND, name
        if config.grid is not None:
            assert largest > blocks.BLOCK / 2, f"{name}: the photo is no large one"


@pytest.mark.parametrize("mask", [None, "causal", "rows"])
@pytest.mark.parametrize("shared", [2, 4])
def test_attention_in_blocks_equals_attention_whole(mask, shared, monkeypatch, mac_kernels):
    mx.random.seed(0)
    queries = mx.random.normal((1, 4, 37, 8))
    keys, values = (mx.random.normal((1, shared, 50, 8)) for _ in range(2))
    seen = mx.random.uniform(shape=(37, 50)) < 0.6 if mask == "rows" else mask
    whole = blocks.plain_attention(queries, keys, values, 0.3, seen)
    monkeypatch.setattr(blocks, "SCORES", 1000)
    monkeypatch.setattr(blocks, "BLOCK", 4 * 4 * 50 * 5)  # five queries at a time
    np.testing.assert_allclose(blocks.plain_attention(queries, keys, values, 0.3, seen), whole, atol=1e-6)


def test_memory_follows_the_bound(monkeypatch, mac_kernels):
    queries = mx.random.normal((1, 4, 1500, 8))
    mx.eval(queries)

    def peak() -> int:
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(blocks.plain_attention(queries, queries, queries, 1.0, None))
        return mx.get_peak_memory() - before

    scores = 4 * 4 * 1500**2
    assert peak() > scores
    monkeypatch.setattr(blocks, "SCORES", scores - 1)
    monkeypatch.setattr(blocks, "BLOCK", scores // 100)
    assert peak() < scores / 4


@pytest.mark.reference  # half a minute
@pytest.mark.parametrize(("table", "patches"), [("cpu", 46_875), ("mac", 20_000)])
def test_the_attention_of_a_large_photo_runs(table, patches, request):
    """One head of Qwen3-VL's size: memory stays bounded, and the last patches' outputs are exact."""
    request.getfixturevalue(f"{table}_kernels")
    mx.random.seed(0)
    queries, keys, values = (mx.random.normal((1, 1, patches, 72)) for _ in range(3))
    mx.eval(queries, keys, values)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    found = attend(queries, keys, values, scale=72**-0.5)
    mx.eval(found)
    assert 4 * patches**2 > 1.4 * BOUND > 1.4 * (mx.get_peak_memory() - before)
    few = [np.array(each[0, 0]).astype(np.float64) for each in (queries[:, :, -5:], keys, values)]
    scores = few[0] @ few[1].T * 72**-0.5
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    exact = weights @ few[2] / weights.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found[0, 0, -5:], exact, atol=1e-5)
