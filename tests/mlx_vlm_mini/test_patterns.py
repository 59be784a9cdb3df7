"""Expressions of tokenizers: the published ones are read, those that could take for ever are not; errors are one line."""

import json

import pytest

from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.text.patterns import is_bounded
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
