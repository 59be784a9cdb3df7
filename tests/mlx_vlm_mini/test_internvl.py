"""InternVL, native and as its authors write it: tiles, configs, fused tensors, conversations, options, and what is refused."""

import json
import shutil
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import PHOTO, SHAPES, edit_json
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from PIL import Image
from quantized import load_packed
from reference import GOLDEN

from mlx_vlm_mini import generate, load
from mlx_vlm_mini.checkpoints.describe import describe
from mlx_vlm_mini.checkpoints.folder import open_checkpoint
from mlx_vlm_mini.checkpoints.load import plan
from mlx_vlm_mini.checkpoints.weights import rename, split_rows
from mlx_vlm_mini.cli.main import main
from mlx_vlm_mini.config import ShuffleConfig
from mlx_vlm_mini.convert import convert
from mlx_vlm_mini.errors import CheckpointError, ImageError, PromptError
from mlx_vlm_mini.families import internvl, internvl_chat
from mlx_vlm_mini.families.parts.maps import PerHead
from mlx_vlm_mini.model import VLM
from mlx_vlm_mini.preprocessing.tiles import Tiles, choose_grid, count_tiles, cut_tiles
from mlx_vlm_mini.projectors.mlp import pixel_shuffle
from mlx_vlm_mini.text.formats.bytelevel import read_byte_level
from mlx_vlm_mini.text.tokenizer import load_tokenizer
from mlx_vlm_mini.train.trainer import Settings, Trainer

NATIVE, SIX, INTERNLM, QWEN, LLAMA, PHI = (
    GOLDEN / f"internvl-{name}"
    for name in ("qwen2", "rms-qwen3", "chat-internlm2", "chat-qwen3", "chat-llama", "chat-phi3")
)
TWELVE = Tiles(tile_size=448, min_tiles=1, max_tiles=12, thumbnail=True)


@pytest.mark.parametrize(
    ("size", "grid", "rows"),
    [
        ((480, 640), (3, 4), 13), ((1080, 1920), (2, 4), 9), ((900, 300), (3, 1), 4), ((448, 448), (1, 1), 1),
        ((300, 300), (1, 1), 1), ((800, 800), (2, 2), 5), ((2000, 2000), (3, 3), 10),  # squares: more tiles for more pixels
        ((1, 1000), (1, 12), 13), ((1000, 1), (12, 1), 13),
    ],
)  # fmt: skip
def test_grids(size, grid, rows):
    """Figures of both references; sizes are (height, width)."""
    assert choose_grid(size, TWELVE) == grid
    assert count_tiles(size, TWELVE) == rows
    assert count_tiles(size, replace(TWELVE, thumbnail=False)) == grid[0] * grid[1]
    assert count_tiles(size, replace(TWELVE, max_tiles=1)) == 1


def test_of_two_grids_as_near_the_smaller_one_and_alone_nothing_is_cut():
    """A picture of 15x20 is as far from one tile as from two below one another, and has too few pixels for both."""
    assert choose_grid((20, 15), Tiles(tile_size=42, min_tiles=1, max_tiles=2, thumbnail=True)) == (1, 1)
    picture = Image.new("RGB", (15, 20))
    assert cut_tiles(picture, replace(TWELVE, max_tiles=1), 3) == [picture]


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 5), st.integers(0, 7), st.booleans())
def test_an_image_becomes_as_many_tiles_as_are_counted(height, width, fewest, more, thumbnail):
    tiles = Tiles(tile_size=6, min_tiles=fewest, max_tiles=fewest + more, thumbnail=thumbnail)
    cut = cut_tiles(Image.new("RGB", (width, height)), tiles, 3)
    assert len(cut) == count_tiles((height, width), tiles)
    assert {tile.size for tile in cut} == {(6, 6)} or tiles.max_tiles == 1
    assert fewest <= np.prod(choose_grid((height, width), tiles)) <= fewest + more


def test_tiles_stand_row_by_row_and_the_thumbnail_last():
    colours = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[9, 9, 9], [99, 99, 99], [200, 200, 200]]], np.uint8)
    image = Image.fromarray(colours.repeat(4, axis=0).repeat(4, axis=1))
    *tiles, thumbnail = cut_tiles(image, Tiles(tile_size=4, min_tiles=6, max_tiles=6, thumbnail=True), 3)
    assert [tile.getpixel((1, 1)) for tile in tiles] == [tuple(map(int, colour)) for colour in colours.reshape(6, 3)]
    np.testing.assert_array_equal(np.asarray(thumbnail), np.asarray(image.resize((4, 4), Image.Resampling.BICUBIC)))


def test_pixel_shuffles():
    """Feature 10 r + c of a grid of 4 x 4; each joined feature is a square of neighbours."""
    grid = mx.array([[10.0 * row + column for row in range(4) for column in range(4)]])[..., None]
    rows = pixel_shuffle(grid, ShuffleConfig(factor=2, transposed=False))
    assert rows.tolist() == [[[0, 1, 10, 11], [2, 3, 12, 13], [20, 21, 30, 31], [22, 23, 32, 33]]]
    columns = pixel_shuffle(grid, ShuffleConfig(factor=2, transposed=True))
    assert columns.tolist() == [[[0, 1, 10, 11], [20, 21, 30, 31], [2, 3, 12, 13], [22, 23, 32, 33]]]
    assert (pixel_shuffle(grid, ShuffleConfig(factor=1, transposed=False)) == grid).all()


def test_an_empty_native_config_is_internvl3s():
    """The class defaults of transformers 5.23, as its InternVLConfig and Qwen2Config give them."""
    config = internvl.config({"model_type": "internvl"})
    vision = config.vision
    assert (vision.hidden_size, vision.depth, vision.num_attention_heads, vision.intermediate_size) == (
        1024,
        24,
        16,
        4096,
    )
    assert (vision.image_size, vision.patch_size, vision.layer_norm_eps, vision.hidden_act) == (448, 14, 1e-6, "gelu")
    assert (vision.blocks.norm_type, vision.blocks.qkv_bias, vision.blocks.qk_norm_eps) == ("layer_norm", False, None)
    assert config.projector.input_size == 4096 and config.projector.norm_eps == 1e-5
    assert (config.image_token_id, config.decoder.biases.qkv_bias, config.decoder.hidden_size) == (151667, True, 4096)


def test_an_empty_config_of_the_authors_is_a_six_billion_tower():
    """InternVisionConfig's and InternVLChatConfig's defaults, and Llama's."""
    config = internvl_chat.config({"template": "Hermes-2", "llm_config": {"architectures": ["LlamaForCausalLM"]}})
    vision = config.vision
    assert (vision.hidden_size, vision.depth, vision.num_attention_heads, vision.image_size) == (3200, 48, 25, 224)
    assert (vision.blocks.norm_type, vision.blocks.qkv_bias, vision.blocks.qk_norm_eps) == ("rms_norm", False, 1e-6)
    assert config.projector.shuffle == ShuffleConfig(factor=2, transposed=True)
    assert config.prescribed is not None and config.prescribed.end_token == "<|im_end|>"
    assert config.prescribed.image_processor == {
        "size": {"height": 224, "width": 224}, "do_pad": False, "min_patches": 1, "max_patches": 1, "use_thumbnail": False,
    }  # fmt: skip
    assert (config.decoder.hidden_size, config.decoder.num_hidden_layers, config.decoder.biases.qkv_bias) == (
        4096,
        32,
        False,
    )


def test_defaults_of_decoders():
    def decoder(architecture, **values):
        text = {"architectures": [architecture], **values}
        return internvl_chat.config({"template": "Hermes-2", "llm_config": text}).decoder

    internlm = decoder("InternLM2ForCausalLM")
    assert (internlm.vocab_size, internlm.biases.qkv_bias, internlm.biases.o_bias, internlm.biases.mlp_bias) == (
        103168,
        True,
        True,
        False,
    )
    assert not decoder("InternLM2ForCausalLM", bias=False).biases.qkv_bias
    phi = decoder("Phi3ForCausalLM")
    assert (phi.hidden_size, phi.norms.rms_norm_eps, phi.biases.qkv_bias, phi.sliding_window) == (
        3072,
        1e-5,
        False,
        None,
    )
    assert decoder("Phi3ForCausalLM", sliding_window=2047).layer_types == ("sliding_attention",) * 32
    qwen = decoder("Qwen3ForCausalLM", hidden_size=1024, num_attention_heads=16, num_key_value_heads=8)
    assert (qwen.head_dim, qwen.norms.qk_norm, qwen.biases.qkv_bias) == (128, True, False)


CHAT = {"template": "Hermes-2", "llm_config": {"architectures": ["Qwen2ForCausalLM"]}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"template": "vicuna"}, "template 'vicuna' is not known .known: Hermes-2, internlm2-chat, internvl2_5"),
        ({"template": ["Hermes-2"]}, "is not known"),
        ({"template": None}, "template None is not known"),
        ({"llm_config": {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}}, "decoder 'qwen3_moe' is not"),
        ({"llm_config": {"architectures": ["GptOssForCausalLM"]}}, "decoder 'GptOssForCausalLM' is not supported"),
        ({"vision_config": {"norm_type": "batch_norm"}}, "unknown norm_type 'batch_norm'"),
        ({"downsample_ratio": 2.0}, "factor must be a whole number"),
        ({"downsample_ratio": 0.3}, "a grid of 16 x 16 features cannot be joined in squares of 3 x 3"),
        ({"select_layer": 50}, "vision feature layer 50 does not exist"),
        ({"vision_config": {"layer_norm_eps": 0}}, "norm_eps must be a positive number"),
    ],
)  # fmt: skip
def test_configs_of_the_authors_that_make_no_model(changes, message):
    with pytest.raises(CheckpointError, match=message):
        internvl_chat.config({**CHAT, **changes})


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        ({"vision_feature_select_strategy": "full"}, "must be 'default' for a pixel shuffle"),
        (
            {"vision_config": {"use_absolute_position_embeddings": False}},
            "without position embeddings is not supported",
        ),
        ({"vision_config": {"image_size": [448, 224]}}, "image_size must be square"),
        ({"text_config": {"model_type": "gpt_oss"}}, "decoder 'gpt_oss' is not supported"),
    ],
)
def test_native_configs_that_make_no_model(hf, message):
    with pytest.raises(CheckpointError, match=message):
        internvl.config(hf)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("vision_model.encoder.layers.3.attn.qkv.bias", tuple(f"vision.blocks.3.attn.{x}_proj.bias" for x in "qkv")),
        ("vision_model.encoder.layers.3.ls1", ("vision.blocks.3.ls1",)),
        ("mlp1.0.weight", ("projector.norm.weight",)),
        ("mlp1.3.scales", ("projector.layers.1.scales",)),
        ("language_model.model.layers.0.mlp.gate_up_proj.weight",
         ("decoder.layers.0.mlp.gate_proj.weight", "decoder.layers.0.mlp.up_proj.weight")),
        ("language_model.model.layers.12.feed_forward.w3.weight", ("decoder.layers.12.mlp.up_proj.weight",)),
        ("language_model.model.layers.1.self_attn.q_norm.weight", ("decoder.layers.1.self_attn.q_norm.weight",)),
        ("language_model.output.weight", ("decoder.lm_head.weight",)),
    ],
)  # fmt: skip
def test_names_of_the_authors(theirs, ours):
    assert rename(theirs, internvl_chat.WEIGHTS) == ours


@pytest.mark.parametrize(
    ("prefix", "head"), [("", "language_model."), ("model.", "")], ids=["as on the Hub", "as in memory"]
)
def test_both_native_layouts_are_read(prefix, head, copy_of):
    folder = copy_of("internvl-qwen2")
    tensors, checkpoint = {}, open_checkpoint(folder)
    for name in checkpoint.tensors:
        text = name.replace("language_model.model.", "model.language_model.") if prefix else name
        whole = text if text.startswith(("model.language", "language_model")) else prefix + text
        tensors[head + "lm_head.weight" if name.endswith("lm_head.weight") else whole] = checkpoint.read(name)
    (folder / "model.safetensors").unlink()
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "pt"})
    inputs = load(NATIVE)[1]("What?", [PHOTO])
    assert (load(folder)[0](inputs) == load(NATIVE)[0](inputs)).all()


def test_rows_of_a_fused_tensor():
    """Rows named by head and part: of two heads, each with two queries, a key and a value."""
    fused = mx.array([[10 * head + part] for head in (1, 2) for part in (1, 2, 3, 4)])
    q, k, v = split_rows(fused, [4, 2, 2], 2)
    assert (q[:, 0].tolist(), k[:, 0].tolist(), v[:, 0].tolist()) == ([11, 12, 21, 22], [13, 23], [14, 24])
    q, k, v = split_rows(fused, [4, 2, 2], 1)
    assert (q[:, 0].tolist(), k[:, 0].tolist(), v[:, 0].tolist()) == ([11, 12, 13, 14], [21, 22], [23, 24])
    assert isinstance(internvl_chat.WEIGHTS["language_model.model.layers.{}.attention.wqkv"], PerHead)


@pytest.fixture
def wide(tmp_path):
    """An InternLM2 and a Phi-3 in the authors' layout, wide enough to be quantized."""

    def make(name):
        source, folder = GOLDEN / name, tmp_path / name
        folder.mkdir()
        for file in source.iterdir():
            if not file.name.startswith(("model", "expected")):
                (folder / file.name).write_bytes(file.read_bytes())
        config = json.loads((folder / "config.json").read_text())
        config["llm_config"] |= {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
        config["vision_config"] |= {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
        edit_json(folder / "config.json", **config)
        mx.random.seed(1)
        tensors = {}
        model, checkpoint = VLM(internvl_chat.config(config)), open_checkpoint(source)
        kv_heads, shapes = config["llm_config"]["num_key_value_heads"], dict(tree_flatten(model.parameters()))
        for theirs in checkpoint.tensors:
            ours = [shapes[each].shape for each in rename(theirs, internvl_chat.WEIGHTS)]
            shape = (sum(each[0] for each in ours), *ours[0][1:])
            value = mx.random.normal(shape) * (0.3 if len(shape) == 1 else 2 * shape[-1] ** -0.5)
            value = value + (1 if "norm" in theirs and theirs.endswith("weight") else 0)
            tensors[theirs] = mx.contiguous(value.transpose(0, 3, 1, 2) if value.ndim == 4 else value)
        assert kv_heads == 2
        mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "pt"})
        return folder

    return make


@pytest.mark.parametrize("name", [INTERNLM.name, PHI.name])
def test_fused_tensors_are_quantized_whole_and_cut_when_they_are_loaded(name, wide, tmp_path):
    folder = wide(name)
    convert(folder, tmp_path / "out", bits=8, group_size=32, part_bits={"vision": 8})
    checkpoint = open_checkpoint(tmp_path / "out")
    key = "attention.wqkv" if name == INTERNLM.name else "self_attn.qkv_proj"
    assert {f"language_model.model.layers.0.{key}.{part}" for part in ("weight", "scales", "biases")} <= set(
        checkpoint.tensors
    )
    model = load_packed(tmp_path / "out")
    attention = model.decoder.layers[0].self_attn
    assert (attention.q_proj.bits, attention.v_proj.bits, model.vision.blocks[0].attn.k_proj.bits) == (8, 8, 8)
    exact, _ = load(folder)
    for quantized, plain in (
        (attention, exact.decoder.layers[0].self_attn), (model.decoder.layers[0].mlp, exact.decoder.layers[0].mlp),
        (model.vision.blocks[0].attn, exact.vision.blocks[0].attn),
    ):  # fmt: skip
        for path, layer in plain.items():
            if "proj" in path:
                expected = mx.quantize(layer.weight, group_size=32, bits=8)
                assert all(
                    (quantized[path][key] == array).all()
                    for key, array in zip(("weight", "scales"), expected, strict=False)
                )
    assert generate(model, load(tmp_path / "out")[1], "Hi", images=[PHOTO], max_tokens=2) is not None


def test_a_fused_tensor_of_another_shape(copy_of):
    folder = copy_of(INTERNLM.name)
    config = json.loads((folder / "config.json").read_text())
    edit_json(folder / "config.json", llm_config={**config["llm_config"], "num_key_value_heads": 3})
    message = r"layers.0.attention.wqkv.weight has shape \[80, 48\], config.json asks for \[96, 48\]"
    with pytest.raises(CheckpointError, match=message):
        plan(open_checkpoint(folder))


def test_a_missing_fused_tensor(copy_of):
    folder = copy_of(PHI.name)
    tensors = dict(mx.load(str(folder / "model.safetensors")))
    del tensors["language_model.model.layers.1.mlp.gate_up_proj.weight"]
    mx.save_safetensors(str(folder / "new.safetensors"), tensors, {"format": "pt"})
    (folder / "new.safetensors").replace(folder / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"lacks 2 tensors \(language_model.model.layers.1.mlp.gate_up_proj.weight"
    ):
        load(folder)


def text_of(processor, messages, **options):
    prepared = [
        processor.prepare(part["image"]) for message in messages for part in message["content"] if "image" in part
    ]
    return processor.expand(messages, prepared, **options)[0]


def said(role, *parts):
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts
    ]
    return {"role": role, "content": content}


def test_a_conversation_as_text():
    _, processor = load(LLAMA)
    messages = [said("user", PHOTO, "What?"), said("assistant", "A house."), said("user", "Why?")]
    slots = "<img>" + "<IMG_CONTEXT>" * 4 + "</img>"
    assert text_of(processor, messages) == f" <human>: {slots}\nWhat? <bot>: A house.</s><human>: Why? <bot>:"
    assert (
        text_of(processor, messages[:2], add_generation_prompt=False) == f" <human>: {slots}\nWhat? <bot>: A house.</s>"
    )
    assert text_of(processor, [said("system", "Be brief."), *messages[2:]]) == "Be brief. <human>: Why? <bot>:"


def test_the_template_and_the_system_message_are_config_jsons(copy_of):
    _, processor = load(PHI)
    text = text_of(processor, [said("user", "Hi")])
    assert text.startswith("<|system|>\n你是由上海人工智能实验室") and text.endswith(
        "<|end|><|user|>\nHi<|end|><|assistant|>\n"
    )
    folder = copy_of(PHI.name)
    edit_json(folder / "config.json", template="internvl2_5", system_message='Say "{{ this }}" and {% that %} \\ 日本')
    text = text_of(load(folder)[1], [said("user", "Hi"), said("assistant", ""), said("user", "")])
    assert text == (
        '<|im_start|>system\nSay "{{ this }}" and {% that %} \\ 日本<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n'
        "<|im_start|>assistant\n<|im_start|>user\n<|im_start|>assistant\n"
    )


def test_messages_that_no_conversation_has():
    _, processor = load(QWEN)
    for messages in (
        [said("tool", "42")],
        [said("user", "Hi"), said("system", "Be brief.")],
    ):
        with pytest.raises(PromptError, match="message can stand here"):
            text_of(processor, messages)


def test_an_answer_ends_with_the_conversations_token(copy_of):
    assert {name: load(GOLDEN / name)[1].eos_token_ids for name in (INTERNLM.name, QWEN.name)} == {
        name: {load_tokenizer(GOLDEN / name).token_to_id("<|im_end|>")} for name in (INTERNLM.name, QWEN.name)
    }
    folder = copy_of(LLAMA.name)
    edit_json(folder / "config.json", template="phi3-chat")
    assert load(folder)[1].eos_token_ids == {load_tokenizer(folder).token_to_id("<|end|>")}
    content = json.loads((folder / "tokenizer.json").read_text().replace("<|end|>", "<|fin|>"))
    edit_json(folder / "tokenizer.json", **content)
    edit_json(folder / "tokenizer_config.json", extra_special_tokens=[], additional_special_tokens=[])
    with pytest.raises(CheckpointError, match="the tokenizer lacks <|end|>, which ends an answer"):
        load(folder)


def test_the_image_token_is_found_by_its_text(copy_of):
    _, processor = load(QWEN)
    assert processor.image_token == "<IMG_CONTEXT>"
    assert processor.image_token_id == load_tokenizer(QWEN).token_to_id("<IMG_CONTEXT>")
    folder = copy_of(QWEN.name)
    settings = json.loads((folder / "tokenizer_config.json").read_text().replace("<IMG_CONTEXT>", "<CONTEXT>"))
    edit_json(folder / "tokenizer_config.json", **settings)
    with pytest.raises(
        CheckpointError, match="gives images the token <IMG_CONTEXT>, which the tokenizer does not have"
    ):
        load(folder)


def test_limits_of_tiles(copy_of):
    """Of the library; photo.jpg is higher than wide."""

    def tokens(folder, **limits):
        inputs = load(folder, **limits)[1]("Hi", [PHOTO])
        return int(inputs.slots.sum()), len(inputs.pixel_values)

    assert tokens(QWEN) == (12, 3)
    assert tokens(QWEN, max_tiles=1) == (4, 1)
    assert tokens(QWEN, min_tiles=4, max_tiles=4) == (20, 5)
    assert (tokens(NATIVE), tokens(NATIVE, max_tiles=5)) == ((28, 7), (12, 3))
    assert tokens(LLAMA, min_tiles=2, max_tiles=2) == (
        8,
        2,
    )  # which without is one squashed image, and has no thumbnail
    for limits in ({"min_tiles": 7}, {"max_tiles": 0}, {"min_tiles": 3, "max_tiles": 2}, {"max_tiles": 10**9}):
        with pytest.raises(CheckpointError, match="tiles"):
            load(QWEN, **limits)
    with pytest.raises(CheckpointError, match="^family 'llava' has no limits of tiles: leave them out$"):
        load(GOLDEN / "llava-clip-llama", max_tiles=3)


def test_limits_of_tiles_in_commands():
    def answer(*options):
        result = CliRunner().invoke(
            main, ["generate", str(QWEN), "-p", "Hi", "-i", str(PHOTO), "--json", "--max-tokens", "1", *options]
        )
        return json.loads(result.stdout)["image_tokens"] if result.exit_code == 0 else (result.exit_code, result.stderr)

    assert (answer("--max-tiles", "1"), answer("--min-tiles", "5", "--max-tiles", "5")) == (4, 24)
    assert answer("--min-tiles", "9") == (1, "Error: an image cannot be cut into 9 tiles at least and 5 at most\n")
    assert answer("--max-tiles", "0")[0] == 2


def test_what_info_says():
    assert {key: describe(INTERNLM)["vision"][key] for key in ("tile_tokens", "max_image_tokens")} == {
        "tile_tokens": 4, "max_image_tokens": 28,
    }  # fmt: skip
    checked = describe(PHI, check=True)
    assert (checked["family"], checked["image_token"], checked["unused"]) == ("internvl_chat", "<IMG_CONTEXT>", 0)


@pytest.mark.parametrize("folder", [NATIVE, SIX, INTERNLM])
def test_positions_are_those_of_the_size(folder):
    """The file's own size gives the file's own rows; another size as many as it has patches."""
    vision = load(folder)[0].vision
    side, patch = vision.config.image_size, vision.config.patch_size
    assert (vision._positions(side, side) == vision.pos_embed).all()
    for count in (1, 2, 3, 7, 12):
        assert vision._positions(count * patch, count * patch).shape == (1 + count**2, vision.config.hidden_size)
    for wrong in ((side, side + patch), (patch - 1, patch - 1)):
        with pytest.raises(ImageError, match="the vision tower takes"):
            vision._positions(*wrong)


def test_each_of_a_towers_facts_counts():
    """Without any of them the golden would be missed: they change what the tower gives."""
    model, processor = load(SIX)
    pixels = processor("Hi", [PHOTO]).pixel_values
    given, blocks = model.vision(pixels), model.config.vision.blocks
    changes = {
        "qk_norm": lambda: [block.attn.pop("q_norm") for block in model.vision.blocks],
        "layer_scale": lambda: [block.pop("ls1") for block in model.vision.blocks],
    }
    for change in changes.values():
        model, _ = load(SIX)
        change()
        assert mx.abs(model.vision(pixels) - given).max() > 1e-2
    assert blocks.norm_type == "rms_norm"


def test_settings_of_images_that_make_no_tiles(copy_of):
    folder = copy_of(NATIVE.name)
    file = folder / "preprocessor_config.json"
    content = json.loads(file.read_text())
    for changes, message in (
        ({"size": {"height": 24, "width": 30}}, "tiles need as size equal height and width"),
        ({"max_patches": 0}, "a whole number of tiles, 1 to 1000, not 0"),
        ({"min_patches": 7}, "7 tiles at least and 6 at most"),
        ({"image_processor_type": "CLIPImageProcessor"}, "gives no tiles, family 'internvl' needs them"),
        (
            {"image_processor_type": "LlavaNextImageProcessor", "crop_size": 336},
            "gives tiles, family 'internvl' needs others",
        ),
    ):
        edit_json(file, **{**content, **changes})
        with pytest.raises(CheckpointError, match=message):
            load(folder)
    file.unlink()
    model, processor = load(folder)
    assert generate(model, processor, "Hi", max_tokens=2)
    with pytest.raises(CheckpointError, match="how it takes images is unknown"):
        processor("Hi", [PHOTO])
    with pytest.raises(CheckpointError, match="has no limits of tiles"):
        load(folder, max_tiles=3)


def test_folders_with_vocab_json_that_is_broken(copy_of):
    folder = copy_of(QWEN.name)
    (folder / "merges.txt").write_text("#version: 0.2\na b c d\n")
    with pytest.raises(CheckpointError, match=r"vocab.json or merges.txt is broken"):
        load(folder)
    (folder / "vocab.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"vocab.json or merges.txt is broken"):
        read_byte_level(folder)


def test_it_cannot_be_trained_yet(tmp_path):
    model, processor = load(LLAMA)
    settings = Settings(stage="full", steps=1)
    with pytest.raises(CheckpointError, match="joins image features, which cannot be trained yet"):
        Trainer(model, processor, [], tmp_path / "run", settings)


def test_a_tokenizers_own_chat_template_is_not_used():
    assert (
        "im_start" in json.loads((LLAMA / "tokenizer_config.json").read_text()).get("chat_template", "")
        or (LLAMA / "chat_template.jinja").is_file()
    )
    assert "im_start" not in text_of(load(LLAMA)[1], [said("user", SHAPES, "Hi")])


def test_a_native_folder_without_a_head_reads_its_embeddings_as_one(tmp_path):
    """transformers' class ties them unless config.json says otherwise, and then saves no head."""
    shutil.copytree(NATIVE, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = {name: array for name, array in mx.load(str(file)).items() if not name.endswith("lm_head.weight")}
    mx.save_safetensors(str(file), tensors, {"format": "pt"})
    with pytest.raises(CheckpointError, match="lm_head"):
        load(tmp_path / "model")
    edit_json(tmp_path / "model" / "config.json", tie_word_embeddings=...)
    assert load(tmp_path / "model")[0].config.decoder.tie_word_embeddings
    assert not load(NATIVE)[0].config.decoder.tie_word_embeddings
