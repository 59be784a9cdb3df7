"""How probable a model holds each of several answers to be, read after one prompt."""

from collections.abc import Sequence
from typing import Any

from mlx_vlm_mini.generation.answering import Choice
from mlx_vlm_mini.generation.stream import stream_generate
from mlx_vlm_mini.images.source import ImageSource
from mlx_vlm_mini.model import VLM
from mlx_vlm_mini.processor import Processor
from mlx_vlm_mini.text.messages import Prompt


def score(
    model: VLM,
    processor: Processor,
    prompt: Prompt,
    *,
    images: Sequence[ImageSource] = (),
    choices: Sequence[str],
    **options: Any,
) -> list[Choice]:
    """How probable each of several answers is. The prompt is read once, and so is what the choices share.

    Args:
        prompt: a text, a list of texts and images in order, or OpenAI-style messages.
        images: come before the text.
        choices: the answers.
        options: see `Options`: prefill_step, progress.

    Returns:
        In the order of the choices.

    Raises:
        PromptError, ImageError: the prompt, a choice or an image is at fault.
    """
    asked = {**options, "choices": choices, "probabilities": True, "max_tokens": 1}
    (chunk,) = stream_generate(model, processor, prompt, images=images, **asked)
    return [*chunk.choices]
