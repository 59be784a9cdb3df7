"""Folder or Hub name -> model and processor."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

from .checkpoint import DTYPES, Checkpoint, open_checkpoint, read_json
from .config import VLMConfig
from .errors import CheckpointError
from .families import Family, find_family
from .hub import find_folder
from .model import VLM
from .preprocess import ImageSettings, image_settings
from .processor import Processor
from .prompt import find_chat_template
from .tokenizer import Tokenizer, load_tokenizer
from .weights import build, load_weights, match_names

DTypeName = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class Plan:
    """A checkpoint understood and checked, nothing of its tensors read yet.

    Attributes:
        ours: our tensor names to the checkpoint's.
        unused: the checkpoint's names that the model does not use.
        model: of the right shapes, its weights not loaded.
    """

    checkpoint: Checkpoint
    family: Family
    config: VLMConfig
    ours: Mapping[str, str]
    unused: tuple[str, ...]
    model: VLM


def read_config(checkpoint: Checkpoint) -> tuple[Family, VLMConfig]:
    """The family of a checkpoint and its config in our terms.

    Raises:
        CheckpointError: the family is unknown, or config.json does not describe a model of it.
    """
    family = find_family(checkpoint.config)
    try:
        return family, family.config(checkpoint.config)
    except (TypeError, KeyError, AttributeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"{checkpoint.folder}/config.json is malformed: {error!r}") from None


def plan(checkpoint: Checkpoint) -> Plan:
    """Match a checkpoint's tensors to the model's, strictly, by their headers alone.

    Raises:
        CheckpointError: config.json, names or shapes do not fit together.
    """
    family, config = read_config(checkpoint)
    _ = checkpoint.quantization  # raises where another tool quantized, before its tensors' names do
    ours, unused = match_names(checkpoint.tensors, family.WEIGHTS, config)
    if "decoder.lm_head.weight" in ours:  # a head in the file counts, whatever the flags say
        config = replace(config, decoder=replace(config.decoder, tie_word_embeddings=False))
    return Plan(checkpoint, family, config, ours, tuple(unused), build(config, ours, checkpoint))


def eos_token_ids(checkpoint: Checkpoint, tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that end an answer: of generation_config.json, else config.json, else the tokenizer's `eos_token`."""
    text = checkpoint.config.get("text_config") or {}
    file = checkpoint.folder / "generation_config.json"
    for source in (read_json(file) if file.is_file() else {}, checkpoint.config, text):
        found = source.get("eos_token_id")
        if found is not None:
            ids = found if isinstance(found, list) else [found]
            if not all(isinstance(token, int) for token in ids):
                raise CheckpointError(f"{checkpoint.folder}: eos_token_id must be a token id or a list, not {found!r}")
            return frozenset(ids)
    eos = tokenizer.token_to_id(tokenizer.special_tokens.get("eos_token", ""))
    return frozenset() if eos is None else frozenset([eos])


def find_image_settings(folder: Path, family: Family, config: VLMConfig) -> ImageSettings | None:
    """How the checkpoint takes images; None where no file says it.

    Raises:
        CheckpointError: a file is broken, or speaks of another family's images.
    """
    processor, image = folder / "processor_config.json", folder / "preprocessor_config.json"
    settings = read_json(processor).get("image_processor") if processor.is_file() else None
    if settings is None and image.is_file():
        settings = read_json(image)
    if settings is None:
        return None
    try:
        found = image_settings(settings, default_type=family.IMAGE_PROCESSOR)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{folder}: the image processor's settings are malformed: {error!r}") from None
    if (found.tiling is None) != (config.image_grid_pinpoints is None):
        cuts, takes = ("no tiles", "needs them") if found.tiling is None else ("tiles", "takes none")
        raise CheckpointError(
            f"{folder}: the image processor gives {cuts}, family '{config.family}' {takes}: copy "
            "preprocessor_config.json from the original repository"
        )
    return found


def load_processor(checkpoint: Checkpoint, family: Family, config: VLMConfig) -> Processor:
    """The processor of a checkpoint.

    Raises:
        CheckpointError: the tokenizer or another of its files is missing or broken.
    """
    tokenizer = load_tokenizer(checkpoint.folder)
    return Processor(
        config,
        family,
        tokenizer=tokenizer,
        chat_template=find_chat_template(checkpoint.folder) or family.CHAT_TEMPLATE,
        image_settings=find_image_settings(checkpoint.folder, family, config),
        eos_token_ids=eos_token_ids(checkpoint, tokenizer),
    )


def compute_dtype(plan: Plan) -> mx.Dtype:
    """The checkpoint's own type on a GPU, float32 on a CPU, where half precision is many times slower."""
    if mx.default_device().type != mx.DeviceType.gpu:
        return mx.float32
    stored = plan.checkpoint.tensors[plan.ours["decoder.norm.weight"]].dtype
    return DTYPES[stored][0] if stored in ("F16", "BF16") else mx.float32


def load(
    name: str | Path | None = None, *, revision: str | None = None, dtype: DTypeName | None = None
) -> tuple[VLM, Processor]:
    """Load a model and its processor.

    Args:
        name: a checkpoint folder, or a name on the Hugging Face Hub such as "llava-hf/llava-1.5-7b-hf".
        revision: branch, tag or commit on the Hub.
        dtype: type to compute in; by default the checkpoint's on a GPU and float32 on a CPU.

    Returns:
        `(model, processor)`, to be given to `generate`, `stream_generate` or `Chat`.

    Raises:
        CheckpointError: the checkpoint cannot be found, read or understood.
    """
    if name is None:
        raise CheckpointError("this version bundles no model: name a checkpoint folder or a Hub model")
    checkpoint = open_checkpoint(find_folder(name, revision=revision))
    planned = plan(checkpoint)
    processor = load_processor(checkpoint, planned.family, planned.config)
    chosen: Any = getattr(mx, dtype) if dtype is not None else compute_dtype(planned)
    load_weights(planned.model, planned.ours, checkpoint, chosen)
    return planned.model, processor
