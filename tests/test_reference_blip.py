"""The reference suite's part for BLIP-2 and InstructBLIP: the goldens anew, variants, questions, full-size names and shapes."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
from blip_cases import SPECS, picture_and_text
from parity import check_answer, check_golden
from pieces import texts
from published import without_data
from reference import GOLDEN

from mlx_vlm_mini import load
from mlx_vlm_mini.checkpoints.load import plan
from mlx_vlm_mini.families import blip2
from mlx_vlm_mini.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.reference


@pytest.mark.parametrize("name", sorted(SPECS))
def test_the_goldens_are_what_the_reference_gives_today(name):
    from blip_reference import expected

    check_golden(GOLDEN / name, expected(name))


def changed(name, *, vision=None, qformer=None, text=None, **extra):
    spec = copy.deepcopy(SPECS[name])
    return replace(
        spec, vision={**spec.vision, **(vision or {})}, qformer={**spec.qformer, **(qformer or {})},
        text={**spec.text, **(text or {})}, extra={**spec.extra, **extra}, seed=7,
    )  # fmt: skip


VARIANTS = {
    "every layer looks": changed("blip2-opt", qformer={"cross_attention_frequency": 1}),
    "every third layer looks": changed("instructblip-vicuna", qformer={"cross_attention_frequency": 3}),
    "one query": changed("instructblip-vicuna", num_query_tokens=1),
    "other eps": changed(
        "blip2-opt", vision={"layer_norm_eps": 0.1}, qformer={"layer_norm_eps": 0.2}
    ),
    "other activations": changed(
        "blip2-opt", vision={"hidden_act": "quick_gelu"}, qformer={"hidden_act": "gelu_new"},
        text={"activation_function": "gelu"}),
    "no biases of queries, keys and values": changed("instructblip-vicuna", vision={"qkv_bias": False}),
    "InstructBLIP with OPT": replace(
        changed("instructblip-vicuna"), tokenizer="opt", text=SPECS["blip2-opt"].text),
    "BLIP-2 with Llama": replace(changed("blip2-opt"), tokenizer="llama", text=SPECS["instructblip-vicuna"].text),
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(VARIANTS))
def test_variants(kind, tmp_path):
    from blip_reference import Reference, save

    spec, folder = VARIANTS[kind], tmp_path / "model"
    save(spec, folder)
    reference, (model, processor) = Reference(folder), load(folder)
    for case in ("image", "strip"):
        image, text = picture_and_text(case)
        parts = [{"type": "image", "image": image}, {"type": "text", "text": text}]
        check_answer(model, processor, [{"role": "user", "content": parts}], reference.answer(image, text, 6))
        (prepared,) = processor(text, [GOLDEN / image]).images
        np.testing.assert_allclose(model.mixing(prepared), reference.mixing(image, text), atol=1e-5)


@pytest.mark.parametrize("name", sorted(SPECS))
def test_ids_of_questions_equal_the_reference(name):
    from blip_reference import Reference

    reference = Reference(GOLDEN / name)
    _, processor = load(GOLDEN / name)
    for text in [*texts(100, seed=5), " lead", "trail ", "Ünïcode ÀÉ 日本", "two\nlines"]:
        if not text.strip() or "<image>" in text:
            continue
        inputs, expected = processor(text, [GOLDEN / "photo.jpg"]), reference.inputs("photo.jpg", text)
        assert inputs.input_ids.tolist() == expected["input_ids"].tolist(), text
        if "qformer_input_ids" in expected:
            assert inputs.images[0].instruction.tolist() == expected["qformer_input_ids"][0].tolist(), text


@pytest.mark.parametrize("kind", ["blip-2", "instructblip"])
def test_defaults_equal_the_reference(kind):
    from transformers import AutoConfig

    expected = blip2.config(AutoConfig.for_model(kind).to_dict())
    assert blip2.config({"model_type": kind}) == expected


OPT = {"model_type": "opt", "vocab_size": 50304, "activation_function": "relu"}
LLAMA = {"model_type": "llama", "vocab_size": 32001, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
FULL = {  # as the Hub has them, sizes of OPT and Vicuna from their papers
    "Salesforce/blip2-opt-2.7b": (
        "blip-2", {**OPT, "hidden_size": 2560, "ffn_dim": 10240, "num_hidden_layers": 32, "num_attention_heads": 32}, 3.74),
    "Salesforce/blip2-opt-6.7b": (
        "blip-2", {**OPT, "hidden_size": 4096, "ffn_dim": 16384, "num_hidden_layers": 32, "num_attention_heads": 32}, 7.75),
    "Salesforce/instructblip-vicuna-7b": ("instructblip", LLAMA, 7.91),
    "Salesforce/instructblip-vicuna-13b": ("instructblip", {
        **LLAMA, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
        "num_key_value_heads": 40}, 14.19),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(FULL))
def test_full_size_tensors_equal_the_reference(name):
    """Names and shapes that the reference's class gives, on the meta device, all find their place."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    kind, text, billions = FULL[name]
    hf = {"model_type": kind, "text_config": text, "image_token_index": text["vocab_size"] - 1}
    with torch.device("meta"):
        reference = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**hf))
    shapes = {theirs: tuple(tensor.shape) for theirs, tensor in reference.state_dict().items()}
    if text["model_type"] == "opt":  # tied: files hold it once
        assert shapes.pop("language_model.lm_head.weight") == shapes["language_model.model.decoder.embed_tokens.weight"]
    planned = plan(without_data(hf, shapes))  # refuses what is missing, superfluous or of another shape
    assert planned.unused == () and set(planned.ours.values()) == set(shapes)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) / 1e9 == pytest.approx(billions, abs=0.01)


def test_words_of_vocab_txt_equal_the_reference(tmp_path):
    """As BertTokenizer reads them, with the token that InstructBLIP adds."""
    from transformers import BertTokenizer

    folder = tmp_path / "words"
    folder.mkdir()
    words = json.loads((GOLDEN / "instructblip-vicuna" / "qformer_tokenizer" / "tokenizer.json").read_text())
    vocabulary = sorted(words["model"]["vocab"], key=words["model"]["vocab"].__getitem__)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "bos_token": "[DEC]"})
    )
    expected = BertTokenizer(vocab=words["model"]["vocab"], bos_token="[DEC]")
    ours = load_tokenizer(folder)
    for text in [
        *texts(200, seed=6),
        "What's this, [SEP] or [DEC]?",
        "ÀÉ 日本語 naïve",
        "a" * 120,
        "  tabs\tand\u200b",
    ]:
        assert ours.encode(text) == expected(text)["input_ids"], text
