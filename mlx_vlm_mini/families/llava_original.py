"""LLaVA (2023), LLaVA-1.5 and LLaVA-1.6 as their authors write them (`liuhaotian/*`): config.json says it all.

Sources: arXiv:2304.08485, arXiv:2310.03744; llava/model/{llava_arch.py,builder.py}, llava/mm_utils.py and
llava/model/multimodal_{encoder,projector} of github.com/haotian-liu/LLaVA.

The vision tower is a checkpoint of its own, which config.json names, unless its tensors lie in this one (assembly.py).
InternVL 1.0 (`OpenGVLab/InternVL-Chat-ViT-6B-Vicuna-*`; internvl_chat_llava of github.com/OpenGVLab/InternVL) has an
InternViT there; how large its images are is told by the tower's name, and its preprocessor_config.json is not read.

`<image>` is no token: the text is cut there. Two things are otherwise than in the original: a prompt is never cut off
at `tokenizer_model_max_length`, and tokens that its code would add with untrained embeddings are refused.
"""

import ast
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from mlx_vlm_mini.config import Prescribed, ProjectorConfig, TileMerge, VisionConfig, VLMConfig
from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.families.parts.configs import clip_weights, llama_weights, text_decoder, vision_tower
from mlx_vlm_mini.families.parts.conversations import chat_template, choose_conversation, find_conversation
from mlx_vlm_mini.families.parts.maps import Weights, intern_vit
from mlx_vlm_mini.preprocessing.anyres import Tiling, count_tokens, read_pinpoints
from mlx_vlm_mini.preprocessing.pixels import preprocess
from mlx_vlm_mini.preprocessing.settings import IMAGENET_MEAN, IMAGENET_STD, ImageSettings

from . import llava_next
from .internvl_chat import authors_intern_vit

TOWER = "model.vision_tower.vision_tower."
"""What stands before the tower's names in a checkpoint that holds it; CLIP's own begin with `vision_model.`."""

WEIGHTS: Weights = {
    **clip_weights(TOWER + "vision_model."),
    **intern_vit(TOWER),
    "model.mm_projector": "projector.layers.0",
    **{f"model.mm_projector.{2 * i}": f"projector.layers.{i}" for i in range(8)},  # activations between them
    **llama_weights("model."),
    "lm_head": "decoder.lm_head",
    "model.image_newline": "image_newline",
}

IMAGE_PROCESSOR = "CLIP"

CHAT_TEMPLATE = ""  # config.json prescribes it

INTERN_VIT = "intern_vit_6b"
"""The `model_type` of an InternViT's config.json, whatever its size."""

KNOWN_TOWERS = {  # of CLIP-L/14, by their side in pixels
    "openai/clip-vit-large-patch14": 224,
    "openai/clip-vit-large-patch14-336": 336,
}
_CLIP_L = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "patch_size": 14,
}  # fmt: skip
_DECODERS = {  # `llama` in the oldest folders
    "llava": "llama", "llava_llama": "llama", "llama": "llama", "llava_mistral": "mistral", "mistral": "mistral",
}  # fmt: skip
_MERGES: dict[str, TileMerge] = {"flat": "flat", "spatial": "grid", "spatial_unpad": "unpad_floor"}


def is_original(hf: Mapping[str, Any]) -> bool:
    """Whether a config.json is the authors' own: Hugging Face's LLaVA has the same `model_type`."""
    kind = hf.get("model_type")
    return isinstance(kind, str) and kind in _DECODERS and not {"mm_vision_tower", "mm_projector_type"}.isdisjoint(hf)


def has_norm(hf: Mapping[str, Any]) -> bool:
    """Whether a norm stands in front of the projector: its tensors have other names then (llava_normed.py)."""
    return _projector(hf.get("mm_projector_type", "linear"))[1]


def config(hf: Mapping[str, Any]) -> VLMConfig:
    """`vision_config`, `vision_preprocessor_config` and `conversation` are ours, of `assembly.py`."""
    layer = _one_of(hf, "mm_vision_select_layer", range(-100, 100), None)
    patches = _one_of(hf, "mm_vision_select_feature", ("patch", "cls_patch"), "patch") == "patch"
    values = _tower(hf)
    intern = values.get("model_type") == INTERN_VIT
    if intern:
        tower = replace(authors_intern_vit(values, layer), drop_first_feature=patches)
    else:
        tower = vision_tower(values, feature_layers=layer, drop_first_feature=patches)
    decoder = text_decoder({**hf, "model_type": _DECODERS[hf["model_type"]]})
    shape = _one_of(hf, "image_aspect_ratio", ("square", "pad") if intern else ("square", "pad", "anyres"), "square")
    pinpoints = _pinpoints(hf.get("image_grid_pinpoints"), tower.image_size) if shape == "anyres" else None
    merge = _MERGES[_one_of(hf, "mm_patch_merge_type", _MERGES, "flat")]
    num_layers, norm = _projector(hf.get("mm_projector_type", "linear"))
    marked = bool(hf.get("mm_use_im_start_end", False))
    conversation = find_conversation(hf.get("conversation") or choose_conversation(hf))
    return VLMConfig(
        family="llava_original",
        vision=tower,
        projector=ProjectorConfig(
            input_size=tower.feature_size,
            hidden_size=decoder.hidden_size,
            num_layers=num_layers,
            hidden_act="gelu",
            bias=True,
            norm_eps=1e-5 if norm else None,
        ),
        decoder=decoder,
        image_token_id=None,
        image_grid_pinpoints=pinpoints,
        tile_merge=merge,
        prescribed=Prescribed(
            image_token="<image>",
            cut_at_images=True,
            chat_template=chat_template(conversation, "<im_start><image><im_end>\n" if marked else "<image>\n"),
            end_token=conversation.end_token,
            stop=conversation.stop,
            extra_tokens=_marks(hf) if marked else (),
            image_processor=_image_processor(hf, tower, shape, pinpoints),
        ),
    )


def _one_of(hf: Mapping[str, Any], key: str, known: Any, default: Any) -> Any:
    value = default if hf.get(key) is None else hf[key]
    if isinstance(value, list | dict | bool) or value not in known:
        listed = f" (known: {', '.join(known)})" if not isinstance(known, range) else ""
        raise CheckpointError(f"config.json: {key} {value!r} is not known{listed}")
    return value


def _tower(hf: Mapping[str, Any]) -> Mapping[str, Any]:
    given, name = hf.get("vision_config"), hf.get("mm_vision_tower")
    if given is not None:
        return dict(given)
    if name not in KNOWN_TOWERS:
        raise CheckpointError(f"config.json names the vision tower {name!r}, whose own config.json is needed")
    return {**_CLIP_L, "image_size": KNOWN_TOWERS[name]}


def _projector(kind: Any) -> tuple[int, bool]:
    """Its layers, and whether a norm stands before them."""
    if kind in ("linear", "identity"):
        return int(kind == "linear"), False
    if kind == "two_mlp":
        raise CheckpointError("config.json: mm_projector_type 'two_mlp' is of InternVL-14B's QLLaMA, not supported")
    match = re.fullmatch(r"mlp([1-8])x_gelu(.*ln.*)?", str(kind))
    if match is None:
        raise CheckpointError(f"config.json: mm_projector_type {kind!r} is not known (linear, mlpNx_gelu, identity)")
    return int(match[1]), match[2] is not None


def _pinpoints(value: Any, tile_size: int) -> tuple[tuple[int, int], ...]:
    """The authors write [width, height], and in an order that decides between equals."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)  # reads numbers and lists, runs nothing
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            raise CheckpointError(f"config.json: image_grid_pinpoints {value!r} is no list of sizes") from None
    turned = [list(each)[::-1] if isinstance(each, list | tuple) else each for each in value or []]
    return read_pinpoints(turned, tile_size, "config.json")


def _marks(hf: Mapping[str, Any]) -> tuple[str, ...]:
    """Tokens that the original adds when it loads a model, in its order."""
    return ("<im_patch>",) * bool(hf.get("mm_use_im_patch_token", True)) + ("<im_start>", "<im_end>")


def _image_processor(hf: Mapping[str, Any], tower: VisionConfig, shape: str, pinpoints: Any) -> dict[str, Any]:
    """The tower's own settings, and what is done to an image before; of an InternViT those that the authors chose."""
    side, intern = tower.image_size, tower.resample_positions
    if intern:  # whatever size its positions have
        side = 448 if "448" in str(hf.get("mm_vision_tower")) else 336
    settings: dict[str, Any] = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    if intern:
        settings |= {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}
    else:
        settings = dict(hf.get("vision_preprocessor_config") or settings)
    if shape == "pad":
        return {**settings, "image_processor_type": "LlavaImageProcessor", "do_pad": True}
    if shape == "anyres":
        return {**settings, "image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": pinpoints}
    return {**settings, "image_processor_type": "CLIPImageProcessor"}


def pixels(image: Image.Image, settings: ImageSettings) -> np.ndarray:
    return preprocess(image, settings)[None] if settings.tiling is None else llava_next.pixels(image, settings)


def image_text(config: VLMConfig, settings: ImageSettings, image_token: str, size: tuple[int, int]) -> str:
    if not isinstance(settings.tiling, Tiling) or config.tile_merge is None:
        resampled = settings.crop_size if config.vision.resample_positions else None
        return image_token * config.vision.features_at(resampled[0] if resampled else config.vision.image_size)
    vision, tiling = config.vision, settings.tiling
    side = vision.image_size // vision.patch_size
    return image_token * count_tokens(
        size, tiling.pinpoints, tile_size=tiling.tile_size, side=side, merge=config.tile_merge
    )
