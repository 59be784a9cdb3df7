"""QLLaMA: captions and three kinds of scores equal to our writing of the authors' code, what queries see, conversations,
the inspector's way back to the patches, full-size names and shapes, conversion."""

import json
import shutil
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import PHOTO, SHAPES, edit_json
from click.testing import CliRunner
from published import without_data
from qllama_cases import CAPTION, CONFIG, IMAGES, TEXTS
from reference import GOLDEN

from mlx_vlm_mini import Chat, attend, generate, load, load_scorer
from mlx_vlm_mini.checkpoints.folder import open_checkpoint
from mlx_vlm_mini.checkpoints.load import find_image_settings, plan
from mlx_vlm_mini.checkpoints.weights import hub_name, rename
from mlx_vlm_mini.cli.main import main
from mlx_vlm_mini.convert import convert
from mlx_vlm_mini.errors import CheckpointError, PromptError
from mlx_vlm_mini.families import find_family, internvl, qllama
from mlx_vlm_mini.generation.cache import make_state
from mlx_vlm_mini.generation.decode import prefill
from mlx_vlm_mini.layers import attention
from mlx_vlm_mini.train.trainer import Settings, Trainer

FOLDER = GOLDEN / "qllama"
PICTURES = [GOLDEN / name for name in IMAGES]
QUERIES = CONFIG["num_query_token"]
TOLERANCE = 1e-4
README = GOLDEN.parent.parent / "README.md"
LARGE = {  # OpenGVLab/InternVL-14B-224px, as families.md has it
    "model_type": "internvl", "architectures": ["InternVLModel"], "num_query_token": 96, "cross_attention_frequency": 2,
    "clip_embed_dim": 768, "attn_pool_num_heads": 16, "use_backbone_lora": 0, "use_qllama_lora": 0,
    "vision_config": {
        "hidden_size": 3200, "intermediate_size": 12800, "num_hidden_layers": 48, "num_attention_heads": 25,
        "image_size": 224, "patch_size": 14, "qk_normalization": True, "qkv_bias": False, "layer_norm_eps": 1e-6,
    },
    "qllama_config": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "vocab_size": 49954, "rms_norm_eps": 1e-6,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny():
    return load(FOLDER)


@pytest.fixture(scope="module")
def expected():
    with np.load(FOLDER / "expected.npz") as found:
        yield dict(found)


def run(*arguments):
    result = CliRunner().invoke(main, list(map(str, arguments)))
    return result.exit_code, result.stdout, result.stderr


def log_softmax(logits):
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


# --- config and names


def test_what_tells_it_from_transformers_internvl():
    assert find_family(LARGE) is qllama
    assert find_family({"model_type": "internvl"}) is internvl


def test_the_published_config():
    config = qllama.config(LARGE)
    vision, decoder = config.vision, config.decoder
    assert (vision.hidden_size, vision.depth, vision.num_attention_heads, vision.num_features) == (3200, 48, 25, 257)
    assert (vision.blocks.qk_norm_eps, vision.blocks.norm_type, vision.layer_norm_eps) == (1e-6, "rms_norm", 1e-6)
    assert not vision.drop_first_feature and not vision.post_norm
    assert (decoder.hidden_size, decoder.num_hidden_layers, decoder.vocab_size) == (4096, 32, 49954)
    assert (decoder.norms.rms_norm_eps, decoder.rope_theta, decoder.queries.num_query_tokens) == (1e-6, 10000.0, 96)
    looking = [number for number, kind in enumerate(decoder.layer_types) if kind == "query_attention"]
    assert looking == list(range(0, 32, 2)) and decoder.queries.vision_hidden_size == 3200
    assert (config.contrast.embed_dim, config.contrast.pool_heads) == (768, 16)
    assert qllama.config({"model_type": "internvl", "qllama_config": {}}).decoder.queries.num_query_tokens == 96
    assert qllama.config({**LARGE, "force_image_size": 364}).vision.num_features == 26**2 + 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_qllama_lora": 16}, "use_qllama_lora says that adapters lie beside the weights: merge them first"),
        ({"use_backbone_lora": 16}, "use_backbone_lora"),
        ({"cross_attention_frequency": 0}, "cross_attention_frequency must be 1 or more, not 0"),
        ({"num_query_token": 0}, "num_query_tokens must be a whole number"),
        ({"attn_pool_num_heads": 7}, "3200 numbers are no multiple of attn_pool_num_heads 7"),
        ({"clip_embed_dim": "a"}, "embed_dim must be a whole number"),
    ],
)
def test_configs_that_make_no_sense(changes, message):
    with pytest.raises(CheckpointError, match=message):
        qllama.config({**LARGE, **changes})


def large_shapes():
    """Names and shapes of the published files, written out after the authors' modules."""
    shapes = {
        "query_tokens": (1, 96, 4096), "text_projection": (4096, 768), "logit_scale": (),
        "itm_head.weight": (2, 4096), "itm_head.bias": (2,),
        "vision_model.embeddings.class_embedding": (1, 1, 3200),
        "vision_model.embeddings.position_embedding": (1, 257, 3200),
        "vision_model.embeddings.patch_embedding.weight": (3200, 3, 14, 14),
        "vision_model.embeddings.patch_embedding.bias": (3200,),
        "qllama.model.embed_tokens.weight": (49954, 4096), "qllama.model.norm.weight": (4096,),
        "qllama.lm_head.weight": (49954, 4096),
    }  # fmt: skip
    for pool, size in (("clip_projector", 3200), ("clip_projector2", 4096)):
        for letter in "qkv":
            shapes |= {f"{pool}.norm1_{letter}.{part}": (size,) for part in ("weight", "bias")}
            shapes[f"{pool}.cross_attn.{letter}.weight"] = (size, size)
            shapes[f"{pool}.cross_attn.{letter}_bias"] = (size,)
        shapes |= {f"{pool}.cross_attn.proj.weight": (768, size), f"{pool}.cross_attn.proj.bias": (768,)}
    for number in range(48):
        block = f"vision_model.encoder.layers.{number}."
        shapes |= {block + name: (3200,) for name in (
            "attn.q_norm.weight", "attn.k_norm.weight", "attn.proj.bias", "norm1.weight", "norm2.weight", "ls1", "ls2",
            "mlp.fc2.bias")}  # fmt: skip
        shapes |= {block + "attn.qkv.weight": (9600, 3200), block + "attn.proj.weight": (3200, 3200)}
        shapes |= {block + "mlp.fc1.weight": (12800, 3200), block + "mlp.fc1.bias": (12800,)}
        shapes[block + "mlp.fc2.weight"] = (3200, 12800)
    for number in range(32):
        layer = f"qllama.model.layers.{number}."
        shapes |= {f"{layer}self_attn.{each}_proj.weight": (4096, 4096) for each in "qkvo"}
        shapes |= {f"{layer}mlp.{each}_proj.weight": (11008, 4096) for each in ("gate", "up")}
        shapes[layer + "mlp.down_proj.weight"] = (4096, 11008)
        shapes |= {f"{layer}{name}.weight": (4096,) for name in ("input_layernorm", "post_attention_layernorm")}
        if number % 2 == 0:
            shapes |= {f"{layer}cross_attn.{each}_proj.weight": (4096, 4096) for each in "qo"}
            shapes |= {f"{layer}cross_attn.{each}_proj.weight": (4096, 3200) for each in "kv"}
            shapes |= {layer + "cross_attn.norm1.weight": (4096,), layer + "cross_attn.norm2.weight": (3200,)}
    return shapes


def test_every_tensor_of_the_published_size_has_its_place():
    shapes = large_shapes()
    planned = plan(without_data(LARGE, shapes))
    assert set(planned.ours.values()) == set(shapes) and planned.unused == ()
    count = sum(int(np.prod(shape)) for shape in shapes.values())
    assert 13.5e9 < count < 14.5e9  # as its name says
    counts = {"vision_model": 0, "qllama": 0, "": 0}
    for name, shape in shapes.items():
        part = name.partition(".")[0]
        counts[part if part in counts else ""] += int(np.prod(shape))
    stated = " | ".join(f"{each / 1e9:.2f}" for each in (counts["vision_model"], counts["qllama"], count))
    assert f"| InternVL-14B-224px | {stated} | {2 * count / 1e9:.1f} GB |" in README.read_text()
    for ours, theirs in planned.ours.items():
        if not theirs.endswith("qkv.weight"):
            assert rename(theirs, qllama.WEIGHTS) == (ours,) and hub_name(ours, qllama.WEIGHTS) == theirs
    with pytest.raises(CheckpointError, match=r"lacks 1 tensor \(itm_head.bias\)"):
        plan(without_data(LARGE, {name: shape for name, shape in shapes.items() if name != "itm_head.bias"}))


def test_info():
    code, out, _ = run("info", FOLDER, "--check", "--json")
    said = json.loads(out)
    assert code == 0 and (said["family"], said["vision"]["image_tokens"]) == ("qllama", QUERIES)
    assert said["check"].startswith("every tensor") and said["unused"] == 0 and said["projector"]["weights"] > 0


# --- captions


def test_a_caption_equals_the_reference(tiny, expected):
    model, processor = tiny
    inputs = processor(CAPTION, [SHAPES])
    np.testing.assert_array_equal(np.array(inputs.input_ids[0]), expected["caption/prompt_ids"])
    np.testing.assert_allclose(np.array(inputs.pixel_values), expected["caption/pixel_values"], atol=1e-5)
    for step in (1, 512):
        cache = model.make_state()
        logits = prefill(model.decoder, model.read(inputs), cache, step=step)
        for token, logprobs in zip(expected["caption/token_ids"].tolist(), expected["caption/logprobs"], strict=True):
            np.testing.assert_allclose(log_softmax(logits)[0], logprobs, atol=TOLERANCE)
            logits = model.decoder.logits(model.decoder(model.decoder.read(mx.array([[token]])), cache))[:, -1]
    code, out, _ = run("generate", FOLDER, "-i", SHAPES, "-p", CAPTION, "--max-tokens", 10, "--json")
    assert code == 0 and json.loads(out)["token_ids"] == expected["caption/token_ids"].tolist()


def test_what_queries_become_does_not_depend_on_the_text_and_text_sees_them(tiny):
    model, processor = tiny
    rows = []
    for text, picture in ((CAPTION, PHOTO), ("What is it?", PHOTO), (CAPTION, SHAPES)):
        inputs = processor(text, [picture])
        hidden = model.decoder(model.read(inputs))
        rows.append(np.array(hidden[0]))
        alone = np.array(model.query(model.encode(inputs.images[0]))[0])
        np.testing.assert_allclose(rows[-1][:QUERIES], alone, atol=1e-5)
    np.testing.assert_allclose(rows[0][:QUERIES], rows[1][:QUERIES], atol=1e-5)
    assert np.abs(rows[0][:QUERIES] - rows[2][:QUERIES]).max() > 0.1
    assert np.abs(rows[0][-1] - rows[2][-1]).max() > 0.01


def test_decoding_does_not_look_again(tiny, monkeypatch):
    model, processor = tiny
    calls = []
    kind = type(model.decoder.layers[0].cross_attn)
    called = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda self, *a, **k: (calls.append(a[0].shape[1]), called(self, *a, **k))[1])
    generate(model, processor, CAPTION, images=[PHOTO], max_tokens=5)
    assert len(calls) == 2 and min(calls) >= QUERIES  # the layers 0 and 2, in the prompt alone


@pytest.mark.parametrize("images", [0, 2])
def test_exactly_one_image(tiny, images):
    _, processor = tiny
    with pytest.raises(PromptError, match=f"answers about exactly one image, here are {images}: "):
        processor(CAPTION, [PHOTO, SHAPES][:images])
    code, _, err = run(
        "generate", FOLDER, "-p", CAPTION, *(each for p in [PHOTO, SHAPES][:images] for each in ("-i", p))
    )
    assert code == 1 and err.startswith("Error: ") and err.count("\n") == 1


def test_a_system_message_is_refused_and_the_last_text_counts(tiny):
    _, processor = tiny
    with pytest.raises(PromptError, match="QLLaMA takes one image with a text and no system message"):
        processor([{"role": "system", "content": "Be brief."}, {"role": "user", "content": [
            {"type": "image", "image": str(PHOTO)}, {"type": "text", "text": CAPTION}]}])  # fmt: skip
    talk = [
        {"role": "user", "content": [{"type": "text", "text": "Hm. "}, {"type": "image", "image": str(PHOTO)}]},
        {"role": "assistant", "content": "a house"},
        {"role": "user", "content": CAPTION},
    ]
    assert processor(talk).input_ids.tolist() == processor(CAPTION, [PHOTO]).input_ids.tolist()


@pytest.mark.parametrize("legacy", [True, False, None])
def test_the_text_is_a_text_of_its_own(copy_of, legacy, expected):
    """Whatever puts spaces in front of texts, and whether or not the settings add `</s>`."""
    folder = copy_of("qllama")
    edit_json(folder / "tokenizer_config.json", legacy=... if legacy is None else legacy, add_eos_token=legacy is None)
    _, processor = load(folder)
    assert processor(CAPTION, [PHOTO]).input_ids[0].tolist() == expected["caption/prompt_ids"].tolist()


def test_image_settings_of_the_folder_count_and_else_the_authors(copy_of):
    folder = copy_of("qllama")
    config = qllama.config(open_checkpoint(folder).config)
    own = find_image_settings(folder, qllama, config)
    assert own.size == {"shortest_edge": 28} and own.crop_size == (28, 28)
    (folder / "preprocessor_config.json").unlink()
    other = find_image_settings(folder, qllama, config)
    assert other.size == {"height": 28, "width": 28} and other.crop_size is None
    assert own.image_mean == other.image_mean == (0.485, 0.456, 0.406) and own.image_std == other.image_std


# --- conversations


def test_conversations_reuse_the_cache_exactly(tiny):
    model, processor = tiny
    chat = Chat(model, processor, max_tokens=6)
    messages = []
    for number, parts in enumerate(([PHOTO, CAPTION], ["What is in this image?"], ["What is it?"])):
        said = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
        messages.append({"role": "user", "content": said})
        chunks = list(chat.send(parts))
        text = "".join(chunk.text for chunk in chunks)
        assert text == generate(model, processor, messages, max_tokens=6)
        messages.append({"role": "assistant", "content": text})
        assert chunks[-1].stats.cached_tokens == (0 if not number else pytest.approx(QUERIES + 1, abs=3))
        assert not number or chunks[-1].stats.cached_tokens > QUERIES
        assert chunks[-1].stats.encoded_images == (0 if number else 1)
    with pytest.raises(PromptError, match="here are 2: give each a conversation of its own"):
        list(chat.send([SHAPES, CAPTION]))
    chat.clear()
    other = "".join(chunk.text for chunk in chat.send([SHAPES, CAPTION]))
    assert other == generate(model, processor, CAPTION, images=[SHAPES], max_tokens=6)


def test_a_conversation_is_saved_with_its_cache(tiny, tmp_path):
    model, processor = tiny
    chat = Chat(model, processor, max_tokens=6)
    list(chat.send([PHOTO, CAPTION]))
    chat.save(tmp_path / "talk.json", cache=True)
    again = Chat.load(tmp_path / "talk.json", model, processor)
    chunks = list(again.send("What is it?"))
    assert chunks[-1].stats.cached_tokens > QUERIES and not again.notes
    assert [c.token for c in chunks] == [c.token for c in chat.send("What is it?")]


def test_what_is_refused(tiny):
    model, processor = tiny
    with pytest.raises(PromptError, match="reads a prompt both ways, which no rotating cache fits"):
        make_state(model, rotate=40)
    with pytest.raises(CheckpointError, match="cannot be trained yet"):
        Trainer(model, processor, [], FOLDER, Settings())


# --- scores


@pytest.mark.parametrize("mode", ["c", "g", "match"])
def test_scores_equal_the_reference(mode, expected):
    logits = expected[f"scores/{mode}"]
    logits = logits[..., 1] - logits[..., 0] if mode == "match" else logits
    scorer = load_scorer(FOLDER, mode=mode)
    np.testing.assert_allclose(scorer.logits(PICTURES, TEXTS), logits, atol=TOLERANCE)
    odds = 1 / (1 + np.exp(-logits)) if mode == "match" else np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(scorer.probabilities(PICTURES, TEXTS), odds, atol=1e-5)
    texts = [each for text in TEXTS for each in ("-p", text)]
    code, out, _ = run("score", FOLDER, "-i", PICTURES[0], *texts, "--mode", mode, "--json")
    np.testing.assert_allclose(json.loads(out)["scores"][0]["logits"], logits[0], atol=TOLERANCE)
    assert code == 0


def test_without_a_mode_scores_are_those_of_the_image_features_alone(expected):
    np.testing.assert_allclose(load_scorer(FOLDER).logits(PICTURES, TEXTS), expected["scores/c"], atol=TOLERANCE)


def test_what_scores_refuse():
    with pytest.raises(CheckpointError, match="the mode must be one of c, g, match, not 'x'"):
        load_scorer(FOLDER, mode="x")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="compares in one way only: leave the mode out"):
        load_scorer(GOLDEN / "clip", mode="g")
    with pytest.raises(PromptError, match="there must be an image and a text"):
        load_scorer(FOLDER).logits([PHOTO], [])
    code, _, err = run("score", GOLDEN / "vilt", "-i", PHOTO, "-p", "Is it?", "--mode", "g")
    assert code == 2 and "--mode is of InternVL-14B" in err


# --- the inspector


def test_queries_are_followed_back_to_patches(tiny, expected):
    """[tokens, queries] x [queries, patches]: the first by hand from the decoder's weights, the second the reference's."""
    model, processor = tiny
    inputs = processor(CAPTION, [PHOTO])
    mixing = model.mixing(inputs.images[0])
    np.testing.assert_allclose(mixing, expected["mixing"], atol=1e-6)
    np.testing.assert_allclose(mixing.sum(axis=-1), 1, atol=1e-5)
    tokens = [300, 301, 302]
    found = attend(model, processor, CAPTION, images=[PHOTO], answer=tokens)
    weights: list[mx.array] = []
    hidden = model.decoder(model.read(inputs.followed_by(tokens[:-1])), attentions=weights)
    first = len(inputs.slots) - 1
    onto = np.stack([np.array(each[0, :, first:, :QUERIES]) for each in weights]).mean(axis=(0, 1))
    (image,) = found.images
    np.testing.assert_allclose(image.weights, onto @ expected["mixing"], atol=1e-6)
    np.testing.assert_allclose(found.shares, onto.sum(axis=-1), atol=1e-6)
    logprobs = log_softmax(model.decoder.logits(hidden[0, first:]))
    np.testing.assert_allclose(found.logprobs, logprobs[range(3), tokens], atol=1e-5)
    assert len(image.boxes) == 17 and np.isnan(image.boxes[0]).all()  # the class token is nowhere
    whole = attend(model, processor, CAPTION, images=[PHOTO], answer=tokens, reduce="none")
    assert whole.images[0].weights.shape == (3, 4, 3, 17)
    np.testing.assert_allclose(whole.mean().images[0].weights, image.weights, atol=1e-6)
    flow = np.eye(len(inputs.slots) + 2)
    for each in weights:
        flow = (0.5 * np.array(each[0].mean(axis=0)) + 0.5 * np.eye(len(flow))) @ flow
    rolled = attend(model, processor, CAPTION, images=[PHOTO], answer=tokens, reduce="rollout")
    np.testing.assert_allclose(rolled.images[0].weights, flow[first:, :QUERIES] @ mixing, atol=1e-6)
    np.testing.assert_allclose(rolled.logprobs, found.logprobs, atol=1e-5)


def test_weights_that_come_in_blocks_are_the_same(tiny, expected, monkeypatch):
    model, processor = tiny
    monkeypatch.setattr(attention, "BLOCK", 4 * 17 * 2)  # two of six queries at a time
    mixing = model.mixing(processor(CAPTION, [PHOTO]).images[0])
    np.testing.assert_allclose(mixing, expected["mixing"], atol=1e-6)


def test_its_own_answer_and_the_command(tiny, tmp_path):
    model, processor = tiny
    found = attend(model, processor, CAPTION, images=[PHOTO], max_tokens=4)
    assert "".join(found.texts) == generate(model, processor, CAPTION, images=[PHOTO], max_tokens=4)
    code, _, _ = run("attend", FOLDER, "-i", PHOTO, "-p", CAPTION, "--max-tokens", 3, "-o", tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as arrays:
        assert code == 0 and arrays["weights_0"].shape == (3, 17)


def test_a_given_answer_follows_as_its_own_words_do(tiny):
    model, processor = tiny
    found = attend(model, processor, CAPTION, images=[PHOTO], answer="a red circle")
    ids = processor.tokenizer.encode("a red circle", add_special_tokens=False)
    assert found.token_ids == tuple(ids)  # a space in front, as captions were trained


# --- conversion


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Two pictures to calibrate with; conversations about several do not fit this family."""
    folder = tmp_path_factory.mktemp("few")
    for picture in (PHOTO, SHAPES):
        shutil.copy(picture, folder)
    return str(folder)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bits": 8, "group_size": 32, "part_bits": {"vision": 8, "projector": 8}},
        {"bits": 4, "group_size": 32, "method": "gptq", "part_bits": {"vision": 4, "projector": 4}},
        {"recipe": "auto", "bits_per_weight": 12.0, "group_size": 32},
        {"mode": "mxfp4"},
    ],
    ids=str,
)
def test_conversion(options, tmp_path, few, tiny):
    measured = {"calibration": few} if {"method", "recipe"} & options.keys() else {}
    report = convert(FOLDER, tmp_path / "out", check=True, **options, **measured)
    assert report.check is not None
    (whole, processor), (model, _) = tiny, load(tmp_path / "out")
    prompt = processor(CAPTION, [PHOTO])
    apart = np.abs(np.array(whole(prompt)) - np.array(model(prompt))).max()
    stored = plan(open_checkpoint(tmp_path / "out")).model
    quantized = {path for path, module in stored.named_modules() if hasattr(module, "bits")}
    scores = [load_scorer(folder, mode="g").logits(PICTURES, TEXTS) for folder in (FOLDER, tmp_path / "out")]
    if not options:
        assert apart == 0 and not quantized
        np.testing.assert_array_equal(*scores)
    elif options.get("bits") == 8:
        assert {"decoder.layers.2.cross_attn.k_proj", "contrast.image_pool.q_proj", "decoder.lm_head"} <= quantized
        assert 0 < apart < 0.3 and report.check.problems == () and np.abs(scores[0] - scores[1]).max() < 0.3
    else:
        assert 0 < apart < 10 and quantized


def test_text_alone_is_read_as_a_plain_llama_reads_it(tiny):
    """As scores read it: the layers that look at images have none."""
    model, _ = tiny
    text = model.decoder.read(mx.array([[1, 300, 301]]))
    decoder = type(model.decoder)(replace(model.config.decoder, queries=None, layer_types=("full_attention",) * 3))
    decoder.update(model.decoder.parameters(), strict=False)
    np.testing.assert_allclose(np.array(model.decoder(text)), np.array(decoder(text)), atol=1e-6)
