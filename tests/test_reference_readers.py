"""The reference suite of the document readers: what their goldens do not hold, live against transformers.

pytest -m reference        needs the `reference` extra
"""

import json
from typing import Any

import mlx.core as mx
import numpy as np
import published
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import changed, check_answer, check_turns
from reference import CASES, GOLDEN, SPECS, Reference

from mlx_vlm_mini import load
from mlx_vlm_mini.checkpoints.load import plan
from mlx_vlm_mini.preprocessing.grid import FramesGrid, RaisedGrid
from mlx_vlm_mini.preprocessing.tiles import PageTiles, choose_grid
from mlx_vlm_mini.vision.positions import resize

pytestmark = pytest.mark.reference

sides = st.integers(1, 60) | st.integers(1, 5000)
READERS = ("paddleocr-vl", "glm-ocr", "glm4v", "granite-docling-500m", "granite-docling-fine")


@settings(max_examples=500, deadline=None)
@given(sides, sides, st.sampled_from([(14, 147384, 2822400), (6, 1, 500), (6, 576, 4000)]))
def test_sizes_of_paddleocr_vl(height, width, limits):
    from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import smart_resize

    patch, low, high = limits
    grid = RaisedGrid(patch_size=patch, merge=2, min_pixels=low, max_pixels=high)
    compare_sizes(grid, (height, width), lambda: smart_resize(height, width, 2 * patch, low, high))


@settings(max_examples=500, deadline=None)
@given(sides, sides, st.sampled_from([(14, 12544, 9633792), (6, 2, 1000), (6, 1152, 8000)]))
def test_sizes_of_glm(height, width, limits):
    from transformers.models.glm4v.image_processing_pil_glm4v import smart_resize

    patch, low, high = limits
    grid = FramesGrid(patch_size=patch, merge=2, min_pixels=low, max_pixels=high, frames=2, step=2)
    options = {"factor": 2 * patch, "min_pixels": low, "max_pixels": high}
    compare_sizes(grid, (height, width), lambda: smart_resize(2, height, width, **options))


@settings(max_examples=500, deadline=None)
@given(
    sides, sides, st.sampled_from([(1, 32, 0, 0.0, 0.0, 0.0), (2, 6, 12, 0.5, 1.5, 0.0), (1, 12, 40, 0.9, 0.0, 3.0),
                                   (1, 9, 20, 0.0, 1.2, 8.0), (1, 9, 20, 0.0, 0.0, 8.0), (1, 1, 20, 0.0, 1.2, 8.0)]),
)  # fmt: skip
def test_grids_of_granites_pages(height, width, limits):
    from transformers.models.granite_docling.image_processing_pil_granite_docling import get_page_tile_grid

    low, high, dense, scale, over, most = limits
    tiles = PageTiles(
        tile_size=512, min_tiles=low, max_tiles=high, thumbnail=True, fine=False, dense_tiles=dense, dense_scale=scale,
        dense_aspects=(over, most),
    )  # fmt: skip
    expected = get_page_tile_grid(
        height, width, {"height": 512, "width": 512}, True, low, high, dense, scale, over, most
    )
    assert (choose_grid((height, width), tiles) if high > 1 else (1, 1)) == expected


def compare_sizes(grid: Any, size: tuple[int, int], expected: Any) -> None:
    """Both refuse an image, or both make the same size of it."""
    try:
        found = expected()
    except ValueError:
        with pytest.raises(Exception, match="too long and narrow"):
            grid.fit(size)
        return
    assert grid.fit(size) == tuple(found)


@pytest.mark.parametrize("side", [1, 4, 16, 27])
@pytest.mark.parametrize("kind", ["corners", "linear", "antialiased", "cubic"])
def test_positions_are_resized_as_torch_does(side, kind):
    import torch

    mode = "bicubic" if kind == "cubic" else "bilinear"
    options: dict[str, Any] = {"mode": mode, "align_corners": kind == "corners", "antialias": kind == "antialiased"}
    generator = torch.Generator().manual_seed(side)
    rows = torch.randn(side**2, 6, generator=generator)
    grid = rows.reshape(1, side, side, 6).permute(0, 3, 1, 2)
    for wanted in ((1, 3), (2, 40), (16, 16), (24, 7), (27, 28), (100, 71)):
        if kind == "corners" and 1 in wanted:
            continue  # of one, torch takes the first
        expected = torch.nn.functional.interpolate(grid, size=wanted, **options)[0].flatten(1).T.numpy()
        np.testing.assert_allclose(np.array(resize(mx.array(rows.numpy()), *wanted, kind)), expected, atol=5e-5)


VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {  # config, vision config, images
    "paddle: one row of tokens": ("paddleocr-vl", {}, {}, {"min_pixels": 1, "max_pixels": 600}),
    "paddle: large pictures": ("paddleocr-vl", {}, {}, {"min_pixels": 20000, "max_pixels": 30000}),
    "paddle: eps": ("paddleocr-vl", {"rms_norm_eps": 0.05}, {"layer_norm_eps": 0.01}, {}),
    "glm4v: one row of tokens": ("glm4v", {}, {}, {"size": {"shortest_edge": 2, "longest_edge": 1200}}),
    "glm4v: large pictures": ("glm4v", {}, {}, {"size": {"shortest_edge": 40000, "longest_edge": 60000}}),
    "glm4v: eps": ("glm4v", {"rms_norm_eps": 0.05}, {"rms_norm_eps": 0.01}, {}),
    "glm4v: other sections": (
        "glm4v", {"rope_scaling": {"type": "default", "mrope_section": [2, 1, 1]}, "rope_theta": 100.0}, {}, {},
    ),
    "glm-ocr: eps": ("glm-ocr", {"rms_norm_eps": 0.05}, {"rms_norm_eps": 0.01}, {}),
    "glm-ocr: half of a head": ("glm-ocr", {"rope_parameters": {
        "rope_theta": 1e4, "rope_type": "default", "mrope_section": [1, 1, 1], "partial_rotary_factor": 0.5}}, {}, {}),
    "granite: pages of one tile": ("granite-docling-500m", {}, {}, {"crop_to_patches": False}),
    "granite: many tiles": ("granite-docling-500m", {}, {}, {"max_patches": 20, "min_patches": 3}),
    "granite: eps and scales": (
        "granite-docling-500m",
        {"rms_norm_eps": 0.05, "embedding_multiplier": 1.5, "logits_scaling": 0.7, "attention_multiplier": 0.4},
        {"layer_norm_eps": 0.01}, {},
    ),
    "granite: blocks in another order": ("granite-docling-500m", {}, {"deepstack_visual_indexes": [2, 0]}, {}),
    "granite: the fine way": ("granite-docling-500m", {}, {}, {"fine_route": True}),
    "granite: the coarse way": ("granite-docling-fine", {}, {}, {"fine_route": False}),
    "paddle: a base and sections": (
        "paddleocr-vl",
        {"rope_theta": 100.0, "rope_scaling": {"mrope_section": [4, 1, 3], "rope_type": "default"}}, {}, {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(VARIANTS))
def test_variants(kind, tmp_path):
    name, *changes = VARIANTS[kind]
    folder = changed(name, tmp_path / "model", *changes)
    for case in ("side_by_side", "two_turns"):
        expected = Reference(folder, SPECS[name].chat_template).answer(CASES[case], GOLDEN, 5)
        check_answer(*load(folder), CASES[case], expected)


@pytest.mark.parametrize("name", READERS)
def test_later_turns(name):
    check_turns(name, Reference(GOLDEN / name, SPECS[name].chat_template))


def hub_names_of_paddle(name: str) -> str:
    for theirs, ours in (
        ("model.visual.", "visual."),
        ("model.projector.", "mlp_AR."),
        ("model.language_model.", "model."),
    ):
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


PUBLISHED = {
    "PaddlePaddle/PaddleOCR-VL": hub_names_of_paddle,
    **dict.fromkeys(("ibm-granite/granite-for-docling-500m",), str),
    **dict.fromkeys(("zai-org/GLM-OCR", "zai-org/GLM-4.1V-9B-Thinking", "zai-org/GLM-4.6V-Flash"), str),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_tensors_of_published_sizes(name):
    """Every name and shape that transformers' class gives its tensors has its place, as the Hub writes them."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = published.CONFIGS[name]
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**json.loads(json.dumps(config))))
    shapes = {PUBLISHED[name](key): tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    if config["tie_word_embeddings"]:  # one tensor, under one name in the file
        del shapes["lm_head.weight"]
    planned = plan(published.without_data(config, shapes))
    assert planned.unused == () and set(planned.ours.values()) == set(shapes)
    assert {key: info.shape for key, info in published.published(name).tensors.items()} == shapes


@pytest.mark.parametrize("name", READERS)
def test_what_is_converted_transformers_reads(name, tmp_path):
    """Written back in torch's form, as `train --save` and uploads for others are; names are the source's."""
    from safetensors.torch import load_file, save_file

    from mlx_vlm_mini.convert import convert

    convert(GOLDEN / name, tmp_path / "mlx")
    tensors = load_file(tmp_path / "mlx" / "model.safetensors")
    for key, tensor in tensors.items():
        if tensor.ndim > 2:
            tensors[key] = tensor.movedim(-1, 1).contiguous()
    save_file(tensors, tmp_path / "mlx" / "model.safetensors", {"format": "pt"})
    answer = Reference(tmp_path / "mlx", SPECS[name].chat_template).answer(CASES["image"], GOLDEN, 3)
    with np.load(GOLDEN / name / "expected.npz") as expected:
        np.testing.assert_allclose(answer["logprobs"], expected["image/logprobs"][:3], atol=2e-5, rtol=1e-5)
