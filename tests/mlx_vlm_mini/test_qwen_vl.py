"""Qwen-VL: its tokenizer, positions that go by the prompt, the resampler, prompts, places that it names, bad input."""

import json
import shutil
import unicodedata
from functools import cache
from itertools import pairwise
from math import log

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import PHOTO, SHAPES, check_fields, edit_json
from click.testing import CliRunner
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from published import QWEN_VL, published
from qwen_vl_oracle import CONTROLS, TAGS, shapes_of, sincos, train_ranks, write_ranks
from reference import CORPUS, GOLDEN
from tokenizers import decoders

from mlx_vlm_mini import Chat, attend, draw_detections, find_detections, load
from mlx_vlm_mini.checkpoints.folder import open_checkpoint
from mlx_vlm_mini.checkpoints.load import plan, read_config
from mlx_vlm_mini.cli.main import main
from mlx_vlm_mini.config import ProjectorConfig, QueryScale, ResamplerConfig
from mlx_vlm_mini.convert import convert
from mlx_vlm_mini.decoder.rope import make_rope, prompt_step
from mlx_vlm_mini.decoder.sharpness import sharpness
from mlx_vlm_mini.errors import CheckpointError, PromptError, VLMError
from mlx_vlm_mini.families import llava, qwen_vl
from mlx_vlm_mini.generation.options import Options
from mlx_vlm_mini.grounding.attend import find_boxes
from mlx_vlm_mini.grounding.draw import COLOURS
from mlx_vlm_mini.projectors.resampler import Resampler
from mlx_vlm_mini.text.formats.ranks import read_tiktoken
from mlx_vlm_mini.text.tokenizer import TextStream, load_tokenizer

QWEN = GOLDEN / "qwen-vl-chat"
FIRST = 281  # of its special tokens
STEP = 84  # its seq_length


@pytest.fixture(scope="module")
def qwen():
    return load(QWEN)


# The tokenizer


@cache
def load_pre_tokenizer():
    return read_tiktoken(QWEN / "qwen.tiktoken").pre_tokenizer


def brute_force(ranks: dict[bytes, int], text: str) -> list[int]:
    """Of each word the neighbours of the lowest rank joined, leftmost first, until no two make a token."""
    pieces = load_pre_tokenizer().pre_tokenize_str(text)
    words = [decoders.ByteLevel().decode([piece]).encode() for piece, _ in pieces]
    ids = []
    for word in words:
        parts = [word] if word in ranks else [bytes([byte]) for byte in word]
        while True:
            pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
            if not pairs:
                break
            _, i = min(pairs)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks[part] for part in parts]
    return ids


RANKS = {token: rank for rank, token in enumerate(train_ranks())}
texts = st.text(max_size=40) | st.text(alphabet="aAeinoqrst. ,'\n\t13é日\u017f", max_size=60)


@settings(deadline=None, max_examples=300, derandomize=True, database=None)
@given(text=texts | st.lists(st.sampled_from(" ".join(CORPUS).split(" ")), max_size=8).map(" ".join))
@example(text="user\n\nWhat? DON'T\r\n  \n x")
def test_ids_equal_those_of_the_ranks_by_brute_force(text):
    assume(not any(token in text for token in CONTROLS + TAGS))  # hypothesis also tries texts that stand in the code
    tokenizer = load_tokenizer(QWEN)
    normal = unicodedata.normalize("NFC", text)
    ids = tokenizer.encode(text)
    assert ids == brute_force(RANKS, normal)
    assert tokenizer.decode(ids) == normal


def test_ranks_that_lead_elsewhere_than_the_first_split(tmp_path):
    """`abc` is known, but its letters join to `a` and `bc`; `xyz` cannot be joined at all and is a word."""
    extra = [b"bc", b"ab", b"abc", b"aa", b"aaa", b"xyz"]
    write_ranks([*(bytes([i]) for i in range(256)), *extra], tmp_path / "qwen.tiktoken")
    ranks = {token: rank for rank, token in enumerate([*(bytes([i]) for i in range(256)), *extra])}
    tokenizer = load_tokenizer(tmp_path)
    for text in ("abc", "aabc", "aaaa", "aaaaaaa", "abcbcab", "xyz", "xyzx", "caaab"):
        assert tokenizer.encode(text) == brute_force(ranks, text), text


def test_special_tokens_have_the_ids_behind_the_ranks(qwen):
    _, processor = qwen
    tokenizer = processor.tokenizer
    for number, token in enumerate(CONTROLS + TAGS):
        assert tokenizer.token_to_id(token) == FIRST + number and tokenizer.encode(token) == [FIRST + number]
    real = 151643  # ranks of the published file
    assert {t: real + i for i, t in enumerate(CONTROLS + TAGS)} | {
        "<|im_start|>": 151644, "<|im_end|>": 151645, "<ref>": 151851, "<img>": 151857, "<imgpad>": 151859
    } == {t: real + i for i, t in enumerate(CONTROLS + TAGS)}  # fmt: skip
    said = "<ref>a dog</ref><box>(1,2),(3,4)</box>"
    ids = tokenizer.encode(f"{said}<|im_end|><img></img>")
    assert tokenizer.decode(ids) == said
    stream = TextStream(tokenizer)
    assert "".join(map(stream.add, ids)) + stream.finish() == said


def test_a_folder_with_tokenizer_json_alone(copy_of, qwen):
    """Its tags of places are shown in answers even where the file calls them special."""
    folder = copy_of(QWEN.name)
    content = json.loads(load_tokenizer(folder).backend.to_str())
    for token in content["added_tokens"]:
        token["special"] = True
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "qwen.tiktoken").unlink()
    _, processor = load(folder)
    _, other = qwen
    message = ["<box>(1,2),(3,4)</box> What is in ", PHOTO, "?"]
    assert processor(message).input_ids.tolist() == other(message).input_ids.tolist()
    ids = processor.tokenizer.encode("<box>(1,2),(3,4)</box><|im_end|>")
    assert processor.tokenizer.decode(ids) == "<box>(1,2),(3,4)</box>"


# Config and names


def test_the_published_config():
    config = qwen_vl.config(QWEN_VL)
    check_fields(config, {
        "vision.hidden_size": 1664, "vision.num_hidden_layers": 48, "vision.num_attention_heads": 16,
        "vision.intermediate_size": 8192, "vision.patch_size": 14, "vision.num_positions": 256, "vision.pre_norm": True,
        "vision.post_norm": False, "vision.class_token": False, "vision.hidden_act": "gelu",
        "vision.layer_norm_eps": 1e-6, "vision.resample_positions": True, "vision.feature_layers": (48,),
        "projector.input_size": 1664, "projector.hidden_size": 4096, "projector.bias": False,
        "projector.resampler.num_queries": 256, "projector.resampler.num_heads": 32,
        "projector.resampler.norm_eps": 1e-6,
        "decoder.vocab_size": 151936, "decoder.hidden_size": 4096, "decoder.intermediate_size": 11008,
        "decoder.num_key_value_heads": 32, "decoder.head_dim": 128, "decoder.norms.rms_norm_eps": 1e-6,
        "decoder.biases.qkv_bias": True, "decoder.biases.o_bias": False, "decoder.biases.mlp_bias": False,
        "decoder.rope_theta": 10000, "decoder.scales.query_scale": QueryScale(kind="log", length=2048), "decoder.tie_word_embeddings": False,
        "decoder.max_position_embeddings": 8192, "image_token_id": 151859,
        "prescribed.end_token": ("<|im_end|>", "<|im_start|>", "<|endoftext|>"),
    })  # fmt: skip
    assert config.vision.features_at(448) == 1024
    sparse = {"model_type": "qwen", "visual": {}}
    assert qwen_vl.config(sparse) == config


def test_every_tensor_of_the_published_model_has_its_place():
    """Its names and shapes are the authors', written out in the oracle; of its bytes the Hub's index says 19313870336."""
    checkpoint = published("Qwen/Qwen-VL-Chat")
    planned = plan(checkpoint)
    assert (
        len(checkpoint.tensors) == 853
        and planned.unused == ()
        and set(planned.ours.values()) == set(checkpoint.tensors)
    )
    assert sum(info.nbytes for info in checkpoint.tensors.values()) == 19313870336
    assert planned.ours["decoder.layers.31.mlp.gate_proj.weight"] == "transformer.h.31.mlp.w2.weight"
    assert planned.ours["decoder.layers.0.mlp.up_proj.weight"] == "transformer.h.0.mlp.w1.weight"


def test_biases_where_the_config_says_so(tmp_path):
    config = {**json.loads((QWEN / "config.json").read_text()), "no_bias": False}
    shapes = shapes_of(config)
    assert "transformer.h.0.mlp.w1.bias" in shapes
    checkpoint = published("Qwen/Qwen-VL-Chat")
    checkpoint.config = {**QWEN_VL, "no_bias": False}
    with pytest.raises(CheckpointError, match="lacks .*bias"):
        plan(checkpoint)


# Positions and queries


def test_the_step_of_a_prompt():
    steps = {1: 1, 83: 1, 84: 1, 85: 3, 168: 3, 169: 7, 336: 7, 337: 15}
    assert {prompt: prompt_step(prompt, STEP) for prompt in steps} == steps
    scaling = {"rope_type": "prompt_ntk", "original_max_position_embeddings": STEP}
    rope = make_rope(llava.config({"text_config": {"head_dim": 32, "rope_scaling": scaling}}).decoder)
    assert rope.depends_on == "prompt"
    for prompt, step in steps.items():
        base = 10000 * step ** (32 / 30)
        periods, scale = rope.scaling(prompt)
        np.testing.assert_allclose(periods, base ** (np.arange(0, 32, 2) / 32), rtol=1e-6)
        assert scale == 1
    assert rope.scaling(100)[0] is rope.scaling(168)[0]


def test_what_is_off_is_off(copy_of):
    """Without NTK and log-n a long prompt's scores are others, a short one's the same."""
    model, processor = load(QWEN)
    short, long = (processor(text) for text in ("Hi", "Describe the photo in a few words. " * 12))
    assert len(short.slots) < STEP < len(long.slots)
    for changes in ({"use_dynamic_ntk": False}, {"use_logn_attn": False}, {"seq_length": 60}):
        folder = copy_of(QWEN.name)
        edit_json(folder / "config.json", **changes)
        other, _ = load(folder)
        np.testing.assert_array_equal(np.array(other(short)), np.array(model(short)))
        assert np.abs(np.array(other(long)) - np.array(model(long))).max() > 0.01, changes
        shutil.rmtree(folder)


def test_queries_are_scaled_by_their_place():
    scale = QueryScale(kind="log", length=STEP)
    assert sharpness(scale, 0, STEP) is sharpness(None, 200, 9) is None
    found = np.array(sharpness(scale, 82, 4))[:, 0]
    np.testing.assert_allclose(found, [1, 1, log(85, STEP), log(86, STEP)], rtol=1e-6)


# The resampler


def make_resampler(side: int = 4, size: int = 256, width: int = 24) -> Resampler:
    config = ProjectorConfig(
        input_size=width, hidden_size=size, num_layers=1, hidden_act="gelu", bias=False,
        resampler=ResamplerConfig(num_queries=side**2, num_heads=2, norm_eps=1e-6),
    )  # fmt: skip
    mx.random.seed(3)
    resampler = Resampler(config)
    for name, shape in {"query": (side**2, size), "proj": (size, size), "pos_embed": (side**2, size)}.items():
        resampler[name] = mx.random.normal(shape) / (size**0.5 if name == "proj" else 1)
    resampler.attn.in_proj_weight = mx.random.normal((3 * size, size)) / size**0.5
    resampler.attn.in_proj_bias = mx.random.normal((3 * size,)) * 0.3
    return resampler


def test_what_the_resampler_takes_from_where():
    """Its weights, put on the values by hand, give its output: float64, two heads."""
    resampler = make_resampler()
    features = mx.random.normal((1, 25, 24))
    weights: list[mx.array] = []
    explicit, fused = resampler(features, weights), resampler(features)
    np.testing.assert_allclose(np.array(explicit), np.array(fused), atol=1e-5)
    assert [each.shape for each in weights] == [(1, 2, 16, 25)]
    mean = np.array(resampler.weights(features))
    assert mean.shape == (1, 16, 25)
    np.testing.assert_allclose(mean.sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(mean, np.array(weights[0]).mean(axis=1), atol=1e-6)
    values = np.array(resampler.ln_kv(resampler.kv_proj(features)), dtype=np.float64)[0]
    row = np.array(resampler.attn.in_proj_weight, dtype=np.float64)[512:], np.array(resampler.attn.in_proj_bias)[512:]
    heads = (values @ row[0].T + row[1]).reshape(25, 2, 128).transpose(1, 0, 2)
    mixed = (np.array(weights[0][0], dtype=np.float64) @ heads).transpose(1, 0, 2).reshape(16, 256)
    out = resampler.ln_post(resampler.attn.out_proj(mx.array(mixed.astype(np.float32)))) @ resampler.proj
    np.testing.assert_allclose(np.array(out), np.array(fused[0]), atol=1e-4)


def test_places_are_those_of_the_grid():
    """Columns in the first half, rows in the second; between the stored places where there are more patches."""
    places = sincos(4, 8)
    assert np.allclose(places[0], [0, 0, 1, 1, 0, 0, 1, 1])
    assert np.allclose(places[1, :4], places[5, :4]) and np.allclose(places[4, 4:], places[5, 4:])
    assert not np.allclose(places[0, :4], places[1, :4]) and np.allclose(places[0, 4:], places[1, 4:])


# Prompts


def test_pictures_are_counted_over_the_conversation(qwen):
    _, processor = qwen
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Compare "}, {"type": "image", "image": PHOTO},
                                     {"type": "image", "image": SHAPES}, {"type": "text", "text": "."}]},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": [{"type": "image", "image": PHOTO}, {"type": "text", "text": "And?"}]},
    ]  # fmt: skip
    prepared = [processor.prepare(image) for image in (PHOTO, SHAPES, PHOTO)]
    text, slots = processor.expand(messages, prepared)
    image = f"<img>{'<imgpad>' * 16}</img>\n"
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nCompare Picture 1: " + image
        + f"Picture 2: {image}.<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n<|im_start|>user\nPicture 3: {image}And?"
        + "<|im_end|>\n<|im_start|>assistant\n"
    )  # fmt: skip
    assert sum(slots) == 48


def test_the_base_model_goes_on_a_text(copy_of):
    folder = copy_of(QWEN.name)
    edit_json(folder / "generation_config.json", chat_format="raw")
    _, processor = load(folder)
    text, _ = processor.expand([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "A"}]}],
                               [processor.prepare(PHOTO)])  # fmt: skip
    assert text == f"Picture 1: <img>{'<imgpad>' * 16}</img>\nA"
    assert processor.eos_token_ids == {FIRST}
    with pytest.raises(PromptError, match="takes no system message"):
        processor([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    convert(folder, folder.with_name("out"))
    assert load(folder.with_name("out"))[1].eos_token_ids == {FIRST}


def test_ends_of_an_answer(qwen):
    assert qwen[1].eos_token_ids == {FIRST, FIRST + 1, FIRST + 2}


# Conversations


def test_keys_are_used_again_within_a_step_and_never_beyond(qwen, tmp_path):
    model, processor = qwen
    chat = Chat(model, processor, max_tokens=5)
    found = []
    for turn in ("Hi", "Yes", ["What is ", PHOTO, "?"], "Why?", [SHAPES, "and ", PHOTO], "So?"):
        last = list(chat.send(turn))[-1].stats
        found.append((prompt_step(last.prompt_tokens, STEP), last.cached_tokens > 0))
    assert found == [(1, False), (1, True), (3, False), (7, False), (7, True), (7, True)]
    chat.save(tmp_path / "talk.json", cache=True)
    again = Chat.load(tmp_path / "talk.json", model, processor)
    assert again.notes == []
    one, other = list(chat.send("Well?")), list(again.send("Well?"))
    assert [chunk.token for chunk in one] == [chunk.token for chunk in other]
    assert one[-1].stats.cached_tokens == other[-1].stats.cached_tokens > 168
    chat.undo()
    assert list(chat.retry())[-1].stats.cached_tokens > 168
    while len(chat.messages) > 4:  # back to a prompt of the first step
        chat.undo()
    assert list(chat.retry())[-1].stats.cached_tokens == 0


# The inspector


def test_attention_goes_through_the_resampler_to_the_patches(qwen):
    model, processor = qwen
    prompt = ["What is ", PHOTO, " and ", SHAPES, "?"]
    found = attend(model, processor, prompt, max_tokens=4, reduce="none")
    inputs = processor(prompt)
    weights: list[mx.array] = []
    length = len(inputs.slots)
    hidden = model.decoder(model.read(inputs.followed_by(found.token_ids[:-1])), attentions=weights)
    logits = model.decoder.logits(hidden)[0, length - 1 :]
    logprobs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    np.testing.assert_allclose(found.logprobs, logprobs[np.arange(4), found.token_ids], atol=1e-5)
    rows = np.stack([np.array(each[0]) for each in weights])[:, :, length - 1 :]  # (layers, heads, T, S)
    slots = np.flatnonzero(inputs.slots)
    for number, (image, shown) in enumerate(zip(found.images, inputs.images, strict=True)):
        own = rows[..., slots[16 * number : 16 * number + 16]]
        pixels = mx.array(shown.pixel_values)
        seen: list[mx.array] = []
        model.projector(model.vision(pixels), seen)
        mixture = np.array(seen[0][0]).mean(axis=0)  # (16, 400)
        np.testing.assert_allclose(image.weights, own @ mixture, atol=1e-6)
        np.testing.assert_allclose(image.weights.sum(-1), own.sum(-1), atol=1e-5)
        assert image.weights.shape == (2, 4, 4, 400)
        boxes = find_boxes(model, processor, shown)
        assert boxes.shape == (400, 4) and np.array_equal(boxes, image.boxes)
        height, width = shown.size
        np.testing.assert_allclose([*boxes[0, :2], *boxes[-1, 2:]], [0, 0, width, height])
        np.testing.assert_allclose(((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sum(), height * width)
    rolled = attend(model, processor, prompt, answer=found.token_ids, reduce="rollout")
    assert [image.weights.shape for image in rolled.images] == [(4, 400)] * 2


# Conversion


def test_quantized_in_all_its_parts(tmp_path):
    """Fused tensors are cut in their packed rows; what torch fused in the resampler stays as it is."""
    report = convert(QWEN, tmp_path / "out", bits=8, group_size=32, part_bits={"projector": 8, "vision": 8})
    tensors = open_checkpoint(tmp_path / "out").tensors
    packed = {name.removesuffix(".scales") for name in tensors if name.endswith(".scales")}
    pool = "transformer.visual.attn_pool."
    assert {"transformer.wte", "lm_head", "transformer.h.1.attn.c_attn", pool + "attn.out_proj"} <= packed
    assert f"{pool}attn.in_proj_weight" in tensors and f"{pool}kv_proj" not in packed  # its width is 24
    assert any(name == f"{pool}kv_proj.weight" for name, _ in report.preview.skipped)
    (whole, processor), (model, _) = load(QWEN), load(tmp_path / "out")
    inputs = processor(["What is ", PHOTO, "?"])
    one, other = (np.array(each(inputs)[0]) for each in (whole, model))
    assert 1e-4 < np.abs(one - other).max() < 0.5
    again = convert(tmp_path / "out", tmp_path / "again", dequantize=True)
    assert again.preview.skipped == () and "lm_head.scales" not in open_checkpoint(tmp_path / "again").tensors


# What is wrong


CONFIG, GENERATION = "config.json", "generation_config.json"
VISUAL = json.loads((QWEN / CONFIG).read_text())["visual"]
WRONG = {
    "no visual": (CONFIG, {"visual": ...}, "without `visual`, which sees nothing"),
    "another width": (CONFIG, {"visual": {**VISUAL, "output_dim": 256}}, "output_dim 256 differs from hidden_size 128"),
    "beyond the vocabulary": (CONFIG, {"visual": {**VISUAL, "image_start_id": 498}}, "beyond the vocabulary 500"),
    "another start": (CONFIG, {"visual": {**VISUAL, "image_start_id": 300}}, "gives <imgpad> the id 302, the tokenizer 497"),
    "queries": (CONFIG, {"visual": {**VISUAL, "n_queries": 15}}, "15 queries do not fill a square"),
    "text for a size": (CONFIG, {"visual": {**VISUAL, "width": "wide"}}, "is malformed|must be a whole number"),
    "an odd MLP": (CONFIG, {"intermediate_size": 49}, "intermediate_size must be even"),
    "half a rotation": (CONFIG, {"rotary_pct": 0.5}, "rotary_pct 1"),
    "heads": (CONFIG, {"kv_channels": 16}, "kv_channels times num_attention_heads"),
    "no length": (CONFIG, {"seq_length": 0}, "seq_length a number of tokens above 1"),
    "layers": (CONFIG, {"num_hidden_layers": 10**7}, "10000000 layers"),
    "another format": (GENERATION, {"chat_format": "alpaca"}, "chat_format must be 'chatml' or 'raw', not 'alpaca'"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_wrong_configs(what, copy_of):
    file, changes, message = WRONG[what]
    folder = copy_of(QWEN.name)
    edit_json(folder / file, **changes)
    with pytest.raises(VLMError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated or broken"),
        (b"IQ== 0\nIg== 1\n", "truncated or broken"),
        (b"IQ==\n", "is broken: a line must be"),
        (b"!!! 0\n", "is broken: a line must be"),
        (b"IQ== x\n", "is broken: a line must be"),
        ("cut", "truncated or broken"),
        ("twice", "truncated or broken"),
    ],
)
def test_broken_ranks(content, message, copy_of):
    folder = copy_of(QWEN.name)
    file = folder / "qwen.tiktoken"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes({"cut": b"".join(lines[10:]), "twice": b"".join([*lines, b"IQ== 281\n"])}.get(content, content))
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_a_folder_without_generation_config_takes_conversations(copy_of):
    folder = copy_of(QWEN.name)
    (folder / GENERATION).unlink()
    _, config = read_config(open_checkpoint(folder))
    assert config.prescribed is not None and "<|im_start|>" in config.prescribed.chat_template


# Places


def places_in(text: str, height: int = 500, width: int = 2000):
    return [(each.label, each.box, each.corners) for each in find_detections(text, height=height, width=width)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<ref>a dog</ref><box>(100,200),(301,999)</box>", [("a dog", (200, 100, 602, 499), ())]),
        ("There is <ref> the  cat\n</ref><box>(0,0),(1000,1000)</box>.", [("the cat", (0, 0, 2000, 500), ())]),
        ("<ref>cups</ref><box>(1,2),(3,4)</box><box>(5,6),(7,8)</box>",
         [("cups", (2, 1, 6, 2), ()), ("cups", (10, 3, 14, 4), ())]),
        ("<ref>cup</ref><box>(1,2),(3,4)</box> and <box>(5,6),(7,8)</box>",
         [("cup", (2, 1, 6, 2), ()), ("", (10, 3, 14, 4), ())]),
        ("<box>(500,500),(100,100)</box>", [("", (1000, 250, 200, 50), ())]),
        ("<ref>sign</ref><quad>(100,100),(300,200),(250,400),(90,350)</quad>",
         [("sign", (180, 50, 600, 200), ((200, 50), (600, 100), (500, 200), (180, 175)))]),
        ("<box>(1,2),(3,1001)</box><box>(1,2)</box><box>1,2,3,4</box><quad>(1,2),(3,4)</quad><box>(1,2),(3,4)", []),
        ("<ref>only a name</ref>", []),
        ("<box> (10, 20) , (30, 40) </box>", [("", (20, 10, 60, 20), ())]),
    ],
)  # fmt: skip
def test_places_that_an_answer_names(text, expected):
    assert places_in(text) == expected


@given(st.text(alphabet="<>/refboxquad(),0123456789 ", max_size=80))
def test_whatever_an_answer_says_is_read(text):
    for each in find_detections(text, height=30, width=40):
        left, top, right, bottom = each.box
        assert 0 <= min(left, right) <= max(left, right) <= 40 and 0 <= min(top, bottom) <= max(top, bottom) <= 30


def test_places_are_drawn():
    white = Image.new("RGB", (200, 100), "white")
    text = "<ref>a</ref><box>(100,200),(400,800)</box><quad>(600,200),(900,400),(800,900),(550,700)</quad>"
    found = find_detections(text, height=100, width=200)
    drawn = np.array(draw_detections(white, found)).astype(int)
    for place, colour in (((50, 20), COLOURS[0]), ((50, 79), COLOURS[0]), ((30, 150), COLOURS[1])):
        near = drawn[place[0] - 2 : place[0] + 3, place[1] - 2 : place[1] + 3].reshape(-1, 3)
        assert (np.abs(near - colour).sum(axis=1) == 0).any(), place
    assert (drawn[50, 50] == 255).all() and (drawn[50, 145] == 255).all()  # inside they are left alone
    assert (drawn[85, 185] == 255).all()  # in the box around the corners, outside of them


def test_an_answers_places_through_the_command(tmp_path, monkeypatch):
    """`generate --draw` with a model that is made to say where a dog is."""
    said = "<ref>dog</ref><box>(100,200),(400,800)</box>"
    _, processor = load(QWEN)
    end = processor.tokenizer.token_to_id("<|im_end|>")
    tokens = iter([*processor.tokenizer.encode(said), end, end])  # one is computed ahead
    monkeypatch.setattr(Options, "make_sampler", lambda self, size: lambda logprobs: mx.array([next(tokens)]))
    arguments = ["generate", QWEN, "-i", PHOTO, "-p", "Where is the dog?", "--draw", tmp_path / "out.png", "--json"]
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    width, height = Image.open(PHOTO).size
    answer = json.loads(done.stdout)
    box = [int(0.1 * width), int(0.2 * height), int(0.4 * width), int(0.8 * height)]
    assert answer["text"] == said and answer["finish_reason"] == "stop"
    assert [(each["label"], each["box"]) for each in answer["detections"]] == [("dog", box)]
    assert Image.open(tmp_path / "out.png").size == (width, height)
