"""A checkpoint whose parts lie in several places: the original LLaVA's vision tower, a lone projector, a delta's base.

Sources: llava/model/{builder.py,llava_arch.py,apply_delta.py} of github.com/haotian-liu/LLaVA.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import isqrt
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.families.llava_original import INTERN_VIT, KNOWN_TOWERS, TOWER, is_original
from mlx_vlm_mini.families.parts.conversations import choose_conversation, find_conversation
from mlx_vlm_mini.files import read_json

from .folder import DTYPES, Checkpoint, TensorInfo, find_tensor_files, is_folder, open_checkpoint
from .hub import fetch_headers, find_folder, has_weights, is_hub_name
from .pickled import Pickled, read_pickled

Need = Literal["tensors", "headers", "config"]
_PROJECTOR = "mm_projector."
_ROWS_MAY_DIFFER = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass
class Assembly(Checkpoint):
    """A checkpoint with tensors of others.

    Attributes:
        tower: holds tensors that belong to this checkpoint, too: by their names here, to those there.
        loose: tensors of files that a checkpoint's index does not know.
        base: what is to be added to each tensor.
        headers_only: the tensors themselves are not at hand.
    """

    tower: tuple[Checkpoint, Mapping[str, str]] | None = None
    loose: Mapping[str, Pickled] = field(default_factory=dict)
    base: Checkpoint | None = None
    headers_only: bool = False

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo | Pickled]:
        found = {**super().tensors, **self.loose}
        if self.tower is not None:
            checkpoint, names = self.tower
            found |= {ours: checkpoint.tensors[theirs] for ours, theirs in names.items()}
        return found

    def read(self, name: str) -> mx.array:
        if name in self.loose:
            return self.loose[name].read()
        if self.tower is not None and name in self.tower[1]:
            return self.tower[0].read(self.tower[1][name])
        array = super().read(name)
        if self.base is None or name not in self.base.tensors or name.endswith("inv_freq"):
            return array
        base = self.base.read(name).astype(array.dtype)
        if base.shape == array.shape:
            return array + base
        rows, columns = base.shape  # what the delta's vocabulary has more is the model's own
        return array.at[:rows, :columns].add(base)


def open_model(
    name: str | Path,
    *,
    revision: str | None = None,
    weights: bool = True,
    vision_tower: str | Path | None = None,
    conversation: str | None = None,
    base: str | Path | None = None,
) -> Checkpoint:
    """A checkpoint from a folder or a name on the Hub, with all its parts.

    What the original LLaVA keeps elsewhere is written into `config`, so that a conversion stands alone: `vision_config`
    and `vision_preprocessor_config` of the tower, `conversation` by the model's name.

    Args:
        revision: branch, tag or commit on the Hub.
        weights: whether the tensors are needed, or their headers alone.
        vision_tower: the tower's folder or Hub name, in place of config.json's `mm_vision_tower`. That is looked for as
            a folder inside the checkpoint's, then as a path from here, then on the Hub.
        conversation: name of the prompt, in place of the one that belongs to the model's name.
        base: weights to be added to those of a delta.

    Raises:
        CheckpointError: a part cannot be found or used, or an option has nothing to do.
    """
    on_hub = isinstance(name, str) and is_hub_name(name)
    if on_hub and weights and base is None and _is_called_delta(name):  # before all of it is fetched
        _refuse_delta(open_checkpoint(find_folder(name, revision=revision, weights=False)), name)
    checkpoint = open_checkpoint(find_folder(name, revision=revision, weights=weights))
    if on_hub and not weights and not has_weights(checkpoint.folder):
        checkpoint.headers = fetch_headers(str(name), checkpoint.folder, revision=revision)
    if not is_original(checkpoint.config):
        for option, given in (("vision tower", vision_tower), ("conversation", conversation), ("base", base)):
            if given is not None:
                raise CheckpointError(f"{name} takes no {option} of yours: it is no original LLaVA checkpoint")
        return checkpoint
    return _assemble(checkpoint, str(name), weights, vision_tower, conversation, base)


def _assemble(
    checkpoint: Checkpoint,
    name: str,
    weights: bool,
    vision_tower: str | Path | None,
    conversation: str | None,
    base: str | Path | None,
) -> Assembly:
    config = checkpoint.config = dict(checkpoint.config)
    if conversation is not None:
        find_conversation(conversation)
    called = name if is_hub_name(name) else str(checkpoint.folder.absolute())
    config["conversation"] = conversation or config.get("conversation") or choose_conversation(config, called)
    loose = _lone_projector(checkpoint)
    headers_only = checkpoint.headers is not None
    whole = Assembly(checkpoint.folder, config, checkpoint._headers, loose=loose, headers_only=headers_only)
    inside = any(tensor.startswith(TOWER) for tensor in checkpoint.tensors)
    known = inside and ("vision_config" in config or str(config.get("mm_vision_tower")) in KNOWN_TOWERS)
    if vision_tower is not None or not known:
        need: Need = "config" if inside else "tensors" if weights else "headers"
        tower = _open_tower(checkpoint.folder, config, name, need, vision_tower)
        _take_tower(whole, tower, inside)
    _apply_base(whole, name, base)
    return whole


def _lone_projector(checkpoint: Checkpoint) -> dict[str, Pickled]:
    """The projector of mm_projector.bin, where the checkpoint's own files hold none."""
    file = checkpoint.folder / "mm_projector.bin"
    if not checkpoint.headers and not find_tensor_files(checkpoint.folder):
        for part, what in (("mm_projector.bin", "a projector alone"), ("adapter_config.json", "adapters alone (LoRA)")):
            if (checkpoint.folder / part).is_file():
                raise CheckpointError(
                    f"{checkpoint.folder} holds {what}; merge it with its language model by the original's tools first"
                )
    if any(_PROJECTOR in tensor for tensor in checkpoint.tensors) or not file.is_file():
        return {}
    found = read_pickled(file)
    return {"model." + name[name.index(_PROJECTOR) :]: info for name, info in found.items() if _PROJECTOR in name}


def _open_tower(folder: Path, config: Mapping[str, Any], name: str, need: Need, given: str | Path | None) -> Checkpoint:
    named = config.get("mm_vision_tower", config.get("vision_tower"))
    if given is None and (not isinstance(named, str) or not named):
        raise CheckpointError(f"{folder}/config.json names no vision tower: give its folder as vision tower")
    places = [folder / named, Path(named)] if given is None and isinstance(named, str) else []
    if places and _leads_out(folder, str(named)):
        raise CheckpointError(
            f"{folder}/config.json names the vision tower '{named}', outside its folder: where that is yours, give it "
            "as vision tower (--vision-tower)"
        )
    source: str | Path = next(filter(is_folder, places), given or str(named))
    try:
        tower = open_checkpoint(find_folder(source, weights=need == "tensors"))
        if isinstance(source, str) and is_hub_name(source) and need == "headers" and not has_weights(tower.folder):
            tower.headers = fetch_headers(source, tower.folder)
    except CheckpointError as error:
        if given is not None:
            raise
        raise CheckpointError(
            f"{name} needs the vision tower '{named}': {error}; give its folder as vision tower (--vision-tower)"
        ) from None
    kind = tower.config.get("model_type")
    if kind not in ("clip", "clip_vision_model", INTERN_VIT):
        raise CheckpointError(
            f"{tower.folder}: the vision tower is a {kind}; original LLaVA checkpoints take CLIP or InternViT"
        )
    return tower


def _leads_out(folder: Path, named: str) -> bool:
    """Whether a name in a config.json goes up or to the root of this machine's folders."""
    upward = Path(named).is_absolute() or named.startswith("~") or ".." in Path(named).parts
    try:
        return upward and not (folder / named).resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # no name of a file: RuntimeError of links in a circle
        return True


def _take_tower(whole: Assembly, tower: Checkpoint, inside: bool) -> None:
    """Put a tower's settings into the checkpoint's config, and its tensors among those that are not there already."""
    pair, intern = (tower.config["model_type"] == kind for kind in ("clip", INTERN_VIT))
    part = (tower.config.get("vision_config") or tower.config.get("vision_config_dict") or {}) if pair else tower.config
    if not isinstance(part, dict):
        raise CheckpointError(f"{tower.folder}/config.json: vision_config must be an object, not {part!r}")
    whole.config["vision_config"] = {**part, "model_type": INTERN_VIT if intern else "clip_vision_model"}
    settings = tower.folder / "preprocessor_config.json"
    if settings.is_file() and not intern:
        whole.config["vision_preprocessor_config"] = read_json(settings)
    if inside:
        positions = whole.tensors.get(TOWER + "embeddings.position_embedding")
        if intern and positions is not None:  # they may have been resampled before the model was saved
            side = isqrt(max(positions.shape[-2] - 1, 0)) if len(positions.shape) > 1 else 0
            whole.config["vision_config"]["image_size"] = side * part.get("patch_size", 14)
        return
    if tower.is_mlx or tower.quantization is not None:
        raise CheckpointError(f"{tower.folder} was converted to MLX's format: give the original vision tower")
    prefix = "vision_model." if any(theirs.startswith("vision_model.") for theirs in tower.tensors) else ""
    ours = TOWER if intern else TOWER + "vision_model."
    names = {
        ours + theirs.removeprefix(prefix): theirs
        for theirs in tower.tensors
        if theirs.startswith(prefix or ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm."))
    }
    if not names:
        raise CheckpointError(f"{tower.folder} has no vision tower: none of its tensors is called vision_model.*")
    whole.tower = tower, names


def _is_called_delta(name: str | Path) -> bool:
    return "delta" in str(name).rstrip("/").rpartition("/")[2].lower()


def _refuse_delta(checkpoint: Checkpoint, name: str | Path) -> None:
    if is_original(checkpoint.config):
        size = {4096: " (7B)", 5120: " (13B)"}.get(checkpoint.config.get("hidden_size", 4096), " of the same size")
        raise CheckpointError(
            f"{name} holds the difference to the first LLaMA's weights{size}, to which it must be added: "
            f"mlx-vlm-mini convert {name} DESTINATION --base LLAMA"
        )


def _apply_base(whole: Assembly, name: str, base: str | Path | None) -> None:
    """Refuse a delta without its base and a base without a delta; check that they fit."""
    norm = whole.tensors.get("model.norm.weight")
    if whole.headers_only or norm is None or not norm.is_float:
        delta = _is_called_delta(name) and not whole.is_mlx
    else:  # a whole model's is around 1
        delta = float(mx.abs(Checkpoint.read(whole, "model.norm.weight").astype(mx.float32)).mean()) < 0.1
    if delta and base is None:
        _refuse_delta(whole, name)
    if base is None:
        return
    if not delta:
        raise CheckpointError(f"{name} holds whole weights, so nothing is to be added to them: leave the base out")
    whole.base = open_checkpoint(find_folder(base))
    for tensor, info in whole.base.tensors.items():
        own = whole.tensors.get(tensor)
        if tensor.endswith("inv_freq"):
            continue
        smaller = (
            own is not None and tensor in _ROWS_MAY_DIFFER and len(info.shape) == 2
            and info.shape[0] <= own.shape[0] and info.shape[1] <= own.shape[1]
        )  # fmt: skip
        if own is None or (info.shape != own.shape and not smaller) or info.dtype not in DTYPES or not info.is_float:
            shape = "no such tensor" if own is None else f"shape {list(own.shape)}"
            raise CheckpointError(
                f"{base} is not what {name} was taken from: {tensor} has shape {list(info.shape)} there, {shape} here"
            )
    lacking = [
        tensor for tensor in whole.tensors
        if tensor not in whole.base.tensors and _PROJECTOR not in tensor and not tensor.startswith(TOWER)
        and not tensor.endswith("inv_freq")
    ]  # fmt: skip
    if lacking:
        raise CheckpointError(f"{base} is not what {name} was taken from: it lacks {lacking[0]}")
