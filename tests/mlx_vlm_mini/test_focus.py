"""benchmarks/attention.py: its arithmetic on attention that is known, and a run on a tiny checkpoint."""

import importlib.util
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from checkpoints import PLAIN
from PIL import Image
from reference import GOLDEN

from mlx_vlm_mini import load
from mlx_vlm_mini.data.scenes import draw
from mlx_vlm_mini.grounding.attended import AnswerAttention, ImageAttention
from mlx_vlm_mini.images.source import read_image
from mlx_vlm_mini.preprocessing.frame import Frame


@pytest.fixture(scope="module")
def bench():
    file = GOLDEN.parent.parent / "benchmarks" / "attention.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_attention", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def looking(weights):
    """An answer about an 80x80 picture of 8x8 patches of 10 pixels: float[layers, heads, T, 64]."""
    weights = np.array(weights, dtype=np.float32)
    image = ImageAttention(
        weights=weights, boxes=Frame().patches(80, 80, 10), size=(80, 80), origin=read_image(Image.new("RGB", (80, 80)))
    )
    count = weights.shape[2]
    return AnswerAttention(
        prompt="", token_ids=(1,) * count, tokens=("t",) * count, texts=("red",) * (count - 1) + ("",), logprobs=np.zeros(count),
        reduce="none", layers=tuple(range(len(weights))), heads=tuple(range(weights.shape[1])), images=(image,),
    )  # fmt: skip


def test_attention_on_the_object_and_beside_it(bench):
    """Layer 0 is even, layer 1 has all of it on patch 9 (10 to 20 pixels both ways), layer 2 none in the box."""
    weights = np.zeros((3, 2, 2, 64))
    weights[0] = 0.5 / 64
    weights[1, :, :, 9] = 0.01
    weights[2, :, :, 63] = 0.9
    weights[:, :, 1] = np.random.default_rng(0).random((3, 2, 64))  # the token without text, which does not count
    found = looking(weights)
    words = bench.words_of(found)
    focus = bench.focus(found.images[0], (10, 10, 30, 20), words)
    assert words == [0] and focus.area == pytest.approx(200 / 6400)
    assert focus.layers == pytest.approx((200 / 6400, 1, 0))
    half = bench.focus(found.images[0], (15, 10, 30, 20), words)
    assert half.layers == pytest.approx((150 / 6400, 0.5, 0))
    figures = bench.summarize([focus, replace(focus, area=0.5, layers=(0.5, 0.5, 0.7))])
    assert figures["area"] == pytest.approx((200 / 6400 + 0.5) / 2)
    assert figures["attention"] == pytest.approx([figures["area"], 0.75, 0.35])
    assert figures["ratio"] == pytest.approx([1, 0.75 / figures["area"], 0.35 / figures["area"]])
    assert figures["exceeds"][1:] == [0.5, 0.5]


def test_the_most_attended_cells_are_painted_over(bench):
    weights = np.full((1, 1, 1, 64), 0.001)
    weights[..., [9, 40, 63]] = 0.1, 0.3, 0.2
    found = looking(weights)
    assert bench.most_attended(found, [0], 3).tolist() == [40, 63, 9]
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (80, 80, 3), dtype=np.uint8))
    before, after = np.array(picture), np.array(bench.paint_over(picture, [40, 63]))
    same = (before == after).all(axis=-1)
    assert (after[50:60, :10] == before.mean(axis=(0, 1)).round()).all() and not same[70:, 70:].any()
    assert same.sum() == 6400 - 200
    odd = bench.paint_over(Image.new("RGB", (61, 77)), range(64))
    assert odd.size == (61, 77)


def test_the_box_is_where_the_object_was_drawn(bench):
    rng = np.random.default_rng(3)
    for _ in range(5):
        scene, thing = bench.three_objects(rng)
        scene = replace(scene, texture=0.0, things=(thing,))
        pixels = np.array(draw(scene, np.random.default_rng(0))).astype(int)
        rows, columns = np.nonzero(np.abs(pixels - scene.background).sum(axis=-1) > 60)
        left, top, right, bottom = bench.box_of(scene, thing)
        assert left - 1 <= columns.min() and columns.max() <= right + 1
        assert top - 1 <= rows.min() and rows.max() <= bottom + 1
        assert columns.max() - columns.min() > 0.7 * (right - left) and rows.max() - rows.min() > 0.7 * (bottom - top)


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_the_program(bench, monkeypatch, capsys, form):
    monkeypatch.setattr(sys, "argv", ["attention.py", str(PLAIN), "--scenes", "2", "--max-tokens", "3", *form])
    bench.main()
    out = capsys.readouterr().out
    if form:
        figures = json.loads(out)
        assert len(figures["attention"]) == 2 and figures["scenes"] == 2 and figures["painted"] == 10 / 64
        assert all(0 <= share <= 1 for share in figures["attention"])
    else:
        assert "| 1 |" in out and "of 2 answers named the colour" in out


@pytest.mark.parametrize("scenes", [40, pytest.param(200, marks=pytest.mark.reference)])
def test_the_bundled_model_looks_at_what_it_is_asked_about(bench, scenes):
    """On the object lies more of the attention than of the picture, and the answer hangs on what is looked at."""
    figures = bench.measure(*load(), scenes=scenes, seed=6, painted=0.15, max_tokens=8)
    assert figures["right"] > 0.8 * scenes
    assert np.mean(figures["ratio"]) > 1.2 and min(figures["ratio"]) > 1
    assert figures["most_attended"] > 1.5 * figures["random"]
