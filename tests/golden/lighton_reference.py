"""What the reference of LightOnOCR needs besides transformers' model: its processor without torchvision, and its tokens."""

from typing import Any

import pixtral_reference  # noqa: F401  which lets Pixtral's image processor do without torchvision

try:
    from transformers import PreTrainedTokenizerFast
    from transformers.models.lighton_ocr.processing_lighton_ocr import LightOnOcrProcessor
except ImportError:  # an older transformers: this folder's paths are asked for all the same
    LightOnOcrProcessor = object

TOKENS = {"image_token": "<|image_pad|>", "image_break_token": "<|vision_pad|>", "image_end_token": "<|vision_end|>"}
CHAT = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|image_pad|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class ImagesOnly(LightOnOcrProcessor):  # type: ignore[misc]
    """The processor by its own name, so that what it saves says so."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


ImagesOnly.__name__ = LightOnOcrProcessor.__name__


def add_tokens(tokenizer: Any) -> Any:
    """The tokenizer with the tokens of images under the names that the processor asks for."""
    backend = tokenizer.backend_tokenizer
    backend.add_special_tokens(["<|vision_start|>", *TOKENS.values()])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=tokenizer.eos_token, pad_token=tokenizer.pad_token,
        extra_special_tokens=TOKENS,
    )  # fmt: skip
