"""The reference suite of videos: the goldens live, and transformers' video processors where torchvision is installed.

pytest -m reference        needs the `reference` extra, and torchvision for the processors themselves
"""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from checkpoints import with_paths
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import check_answer
from PIL import Image
from reference import GOLDEN
from video_reference import (
    NAMES,
    TEMPLATE,
    decode,
    expected_videos,
    frames,
    messages_without_data,
    say,
    video,
)

from mlx_vlm_mini import load
from mlx_vlm_mini.images.video import Video
from mlx_vlm_mini.preprocessing.video import video_settings

pytestmark = pytest.mark.reference
KINDS = {"qwen2-vl": "Qwen2VL", "qwen2.5-vl": "Qwen2VL", "qwen3-vl": "Qwen3VL"}


@pytest.mark.parametrize("name", NAMES)
def test_goldens_are_what_transformers_says_today(name):
    with np.load(GOLDEN / "videos.npz") as stored:
        for key, array in expected_videos(name).items():
            np.testing.assert_allclose(stored[key], array, atol=2e-5, rtol=1e-5, err_msg=key)


def processor_class(kind):
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as error:  # the second where it was built for another torch
        # No index that CI reads has a build of it for CPUs. What these processors choose is stored, too, and asked for in
        # the default suite (golden/video_choices.py); of the whole way videos.npz is, made by their models.
        pytest.skip(f"no torchvision: {error}")
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    return {"Qwen2VL": Qwen2VLVideoProcessor, "Qwen3VL": Qwen3VLVideoProcessor}[kind]


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 4000),
    st.sampled_from([5.0, 24.0, 29.97, 60.0]),
    st.sampled_from([0.5, 1.0, 2.0, 7.3]),
    st.integers(4, 800),
)
@pytest.mark.parametrize("kind", ["Qwen2VL", "Qwen3VL"])
def test_frames_are_those_that_transformers_chooses(kind, total, rate, fps, most):
    from transformers.video_utils import VideoMetadata

    if kind == "Qwen2VL" and total < 2:
        return
    reference = processor_class(kind)(fps=fps, max_frames=most)
    expected = reference.sample_frames(metadata=VideoMetadata(total_num_frames=total, fps=rate), fps=fps)
    found = video_settings({"max_frames": most}, kind).choose(total, rate, Video("x", fps=fps))
    # where its step is rounded up, Qwen2-VL's names a frame more, which a video may not have
    assert 0 <= len(expected) - len(found) <= (kind == "Qwen2VL") and found[-1] < total
    np.testing.assert_array_equal(found, expected[: len(found)])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 40),
    st.integers(20, 400),
    st.integers(20, 400),
    st.booleans(),
    st.sampled_from([(1, 10**5), (60000, 90000)]),
)
@pytest.mark.parametrize("kind", ["Qwen2VL", "Qwen3VL"])
def test_sizes_are_those_that_transformers_chooses(kind, count, height, width, cap, limits):
    import torch

    cls, tokens = processor_class(kind), {"Qwen2VL": 100, "Qwen3VL": 8}[kind]
    options = {"size": dict(zip(("shortest_edge", "longest_edge"), limits, strict=True)), "patch_size": 6}
    options |= {"cap_pixels_per_frame": cap, "max_video_tokens": tokens}
    reference = cls(**options)
    made = reference.resize(
        torch.zeros((1, count, 3, height, width), dtype=torch.uint8), reference.size, reference.resample,
        factor=12, temporal_factor=2, cap_pixels_per_frame=cap,
    )  # fmt: skip
    assert video_settings(options, kind).fit((height, width), count) == tuple(made.shape[-2:])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(36, 48), (50, 81)])
def test_whole_processors(name, size, tmp_path):
    """Frames and a picture through transformers' own processor and ours: ids, pixels and answers. Frames that need no
    resizing are equal; else torchvision's bicubic filter differs from Pillow's by at most one of 255 levels."""
    import torch
    from qwen_reference import FAMILIES, images_only
    from transformers import AutoModelForImageTextToText
    from transformers.video_utils import VideoMetadata

    folder = shutil.copytree(GOLDEN / name, tmp_path / "model")
    given = {
        "size": {"shortest_edge": 1000, "longest_edge": 4000 if name != "qwen3-vl" else 9000},
        "patch_size": 6,
        "fps": 2.0,
    }
    (folder / "video_preprocessor_config.json").write_text(json.dumps(given))
    videos = processor_class(KINDS[name])(**given, cap_pixels_per_frame=True)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    half = images_only(model.config.model_type).from_pretrained(folder, backend="pil")
    reference = FAMILIES[model.config.model_type](half.image_processor, half.tokenizer, videos, chat_template=TEMPLATE)
    video_id = half.tokenizer.convert_tokens_to_ids("<|video_pad|>")
    model.config.video_token_id = model.model.config.video_token_id = video_id
    messages = [say({"type": "image", "image": "photo.jpg"}, video(5, 6.4, size), "What moves?")]
    # Qwen3-VL's processor keeps what the template writes around a video, which the authors' takes away
    bare = "<|vision_start|><|{{ part['type'] }}_pad|><|vision_end|>"
    own = "{% if part['type'] == 'video' %}<|video_pad|>{% else %}" + bare + "{% endif %}"
    template = TEMPLATE.replace(bare, own) if name == "qwen3-vl" else TEMPLATE
    text = reference.apply_chat_template(
        messages_without_data(messages), add_generation_prompt=True, chat_template=template
    )
    metadata = VideoMetadata(total_num_frames=5, fps=6.4, frames_indices=list(range(5)))
    inputs = dict(
        reference(
            text=text, images=[Image.open(GOLDEN / "photo.jpg")], videos=[np.stack(frames(5, size))],
            video_metadata=[[metadata]], do_sample_frames=False, return_tensors="pt",
        )
    )  # fmt: skip
    inputs.pop("video_metadata", None)
    loaded, processor = load(folder)
    processor.chat_template = replace(processor.chat_template, source=TEMPLATE)
    found = processor(with_paths(messages)).images[1].pixel_values
    steps, rows, columns = inputs["video_grid_thw"][0].tolist()
    patches = inputs["pixel_values_videos"].numpy().reshape(steps, rows // 2, columns // 2, 2, 2, 3, 2, 6, 6)
    pixels = patches.transpose(0, 1, 3, 7, 2, 4, 8, 6, 5).reshape(steps, rows * 6, columns * 6, 6)
    std = min(videos.image_std)
    tolerance = 1e-5 if size == (36, 48) else 1.01 / 255 / std
    np.testing.assert_allclose(found, pixels, atol=tolerance)
    assert processor(with_paths(messages)).input_ids[0].tolist() == inputs["input_ids"][0].tolist()
    if size == (36, 48):
        check_answer(loaded, processor, messages, decode(model, inputs, 5))
