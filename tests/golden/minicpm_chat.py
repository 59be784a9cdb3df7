"""What MiniCPM-V 4.6's tiny checkpoint says in a conversation: tokens around pictures, and the chat template."""

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
