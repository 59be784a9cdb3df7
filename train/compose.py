"""A LLaVA checkpoint from a vision tower and a decoder that were pretrained apart; the projector between them is fresh.

Source of the recipe: LLaVA (arXiv:2304.08485), LLaVA-1.5 (arXiv:2310.03744).
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_vlm_mini.checkpoints.folder import Checkpoint, find_tensor_files, open_checkpoint
from mlx_vlm_mini.checkpoints.hub import find_folder
from mlx_vlm_mini.checkpoints.load import plan
from mlx_vlm_mini.checkpoints.weights import hub_name, rename, to_mlx_layout, to_torch_layout
from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.families import llava
from mlx_vlm_mini.families.parts.configs import clip_weights, llama_weights
from mlx_vlm_mini.families.parts.maps import Weights
from mlx_vlm_mini.files import read_json, written_whole
from mlx_vlm_mini.model import VLM

from .save import save_tensors

IMAGE_TOKEN = "<image>"
CHAT_TEMPLATE = (  # LLaVA-1.5's prompt; an answer is closed by the end token, so that the model learns to stop
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] %}{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{{ eos_token if message['role'] == 'assistant' else ' ' }}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
_VISION_NAMES = {**clip_weights("vision_model."), **clip_weights("")}
_TEXT_NAMES = {**llama_weights("model."), "lm_head": "decoder.lm_head"}
_NORM = "vision_tower.vision_model.post_layernorm"


def compose(
    vision: str | Path,
    decoder: str | Path,
    destination: str | Path,
    *,
    projector: Literal["mlp", "linear"] = "mlp",
    tokenizer: str | Path | None = None,
    feature_layer: int = -2,
    seed: int = 0,
    dtype: mx.Dtype | None = None,
) -> None:
    """Write a LLaVA checkpoint of two parts; what has no weights gets fresh ones.

    Args:
        vision: a CLIP or SigLIP checkpoint (folder or Hub name), or a config alone (a folder with config.json, or a
            JSON file).
        decoder: a Llama, Mistral or Qwen2 checkpoint, or a config alone.
        destination: a folder that does not exist yet.
        projector: LLaVA-1.5's two layers, or LLaVA's one, which other tools do not read in this layout.
        tokenizer: folder of the tokenizer where the decoder's has none. It gets the token `<image>`.
        feature_layer: the hidden state of the tower that the projector reads.
        seed: of the fresh weights.
        dtype: type of the tensors in the file; by default float32.

    Raises:
        CheckpointError: a part cannot be used, or the destination is in the way.
    """
    destination = Path(destination)
    if destination.exists():
        raise CheckpointError(f"{destination} exists; name another folder or remove it first")
    tower, text = _open_part(vision), _open_part(decoder)
    tokens = find_folder(tokenizer, weights=False) if tokenizer is not None else text.folder
    vision_config, text_config = _part_config(tower.config, "vision_config"), _part_config(text.config, "text_config")
    with written_whole(destination) as work:
        image_token_id = _write_tokenizer(tokens, work)
        vocab_size = text_config["vocab_size"] = max(int(text_config.get("vocab_size", 32000)), image_token_id + 1)
        clip = str(vision_config["model_type"]).startswith("clip")
        config: dict[str, Any] = {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "image_token_index": image_token_id,
            "vision_feature_layer": feature_layer,
            "vision_feature_select_strategy": "default" if clip else "full",
            "projector_hidden_act": "gelu",
            "tie_word_embeddings": bool(text_config.get("tie_word_embeddings", False)),
            "vision_config": vision_config,
            "text_config": text_config,
        }
        if projector != "mlp":
            config["projector_type"] = projector
        (work / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        understood = llava.config(config)
        mx.random.seed(seed)
        whole = replace(understood.vision, feature_layers=(understood.vision.num_hidden_layers,))
        model = VLM(replace(understood, vision=whole))  # with the blocks behind the last one read, too
        ours = dict(tree_flatten(model.parameters()))
        ours["vision.pos_embed"] = _places(whole.image_size // whole.patch_size, ours["vision.pos_embed"].shape)
        ours["vision.patch_embed.weight"] = _waves(whole.patch_size, whole.hidden_size)
        width = whole.hidden_size
        tensors = {f"{_NORM}.weight": mx.ones(width), f"{_NORM}.bias": mx.zeros(width)}
        tensors |= {f"{_NORM}.{part}": array for part, array in _fill(ours, tower, _VISION_NAMES, vocab_size).items()}
        _fill(ours, text, _TEXT_NAMES, vocab_size)
        tensors |= {hub_name(name, llava.WEIGHTS): to_torch_layout(name, array) for name, array in ours.items()}
        save_tensors(work / "model.safetensors", tensors, dtype)
        given = None if Path(vision).suffix == ".json" else tower.folder
        _write_image_settings(given, whole.image_size, clip, work)
        for_others = {  # who make one `<image>` as many tokens as the tower gives features
            "processor_class": "LlavaProcessor",
            "patch_size": whole.patch_size,
            "num_additional_image_tokens": int(clip),
            "vision_feature_select_strategy": config["vision_feature_select_strategy"],
            "image_token": IMAGE_TOKEN,
        }
        (work / "processor_config.json").write_text(json.dumps(for_others, indent=2), encoding="utf-8")
        plan(open_checkpoint(work))


def _places(side: int, shape: tuple[int, ...]) -> mx.array:
    """Fresh positions of a square grid of patches: sines and cosines of rows and of columns, as large as what
    patches look like, from which a tower learns places sooner than from small noise (arXiv:2205.01580). Rows before
    the grid's, a class token's, are noise.
    """
    rows, width = shape
    rates = np.geomspace(1, 1 / side, width // 4)
    angles = np.arange(side)[:, None] * rates
    waves = 0.5 * np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    grid = np.concatenate([np.repeat(waves, side, axis=0), np.tile(waves, (side, 1))], axis=1)
    places = 0.02 * np.array(mx.random.normal(shape))
    places[rows - side * side :, : grid.shape[1]] = grid
    return mx.array(places, dtype=mx.float32)


def _waves(side: int, width: int) -> mx.array:
    """A fresh patch embedding, float32[width, side, side, 3]: each colour's lowest two-dimensional cosines, the
    larger the higher their frequency, of which pictures hold the less; so edges count beside a patch's mean colour
    from the first step on, which under random filters they do not.
    """
    places = (np.arange(side) + 0.5) * np.pi / side
    pairs = sorted(((u, v) for u in range(side) for v in range(side)), key=lambda pair: (pair[0] + pair[1], pair))
    filters = np.zeros((width, side, side, 3))
    for number in range(min(width, 3 * side * side)):
        (u, v), color = pairs[number // 3], number % 3
        wave = np.outer(np.cos(u * places), np.cos(v * places))
        filters[number, :, :, color] = wave / np.linalg.norm(wave) * 2 * (1 + u + v) / side
    return mx.array(filters, dtype=mx.float32)


def _open_part(name: str | Path) -> Checkpoint:
    path = Path(name)
    if path.suffix == ".json" and path.is_file():
        return Checkpoint(path.parent, read_json(path), headers=[])
    checkpoint = open_checkpoint(find_folder(name))
    if not find_tensor_files(checkpoint.folder):
        checkpoint.headers = []
    return checkpoint


def _part_config(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The part's own config: CLIP's stands inside that of the pair of towers."""
    part = dict(config.get(key) or config)
    if key == "vision_config":
        kind = str(part.get("model_type", config.get("model_type", "")))
        part["model_type"] = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}.get(kind, kind)
    return part


def _write_tokenizer(folder: Path, destination: Path) -> int:
    """Copy the tokenizer with `<image>` among its tokens, and a chat template; return the id of `<image>`."""
    from tokenizers import AddedToken, Tokenizer

    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(f"{folder} has no tokenizer.json: name a folder that has one with --tokenizer")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)])
    tokenizer.save(str(destination / "tokenizer.json"))
    for name in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja"):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, destination / name)
    own = (destination / "tokenizer_config.json").is_file() and "chat_template" in read_json(
        destination / "tokenizer_config.json"
    )
    if not own and not (destination / "chat_template.jinja").is_file():
        (destination / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    token_id = tokenizer.token_to_id(IMAGE_TOKEN)
    assert token_id is not None
    return int(token_id)


def _fill(ours: dict[str, mx.array], part: Checkpoint, names: Weights, vocab_size: int) -> dict[str, mx.array]:
    """Put a part's tensors in the place of fresh ones; returns those of the tower's last norm, which we do not use.

    Rows that the vocabulary gained are the mean of those it had (as transformers' `resize_token_embeddings` starts).
    """
    norm = {}
    for theirs in part.tensors:
        if theirs.endswith(("post_layernorm.weight", "post_layernorm.bias")):
            norm[theirs.rpartition(".")[2]] = part.read(theirs)
            continue
        try:
            name = next(iter(rename(theirs, names)), None)
        except KeyError:
            if theirs.startswith(("text_model.", "logit_", "visual_projection", "text_projection")):
                continue  # CLIP's other half
            raise CheckpointError(f"{part.folder} has {theirs}, which belongs to no part that is known here") from None
        if name is None or name not in ours:
            continue
        array = to_mlx_layout(name, part.read(theirs), part).astype(mx.float32)
        if name in ("decoder.embed_tokens.weight", "decoder.lm_head.weight") and array.shape[0] < vocab_size:
            mean = mx.broadcast_to(array.mean(axis=0), (vocab_size - array.shape[0], array.shape[1]))
            array = mx.concatenate([array, mean])
        if array.shape != ours[name].shape:
            raise CheckpointError(
                f"{part.folder}: {theirs} has shape {list(part.tensors[theirs].shape)}, "
                f"its config asks for {list(ours[name].shape)}"
            )
        ours[name] = array
    return norm


def _write_image_settings(tower: Path | None, side: int, clip: bool, destination: Path) -> None:
    """The tower's own settings, where it came in a folder that has them."""
    name = "preprocessor_config.json"
    if tower is not None and (tower / name).is_file():
        shutil.copyfile(tower / name, destination / name)
        return
    square = {"height": side, "width": side}
    settings: dict[str, Any] = {"image_processor_type": "SiglipImageProcessor", "size": square}
    if clip:  # LLaVA-1.5's: made square with bars, so that nothing is cut off
        settings = {
            "image_processor_type": "LlavaImageProcessor", "do_pad": True, "do_center_crop": False, "size": square,
        }  # fmt: skip
    (destination / name).write_text(json.dumps(settings, indent=2), encoding="utf-8")
