"""What the reference of MiniCPM-V 4.6 needs besides transformers' model: a processor without its video half, which needs
torchvision, and a tokenizer that knows what stands around pictures."""

from typing import Any

import numpy as np
from minicpm_chat import TOKENS
from transformers import MiniCPMV4_6Processor, PreTrainedTokenizerFast
from transformers.processing_utils import ProcessorMixin


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
