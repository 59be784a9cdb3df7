"""A tokenizer from vocab.json and merges.txt, where there is no tokenizer.json: GPT-2's kind, also as Qwen2 has it.

Source: models/qwen2/tokenization_qwen2.py and models/gpt2/tokenization_gpt2.py of huggingface/transformers.
"""

from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from mlx_vlm_mini.text.patterns import check_size, library_errors

VOCABULARY, MERGES = "vocab.json", "merges.txt"

WORDS = (  # contractions, words, single digits, punctuation, line ends, spaces
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_byte_level(folder: Path, *, gpt2: bool = False) -> Tokenizer:
    """The tokenizer of a folder's vocab.json and merges.txt, without the tokens that other files add.

    Args:
        gpt2: words are GPT-2's (OPT), not Qwen2's.

    Raises:
        CheckpointError: one of the files is broken.
    """
    check_size(folder / VOCABULARY)
    check_size(folder / MERGES)
    with library_errors(f"{folder}: {VOCABULARY} or {MERGES} is broken"):
        tokenizer = Tokenizer(BPE.from_file(str(folder / VOCABULARY), str(folder / MERGES)))
    tokenizer.decoder = decoders.ByteLevel()
    if gpt2:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        return tokenizer
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer
