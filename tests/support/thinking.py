"""Chat templates that let a model think, after those of published models, and answers that say what a test wants."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_vlm_mini.text.tokenizer import Tokenizer

_SAID = (
    "{%- macro said(content) -%}{%- if content is string -%}{{ content }}{%- else -%}{%- for part in content -%}"
    "{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>{%- else -%}{{ part.text }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{%- endmacro -%}"
)
_LAST = (
    "{%- set ns = namespace(last=-1) -%}{%- for message in messages -%}{%- if message.role == 'user' -%}"
    "{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}"
)
_QWEN = (
    _SAID + _LAST + "{%- for message in messages -%}{%- set text = said(message.content)|trim -%}"
    "{%- if message.role == 'assistant' -%}{%- set thought = '' -%}"
    "{%- if message.reasoning_content is string -%}{%- set thought = message.reasoning_content -%}"
    "{%- elif '</think>' in text -%}"
    "{%- set thought = text.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') -%}"
    "{%- set text = text.split('</think>')[-1].lstrip('\\n') -%}{%- endif -%}"
    "{{ '<|im_start|>assistant\\n' }}{%- if loop.index0 > ns.last KEEP -%}"
    "{{ '<think>\\n' + thought|trim + '\\n</think>\\n\\n' }}{%- endif -%}{{ text + '<|im_end|>\\n' }}"
    "{%- else -%}{{ '<|im_start|>' + message.role + '\\n' + text + '<|im_end|>\\n' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}OPEN{%- endif -%}"
)


def _qwen(opening: str, keep: str = "") -> str:
    return _QWEN.replace("OPEN", opening).replace("KEEP", keep)


_OFF, _ON = "{{ '<think>\\n\\n</think>\\n\\n' }}", "{{ '<think>\\n' }}"
TEMPLATES = {
    "on by default": _qwen(f"{{%- if enable_thinking is defined and enable_thinking is false -%}}{_OFF}{{%- else -%}}{_ON}{{%- endif -%}}"),
    "off by default": _qwen(f"{{%- if enable_thinking is defined and enable_thinking is true -%}}{_ON}{{%- else -%}}{_OFF}{{%- endif -%}}"),
    "always": _qwen(_ON),
    "keeps thoughts": _qwen(_ON, "or thought"),
    "the model opens": (  # GLM
        _SAID + _LAST + "[gMASK]<sop>{%- for m in messages -%}{{ '<|' + m.role + '|>\\n' }}"
        "{%- if m.role == 'assistant' and loop.index0 > ns.last and m.reasoning_content -%}"
        "{{ '<think>' + m.reasoning_content.strip() + '</think>\\n' }}"
        "{%- elif m.role == 'assistant' -%}{{ '<think></think>\\n' }}{%- endif -%}{{ said(m.content).strip() }}"
        "{%- if m.role == 'user' and enable_thinking is defined and not enable_thinking -%}{{ '/nothink' }}{%- endif -%}"
        "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}"
        "{{ '<think></think>\\n' if enable_thinking is defined and not enable_thinking else '' }}{%- endif -%}"
    ),
    "channels": (  # Gemma 4
        _SAID + "{%- macro stripped(text) -%}{%- set ns = namespace(kept='') -%}{%- for part in text.split('<channel|>') -%}"
        "{%- set ns.kept = ns.kept + part.split('<|channel>')[0] -%}{%- endfor -%}{{ ns.kept|trim }}{%- endmacro -%}"
        "{{ bos_token }}{%- if enable_thinking is defined and enable_thinking -%}"
        "{{ '<|turn>system\\n<|think|><turn|>\\n' }}{%- endif -%}{%- for m in messages -%}"
        "{{ '<|turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}{%- set text = said(m.content)|trim -%}"
        "{{ stripped(text) if m.role == 'assistant' else text }}{{ '<turn|>\\n' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|turn>model\\n' }}{%- if not enable_thinking|default(false) -%}"
        "{{ '<|channel>thought\\n<channel|>' }}{%- endif -%}{%- endif -%}"
    ),
}  # fmt: skip


def script(tokenizer: Tokenizer, *said: str | int) -> dict[str, Any]:
    """Options of an answer that says these texts and token ids, and nothing else."""
    tokens = [token for part in said for token in ([part] if isinstance(part, int) else tokenizer.encode(part))]
    left = iter(tokens)
    return {"sampler": lambda logprobs: mx.array([next(left, 0)]), "max_tokens": len(tokens)}


def write_template(folder: Path, name: str) -> None:
    """Give a copy of a golden one of `TEMPLATES`."""
    (folder / "chat_template.jinja").write_text(TEMPLATES[name])


def said_of(chunks: Sequence[Any]) -> tuple[str, str]:
    """What an answer thought, and its text."""
    return "".join(chunk.thinking for chunk in chunks), "".join(chunk.text for chunk in chunks)
