"""Published models at full size, by their shapes alone: the founding table, and docs/models.md."""

import mlx.core as mx
import numpy as np
import pytest
from published import CLIP_L_336, CONFIGS, DOCS, SIGLIP_SO400M, published, table

from mlx_vlm_mini.checkpoints.load import plan
from mlx_vlm_mini.convert.quantize import choose, plan_outputs, spread
from mlx_vlm_mini.families import find_family
from mlx_vlm_mini.families.parts.configs import vision_tower
from mlx_vlm_mini.vision.transformer import VisionTransformer


def tower(hf, **changes):
    clip = hf["model_type"] == "clip_vision_model"
    return vision_tower(
        {**hf, **changes}, feature_layers=-2 if clip else -1, drop_first_feature=clip, post_norm=not clip
    )


@pytest.mark.parametrize(
    ("hf", "image", "patches", "act"),
    [(CLIP_L_336, 336, 576, "quick_gelu"), (SIGLIP_SO400M, 384, 729, "gelu_pytorch_tanh")],
    ids=["CLIP ViT-L/14", "SigLIP-400M"],
)
def test_the_founding_tables_towers(hf, image, patches, act):
    """Image, patch, number of patches, width, layers, heads, activation; and patches that come out of a tower."""
    config = tower(hf, image_size=image)
    width = {336: 1024, 384: 1152}[image]
    assert (config.patch_size, config.hidden_size, config.num_attention_heads) == (14, width, 16)
    assert (config.num_hidden_layers, config.hidden_act) == ({336: 24, 384: 27}[image], act)
    assert config.num_features == patches == (image // 14) ** 2
    narrow = tower(
        hf, image_size=image, hidden_size=16, intermediate_size=8, num_attention_heads=2, num_hidden_layers=2
    )
    assert VisionTransformer(narrow)(mx.zeros((1, image, image, 3))).shape == (1, patches, 16)


SYSTEMS = {
    "llava-hf/llava-1.5-7b-hf": (1024, 4096, 2, 576),
    "llava-hf/llava-1.5-13b-hf": (1024, 5120, 2, 576),
    "google/paligemma-3b-pt-224": (1152, 2048, 1, 256),
    "google/paligemma-3b-pt-448": (1152, 2048, 1, 1024),
    "google/paligemma-3b-pt-896": (1152, 2048, 1, 4096),
    "google/paligemma2-10b-pt-448": (1152, 3584, 1, 1024),
}


@pytest.mark.parametrize("name", sorted(SYSTEMS))
def test_the_founding_tables_systems(name):
    """Width of the vision tower's features and of the decoder, layers of the projection between them, tokens of an image."""
    config = find_family(CONFIGS[name]).config(CONFIGS[name])
    text = find_family(CONFIGS[name]).image_text(config, None, "#", (480, 640))  # type: ignore[arg-type]
    projector = config.projector
    assert (projector.input_size, projector.hidden_size, projector.num_layers, len(text)) == SYSTEMS[name]
    assert config.decoder.hidden_size == projector.hidden_size


@pytest.mark.reference  # 9 s for what changes with docs/models.md alone
def test_the_table_of_models_is_true():
    assert DOCS.read_text() == table(), "python tests/support/published.py rewrites it"


@pytest.mark.parametrize("name", ["google/paligemma-3b-pt-224", "llava-hf/llava-1.5-7b-hf"])
def test_the_tables_bytes_are_what_conversion_writes(name):
    """By hand: a quantized weight of n bits takes n bits, and a scale and a bias of 16 for 64 of them."""
    checkpoint = published(name)
    planned = plan(checkpoint)
    outputs, quantized, _ = plan_outputs(planned, spread(planned, choose(4, 64, "affine", {})), None)
    total = 0
    for theirs, info in checkpoint.tensors.items():
        linear = "language_model" in theirs and len(info.shape) == 2
        assert linear == (theirs.removesuffix(".weight") in quantized)
        total += int(np.prod(info.shape)) * (4 + 32 / 64 if linear else 16) / 8
    assert sum(output.nbytes for output in outputs) == total
