"""What the reference of MiniCPM-V 4.6 needs besides transformers' model: a processor without its video half, which needs
torchvision, and a tokenizer that knows what stands around pictures."""

from typing import Any

import numpy as np
from transformers import MiniCPMV4_6Processor, PreTrainedTokenizerFast
from transformers.processing_utils import ProcessorMixin

TOKENS = {
    "image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "image_start_token": "<image>",
    "image_end_token": "</image>", "slice_start_token": "<slice>", "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>", "image_id_end_token": "</image_id>",
}  # fmt: skip
SAID = (  # parts in lines of their own; thoughts before the last question are left out
    "{% macro said(content) %}{% set found = namespace(parts=[]) %}{% for part in content %}{% set found.parts = found.parts + "
    "['<|image_pad|>' if part['type'] == 'image' else part['text']] %}{% endfor %}{{ found.parts | join('\n') | trim }}"
    "{% endmacro %}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% set text = said(message['content']) %}"
    "{{ text.split('</think>')[-1].lstrip('\n') if message['role'] == 'assistant' else text }}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
)
MINICPM = (
    "{% if enable_thinking is not defined %}{% set enable_thinking = false %}{% endif %}" + SAID
    + "{{ '<think>\n' if enable_thinking else '<think>\n\n</think>\n\n' }}{% endif %}"
)  # fmt: skip


class ImagesOnly(MiniCPMV4_6Processor):
    """For images alone."""

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None, **kw: Any
    ) -> None:
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template, **kw)
        self.slice_mode, self.default_use_image_id = image_processor.slice_mode, image_processor.use_image_id
        for name in TOKENS:
            setattr(self, name, getattr(tokenizer, name))
        self.image_token_id, self.video_token_id = tokenizer.image_token_id, tokenizer.video_token_id

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


def add_tokens(tokenizer: Any) -> Any:
    """The tokenizer with the tokens that pictures and thoughts need."""
    backend = tokenizer.backend_tokenizer
    backend.add_special_tokens(list(TOKENS.values()))
    backend.add_tokens(["<think>", "</think>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=tokenizer.eos_token, pad_token=tokenizer.pad_token,
        extra_special_tokens=TOKENS,
    )  # fmt: skip


def pixels_of(inputs: Any, patch: int) -> np.ndarray:
    """The pictures' pixels, piece after piece and row by row, of which every twelfth is kept: float32[1, N / 12, 1, 3]."""
    packed, found, done = inputs["pixel_values"][0].numpy(), [], 0
    for rows, columns in inputs["target_sizes"].tolist():
        part = packed[:, :, done : done + rows * columns * patch]
        done += rows * columns * patch
        part = part.reshape(3, patch, rows, columns, patch)
        found.append(part.transpose(2, 1, 3, 4, 0).reshape(-1, 3))
    return np.concatenate(found)[None, ::12, None]
