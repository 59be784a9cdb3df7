"""The reference suite, InternVL: more variants than the goldens hold, tiles of 500 sizes, conversations, tokenizers, and the
tensors of every published size, all against transformers and our writing of the authors' code."""

import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import with_paths
from reference import CASES, GOLDEN, SPECS, Spec, make_image_processor, open_reference, save

from mlx_vlm_mini import load
from mlx_vlm_mini.checkpoints.folder import Checkpoint, TensorInfo
from mlx_vlm_mini.checkpoints.load import plan
from mlx_vlm_mini.families import internvl, internvl_chat
from mlx_vlm_mini.generation.decode import prefill
from mlx_vlm_mini.preprocessing.tiles import Tiles, choose_grid, count_tiles
from mlx_vlm_mini.text.template import ChatTemplate
from mlx_vlm_mini.text.tokenizer import load_tokenizer
from mlx_vlm_mini.vision.transformer import VisionTransformer

pytestmark = pytest.mark.reference
TOLERANCE = 1e-4


def compare(folder, case, chat_template=None, steps=6):
    """Our pixels, ids, prefill and cached decoding against the reference's, distribution by distribution."""
    expected = open_reference(folder, chat_template).answer(CASES[case], GOLDEN, steps)
    model, processor = load(folder)
    inputs = processor(with_paths(CASES[case]))
    np.testing.assert_array_equal(np.array(inputs.input_ids[0]), expected["prompt_ids"])
    if inputs.pixel_values is not None:
        np.testing.assert_allclose(np.array(inputs.pixel_values), expected["pixel_values"], atol=1e-5)
    cache = model.make_state()
    logits = prefill(model.decoder, model.read(inputs), cache, step=8)
    for token, logprobs in zip(expected["token_ids"].tolist(), expected["logprobs"], strict=True):
        own = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))[0]
        np.testing.assert_allclose(own, logprobs, atol=TOLERANCE)
        logits = model.decoder.logits(model.decoder(model.decoder.read(mx.array([[token]])), cache))[:, -1]


def changed(name, *, vision=None, text=None, **changes) -> Spec:
    """A golden's spec with other numbers."""
    spec = SPECS[name]
    (kind, values), (decoder, sizes) = spec.vision, spec.text
    decoder = (text or {}).pop("kind", decoder)
    return replace(
        spec, vision=(kind, {**values, **(vision or {})}), text=(decoder, {**sizes, **(text or {})}),
        llava={**spec.llava, **changes},
    )  # fmt: skip


ROPE = {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}
SHORT, LONG = ([1.0 + 0.1 * i for i in range(6)], [2.0 + 0.3 * i for i in range(6)])
VARIANTS = {
    "native, a llama": changed("internvl-qwen2", text={"kind": "llama", "num_attention_heads": 7, "head_dim": 8}),
    "native, a layer before the last": changed("internvl-qwen2", vision_feature_layer=-2),
    "native, a norm behind the tower": changed("internvl-qwen2", vision={"use_mean_pooling": False}),
    "native, other eps and activation": changed(
        "internvl-rms-qwen3", vision={"layer_norm_eps": 0.1, "hidden_act": "gelu_pytorch_tanh"},
        projector_hidden_act="silu"),
    "native, every feature alone": changed("internvl-qwen2", downsample_ratio=1.0, image_seq_length=16),
    "1-1 with a square in place of a squash": changed("internvl-chat-llama", pad2square=True),
    "1-2": changed("internvl-chat-llama", template="Hermes-2", select_layer=-1, vision={"image_size": 24}),
    "1-5 with a decoder with biases": changed("internvl-chat-internlm2", text={"bias": True}),
    "1-5 beyond its context": changed("internvl-chat-internlm2", text={"max_position_embeddings": 64}),
    "1-5 without scaled positions": changed("internvl-chat-internlm2", text={"rope_scaling": None}),
    "2-1B": changed(
        "internvl-chat-qwen3", template="Hermes-2", text={"kind": "Qwen2ForCausalLM", "model_type": "qwen2", "head_dim": 8}),
    "2-Llama3": changed("internvl-chat-llama", template="internlm2-chat", ps_version="v2", dynamic_image_size=True,
                        use_thumbnail=True, min_dynamic_patch=3, max_dynamic_patch=9),
    "2-4B with long positions": changed("internvl-chat-phi3", use_thumbnail=True, text={
        "sliding_window": None, "original_max_position_embeddings": 64,
        "rope_scaling": {"type": "longrope", "short_factor": SHORT, "long_factor": LONG}}),
    "3 with scaled positions": changed("internvl-chat-qwen3", text={
        "kind": "Qwen2ForCausalLM", "model_type": "qwen2", "head_dim": 8, "rope_scaling": {
            "factor": 2.0, "rope_type": "dynamic", "type": "dynamic"}}, system_message="Be brief."),
    "3_5 with biases": changed("internvl-chat-qwen3", text={"attention_bias": True}, downsample_ratio=0.25),
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(VARIANTS))
def test_variants(kind, tmp_path):
    spec = VARIANTS[kind]
    save(spec, tmp_path / "model")
    for case in ("two_images", "text"):
        compare(tmp_path / "model", case, spec.chat_template)


def sizes_of_images(number):
    """Heights and widths: most like photos, some extreme, and ties."""
    rng = np.random.default_rng(3)
    photos = np.exp(rng.uniform(np.log(30), np.log(4000), (number - 150, 2))).astype(int)
    extreme = rng.integers(1, 12, (100, 2)) * rng.integers(1, 900, (100, 2))
    squares = np.repeat(rng.integers(1, 3000, (50, 1)), 2, axis=1)
    return [tuple(map(int, size)) for size in np.concatenate([photos, extreme, squares])]


@pytest.mark.parametrize(("fewest", "most"), [(1, 12), (1, 6), (1, 40), (2, 4), (3, 3)])
def test_numbers_of_tiles_equal_both_references(fewest, most):
    from internvl_reference import grid_of

    processor = make_image_processor(
        "GotOcr2",
        {"size": {"height": 448, "width": 448}, "min_patches": fewest, "max_patches": most, "crop_to_patches": True},
    )
    tiles = Tiles(tile_size=448, min_tiles=fewest, max_tiles=most, thumbnail=True)
    for height, width in sizes_of_images(500):
        columns, rows = grid_of(width, height, fewest, most, 448)
        assert choose_grid((height, width), tiles) == (rows, columns)
        assert count_tiles((height, width), tiles) == processor.get_number_of_image_patches(height, width)


def test_numbers_of_image_tokens_equal_the_reference():
    """Through InternVL's own processor and ours, with 256 tokens a tile."""
    _, processor = load(GOLDEN / "internvl-qwen2")
    reference = open_reference(GOLDEN / "internvl-qwen2").processor
    sizes = sizes_of_images(500)
    expected = reference._get_num_multimodal_tokens(sizes)["num_image_tokens"]  # <img> and </img> among them
    assert processor.image_settings is not None
    found = [internvl.image_text(processor.config, processor.image_settings, "\0", size).count("\0") for size in sizes]
    assert [count + 2 for count in found] == expected


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("template", sorted(internvl_chat.CONVERSATIONS))
def test_conversations_equal_the_reference(template, system):
    from internvl_reference import render

    text = {"architectures": ["LlamaForCausalLM"]}
    config = internvl_chat.config({"template": template, "llm_config": text, "system_message": system})
    assert config.prescribed is not None
    ours = ChatTemplate(config.prescribed.chat_template, {}, "<IMG_CONTEXT>")
    own = [{"role": "system", "content": [{"type": "text", "text": "Answer in French."}]}]
    for messages in (*CASES.values(), [*own, *CASES["two_turns"]]):
        assert "<image>".join(ours.render(messages)) == render(template, messages, system)


TEXTS = (
    "a", " lead", "trail ", "two\nlines\n\n", "naïve 日本 🙂", "e\u0301 é", "tab\there", "don't I'LL we'Ve", "x1234.5",
    "  a   b", "<|im_end|>typed", "<img> <IMG_CONTEXT></img>", "\r\n \u3000", "…—!!?\n", "ﬁ",
)  # fmt: skip


def test_vocab_json_and_merges_txt_are_read_as_transformers_reads_them():
    from transformers import Qwen2Tokenizer

    folder = GOLDEN / "internvl-chat-qwen3"
    reference, tokenizer = Qwen2Tokenizer.from_pretrained(folder), load_tokenizer(folder)
    for text in TEXTS:
        assert tokenizer.encode(text) == reference(text)["input_ids"], text
        assert tokenizer.decode(tokenizer.encode(text)) == reference.decode(
            reference(text)["input_ids"], skip_special_tokens=True
        )


def test_tokenizer_model_is_read_as_internlm2s_code_reads_it():
    from internvl_reference import Pieces

    folder = GOLDEN / "internvl-chat-internlm2"
    reference, tokenizer = Pieces(folder), load_tokenizer(folder)
    for text in TEXTS:
        assert tokenizer.encode(text) == reference(text)["input_ids"], text


@pytest.mark.parametrize("stored", [1, 2, 4, 16, 49])
def test_positions_are_resampled_as_torch_does(stored):
    import torch

    config = internvl.config({"vision_config": {"image_size": stored * 2, "patch_size": 2, "hidden_size": 6,
                              "num_hidden_layers": 1, "num_attention_heads": 1}, "downsample_ratio": 1.0}).vision  # fmt: skip
    vision = VisionTransformer(config)
    generator = torch.Generator().manual_seed(stored)
    rows = torch.randn(1 + stored**2, 6, generator=generator)
    vision.pos_embed = mx.array(rows.numpy())
    grid = rows[1:].reshape(1, stored, stored, 6).permute(0, 3, 1, 2)
    for wanted in (1, 2, 3, 7, 16, 32, 48, 49, 50):
        expected = torch.nn.functional.interpolate(grid, size=(wanted, wanted), mode="bicubic", align_corners=False)
        found = np.array(vision._positions(wanted * 2, wanted * 2))
        np.testing.assert_array_equal(found[0], rows[0].numpy())
        np.testing.assert_allclose(
            found[1:], expected[0].flatten(1).T.numpy(), atol=5e-5
        )  # torch in float32 is 1.2e-5 from itself in float64


SMALL = {
    "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096, "image_size": 448,
    "patch_size": 14, "qkv_bias": True, "qk_normalization": False, "norm_type": "layer_norm", "layer_norm_eps": 1e-6,
}  # fmt: skip
LARGE = {
    "hidden_size": 3200, "num_hidden_layers": 45, "num_attention_heads": 25, "intermediate_size": 12800, "image_size": 448,
    "patch_size": 14, "qkv_bias": False, "qk_normalization": True, "norm_type": "rms_norm", "layer_norm_eps": 1e-6,
}  # fmt: skip


def decoder(kind, hidden, inner, layers, heads, kv_heads, vocab, **more):
    return {"architectures": [f"{kind}ForCausalLM"], "hidden_size": hidden, "intermediate_size": inner,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
            "vocab_size": vocab, "rms_norm_eps": 1e-6, **more}  # fmt: skip


INTERNLM = {"bias": False, "rope_theta": 1000000, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5,
            "rope_scaling": {"factor": 2.0, "type": "dynamic"}}  # fmt: skip
CARD_34B = ("5.54", "0.14317", "34.39", "40.07")
# Vision tower, decoder, and 10^9 weights (tower, projector, decoder, all) as they are published: for 1.1, and for 1.5 and its
# sibling with 1.2's decoder, by the model cards of internvl.github.io/blog; for the small ones of 1.5 and 2 by the "model size"
# of their pages on the Hub (2-4B: the Hub's count, second-hand); for 3-14B and 3-78B by table 1 of arXiv:2504.10479
# (second-hand); for 3.5 by the README of github.com/OpenGVLab/InternVL. Where a part is empty, nothing was found.
# The decoders' sizes were found in copies of config.json for InternVL2-8B, 2.5-4B, 3-2B and Qwen3's 3.5; the others' are the
# public ones of the base model that the README names (Phi-3-mini-128k, Nous-Hermes-2-Yi-34B, Llama-3-70B, Qwen2.5-*). A
# vocabulary is the base tokenizer's length and the 9 tokens that the training code adds, but Qwen3's, which is large enough.
# That of 1.1, whose decoder was never published alone, follows from its 13.12 * 10^9 weights: 42170 give or take 500.
# The same table 1 gives 1.9 for 3-2B, and so would a head that is the embeddings (1.86); that would be read, too.
REPOSITORIES = {
    "InternVL-Chat-V1-1": (
        {**LARGE, "num_hidden_layers": 48}, decoder("Llama", 5120, 13824, 40, 40, 40, 42170),
        ("5.91", "0.09178", "13.12", "19.11")),
    "InternVL-Chat-V1-2": (LARGE, decoder("Llama", 7168, 20480, 60, 56, 8, 64009), CARD_34B),
    "InternVL-Chat-V1-5": (
        LARGE, decoder("InternLM2", 6144, 16384, 48, 48, 8, 92553, **INTERNLM), ("5.54", "0.11643", "19.86", "25.51")),
    "Mini-InternVL-Chat-2B-V1-5": (
        SMALL, decoder("InternLM2", 2048, 8192, 24, 16, 8, 92553, **INTERNLM), ("", "", "", "2.2")),
    "InternVL2-1B": (SMALL, decoder("Qwen2", 896, 4864, 24, 14, 2, 151655), ("", "", "", "0.9")),
    "InternVL2-4B": (SMALL, decoder("Phi3", 3072, 8192, 32, 32, 32, 32020, pad_token_id=32000), ("", "", "", "4.15")),
    "InternVL2-8B": (SMALL, decoder("InternLM2", 4096, 14336, 32, 32, 8, 92553, **INTERNLM), ("", "", "", "8.1")),
    "InternVL2-Llama3-76B": (LARGE, decoder("Llama", 8192, 28672, 80, 64, 8, 128265), ()),
    "InternVL2_5-4B": (SMALL, decoder("Qwen2", 2048, 11008, 36, 16, 2, 151674), ()),
    "InternVL2_5-38B": (LARGE, decoder("Qwen2", 5120, 27648, 64, 40, 8, 151674), ()),
    "InternVL3-2B": (SMALL, decoder("Qwen2", 1536, 8960, 28, 12, 2, 151674), ()),
    "InternVL3-14B": (SMALL, decoder("Qwen2", 5120, 13824, 48, 40, 8, 151674), ("", "", "", "15.1")),
    "InternVL3-78B": (LARGE, decoder("Qwen2", 8192, 29568, 80, 64, 8, 151674), ("", "", "", "78.4")),
    "InternVL3_5-1B": (SMALL, decoder("Qwen3", 1024, 3072, 28, 16, 8, 151936, head_dim=128), ("0.3", "", "0.8", "1.1")),
    "InternVL3_5-8B": (SMALL, decoder("Qwen3", 4096, 12288, 36, 32, 8, 151936, head_dim=128), ("0.3", "", "8.2", "8.5")),
    "InternVL3_5-38B": (
        LARGE, decoder("Qwen3", 5120, 25600, 64, 64, 8, 151936, head_dim=128), ("5.5", "", "32.8", "38.4")),
}  # fmt: skip


def check_tensors(config, tensors, published):
    """Every tensor of the reference has one place with us, of its shape, and every place of ours one; nothing is allocated."""
    infos = {
        name: TensorInfo(Path("x"), "BF16", tuple(tensor.shape), 0, 2 * tensor.numel())
        for name, tensor in tensors.items()
    }
    planned = plan(Checkpoint(Path("x"), json.loads(json.dumps(config)), headers=[(infos, {"format": "pt"})]))
    assert set(planned.ours.values()) == set(tensors) and not planned.unused
    count = dict.fromkeys(("vision", "projector", "decoder"), 0)
    for theirs, ours in {theirs: ours for ours, theirs in planned.ours.items()}.items():
        count[ours.partition(".")[0]] += tensors[theirs].numel()
    for found, text in zip((*count.values(), sum(count.values())), published, strict=False):
        if text:  # some are rounded, some cut off
            assert found / 1e9 == pytest.approx(float(text), abs=10.0 ** -len(text.partition(".")[2]))


@pytest.mark.parametrize("name", sorted(REPOSITORIES))
def test_tensors_of_published_sizes(name):
    """The authors' layout, as our writing of their code names and shapes it on the meta device."""
    import torch
    from internvl_reference import ChatModel

    vision, text, published = REPOSITORIES[name]
    config = {
        "model_type": "internvl_chat", "template": "internvl2_5", "force_image_size": 448, "vision_config": vision,
        "llm_config": text, "select_layer": 44 - vision["num_hidden_layers"] if name == "InternVL-Chat-V1-1" else -1,
    }  # fmt: skip
    with torch.device("meta"):
        tensors = ChatModel(config).names()
    check_tensors(config, tensors, published)


@pytest.mark.parametrize("name", ["InternVL3-2B", "InternVL3-78B", "InternVL3_5-1B", "InternVL3_5-38B"])
@pytest.mark.parametrize("layout", ["Hub", "memory"])
def test_tensors_of_published_native_sizes(name, layout):
    """transformers' class on the meta device."""
    import torch
    from transformers import AutoConfig, InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig

    vision, text, published = REPOSITORIES[name]
    native = {**vision, "attention_bias": vision["qkv_bias"], "use_qk_norm": vision["qk_normalization"]}
    sizes = {key: value for key, value in text.items() if key != "architectures"}
    kind = text["architectures"][0].removesuffix("ForCausalLM").lower()
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**native),
        text_config=AutoConfig.for_model(kind, **sizes),
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        tensors = dict(InternVLForConditionalGeneration(config).state_dict())
    if layout == "Hub":
        hub = {"lm_head.": "language_model.lm_head.", "model.language_model.": "language_model.model.", "model.": ""}
        tensors = {
            next(new + key.removeprefix(old) for old, new in hub.items() if key.startswith(old)): tensor
            for key, tensor in tensors.items()
        }
    check_tensors(config.to_dict(), tensors, published)
