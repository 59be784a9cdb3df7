"""What each token adds to a text, for every tokenizer that is read here: what decoding gives is what the table says."""

import json
import random
from pathlib import Path

import pytest
from checkpoints import PLAIN
from goldens import SPECS
from reference import GOLDEN
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from mlx_vlm_mini.checkpoints import bundled
from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.text import tokenizer as own
from mlx_vlm_mini.text.formats import sentencepiece
from mlx_vlm_mini.text.token_bytes import TokenBytes, read_token_bytes
from mlx_vlm_mini.text.tokenizer import load_tokenizer

TEXTS = ["hello world", ' {"a": 1}', "é🙂 x", "<box>", "<|im_end|>", "e\u0301", "ﬁ", "a  b\n\tc", "</s><s>"]


def table_of(tokenizer: own.Tokenizer) -> TokenBytes:
    return read_token_bytes(tokenizer, tokenizer.backend.get_vocab_size(with_added_tokens=True) + 3)


def check(tokenizer: own.Tokenizer, *, seed: int = 0, whole: bool = True) -> TokenBytes:
    """Random tokens decode to their bytes; texts become tokens of exactly their bytes."""
    table, draw = table_of(tokenizer), random.Random(seed)
    usable = [number for number, token in enumerate(table.tokens) if token]
    compared = 0
    for _ in range(400):
        ids = draw.choices(usable, k=draw.randint(1, 6))
        try:
            text = b"".join(table.tokens[number] for number in ids).decode()
        except UnicodeDecodeError:
            continue  # bytes of a character alone
        if ids[0] in table.misfits:
            continue
        compared += 1
        assert tokenizer.decode(ids) == (text.removeprefix(" ") if table.strips else text)
    assert compared > 50
    if whole:
        for text in TEXTS:
            assert b"".join(table.tokens[number] for number in table.encode(text)) == text.encode()
    special = [number for number, token in tokenizer.backend.get_added_tokens_decoder().items() if token.special]
    assert special and not any(table.tokens[number] for number in special)
    return table


@pytest.mark.parametrize("name", [*sorted(SPECS), "demo"])
def test_every_checkpoints_table(name):
    """Byte-level and byte-fallback tokenizer.json, tokenizer.model, qwen.tiktoken, vocab.json with merges.txt."""
    folder = bundled.FOLDER if name == "demo" else GOLDEN / name
    table = check(load_tokenizer(folder))
    assert table.is_canonical and not any(table.tokens[-3:])


@pytest.mark.parametrize("prefix", ["each", "first", "none"])
@pytest.mark.parametrize("name", ["llama", "yi", "unigram", "spaces"])
def test_sentencepiece_models(name, prefix):
    """Also where not every byte is a piece."""
    model = sentencepiece.read_sentencepiece(GOLDEN / "sentencepiece" / f"{name}.model")
    tokenizer = own.Tokenizer(sentencepiece.build_backend(model, prefix=prefix), {})
    table = check(tokenizer, whole=model.byte_fallback)
    assert table.strips is (prefix != "none")
    assert table.is_canonical


def test_where_joining_is_our_own(monkeypatch):
    """Pieces of equal scores are joined in Python: their continuations are not the tokenizer's, but exact."""
    monkeypatch.setattr(sentencepiece, "_has_ties", lambda usable: True)
    model = sentencepiece.read_sentencepiece(GOLDEN / "sentencepiece" / "llama.model")
    assert not check(own.Tokenizer(sentencepiece.build_backend(model, prefix="first"), {})).is_canonical


def test_what_follows_a_text_is_encoded_as_its_continuation():
    """No space is put in front, and what somebody writes like a special token is text."""
    tokenizer = load_tokenizer(PLAIN)
    table = table_of(tokenizer)
    assert tokenizer.encode("a b", add_special_tokens=False) != table.encode("a b")
    assert tokenizer.encode("a b", add_special_tokens=False) == table.encode(" a b")
    assert not set(table.encode("</s>")) & {tokenizer.token_to_id("</s>")}


def test_encode_ends_where_there_is_no_token():
    table = TokenBytes((b"a", b"ab", b"", b"c"), False, frozenset(), None)
    assert table.encode("abca") == [1, 3, 0]
    assert table.encode("abxa") == [1]
    assert not table.is_canonical


def metaspace(scheme: str) -> own.Tokenizer:
    vocab = {"<unk>": 0, "▁a": 1, "a": 2, "▁": 3, "▁▁": 4, "b▁c": 5}
    backend = Tokenizer(models.BPE(vocab, [("▁", "a")], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    backend.add_special_tokens(["<unk>"])
    return own.Tokenizer(backend, {})


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_metaspace_drops_all_marks_of_the_first_token(scheme):
    tokenizer = metaspace(scheme)
    table = table_of(tokenizer)
    assert table.tokens[:6] == (b"", b" a", b"a", b" ", b"  ", b"b c")
    assert table.strips is (scheme != "never")
    for first in range(1, 6):
        text = (table.tokens[first] + b"a").decode()
        expected = text.removeprefix(" ") if table.strips else text
        assert (tokenizer.decode([first, 2]) == expected) or first in table.misfits
    assert table.encode(" a") == [1]


@pytest.mark.parametrize(
    ("decoder", "said"),
    [
        (None, "does not say how its tokens become a text"), (decoders.WordPiece(), "WordPiece"),
        (decoders.BPEDecoder(), "BPEDecoder"), (decoders.Sequence([decoders.Strip(" ", 2, 0)]), "Strip"),
        (decoders.Sequence([decoders.Fuse(), decoders.Replace(Regex("a+"), "b")]), "Replace"),
        (decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")]), "Replace"),
    ],
)  # fmt: skip
def test_decoders_that_are_not_read(decoder, said):
    backend = Tokenizer(models.BPE({"a": 0}, []))
    if decoder is not None:
        backend.decoder = decoder
    with pytest.raises(CheckpointError, match=said):
        read_token_bytes(own.Tokenizer(backend, {}), 1)


def test_letters_outside_of_a_byte_level_alphabet_are_text(copy_of):
    """An added token is decoded by letters where all of it is letters, else as it stands."""
    folder: Path = copy_of("qwen2-vl")
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    first = 1 + max(token["id"] for token in content["added_tokens"])
    added = [("a é", b"a \xc3\xa9"), ("Ġhi", b" hi"), ("漢", "漢".encode())]
    for number, (text, _) in enumerate(added, first):
        content["added_tokens"].append(
            {"id": number, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
        )  # fmt: skip
    file.write_text(json.dumps(content))
    tokenizer = load_tokenizer(folder)
    table = table_of(tokenizer)
    for text, expected in added:
        number = tokenizer.token_to_id(text)
        assert number is not None and table.tokens[number] == expected
        assert tokenizer.decode([number]) == expected.decode()
