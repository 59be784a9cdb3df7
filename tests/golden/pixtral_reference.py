"""What the reference of Pixtral and Mistral 3 needs besides transformers' models: their processor without torchvision, which
its module asks for, its tokens, and the layouts that the Hub's files have."""

import sys
from typing import Any

import numpy as np

try:
    from transformers import PreTrainedTokenizerFast
    from transformers.models.pixtral import image_processing_pil_pixtral

    sys.modules.setdefault("transformers.models.pixtral.image_processing_pixtral", image_processing_pil_pixtral)
    from transformers.models.pixtral.processing_pixtral import PixtralProcessor  # which reads that module
except (
    ImportError
):  # an older transformers, which mlx-lm may have brought: this folder's paths are asked for all the same
    PixtralProcessor = object

TOKENS = ["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]

SAID = (
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}[IMG]{% endif %}{% endfor %}{% endif %}"
)
PIXTRAL = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set opening, rest = messages[0]['content'], messages[1:] %}"
    "{% else %}{% set opening, rest = none, messages %}{% endif %}{% for message in rest %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}[INST]{% if loop.last and opening %}{{ opening if opening is string else "
    "opening[0]['text'] }}{{ '\n\n' }}{% endif %}"
    + SAID
    + "[/INST]{% else %}"
    + SAID
    + "{{ eos_token }}{% endif %}{% endfor %}"
)
MISTRAL3 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST]" + SAID + "[/INST]"
    "{% elif message['role'] == 'system' %}[SYSTEM_PROMPT]" + SAID + "[/SYSTEM_PROMPT]{% else %}" + SAID +
    "{{ eos_token }}{% endif %}{% endfor %}"
)  # fmt: skip

MINISTRAL3 = (  # a system prompt of its own, and pictures before words where a message has one of each
    "{% set own = 'You are a model.' %}{{ bos_token }}"
    "{% if messages[0]['role'] != 'system' %}{{ '[SYSTEM_PROMPT]' + own + '[/SYSTEM_PROMPT]' }}{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST]' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% if message['content'] | length == 2 %}{% set parts = message['content'] | sort(attribute='type') %}"
    "{% else %}{% set parts = message['content'] %}{% endif %}{% for part in parts %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% elif part['type'] in ['image', 'image_url'] %}{{ '[IMG]' }}"
    "{% endif %}{% endfor %}{% endif %}{{ '[/INST]' }}"
    "{% elif message['role'] == 'system' %}[SYSTEM_PROMPT]" + SAID + "[/SYSTEM_PROMPT]{% else %}" + SAID +
    "{{ eos_token }}{% endif %}{% endfor %}"
)  # fmt: skip


class ImagesOnly(PixtralProcessor):  # type: ignore[misc]
    """The processor by its own name, so that what it saves says so."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


ImagesOnly.__name__ = PixtralProcessor.__name__


def is_pixtral(config: Any) -> bool:
    """Whether a model's config has a Pixtral tower."""
    return getattr(getattr(config, "vision_config", None), "model_type", None) == "pixtral"


def add_tokens(tokenizer: Any) -> Any:
    """The tokenizer with the tokens of instructions and images."""
    backend = tokenizer.backend_tokenizer
    backend.add_special_tokens(TOKENS)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
    )


def as_on_the_hub(config: dict[str, Any]) -> None:
    """A config as Pixtral-12B's: rotary bases in the old places, the tower's `head_dim`."""
    text, vision = config["text_config"], config["vision_config"]
    text["rope_theta"] = text.pop("rope_parameters")["rope_theta"]
    vision.pop("rope_parameters")
    vision |= {"rope_theta": 10000.0, "head_dim": 16}
    text["is_composition"] = True
    for part in (config, text, vision):
        part.pop("dtype", None)
    config["torch_dtype"] = "float32"


def tie_in_text(config: dict[str, Any]) -> None:
    """A config as Ministral 3's: the tie stands in the text's part alone."""
    config.pop("tie_word_embeddings", None)
    config["text_config"]["tie_word_embeddings"] = True


def untied(config: dict[str, Any]) -> None:
    """A config as Ministral 3 8B's: the outer part says nothing of a tie, which its class takes for one."""
    config.pop("tie_word_embeddings", None)


def pixels_of(inputs: Any) -> np.ndarray:
    """The images' pixels row by row, of which every sixteenth is kept for the goldens' size: float32[1, N / 16, 1, 3]."""
    sizes = inputs["image_sizes"].tolist()
    images = [
        image[:, :height, :width] for image, (height, width) in zip(inputs["pixel_values"].numpy(), sizes, strict=True)
    ]
    found = np.concatenate([image.transpose(1, 2, 0).reshape(-1, 3) for image in images])
    return found[None, ::16, None]
