"""A tokenizer from tiktoken's file of ranks, where there is no tokenizer.json: Qwen's `qwen.tiktoken`.

Each line is a token in base64 and its rank, which is its id. Of all neighbours that form a token, those of the lowest
rank are joined first. Every way to form a token is listed as a merge of its rank; ways that ranks never lead to do no
harm, since whatever could be joined to form one was joined otherwise before its turn.

Ids are tiktoken's but where a text has combining marks, in an order that is not NFC's, that are younger than the
`tokenizers` library's tables of Unicode.

Source: github.com/openai/tiktoken; tokenization_qwen.py of Qwen/Qwen-VL-Chat on the Hub, which is not run.
"""

import base64
import binascii
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.files import read_bytes
from mlx_vlm_mini.text.patterns import LONGEST_TOKEN, MOST_TOKENS

from .bytelevel import WORDS

RANKS = "qwen.tiktoken"

_ROLES = r"\A(?:system|user|assistant)\n"
"""Opens a message behind `<|im_start|>`; the reference encodes it and the message one by one."""

END_OF_TEXT, MESSAGE_START, MESSAGE_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
PLACES = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")
"""Tokens that say where in an image something is: they are part of what an answer says."""
_CONTROLS = (END_OF_TEXT, MESSAGE_START, MESSAGE_END, *(f"<|extra_{i}|>" for i in range(205)))
_IMAGE = ("<img>", "</img>", "<imgpad>")


def read_ranks(file: Path) -> list[bytes]:
    """The tokens of a file, by rank.

    Raises:
        CheckpointError: it is broken, or lacks a rank or a single byte.
    """
    ranks: dict[int, bytes] = {}
    try:
        for line in read_bytes(file).splitlines():
            if line:
                token, rank = line.split()
                ranks[int(rank)] = base64.b64decode(token, validate=True)
    except (ValueError, binascii.Error):
        raise CheckpointError(f"{file} is broken: a line must be a token in base64 and its rank") from None
    if len(ranks) > MOST_TOKENS or any(len(token) > LONGEST_TOKEN for token in ranks.values()):
        raise CheckpointError(
            f"{file} is no vocabulary: at most {MOST_TOKENS:,} tokens of at most {LONGEST_TOKEN} bytes are read"
        )
    tokens = [ranks[rank] for rank in sorted(ranks)]
    whole = sorted(ranks) == list(range(len(ranks))) and {bytes([i]) for i in range(256)} <= set(tokens)
    if not whole or len(set(tokens)) < len(tokens):
        raise CheckpointError(f"{file} is truncated or broken: ranks or single bytes are missing or repeated")
    return tokens


def byte_letters() -> dict[int, str]:
    """The letter that stands for a byte in the `tokenizers` library, as in GPT-2's vocabulary."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


def read_tiktoken(file: Path) -> Tokenizer:
    """Qwen's tokenizer, its special tokens behind the ranks.

    Raises:
        CheckpointError: the file is broken.
    """
    letters = byte_letters()
    tokens = [token.decode("latin-1").translate(letters) for token in read_ranks(file)]
    vocab = {token: rank for rank, token in enumerate(tokens)}
    merges = [
        (token[:cut], token[cut:])
        for token in tokens
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    tokenizer = Tokenizer(BPE(vocab, merges, ignore_merges=True))  # a word that is a token stays whole
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_ROLES), behavior="isolated"),
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [*_CONTROLS, *PLACES, *_IMAGE]
    tokenizer.add_tokens([AddedToken(text, special=text not in PLACES, normalized=False) for text in special])
    return tokenizer
