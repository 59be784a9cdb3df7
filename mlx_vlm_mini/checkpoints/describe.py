"""What a checkpoint is, from its small files and its tensors' headers alone."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from mlx_vlm_mini.config import DecoderConfig, VLMConfig
from mlx_vlm_mini.families import Family
from mlx_vlm_mini.preprocessing.anyres import most_tokens
from mlx_vlm_mini.preprocessing.grid import EdgeGrid, Grid
from mlx_vlm_mini.preprocessing.slices import Slices
from mlx_vlm_mini.preprocessing.splits import LONGEST, Splits, choose_split
from mlx_vlm_mini.preprocessing.tiles import Tiles, count_tiles

from .assembly import open_model
from .folder import Checkpoint
from .load import find_image_settings, load_processor, plan, read_config
from .weights import count_decoder, rename

PARTS = ("vision", "projector", "decoder")


def describe(
    name: str | Path,
    *,
    revision: str | None = None,
    check: bool = False,
    vision_tower: str | Path | None = None,
    conversation: str | None = None,
) -> dict[str, Any]:
    """Describe a checkpoint; of a Hub model only the small files and the headers are fetched.

    Args:
        name: a checkpoint folder or a Hub name.
        revision: branch, tag or commit on the Hub.
        check: also match every tensor to the model by name and shape, and read tokenizer, chat template and image
            settings.
        vision_tower, conversation: of an original LLaVA checkpoint, see `load`.

    Returns:
        Names to values, JSON-ready; the three parts are dictionaries of their own. Sizes are bytes; `unused` counts
        weights in the files that the model does not read.

    Raises:
        CheckpointError: the checkpoint cannot be understood, or `check` finds it broken.
    """
    checkpoint = open_model(
        name, revision=revision, weights=False, vision_tower=vision_tower, conversation=conversation
    )
    family, config = read_config(checkpoint)
    weights: dict[str, int] = defaultdict(int)
    sizes: dict[str, int] = defaultdict(int)
    types = set()
    for theirs, info in checkpoint.tensors.items():
        try:
            ours = rename(theirs, family.WEIGHTS)
        except KeyError:
            ours = ()
        part = ours[0].partition(".")[0] if ours else "unused"
        if part not in (*PARTS, "unused"):  # what stands between the towers, an image's newline say
            part = "projector"
        weights[part] += checkpoint.num_weights(theirs)
        sizes[part] += info.nbytes
        types.add(info.dtype)
    vision, decoder = config.vision, config.decoder
    pinpoints, side = config.image_grid_pinpoints, vision.image_size // vision.patch_size
    if vision.tiled is not None:
        image_tokens = {"image_tokens": 1, "tile_keys": vision.num_features, "max_tiles": vision.tiled.max_tiles}
    elif vision.grid is not None:
        image_tokens = _tokens_of_grid(checkpoint, family, config)
    elif config.projector.shuffle is not None:
        image_tokens = _tokens_of_tiles(checkpoint, family, config)
    elif config.projector.pool is not None:
        image_tokens = {"image_tokens": config.tokens_of_row}
    elif pinpoints is None:
        image_tokens = {"image_tokens": _tokens_of_image(checkpoint, family, config)}
    else:  # most where an image fills its tiles
        tiles: dict[str, Any] = {"merge": config.tile_merge or "unpad", "most_tiles": config.most_tiles}
        image_tokens = {"max_image_tokens": most_tokens(pinpoints, tile_size=vision.image_size, side=side, **tiles)}
    shapes: dict[str, dict[str, Any]] = {
        "vision": {
            "hidden_size": vision.hidden_size, "layers": vision.num_hidden_layers, "heads": vision.num_attention_heads,
            **({"image_size": _image_size(checkpoint, family, config)} if vision.grid is None else {}),
            "patch_size": vision.patch_size, **image_tokens,
        },
        "projector": {"hidden_size": config.projector.hidden_size, "layers": config.projector.num_layers},
        "decoder": {
            "hidden_size": decoder.hidden_size, "layers": decoder.num_hidden_layers,
            "heads": decoder.num_attention_heads, "kv_heads": decoder.num_key_value_heads,
            "vocab_size": decoder.vocab_size, "context": decoder.max_position_embeddings,
            **_states_and_experts(checkpoint, family, decoder),
        },
    }  # fmt: skip
    if config.text_alone:
        shapes = {"decoder": shapes["decoder"]}
    described: dict[str, Any] = {
        "model": str(name),
        "family": config.family,
        "model_type": checkpoint.config.get("model_type"),
        **{key: checkpoint.config[key] for key in ("conversation",) if config.prescribed and key in checkpoint.config},
        "format": "mlx" if checkpoint.is_mlx else "torch",
        "types": "+".join(sorted(types)),
        "quantization": _quantization(checkpoint.quantization),
    }
    for part in shapes:
        count, size = weights[part], sizes[part]
        described[part] = {**shapes[part], **_amounts(count, size)}
    described |= _amounts(sum(weights.values()), sum(sizes.values()))
    described["unused"] = weights["unused"]
    if check:
        planned = plan(checkpoint)
        processor = load_processor(checkpoint, planned.family, planned.config)
        described["image_token"] = None if config.text_alone else processor.image_token
        described["tokenizer_size"] = processor.tokenizer.backend.get_vocab_size()
        rows = decoder.num_embeddings
        ids = processor.tokenizer.backend.get_vocab().values()
        beyond = sum(token >= rows and token != processor.image_token_id for token in ids)
        if beyond:  # prompts with them are refused
            described["tokens_without_embedding"] = beyond
        described["image_settings"] = processor.image_settings is not None
        described["check"] = "every tensor has its place, name and shape"
    return described


def _states_and_experts(checkpoint: Checkpoint, family: Family, decoder: DecoderConfig) -> dict[str, int]:
    """Layers that keep a state in place of keys and values; experts, and the weights that a token reads."""
    found = {}
    if "linear_attention" in decoder.layer_types:
        found["linear_attention_layers"] = decoder.layer_types.count("linear_attention")
    if decoder.experts is not None:
        _, active = count_decoder(checkpoint, family.WEIGHTS, decoder)
        found |= {"experts": decoder.experts.num_experts, "experts_per_token": decoder.experts.num_experts_per_tok}
        found["active_weights"] = active
    return found


def _image_size(checkpoint: Checkpoint, family: Family, config: VLMConfig) -> int:
    """Pixels along a side of what the tower takes; positions in front of a resampler are stored for fewer."""
    if config.projector.resampler is not None:
        settings = find_image_settings(checkpoint.folder, family, config)
        if settings is not None and settings.size is not None:
            return settings.size["height"]
    return config.vision.image_size


def _tokens_of_image(checkpoint: Checkpoint, family: Family, config: VLMConfig) -> int:
    """Of a whole image, which config.json may have scaled to another size than the tower's."""
    settings = find_image_settings(checkpoint.folder, family, config) if config.prescribed is not None else None
    if settings is None:
        return config.vision.num_features
    return family.image_text(config, settings, "\0", (1, 1)).count("\0")


def _tokens_of_grid(checkpoint: Checkpoint, family: Family, config: VLMConfig) -> dict[str, int]:
    """Pixels of images, and tokens of the largest, where the image settings say them."""
    settings = find_image_settings(checkpoint.folder, family, config)
    grid = None if settings is None else settings.tiling
    if isinstance(grid, EdgeGrid):
        return {"max_height": grid.max_height, "max_width": grid.max_width, "max_image_tokens": grid.max_tokens}
    if isinstance(grid, Slices):
        return {"slice_pixels": grid.scale**2, "max_slices": grid.max_tiles, "max_image_tokens": grid.max_tokens}
    if not isinstance(grid, Grid):
        return {}
    limits = {"min_pixels": grid.of_one(grid.min_pixels), "max_pixels": grid.of_one(grid.max_pixels)}
    return {**limits, "max_image_tokens": grid.max_tokens}


def _tokens_of_tiles(checkpoint: Checkpoint, family: Family, config: VLMConfig) -> dict[str, int]:
    """Tokens of a tile and of the longest image, where the image settings say how one is cut."""
    settings = find_image_settings(checkpoint.folder, family, config)
    if settings is not None and isinstance(settings.tiling, Splits):
        square = (settings.tiling.longest_edge or LONGEST,) * 2
        tokens, (rows, columns) = (
            family.image_text(config, settings, "\0", square).count("\0"), choose_split(square, settings.tiling)
        )  # fmt: skip
        return {"tile_tokens": tokens // (rows * columns + (rows * columns > 1)), "max_image_tokens": tokens}
    if settings is None or not isinstance(settings.tiling, Tiles):
        return {}
    longest = settings.tiling.longest
    tokens = family.image_text(config, settings, "\0", longest).count("\0")
    return {"tile_tokens": tokens // count_tiles(longest, settings.tiling), "max_image_tokens": tokens}


def _amounts(weights: int, size: int) -> dict[str, Any]:
    return {"weights": weights, "bytes": size, "bits_per_weight": 8 * size / weights if weights else 0.0}


def _quantization(settings: Any) -> dict[str, Any] | None:
    if settings is None:
        return None
    own = sum(isinstance(value, dict) for value in settings.values())
    shown = {key: settings[key] for key in ("bits", "group_size", "mode") if key in settings}
    return {**shown, "modules_of_their_own": own} if own else shown
