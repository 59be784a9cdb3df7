"""Meta's computation of Llama 3.2 Vision on transformers' classes, which differ from it in two places."""

import json
from pathlib import Path
from typing import Any

TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{% set found = namespace(images=false) %}{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{% set found.images = true %}{% endif %}{% endfor %}{% endfor %}"
    "{% if found.images and system != '' %}{{ raise_exception('images go without a system message') }}{% endif %}"
    "{% if not found.images %}{{ '<|start_header_id|>system<|end_header_id|>\n\nToday.\n\n' + system + '<|eot_id|>' }}"
    "{% endif %}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|image|>' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def is_meta(folder: Path) -> bool:
    """Whether a folder of the family asks for Meta's computation, as the real ones do by saying nothing."""
    config = json.loads((folder / "config.json").read_text())
    return config["model_type"] == "mllama" and config.get("semantics") != "transformers"


def compute_as_meta(model: Any) -> Any:
    """Let a model of transformers compute what Meta's does.

    - Intermediate layers: what leaves the block before is what enters the one that config.json names.
    - Cross-attention's output is zeroed where a token sees no image, as the MLP's is anyway.
    """
    vision = model.model.vision_model
    vision.intermediate_layers_indices = [layer - 1 for layer in vision.intermediate_layers_indices]
    assert min(vision.intermediate_layers_indices) >= 0
    for layer in model.model.language_model.layers:
        if not hasattr(layer, "cross_attn"):
            continue
        state: dict[str, Any] = {}

        def remember(module: Any, args: Any, kwargs: Any, state: dict[str, Any] = state) -> None:
            state["rows"] = kwargs["full_text_row_masked_out_mask"]

        def zero(module: Any, args: Any, kwargs: Any, output: Any, state: dict[str, Any] = state) -> Any:
            rows = state["rows"]
            return output if rows is None else (output[0] * rows[:, 0], *output[1:])

        layer.register_forward_pre_hook(remember, with_kwargs=True)
        layer.cross_attn.register_forward_hook(zero, with_kwargs=True)
    return model


def tiles_of(inputs: Any) -> Any:
    """The pixels of all images' used tiles, one after another: float[tiles, 3, side, side]."""
    return inputs["pixel_values"][0][inputs["aspect_ratio_mask"][0].bool()]
