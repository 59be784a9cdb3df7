"""MiniCPM-V 4.6: a SigLIP in which four patches become one, a merger, and Qwen3.5's decoder.

Source: models/minicpmv4_6 of huggingface/transformers; openbmb/MiniCPM-V-4.6 on the Hub. A large picture stands in the
prompt as a whole and then as slices of it, row by row (`preprocessing/slices.py`). Tokens have one position each, those
of pictures, too. Of downsampling by 16 alone; videos are not read.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from mlx_vlm_mini.config import GridConfig, MergerConfig, ProjectorConfig, ShuffleConfig, VLMConfig
from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.families.parts.configs import clip_weights, llama_weights, side, vision_tower
from mlx_vlm_mini.families.parts.hybrid import QWEN3_5, hybrid_decoder, hybrid_weights
from mlx_vlm_mini.families.parts.maps import Weights
from mlx_vlm_mini.preprocessing.pixels import preprocess
from mlx_vlm_mini.preprocessing.settings import ImageSettings
from mlx_vlm_mini.preprocessing.slices import IMAGE_NUMBER, Slices

_EPS = 1e-6  # of the merger's norm; no config says it
_MERGER = {
    "self_attn.q_proj": "attn.q_proj", "self_attn.k_proj": "attn.k_proj", "self_attn.v_proj": "attn.v_proj",
    "self_attn.out_proj": "attn.o_proj", "layer_norm1": "norm1", "pre_norm": "norm2",
    "linear_1": "fc1", "linear_2": "fc2",
}  # fmt: skip
_PROJECTOR = {"pre_norm": "norm", "linear_1": "layers.0", "linear_2": "layers.1"}


def _names() -> Weights:
    """The Hub's and transformers', mlx-community's, and older ones."""
    names: dict[str, str | tuple[str, ...] | None] = {}
    for tower in ("model.vision_tower.", "vision_tower.", "vpm."):
        names |= clip_weights(tower, post_norm=True)
    for merger in ("model.vision_tower.vit_merger.", "vision_tower.vit_merger.", "vpm.vit_merger.", "vit_merger."):
        names |= {merger + theirs: "vision.merger." + ours for theirs, ours in _MERGER.items()}
    for prefix in ("model.", ""):
        names |= {f"{prefix}merger.mlp.0.{theirs}": "projector." + ours for theirs, ours in _PROJECTOR.items()}
    for prefix in ("model.language_model.", "language_model.model.", "llm.", "llm.model."):
        names |= llama_weights(prefix)
    heads = dict.fromkeys(("lm_head", "language_model.lm_head", "llm.lm_head"), "decoder.lm_head")
    return hybrid_weights({**names, **heads}, more=("llm.", "llm.model."))


WEIGHTS: Weights = _names()

IMAGE_PROCESSOR = "MiniCPMV4_6"

CHAT_TEMPLATE = (  # of the checkpoint that does not think; parts of a message stand in lines of their own
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}{% set said = namespace(parts=[]) %}"
    "{% for part in message['content'] %}{% set said.parts = said.parts + "
    "['<|image_pad|>' if part['type'] == 'image' else part['text']] %}{% endfor %}"
    "{{ said.parts | join('\n') | trim }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{% endif %}"
)


def config(hf: Mapping[str, Any]) -> VLMConfig:
    """`image_size` and `drop_vision_last_layer` at the top are not read, as in the reference."""
    vision = hf.get("vision_config") or {}
    fixed = {"downsample_mode": "16x", "merge_kernel_size": [2, 2], "merger_times": 1}
    for key, only in fixed.items():
        given = hf.get(key, only)
        if (list(given) if isinstance(given, tuple) else given) != only:
            raise CheckpointError(f"config.json: {key} must be {only}, not {given!r}")
    if list(vision.get("window_kernel_size") or (2, 2)) != [2, 2] or vision.get("num_channels", 3) != 3:
        raise CheckpointError("config.json: vision_config needs window_kernel_size [2, 2] and num_channels 3")
    plain = vision_tower(
        {**vision, "model_type": "siglip_vision_model"}, feature_layers=-1, drop_first_feature=False, post_norm=True
    )
    after = hf.get("insert_layer_id", 6)  # which counts before vision_config's
    if type(after) is not int or not 0 <= after < plain.num_hidden_layers:
        raise CheckpointError(
            f"config.json: insert_layer_id {after!r} is none of the tower's {plain.num_hidden_layers} layers"
        )
    positions = side(plain.image_size, "image_size") // plain.patch_size
    tower = replace(
        plain,
        image_size=4 * plain.patch_size,
        grid=GridConfig(position_side=positions, position_resize="floor", merged_after=after + 1),
    )
    decoder = hybrid_decoder(hf, QWEN3_5, sectioned=False)
    return VLMConfig(
        family="minicpmv4_6",
        vision=tower,
        projector=ProjectorConfig(
            input_size=4 * tower.feature_size,
            hidden_size=decoder.hidden_size,
            num_layers=2,
            hidden_act="gelu",
            bias=True,
            shuffle=ShuffleConfig(factor=2, transposed=False),
            norm_eps=_EPS,
            merger=MergerConfig(norm_type="layer_norm", norm_joined=True),
        ),
        decoder=decoder,
        image_token_id=hf.get("image_token_id", 248056),
        image_grid_pinpoints=None,
    )


def pixels(image: Image.Image, settings: ImageSettings) -> np.ndarray:
    """The whole picture."""
    return _resized(image, settings, _tiling(settings).whole((image.height, image.width)))[None]


def slices(image: Image.Image, settings: ImageSettings) -> np.ndarray | None:
    """Its slices row by row, float32[B, height, width, 3]; None where there are none."""
    size, tiling = (image.height, image.width), _tiling(settings)
    grid = tiling.grid(size)
    if grid is None:
        return None
    (rows, columns), (height, width) = grid, tiling.cut(size, grid)
    enlarged = _resized(image, settings, (rows * height, columns * width))
    return enlarged.reshape(rows, height, columns, width, 3).swapaxes(1, 2).reshape(-1, height, width, 3)


def image_text(config: VLMConfig, settings: ImageSettings, image_token: str, size: tuple[int, int]) -> str:
    tiling = _tiling(settings)
    if tiling.factor != config.vision.image_size:
        raise CheckpointError(
            f"preprocessor_config.json makes a token of {tiling.factor} pixels a side, config.json of "
            f"{config.vision.image_size}"
        )
    (whole, piece), grid = tiling.count_tokens(size), tiling.grid(size)
    number = f"<image_id>{IMAGE_NUMBER}</image_id>" if tiling.numbered else ""
    rows, columns = grid or (0, 0)
    lines = "\n".join([f"<slice>{image_token * piece}</slice>" * columns] * rows)
    return f"{number}<image>{image_token * whole}</image>{lines}"


def _tiling(settings: ImageSettings) -> Slices:
    assert isinstance(settings.tiling, Slices)  # loading has seen to it
    return settings.tiling


def _resized(image: Image.Image, settings: ImageSettings, size: tuple[int, int]) -> np.ndarray:
    return preprocess(image, replace(settings, tiling=None, size={"height": size[0], "width": size[1]}))
