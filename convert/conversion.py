"""The conversion itself: a stream over tensors into a new folder that appears only when it is whole."""

import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_vlm_mini import __version__
from mlx_vlm_mini.checkpoints.assembly import Assembly
from mlx_vlm_mini.checkpoints.folder import Checkpoint, open_checkpoint
from mlx_vlm_mini.checkpoints.hub import INSTRUCTIONS, SMALL_FILES, expand_user
from mlx_vlm_mini.checkpoints.load import DTypeName, Plan, load_processor, plan, read_config
from mlx_vlm_mini.checkpoints.weights import count_decoder
from mlx_vlm_mini.errors import CheckpointError, VLMError

from .calibrate import Observed, find_samples
from .check import Check, compare, look
from .compensate import compensate_model
from .parts import Preview, plan_parts
from .quantize import Output, Packed, Quantization, choose, find_experts, find_layers, find_parts, plan_outputs, spread
from .read import Reader, are_equal
from .recipe import MEASURED, Losses, allocate, guess, measure, mixed
from .settings import Settings
from .source import Hashes, Source, find_source
from .work import RECORD, Workplace
from .write import SHARD_LIMIT, write_tensors


@dataclass(frozen=True)
class Report:
    """What a conversion did.

    Attributes:
        source, revision: as it was given; of a Hub name the commit, else None.
        preview: what was planned, and therefore done.
        seconds: of the work, downloads and the check not counted.
        not_finite: names of tensors with NaN or infinity that were allowed, to how many.
        check: how the result compares with the source, where that was asked for.
    """

    destination: Path
    source: str
    revision: str | None
    preview: Preview
    seconds: float
    not_finite: Mapping[str, int]
    check: Check | None = None


@dataclass(frozen=True)
class Prepared:
    """A conversion understood down to every tensor, nothing of them read.

    Attributes:
        quantized: layers by name, to how they are quantized.
        free: weights whose bits recipe "auto" chooses.
        repeated: weights that are stored under another name already.
    """

    planned: Plan
    outputs: list[Output]
    quantized: Mapping[str, Quantization]
    reader: Reader
    preview: Preview
    free: tuple[str, ...]
    repeated: tuple[str, ...]


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    revision: str | None = None,
    vision_tower: str | Path | None = None,
    conversation: str | None = None,
    base: str | Path | None = None,
    force: bool = False,
    announce: Callable[[Preview], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] | None = None,
    check: bool = False,
    shard_limit: int = SHARD_LIMIT,
    **settings: Any,
) -> Report:
    """Convert a checkpoint to MLX's format, tensor by tensor.

    The tensors keep the names that they have on the Hub. The destination appears when everything is written and
    checked; until then the work is in a hidden folder beside it. Stopped or killed, the same call goes on from the
    files that were finished.

    Args:
        source: a checkpoint folder, or a Hub name.
        destination: a folder that does not exist yet, or is empty.
        revision: branch, tag or commit on the Hub.
        vision_tower, conversation: of an original LLaVA checkpoint, see `load`; the result holds both.
        base: LLaMA's weights, which the original LLaVA's first checkpoints hold the difference to.
        force: replace a checkpoint folder that is there, once the new one is whole.
        announce: called with the plan before the work, and before weights are downloaded; with recipe "auto" again
            when the layers are measured.
        progress: called with bytes written and bytes in all.
        say: called with what is being done where no bytes are written.
        check: compare the result with the source on pictures and questions. A result that is broken is there all the
            same: look at the report's `check`.
        shard_limit: bytes that a file of tensors may have.
        settings: see `Settings`: bits, group_size, mode, part_bits, dtype, ...

    Raises:
        CheckpointError: the source is not usable, the destination is in the way, or cannot be written.
    """
    destination, chosen = expand_user(destination), Settings(**settings)
    found = find_source(source, revision, vision_tower=vision_tower, conversation=conversation, base=base)
    work = Workplace(destination, found.folders, force=force)
    try:
        with work:
            prepared = prepare(found.checkpoint, chosen)
            if announce is not None:
                announce(prepared.preview)
            _check_space(found, work, prepared.preview.bytes)
            if not found.is_whole:
                found = found.download()
                prepared = prepare(found.checkpoint, chosen)
            if chosen.is_calibrated:
                prepared = _calibrate(found.checkpoint, chosen, prepared, say)
                if announce is not None and chosen.recipe == "auto":
                    announce(prepared.preview)
            return _convert(found, work, prepared, chosen, progress, say, check, shard_limit)
    except OSError as error:
        again = "; what is finished is kept for the next run" if work.folder.exists() else ""
        where = error.filename or work.destination
        raise CheckpointError(f"cannot write {where}: {error.strerror or error}{again}") from None


def preview(
    source: str | Path,
    *,
    revision: str | None = None,
    vision_tower: str | Path | None = None,
    conversation: str | None = None,
    base: str | Path | None = None,
    **settings: Any,
) -> Preview:
    """What `convert` would do, given the same; of a Hub model only the small files and the headers are fetched.

    Raises:
        CheckpointError: the source is not usable, or cannot be converted so.
    """
    found = find_source(source, revision, vision_tower=vision_tower, conversation=conversation, base=base)
    return prepare(found.checkpoint, Settings(**settings)).preview


def _calibrate(
    checkpoint: Checkpoint, settings: Settings, prepared: Prepared, say: Callable[[str], None] | None
) -> Prepared:
    """Measure and compensate what the settings ask for, and prepare again with what was found."""
    planned, losses, packed = prepared.planned, None, None
    processor = load_processor(checkpoint, planned.family, planned.config)
    samples = find_samples(processor, settings.calibration)
    if settings.recipe == "auto":
        names = [*prepared.free, *(name for name in prepared.repeated if prepared.free)]
        losses = dict(measure(plan(checkpoint), names, settings.group_size, samples[:MEASURED], say))
        for name in prepared.repeated:  # the embeddings are the head
            embeddings, head = planned.ours["decoder.embed_tokens.weight"], losses.pop(name, {})
            if embeddings in losses:
                losses[embeddings] = {bits: loss + head.get(bits, 0) for bits, loss in losses[embeddings].items()}
        prepared = prepare(checkpoint, settings, losses)
    if settings.method == "gptq":
        layers = {f"{module}.weight": each for module, each in prepared.quantized.items()}
        target: Any = None if settings.dtype is None else getattr(mx, settings.dtype)
        packed = compensate_model(plan(checkpoint), layers, samples, target, say)
    return prepare(checkpoint, settings, losses, packed)


def prepare(
    checkpoint: Checkpoint,
    settings: Settings,
    losses: Losses | None = None,
    packed: Mapping[str, Packed] | None = None,
) -> Prepared:
    """Decide what becomes of every tensor, by the headers alone.

    Args:
        losses: for recipe "auto"; before they are measured they are guessed.
        packed: weights that are quantized already.

    Raises:
        CheckpointError: the checkpoint is broken, or cannot be converted so.
    """
    quantizations = choose(settings.bits, settings.group_size, settings.mode, settings.part_bits or {})
    planned = plan(checkpoint)
    load_processor(checkpoint, planned.family, planned.config)  # what cannot answer is not worth converting
    reader = Reader(checkpoint, allow_nan=settings.allow_nan)
    target: Any = None if settings.dtype is None else getattr(mx, settings.dtype)
    repeated = _find_repeated_head(planned)
    layers, parts = find_layers(planned), find_parts(planned)
    wanted = spread(planned, quantizations)
    if settings.is_calibrated and any(each is not None for each in layers.values()):
        raise CheckpointError(f"{checkpoint.folder} is quantized: calibration needs the original weights")
    first = next(iter(find_experts(planned).values()), [])
    if settings.is_calibrated and first:
        raise CheckpointError(
            f"method gptq and recipe auto do not measure experts ({first[0]}): leave both out, or take recipe mixed"
        )
    if settings.method == "gptq" and settings.recipe != "auto" and not wanted:
        raise CheckpointError("method gptq needs bits, or recipe auto with bits per weight")
    if settings.recipe == "mixed":
        wanted = mixed(planned, wanted)
    free: tuple[str, ...] = ()
    if settings.bits_per_weight is not None:
        outputs, _, _ = plan_outputs(planned, wanted, target, reader, without=repeated)
        draws = {
            theirs for ours, theirs in planned.ours.items() if ours.startswith("drawing.")
        }  # no answer depends on it
        open_ones = layers.keys() - wanted.keys() - draws
        candidates = [
            each
            for each in outputs
            if each.entries[0][0] in open_ones and each.entries[0][2][-1] % settings.group_size == 0
        ]
        free = tuple(each.entries[0][0] for each in candidates)
        spent = allocate(outputs, losses or guess(candidates), settings.bits_per_weight, settings.group_size)
        wanted, quantizations = wanted | spent, quantizations | {parts[name]: each for name, each in spent.items()}
    outputs, quantized, skipped = plan_outputs(
        planned, wanted, target, reader, dequantize=settings.dequantize, without=repeated, packed=packed
    )
    if (quantizations or settings.recipe == "auto") and not set(quantizations) & {
        output.part for output in outputs if output.entries[0][1] == "U32"
    }:
        raise CheckpointError(
            f"nothing in {checkpoint.folder} can be quantized in groups of {settings.group_size}: no layer's width is "
            "a multiple of it"
        )
    notes = [f"{name} repeats the embeddings: it is stored once" for name in repeated]
    if (settings.part_bits or {}).get("head") is not None and not any(output.part == "head" for output in outputs):
        notes.append("the head is the embeddings, so bits of its own change nothing")
    if any(name.endswith(".scales") for name in checkpoint.tensors):
        notes.append("the source is quantized: what its rounding lost stays lost")
    experts = planned.config.decoder.experts
    if experts is not None:
        total, active = count_decoder(checkpoint, planned.family.WEIGHTS, planned.config.decoder)
        notes.append(
            f"a token takes {experts.num_experts_per_tok} of {experts.num_experts} experts: {active / 1e9:.3g} of the "
            f"decoder's {total / 1e9:.3g} billion weights"
        )
    if free and losses is None:
        notes.append("recipe auto measures the layers first: these bits are a guess, their sum is not")
    source_bytes = sum(info.nbytes for info in checkpoint.tensors.values())
    shown = Preview(plan_parts(outputs), source_bytes, tuple(skipped), tuple(notes))
    return Prepared(planned, outputs, quantized, reader, shown, free, tuple(repeated))


def _convert(
    found: Source,
    work: Workplace,
    prepared: Prepared,
    settings: Settings,
    progress: Callable[[int, int], None] | None,
    say: Callable[[str], None] | None,
    check: bool,
    shard_limit: int,
) -> Report:
    """The work itself, from the first byte to the destination."""
    reference = _look_at_source(found.checkpoint, say) if check else None
    start, done, checkpoint = time.monotonic(), 0, found.checkpoint

    def step(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        hashes.check()
        if progress is not None:
            progress(done, prepared.preview.bytes)

    outputs, identity = [(output.entries, output.kind) for output in prepared.outputs], found.identity()
    work.start(
        {
            "versions": _versions(),
            "source": identity,
            "settings": asdict(settings),
            "outputs": hashlib.sha256(json.dumps(outputs).encode()).hexdigest(),
            "shard_limit": shard_limit,
        }
    )
    with Hashes(found) as hashes:
        write_tensors(work, prepared.outputs, step, shard_limit=shard_limit)
        _copy_small_files(checkpoint, work.folder)
        config = _new_config(checkpoint.config, prepared.quantized, settings.dtype)
        (work.folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
        plan(open_checkpoint(work.folder))  # a folder that does not load is never shown
        seconds = time.monotonic() - start
        checked = None
        if reference is not None:
            checked = compare(reference, look(open_checkpoint(work.folder), "result", say))
        if found.identity() != identity:
            raise CheckpointError(f"{found.name} changed while it was read: run the command again")
        work.record["source"] = {"name": found.name, "revision": found.revision, "sha256": hashes.finish()}
    work.record["bits_per_weight"] = prepared.preview.bits_per_weight
    work.record["check"] = None if checked is None else checked.as_json()
    work.save_record()
    work.finish()
    return Report(
        work.destination, found.name, found.revision, prepared.preview, seconds, prepared.reader.not_finite, checked
    )


def _look_at_source(checkpoint: Checkpoint, say: Callable[[str], None] | None) -> Observed:
    """What the source makes of the check's pictures, before the work: one that does not run is known before it."""
    try:
        return look(checkpoint, "source", say)
    except VLMError as error:
        raise CheckpointError(f"{error} (found while checking the source; --no-check does without)") from None


def _find_repeated_head(planned: Plan) -> list[str]:
    """The head's name where config.json ties it to the embeddings and the file holds it all the same."""
    head, embeddings = (planned.ours.get(f"decoder.{name}.weight") for name in ("lm_head", "embed_tokens"))
    _, config = read_config(planned.checkpoint)
    if head is None or embeddings is None or not config.decoder.tie_word_embeddings:
        return []
    if isinstance(planned.checkpoint, Assembly) and planned.checkpoint.base is not None:
        return []  # equal differences make no equal weights
    return [head] if are_equal(planned.checkpoint, head, embeddings) else []


def _versions() -> dict[str, str]:
    return {"mlx_vlm_mini": __version__, "mlx": version("mlx")}


def _check_space(found: Source, work: Workplace, needed: int) -> None:
    """Room for the result and, of a Hub name, for the download where that goes to the same disk.

    Raises:
        CheckpointError: there is less.
    """
    free = shutil.disk_usage(work.folder).free + sum(file.stat().st_size for file in work.folder.iterdir())
    folder = found.checkpoint.folder
    if not found.is_whole and folder.stat().st_dev == work.folder.stat().st_dev:
        needed += sum(info.nbytes for info in found.checkpoint.tensors.values())
    if free < needed:
        raise CheckpointError(
            f"this takes {needed / 1e9:.1f} GB, {work.folder.parent} has {free / 1e9:.1f} GB free: make room first"
        )


def _copy_small_files(checkpoint: Checkpoint, work: Path) -> None:
    """Tokenizer, processor and templates; never code."""
    for pattern in SMALL_FILES:
        for file in sorted(checkpoint.folder.glob(pattern)):
            if file.name not in ("config.json", RECORD) and not file.name.endswith(".index.json"):
                shutil.copyfile(file, work / file.name)
        for file in sorted((checkpoint.folder / INSTRUCTIONS).glob(pattern)):
            (work / INSTRUCTIONS).mkdir(exist_ok=True)
            shutil.copyfile(file, work / INSTRUCTIONS / file.name)


def _new_config(
    config: dict[str, Any], quantized: Mapping[str, Quantization], dtype: DTypeName | None
) -> dict[str, Any]:
    """config.json with the new type, and with the commonest quantization and the layers that differ from it."""
    config = {key: value for key, value in config.items() if key not in ("quantization", "quantization_config")}
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
