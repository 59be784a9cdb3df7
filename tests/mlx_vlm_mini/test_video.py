"""Videos: parity of Qwen2-VL, 2.5-VL and 3-VL on tests/golden/videos.npz, sampling and sizes, files, conversations."""

from dataclasses import replace

import numpy as np
import pytest
from parity import check_answer
from reference import GOLDEN
from video_reference import CASES, LIMITS, NAMES, TEMPLATE

from mlx_vlm_mini import load


def load_for_videos(name):
    """A golden checkpoint with a chat template that knows videos, and limits that leave their frames as they are."""
    model, processor = load(GOLDEN / name)
    processor.chat_template = replace(processor.chat_template, source=TEMPLATE)
    settings = processor.video_settings
    grid = replace(settings.grid, min_pixels=LIMITS["shortest_edge"], max_pixels=100000)
    processor.video_settings = replace(settings, images=replace(settings.images, tiling=grid))
    return model, processor


@pytest.fixture(scope="module", params=NAMES)
def loaded(request):
    return request.param, *load_for_videos(request.param)


@pytest.mark.parametrize("case", sorted(CASES))
def test_parity(loaded, case):
    name, model, processor = loaded
    with np.load(GOLDEN / "videos.npz") as stored:
        expected = {what: stored[f"{name}/{case}/{what}"] for what in ("prompt_ids", "token_ids", "logprobs")}
    assert len(expected["token_ids"]) == 11
    check_answer(model, processor, CASES[case], expected)
