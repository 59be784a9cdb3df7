"""LLaVA-OneVision's processor without its video half, which needs torchvision."""

from typing import Any

from transformers import LlavaOnevisionProcessor


class StillImages(LlavaOnevisionProcessor):
    def __init__(self, image_processor: Any = None, tokenizer: Any = None, num_image_tokens: int | None = None,
                 vision_feature_select_strategy: str | None = None, chat_template: str | None = None,
                 vision_aspect_ratio: str = "anyres_max_9") -> None:  # fmt: skip
        super().__init__(
            image_processor, tokenizer, None, num_image_tokens, vision_feature_select_strategy, chat_template,
            vision_aspect_ratio=vision_aspect_ratio,
        )  # fmt: skip

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]
