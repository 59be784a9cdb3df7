"""Folder or Hub name -> model and processor."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any, Literal

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_vlm_mini.config import VLMConfig, check_layers
from mlx_vlm_mini.errors import CheckpointError, MemoryShortError
from mlx_vlm_mini.families import Family, find_family, qwen_vl
from mlx_vlm_mini.families.parts.configs import side
from mlx_vlm_mini.files import read_json
from mlx_vlm_mini.images.source import ACCESS, Access
from mlx_vlm_mini.layers.kernels import claim_process, kernels
from mlx_vlm_mini.layers.memory import free_memory
from mlx_vlm_mini.model import VLM
from mlx_vlm_mini.preprocessing.grid import EdgeGrid
from mlx_vlm_mini.preprocessing.settings import TILINGS, ImageSettings, image_settings
from mlx_vlm_mini.preprocessing.video import VideoSettings, video_settings
from mlx_vlm_mini.processor import DrawingTokens, Processor
from mlx_vlm_mini.text.template import find_chat_template
from mlx_vlm_mini.text.tokenizer import Tokenizer, load_tokenizer

from . import bundled
from .assembly import open_model
from .folder import DTYPES, Checkpoint
from .hub import INSTRUCTIONS
from .weights import build, load_weights, match_names, without_drafts

GENERATION = "generation_config.json"

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
    hf, file = checkpoint.config, checkpoint.folder / GENERATION
    if family is qwen_vl and file.is_file():  # it alone says whether the model was trained on conversations
        hf = {**hf, "generation_config": read_json(file)}
    check_layers(hf)
    try:
        return family, family.config(hf)
    except (TypeError, KeyError, AttributeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"{checkpoint.folder}/config.json is malformed: {error!r}") from None


def plan(checkpoint: Checkpoint) -> Plan:
    """Match a checkpoint's tensors to the model's, strictly, by their headers alone.

    Raises:
        CheckpointError: config.json, names or shapes do not fit together.
    """
    family, config = read_config(checkpoint)
    _ = checkpoint.quantization  # raises where another tool quantized, before its tensors' names do
    ours, unused = match_names(checkpoint.tensors, family.WEIGHTS, config.family)
    if config.drawing is not None and not any(name.startswith("drawing.vq.") for name in ours):
        config = replace(config, drawing=None)  # the rest of what draws is of no use without
        unused += [theirs for name, theirs in ours.items() if name.startswith("drawing.")]
        ours = {name: theirs for name, theirs in ours.items() if not name.startswith("drawing.")}
    if "decoder.lm_head.weight" in ours:  # a head in the file counts, whatever the flags say
        config = replace(config, decoder=replace(config.decoder, tie_word_embeddings=False))
    ours, drafts = without_drafts(ours, config)
    model = build(config, ours, checkpoint, family.WEIGHTS)
    return Plan(checkpoint, family, config, ours, (*unused, *drafts), model)


def eos_token_ids(
    checkpoint: Checkpoint, tokenizer: Tokenizer, end_token: str | tuple[str, ...] | None = None
) -> frozenset[int]:
    """The ids that end an answer: of `end_token`, one or several; else the tokenizer's `eos_token` and those of
    generation_config.json, or where that names none (nothing, `[]`, -1) of config.json.

    Chat models end a turn with the first, and some files list only what ends a document.
    """
    if end_token is not None:
        ends: set[int] = set()
        for each in (end_token,) if isinstance(end_token, str) else end_token:
            end = tokenizer.token_to_id(each)
            if end is None:
                raise CheckpointError(f"{checkpoint.folder}: the tokenizer lacks {each}, which ends an answer")
            ends.add(end)
        return frozenset(ends)
    text = checkpoint.config.get("text_config") or {}
    file = checkpoint.folder / GENERATION
    eos = tokenizer.token_to_id(tokenizer.special_tokens.get("eos_token", ""))
    own = frozenset() if eos is None else frozenset([eos])
    for source in (read_json(file) if file.is_file() else {}, checkpoint.config, text):
        found = source.get("eos_token_id")
        if found is not None:
            ids = found if isinstance(found, list) else [found]
            if not all(type(token) is int for token in ids):
                raise CheckpointError(f"{checkpoint.folder}: eos_token_id must be a token id or a list, not {found!r}")
            if any(token >= 0 for token in ids):
                return own.union(token for token in ids if token >= 0)
    return own


def find_image_settings(folder: Path, family: Family, config: VLMConfig) -> ImageSettings | None:
    """How the checkpoint takes images; None where no file says it.

    Raises:
        CheckpointError: a file is broken, or speaks of another family's images.
    """
    prescribed = config.prescribed
    if prescribed is not None and not prescribed.files_first:
        return image_settings(prescribed.image_processor, default_type=family.IMAGE_PROCESSOR)
    processor, image = folder / "processor_config.json", folder / "preprocessor_config.json"
    content = read_json(processor) if processor.is_file() else {}
    settings = content.get("image_processor")
    if settings is None and image.is_file():
        settings = read_json(image)
    if settings is None and prescribed is not None:
        settings = prescribed.image_processor
    if settings is None:
        return None
    expected = TILINGS.get(family.IMAGE_PROCESSOR, NoneType)
    try:
        if expected is EdgeGrid:  # the whole processor's patches count, whatever its part for images says
            patch, vision = content.get("patch_size"), config.vision
            merge = content.get("spatial_merge_size") or vision.image_size // vision.patch_size
            step = _own_patch(settings) if getattr(family, "WHOLE_PATCHES", False) else None
            settings = {**settings, "patch_size": patch or vision.patch_size, "merge_size": merge, "step": step}
        found = image_settings(settings, default_type=family.IMAGE_PROCESSOR)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{folder}: the image processor's settings are malformed: {error!r}") from None
    if not isinstance(found.tiling, expected):
        cuts = "no tiles" if found.tiling is None else "tiles"
        takes = "takes none" if expected is NoneType else "needs them" if found.tiling is None else "needs others"
        raise CheckpointError(
            f"{folder}: the image processor gives {cuts}, family '{config.family}' {takes}: copy "
            "preprocessor_config.json from the original repository"
        )
    return found


def _own_patch(settings: Mapping[str, Any]) -> int:
    """The patches of an image processor of Pixtral's."""
    found = settings.get("patch_size") or 16  # the class's default
    return side([found["height"], found["width"]] if isinstance(found, Mapping) else found, "patch_size")


def find_video_settings(folder: Path, family: Family, config: VLMConfig) -> VideoSettings | None:
    """How the checkpoint takes videos; None where no file says it, or the family takes none.

    Raises:
        CheckpointError: a file is broken, or does not fit config.json.
    """
    kind, grid = getattr(family, "VIDEO_PROCESSOR", None), config.vision.grid
    if kind is None or grid is None:
        return None
    processor = folder / "processor_config.json"
    parts = read_json(processor) if processor.is_file() else {}
    files = [folder / name for name in ("video_preprocessor_config.json", "preprocessor_config.json")]
    found = parts.get("video_processor") or next((read_json(file) for file in files if file.is_file()), None)
    found = found or parts.get("image_processor")
    if found is None:
        return None
    try:
        settings = video_settings(found, kind)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{folder}: the video processor's settings are malformed: {error!r}") from None
    if settings.frames != grid.frames:
        raise CheckpointError(
            f"{folder}: the video processor joins {settings.frames} frames, config.json {grid.frames}: copy "
            "video_preprocessor_config.json from the original repository"
        )
    return settings


def load_processor(checkpoint: Checkpoint, family: Family, config: VLMConfig) -> Processor:
    """The processor of a checkpoint.

    Raises:
        CheckpointError: the tokenizer or another of its files is missing or broken.
    """
    tokenizer, prescribed = load_tokenizer(checkpoint.folder), config.prescribed
    found = find_chat_template(checkpoint.folder) if prescribed is None else prescribed.chat_template
    if prescribed is not None:
        tokenizer.show(prescribed.shown_tokens)
        _add_prescribed(tokenizer, prescribed.extra_tokens, config, checkpoint.folder)
    qformer = config.projector.qformer
    reads = qformer is not None and qformer.instruction is not None
    return Processor(
        config,
        family,
        tokenizer=tokenizer,
        instruction_tokenizer=load_tokenizer(checkpoint.folder / INSTRUCTIONS) if reads else None,
        chat_template=found or family.CHAT_TEMPLATE,
        preamble=_find_preamble(checkpoint.folder, family),
        drawing_tokens=None if config.drawing is None else _find_drawing_tokens(checkpoint.folder, family, tokenizer),
        image_settings=find_image_settings(checkpoint.folder, family, config),
        video_settings=find_video_settings(checkpoint.folder, family, config),
        eos_token_ids=eos_token_ids(checkpoint, tokenizer, None if prescribed is None else prescribed.end_token),
    )


def _find_preamble(folder: Path, family: Family) -> str:
    """What a family's own processor writes before every rendered template; empty where the folder asks for nothing."""
    file, text = folder / "processor_config.json", getattr(family, "PREAMBLE", "")
    return text if text and file.is_file() and read_json(file).get("use_default_system_prompt") else ""


def _find_drawing_tokens(folder: Path, family: Any, tokenizer: Tokenizer) -> DrawingTokens | None:
    """The ids that generation_config.json gives, since uploads differ; else those of the tokens by their names. None
    where there are no such tokens.

    Raises:
        CheckpointError: an id is none of the tokenizer's.
    """
    file = folder / GENERATION
    given = read_json(file) if file.is_file() else {}
    more = given.get("generation_kwargs")
    given = {**given, **(more if isinstance(more, Mapping) else {})}
    names = {key: tokenizer.special_tokens.get(f"{key}_token", "") for key in ("bos", "pad")}
    found = []
    for key, name in {"bos": names["bos"], "boi": family.BEGIN_IMAGE, "pad": names["pad"]}.items():
        token = given.get(f"{key}_token_id")
        token = tokenizer.token_to_id(name) if token is None else token
        if token is None:
            return None
        if type(token) is not int or tokenizer.id_to_token(token) is None:
            raise CheckpointError(f"{file}: {key}_token_id {token!r} is no token of the tokenizer's")
        found.append(token)
    return DrawingTokens(*found)


def _add_prescribed(tokenizer: Tokenizer, tokens: tuple[str, ...], config: VLMConfig, folder: Path) -> None:
    tokenizer.backend.add_special_tokens([token for token in tokens if tokenizer.token_to_id(token) is None])
    for token in tokens:
        if (tokenizer.token_to_id(token) or 0) >= config.decoder.vocab_size:
            raise CheckpointError(f"{folder}: config.json asks for {token} in prompts, and no embedding is left for it")


def compute_dtype(plan: Plan) -> mx.Dtype:
    """The checkpoint's own type on a GPU, float32 on a CPU, where half precision is many times slower.

    A float16 checkpoint whose activations float16 cannot hold is computed in bfloat16.
    """
    if mx.default_device().type != mx.DeviceType.gpu:
        return mx.float32
    stored = plan.checkpoint.tensors[plan.ours["decoder.norm.weight"]].dtype
    if stored == "F16" and not plan.config.decoder.scales.fits_float16:
        return mx.bfloat16
    return DTYPES[stored][0] if stored in ("F16", "BF16") else mx.float32


def weights_memory(planned: Plan, dtype: mx.Dtype) -> int:
    """Bytes that a model's weights take in memory."""
    parameters = [array for _, array in tree_flatten(planned.model.parameters())]
    return sum(
        array.size * (dtype.size if mx.issubdtype(array.dtype, mx.floating) else array.dtype.size)
        for array in parameters
    )


def check_memory(planned: Plan, dtype: mx.Dtype) -> None:
    """Whether a model's weights fit into memory, before any of them is read.

    On a GPU a warning says so where they take more than nine tenths of the memory that the device recommends.

    Raises:
        MemoryShortError: on a CPU, they do not.
    """
    needed = weights_memory(planned, dtype)
    kind = str(dtype).split(".")[-1]
    if mx.default_device().type == mx.DeviceType.gpu:
        recommended = mx.device_info().get("max_recommended_working_set_size")
        if isinstance(recommended, int) and needed > 0.9 * recommended:
            warnings.warn(
                f"the model's weights take {needed / 1e9:.1f} GB in {kind}, of {recommended / 1e9:.1f} GB that this "
                "GPU should use: answers may be slow; a model of fewer bits fits better",
                stacklevel=3,
            )
        return
    free = free_memory()
    if needed > free:
        raise MemoryShortError(
            f"the model's weights take {needed / 1e9:.1f} GB in {kind}, and {free / 1e9:.1f} GB of memory are free: "
            "close other programs, convert the model to fewer bits, or choose a smaller one"
        )


def load(
    name: str | Path = bundled.NAME,
    *,
    revision: str | None = None,
    dtype: DTypeName | None = None,
    min_tiles: int | None = None,
    max_tiles: int | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    vision_tower: str | Path | None = None,
    conversation: str | None = None,
    access: Access | Literal["local", "served"] = "local",
) -> tuple[VLM, Processor]:
    """Load a model and its processor.

    Args:
        name: a checkpoint folder, or a name on the Hugging Face Hub such as "llava-hf/llava-1.5-7b-hf", behind which a
            folder inside it may follow, or the address of its page; by default the small demonstration model that
            comes with the package.
        revision: branch, tag or commit on the Hub.
        dtype: type to compute in; by default the checkpoint's on a GPU and float32 on a CPU.
        min_tiles, max_tiles: tiles of an image, without its thumbnail, in families that cut one into a grid of its
            shape (InternVL, SmolVLM) or in crops (Gemma 3); by default as the checkpoint says.
        min_pixels, max_pixels: height times width of an image, in families that take any size (Qwen2-VL); by default as
            the checkpoint says.
        vision_tower: of an original LLaVA checkpoint, in place of the one that its config.json names.
        conversation: of an original LLaVA checkpoint, its prompt's name in place of the one that belongs to its name.
        access: what names of images in messages may reach: "local" opens files and public addresses, "served", for a
            program that serves others, opens neither.

    Returns:
        `(model, processor)`, to be given to `generate`, `stream_generate` or `Chat`.

    Raises:
        CheckpointError: the checkpoint cannot be found, read or understood.
    """
    if isinstance(access, str) and access not in ACCESS:
        raise CheckpointError(f"access must be {' or '.join(map(repr, ACCESS))}, not {access!r}")
    checkpoint = open_model(name, revision=revision, vision_tower=vision_tower, conversation=conversation)
    planned = plan(checkpoint)
    if dtype == "float16" and not planned.config.decoder.scales.fits_float16:
        raise CheckpointError(
            f"float16 cannot hold what this model's decoder computes ({planned.config.family}: numbers above 65504): "
            "choose bfloat16 or float32"
        )
    processor = load_processor(checkpoint, planned.family, planned.config)
    processor.access = ACCESS[access] if isinstance(access, str) else access
    if min_tiles is not None or max_tiles is not None:
        processor.limit_tiles(min_tiles, max_tiles)
    if min_pixels is not None or max_pixels is not None:
        processor.limit_pixels(min_pixels, max_pixels)
    chosen: Any = getattr(mx, dtype) if dtype is not None else compute_dtype(planned)
    claim_process()
    check_memory(planned, chosen)
    load_weights(planned.model, planned.ours, checkpoint, chosen, planned.family.WEIGHTS)
    tied = planned.config.decoder.tie_word_embeddings
    kernels().prepare(planned.model, planned.model.decoder, chosen, tied)
    # Frequencies and the like, too: what MLX has yet to compute can be computed by this thread alone.
    mx.eval([[part for part in module.values() if isinstance(part, mx.array)] for module in planned.model.modules()])
    return planned.model, processor
