"""What the references of the document readers need besides transformers' models: their processors without torchvision, their
tokens, their turns, and the layouts that the Hub's files have."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

PADDLE = (  # all pictures of a message before its words
    "{{ '<|begin_of_sentence|>' }}{%- for message in messages -%}{%- if message['role'] == 'user' -%}{{ 'User: ' }}"
    "{%- for content in message['content'] -%}{%- if content['type'] == 'image' -%}"
    "{{ '<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>' }}{%- endif -%}{%- endfor -%}"
    "{%- for content in message['content'] -%}{%- if content['type'] == 'text' -%}{{ content['text'] }}{%- endif -%}"
    "{%- endfor -%}{{ '\n' }}{%- elif message['role'] == 'assistant' -%}{{ 'Assistant: ' }}"
    "{%- for content in message['content'] -%}{{ content['text'] }}{%- endfor -%}{{ '</s>' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'Assistant: ' }}{%- endif -%}"
)
GLM = (
    "[gMASK]<sop>{%- for message in messages -%}{{ '<|' + message.role + '|>\n' }}{%- if message.content is string -%}"
    "{{ message.content }}{%- else -%}{%- for item in message.content -%}{%- if item.type == 'image' -%}"
    "<|begin_of_image|><|image|><|end_of_image|>{%- else -%}{{ item.text }}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|assistant|>\n' }}{%- endif -%}"
)


@dataclass(frozen=True)
class Reader:
    """What is different in a family's reference.

    Attributes:
        tokens: that its prompts need, in the order of their ids; those of its processor by its names for them.
        image_token, end: of these.
        processor: the name of its class.
        pixels: its inputs and its processor to pixels row by row, float32[N, 3].
        options: of its processor.
    """

    tokens: tuple[str, ...]
    image_token: str
    end: str
    processor: str
    pixels: Callable[[Any, Any], np.ndarray]
    names: dict[str, str] | None = None
    options: dict[str, Any] = field(default_factory=dict)


def rows_of_patches(inputs: Any, processor: Any) -> np.ndarray:
    """Of patches row by row (PaddleOCR-VL): (N, 3, p, p)."""
    found, done = [], 0
    for _, rows, columns in inputs["image_grid_thw"].tolist():
        part = inputs["pixel_values"][done : done + rows * columns].numpy()
        done += rows * columns
        part = part.reshape(rows, columns, *part.shape[1:])
        found.append(part.transpose(0, 3, 1, 4, 2).reshape(-1, 3))
    return np.concatenate(found)


def merged_patches(inputs: Any, processor: Any) -> np.ndarray:
    """Of patches in the order of merged squares, two frames alike (GLM-4V)."""
    merge, patch = processor.image_processor.merge_size, processor.image_processor.patch_size
    found, done = [], 0
    for _, rows, columns in inputs["image_grid_thw"].tolist():
        part = inputs["pixel_values"][done : done + rows * columns].numpy()
        done += rows * columns
        part = part.reshape(rows // merge, columns // merge, merge, merge, 3, 2, patch, patch)
        assert (part[..., 0, :, :] == part[..., 1, :, :]).all()
        found.append(part[..., 0, :, :].transpose(0, 2, 5, 1, 3, 6, 4).reshape(-1, 3))
    return np.concatenate(found)


def pixels_of_tiles(inputs: Any, processor: Any) -> np.ndarray:
    """Of all tiles of a conversation's images (Granite-Docling): (1, T, 3, side, side)."""
    return np.moveaxis(inputs["pixel_values"][0].numpy(), 1, -1).reshape(-1, 3)


GLM_TOKENS = (
    "<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|begin_of_image|>", "<|end_of_image|>",
    "<|image|>", "<|begin_of_video|>", "<|end_of_video|>", "<|video|>",
)  # fmt: skip
READERS = {
    "paddleocr_vl": Reader(
        tokens=("<|begin_of_sentence|>", "</s>", "<|IMAGE_START|>", "<|IMAGE_PLACEHOLDER|>", "<|IMAGE_END|>"),
        image_token="<|IMAGE_PLACEHOLDER|>",
        end="</s>",
        processor="PaddleOCRVLProcessor",
        pixels=rows_of_patches,
        names={"image_token": "<|IMAGE_PLACEHOLDER|>"},
    ),
    **{
        family: Reader(
            tokens=GLM_TOKENS, image_token="<|image|>", end="<|user|>", processor=processor, pixels=merged_patches
        )
        for family, processor in (
            ("glm4v", "Glm4vProcessor"),
            ("glm46v", "Glm46VProcessor"),
            ("glm_ocr", "Glm46VProcessor"),
        )
    },
    "granite_docling": Reader(
        tokens=(),
        image_token="<image>",
        end="<|end_of_text|>",
        processor="GraniteDoclingProcessor",
        pixels=pixels_of_tiles,
        options={"image_seq_len": 4},
    ),
}


def pixels_of(family: str, inputs: Any, processor: Any) -> np.ndarray:
    """The images' pixels, of which every twelfth is kept for the goldens' size: float32[1, N / 12, 1, 3]."""
    return READERS[family].pixels(inputs, processor)[None, ::12, None]


def add_tokens(family: str, tokenizer: Any) -> Any:
    """The tokenizer with the tokens that images and turns need."""
    from transformers import PreTrainedTokenizerFast

    reader, backend = READERS[family], tokenizer.backend_tokenizer
    backend.add_special_tokens([*reader.tokens])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=reader.end, pad_token=tokenizer.pad_token,
        **({} if reader.names is None else {"extra_special_tokens": reader.names}),
    )  # fmt: skip


def images_only(family: str) -> Any:
    """A family's processor class for images alone, by its own name."""
    import transformers

    parent: Any = getattr(transformers, READERS[family].processor)
    options = READERS[family].options

    def init(
        self: Any, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None, **kwargs: Any
    ) -> None:
        parent.__init__(self, image_processor, tokenizer, chat_template=chat_template, **{**options, **kwargs})

    attributes = {"__init__": init, "get_attributes": classmethod(lambda cls: ["image_processor", "tokenizer"])}
    return type(parent.__name__, (parent,), attributes)


def image_processors() -> dict[str, Any]:
    """Classes of image processors, by their names without `ImageProcessorPil`."""
    from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
    from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil
    from transformers.models.granite_docling.image_processing_pil_granite_docling import GraniteDoclingImageProcessorPil
    from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import PaddleOCRVLImageProcessorPil

    return {
        "PaddleOCRVL": PaddleOCRVLImageProcessorPil,
        "Glm4v": Glm4vImageProcessorPil,
        "Glm46V": Glm46VImageProcessorPil,
        "GraniteDocling": GraniteDoclingImageProcessorPil,
    }


def flatten_paddle(config: dict[str, Any]) -> None:
    """A config as PaddleOCR-VL's on the Hub: the text's keys at the top, the vision part by the whole model's name."""
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    for key in ("dtype", "model_type", "tie_word_embeddings"):
        text.pop(key, None)
    config |= text
    config["rope_theta"] = rope["rope_theta"]
    config["rope_scaling"] = {"mrope_section": rope["mrope_section"], "rope_type": "default", "type": "default"}
    vision = config["vision_config"]
    vision.pop("rope_parameters", None)
    vision |= {"model_type": "paddleocr_vl", "temporal_patch_size": 2, "tokens_per_second": 2}
    config["torch_dtype"] = config.pop("dtype", "float32")


def with_unread_tensors(folder: Path) -> None:
    """As PaddleOCR-VL's files: limits of images by their names, and tensors that nothing reads."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    before, width = "visual.vision_model.", tensors["visual.vision_model.post_layernorm.weight"].numel()
    tensors[before + "embeddings.packing_position_embedding.weight"] = torch.ones(7, width)
    tensors[before + "head.probe"] = torch.ones(1, 1, width)
    tensors[before + "head.attention.in_proj_weight"] = torch.ones(3 * width, width)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    file = folder / "preprocessor_config.json"
    settings = json.loads(file.read_text())
    size = settings.pop("size")
    settings |= {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    file.write_text(json.dumps(settings, indent=1))


def as_glm4v(config: dict[str, Any]) -> None:
    """A config as GLM-4.1V's on the Hub: how much of a head is rotated stands beside the rope."""
    text = config["text_config"]
    rope = text.pop("rope_parameters")
    text |= {"rope_theta": rope["rope_theta"], "partial_rotary_factor": rope["partial_rotary_factor"]}
    text |= {"rope_scaling": {"type": "default", "mrope_section": rope["mrope_section"]}}
    config["vision_config"].pop("rope_parameters", None)
    config["torch_dtype"] = config.pop("dtype", "float32")


def as_glm_ocr(config: dict[str, Any]) -> None:
    """A config as GLM-OCR's: a layer that drafts tokens ahead."""
    config["text_config"]["num_nextn_predict_layers"] = 1


def with_draft_layer(folder: Path) -> None:
    """As GLM-OCR's files: a layer behind the last one."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    layers = "model.language_model.layers."
    last = max(int(name.removeprefix(layers).partition(".")[0]) for name in tensors if name.startswith(layers))
    drafts = {
        name.replace(f"{layers}{last}.", f"{layers}{last + 1}."): tensor.clone()
        for name, tensor in tensors.items()
        if name.startswith(f"{layers}{last}.")
    }
    for name in ("eh_proj", "enorm", "hnorm", "shared_head.norm", "shared_head.head", "embed_tokens"):
        drafts[f"{layers}{last + 1}.{name}.weight"] = torch.ones(3, 2)
    save_file(tensors | drafts, folder / "model.safetensors", {"format": "pt"})
