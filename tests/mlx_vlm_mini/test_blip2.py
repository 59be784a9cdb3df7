"""BLIP-2 and InstructBLIP: one image, the question in the Q-Former, OPT's positions, the inspector's way back to the
patches, conversations, conversion, bad input."""

import json
import shutil

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from blip_cases import SPECS
from checkpoints import PHOTO, SHAPES, edit_json, make_wide, with_paths
from click.testing import CliRunner
from published import without_data
from reference import CASES, GOLDEN

from mlx_vlm_mini import Chat, attend, generate, load
from mlx_vlm_mini.checkpoints.folder import open_checkpoint
from mlx_vlm_mini.checkpoints.hub import INSTRUCTIONS
from mlx_vlm_mini.checkpoints.load import find_image_settings, plan
from mlx_vlm_mini.cli.main import main
from mlx_vlm_mini.convert import compensate as compensation
from mlx_vlm_mini.convert import convert
from mlx_vlm_mini.convert.calibrate import make_sample
from mlx_vlm_mini.convert.quantize import Quantization
from mlx_vlm_mini.data.questions import user
from mlx_vlm_mini.decoder.reading import Reading
from mlx_vlm_mini.errors import CheckpointError, PromptError
from mlx_vlm_mini.families import blip2
from mlx_vlm_mini.generation.decode import prefill
from mlx_vlm_mini.preprocessing.settings import image_settings
from mlx_vlm_mini.train.trainer import Settings, Trainer

OPT, VICUNA = "blip2-opt", "instructblip-vicuna"
QUESTION = "What is in this image?"
BOTH = pytest.mark.parametrize("name", sorted(SPECS))


@pytest.fixture(scope="module")
def opt():
    return load(GOLDEN / OPT)


@pytest.fixture(scope="module")
def vicuna():
    return load(GOLDEN / VICUNA)


def run(*arguments):
    result = CliRunner().invoke(main, list(map(str, arguments)))
    return result.exit_code, result.stdout, result.stderr


# --- config


@pytest.mark.parametrize("model_type", ["blip-2", "instructblip"])
def test_an_empty_config_has_the_class_defaults(model_type):
    config = blip2.config({"model_type": model_type})
    vision, qformer, text = config.vision, config.projector.qformer, config.decoder
    assert (vision.hidden_size, vision.depth, vision.num_attention_heads, vision.num_features) == (1408, 39, 16, 257)
    assert (vision.layer_norm_eps, vision.hidden_act, vision.intermediate_size) == (1e-6, "gelu", 6144)
    assert vision.post_norm and not vision.pre_norm and not vision.drop_first_feature and vision.patch_bias
    assert (qformer.num_query_tokens, qformer.hidden_size, qformer.num_hidden_layers) == (32, 768, 12)
    assert (qformer.layer_norm_eps, qformer.cross_attention_frequency, qformer.intermediate_size) == (1e-12, 2, 3072)
    assert (qformer.instruction is not None) == (model_type == "instructblip")
    assert (text.norms.norm_type, text.mlp_type, text.embeddings.learned_positions) == ("layer_norm", "plain", 2)
    assert text.hidden_act == "relu" and text.norms.rms_norm_eps == 1e-5
    assert text.tie_word_embeddings and config.image_token_id is None and config.takes_one_image
    settings = find_image_settings(GOLDEN / "nowhere", blip2, config)
    assert settings.size == {"height": 224, "width": 224} and settings.image_mean[0] == 0.48145466
    assert image_settings({"image_processor_type": "BlipImageProcessor"}, "").size == {"height": 384, "width": 384}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_config": {"model_type": "t5"}}, r"decoder 't5' is not supported \(known: llama, opt\)"),
        ({"text_config": {"do_layer_norm_before": False}}, "OPT with do_layer_norm_before False is not supported"),
        ({"text_config": {"word_embed_proj_dim": 512, "hidden_size": 1024}}, "OPT with word_embed_proj_dim 512 is not"),
        ({"text_config": {"num_hidden_layers": 10**6}}, "a decoder of 1000000 layers is not supported"),
        ({"qformer_config": {"num_hidden_layers": 10**6}}, "a Q-Former of 1000000 layers is not supported"),
        ({"qformer_config": {"cross_attention_frequency": 0}}, "cross_attention_frequency must be a whole number"),
        ({"qformer_config": {"num_attention_heads": 7}}, "hidden_size 768 is not a multiple of num_attention_heads 7"),
        ({"num_query_tokens": 0}, "num_query_tokens must be a whole number"),
        ({"qformer_config": {"hidden_act": "selu"}}, "activation 'selu' is not supported"),
    ],
)
def test_configs_that_are_not_supported(changes, message):
    with pytest.raises(CheckpointError, match=message):
        blip2.config({"model_type": "instructblip", **changes})


def test_t5_is_one_clear_line(copy_of):
    folder = copy_of(OPT)
    edit_json(folder / "config.json", text_config={"model_type": "t5"})
    for command in (("info", folder), ("generate", folder, "-p", "x", "-i", PHOTO)):
        code, _, err = run(*command)
        assert code == 1 and err == "Error: config.json: decoder 't5' is not supported (known: llama, opt)\n"


@BOTH
def test_info(name):
    code, out, _ = run("info", GOLDEN / name, "--check", "--json")
    said = json.loads(out)
    queries = SPECS[name].extra["num_query_tokens"]
    assert code == 0 and said["family"] == {OPT: "blip2", VICUNA: "instructblip"}[name]
    assert said["vision"]["image_tokens"] == queries and said["unused"] == 0 and said["projector"]["weights"] > 0


def full_shapes(instructed):
    """Names and shapes of BLIP-2 with OPT 2.7B and InstructBLIP with Vicuna 7B, written out after the reference."""
    shapes = {
        "query_tokens": (1, 32, 768), "vision_model.embeddings.class_embedding": (1, 1, 1408),
        "vision_model.embeddings.position_embedding": (1, 257, 1408),
        "vision_model.embeddings.patch_embedding.weight": (1408, 3, 14, 14),
        "vision_model.embeddings.patch_embedding.bias": (1408,),
    }  # fmt: skip

    def linear(name, rows, columns, bias=True):
        shapes[name + ".weight"] = (rows, columns)
        shapes.update({name + ".bias": (rows,)} if bias else {})

    def norm(name, size):
        shapes.update({f"{name}.weight": (size,), f"{name}.bias": (size,)})

    norm("vision_model.post_layernorm", 1408)
    for number in range(39):
        block = f"vision_model.encoder.layers.{number}."
        norm(block + "layer_norm1", 1408), norm(block + "layer_norm2", 1408)
        linear(block + "self_attn.qkv", 3 * 1408, 1408), linear(block + "self_attn.projection", 1408, 1408)
        linear(block + "mlp.fc1", 6144, 1408), linear(block + "mlp.fc2", 1408, 6144)
    for number in range(12):
        layer = f"qformer.encoder.layer.{number}."
        for part, seen in (("attention", 768), ("crossattention", 1408))[: 1 if number % 2 else 2]:
            linear(f"{layer}{part}.attention.query", 768, 768), linear(f"{layer}{part}.output.dense", 768, 768)
            linear(f"{layer}{part}.attention.key", 768, seen), linear(f"{layer}{part}.attention.value", 768, seen)
            norm(f"{layer}{part}.output.LayerNorm", 768)
        for suffix in ("_query", "")[: 2 if instructed else 1]:
            linear(f"{layer}intermediate{suffix}.dense", 3072, 768), linear(f"{layer}output{suffix}.dense", 768, 3072)
            norm(f"{layer}output{suffix}.LayerNorm", 768)
    linear("language_projection", 4096 if instructed else 2560, 768)
    if instructed:
        norm("qformer.embeddings.layernorm", 768)
        shapes["qformer.embeddings.word_embeddings.weight"] = (30523, 768)
        shapes["qformer.embeddings.position_embeddings.weight"] = (512, 768)
        shapes["qformer.embeddings.position_ids"] = (1, 512)
        model = "language_model.model."
        shapes |= {model + "embed_tokens.weight": (32001, 4096), model + "norm.weight": (4096,)}
        shapes["language_model.lm_head.weight"] = (32001, 4096)
        for number in range(32):
            layer = f"{model}layers.{number}."
            for each in "qkvo":
                linear(f"{layer}self_attn.{each}_proj", 4096, 4096, bias=False)
            (
                linear(layer + "mlp.gate_proj", 11008, 4096, bias=False),
                linear(layer + "mlp.up_proj", 11008, 4096, bias=False),
            )
            linear(layer + "mlp.down_proj", 4096, 11008, bias=False)
            shapes |= {f"{layer}{name}.weight": (4096,) for name in ("input_layernorm", "post_attention_layernorm")}
        return shapes
    norm("qformer.layernorm", 768)
    model = "language_model.model.decoder."
    shapes |= {model + "embed_tokens.weight": (50304, 2560), model + "embed_positions.weight": (2050, 2560)}
    norm(model + "final_layer_norm", 2560)
    for number in range(32):
        layer = f"{model}layers.{number}."
        for each in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(f"{layer}self_attn.{each}", 2560, 2560)
        linear(layer + "fc1", 10240, 2560), linear(layer + "fc2", 2560, 10240)
        norm(layer + "self_attn_layer_norm", 2560), norm(layer + "final_layer_norm", 2560)
    return shapes


LARGE = {
    "blip-2": {"text_config": {
        "model_type": "opt", "hidden_size": 2560, "ffn_dim": 10240, "num_hidden_layers": 32, "num_attention_heads": 32,
        "vocab_size": 50304, "word_embed_proj_dim": 2560}},
    "instructblip": {
        "text_config": {"model_type": "llama", "vocab_size": 32001}, "qformer_config": {"vocab_size": 30523}},
}  # fmt: skip


@pytest.mark.parametrize(("kind", "billions"), [("blip-2", 3.74), ("instructblip", 7.91)])
def test_every_tensor_of_the_published_sizes_has_its_place(kind, billions):
    config, shapes = {"model_type": kind, **LARGE[kind]}, full_shapes(kind == "instructblip")
    planned = plan(without_data(config, shapes))
    unused = {"qformer.embeddings.position_ids"} & shapes.keys()
    assert set(planned.ours.values()) == shapes.keys() - unused and set(planned.unused) == unused
    assert sum(int(np.prod(shape)) for shape in shapes.values()) / 1e9 == pytest.approx(billions, abs=0.01)
    with pytest.raises(CheckpointError, match="lacks 1 tensor "):
        plan(
            without_data(config, {name: shape for name, shape in shapes.items() if name != "language_projection.bias"})
        )


# --- prompts


@BOTH
@pytest.mark.parametrize("images", [0, 2])
def test_exactly_one_image(name, images):
    _, processor = load(GOLDEN / name)
    with pytest.raises(PromptError, match=f"answers about exactly one image, here are {images}: "):
        processor(QUESTION, [PHOTO, SHAPES][:images])


@BOTH
def test_a_system_message_is_refused_and_the_last_text_counts(name):
    _, processor = load(GOLDEN / name)
    with pytest.raises(PromptError, match="takes one image with a text and no system message"):
        processor([{"role": "system", "content": "Be brief."}, *with_paths(CASES["image"])])
    talk = [
        {"role": "user", "content": [{"type": "text", "text": "Hm. "}, {"type": "image", "image": str(PHOTO)}]},
        {"role": "assistant", "content": "a house"},
        {"role": "user", "content": QUESTION},
    ]
    one, other = processor(talk), processor(QUESTION, [PHOTO])
    assert one.input_ids.tolist() == other.input_ids.tolist() and one.images[0].digest == other.images[0].digest


def test_without_an_image_token_any_id_stands_at_the_slots(copy_of, opt):
    """As in older folders, whose config.json names none; what the slots hold is the same."""
    folder = copy_of(OPT)
    edit_json(folder / "config.json", image_token_index=...)
    model, processor = load(folder)
    inputs, usual = processor(QUESTION, [PHOTO]), opt[1](QUESTION, [PHOTO])
    assert inputs.input_ids[0, :6].tolist() == [0] * 6 and inputs.slots.tolist() == usual.slots.tolist()
    np.testing.assert_array_equal(np.array(model(inputs)), np.array(opt[0](usual)))


def test_a_picture_without_a_question_is_captioned(opt):
    inputs = opt[1]([PHOTO])
    assert inputs.input_ids[0].tolist() == [360] * 6 + [2]  # `</s>` begins a text


# --- the Q-Former


def test_the_question_changes_what_the_queries_become(vicuna):
    model, processor = vicuna
    one, other = (processor(text, [PHOTO]).images[0] for text in (QUESTION, "Why?"))
    assert one.digest != other.digest and (one.pixel_values == other.pixel_values).all()
    words = [processor.instruction_tokenizer.id_to_token(token) for token in one.instruction.tolist()]
    assert "".join(words).replace("##", "") == "[CLS]whatisinthisimage?[SEP]"
    assert np.abs(np.array(model.encode(one)) - np.array(model.encode(other))).max() > 0.01


def test_the_question_does_not_change_them_in_blip2(opt):
    model, processor = opt
    one, other = (processor(text, [PHOTO]).images[0] for text in (QUESTION, "Why?"))
    assert one.digest == other.digest and one.instruction is None
    (again,) = processor(QUESTION, [SHAPES]).images
    assert np.abs(np.array(model.encode(one)) - np.array(model.encode(again))).max() > 0.01


def test_a_question_longer_than_the_qformer_reads(vicuna):
    model, processor = vicuna
    with pytest.raises(PromptError, match="the question has 62 tokens, the Q-Former reads at most 60: shorten it"):
        model(processor("square " * 60, [PHOTO]))
    model(processor("square " * 58, [PHOTO]))


def test_a_folder_without_the_second_tokenizer(copy_of):
    folder = copy_of(VICUNA)
    shutil.rmtree(folder / INSTRUCTIONS)
    with pytest.raises(CheckpointError, match=f"{INSTRUCTIONS} has no tokenizer.json"):
        load(folder)


def test_the_second_tokenizer_from_its_words_alone(copy_of, vicuna):
    """vocab.txt, as slow tokenizers are saved."""
    folder = copy_of(VICUNA)
    file = folder / INSTRUCTIONS / "tokenizer.json"
    words = json.loads(file.read_text())["model"]["vocab"]
    file.unlink()
    text = "\n".join(sorted(words, key=words.__getitem__)) + "\n"
    (folder / INSTRUCTIONS / "vocab.txt").write_text(text)
    for question in (QUESTION, "  Ünlike THE first,  the second!?", "a\tb", "photo " * 5):
        one, other = (each(question, [PHOTO]).images[0] for each in (load(folder)[1], vicuna[1]))
        assert one.instruction.tolist() == other.instruction.tolist()
    (folder / INSTRUCTIONS / "vocab.txt").write_text(text.replace("[SEP]", "[SEQ]"))
    with pytest.raises(CheckpointError, match=r"vocab.txt lacks \[SEP\]"):
        load(folder)


# --- OPT


def test_its_tokenizer_from_vocabulary_and_merges(copy_of, opt):
    """GPT-2's words, which are not Qwen2's: numbers stay whole."""
    folder = copy_of(OPT)
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(content["model"]["vocab"], ensure_ascii=False))
    merges = "".join(" ".join(pair) + "\n" for pair in content["model"]["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    added = {str(token.pop("id")): token for token in content["added_tokens"]}
    edit_json(folder / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer", added_tokens_decoder=added)
    for question in (QUESTION, "Question: how many? Answer:", "It's 1234\n\n  ok", "naïve \u0065\u0301"):
        one, other = (each(question, [PHOTO]) for each in (load(folder)[1], opt[1]))
        assert one.input_ids.tolist() == other.input_ids.tolist()


def test_positions_end(opt):
    """200 positions; a call that would need one more says so, in prompts and in answers."""
    model, processor = opt
    with pytest.raises(PromptError, match="this model has positions for 200 tokens, prompt and answer are more"):
        generate(model, processor, "square blue " * 200, images=[PHOTO], max_tokens=1)
    inputs = processor(QUESTION, [PHOTO])
    room = 200 - len(inputs.slots)
    assert len(generate(model, processor, QUESTION, images=[PHOTO], max_tokens=room + 1)) > 0
    with pytest.raises(PromptError, match="positions for 200 tokens"):
        generate(model, processor, QUESTION, images=[PHOTO], max_tokens=room + 2)


def test_positions_count_from_the_cache(opt):
    """A prompt in pieces of any length equals one read at once."""
    model, processor = opt
    reading = model.read(processor(QUESTION, [PHOTO]))
    whole = np.array(prefill(model.decoder, reading, model.make_state()))
    for step in (1, 3, 7):
        np.testing.assert_allclose(
            np.array(prefill(model.decoder, reading, model.make_state(), step=step)), whole, atol=1e-4
        )
    shifted = Reading(mx.concatenate([reading.embeddings[:, 1:], reading.embeddings[:, :1]], axis=1))
    assert np.abs(np.array(prefill(model.decoder, shifted, model.make_state())) - whole).max() > 0.01


def test_a_head_of_its_own_counts(copy_of, opt):
    folder = copy_of(OPT)
    tensors = dict(mx.load(str(folder / "model.safetensors")))
    tensors["language_model.lm_head.weight"] = -tensors["language_model.model.decoder.embed_tokens.weight"]
    mx.save_safetensors(str(folder / "new.safetensors"), tensors, {"format": "pt"})
    (folder / "new.safetensors").replace(folder / "model.safetensors")
    model, processor = load(folder)
    inputs = processor(QUESTION, [PHOTO])
    np.testing.assert_allclose(np.array(model(inputs)), -np.array(opt[0](inputs)), atol=1e-5)


# --- conversations


@BOTH
def test_conversations_equal_fresh_runs(name):
    """BLIP-2 keeps the queries and what they became; InstructBLIP's depend on the question, so a new one begins anew."""
    model, processor = load(GOLDEN / name)
    queries, chat, messages = SPECS[name].extra["num_query_tokens"], Chat(model, processor, max_tokens=5), []
    for number, parts in enumerate(([PHOTO, QUESTION], ["Which one?"], ["Which one?"])):
        said = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
        messages.append({"role": "user", "content": said})
        chunks = list(chat.send(parts))
        text = "".join(chunk.text for chunk in chunks)
        assert text == generate(model, processor, messages, max_tokens=5)
        messages.append({"role": "assistant", "content": text})
        stats = chunks[-1].stats
        reused = {OPT: (0, 1, 2), VICUNA: (0, 0, 2)}[name][number]  # nothing, the image, all but the last token
        assert (stats.cached_tokens > queries) == (reused > 0)
        assert reused != 2 or stats.cached_tokens == stats.prompt_tokens - 1
        assert stats.encoded_images == int(not reused)
    with pytest.raises(PromptError, match="here are 2: give each a conversation of its own"):
        list(chat.send([SHAPES, QUESTION]))


@BOTH
def test_a_conversation_is_saved_with_its_cache(name, tmp_path):
    model, processor = load(GOLDEN / name)
    chat = Chat(model, processor, max_tokens=5)
    list(chat.send([PHOTO, QUESTION]))
    chat.save(tmp_path / "talk.json", cache=True)
    again = Chat.load(tmp_path / "talk.json", model, processor)
    chunks = list(again.send(QUESTION))
    assert chunks[-1].stats.cached_tokens == chunks[-1].stats.prompt_tokens - 1 and not again.notes


@BOTH
def test_training_is_refused(name):
    model, processor = load(GOLDEN / name)
    with pytest.raises(CheckpointError, match="cannot be trained yet"):
        Trainer(model, processor, [], GOLDEN, Settings())


# --- the inspector


@BOTH
def test_queries_are_followed_back_to_patches(name):
    """[tokens, queries] by hand from the decoder's weights, times [queries, patches], the reference's."""
    model, processor = load(GOLDEN / name)
    queries, patches = SPECS[name].extra["num_query_tokens"], 17
    with np.load(GOLDEN / name / "expected.npz") as stored:
        expected = stored["mixing"]
    inputs = processor(QUESTION, [PHOTO])
    mixing = model.mixing(inputs.images[0])
    np.testing.assert_allclose(mixing, expected, atol=1e-6)
    assert mixing.shape == (queries, patches)
    np.testing.assert_allclose(mixing.sum(axis=-1), 1, atol=1e-5)
    tokens = [300, 301, 302]
    found = attend(model, processor, QUESTION, images=[PHOTO], answer=tokens)
    weights: list[mx.array] = []
    hidden = model.decoder(model.read(inputs.followed_by(tokens[:-1])), attentions=weights)
    first = len(inputs.slots) - 1
    onto = np.stack([np.array(each[0, :, first:, :queries]) for each in weights]).mean(axis=(0, 1))
    np.testing.assert_allclose(found.images[0].weights, onto @ expected, atol=1e-6)
    logits = model.decoder.logits(hidden[0, first:])
    logprobs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    np.testing.assert_allclose(found.logprobs, logprobs[range(3), tokens], atol=1e-5)
    assert np.isnan(found.images[0].boxes[0]).all()  # the class token is nowhere
    np.testing.assert_allclose(found.images[0].boxes[1], [0, 0, 70 / 4, 96 / 4])
    rolled = attend(model, processor, QUESTION, images=[PHOTO], answer=tokens, reduce="rollout")
    np.testing.assert_allclose(rolled.logprobs, found.logprobs, atol=1e-5)


def test_the_inspector_follows_the_question(vicuna):
    model, processor = vicuna
    one, other = (model.mixing(processor(text, [PHOTO]).images[0]) for text in (QUESTION, "Why?"))
    assert np.abs(one - other).max() > 1e-4


# --- conversion


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Two pictures to calibrate with; conversations about several do not fit these families."""
    folder = tmp_path_factory.mktemp("few")
    for picture in (PHOTO, SHAPES):
        shutil.copy(picture, folder)
    return str(folder)


OPTIONS = {
    "plain": {},
    "bits": {"bits": 8, "group_size": 32, "part_bits": {"projector": 8, "vision": 8}},
    "gptq": {"bits": 4, "group_size": 32, "method": "gptq", "part_bits": {"projector": 4, "vision": 4}},
}


@BOTH
@pytest.mark.parametrize("kind", sorted(OPTIONS))
def test_conversion(name, kind, tmp_path, few):
    options = OPTIONS[kind]
    measured = {"calibration": few} if "method" in options else {}
    source = widen(name, tmp_path / "wide") if options else GOLDEN / name
    report = convert(source, tmp_path / "out", check=True, **options, **measured)
    (whole, processor), (model, _) = load(source), load(tmp_path / "out")
    prompt = processor(QUESTION, [PHOTO])
    apart = np.abs(np.array(whole(prompt)) - np.array(model(prompt))).max()
    stored = plan(open_checkpoint(tmp_path / "out")).model
    quantized = {path for path, module in stored.named_modules() if hasattr(module, "bits")}
    assert report.check is not None and (apart == 0) == (kind == "plain")
    assert set(open_checkpoint(tmp_path / "out").tensors) >= set(open_checkpoint(source).tensors)
    if name == VICUNA:
        assert (tmp_path / "out" / INSTRUCTIONS / "tokenizer.json").is_file()
    if options:
        assert {"decoder.layers.0.self_attn.o_proj", "projector.blocks.2.cross_attn.q_proj"} <= quantized
        assert not any("pos_embed" in path for path in quantized) and apart < (0.5 if kind == "bits" else 20)


def test_each_picture_is_calibrated_with_its_own_question(tmp_path, monkeypatch):
    """GPTQ weighs the Q-Former's inputs as they come when each sample is read by itself."""
    source = widen(VICUNA, tmp_path / "wide")
    model, processor = load(source)
    planned = plan(open_checkpoint(source))
    samples = [
        make_sample(processor, [user({"image": picture}, text)])
        for picture, text in ((PHOTO, QUESTION), (SHAPES, "Why?"), (PHOTO, "Which colour has the larger one of them?"))
    ]
    linear = {
        path
        for path, layer in model.projector.named_modules()
        if isinstance(layer, nn.Linear) and layer.weight.shape[1] % 32 == 0
    }
    names = {planned.ours[f"projector.{path}.weight"]: path for path in linear}
    expected = dict.fromkeys(linear, 0.0)

    def add(path, x):
        rows = np.array(x).reshape(-1, x.shape[-1]).astype(np.float64)
        expected[path] = expected[path] + rows.T @ rows

    with compensation.watch(model.projector, linear, add):
        for sample in samples:
            model.encode(sample.inputs.images[0])
    given, compensate = [], compensation.compensate
    monkeypatch.setattr(
        compensation, "compensate", lambda weight, seen, how: given.append(seen) or compensate(weight, seen, how)
    )
    chosen = dict.fromkeys(names, Quantization(8, 32))
    order = list(compensation.compensate_model(planned, chosen, samples, None))
    assert len(order) == len(given) == len(linear)
    for name, seen in zip(order, given, strict=True):
        np.testing.assert_allclose(seen.hessian, expected[names[name]], rtol=1e-3, atol=1e-3)


WIDE = {
    OPT: {"hidden_size": 64, "ffn_dim": 96, "word_embed_proj_dim": 64},
    VICUNA: {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 4, "head_dim": 16},
}


def widen(name, folder):
    """The golden with random numbers, its decoder 64 numbers wide and its Q-Former 32, in one file."""
    qformer = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    make_wide(name, folder, {"text_config": WIDE[name], "qformer_config": qformer})
    for file in folder.glob("model*-of-*"):
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    return folder
