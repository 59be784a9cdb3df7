"""The reference suite of MiniCPM-V 4.6: what its golden does not hold, live against transformers.

pytest -m reference        needs the `reference` extra
"""

import json
import shutil

import numpy as np
import published
import pytest
from parity import check_answer
from reference import CASES, GOLDEN, SPECS, Reference, make_image_processor, user

from mlx_vlm_mini import load
from mlx_vlm_mini.checkpoints.load import plan
from mlx_vlm_mini.convert import convert
from mlx_vlm_mini.preprocessing.settings import image_settings
from mlx_vlm_mini.preprocessing.slices import Slices, slice_frames
from mlx_vlm_mini.vision.positions import RESIZES

pytestmark = pytest.mark.reference

NAME = "minicpm-v-4.6"
FOLDER, TEMPLATE = GOLDEN / NAME, SPECS[NAME].chat_template
VARIANTS = {  # config, image processor
    "rows and columns of slices": ({}, {"scale_resolution": 46}),
    "many slices": ({}, {"scale_resolution": 20}),
    "fewer slices": ({}, {"scale_resolution": 40, "max_slice_nums": 2}),
    "whole pictures": ({}, {"slice_mode": False}),
    "no numbers": ({}, {"use_image_id": False}),
    "merged after the first block": ({"insert_layer_id": 0}, {}),
    "merged after the last block": ({"insert_layer_id": 2}, {}),
}


def changed(tmp_path, config, image):
    folder = tmp_path / "model"
    shutil.copytree(FOLDER, folder)
    for name, changes in (("config.json", config), ("processor_config.json", {"image_processor": image})):
        content = json.loads((folder / name).read_text())
        for key, value in changes.items():
            content[key] = {**content[key], **value} if isinstance(value, dict) else value
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("kind", sorted(VARIANTS))
def test_variants(kind, tmp_path):
    folder = changed(tmp_path, *VARIANTS[kind])
    for case in ("side_by_side", "two_turns"):
        expected = Reference(folder, TEMPLATE).answer(CASES[case], GOLDEN, 5)
        check_answer(*load(folder), CASES[case], expected)


@pytest.mark.parametrize("case", ["image", "text", "two_turns"])
def test_of_the_checkpoint_that_thinks(case, tmp_path):
    """Its template opens answers with a thought."""
    folder, thinks = tmp_path / "model", TEMPLATE.replace("enable_thinking = false", "enable_thinking = true")
    shutil.copytree(FOLDER, folder)
    (folder / "chat_template.jinja").write_text(thinks)
    answered = {"role": "assistant", "content": [{"type": "text", "text": "<think>\nA house.\n</think>\n\nA hut."}]}
    messages = [*CASES[case], answered, user({"type": "text", "text": "Why?"})]
    for asked in (CASES[case], messages):
        check_answer(*load(folder), asked, Reference(folder, thinks).answer(asked, GOLDEN, 5))


@pytest.mark.parametrize("step", [1, 63, 64, 65])
def test_pieces_of_a_long_prompt(step):
    check_answer(
        *load(FOLDER), CASES["chunks"], Reference(FOLDER, TEMPLATE).answer(CASES["chunks"], GOLDEN, 8), step=step
    )


def test_slices_of_any_size_are_the_references():
    """Sizes of the whole and of the slices, and their grid."""
    reference, rng = make_image_processor("MiniCPMV4_6", {}), np.random.default_rng(5)
    slices = image_settings({}, "MiniCPMV4_6").tiling
    assert isinstance(slices, Slices)
    sizes = [*rng.integers(1, 3000, size=(300, 2)).tolist(), *([side, side] for side in range(430, 1400, 7))]
    for size in map(tuple, sizes):
        grid = reference.get_sliced_grid(size, 9, 448)
        options = (448, 14, "16x")
        expected = [reference.find_best_resize(size, *options, allow_upscale=grid is None)]
        if grid is not None:
            height, width = reference.get_refine_size(size, grid, *options, allow_upscale=True)
            expected += [(height // grid[0], width // grid[1])] * (grid[0] * grid[1])
        assert slices.grid(size) == (None if grid is None else tuple(grid))
        assert [own for _, own in slice_frames(size, slices)] == expected


@pytest.mark.parametrize("side", [10, 14, 32, 70])
def test_positions_are_the_references(side):
    import torch
    from transformers.vision_utils import get_vision_nearest_position_ids

    for count in range(1, 400):
        expected = get_vision_nearest_position_ids(torch.tensor([[count, 1]]), side) // side
        assert RESIZES["floor"](side, count).argmax(axis=1).tolist() == expected.tolist(), count


def test_tensors_of_the_classes_own_sizes():
    """Every name and shape that transformers' class has has its place."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.for_model("minicpmv4_6")
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    config.image_token_id = 248056
    for given in (config.to_dict(), {"model_type": "minicpmv4_6"}):
        planned = plan(published.without_data(given, shapes))
        assert planned.unused == () and set(planned.ours.values()) == set(shapes)


def test_what_is_converted_transformers_reads(tmp_path):
    """Written back in torch's form; names are the source's."""
    from safetensors.torch import load_file, save_file

    convert(FOLDER, tmp_path / "mlx")
    tensors = load_file(tmp_path / "mlx" / "model.safetensors")
    for key in tensors:
        if key.endswith(("patch_embedding.weight", "conv1d.weight")):
            tensors[key] = tensors[key].movedim(-1, 1).contiguous()
    save_file(tensors, tmp_path / "mlx" / "model.safetensors", {"format": "pt"})
    answer = Reference(tmp_path / "mlx", TEMPLATE).answer(CASES["image"], GOLDEN, 3)
    with np.load(FOLDER / "expected.npz") as expected:
        np.testing.assert_allclose(answer["logprobs"], expected["image/logprobs"][:3], atol=2e-5, rtol=1e-5)
