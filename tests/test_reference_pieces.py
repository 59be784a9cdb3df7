"""The reference suite, tokenizers: our reading of tokenizer.model against SentencePiece's and transformers', live."""

import json
import shutil

import pytest
from pieces import FOLDER, MODELS, texts, train

from mlx_vlm_mini.text.formats.sentencepiece import build_backend, read_sentencepiece
from mlx_vlm_mini.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.reference


@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_models_are_what_sentencepiece_trains_today(name):
    assert (FOLDER / f"{name}.model").read_bytes() == train(name)


@pytest.mark.parametrize("rule", ["identity", "nmt_nfkc"])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_thousands_of_texts(name, rule, tmp_path):
    """BPE gives SentencePiece's ids without an exception; unigram may choose otherwise among equally likely ones."""
    import sentencepiece

    file = tmp_path / "tokenizer.model"
    options = {**MODELS[name], "normalization_rule_name": rule}
    MODELS["now"] = options
    file.write_bytes(train("now"))
    del MODELS["now"]
    reference = sentencepiece.SentencePieceProcessor(model_file=str(file))
    model = read_sentencepiece(file)
    assert [(piece.text, piece.score) for piece in model.pieces] == [
        (reference.id_to_piece(i), reference.get_score(i)) for i in range(len(reference))
    ]
    backend = build_backend(model, prefix="each" if model.add_dummy_prefix else "none")
    likely = 0
    for text in texts(5000, seed=1):
        ours, theirs = backend.encode(text).ids, reference.encode(text)
        if model.model_type == "unigram" and ours != theirs:
            totals = [sum(model.pieces[i].score for i in ids) for ids in (ours, theirs)]
            assert totals[0] == pytest.approx(totals[1], abs=1e-3), text
            likely += 1
            continue
        assert ours == theirs, text
        if "\ufffd" not in text:
            assert backend.decode(ours) == reference.decode(theirs) or not model.byte_fallback, text
    assert likely < 100


@pytest.mark.parametrize("settings", [{"legacy": False}, {"legacy": False, "add_prefix_space": False}])
def test_llama_tokenizers_equal_transformers(settings, tmp_path):
    """Special tokens inside the texts included."""
    from transformers import AutoTokenizer

    shutil.copyfile(FOLDER / "llama.model", tmp_path / "tokenizer.model")
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        **settings,
    }  # absent: false in 5.23, true in 4
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    reference, tokenizer = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    parts = list(texts(4000, seed=2))
    for one, other in zip(parts[::2], parts[1::2], strict=True):
        text = f"{one}</s>{other}" if len(one) % 2 else one
        ids = reference(text).input_ids
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True), text
