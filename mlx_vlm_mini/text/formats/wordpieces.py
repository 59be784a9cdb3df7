"""A tokenizer from vocab.txt, where there is no tokenizer.json: BERT's kind, as InstructBLIP's Q-Former has it.

Source: models/bert/tokenization_bert_legacy.py of huggingface/transformers.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordPiece
from tokenizers.processors import TemplateProcessing

from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.files import read_bytes

WORDS = "vocab.txt"
_SPECIAL = ("[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]")


def read_word_pieces(folder: Path, settings: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a folder's vocab.txt, texts between `[CLS]` and `[SEP]`.

    Args:
        settings: tokenizer_config.json.

    Raises:
        CheckpointError: the file is broken.
    """
    try:
        text = read_bytes(folder / WORDS).decode("utf-8").replace("\r\n", "\n")
        lines = text.removesuffix("\n").split("\n")
    except (OSError, ValueError):
        raise CheckpointError(f"{folder / WORDS} is not UTF-8 text") from None
    vocabulary = {line: number for number, line in enumerate(lines)}
    missing = [token for token in _SPECIAL if token not in vocabulary]
    if missing:
        raise CheckpointError(f"{folder / WORDS} lacks {missing[0]}")
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars") is not False,
        strip_accents=settings.get("strip_accents"),
        lowercase=settings.get("do_lower_case") is not False,
    )
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    tokenizer.add_special_tokens(list(_SPECIAL))
    around = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=around)
    return tokenizer
