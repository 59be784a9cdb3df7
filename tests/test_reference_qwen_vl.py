"""The reference suite, Qwen-VL: the golden recomputed live, variants that no golden has, and tiktoken's own ids."""

import base64
import random
import re
import unicodedata
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from parity import check_answer, check_golden
from qwen_vl_oracle import SPECS, TAGS, WORDS, Oracle, expected_outputs, save
from reference import CASES, CORPUS, GOLDEN

from mlx_vlm_mini import load
from mlx_vlm_mini.checkpoints.folder import open_checkpoint
from mlx_vlm_mini.convert import convert
from mlx_vlm_mini.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.reference
CHAT = SPECS["qwen-vl-chat"]
VISUAL = CHAT.config["visual"]


@pytest.mark.parametrize("name", sorted(SPECS))
def test_the_goldens_are_what_the_oracle_gives_today(name):
    check_golden(GOLDEN / name, expected_outputs(name))


WIDE = {"hidden_size": 256, "kv_channels": 64, "intermediate_size": 80}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], str, tuple[str, ...]]] = {
    "two heads and 256 queries, 448 pixels": (
        {**WIDE, "seq_length": 512, "num_hidden_layers": 1},
        {"output_dim": 256, "n_queries": 256, "image_size": 448, "patch_size": 14, "layers": 1},
        "chatml", ("image", "two_turns"),
    ),
    "fewer patches than positions": ({}, {"image_size": 70}, "chatml", ("two_images",)),
    "as many patches as positions": ({}, {"image_size": 112}, "chatml", ("image",)),
    "biases everywhere": ({"no_bias": False}, {}, "chatml", ("image", "text")),
    "without NTK": ({"use_dynamic_ntk": False, "seq_length": 40}, {}, "chatml", ("two_turns", "text")),
    "without log-n": ({"use_logn_attn": False, "seq_length": 40}, {}, "chatml", ("two_turns", "text")),
    "another base": ({"rotary_emb_base": 500, "seq_length": 24}, {}, "chatml", ("system",)),
    "the base model": ({}, {}, "raw", ("image", "two_images", "text", "two_turns", "line_breaks")),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name, tmp_path):
    changes, visual, chat_format, cases = VARIANTS[name]
    config = {**CHAT.config, **changes, "visual": {**VISUAL, **visual}}
    save(replace(CHAT, config=config, chat_format=chat_format, seed=77), tmp_path / "model")
    oracle, (model, processor) = Oracle(tmp_path / "model"), load(tmp_path / "model")
    for case in cases:
        expected = oracle.answer(CASES[case], GOLDEN, 5)
        if "pixel_values" in expected:
            sizes = expected["pixel_values"].shape[1:]
            assert sizes == (config["visual"]["image_size"], config["visual"]["image_size"], 3)
        check_answer(model, processor, CASES[case], expected, step=32)


def test_ids_equal_tiktokens_on_random_text(tmp_path):
    """A vocabulary of 3000 tokens, learned here from text of several scripts, and text that it never saw."""
    import tiktoken

    letters = "aeiourstnldmABC ,.'\n\t0123é日本語ßЖя\u0301\u017f\u00a0\u2028🙂-_=/"
    rng = random.Random(5)
    words = ["".join(rng.choices(letters, k=rng.randint(1, 6))) for _ in range(400)]
    source = " ".join(rng.choices(words, k=3000)) + " ".join(CORPUS)
    ranks = {bytes([i]): i for i in range(256)}
    while len(ranks) < 3000:  # tokens are parts of the text that two known ones form, in random order
        start = rng.randrange(len(source) - 12)
        part = source[start : start + rng.randint(1, 8)].encode()
        for cut in range(1, len(part)):
            if part[:cut] in ranks and part[cut:] in ranks and part not in ranks:
                ranks[part] = len(ranks)
    lines = [base64.b64encode(token) + b" %d" % rank for token, rank in ranks.items()]
    (tmp_path / "qwen.tiktoken").write_bytes(b"\n".join(lines))
    tokenizer = load_tokenizer(tmp_path)
    special = {token: tokenizer.token_to_id(token) for token in TAGS}
    encoding = tiktoken.Encoding("Qwen", pat_str=WORDS, mergeable_ranks=ranks, special_tokens=special)
    # The `tokenizers` library orders combining marks by older tables of Unicode than Python does.
    known = [chr(code) for code in range(1, 0x3000) if unicodedata.ucd_3_2_0.category(chr(code)) != "Cn"]
    for number in range(3000):
        kind = rng.choice([words, list(letters), rng.choices(known, k=9), [*words, *TAGS]])
        text = "".join(rng.choices(kind, k=rng.randint(1, 30)))
        normal = "".join(
            part if part in TAGS else unicodedata.normalize("NFC", part) for part in _split(text)
        )  # the library normalizes what stands between tokens
        expected = encoding.encode(normal, allowed_special="all")
        assert tokenizer.encode(text) == expected, (number, text)
        assert tokenizer.decode(expected, skip_special_tokens=False) == normal


def _split(text: str) -> list[str]:
    return re.split(f"({'|'.join(map(re.escape, TAGS))})", text)


def test_a_wrong_oracle_is_noticed(tmp_path):
    """Each of the peculiar steps changes the answer by far more than the tolerance."""
    oracle = Oracle(GOLDEN / "qwen-vl-chat")
    case = CASES["two_turns"]
    right = oracle.answer(case, GOLDEN, 1)["logprobs"]
    for name in ("transformer.h.0.mlp.w1.weight", "transformer.visual.proj"):
        wrong = Oracle(GOLDEN / "qwen-vl-chat")
        if name.endswith("w1.weight"):  # the other branch as the gate
            other = name.replace("w1", "w2")
            wrong.tensors[name], wrong.tensors[other] = wrong.tensors[other], wrong.tensors[name]
        else:
            wrong.tensors[name] = wrong.tensors[name].T
        assert np.abs(wrong.answer(case, GOLDEN, 1)["logprobs"] - right).max() > 0.01, name
    for key in ("use_dynamic_ntk", "use_logn_attn"):
        wrong = Oracle(GOLDEN / "qwen-vl-chat")
        wrong.config[key] = False
        assert np.abs(wrong.answer(case, GOLDEN, 1)["logprobs"] - right).max() > 0.01, key


def test_the_towers_fused_rows_are_cut_packed(tmp_path):
    """Each head's queries, keys and values lie together, quantized as they are."""
    visual = {**VISUAL, "width": 64, "mlp_ratio": 2.0}
    config = {**CHAT.config, "visual": visual, "intermediate_size": 128}
    save(replace(CHAT, config=config, seed=78), tmp_path / "model")
    report = convert(tmp_path / "model", tmp_path / "out", bits=8, group_size=32, part_bits={"vision": 8})
    packed = open_checkpoint(tmp_path / "out").tensors
    assert "transformer.visual.transformer.resblocks.1.attn.in_proj.scales" in packed and not report.preview.skipped
    (whole, processor), (model, _) = load(tmp_path / "model"), load(tmp_path / "out")
    (image,) = processor(["What is ", GOLDEN / "photo.jpg", "?"]).images
    one, other = (np.array(each.encode(image)) for each in (whole, model))
    cosine = (one * other).sum(-1) / np.linalg.norm(one, axis=-1) / np.linalg.norm(other, axis=-1)
    assert 0.999 < cosine.min() < 1 - 1e-9
