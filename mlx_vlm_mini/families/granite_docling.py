"""Granite-Docling 500M: SigLIP on tiles of pages, a connector with two ways, and Granite 4, whose streams are scaled.

Source: models/granite_docling of huggingface/transformers. (258M is an Idefics3.) Each tile is announced by its row and
column, and a line of tiles ends in a newline. Which way, coarse or fine, all images take says the image processor's
`fine_route`; the router that would guess it for a page is not read.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mlx_vlm_mini.config import ConnectorConfig, ProjectorConfig, ScaleConfig, ShuffleConfig, VLMConfig
from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.families.parts.configs import clip_weights, llama_weights, text_decoder, vision_tower
from mlx_vlm_mini.families.parts.maps import Weights
from mlx_vlm_mini.preprocessing.settings import ImageSettings
from mlx_vlm_mini.preprocessing.tiles import PageTiles, choose_grid

from .internvl import pixels

__all__ = ["CHAT_TEMPLATE", "IMAGE_PROCESSOR", "WEIGHTS", "config", "image_text", "pixels"]

IMAGE_PROCESSOR = "GraniteDocling"

_CONNECTOR = "model.vision_model.connector."
_OWN = {"ln_in": "norm_in", "ln_mid": "norm_mid", "mlp_fc2": "proj", "ln_out": "norm_out"}
_TAP = {"layer_norm": "norm", "linear_1": "layers.0", "linear_2": "layers.1"}
WEIGHTS: Weights = {
    **clip_weights("model.vision_model.", post_norm=True),
    **{_CONNECTOR + theirs: f"projector.{ours}" for theirs, ours in _OWN.items()},
    **{f"{_CONNECTOR}{way}.projection": f"projector.{way}.projection" for way in ("coarse", "fine")},
    **{
        f"{_CONNECTOR}{way}.deepstack_mergers.{{}}.{theirs}": f"projector.{way}.taps.{{}}.{ours}"
        for way in ("coarse", "fine")
        for theirs, ours in _TAP.items()
    },
    **llama_weights("model.text_model."),
    "lm_head": "decoder.lm_head",
    "model.density_router.*": None,
    "mtp.*": None,  # heads that draft tokens, for other engines
}

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|start_of_role|>' + message['role'] + '<|end_of_role|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}{{ '<|end_of_text|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
)

_VISION = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "image_size": 512, "patch_size": 16, "scale_factor": 4, "deepstack_visual_indexes": None, "use_fine_route": True,
}  # fmt: skip
_TAPS = (3, 7, 10)
_TEXT = {
    "vocab_size": 133800, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5,
    "embedding_multiplier": 12.0, "residual_multiplier": 0.263, "attention_multiplier": 0.015625, "logits_scaling": 4.0,
}  # fmt: skip
_EPS = 1e-5  # of the connector's norms; no config says it
_AROUND = "<fake_token_around_image>"


def config(hf: Mapping[str, Any]) -> VLMConfig:
    vision, text = {**_VISION, **(hf.get("vision_config") or {})}, {**_TEXT, **(hf.get("text_config") or {})}
    named = vision["deepstack_visual_indexes"]
    taps = tuple(sorted(set(_TAPS if named is None else named)))  # in the order of the blocks
    decoder = text_decoder(
        {**text, "model_type": "llama"}, proven=("llama",), tie_word_embeddings=hf.get("tie_word_embeddings", True)
    )
    if (
        len(taps) > decoder.num_hidden_layers
        or vision.get("out_hidden_size", decoder.hidden_size) != decoder.hidden_size
    ):
        raise CheckpointError(
            f"config.json: deepstack_visual_indexes {list(taps)} or out_hidden_size do not fit the decoder"
        )
    tower = vision_tower(
        {**vision, "model_type": "siglip_vision_model"},
        feature_layers=[-1, *(number + 1 for number in taps)],
        drop_first_feature=False,
        post_norm=True,
    )
    factor, side = vision["scale_factor"], tower.image_size // tower.patch_size
    if side % factor or factor % 2 or decoder.hidden_size % 4:
        raise CheckpointError(
            f"config.json: squares of scale_factor {factor} do not fit tiles of {side} x {side} patches"
        )
    scales = ScaleConfig(
        embed_scale=text["embedding_multiplier"],
        image_scale=text["embedding_multiplier"],
        residual_scale=text["residual_multiplier"],
        logits_scaling=text["logits_scaling"],
        query_pre_attn_scalar=text["attention_multiplier"] ** -2,
    )
    return VLMConfig(
        family="granite_docling",
        vision=tower,
        projector=ProjectorConfig(
            input_size=tower.feature_size * factor**2,
            hidden_size=decoder.hidden_size,
            num_layers=2,
            hidden_act="gelu",
            bias=True,
            shuffle=ShuffleConfig(factor=factor, transposed=False),
            norm_eps=_EPS,
            connector=ConnectorConfig(taps=len(taps), fine=bool(vision["use_fine_route"])),
        ),
        decoder=replace(decoder, scales=scales),
        image_token_id=hf.get("image_token_id", 100337),
        image_grid_pinpoints=None,
    )


def image_text(config: VLMConfig, settings: ImageSettings, image_token: str, size: tuple[int, int]) -> str:
    assert isinstance(settings.tiling, PageTiles)  # loading.py has seen to it
    tile = image_token * (config.tokens_of_row * (4 if settings.tiling.fine else 1))
    rows, columns = choose_grid(size, settings.tiling)
    lines = ("".join(f"{_AROUND}<row_{r}_col_{c}>{tile}" for c in range(1, columns + 1)) for r in range(1, rows + 1))
    whole = f"\n{_AROUND}<global-img>{tile}{_AROUND}" if rows * columns > 1 else ""
    return "".join(f"{line}\n" for line in lines) + whole
