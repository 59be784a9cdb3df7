"""QLLaMA (`OpenGVLab/InternVL-14B-224px`): InternViT-6B, query tokens, and a LLaMA that lets them look at the image.

Sources: arXiv:2312.14238; internvl_g/internvl/model/internvl_stage2, internvl_g/eval and
clip_benchmark/clip_benchmark/models/internvl_huggingface of github.com/OpenGVLab/InternVL, of which nothing is run.

The prompt: the query tokens of one image, `<s>`, the text. It was trained on captions ("English caption:"), not on
conversations: of one it therefore reads the image and the last user message's text, and a system message is refused. It
also compares images with texts (`matching.py`).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mlx_vlm_mini.config import ContrastConfig, Prescribed, ProjectorConfig, QueryConfig, VLMConfig
from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.families.parts.configs import llama_weights, text_decoder
from mlx_vlm_mini.families.parts.conversations import one_image_template
from mlx_vlm_mini.families.parts.maps import Weights, intern_vit
from mlx_vlm_mini.preprocessing.settings import IMAGENET_MEAN, IMAGENET_STD, ImageSettings

from .internvl_chat import authors_intern_vit
from .paligemma import pixels

__all__ = ["CHAT_TEMPLATE", "IMAGE_PROCESSOR", "WEIGHTS", "config", "image_text", "pixels"]


def _pool(theirs: str, ours: str) -> Weights:
    """An attention pool; its biases first, whose names differ from their modules'."""
    attention, letters = f"{theirs}.cross_attn.", "qkv"
    return {
        **{f"{attention}{each}_bias": f"{ours}.{each}_proj.bias" for each in letters},
        **{f"{attention}{each}": f"{ours}.{each}_proj" for each in letters},
        attention + "proj": f"{ours}.o_proj",
        **{f"{theirs}.norm1_{each}": f"{ours}.norm_{each}" for each in letters},
    }


_CROSS = "model.layers.{}.cross_attn."
WEIGHTS: Weights = {
    **intern_vit("vision_model."),
    **llama_weights("qllama.model."),
    **{
        f"qllama.{_CROSS}{name}": f"decoder.layers.{{}}.cross_attn.{name}"
        for name in ("norm1", "norm2", "q_proj", "k_proj", "v_proj", "o_proj")
    },
    "qllama.lm_head": "decoder.lm_head",
    "query_tokens": "query_tokens",
    **_pool("clip_projector", "contrast.image_pool"),
    **_pool("clip_projector2", "contrast.query_pool"),
    "text_projection": "contrast.text_projection",
    "logit_scale": "contrast.logit_scale",
    "itm_head": "contrast.match",
}

IMAGE_PROCESSOR = "CLIP"

CHAT_TEMPLATE = ""  # config prescribes it


def is_qllama(hf: Mapping[str, Any]) -> bool:
    """Whether a config.json is QLLaMA's, whose `model_type` is that of transformers' InternVL."""
    return hf.get("model_type") == "internvl" and "qllama_config" in hf


def config(hf: Mapping[str, Any]) -> VLMConfig:
    for part in ("use_backbone_lora", "use_qllama_lora"):
        if hf.get(part):
            raise CheckpointError(f"config.json: {part} says that adapters lie beside the weights: merge them first")
    vision = dict(hf.get("vision_config") or {})
    if hf.get("force_image_size"):  # positions were resampled before the model was saved
        vision["image_size"] = hf["force_image_size"]
    tower = replace(authors_intern_vit(vision, -1), drop_first_feature=False)
    decoder = text_decoder({**(hf.get("qllama_config") or {}), "model_type": "llama"}, proven=("llama",))
    every = hf.get("cross_attention_frequency", 2)
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise CheckpointError(f"config.json: cross_attention_frequency must be 1 or more, not {every!r}")
    decoder = replace(
        decoder,
        layer_types=tuple(
            kind if number % every else "query_attention" for number, kind in enumerate(decoder.layer_types)
        ),
        queries=QueryConfig(
            num_query_tokens=hf.get("num_query_token", 96),
            vision_hidden_size=tower.feature_size,
        ),
    )
    return VLMConfig(
        family="qllama",
        vision=tower,
        projector=ProjectorConfig(
            input_size=tower.feature_size,
            hidden_size=tower.feature_size,
            num_layers=0,
            hidden_act="gelu",
            bias=False,
        ),
        decoder=decoder,
        image_token_id=None,
        image_grid_pinpoints=None,
        prescribed=Prescribed(
            image_token="<image>",
            cut_at_images=True,
            chat_template=one_image_template("QLLaMA"),
            end_token="</s>",
            files_first=True,
            image_processor={  # of the authors' captions and retrieval
                "size": {"height": tower.image_size, "width": tower.image_size},
                "do_center_crop": False,
                "image_mean": IMAGENET_MEAN,
                "image_std": IMAGENET_STD,
            },
        ),
        contrast=ContrastConfig(embed_dim=hf.get("clip_embed_dim", 768), pool_heads=hf.get("attn_pool_num_heads", 16)),
    )


def image_text(config: VLMConfig, settings: ImageSettings, image_token: str, size: tuple[int, int]) -> str:
    assert config.decoder.queries is not None
    return image_token * config.decoder.queries.num_query_tokens
