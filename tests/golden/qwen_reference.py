"""What the reference of Qwen2-VL, 2.5-VL and 3-VL needs besides transformers' models: processors without their video half,
which needs torchvision, and the layouts that the Hub's files have."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLProcessor, Qwen2VLProcessor, Qwen3VLProcessor

TOKENS = [
    "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
FAMILIES = {
    "qwen2_vl": Qwen2VLProcessor, "qwen2_5_vl": Qwen2_5_VLProcessor,
    **dict.fromkeys(["qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"], Qwen3VLProcessor),
}  # fmt: skip

SAID = (
    "<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}{% endfor %}<|im_end|>\n"
)
ASKED = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
SYSTEM = "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
QWEN2 = "{% for message in messages %}" + SYSTEM + SAID + "{% endfor %}" + ASKED
QWEN3 = "{% for message in messages %}" + SAID + "{% endfor %}" + ASKED


def images_only(family: str) -> Any:
    """A family's processor class for images alone."""
    parent: Any = FAMILIES[family]

    def init(
        self: Any, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None, **kwargs: Any
    ) -> None:
        parent.__init__(self, image_processor, tokenizer, None, chat_template=chat_template, **kwargs)

    attributes = {"__init__": init, "get_attributes": classmethod(lambda cls: ["image_processor", "tokenizer"])}
    return type(parent.__name__, (parent,), attributes)


def add_tokens(tokenizer: Any) -> Any:
    """The tokenizer with the tokens that images need."""
    backend = tokenizer.backend_tokenizer
    backend.add_special_tokens(TOKENS)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=tokenizer.eos_token, pad_token=tokenizer.pad_token
    )


def neighbours(image_token_id: int) -> dict[str, int]:
    """The other tokens of pictures, by which mlx-vlm and older transformers find these."""
    return {
        "vision_start_token_id": image_token_id - 2,
        "vision_end_token_id": image_token_id - 1,
        "video_token_id": image_token_id + 1,
    }


def flatten(config: dict[str, Any]) -> None:
    """A config as the Hub has it: the text's keys at the top, `mrope` as a kind of scaling."""
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    for key in ("layer_types", "sliding_window", "dtype", "model_type"):
        text.pop(key, None)
    config |= text
    config["rope_theta"] = rope["rope_theta"]
    config["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    vision = config["vision_config"]
    vision.pop("rope_parameters", None)
    vision["in_chans"] = vision.pop("in_channels")
    vision["model_type"] = config["model_type"]
    config["torch_dtype"] = config.pop("dtype", "float32")


def pixels_of(inputs: Any, merge: int, patch: int) -> np.ndarray:
    """The images' pixels row by row, of which every twelfth is kept for the goldens' size: float32[1, N / 12, 1, 3]."""
    found, done = [], 0
    for _, rows, columns in inputs["image_grid_thw"].tolist():
        part = inputs["pixel_values"][done : done + rows * columns].numpy()
        done += rows * columns
        part = part.reshape(rows // merge, columns // merge, merge, merge, 3, 2, patch, patch)[:, :, :, :, :, 0]
        found.append(part.transpose(0, 2, 5, 1, 3, 6, 4).reshape(-1, 3))
    return np.concatenate(found)[None, ::12, None]


def limits_by_their_names(folder: Path) -> None:
    """Settings of images as the Hub's first files have them."""
    file = folder / "preprocessor_config.json"
    settings = json.loads(file.read_text())
    size = settings.pop("size")
    settings |= {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    file.write_text(json.dumps(settings, indent=1))
