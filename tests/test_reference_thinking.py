"""Thinking, live against transformers: the prompt of every choice, and what becomes of earlier answers' thinking.

pytest -m reference        needs the `reference` extra
"""

import shutil

import pytest
from reference import GOLDEN
from thinking import TEMPLATES

from mlx_vlm_mini import load
from mlx_vlm_mini.text.thinking import SWITCH

pytestmark = pytest.mark.reference

SAID = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYes."}]
TOLD = {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm.\nSo."}
CONVERSATIONS = {
    "one turn": [{"role": "user", "content": "Hi"}],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "Hi "}, {"type": "text", "text": " there"}]}],
    "thinking in a text": [*SAID, {"role": "user", "content": "Why?"}],
    "thinking of its own": [SAID[0], TOLD, {"role": "user", "content": "Why?"}],
    "the last word": [SAID[0], TOLD],
    "system": [{"role": "system", "content": "Be brief."}, SAID[0]],
}


@pytest.mark.parametrize("template", sorted(TEMPLATES))
def test_prompts_equal_transformers(template, tmp_path):
    from transformers import AutoTokenizer

    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / "qwen3.5", folder)
    (folder / "chat_template.jinja").write_text(TEMPLATES[template])
    _, processor = load(folder)
    reference = AutoTokenizer.from_pretrained(folder)
    for messages in CONVERSATIONS.values():
        for think in (None, True, False) if SWITCH in TEMPLATES[template] else (None,):
            for ends in (True, False):
                expected = reference.apply_chat_template(
                    messages,
                    add_generation_prompt=ends,
                    return_dict=False,
                    **({} if think is None else {SWITCH: think}),
                )
                found = processor(messages, add_generation_prompt=ends, think=think).input_ids[0].tolist()
                assert found == expected


def test_an_image_after_a_turn_that_thought(tmp_path):
    """The processor's own prompt, in its order of parts."""
    from transformers import AutoTokenizer

    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / "qwen3.5", folder)
    (folder / "chat_template.jinja").write_text(TEMPLATES["on by default"])
    _, processor = load(folder)
    picture = {"type": "image", "image": str(GOLDEN / "photo.jpg")}
    messages = [SAID[0], TOLD, {"role": "user", "content": [picture, {"type": "text", "text": "And this?"}]}]
    rendered = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False, enable_thinking=True
    )
    assert rendered.count("<|image_pad|>") == 1
    found = processor(messages, think=True)
    expected = AutoTokenizer.from_pretrained(folder)(
        rendered.replace("<|image_pad|>", "<|image_pad|>" * int(found.slots.sum()))
    )["input_ids"]
    assert found.input_ids[0].tolist() == expected and found.answer_begins == "thinking"
