"""The conversion itself: a stream over tensors into a new folder that appears only when it is whole."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_vlm_mini.assembly import open_model
from mlx_vlm_mini.checkpoint import Checkpoint, open_checkpoint
from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.hub import SMALL_FILES
from mlx_vlm_mini.loading import DTypeName, load_processor, plan

from .quantize import Mode, Part, Quantization, choose, plan_outputs
from .write import write_tensors


@dataclass(frozen=True)
class Report:
    """What a conversion did.

    Attributes:
        source_bytes, bytes: size of all tensors before and after.
        weights: number of weights.
        skipped: layers that stayed in floating point although quantization was asked for, with the reason.
    """

    destination: Path
    source_bytes: int
    bytes: int
    weights: int
    skipped: tuple[tuple[str, str], ...]

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.weights


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    bits: int | None = None,
    group_size: int = 64,
    mode: Mode = "affine",
    part_bits: Mapping[Part, int | None] | None = None,
    dtype: DTypeName | None = None,
    revision: str | None = None,
    vision_tower: str | Path | None = None,
    conversation: str | None = None,
    base: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Convert a checkpoint to MLX's format, tensor by tensor.

    The tensors keep the names that they have on the Hub. The destination appears when everything is written and
    checked; until then the work is in a hidden folder beside it, which a failure removes.

    Args:
        source: a checkpoint folder, or a Hub name.
        destination: a folder that does not exist yet, or is empty.
        bits: 2, 3, 4, 5, 6 or 8, of the decoder's linear layers, embeddings and head; None quantizes nothing.
        group_size: weights that share a scale: 32, 64 or 128.
        mode: "affine", or "mxfp4", "mxfp8", "nvfp4", which have bits and groups of their own.
        part_bits: bits of single parts: vision, projector, decoder, embeddings, head.
        dtype: type of what stays in floating point; by default as it is.
        revision: branch, tag or commit on the Hub.
        vision_tower, conversation: of an original LLaVA checkpoint, see `load`; the result holds both.
        base: LLaMA's weights, which the original LLaVA's first checkpoints hold the difference to.
        progress: called with bytes written and bytes in all.

    Raises:
        CheckpointError: the source is not usable, or the destination is in the way.
        OSError: the destination cannot be written.
    """
    destination = Path(os.path.expanduser(destination))  # noqa: PTH111 - Path's raises where there is no such user
    _check_destination(destination)
    checkpoint = open_model(source, revision=revision, vision_tower=vision_tower, conversation=conversation, base=base)
    quantizations = choose(bits, group_size, mode, part_bits or {})
    if quantizations and checkpoint.quantization is not None:
        raise CheckpointError(f"{source} is already quantized; quantize the original weights instead")
    planned = plan(checkpoint)
    load_processor(checkpoint, planned.family, planned.config)  # what cannot answer is not worth converting
    target: Any = None if dtype is None else getattr(mx, dtype)
    outputs, quantized, skipped = plan_outputs(planned, quantizations, target)
    if quantizations and not quantized:
        raise CheckpointError(
            f"nothing in {source} can be quantized in groups of {group_size}: no layer's width is a multiple of it"
        )
    total = sum(output.nbytes for output in outputs)
    _check_space(destination, total)

    work = destination.parent / f".{destination.name}.partial-{os.getpid()}"
    done = 0

    def step(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    try:
        work.mkdir(parents=True)
        write_tensors(work, outputs, step)
        _copy_small_files(checkpoint, work)
        config = _new_config(checkpoint.config, quantized, dtype)
        (work / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
        plan(open_checkpoint(work))  # a folder that does not load is never shown
        work.replace(destination)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Report(
        destination,
        sum(info.nbytes for info in checkpoint.tensors.values()),
        total,
        sum(map(checkpoint.num_weights, checkpoint.tensors)),
        tuple(skipped),
    )


def _check_destination(destination: Path) -> None:
    if destination.is_file():
        raise CheckpointError(f"{destination} is a file; name a folder that does not exist yet")
    if destination.exists() and any(destination.iterdir()):
        raise CheckpointError(f"{destination} exists and is not empty; name another folder or remove it first")


def _check_space(destination: Path, needed: int) -> None:
    existing = destination.absolute().parent
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise CheckpointError(
            f"the result takes {needed / 1e9:.1f} GB, {existing} has {free / 1e9:.1f} GB free: make room first"
        )


def _copy_small_files(checkpoint: Checkpoint, work: Path) -> None:
    """Tokenizer, processor and templates; never code."""
    for pattern in SMALL_FILES:
        for file in sorted(checkpoint.folder.glob(pattern)):
            if file.name != "config.json" and not file.name.endswith(".index.json"):
                shutil.copyfile(file, work / file.name)


def _new_config(
    config: dict[str, Any], quantized: Mapping[str, Quantization], dtype: DTypeName | None
) -> dict[str, Any]:
    """config.json with the new type, and with the commonest quantization and the layers that differ from it."""
    config = dict(config)
    if dtype is not None:
        for key in ("dtype", "torch_dtype"):
            if key in config:
                config[key] = dtype
    if quantized:
        common, _ = Counter(quantized.values()).most_common(1)[0]
        own = {name: each.as_config() for name, each in quantized.items() if each != common}
        config["quantization"] = {**common.as_config(), **own}
        config["quantization_config"] = config["quantization"]  # where other MLX tools look
    return config
