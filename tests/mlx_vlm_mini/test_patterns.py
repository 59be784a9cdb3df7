"""Expressions of tokenizers: the published ones are read, those that could take for ever are not; errors are one line."""

import json

import pytest

from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.text.patterns import is_bounded, longest_replacement
from mlx_vlm_mini.text.tokenizer import load_tokenizer

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"


@pytest.mark.parametrize(
    "pattern",
    [
        CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{M}}]*[\p{{Ll}}\p{{M}}]+{CONTRACTIONS}?|\p{{N}}| ?[^\s]+[\r\n/]*|\s*[\r\n]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|\s+""",
        r"[\p{Han}&&[^\p{P}]]+", r" {2,}", r"\A +", r"(?:\r?\n)+", r"(?:abc){3}",
    ],
)  # fmt: skip
def test_published_expressions(pattern):
    assert is_bounded(pattern)


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(a*)*", "((a|b)+c?)*x", "(?:a+){2,}", "(.*a){20}", "(a|a+)*b", "a*" * 9, "(?>(a+)+)", "(?<n>a+)+", "(?=a+)*"]
)  # fmt: skip
def test_expressions_without_bounds(pattern):
    assert not is_bounded(pattern)


def edited(copy_of, **changes):
    folder = copy_of()
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**content, **changes}))
    return folder


def test_the_librarys_code_gives_up(copy_of):
    """Two ways to match each letter: the library counts ten million and ends the program, were it not caught."""
    splits = {"type": "Split", "pattern": {"Regex": "(a|a|b)*c"}, "behavior": "Isolated", "invert": False}
    tokenizer = load_tokenizer(edited(copy_of, pre_tokenizer=splits))
    with pytest.raises(CheckpointError, match="the tokenizer cannot read .*retry-limit"):
        tokenizer.encode("a" * 60 + "b" * 60 + "d c")


def test_many_tokens_are_added_at_once(copy_of):
    folder = copy_of()
    first = load_tokenizer(folder).backend.get_vocab_size()
    added = {str(first + i): {"content": f"<{i}>", "special": i % 2 == 0} for i in range(5000)}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("<4999><0>", add_special_tokens=False) == [first + 4999, first]
    added[str(first + 7000)] = {"content": "<far>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    with pytest.raises(CheckpointError, match=f"gives '<far>' the id {first + 7000}, the next free one"):
        load_tokenizer(folder)


DOUBLED = [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 18
_MANY = {"<s>": {"id": "<s>", "ids": [1] * 101, "tokens": ["<s>"] * 101}}
_AROUND = {"SpecialToken": {"id": "<s>", "type_id": 0}}
_TEXT = {"Sequence": {"id": "A", "type_id": 0}}
_PAIR = [_TEXT, {"Sequence": {"id": "B", "type_id": 1}}]


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Sequence", "normalizers": DOUBLED}},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": DOUBLED[:9]}]}},
        {"normalizer": {"type": "Prepend", "prepend": "a" * 101}},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "(?=.)"}, "content": "a" * 256}},
        {"decoder": {"type": "Sequence", "decoders": DOUBLED}},
        {"decoder": {"type": "WordPiece", "prefix": "#" * 101, "cleanup": False}},
        {"post_processor": {"type": "TemplateProcessing", "single": [_AROUND, _TEXT], "pair": _PAIR, "special_tokens": _MANY}},
        {"post_processor": {"type": "TemplateProcessing", "single": [_TEXT] * 300, "pair": _PAIR, "special_tokens": {}}},
    ],
)  # fmt: skip
def test_much_of_little_text(copy_of, change):
    with pytest.raises(CheckpointError, match=r"makes every text .*(times as long|longer by)"):
        load_tokenizer(edited(copy_of, **change))


def test_long_strings(copy_of):
    folder = copy_of()
    content = json.loads((folder / "tokenizer.json").read_text())
    for token in ("a" * 20_001, '"' * 20_001):
        content["added_tokens"] = [{**content["added_tokens"][0], "content": token}]
        (folder / "tokenizer.json").write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match="has a string of more than 20,000 bytes: no token is so long"):
            load_tokenizer(folder)


@pytest.mark.parametrize("table", ["", "AAAA", "////AAAA", "AAAAAP8=", "é", 1e30, None, []])
def test_tables_that_are_none(copy_of, capfd, table):
    """The library itself would write to stderr of them."""
    step = {"type": "Precompiled", "precompiled_charsmap": table}
    folder = edited(copy_of, normalizer={"type": "Sequence", "normalizers": [step]})
    with pytest.raises(CheckpointError, match="precompiled_charsmap is no table of SentencePiece"):
        load_tokenizer(folder)
    assert capfd.readouterr().err == ""


def test_what_published_tokenizers_do_to_texts(copy_of):
    """Gemma's, Llama's and CLIP's steps, and a table of SentencePiece's: a trie and what it puts in."""
    metaspace = [
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
    ]
    spaces = [{"type": "NFC"}, {"type": "Replace", "pattern": {"Regex": "\\s+"}, "content": " "}, {"type": "Lowercase"}]
    steps = {"type": "Sequence", "normalizers": [*metaspace, *spaces]}
    assert load_tokenizer(edited(copy_of, normalizer=steps)).encode("a b")
    assert longest_replacement(b"\4\0\0\0" + b"tree" + b"ab\0" + b"abc\0") == 3
