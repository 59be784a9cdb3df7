"""LLaVA as its authors write it: prompts by name, the tower wherever it lies, deltas, and the names and shapes of every
repository that the specification lists."""

import json
import os
import re
import shutil
import struct
from dataclasses import fields
from functools import partial
from math import erf, prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import PHOTO, SHAPES, check_fields, edit_json, with_paths
from click.testing import CliRunner
from hub import run_program, serve
from llava_original import SPECS, choose_resolution
from PIL import Image
from reference import CASES, GOLDEN, STEPS

from mlx_vlm_mini import Chat, load, stream_generate
from mlx_vlm_mini.checkpoints.assembly import open_model
from mlx_vlm_mini.checkpoints.describe import describe
from mlx_vlm_mini.checkpoints.folder import TensorInfo, open_checkpoint
from mlx_vlm_mini.checkpoints.load import plan
from mlx_vlm_mini.checkpoints.pickled import read_pickled
from mlx_vlm_mini.cli.main import main
from mlx_vlm_mini.config import Prescribed
from mlx_vlm_mini.convert import convert
from mlx_vlm_mini.data.examples import Example, encode
from mlx_vlm_mini.errors import CheckpointError, PromptError
from mlx_vlm_mini.families import find_family, llava, llava_normed, llava_original
from mlx_vlm_mini.families.parts.conversations import (
    CONVERSATIONS,
    chat_template,
    choose_conversation,
    find_conversation,
)
from mlx_vlm_mini.preprocessing.anyres import choose_pinpoint, count_tokens
from mlx_vlm_mini.projectors.arrange import pack
from mlx_vlm_mini.text.template import ChatTemplate
from mlx_vlm_mini.train.save import save_trained

INTERN, V0, V15, V16 = sorted(SPECS)


# What the prompts are


def rendered(name: str, *, system: str | None = None, image: str = "<image>\n") -> str:
    """Two turns and an image, as the template of a name gives them."""
    messages: list[Any] = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        {"role": "user", "content": [{"type": "text", "text": "Why?"}]},
    ]
    if system is not None:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    return "<image>".join(ChatTemplate(chat_template(find_conversation(name), image), {}, "<image>").render(messages))


HUMAN = "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the human's questions."
SEES = "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, and assist the user with a variety of tasks using natural language."
PROMPTS = {
    "llava_v0": HUMAN + "###Human: <image>\nWhat?###Assistant: A cat.###Human: Why?###Assistant:",
    "llava_v1": HUMAN + " USER: <image>\nWhat? ASSISTANT: A cat.</s>USER: Why? ASSISTANT:",
    "vicuna_v1": HUMAN.replace("human", "user") + " USER: <image>\nWhat? ASSISTANT: A cat.</s>USER: Why? ASSISTANT:",
    "mistral_instruct": "[INST] <image>\nWhat? [/INST] A cat. </s>[INST] Why? [/INST]",
    "llava_llama_2": f"[INST] <<SYS>>\n{SEES}\n<</SYS>>\n\n<image>\nWhat? [/INST] A cat. </s><s>[INST] Why? [/INST]",
    "chatml_direct": "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nWhat?<|im_end|>"
    "<|im_start|>assistant\nA cat.<|im_end|><|im_start|>user\nWhy?<|im_end|><|im_start|>assistant\n",
    "llava_llama_3": f"<|start_header_id|>system<|end_header_id|>\n\n{SEES}<|eot_id|>"
    "<|start_header_id|><|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat?<|eot_id|>"
    "<|start_header_id|><|start_header_id|>assistant<|end_header_id|>\n\nA cat.<|eot_id|>"
    "<|start_header_id|><|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(PROMPTS))
def test_prompts(name):
    """Worked out by hand from `get_prompt` of the authors' conversation.py."""
    assert rendered(name) == PROMPTS[name]


def test_the_other_names_of_prompts():
    assert rendered("v0") == PROMPTS["llava_v0"] and rendered("v1") == PROMPTS["llava_v1"]
    assert rendered("mistral") == PROMPTS["mistral_instruct"] and rendered("chatml") == PROMPTS["chatml_direct"]
    assert rendered("llama_2").replace("helpful, respectful", "") != rendered("llava_llama_2")
    assert rendered("mpt").startswith(
        "<|im_start|>system\nA conversation between a user and an LLM-based AI assistant."
    )
    with pytest.raises(CheckpointError, match="there is no conversation 'v9'; known: chatml, chatml_direct, llama_2, "):
        find_conversation("v9")


def test_a_system_message_takes_the_place_of_the_own_one():
    assert rendered("v1", system="Be brief.") == PROMPTS["llava_v1"].replace(HUMAN, "Be brief.")
    assert rendered("mistral", system="Be brief.") == PROMPTS["mistral_instruct"].replace(
        "<image>", "<<SYS>>\nBe brief.\n<</SYS>>\n\n<image>"
    )
    assert rendered("chatml", system="Be brief.").startswith("<|im_start|>system\nBe brief.<|im_end|><|im_start|>user")


def test_marks_around_images():
    text = rendered("v0", image="<im_start><image><im_end>\n")
    assert text == PROMPTS["llava_v0"].replace("<image>", "<im_start><image><im_end>")


@pytest.mark.parametrize("name", sorted(CONVERSATIONS))
def test_messages_that_a_prompt_has_no_place_for(name):
    template = ChatTemplate(chat_template(find_conversation(name), "<image>\n"), {}, "<image>")
    said = [{"role": role, "content": [{"type": "text", "text": role}]} for role in ("user", "tool")]
    with pytest.raises(PromptError, match="no tool message can stand here"):
        template.render(said)


NAMES = [
    ("liuhaotian/LLaVA-7b-delta-v0", "llava_v0"), ("liuhaotian/LLaVA-13b-delta-v1-1", "llava_v1"),
    ("liuhaotian/llava-llama-2-13b-chat-lightning-preview", "llava_llama_2"),
    ("liuhaotian/llava-v1-0719-336px-lora-merge-vicuna-13b-v1.3", "llava_v1"),
    ("liuhaotian/llava-v1.5-7b", "llava_v1"), ("liuhaotian/llava-v1.5-13b", "llava_v1"),
    ("liuhaotian/llava-v1.6-vicuna-7b", "llava_v1"), ("liuhaotian/llava-v1.6-mistral-7b", "mistral_instruct"),
    ("liuhaotian/llava-v1.6-34b", "chatml_direct"), ("/models/LLaVA-v1.5-7B/", "llava_v1"),
    ("lmms-lab/llama3-llava-next-8b", "llava_llama_3"),
    ("work_dirs/finetune_internvit6b_448_v1_5_vicuna13b", "llava_v1"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "conversation"), NAMES)
def test_the_prompt_by_the_models_name(name, conversation):
    assert choose_conversation({}, name) == conversation
    assert choose_conversation({"_name_or_path": name}, "/models/mine") == conversation
    assert choose_conversation({"_name_or_path": "x/mistral"}, name) == conversation


def test_the_prompt_of_the_folder_one_is_in(monkeypatch):
    monkeypatch.chdir(GOLDEN / V16)
    assert open_model(".").config["conversation"] == "mistral_instruct"


def test_the_prompt_of_a_model_without_a_telling_name():
    assert choose_conversation({}, "/models/v15/mine") == "llava_v0"
    for name in ("mine", *INTERN_REPOSITORIES):
        assert choose_conversation({"image_aspect_ratio": "pad", "_name_or_path": None}, name) == "llava_v1"


# What configs say

BASE = {"model_type": "llava", "mm_vision_tower": "openai/clip-vit-large-patch14", "mm_vision_select_layer": -2}


@pytest.mark.parametrize(
    ("hf", "family"),
    [
        (BASE, llava_original), ({"model_type": "llava_llama"}, llava_original), ({"model_type": "llava"}, llava),
        ({"model_type": "llava_mistral"}, llava_original), ({**BASE, "model_type": "llama"}, llava_original),
        ({"model_type": "llava", "mm_projector_type": "linear"}, llava_original),
    ],
)  # fmt: skip
def test_it_is_told_from_hugging_faces(hf, family):
    assert find_family(hf) is family


@pytest.mark.parametrize(
    ("hf", "expected"),
    [
        ({}, {"projector.num_layers": 1, "vision.image_size": 224, "vision.num_features": 256, "tile_merge": "flat",
              "image_grid_pinpoints": None, "prescribed.stop": "###", "vision.depth": 23}),
        ({"mm_projector_type": "mlp2x_gelu"}, {"projector.num_layers": 2, "projector.hidden_act": "gelu"}),
        ({"mm_projector_type": "mlp4x_gelu"}, {"projector.num_layers": 4}),
        ({"mm_projector_type": "identity", "hidden_size": 1024}, {"projector.num_layers": 0}),
        ({"mm_vision_tower": "openai/clip-vit-large-patch14-336"}, {"vision.image_size": 336, "vision.num_features": 576}),
        ({"mm_vision_select_feature": "cls_patch", "mm_vision_select_layer": -1},
         {"vision.num_features": 257, "vision.depth": 24}),
        ({"image_aspect_ratio": "pad"}, {"prescribed.stop": None, "prescribed.end_token": "</s>"}),
        ({"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[224, 448], [672, 224]], "mm_patch_merge_type": "spatial"},
         {"image_grid_pinpoints": ((448, 224), (224, 672)), "tile_merge": "grid"}),
        ({"image_aspect_ratio": "anyres", "image_grid_pinpoints": "[(224, 448)]", "mm_patch_merge_type": "spatial_unpad"},
         {"image_grid_pinpoints": ((448, 224),), "tile_merge": "unpad_floor"}),
        ({"model_type": "llava_mistral", "sliding_window": None, "rope_theta": 1e6},
         {"decoder.num_key_value_heads": 8, "decoder.rope_theta": 1e6, "decoder.layer_types": ("full_attention",) * 32}),
        ({"mm_use_im_start_end": True}, {"prescribed.extra_tokens": ("<im_patch>", "<im_start>", "<im_end>")}),
        ({"mm_use_im_start_end": True, "mm_use_im_patch_token": False},
         {"prescribed.extra_tokens": ("<im_start>", "<im_end>")}),
        ({"conversation": "mistral_instruct"}, {"prescribed.end_token": "</s>"}),
        ({"vision_config": {"hidden_size": 64, "num_attention_heads": 4}}, {"vision.hidden_size": 64, "vision.image_size": 224}),
        ({"mm_projector_type": "mlp2x_gelu_ln"}, {"projector.num_layers": 2, "projector.norm_eps": 1e-5}),
        ({"mm_projector_type": "mlp3x_gelu"}, {"projector.norm_eps": None}),
        ({"vision_config": {"model_type": "intern_vit_6b"}, "mm_vision_select_layer": -4},
         {"vision.hidden_size": 3200, "vision.image_size": 224, "vision.num_features": 256, "vision.feature_layers": (45,),
          "vision.resample_positions": True, "vision.blocks.norm_type": "rms_norm", "vision.blocks.qk_norm_eps": 1e-6,
          "vision.blocks.layer_scale": True, "vision.blocks.qkv_bias": False, "vision.layer_norm_eps": 1e-6}),
        ({"vision_config": {"model_type": "intern_vit_6b"}, "mm_vision_select_feature": "cls_patch"},
         {"vision.num_features": 257}),
    ],
)  # fmt: skip
def test_what_configs_say_and_leave_out(hf, expected):
    check_fields(llava_original.config({**BASE, **hf}), expected)


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        ({"mm_projector_type": "qformer"}, "mm_projector_type 'qformer' is not known"),
        ({"mm_projector_type": "two_mlp"}, "mm_projector_type 'two_mlp' is of InternVL-14B's QLLaMA, not supported"),
        ({"mm_projector_type": "mlp2x_gelu2"}, "mm_projector_type 'mlp2x_gelu2' is not known"),
        ({"vision_config": {"model_type": "intern_vit_6b"}, "image_aspect_ratio": "anyres"},
         "image_aspect_ratio 'anyres' is not known .known: square, pad"),
        ({"mm_projector_type": "mlp9x_gelu"}, "mm_projector_type 'mlp9x_gelu' is not known"),
        ({"mm_projector_type": "identity"}, "features of 1024 numbers are no embeddings of 4096"),
        ({"image_aspect_ratio": "anyres_max_9"}, "image_aspect_ratio 'anyres_max_9' is not known .known: square, pad, anyres"),
        ({"mm_patch_merge_type": "maxpool"}, "mm_patch_merge_type 'maxpool' is not known .known: flat, spatial, spatial_unpad"),
        ({"mm_vision_select_feature": "cls"}, "mm_vision_select_feature 'cls' is not known"),
        ({"mm_vision_select_layer": None}, "mm_vision_select_layer None is not known"),
        ({"mm_vision_select_layer": 40}, "vision feature layer 40 does not exist"),
        ({"image_aspect_ratio": "anyres"}, "image_grid_pinpoints must be a list"),
        ({"image_aspect_ratio": "anyres", "image_grid_pinpoints": "(1x1),...,(6x6)"}, "is no list of sizes"),
        ({"image_aspect_ratio": "anyres", "image_grid_pinpoints": "open('x')"}, "is no list of sizes"),
        ({"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[224, 300]]}, r"has \[300, 224\]"),
        ({"image_aspect_ratio": ["pad"]}, "image_aspect_ratio .* is not known"),
        ({"conversation": "nope"}, "there is no conversation 'nope'"),
        ({"mm_vision_tower": "x/y"}, "names the vision tower 'x/y', whose own config.json is needed"),
    ],
)  # fmt: skip
def test_configs_that_make_no_model(hf, message):
    with pytest.raises(CheckpointError, match=message):
        llava_original.config({**BASE, **hf})


def test_every_prescription_has_a_reader():
    package = Path(llava_original.__file__).parents[1]
    code = "".join((package / name).read_text() for name in ("checkpoints/load.py", "processor.py"))
    assert [field.name for field in fields(Prescribed) if f"prescribed.{field.name}" not in code] == []


# Where the parts lie


def logits(folder: Path, **options: Any) -> np.ndarray:
    model, processor = load(folder, **options)
    return np.array(model(processor(with_paths(CASES["two_images"]))))


@pytest.mark.parametrize("name", sorted(SPECS))
def test_a_converted_folder_stands_alone(name, tmp_path):
    """Under a name that tells nothing. (That it answers as before is in tests/convert/.)"""
    convert(GOLDEN / name, tmp_path / "once")
    convert(tmp_path / "once", tmp_path / "mine")
    assert {file.suffix for file in (tmp_path / "mine").iterdir()} == {".json", ".safetensors", ".model"}
    assert open_checkpoint(tmp_path / "mine").is_mlx
    described = describe(tmp_path / "mine", check=True)
    assert described["family"] == "llava_original" and described["format"] == "mlx"
    assert described["conversation"] == open_model(GOLDEN / name).config["conversation"]


def test_the_other_half_of_a_pair_of_towers_stays_where_it_is():
    tensors = open_model(GOLDEN / V15).tensors
    assert not [name for name in tensors if "text_model" in name or "logit_scale" in name]
    assert llava_original.TOWER + "vision_model.pre_layrnorm.weight" in tensors


def test_a_tower_given_by_hand(copy_of, tmp_path):
    folder = copy_of(V15)
    (folder / "tower").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=f"{folder} needs the vision tower 'tower': .*--vision-tower"):
        load(folder)
    expected = logits(GOLDEN / V15)
    assert (logits(folder, vision_tower=tmp_path / "elsewhere") == expected).all()
    for long in ("a" * 300, "~/" + "a" * 300):  # longer than a file system takes
        edit_json(folder / "config.json", mm_vision_tower=long)
        with pytest.raises(CheckpointError, match="tower"):
            open_model(folder)
    for outside in (str(tmp_path / "elsewhere"), "../elsewhere", "tower/../../elsewhere"):
        edit_json(folder / "config.json", mm_vision_tower=outside)
        with pytest.raises(CheckpointError, match="outside its folder: where that is yours, give it as vision tower"):
            load(folder)
    convert(folder, tmp_path / "out", vision_tower=str(tmp_path / "elsewhere"), conversation="llava_v1")
    (tmp_path / "elsewhere").rename(tmp_path / "gone")
    np.testing.assert_allclose(logits(tmp_path / "out"), expected, atol=1e-4)


def test_towers_that_cannot_be_used(copy_of, tmp_path):
    folder = copy_of(V0)
    for changes, message in (
        (
            {"model_type": "siglip_vision_model"},
            "is a siglip_vision_model; original LLaVA checkpoints take CLIP or InternViT",
        ),
        ({"model_type": "internvl", "qllama_config": {}}, "the vision tower is a internvl;"),
        ({"quantization": {"bits": 4, "group_size": 64}}, "was converted to MLX's format"),
        ({"image_size": 56}, r"position_embedding.weight has shape \[10, 48\], config.json asks for \[17, 48\]"),
    ):
        shutil.copytree(folder / "tower", tmp_path / "other", dirs_exist_ok=True)
        edit_json(tmp_path / "other/config.json", **changes)
        with pytest.raises(CheckpointError, match=message):
            load(folder, vision_tower=tmp_path / "other")
    tensors = mx.load(str(folder / "tower/model.safetensors"))
    mx.save_safetensors(
        str(tmp_path / "other/model.safetensors"),
        {"x": tensors["embeddings.class_embedding"] if "embeddings.class_embedding" in tensors else mx.zeros(3)},
        {"format": "pt"},
    )
    edit_json(tmp_path / "other/config.json", image_size=42)
    with pytest.raises(CheckpointError, match="has no vision tower: none of its tensors is called vision_model"):
        load(folder, vision_tower=tmp_path / "other")
    edit_json(folder / "config.json", mm_vision_tower=...)
    edit_json(folder / "config.json", mm_projector_type="linear")
    with pytest.raises(CheckpointError, match="config.json names no vision tower"):
        load(folder)


def test_towers_by_both_layouts_of_names(copy_of):
    """`vision_model.` in front, as on the Hub, or not, as transformers 5 writes a tower alone."""
    folder = copy_of(V0)
    file = folder / "tower/model.safetensors"
    tensors = dict(mx.load(str(file)))
    bare = {name.removeprefix("vision_model."): array for name, array in tensors.items()}
    for prefix in ("", "vision_model."):
        mx.save_safetensors(str(folder / "new.safetensors"), {prefix + k: v for k, v in bare.items()}, {"format": "pt"})
        (folder / "new.safetensors").replace(file)
        assert (logits(folder, conversation="v0") == logits(GOLDEN / V0)).all()


def test_a_tower_inside_counts(copy_of):
    """One given by hand then only says how large it is."""
    folder = copy_of(V16)
    shutil.copytree(GOLDEN / V0 / "tower", folder / "other")
    with pytest.raises(CheckpointError, match="which is no .* that tiles of 42x42 pixels fill"):
        load(folder, vision_tower=folder / "other")
    shutil.rmtree(folder / "other")
    (folder / "tower").rename(folder / "other")
    assert (logits(folder, vision_tower=folder / "other", conversation="mistral") == logits(GOLDEN / V16)).all()


def test_a_known_tower_inside_needs_nothing_else(copy_of, tmp_path):
    """Of CLIP-L/14 sizes and settings are known: nothing is asked of the Hub."""
    config = llava_original.config({**BASE, "image_aspect_ratio": "pad"})
    settings = config.prescribed.image_processor
    assert settings["size"] == {"shortest_edge": 224} and settings["do_pad"] is True
    assert settings["crop_size"] == {"height": 224, "width": 224}


def test_the_projector_may_lie_alone(copy_of):
    """In mm_projector.bin; where the other files hold one, theirs counts."""
    names = read_pickled(GOLDEN / V0 / "mm_projector.bin")
    assert set(names) == {"model.mm_projector.weight", "model.mm_projector.bias"}
    folder = copy_of(V15)
    shutil.copyfile(GOLDEN / V0 / "mm_projector.bin", folder / "mm_projector.bin")
    assert (logits(folder) == logits(GOLDEN / V15)).all()
    folder = copy_of(V0)
    (folder / "mm_projector.bin").unlink()
    with pytest.raises(CheckpointError, match="lacks 2 tensors"):
        load(folder)


def test_a_missing_layer_of_the_projector_is_called_by_its_name(copy_of):
    folder = copy_of(V16)
    for file in folder.glob("model-*.safetensors"):
        tensors = {k: v for k, v in mx.load(str(file)).items() if k != "model.layers.1.mlp.up_proj.weight"}
        mx.save_safetensors(str(folder / "new.safetensors"), tensors, {"format": "pt"})
        (folder / "new.safetensors").replace(file)
    with pytest.raises(CheckpointError, match=r"lacks 1 tensor \(model.layers.1.mlp.up_proj.weight\)"):
        load(folder)


@pytest.mark.parametrize(
    ("keep", "message"),
    [("mm_projector.bin", "holds a projector alone"), ("adapter_config.json", r"holds adapters alone \(LoRA\)")],
)
def test_parts_that_are_no_model(copy_of, keep, message):
    folder = copy_of(V0)
    (folder / "adapter_config.json").write_text("{}")
    for name in {"pytorch_model.bin", "mm_projector.bin", "adapter_config.json"} - {keep}:
        (folder / name).unlink()
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_options_that_have_nothing_to_do():
    plain = GOLDEN / "llava-clip-llama"
    for option in ("vision_tower", "conversation"):
        with pytest.raises(CheckpointError, match=f"takes no {option.replace('_', ' ')} of yours"):
            load(plain, **{option: "x"})


def test_the_tower_comes_from_the_hub(tmp_path):
    """A model of the Hub that names a tower of the Hub: by name, converted, and alone without a network."""
    served, tower = tmp_path / "served", tmp_path / "clip"
    shutil.copytree(GOLDEN / V15, served)
    (served / "tower").rename(tower)
    (served / "expected.npz").unlink()
    edit_json(served / "config.json", mm_vision_tower="tiny/clip")
    with np.load(GOLDEN / V15 / "expected.npz") as expected:
        tokens = expected["image/token_ids"].tolist()
    ask = ("-p", CASES["image"][0]["content"][1]["text"], "-i", PHOTO, "--max-tokens", STEPS, "--json")
    with serve() as (address, kind):
        kind.folders.update({"tiny/llava-v1.5-tiny": served, "tiny/clip": tower})

        run = partial(run_program, address, tmp_path)
        answered = run("generate", "tiny/llava-v1.5-tiny", *ask)
        assert answered.returncode == 0, answered.stderr
        assert json.loads(answered.stdout)["token_ids"] == tokens
        assert run("convert", "tiny/llava-v1.5-tiny", "out").returncode == 0
        assert json.loads(run("generate", "out", *ask, HF_HUB_OFFLINE="1").stdout)["token_ids"] == tokens
        kind.folders.pop("tiny/clip")
        failed = run("generate", "tiny/llava-v1.5-tiny", *ask, HF_HOME=str(tmp_path / "empty"))
        last = failed.stderr.splitlines()[-1]
        assert failed.returncode == 1 and failed.stdout == ""
        assert last.startswith("Error: tiny/llava-v1.5-tiny needs the vision tower 'tiny/clip': tiny/clip is neither")


def test_what_the_hub_is_asked_for(tmp_path):
    """Of a model with its tower inside, headers and the tower's small files; of a delta nothing but small files."""
    served, tower = tmp_path / "served", tmp_path / "clip"
    shutil.copytree(GOLDEN / V16, served)
    (served / "tower").rename(tower)
    edit_json(served / "config.json", mm_vision_tower="tiny/clip")
    with serve() as (address, kind):
        kind.folders.update({"tiny/llava-v1.6-mistral": served, "tiny/clip": tower, "tiny/LLaVA-7b-delta-v0": served})
        run = partial(run_program, address, tmp_path)
        described = run("info", "tiny/llava-v1.6-mistral", "--check", "--json")
        assert described.returncode == 0, described.stderr
        local = describe(GOLDEN / V16, check=True)
        assert {**json.loads(described.stdout), "model": ""} == {**json.loads(json.dumps(local)), "model": ""}
        for command in (["info"], ["convert"], ["generate", "-p", "Hi"]):
            failed = run(
                command[0], "tiny/LLaVA-7b-delta-v0", *command[1:], *(["out"] if command[0] == "convert" else [])
            )
            assert failed.returncode == 1 and "holds the difference to the first LLaMA's weights" in failed.stderr
        assert not [
            each for each in kind.requests if each[0] == "GET" and each[1].endswith(".safetensors") and not each[2]
        ]


def test_the_commands_take_tower_and_conversation(copy_of, tmp_path):
    folder = copy_of(V15)
    (folder / "tower").rename(tmp_path / "elsewhere")
    given = ["--vision-tower", str(tmp_path / "elsewhere"), "--conversation", "v0"]
    run = CliRunner().invoke
    described = run(main, ["info", str(folder), "--check", "--json", *given])
    assert described.exit_code == 0, described.output
    assert json.loads(described.stdout)["conversation"] == "v0"
    answers = []
    for options in (given, given[:2]):
        answered = run(
            main, ["generate", str(folder), "-p", "Hi", "-i", str(PHOTO), "--max-tokens", "4", "--json", *options]
        )
        assert answered.exit_code == 0, answered.output
        answers.append(json.loads(answered.stdout)["prompt_tokens"])
    assert answers[0] != answers[1]
    chatted = run(main, ["chat", str(folder), "-i", str(PHOTO), "--max-tokens", "4", *given], input="Hi\nMore\n/quit\n")
    assert chatted.exit_code == 0, chatted.output
    converted = run(main, ["convert", str(folder), str(tmp_path / "out"), *given])
    assert converted.exit_code == 0, converted.output
    assert json.loads((tmp_path / "out/config.json").read_text())["conversation"] == "v0"
    refused = run(main, ["info", str(folder), *given[:3], "v7"])
    assert refused.exit_code == 1 and "there is no conversation 'v7'" in refused.output


# Deltas


@pytest.fixture
def delta(copy_of, tmp_path):
    """The v0 golden less random weights of a smaller vocabulary; and those."""
    folder, base = copy_of(V0), tmp_path / "llama"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    mx.random.seed(3)
    differences, weights = {}, {}
    for name, info in read_pickled(folder / "pytorch_model.bin").items():
        array = info.read()
        if not name.endswith("inv_freq"):
            rows = 440 if name in ("model.embed_tokens.weight", "lm_head.weight") else array.shape[0]
            own = mx.random.normal((rows, *array.shape[1:])) * 0.05
            own = (own + array[:rows] if array.ndim == 1 else own).astype(mx.float16)
            weights[name] = own
            array = array.at[:rows].add(-own)
        differences[name] = array
    (folder / "pytorch_model.bin").unlink()
    mx.save_safetensors(str(folder / "model.safetensors"), differences, {"format": "pt"})
    mx.save_safetensors(str(base / "model.safetensors"), weights, {"format": "pt"})
    return folder, base, differences, weights


def test_a_delta_names_what_it_lacks(delta, tmp_path):
    folder, *_ = delta
    for action in (lambda: load(folder), lambda: describe(folder), lambda: convert(folder, tmp_path / "out")):
        with pytest.raises(CheckpointError, match="the difference to the first LLaMA's weights .* --base LLAMA"):
            action()
    assert not (tmp_path / "out").exists()
    edit_json(folder / "config.json", hidden_size=4096)
    with pytest.raises(CheckpointError, match=re.escape("weights (7B), to which")):
        load(folder)


def test_a_delta_is_applied(delta, tmp_path):
    """Tensor by tensor in the delta's own type; rows that the base lacks are the model's own, as in apply_delta.py."""
    folder, base, differences, weights = delta
    convert(folder, tmp_path / "out", base=base)
    whole = open_checkpoint(tmp_path / "out")
    for name, difference in differences.items():
        expected = np.array(difference)
        if name in weights:
            rows = len(np.array(weights[name]))
            expected[:rows] = expected[:rows] + np.array(weights[name])
        assert whole.tensors[name].dtype == ("F16" if "inv_freq" not in name else "F32")
        np.testing.assert_array_equal(np.array(whole.read(name)), expected, err_msg=name)
    np.testing.assert_allclose(logits(tmp_path / "out"), logits(GOLDEN / V0), atol=0.3)  # half precision, twice
    assert describe(tmp_path / "out", check=True)["conversation"] == "llava_v0"
    with pytest.raises(CheckpointError, match="holds whole weights, so nothing is to be added"):
        convert(tmp_path / "out", tmp_path / "more", base=base)


def test_the_command_adds_a_base(delta, tmp_path):
    folder, base, *_ = delta
    done = CliRunner().invoke(main, ["convert", str(folder), str(tmp_path / "out"), "--base", str(base)])
    assert done.exit_code == 0, done.output
    assert load(tmp_path / "out")[0].config.family == "llava_original"


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (
            "model.layers.0.mlp.up_proj.weight",
            (3, 4),
            r"up_proj.weight has shape \[3, 4\] there, shape \[72, 48\] here",
        ),
        ("lm_head.weight", (500, 48), r"lm_head.weight has shape \[500, 48\] there, shape \[443, 48\] here"),
        ("model.layers.7.mlp.up_proj.weight", (72, 48), "there, no such tensor here"),
        ("model.norm.weight", None, "it lacks model.norm.weight"),
    ],
)
def test_another_base(delta, tmp_path, name, shape, message):
    folder, base, _, weights = delta
    changed = {key: value for key, value in weights.items() if key != name}
    if shape is not None:
        changed[name] = mx.zeros(shape, dtype=mx.float16)
    mx.save_safetensors(str(base / "model.safetensors"), changed, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"is not what .* was taken from: .*{message}"):
        convert(folder, tmp_path / "out", base=base)


# What is in a prompt


def test_text_is_cut_at_images():
    """Each piece becomes tokens by itself; what only looks like an image stays text."""
    _, processor = load(GOLDEN / V15)
    inputs = processor(["a", PHOTO, "b", SHAPES, "c"])
    ids, slots = np.array(inputs.input_ids[0]), inputs.slots
    assert [image.tokens for image in inputs.images] == [16, 16] and slots.sum() == 32
    assert ids[0] == 1 and (ids == 1).sum() == 1  # one begin token
    first, second = np.flatnonzero(slots)[0], np.flatnonzero(slots)[16]
    between = processor.tokenizer.encode("\nb", add_special_tokens=False)
    assert ids[first + 16 : second].tolist() == between
    assert not processor("What is <image>?").slots.any()
    said = [
        {"role": "user", "content": [{"type": "image", "image": PHOTO}, {"type": "text", "text": "?"}]},
        {"role": "assistant", "content": "An <image> of a cat."},
        {"role": "user", "content": "Why?"},
    ]
    inputs = processor(said)
    assert inputs.slots.sum() == 16
    assert "An <image> of a cat." in processor.tokenizer.decode(np.array(inputs.input_ids[0])[~inputs.slots].tolist())


def test_marks_take_the_next_free_ids(copy_of):
    folder = copy_of(V0)
    (folder / "added_tokens.json").unlink()
    tokenizer = load(folder)[1].tokenizer
    assert [tokenizer.token_to_id(token) for token in ("<im_start>", "<im_end>", "<im_patch>")] == [440, 441, None]
    edit_json(folder / "config.json", mm_use_im_patch_token=...)
    assert (logits(folder) == logits(GOLDEN / V0)).all()  # <im_patch> comes first
    (folder / "added_tokens.json").write_text(json.dumps({f"<{i}>": 440 + i for i in range(3)}))
    with pytest.raises(CheckpointError, match="asks for <im_patch> in prompts, and no embedding is left for it"):
        load(folder)


def test_a_conversation_whose_end_the_tokenizer_lacks(copy_of):
    with pytest.raises(CheckpointError, match=r"the tokenizer lacks <\|im_end\|>, which ends an answer"):
        load(copy_of(V15), conversation="chatml")


def test_hashes_end_an_answer(monkeypatch):
    """v0 has no end token of its own."""
    model, processor = load(GOLDEN / V0)
    assert processor.stops == ("###",) and processor.eos_token_ids == {2}
    wanted = processor.tokenizer.encode("Yes### Human", add_special_tokens=False)

    following = iter([*wanted, *[0] * 9])  # tokens are computed one ahead
    text = ""
    chunks = stream_generate(
        model, processor, "Hi", sampler=lambda _: mx.array([next(following)]), max_tokens=len(wanted)
    )
    for chunk in chunks:
        text += chunk.text
    assert text == "Yes" and chunk.finish_reason == "stop"


@pytest.mark.parametrize("name", sorted(SPECS))
def test_later_turns_equal_a_fresh_run(name):
    model, processor = load(GOLDEN / name)
    chat, reused = Chat(model, processor, max_tokens=6), []
    for turn in (["What is ", PHOTO, "?"], "Which one?", [SHAPES, "and ", PHOTO, " too?"], "Why?"):
        chunks = list(chat.send(turn))
        fresh = list(stream_generate(model, processor, chat.messages[:-1], max_tokens=len(chunks)))
        assert [chunk.token for chunk in chunks] == [chunk.token for chunk in fresh]
        np.testing.assert_allclose([c.logprob for c in chunks], [c.logprob for c in fresh], atol=1e-4)
        reused.append(chunks[-1].stats.cached_tokens)
    assert reused == sorted(set(reused)) and reused[0] == 0


PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def test_tiles_are_chosen_and_counted_as_the_authors_do():
    """Ties go to the first by width and height; what is a hair below a whole number is cut off."""
    turned = [(height, width) for width, height in PINPOINTS]
    rng = np.random.default_rng(3)
    photos = np.exp(rng.uniform(np.log(50), np.log(4000), (500, 2))).astype(int)
    ties = 0
    for width, height in [*photos.tolist(), (336, 336), (1000, 1000), (55, 88)]:
        best = choose_resolution((width, height), PINPOINTS)
        assert choose_pinpoint((height, width), turned) == best[::-1]
        ties += choose_pinpoint((height, width), [tuple(each) for each in PINPOINTS]) != best[::-1]
        tokens = count_tokens((height, width), turned, tile_size=336, side=24, merge="unpad_floor")
        features = mx.zeros((1 + prod(best) // 336**2, 576, 1))
        packed = pack(features, mx.zeros(1), (height, width), turned, tile_size=336, merge="unpad_floor")
        assert len(packed) == tokens
    assert choose_pinpoint((336, 336), turned) == (672, 336) and ties > 0
    for merge, rows in (("unpad_floor", 14), ("unpad", 16)):  # 220 * (72 / 1056) is a hair below 15
        assert count_tokens((220, 1056), turned, tile_size=336, side=24, merge=merge) == 576 + rows * 73


def test_other_ways_to_merge_tiles(copy_of):
    """Without bars and newlines: as many tokens as patches."""
    for merge in ("spatial", "flat"):
        folder = copy_of(V16)
        edit_json(folder / "config.json", mm_patch_merge_type=merge)
        with pytest.raises(
            CheckpointError, match=r"has 1 tensor \(model.image_newline\), which config.json has no place"
        ):
            load(folder)
        for file in folder.glob("model-*.safetensors"):
            tensors = {k: v for k, v in mx.load(str(file)).items() if k != "model.image_newline"}
            mx.save_safetensors(str(folder / "new.safetensors"), tensors, {"format": "pt"})
            (folder / "new.safetensors").replace(file)
        model, processor = load(folder)
        inputs = processor("Hi", [PHOTO])
        assert inputs.images[0].tokens == 16 * inputs.images[0].rows
        model(inputs)
        assert describe(folder)["vision"]["max_image_tokens"] == 16 * 5
        shutil.rmtree(folder)


# Training


def test_training_sees_what_a_prompt_is(tmp_path):
    _, processor = load(GOLDEN / V15)
    messages = (
        {"role": "user", "content": [{"type": "image", "image": PHOTO}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "The star is green."}]},
    )
    encoded = encode(processor, Example(messages, "here"))
    prompt = processor(list(messages[:1]))
    length = len(prompt.slots)
    assert encoded.input_ids[:length].tolist() == np.array(prompt.input_ids[0]).tolist()
    assert (encoded.slots[:length] == prompt.slots).all() and encoded.slots.sum() == 16
    assert not encoded.answer[:length].any()
    said = encoded.input_ids[encoded.answer].tolist()
    assert said[-1] == 2 and processor.tokenizer.decode(said).strip() == "The star is green."


def test_a_trained_folder_stands_alone(tmp_path):
    planned = plan(open_model(GOLDEN / V15))
    model, _ = load(GOLDEN / V15)
    planned.model.update(model.parameters())
    save_trained(planned, tmp_path / "mine")
    np.testing.assert_allclose(logits(tmp_path / "mine"), logits(GOLDEN / V15), atol=1e-4)


# Names and shapes of the real repositories


def linear(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def decoder_tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Llama's and Mistral's, by families.md."""
    C, wide, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    keys = C // config["num_attention_heads"] * config.get("num_key_value_heads", config["num_attention_heads"])
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, C), "model.norm.weight": (C,), "lm_head.weight": (vocabulary, C),
    }  # fmt: skip
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        found |= {
            layer + "self_attn.q_proj.weight": (C, C), layer + "self_attn.k_proj.weight": (keys, C),
            layer + "self_attn.v_proj.weight": (keys, C), layer + "self_attn.o_proj.weight": (C, C),
            layer + "mlp.gate_proj.weight": (wide, C), layer + "mlp.up_proj.weight": (wide, C),
            layer + "mlp.down_proj.weight": (C, wide), layer + "input_layernorm.weight": (C,),
            layer + "post_attention_layernorm.weight": (C,),
        }  # fmt: skip
    return found


def clip_tensors(prefix: str, side: int) -> dict[str, tuple[int, ...]]:
    """CLIP-L/14's vision tower, by families.md."""
    found: dict[str, tuple[int, ...]] = {
        prefix + "embeddings.class_embedding": (1024,), prefix + "embeddings.patch_embedding.weight": (1024, 3, 14, 14),
        prefix + "embeddings.position_embedding.weight": ((side // 14) ** 2 + 1, 1024),
    }  # fmt: skip
    for norm in ("pre_layrnorm", "post_layernorm"):
        found |= {f"{prefix}{norm}.weight": (1024,), f"{prefix}{norm}.bias": (1024,)}
    for i in range(24):
        layer = f"{prefix}encoder.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            found |= linear(f"{layer}self_attn.{name}", 1024, 1024)
        found |= linear(f"{layer}mlp.fc1", 4096, 1024) | linear(f"{layer}mlp.fc2", 1024, 4096)
        for norm in ("layer_norm1", "layer_norm2"):
            found |= {f"{layer}{norm}.weight": (1024,), f"{layer}{norm}.bias": (1024,)}
    return found


SEVEN = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
THIRTEEN = {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "vocab_size": 32000,
}
LARGE = "openai/clip-vit-large-patch14-336"
SMALL = "openai/clip-vit-large-patch14"
COMMON = {
    "model_type": "llava",
    "mm_vision_select_layer": -2,
    "mm_hidden_size": 1024,
    "mm_vision_select_feature": "patch",
}
NEXT = {**COMMON, "mm_vision_tower": LARGE, "mm_projector_type": "mlp2x_gelu", "image_aspect_ratio": "anyres",
        "mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": PINPOINTS}  # fmt: skip
REPOSITORIES = {  # config.json, whether the tower is inside, the conversation, tokens of an image or at most, parameters
    "LLaVA-7b-v0": (
        {**COMMON, **SEVEN, "vocab_size": 32003, "mm_vision_tower": SMALL, "mm_use_im_start_end": True}, False, "llava_v0",
        256, 6.74e9),
    "llava-llama-2-13b-chat-lightning-preview": (
        {**COMMON, **THIRTEEN, "mm_vision_tower": SMALL, "mm_projector_type": "linear"}, False, "llava_llama_2", 256, 13.02e9),
    "llava-v1.5-7b": (
        {**COMMON, **SEVEN, "mm_vision_tower": LARGE, "mm_projector_type": "mlp2x_gelu", "image_aspect_ratio": "pad"},
        False, "llava_v1", 576, 6.76e9),
    "llava-v1.5-13b": (
        {**COMMON, **THIRTEEN, "mm_vision_tower": LARGE, "mm_projector_type": "mlp2x_gelu", "image_aspect_ratio": "pad"},
        False, "llava_v1", 576, 13.05e9),
    "llava-v1.6-vicuna-7b": ({**NEXT, **SEVEN}, True, "llava_v1", 576 + 48 * 49, 6.76e9),
    "llava-v1.6-vicuna-13b": ({**NEXT, **THIRTEEN}, True, "llava_v1", 576 + 48 * 49, 13.05e9),
    "llava-v1.6-mistral-7b": (
        {**NEXT, **SEVEN, "model_type": "llava_mistral", "intermediate_size": 14336, "num_key_value_heads": 8,
         "rope_theta": 1e6, "sliding_window": None}, True, "mistral_instruct", 576 + 48 * 49, 7.26e9),
    "llava-v1.6-34b": (
        {**NEXT, "hidden_size": 7168, "intermediate_size": 20480, "num_hidden_layers": 60, "num_attention_heads": 56,
         "num_key_value_heads": 8, "vocab_size": 64000, "rope_theta": 5e6}, True, "chatml_direct", 576 + 48 * 49, 34.45e9),
}  # fmt: skip


INTERN_REPOSITORIES = {  # sizes, mm_vision_tower, side of images in pixels, tokens of an image
    "InternVL-Chat-ViT-6B-Vicuna-7B": (SEVEN, "OpenGVLab/InternViT-6B-224px", 336, 576),
    "InternVL-Chat-ViT-6B-Vicuna-13B": (THIRTEEN, "OpenGVLab/InternViT-6B-224px", 336, 576),
    "InternVL-Chat-ViT-6B-Vicuna-13B-448px": (THIRTEEN, "OpenGVLab/InternViT-6B-448px", 448, 1024),
}  # fmt: skip


def write_sparse(file: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of half-precision tensors that takes no room: nothing is written behind its header."""
    header, end = {}, 0
    for name, shape in tensors.items():
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end := end + 2 * prod(shape)]}
    encoded = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded)
    os.truncate(file, 8 + len(encoded) + end)


@pytest.mark.parametrize("name", sorted(REPOSITORIES))
def test_every_tensor_of_a_repository_has_its_place(name, tmp_path, monkeypatch):
    """Nothing missing, nothing left over, at full size and through the real path; no tensor is read or made."""
    config, inside, conversation, image_tokens, parameters = REPOSITORIES[name]
    folder, side = tmp_path / name, 336 if config["mm_vision_tower"] == LARGE else 224
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    C = config["hidden_size"]
    tensors = decoder_tensors(config)
    if config.get("mm_projector_type", "linear") == "linear":
        tensors |= linear("model.mm_projector", C, 1024)
    else:
        tensors |= linear("model.mm_projector.0", C, 1024) | linear("model.mm_projector.2", C, C)
    if "mm_patch_merge_type" in config:
        tensors["model.image_newline"] = (C,)
    if inside:
        tensors |= clip_tensors("model.vision_tower.vision_tower.vision_model.", side)
    else:
        tower = folder / config["mm_vision_tower"]
        tower.mkdir(parents=True)
        sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        vision = {**sizes, "patch_size": 14, "image_size": side}
        (tower / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": vision}))
        both = {"text_model.embeddings.token_embedding.weight": (49408, 768), "logit_scale": ()}
        write_sparse(tower / "model.safetensors", both | clip_tensors("vision_model.", side))
    write_sparse(folder / "model.safetensors", tensors)
    monkeypatch.setattr(
        "mlx_vlm_mini.checkpoints.assembly._apply_base", lambda *_: None
    )  # which looks at one, and all are 0 here
    checkpoint = open_model(folder)
    assert checkpoint.config["conversation"] == conversation
    planned = plan(checkpoint)
    assert {re.sub(r"\.(weight|bias)$", "", name) for name in planned.unused} == {
        llava_original.TOWER + "vision_model.post_layernorm"
    }
    assert set(planned.ours.values()) | set(planned.unused) == set(checkpoint.tensors)
    own = {name: info for name, info in checkpoint.tensors.items() if not name.startswith(llava_original.TOWER)}
    assert sum(prod(info.shape) for info in own.values()) == pytest.approx(parameters, rel=0.01)
    assert isinstance(checkpoint.tensors["model.norm.weight"], TensorInfo)
    vision = describe(folder)["vision"]
    assert vision.get("image_tokens", vision.get("max_image_tokens")) == image_tokens


# InternViT as the tower


def intern_vit_tensors(prefix: str, side: int) -> dict[str, tuple[int, ...]]:
    """InternViT-6B's of 48 layers, with positions of images of `side` pixels, by families.md."""
    C, wide = 3200, 12800
    found: dict[str, tuple[int, ...]] = {
        prefix + "embeddings.class_embedding": (1, 1, C), prefix + "embeddings.patch_embedding.weight": (C, 3, 14, 14),
        prefix + "embeddings.patch_embedding.bias": (C,),
        prefix + "embeddings.position_embedding": (1, (side // 14) ** 2 + 1, C),
    }  # fmt: skip
    for i in range(48):
        layer = f"{prefix}encoder.layers.{i}."
        found |= {f"{layer}attn.qkv.weight": (3 * C, C)} | linear(f"{layer}attn.proj", C, C)
        found |= linear(f"{layer}mlp.fc1", wide, C) | linear(f"{layer}mlp.fc2", C, wide)
        found |= {layer + name: (C,) for name in ("ls1", "ls2", "norm1.weight", "norm2.weight")}
        found |= {layer + name: (C,) for name in ("attn.q_norm.weight", "attn.k_norm.weight")}
    return found


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "beside"])
@pytest.mark.parametrize("name", sorted(INTERN_REPOSITORIES))
def test_every_tensor_of_internvl_1_has_its_place(name, inside, tmp_path, monkeypatch):
    """Inside lie positions for the images' own size (issue 86 of OpenGVLab/InternVL), beside those of InternViT-6B-224px."""
    sizes, tower_name, side, image_tokens = INTERN_REPOSITORIES[name]
    folder = tmp_path / name
    tower = folder / tower_name
    tower.mkdir(parents=True)
    C = sizes["hidden_size"]
    (folder / "config.json").write_text(json.dumps({
        **COMMON, **sizes, "mm_vision_tower": tower_name, "mm_hidden_size": 3200, "mm_vision_select_layer": -4,
        "mm_projector_type": "mlp2x_gelu", "image_aspect_ratio": "pad",
    }))  # fmt: skip
    own = 448 if "448" in tower_name else 224
    (tower / "config.json").write_text(json.dumps({"model_type": "intern_vit_6b", "image_size": own}))
    write_sparse(tower / "model.safetensors", intern_vit_tensors("", own))
    tensors = decoder_tensors(sizes) | linear("model.mm_projector.0", C, 3200) | linear("model.mm_projector.2", C, C)
    tensors |= intern_vit_tensors("model.vision_tower.vision_tower.", side) if inside else {}
    write_sparse(folder / "model.safetensors", tensors)
    monkeypatch.setattr("mlx_vlm_mini.checkpoints.assembly._apply_base", lambda *_: None)
    checkpoint = open_model(folder)
    planned = plan(checkpoint)
    assert set(planned.ours.values()) == set(checkpoint.tensors) and not planned.unused
    assert planned.config.vision.image_size == (side if inside else own)
    described = describe(folder)
    assert (described["vision"]["image_tokens"], described["conversation"]) == (image_tokens, "llava_v1")
    assert described["vision"]["weights"] == pytest.approx(5.91e9, rel=0.002)  # as the card of InternVL-Chat-V1-1 says


def move_inside(folder: Path, side: int) -> None:
    """The tower's tensors into the checkpoint, with positions resampled for images of `side` pixels."""
    vision, file = load(folder)[0].vision, folder / "tower/model.safetensors"
    tensors = {llava_original.TOWER + name: array for name, array in mx.load(str(file)).items()}
    positions = vision._positions(side, side)
    mx.eval(positions)
    tensors[llava_original.TOWER + "embeddings.position_embedding"] = positions[None]
    file.unlink()
    for old in folder.glob("pytorch_model*"):
        if old.suffix == ".bin":
            tensors |= {name: info.read() for name, info in read_pickled(old).items()}
        old.unlink()
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "pt"})


def test_an_intern_vit_inside_has_positions_of_the_images_size(copy_of, tmp_path):
    folder = copy_of(INTERN)
    move_inside(folder, 336)
    assert load(folder)[0].config.vision.num_positions == 145
    np.testing.assert_allclose(logits(folder), logits(GOLDEN / INTERN), atol=1e-5)
    assert describe(folder, check=True)["vision"]["image_tokens"] == 144
    convert(folder, tmp_path / "out")
    shutil.rmtree(folder)
    np.testing.assert_allclose(logits(tmp_path / "out"), logits(GOLDEN / INTERN), atol=1e-4)


def test_a_tower_of_448_pixels_is_told_by_its_name(copy_of):
    folder = copy_of(INTERN)
    (folder / "tower").rename(folder / "InternViT-6B-448px")
    edit_json(folder / "config.json", mm_vision_tower="InternViT-6B-448px")
    _, processor = load(folder)
    prepared = processor.prepare(Image.open(PHOTO))
    assert prepared.pixel_values.shape == (1, 448, 448, 3) and prepared.text == "<image>" * 16**2
    assert describe(folder, check=True)["vision"]["image_tokens"] == 16**2


def test_a_broken_intern_vit(copy_of):
    folder = copy_of(INTERN)
    move_inside(folder, 336)
    file = folder / "model.safetensors"
    for shape in ((140, 24), (24,), (1, 0, 24)):
        tensors = dict(mx.load(str(file)))
        tensors[llava_original.TOWER + "embeddings.position_embedding"] = mx.zeros(shape)
        mx.save_safetensors(str(folder / "new.safetensors"), tensors, {"format": "pt"})
        (folder / "new.safetensors").replace(file)
        with pytest.raises(CheckpointError, match="position_embedding has shape|image_size"):
            load(folder)


def test_internvl_1_chats():
    run = CliRunner().invoke
    chatted = run(
        main, ["chat", str(GOLDEN / INTERN), "-i", str(PHOTO), "--max-tokens", "4"], input="Hi\nMore\n/quit\n"
    )
    assert chatted.exit_code == 0, chatted.output
    described = run(main, ["info", str(GOLDEN / INTERN), "--check"])
    assert described.exit_code == 0 and "image tokens 144" in described.output


def test_a_norm_in_front_of_the_projector(copy_of, tmp_path):
    """Its tensors take the first number, the layers the odd ones; the arithmetic is written out here."""
    folder = copy_of(V0)
    edit_json(folder / "config.json", mm_projector_type="mlp2x_gelu_ln")
    mx.random.seed(4)
    shapes = {
        "0.weight": (48,),
        "0.bias": (48,),
        "1.weight": (48, 48),
        "1.bias": (48,),
        "3.weight": (48, 48),
        "3.bias": (48,),
    }
    new = {"model.mm_projector." + name: mx.random.normal(shape) for name, shape in shapes.items()}
    tensors = {k: info.read() for k, info in read_pickled(folder / "pytorch_model.bin").items()}
    for file in ("pytorch_model.bin", "mm_projector.bin"):
        (folder / file).unlink()
    mx.save_safetensors(str(folder / "model.safetensors"), tensors | new, {"format": "pt"})
    assert find_family(json.loads((folder / "config.json").read_text())) is llava_normed
    convert(folder, tmp_path / "out")
    x = np.random.default_rng(1).normal(size=(1, 5, 48)).astype(np.float32)
    w = {name: np.array(new["model.mm_projector." + name], np.float64) for name in shapes}
    centred = x - x.mean(-1, keepdims=True)
    y = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * w["0.weight"] + w["0.bias"]
    y = y @ w["1.weight"].T + w["1.bias"]
    y = y * (1 + np.vectorize(erf)(y / 2**0.5)) / 2
    y = y @ w["3.weight"].T + w["3.bias"]
    for each in (folder, tmp_path / "out"):
        np.testing.assert_allclose(np.array(load(each)[0].projector(mx.array(x))), y, rtol=1e-4, atol=1e-3)


def test_without_a_tower_the_size_of_an_image_does_not_matter():
    """Square images are cut to their middle, as CLIP's own processor does."""
    _, processor = load(GOLDEN / V0)
    wide, square = Image.new("RGB", (200, 50), "red"), Image.new("RGB", (50, 50), "red")
    assert (processor.prepare(wide).pixel_values == processor.prepare(square).pixel_values).all()
    assert processor.prepare(wide).text == "<image>" * 9


@pytest.mark.parametrize(("name", "file", "changes", "message"), [
    ("llava-original-v1.5", "config.json", {"num_hidden_layers": 10**12}, "asks for 1000000000000 layers"),
    ("llava-original-v1.5", "tower/config.json", {"vision_config": 1}, "vision_config must be an object, not 1"),
    ("llava-original-v1.6-mistral", "config.json", {"mm_vision_tower": []}, "names no vision tower"),
    ("llava-original-v1.5", "tower/preprocessor_config.json", {"size": 10**12}, "cannot be made ready"),
    ("llava-original-v1.5", "tower/preprocessor_config.json", {"crop_size": 10**12}, "a crop of 10.* too large"),
    ("paligemma2-gemma2", "config.json", {"image_token_index": 10**12}, "the tokenizer does not have"),
])  # fmt: skip
def test_numbers_beyond_all_measure_are_named(name, file, changes, message, copy_of):
    folder = copy_of(name)
    edit_json(folder / file, **changes)
    with pytest.raises(CheckpointError, match=message):
        load(folder)[1]([PHOTO, "What?"])
