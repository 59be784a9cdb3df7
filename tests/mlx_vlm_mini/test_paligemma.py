"""PaliGemma: what its configs leave out, its tensor names, a prompt that sees itself, and what it says to conversations."""

from dataclasses import replace
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import PHOTO, PLAIN, SHAPES, edit_json, in_layout, write_names
from reference import GOLDEN

from mlx_vlm_mini import Chat, generate, load
from mlx_vlm_mini.checkpoints.folder import open_checkpoint
from mlx_vlm_mini.checkpoints.load import compute_dtype, plan
from mlx_vlm_mini.config import ScaleConfig, WindowConfig
from mlx_vlm_mini.convert import convert
from mlx_vlm_mini.decoder.masks import Rows, causal_mask
from mlx_vlm_mini.errors import CheckpointError, PromptError
from mlx_vlm_mini.families import paligemma
from mlx_vlm_mini.generation.decode import prefill
from mlx_vlm_mini.model import VLM

ONE, TWO = GOLDEN / "paligemma-gemma", GOLDEN / "paligemma2-gemma2"


def test_an_empty_config_is_paligemma_of_three_billion():
    """The class defaults of transformers 5.23, as its PaliGemmaConfig gives them."""
    config = paligemma.config({"model_type": "paligemma"})
    vision, decoder = config.vision, config.decoder
    assert (vision.hidden_size, vision.depth, vision.intermediate_size, vision.num_features) == (1152, 27, 4096, 256)
    assert (vision.hidden_act, vision.layer_norm_eps, vision.post_norm) == ("gelu_pytorch_tanh", 1e-6, True)
    assert (decoder.hidden_size, decoder.num_hidden_layers, decoder.head_dim) == (2048, 18, 256)
    assert (decoder.num_attention_heads, decoder.num_key_value_heads, decoder.vocab_size) == (8, 1, 257152)
    assert (decoder.norms.rms_norm_eps, decoder.norms.rms_norm_offset, decoder.norms.sandwich) == (1e-6, 1.0, False)
    assert decoder.scales == ScaleConfig(embed_scale=2048**0.5, fits_float16=False)
    assert (decoder.hidden_act, decoder.prefix_lm, decoder.tie_word_embeddings) == ("gelu_pytorch_tanh", True, True)
    assert (decoder.max_position_embeddings, decoder.rope_theta, decoder.sliding_window) == (8192, 10000.0, None)
    assert config.image_token_id == 256000


def test_a_config_as_paligemma_twos():
    """google/paligemma2-3b-*: what it says, and Gemma 2's class defaults; the top-level hidden_size is PaliGemma 1's."""
    hf = {
        "image_token_index": 257152, "projection_dim": 2304, "hidden_size": 2048,
        "text_config": {"model_type": "gemma2", "hidden_act": "gelu", "num_hidden_layers": 4, "vocab_size": 257216},
        "vision_config": {"hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16, "patch_size": 14, "image_size": 448},
    }  # fmt: skip
    config = paligemma.config(hf)
    decoder = config.decoder
    assert (config.image_token_id, config.projector.hidden_size, config.vision.num_features) == (257152, 2304, 1024)
    assert (decoder.hidden_size, decoder.intermediate_size, decoder.num_key_value_heads) == (2304, 9216, 4)
    assert decoder.layer_types == ("sliding_attention", "full_attention") * 2 and decoder.sliding_window == 4096
    assert decoder.norms.sandwich and decoder.hidden_act == "gelu_pytorch_tanh"
    assert decoder.scales == ScaleConfig(
        embed_scale=48.0,
        query_pre_attn_scalar=256,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        fits_float16=False,
    )


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        ({"projection_dim": 64}, "projection_dim 64 differs from the decoder's hidden_size 2048"),
        ({"vision_config": {"model_type": "dinov2"}}, "vision tower 'dinov2' is not supported"),
        ({"text_config": {"model_type": "gemma2", "query_pre_attn_scalar": 0}}, "query_pre_attn_scalar must be a positive"),
        ({"text_config": {"model_type": "gemma2", "attn_logit_softcapping": "x"}}, "attn_logit_softcapping must be a pos"),
        ({"text_config": {"model_type": "gemma2", "final_logit_softcapping": -1}}, "final_logit_softcapping must be a pos"),
    ],
)  # fmt: skip
def test_configs_that_make_no_model(hf, message):
    with pytest.raises(CheckpointError, match=message):
        paligemma.config(hf)


@pytest.mark.parametrize(
    ("text", "vision", "projector"),
    [
        ("language_model.model.", "vision_tower.vision_model.", "multi_modal_projector."),
        ("model.language_model.", "model.vision_tower.vision_model.", "model.multi_modal_projector."),
        ("model.language_model.", "model.vision_tower.", "model.multi_modal_projector."),
        ("language_model.model.", "vision_tower.", "multi_modal_projector."),
    ],
    ids=["L1", "L2", "L2b", "L3"],
)
def test_every_layout_is_read(text, vision, projector, copy_of):
    folder = copy_of("paligemma2-gemma2")
    write_names(folder, paligemma, partial(in_layout, text=text, vision=vision, projector=projector))
    expected, processor = load(TWO)
    inputs = processor("What?", [PHOTO])
    assert (load(folder)[0](inputs) == expected(inputs)).all()


def test_a_prefix_sees_itself_and_what_follows_is_causal():
    """A prefix of three in five tokens, a window of two: as a picture, `x` seen and `.` not."""

    def picture(mask):
        return ["".join("x" if seen else "." for seen in row) for row in np.array(mask)]

    assert picture(causal_mask(Rows(0, 5), None, 3)) == ["xxx..", "xxx..", "xxx..", "xxxx.", "xxxxx"]
    assert picture(causal_mask(Rows(0, 5), 2, 3)) == ["xxx..", "xxx..", "xxx..", "..xx.", "...xx"]
    assert picture(causal_mask(Rows(3, 2), 2, 3)) == ["..xx.", "...xx"]
    assert causal_mask(Rows(0, 5), 2, 5) is None
    assert causal_mask(Rows(5, 1), None, 5) is None and causal_mask(Rows(5, 2), None, 5) == "causal"


def test_the_last_token_of_the_prompt_changes_the_first_ones_logits():
    model, processor = load(ONE)
    one, other = (
        model(processor(text, [PHOTO]))[0, 0] for text in ("What is in this image?", "What is in this photo?")
    )
    assert mx.abs(one - other).max() > 1e-3


CHANGES = {
    "embed_scale": lambda decoder: {"scales": replace(decoder.scales, embed_scale=1.0)},
    "query_pre_attn_scalar": lambda decoder: {"scales": replace(decoder.scales, query_pre_attn_scalar=None)},
    "attn_logit_softcapping": lambda decoder: {"scales": replace(decoder.scales, attn_logit_softcapping=None)},
    "final_logit_softcapping": lambda decoder: {"scales": replace(decoder.scales, final_logit_softcapping=None)},
    "rms_norm_offset": lambda decoder: {"norms": replace(decoder.norms, rms_norm_offset=0.9)},
    "sliding_window": lambda decoder: {"window": WindowConfig(sliding_window=100)},
    "two_way": lambda decoder: {"two_way": "nothing"},
}


@pytest.mark.parametrize("field", sorted(CHANGES))
def test_the_golden_would_notice(field):
    """Each of Gemma 2's facts moves the decoded tokens' log-probabilities far beyond the tolerance of parity."""
    model, processor = load(TWO)
    with np.load(TWO / "expected.npz") as expected:
        tokens = expected["image/token_ids"].tolist()
    inputs, config = processor("What is in this image?", [PHOTO]), model.config.decoder

    def logprobs(vlm):
        cache, decoder = vlm.make_state(), vlm.decoder
        rows = [prefill(decoder, vlm.read(inputs), cache)]
        for token in tokens[:3]:
            rows.append(decoder.logits(decoder(decoder.read(mx.array([[token]])), cache))[:, -1])
        logits = mx.concatenate(rows)
        return logits - mx.logsumexp(logits, axis=-1, keepdims=True)

    other = VLM(replace(model.config, decoder=replace(config, **CHANGES[field](config))))
    other.update(model.parameters())
    assert mx.abs(logprobs(other) - logprobs(model)).max() > 0.01


def test_an_unscaled_image_and_a_scaled_text():
    model, processor = load(ONE)
    inputs = processor("What?", [PHOTO])
    embeddings = model.read(inputs).embeddings[0]
    ids, slots = np.array(inputs.input_ids[0]), inputs.slots
    text = model.decoder.embed_tokens(mx.array(ids[~slots])) * 48**0.5
    np.testing.assert_allclose(np.array(embeddings)[~slots], np.array(text), rtol=1e-6)
    features = model.embed_images(inputs.pixel_values)[0]
    np.testing.assert_allclose(np.array(embeddings)[slots], np.array(features), rtol=1e-6)


def prompt_of(processor, prompt, images=()):
    ids = np.array(processor(prompt, images).input_ids[0]).tolist()
    return processor.tokenizer.decode(ids, skip_special_tokens=False)


def test_the_prompt_is_images_bos_text_newline():
    _, processor = load(ONE)
    nine = "<image>" * 9
    assert prompt_of(processor, "caption en", [PHOTO]) == f"{nine}<bos>caption en\n"
    assert prompt_of(processor, [PHOTO]) == f"{nine}<bos>\n"
    assert prompt_of(processor, ["between ", PHOTO, "and ", SHAPES]) == f"{nine * 2}<bos>between and \n"
    assert prompt_of(processor, "no image") == "<bos>no image\n"


def test_of_a_conversation_it_reads_all_images_and_the_last_question():
    model, processor = load(TWO)
    chat = Chat(model, processor, max_tokens=3)
    list(chat.send([PHOTO, "What?"]))
    list(chat.send([SHAPES, "And this?"]))
    chunks = list(chat.send("Why?"))
    assert prompt_of(processor, chat.messages[:-1]) == "<image>" * 18 + "<bos>Why?\n"
    assert chunks[-1].stats.cached_tokens == 0


def test_what_it_cannot_take_is_refused():
    model, processor = load(ONE)
    with pytest.raises(PromptError, match="PaliGemma takes one text with images and no system message"):
        list(Chat(model, processor, system="Be brief.").send([PHOTO, "What?"]))
    assert processor("What is <image>?", [PHOTO]).slots.sum() == processor("What?", [PHOTO]).slots.sum()


def test_the_settings_of_the_hubs_first_files(copy_of):
    """No image_processor_type, and a tokenizer whose post-processor adds <bos> by itself."""
    folder = copy_of("paligemma-gemma")
    edit_json(folder / "preprocessor_config.json", image_processor_type=...)
    processing = {
        "type": "TemplateProcessing", "pair": [],
        "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}},
    }  # fmt: skip
    edit_json(folder / "tokenizer.json", post_processor=processing)
    edit_json(folder / "tokenizer_config.json", bos_token=..., tokenizer_class="GemmaTokenizerFast")
    _, processor = load(folder)
    expected = load(ONE)[1]("What?", [PHOTO])
    inputs = processor("What?", [PHOTO])
    assert (inputs.input_ids == expected.input_ids).all() and (inputs.pixel_values == expected.pixel_values).all()
    assert processor.eos_token_ids == {1}


def test_half_precision_computes(tmp_path):
    convert(TWO, tmp_path / "half", dtype="bfloat16")
    model, processor = load(tmp_path / "half", dtype="bfloat16")
    assert model(processor("What?", [PHOTO])).dtype == mx.bfloat16
    assert isinstance(generate(model, processor, "What?", images=[PHOTO], max_tokens=3), str)


def test_float16_is_refused_where_it_overflows(monkeypatch):
    """Gemma's activations; said when it is asked for, and not chosen for files that hold float16."""
    with pytest.raises(CheckpointError, match="float16 cannot hold what this model's decoder computes.*bfloat16"):
        load(ONE, dtype="float16")
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    for golden, stored, expected in (
        (TWO, "F16", mx.bfloat16), (TWO, "BF16", mx.bfloat16), (TWO, "F32", mx.float32),
        (PLAIN, "F16", mx.float16), (PLAIN, "BF16", mx.bfloat16),
    ):  # fmt: skip
        planned = plan(open_checkpoint(golden))
        name = planned.ours["decoder.norm.weight"]
        planned.checkpoint.tensors[name] = replace(planned.checkpoint.tensors[name], dtype=stored)
        assert compute_dtype(planned) == expected
