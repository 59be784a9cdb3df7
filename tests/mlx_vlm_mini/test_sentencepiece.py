"""tokenizer.model files: SentencePiece's own ids, folders that have no other tokenizer, and files that are broken."""

import json
import shutil
from pathlib import Path

import pytest
from checkpoints import edit_json
from pieces import FOLDER

from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.text.formats import sentencepiece as room
from mlx_vlm_mini.text.formats.sentencepiece import Piece, SentencePiece, build_backend, read_sentencepiece
from mlx_vlm_mini.text.tokenizer import TextStream, load_tokenizer

EXPECTED = json.loads((FOLDER / "expected.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_ids_equal_sentencepiece(name):
    model = read_sentencepiece(FOLDER / f"{name}.model")
    backend = build_backend(model, prefix="each" if model.add_dummy_prefix else "none")
    for text, ids in EXPECTED[name]:
        assert backend.encode(text).ids == ids, text


@pytest.mark.parametrize("name", ["llama", "spaces", "yi"])
def test_ids_by_the_joining_of_our_own_equal_sentencepiece_too(name, monkeypatch):
    """As for a model whose pieces have equal scores."""
    monkeypatch.setattr(room, "_has_ties", lambda usable: True)
    model = read_sentencepiece(FOLDER / f"{name}.model")
    backend = build_backend(model, prefix="each" if model.add_dummy_prefix else "none")
    for text, ids in EXPECTED[name]:
        assert backend.encode(text).ids == ids, text


@pytest.mark.parametrize("prefix", ["each", "first"])
def test_of_pieces_of_one_score_the_leftmost_are_joined_first(prefix):
    """A merged Chinese Llama's have all one score; the ids are what SentencePiece 0.2.3 gives."""
    letters = [Piece(letter, -10.0 - number, 1) for number, letter in enumerate("▁345了他们的")]
    joined = [Piece(text, 0.0, 1) for text in ("45", "34", "们的", "他们")]
    model = SentencePiece(
        pieces=(Piece("<unk>", 0, 2), Piece("<s>", 0, 3), Piece("</s>", 0, 3), *letters, *joined),
        model_type="bpe", byte_fallback=False, unk_id=0, charsmap=b"", add_dummy_prefix=True, remove_extra_whitespaces=False,
    )  # fmt: skip
    backend = build_backend(model, prefix=prefix)
    for text, tokens in (
        ("345", "▁ 34 5"), ("他们的", "▁ 他们 的"), ("34", "▁ 34"), ("345了", "▁ 34 5 了"), ("xy345", "▁ <unk> 34 5"),
        ("3</s>4", "▁ 3 </s> ▁ 4" if prefix == "each" else "▁ 3 </s> 4"),
    ):  # fmt: skip
        assert backend.encode(text).tokens == tokens.split(), text
    assert backend.decode(backend.encode("345 他们的").ids) == "345 他们的"


def test_what_a_model_says():
    llama, yi, spaces, unigram = (
        read_sentencepiece(FOLDER / f"{name}.model") for name in ("llama", "yi", "spaces", "unigram")
    )
    assert (len(llama.pieces), llama.model_type, llama.byte_fallback, llama.unk_id) == (440, "bpe", True, 0)
    assert (llama.add_dummy_prefix, llama.remove_extra_whitespaces, llama.charsmap) == (True, False, b"")
    assert (yi.add_dummy_prefix, spaces.remove_extra_whitespaces, unigram.model_type) == (False, True, "unigram")
    assert [piece.text for piece in llama.pieces[:4]] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert [piece.kind for piece in llama.pieces[:4]] == [2, 3, 3, 6]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copyfile(FOLDER / "llama.model", tmp_path / "tokenizer.model")
    return tmp_path


def tokens(folder: Path, text: str) -> list[str | None]:
    tokenizer = load_tokenizer(folder)
    return [tokenizer.id_to_token(i) for i in tokenizer.encode(text)]


def test_a_folder_with_tokenizer_model_alone(folder):
    tokenizer = load_tokenizer(folder)
    assert tokens(folder, "an</s>an  an") == ["<s>", "▁an", "</s>", "▁an", "▁", "▁an"]
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    text = "A naïve 日本 🙂  <answer>\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    stream = TextStream(tokenizer)
    assert "".join(map(stream.add, tokenizer.encode(text)[1:])) + stream.finish() == text


def test_the_unknown_token_is_one_in_texts(folder):
    """As in transformers' and in a tokenizer.json; what people type of it is text, which the processor sees to."""
    assert tokens(folder, "an<unk>an") == ["<s>", "▁an", "<unk>", "▁an"]


def test_legacy_decides_about_spaces_behind_special_tokens(folder):
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": False}))
    assert tokens(folder, "of</s>of") == ["<s>", "▁of", "</s>", "o", "f"]
    edit_json(folder / "tokenizer_config.json", add_prefix_space=False, add_bos_token=False, add_eos_token=True)
    assert tokens(folder, "of</s> of") == ["o", "f", "</s>", "▁of", "</s>"]


def test_a_model_without_a_space_in_front(folder):
    shutil.copyfile(FOLDER / "yi.model", folder / "tokenizer.model")
    assert tokens(folder, "an<|im_end|>an")[1:] == ["an", "<|im_end|>", "an"]


def test_added_tokens_of_every_file(folder):
    (folder / "added_tokens.json").write_text(json.dumps({"<im_end>": 441, "<im_start>": 440}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "<pad>"}}))
    entry = {"content": "<|user|>", "special": True}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"439": entry}}))
    tokenizer = load_tokenizer(folder)
    assert [tokenizer.token_to_id(text) for text in ("<im_start>", "<im_end>", "<pad>", "<|user|>")] == [
        440,
        441,
        442,
        439,
    ]
    assert tokens(folder, "of<|user|>of<im_end>") == ["<s>", "▁of", "<|user|>", "▁of", "<im_end>"]
    (folder / "added_tokens.json").write_text(json.dumps({"<im_end>": 450}))
    with pytest.raises(
        CheckpointError, match="added_tokens.json gives '<im_end>' the id 450, the next free one .* 440"
    ):
        load_tokenizer(folder)


def test_tokenizer_json_comes_first(folder):
    load_tokenizer(folder).backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer.model").write_bytes(b"")
    assert tokens(folder, "of") == ["<s>", "▁of"]


def test_other_classes_are_refused(folder):
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "DebertaV2Tokenizer"}))
    with pytest.raises(
        CheckpointError, match="belongs to a DebertaV2Tokenizer, whose tokenizer.model is not read here"
    ):
        load_tokenizer(folder)


WHOLE = (FOLDER / "spaces.model").read_bytes()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is no SentencePiece model"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (WHOLE[:-3], "is no SentencePiece model"),
        (WHOLE[:700], "is no SentencePiece model"),
        (b"\x0a\x05\x0a\x03\xff\xfe\xfd", "is no SentencePiece model"),  # a piece that is no UTF-8
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "is no SentencePiece model"),  # a length without end
        (b"\x08\x01", "is no SentencePiece model"),  # a number for a piece
        (WHOLE + b"\x12\x02\x18\x03", "is SentencePiece's kind 'word'"),
        (WHOLE + b"\x12\x06\x18\x02\xc0\x02\xff\x7f", "has 200 pieces, none of them number 16383"),
        (WHOLE + b"\x1a\x02\x28\x00", "is no SentencePiece model"),  # spaces kept as spaces
    ],
)  # fmt: skip
def test_files_that_are_broken(folder, data, message):
    (folder / "tokenizer.model").write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(folder)


def test_every_shortened_file_is_refused_or_whole(folder):
    for length in range(0, len(WHOLE), 61):
        (folder / "tokenizer.model").write_bytes(WHOLE[:length])
        with pytest.raises(CheckpointError):
            load_tokenizer(folder)
