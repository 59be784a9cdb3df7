"""Gemma 4: budgets of tokens, masks, configs and names in all layouts, conversations, what is converted, what is refused."""

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import PHOTO, SHAPES, check_fields, edit_json, with_paths
from gemma4_reference import LARGE
from mlx.utils import tree_flatten
from quantized import load_packed
from reference import CASES, GOLDEN

from mlx_vlm_mini import Chat, attend, load
from mlx_vlm_mini.checkpoints.folder import open_checkpoint
from mlx_vlm_mini.checkpoints.load import plan
from mlx_vlm_mini.checkpoints.weights import load_weights
from mlx_vlm_mini.convert import convert
from mlx_vlm_mini.decoder.masks import Blocks, ImageBlock, Rows
from mlx_vlm_mini.decoder.rope import make_rope
from mlx_vlm_mini.errors import CheckpointError, ImageError, PromptError
from mlx_vlm_mini.families import find_family, gemma4, gemma4_unified
from mlx_vlm_mini.families.parts.maps import Experts
from mlx_vlm_mini.model import VLM
from mlx_vlm_mini.preprocessing.grid import BUDGETS, BudgetGrid
from mlx_vlm_mini.text.template import ChatTemplate
from mlx_vlm_mini.vision import make_tower

NAMES = ["gemma4-12b", "gemma4-26b", "gemma4-31b", "gemma4-e2b"]
TOLERANCE = 1e-4
COUNTS = [63, 135, 115]  # tokens of photo.jpg, and with a budget of 140 of shapes.png and strip.png


def last(model, processor, case="two_images"):
    logits = model(processor(with_paths(CASES[case])))[0, -1].astype(mx.float32)
    return np.array(logits - mx.logsumexp(logits))


@pytest.mark.parametrize(
    ("size", "fitted"),
    [  # of transformers' get_aspect_ratio_preserving_size, for 70, 280 and 1120 tokens of 48 x 48 pixels
        ((3024, 4032), [(336, 432), (672, 912), (1344, 1824)]),
        ((96, 70), [(432, 336), (912, 672), (1872, 1344)]),
        ((40, 160), [(192, 768), (384, 1584), (768, 3168)]),
        ((1, 3000), [(48, 3360), (48, 13440), (48, 53760)]),
        ((5000, 20), [(3360, 48), (12672, 48), (25392, 96)]),
        ((48, 48), [(384, 384), (768, 768), (1584, 1584)]),
    ],
)
def test_sizes_by_budget(size, fitted):
    grids = [BudgetGrid(patch_size=16, merge=3, tokens=tokens) for tokens in (70, 280, 1120)]
    assert [grid.fit(size) for grid in grids] == fitted
    assert all(grid.count_tokens(size) <= grid.tokens for grid in grids)


def test_a_photo_of_12_megapixels_has_fewer_tokens_than_its_budget():
    grids = [BudgetGrid(patch_size=16, merge=3, tokens=tokens) for tokens in BUDGETS]
    assert [grid.count_tokens((3024, 4032)) for grid in grids] == [63, 130, 266, 540, 1064]


@pytest.mark.parametrize(
    ("blocks", "full", "sliding"),
    [
        # Tokens 1 to 3 are an image's, the window is 2.
        ({"in_windows": True}, ["x....", "xx...", "xxx..", "xxxx.", "xxxxx"], ["x....", "xxxx.", ".xxx.", "..xx.", "...xx"]),
        ({"whole": True}, ["x....", "xxxx.", "xxxx.", "xxxx.", "xxxxx"], ["x....", "xxxx.", ".xxx.", ".xxx.", "...xx"]),
        ({}, ["x....", "xxxx.", "xxxx.", "xxxx.", "xxxxx"], ["x....", "xxxx.", ".xxx.", "..xx.", "...xx"]),
    ],
    ids=["31B and 26B", "12B", "Gemma 3"],
)  # fmt: skip
def test_images_in_the_mask(blocks, full, sliding):
    visible = Blocks((ImageBlock(1, 4),), **blocks)
    for window, expected in ((None, full), (2, sliding)):
        mask = visible.mask(window, Rows(0, 5))
        mask = mx.tri(5, dtype=mx.int32) > 0 if isinstance(mask, str) else mask
        assert ["".join("x" if seen else "." for seen in row) for row in np.array(mask)] == expected
        later = visible.mask(window, Rows(1, 4))
        later = mx.tri(5, dtype=mx.int32)[1:] > 0 if isinstance(later, str) else later
        assert np.array_equal(np.array(later), np.array(mask)[1:])


def test_rotary_positions_of_full_layers():
    """A quarter of the frequencies of the whole head turns, the others stand still."""
    decoder = gemma4.config({"text_config": {"hidden_size_per_layer_input": 0}}).decoder
    full, sliding = make_rope(decoder), make_rope(decoder, "sliding_attention")
    periods = np.array(full.scaling(1)[0])
    np.testing.assert_allclose(periods[:64], 1e6 ** (np.arange(64) * 2 / 512), rtol=1e-6)
    assert len(periods) == 256 and np.isinf(periods[64:]).all()
    np.testing.assert_allclose(np.array(sliding.scaling(1)[0]), 1e4 ** (np.arange(128) * 2 / 256), rtol=1e-6)
    x = mx.random.normal((1, 1, 1, 512))
    turned = np.array(full.at(7, 1)(x))[0, 0, 0]
    moved = np.flatnonzero(np.abs(turned - np.array(x)[0, 0, 0]) > 1e-6)
    assert set(moved) <= {*range(64), *range(256, 320)} and len(moved) > 100


def test_sizes_of_the_class():
    config = gemma4.config({})
    check_fields(
        config,
        {
            "decoder.hidden_size": 2304, "decoder.norms.norm_type": "rms_norm_float32", "decoder.two_way": "nothing",
            "decoder.embeddings.per_layer.size": 256, "decoder.scales.final_logit_softcapping": None, "decoder.mlp_type": "gated",
            "decoder.tie_word_embeddings": True, "image_token_id": 258880, "vision.image_size": 48,
            "vision.grid.axial_theta": 100.0, "vision.grid.places": 10240, "projector.grid_pool.factor": 3,
            "projector.grid_pool.standardize": False, "vision.blocks.clipped": False,
        },
    )  # fmt: skip
    kinds = config.decoder.layer_types
    assert kinds.count("full_attention") == 5 and kinds[5] == kinds[-1] == "full_attention"
    full = config.decoder.shape("full_attention")
    assert (full.head_dim, full.num_kv_heads, full.rotary_dims, full.keys_as_values) == (512, 4, 512, False)
    own = gemma4_unified.config({})
    check_fields(
        own,
        {
            "decoder.two_way": "images_whole", "decoder.window.sliding_window": 1024, "decoder.embeddings.per_layer": None,
            "decoder.max_position_embeddings": 262144, "vision.image_size": 48, "vision.hidden_size": 3840,
            "vision.num_hidden_layers": 0, "projector.norm_type": "rms_norm_bare",
        },
    )  # fmt: skip


def test_configs_of_the_hub_and_of_transformers_say_the_same():
    text = {
        "num_hidden_layers": 6, "attention_k_eq_v": True, "num_global_key_value_heads": 2, "global_head_dim": 128,
        "head_dim": 64, "hidden_size_per_layer_input": 0,
    }  # fmt: skip
    hub = gemma4.config({"text_config": text}).decoder
    plain = {key: value for key, value in text.items() if "global" not in key}
    written = {**plain, "per_layer_config": {"5": {"head_dim": 128, "num_key_value_heads": 2}}}
    assert gemma4.config({"text_config": written}).decoder == hub
    assert hub.shape("full_attention").num_kv_heads == 2 and hub.shape("full_attention").keys_as_values
    # Fewer heads of keys count only where these are values, too.
    other = gemma4.config({"text_config": {**text, "attention_k_eq_v": False}}).decoder
    assert other.shape("full_attention").num_kv_heads == 4
    assert gemma4.config({"text_config": {**text, "layer_types": ["sliding_attention"] * 6}}).decoder == hub


@pytest.mark.parametrize(
    ("name", "part", "changes", "message"),
    [
        ("gemma4-31b", "text_config", {"use_bidirectional_attention": "all"}, "reads and does not write"),
        ("gemma4-31b", "text_config", {"layer_types": ["full_attention"] * 3 + ["mamba"]}, r"has shape|not 'mamba'"),
        ("gemma4-31b", "text_config", {"layer_types": ["mamba"] * 4}, "slide or attend to all, not 'mamba'"),
        ("gemma4-31b", "text_config", {"attention_bias": True}, "attention_bias"),
        ("gemma4-31b", "text_config", {"num_kv_shared_layers": 4}, "of 4 layers 4 cannot share the others' keys"),
        ("gemma4-31b", "text_config", {"num_kv_shared_layers": 3}, "share keys and values of none before them"),
        ("gemma4-31b", "text_config", {"hidden_size_per_layer_input": ...}, "files do not belong together"),
        ("gemma4-31b", "text_config", {"global_head_dim": 7}, "even number of a head's 7"),
        ("gemma4-31b", "text_config", {"rope_parameters": {"sliding_attention": {"rope_type": "yarn"}}}, "'yarn' of sliding"),
        ("gemma4-31b", "text_config", {"rope_parameters": {"full_attention": {"rope_type": "axial"}}}, "unknown rope type"),
        ("gemma4-26b", "text_config", {"num_experts": None}, "num_experts must be a whole number"),
        ("gemma4-26b", "text_config", {"per_layer_config": {"0": {"head_dim": 12}}}, "gives layer 1 another attention"),
        ("gemma4-e2b", "text_config", {"vocab_size_per_layer_input": 9}, "vocab_size_per_layer_input 9 is below"),
        ("gemma4-e2b", "text_config", {"pad_token_id": -1}, "pad_token_id must be a token id"),
        ("gemma4-e2b", "vision_config", {"head_dim": 8}, "tower's head_dim must be"),
        ("gemma4-e2b", "vision_config", {"num_key_value_heads": 1}, "num_key_value_heads"),
        ("gemma4-e2b", "vision_config", {"attention_bias": True}, "neither attention_bias nor a scaled rope"),
        ("gemma4-e2b", "vision_config", {"pooling_kernel_size": 5}, "makes a token of 8 pixels a side, config.json of 20"),
        ("gemma4-12b", "vision_config", {"output_proj_dims": 8}, "output_proj_dims must be mm_embed_dim"),
        ("gemma4-12b", "vision_config", {"mm_posemb_size": 0}, "places must be a whole number"),
    ],
)  # fmt: skip
def test_configs_that_cannot_be_are_refused_in_a_line(copy_of, name, part, changes, message):
    folder = copy_of(name)
    values = {**json.loads((folder / "config.json").read_text())[part], **changes}
    edit_json(folder / "config.json", **{part: {key: value for key, value in values.items() if value is not ...}})
    with pytest.raises(CheckpointError, match=message) as error:
        load(folder)[1]([PHOTO, "What?"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_soft_tokens": 100}, "an image has 70, 140, 280, 560 or 1120 tokens at most, not 100"),
        ({"do_resize": False}, "images in patches need do_resize"),
        ({"patch_size": 0}, "whole number above 0 as patch_size"),
        ({"image_processor_type": "SiglipImageProcessor"}, "needs them"),
    ],
)
def test_settings_of_images_that_do_not_fit(copy_of, changes, message):
    folder = copy_of("gemma4-31b")
    settings = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    edit_json(folder / "processor_config.json", image_processor={**settings, **changes})
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def mlx_name(ours, weights):
    """What mlx-community's files call a tensor."""
    found = [
        theirs for theirs, target in weights.items() if isinstance(target, str) and not theirs.startswith("model.")
    ]
    numbers = [part for part in ours.split(".") if part.isdigit()]
    for theirs in found:
        target, place = weights[theirs], theirs
        if target.count("{}") > len(numbers) or "experts.{}" in theirs or ".multimodal_embedder." in theirs:
            continue
        target, place = target.format(*numbers), theirs.format(*numbers)
        if target == ours:
            return place
        module, _, parameter = ours.rpartition(".")
        if target == module and not theirs.startswith("embed_vision.patch"):
            return f"{place}.{parameter}"
    raise AssertionError(ours)


def test_names_of_mlx_community():
    names = {
        "decoder.layers.3.self_attn.k_norm.weight": "language_model.model.layers.3.self_attn.k_norm.weight",
        "decoder.layers.3.layer_scalar": "language_model.model.layers.3.layer_scalar",
        "decoder.layers.3.experts.gate.weight": "language_model.model.layers.3.router.proj.weight",
        "decoder.layers.3.experts.switch_mlp.up_proj.scales": "language_model.model.layers.3.experts.switch_glu.up_proj.scales",
        "decoder.per_layer.embed.weight": "language_model.model.embed_tokens_per_layer.weight",
        "vision.blocks.2.attn.q_proj.linear.weight": "vision_tower.encoder.layers.2.self_attn.q_proj.linear.weight",
        "vision.blocks.2.attn.q_proj.input_min": "vision_tower.encoder.layers.2.self_attn.q_proj.input_min",
        "vision.pos_axes": "vision_tower.patch_embedder.position_embedding_table",
        "projector.std_bias": "vision_tower.std_bias",
        "projector.layers.0.weight": "embed_vision.embedding_projection.weight",
    }  # fmt: skip
    assert {ours: mlx_name(ours, gemma4.WEIGHTS) for ours in names} == names
    assert mlx_name("vision.norm.bias", gemma4_unified.WEIGHTS) == "vision_embedder.pos_norm.bias"
    assert mlx_name("vision.pos_axes", gemma4_unified.WEIGHTS) == "vision_embedder.pos_embedding"
    assert isinstance(gemma4.WEIGHTS["model.language_model.layers.{}.experts.gate_up_proj"], Experts)


def as_mlx(folder, model):
    """Write a model's weights as mlx-community has them."""
    weights = find_family(json.loads((folder / "config.json").read_text())).WEIGHTS
    for file in folder.glob("model*"):
        file.unlink()
    arrays = dict(tree_flatten(model.parameters()))
    tensors = {mlx_name(ours, weights): mx.contiguous(array) for ours, array in arrays.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "mlx"})


@pytest.mark.parametrize("name", NAMES)
def test_files_of_mlx_community(copy_of, name):
    folder = copy_of(name)
    planned = plan(open_checkpoint(folder))
    load_weights(planned.model, planned.ours, planned.checkpoint, mx.float32, planned.family.WEIGHTS)
    as_mlx(folder, planned.model)
    np.testing.assert_allclose(last(*load(folder)), last(*load(GOLDEN / name)), atol=TOLERANCE)


def test_tensors_that_nobody_reads():
    """Keys of layers that share others' are there and idle, what hears is left out by name."""
    planned = plan(open_checkpoint(GOLDEN / "gemma4-e2b"))
    assert set(planned.unused) == {
        "model.audio_tower.layers.0.norm.weight", "model.embed_audio.embedding_projection.weight",
    }  # fmt: skip
    names = dict(tree_flatten(planned.model.parameters()))
    idle = sorted(name for name in planned.ours if name not in names)
    assert idle == [f"decoder.layers.{i}.self_attn.{n}.weight" for i in (3, 4) for n in ("k_norm", "k_proj", "v_proj")]


WIDE = {  # sizes of which 32 is a divisor
    "text_config": {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "global_head_dim": 32},
    "vision_config": {"hidden_size": 64, "intermediate_size": 64, "head_dim": 32},
}  # fmt: skip


def make_wide(name, folder):
    """A golden's wider sister in mlx-community's names, of random numbers."""
    config = json.loads((folder / "config.json").read_text())
    for part, sizes in WIDE.items():
        config[part] |= sizes
    text = config["text_config"]
    text |= {"hidden_size_per_layer_input": 32} if name == "gemma4-e2b" else {}
    text |= {"moe_intermediate_size": 32} if name == "gemma4-26b" else {}
    if "per_layer_config" in text:
        text["per_layer_config"] = {"2": {"head_dim": 32, "num_key_value_heads": 1}}
    if name == "gemma4-12b":
        config["vision_config"] = {
            key: value for key, value in config["vision_config"].items() if key not in WIDE["vision_config"]
        } | {"mm_embed_dim": 64, "output_proj_dims": 64}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    model = VLM(find_family(config).config(config))
    mx.random.seed(5)

    def value(ours, array):
        if ours.endswith(("_min", "_max")):
            return mx.full((), -3.0 if ours.endswith("_min") else 3.0)
        noise = mx.random.normal(array.shape)
        if array.ndim == 1:
            return 0.2 * noise + (0 if ours.endswith(("bias", "std_bias")) else 1)
        return noise * (0.1 if "embed" in ours else array.shape[-1] ** -0.5)

    model.load_weights([(ours, value(ours, array)) for ours, array in tree_flatten(model.parameters())])
    as_mlx(folder, model)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_converted_and_quantized(copy_of, tmp_path, name):
    """Within rounding of the source, and exactly what its own unpacked weights give; routers keep their type."""
    folder = make_wide(name, copy_of(name))
    parts = {"vision": 8, "projector": 8}
    check = name == "gemma4-e2b"  # layer by layer, of which some have the keys of others
    convert(folder, tmp_path / "out", bits=4, group_size=32, part_bits=parts, check=check)
    report = json.loads((tmp_path / "out" / "conversion.json").read_text())["check"]
    assert not check or (report["problems"] == [] and report["mean_kl"] < 1)
    convert(tmp_path / "out", tmp_path / "back", dequantize=True)
    packed, (model, processor) = load_packed(tmp_path / "out"), load(tmp_path / "back")
    inputs = processor(with_paths(CASES["two_images"]))
    np.testing.assert_allclose(np.array(packed(inputs)[0]), np.array(model(inputs)[0]), atol=2e-3)
    bits = {path: module.bits for path, module in packed.named_modules() if hasattr(module, "bits")}
    assert {bits[path] for path in bits if path.startswith("vision.")} == {8}
    assert bits["decoder.embed_tokens"] == bits["decoder.layers.0.self_attn.q_proj"] == 4
    assert bits.get("decoder.per_layer.embed") == (8 if name == "gemma4-e2b" else None)
    assert not any(path.endswith("experts.gate") for path in bits)
    assert ("decoder.layers.0.experts.switch_mlp.up_proj" in bits) == (name == "gemma4-26b")


@pytest.mark.reference  # a minute, for what no other test of conversion has: layers that share keys
@pytest.mark.parametrize("settings", [{"recipe": "auto", "bits_per_weight": 7.0}, {"method": "gptq", "bits": 4}])
def test_layers_that_share_keys_are_measured(copy_of, tmp_path, settings):
    """Layer by layer on what the layers before give, keys and values among it."""
    folder = make_wide("gemma4-e2b", copy_of("gemma4-e2b"))
    convert(folder, tmp_path / "out", group_size=32, check=True, **settings)
    report = json.loads((tmp_path / "out" / "conversion.json").read_text())["check"]
    assert report["problems"] == [] and report["mean_kl"] < 1


@pytest.mark.parametrize("name", NAMES)
def test_turns_equal_fresh_runs(name):
    """With pictures of different budgets; what was said before is not read again."""
    model, processor = load(GOLDEN / name)
    chat = Chat(model, processor, max_tokens=3)
    prompts = (
        (["What is in this image?", PHOTO], {}),
        ("Which is larger?", {}),
        ([{"type": "image", "image": SHAPES, "tokens": 140}, "And this one?"], {}),
        (["This?", GOLDEN / "strip.png"], {"image_tokens": 140}),
    )
    for prompt, options in prompts:
        before = [*chat.messages]
        tokens = [chunk.token for chunk in chat.send(prompt, **options)]
        stats, fresh = chat.last_stats, Chat(model, processor, max_tokens=3)
        fresh.messages = before
        assert [chunk.token for chunk in fresh.send(prompt, **options)] == tokens
        assert not before or stats.cached_tokens > 30
    counts = [image.tokens for image in processor(chat.messages).images]
    assert counts == COUNTS


def test_a_conversations_cache_is_saved(tmp_path):
    """Whose layers have keys of different shapes, and some none of their own."""
    for name in ("gemma4-31b", "gemma4-e2b"):
        model, processor = load(GOLDEN / name)
        chat = Chat(model, processor, max_tokens=4)
        list(chat.send([{"type": "image", "image": PHOTO, "tokens": 140}, "What is in this image?"]))
        chat.save(tmp_path / f"{name}.json", cache=True)
        again = Chat.load(tmp_path / f"{name}.json", model, processor)
        assert again.notes == []
        assert [c.token for c in again.send("Why?")] == [c.token for c in chat.send("Why?")]
        assert again.last_stats.cached_tokens == chat.last_stats.cached_tokens > 100


def test_another_budget_for_the_same_picture(tmp_path):
    model, processor = load(GOLDEN / "gemma4-31b")
    chat = Chat(model, processor, max_tokens=3)
    list(chat.send(["What?", PHOTO]))
    few = chat.last_stats.image_tokens
    list(chat.retry(image_tokens=140))
    assert (few, chat.last_stats.image_tokens) == (63, 130)
    chat.options["image_tokens"] = 280
    list(chat.edit(["What?", PHOTO]))
    assert chat.last_stats.image_tokens == 266
    chat.save(tmp_path / "chat.json")
    content = json.loads((tmp_path / "chat.json").read_text())
    assert content["messages"][0]["content"][1]["tokens"] == content["options"]["image_tokens"] == 280
    again = Chat.load(tmp_path / "chat.json", model, processor)
    assert processor(again.messages).images[0].tokens == 266


def test_attention_lies_where_the_picture_is():
    model, processor = load(GOLDEN / "gemma4-31b")
    prompt = ["What?", {"type": "image", "image": PHOTO, "tokens": 140}]
    (found,) = attend(model, processor, prompt, max_tokens=2).images
    assert found.boxes.shape == (130, 4)
    assert found.boxes[-1].tolist() == pytest.approx([63, 96 - 96 / 13, 70, 96])


def test_budgets_that_cannot_be():
    _, processor = load(GOLDEN / "gemma4-31b")
    for tokens in (100, 2000):
        with pytest.raises(PromptError, match="70, 140, 280, 560 or 1120 tokens at most, not"):
            processor([{"type": "image", "image": PHOTO, "tokens": tokens}, "What?"])
    vision = processor.config.vision
    tower = make_tower(replace(vision, grid=replace(vision.grid, places=3)))
    with pytest.raises(ImageError, match="an image of 4x2 patches needs more positions than this model's 3"):
        tower(mx.zeros((1, 8, 16, 3)))


def test_nearly_flat_patches_keep_their_digits():
    """Paper: of its pixels as they are float32 has too few digits for a variance."""
    model, _ = load(GOLDEN / "gemma4-12b")
    rng = np.random.default_rng(0)
    pixels = (0.9 + 1e-4 * rng.normal(size=(1, 8, 16, 3))).astype(np.float32)
    tower = model.vision

    def norm(x, layer):
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5)
        return x * np.array(layer.weight, np.float64) + np.array(layer.bias, np.float64)

    patches = pixels.astype(np.float64).reshape(8, 2, 8, 3).transpose(1, 0, 2, 3).reshape(2, -1)
    x = norm(patches, tower.norm_pixels) @ np.array(tower.patch_proj.weight, np.float64).T
    x = norm(x + np.array(tower.patch_proj.bias, np.float64), tower.norm_patches)
    places = np.array(tower.pos_axes, np.float64)
    expected = norm(x + places[:2, 0] + places[0, 1], tower.norm)
    np.testing.assert_allclose(np.array(tower(mx.array(pixels)))[0, 0], expected, atol=2e-5)


def test_half_precision_stays_near():
    for name in ("gemma4-12b", "gemma4-26b"):
        exact, half = (load(GOLDEN / name, dtype=dtype) for dtype in ("float32", "bfloat16"))
        assert np.abs(last(*half).astype(np.float64) - last(*exact)).mean() < 0.3
    with pytest.raises(CheckpointError, match="float16 cannot hold"):
        load(GOLDEN / NAMES[0], dtype="float16")


def test_a_template_says_nothing_of_thoughts_unless_asked():
    template = ChatTemplate(LARGE, {"bos_token": "<bos>"}, "<|image|>")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": " Hi "}]},
        {"role": "assistant", "content": [{"type": "text", "text": "<|channel>thought\nhm<channel|>Yes."}]},
        {"role": "user", "content": [{"type": "text", "text": "And?"}, {"type": "image", "image": PHOTO}]},
    ]
    first, rest = template.render(messages)
    assert first == (
        "<bos><|turn>system\nBe brief.<turn|>\n<|turn>user\nHi<turn|>\n<|turn>model\nYes.<turn|>\n<|turn>user\nAnd?"
    )
    assert rest == "<turn|>\n<|turn>model\n<|channel>thought\n<channel|>"
