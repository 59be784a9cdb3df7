"""Tiny SentencePiece models trained by SentencePiece 0.2.3, and the ids it gives to texts.

python tests/golden/pieces.py       rewrites tests/golden/sentencepiece/
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "sentencepiece"

CORPUS = [
    "What is in this image? A red circle stands left of a blue square. ",
    "Compare the first picture with the second one. Which of them is larger? ",
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the human's questions. USER: ASSISTANT: Human: Assistant: ### [INST] [/INST] <<SYS>> <</SYS>>",
    "The answer is yes, the triangle is green and the star is yellow: 12345 and 67890. ",
    "for i in range(10):\n    if i % 2 == 0:\n        print(i)  # even\n\n---------- ========= aaaa aaa aaaaaa",
    "Describe the photo in a few words. It shows a small house under a grey sky. Größe, où, 日本語 ",
] * 4

LLAMA: dict[str, Any] = {  # how Llama's own was made
    "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
    "split_digits": True, "allow_whitespace_only_pieces": True, "character_coverage": 0.995, "vocab_size": 440,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "yi": {**LLAMA, "add_dummy_prefix": False, "user_defined_symbols": ["<|im_start|>", "<|im_end|>"]},
    "spaces": {**LLAMA, "byte_fallback": False, "remove_extra_whitespaces": True, "vocab_size": 200},
    "unigram": {
        **LLAMA, "model_type": "unigram", "remove_extra_whitespaces": True, "byte_fallback": False, "vocab_size": 150,
    },
}  # fmt: skip


def train(name: str) -> bytes:
    """A model as SentencePiece writes it to a file."""
    import io

    import sentencepiece

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=written, num_threads=1, minloglevel=2, **MODELS[name]
    )
    return written.getvalue()


def texts(count: int, seed: int = 0) -> Iterator[str]:
    """Texts like the corpus, of its words, and of odd characters and runs of one character.

    None spells a control piece (`</s>`): SentencePiece takes that for text, a tokenizer in transformers' manner does not.
    """
    choose = random.Random(seed)
    words = " ".join(CORPUS).split(" ")
    odd = "abcdefghijklmnop ABC  .,;:!?\n\t0123456789-_=/<>▁ éüßñ日本語中文🙂\u3000\u00a0ﬁ①"
    for number in range(count):
        kind = number % 4
        if kind == 0:
            yield "".join(choose.choices(odd, k=choose.randint(0, 40)))
        elif kind == 1:
            yield " ".join(choose.choices(words, k=choose.randint(1, 30)))
        elif kind == 2:
            yield "".join(choose.choice(words) + choose.choice([" ", "  ", "\n", "", "   "]) for _ in range(8))
        else:
            yield "".join(choose.choice("a -=▁") * choose.randint(1, 12) for _ in range(choose.randint(1, 6)))


def regenerate() -> None:
    import sentencepiece

    FOLDER.mkdir(exist_ok=True)
    expected = {}
    for name in MODELS:
        file = FOLDER / f"{name}.model"
        file.write_bytes(train(name))
        reference = sentencepiece.SentencePieceProcessor(model_file=str(file))
        expected[name] = [[text, reference.encode(text)] for text in texts(100)]
        print(name, file.stat().st_size, "bytes")
    (FOLDER / "expected.json").write_text(json.dumps(expected, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    regenerate()
