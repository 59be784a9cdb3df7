"""A tiny Gemma 3 that reads text alone, made, saved and answered by transformers.

python tests/golden/gemma3_text.py        rewrites tests/golden/gemma3-text
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from reference import GEMMA3, GOLDEN, STEPS, fill, make_tokenizer, text_part, user

FOLDER = GOLDEN / "gemma3-text"
CASES: dict[str, list[dict[str, Any]]] = {
    "text": [user(text_part("How many objects do you see?"))],
    "two_turns": [
        {"role": "system", "content": [text_part("Answer in a few words.")]},
        user(text_part("Describe the photo.")),
        {"role": "assistant", "content": [text_part("A red circle and a blue square.")]},
        user(text_part("And this one? ")),
    ],
}


def save(folder: Path) -> None:
    """Every second layer sees everything, the others 9 tokens; logits are capped."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    tokenizer = make_tokenizer("gemma3")
    tokenizer.chat_template = GEMMA3
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=1, head_dim=12, query_pre_attn_scalar=9, sliding_window=9, final_logit_softcapping=3.0,
        layer_types=["sliding_attention", "full_attention"] * 2, rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    )  # fmt: skip
    model = fill(Gemma3ForCausalLM(config).eval(), 42, gemma=True)
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def expected_outputs(folder: Path = FOLDER, steps: int = STEPS) -> dict[str, np.ndarray]:
    """What transformers answers to every case, computed now: `case/what` to an array, as `reference.py` has them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    answers = {}
    for case, messages in CASES.items():
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        rows, tokens = [], []
        with torch.no_grad():
            out = model(input_ids=ids, use_cache=True)
            prompt = torch.log_softmax(out.logits[0, :-1], dim=-1).gather(1, ids[0, 1:, None])[:, 0]
            for _ in range(steps):
                rows.append(torch.log_softmax(out.logits[0, -1], dim=-1).numpy())
                tokens.append(int(rows[-1].argmax()))
                out = model(input_ids=torch.tensor([tokens[-1:]]), past_key_values=out.past_key_values, use_cache=True)
        answers |= {
            f"{case}/prompt_ids": ids[0].numpy().astype(np.int32), f"{case}/prompt_logprobs": prompt.numpy(),
            f"{case}/token_ids": np.array(tokens, dtype=np.int32), f"{case}/logprobs": np.stack(rows),
        }  # fmt: skip
    return answers


if __name__ == "__main__":
    shutil.rmtree(FOLDER, ignore_errors=True)
    save(FOLDER)
    expected = expected_outputs()
    np.savez_compressed(FOLDER / "expected.npz", **expected)
    print(json.dumps({key: array.tolist() for key, array in expected.items() if "token_ids" in key}))
