"""Configs as the Hub writes them: sparse, old and new; and the promise that no field is idle."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import PHOTO, PLAIN, check_fields, edit_json

import mlx_vlm_mini
from mlx_vlm_mini import load
from mlx_vlm_mini.config import (
    Activation,
    BiasConfig,
    BlindRows,
    BlockConfig,
    ContrastConfig,
    CrossAttentionConfig,
    DecoderConfig,
    DeltaConfig,
    EmbeddingConfig,
    ExpertConfig,
    GridConfig,
    GridPoolConfig,
    LayerShape,
    LayerType,
    MergerConfig,
    MLPType,
    NormConfig,
    NormType,
    PerLayerConfig,
    PoolConfig,
    Prescribed,
    ProjectorConfig,
    QueryConfig,
    ScaleConfig,
    ShuffleConfig,
    TiledConfig,
    TwoWay,
    VisionConfig,
    VLMConfig,
    WindowConfig,
)
from mlx_vlm_mini.decoder.blocks import LAYERS, MLPS
from mlx_vlm_mini.decoder.rope import depends_on_length, make_rope
from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.families import FAMILIES, llava
from mlx_vlm_mini.layers import kernels
from mlx_vlm_mini.layers.norms import NORMS

PACKAGE = Path(mlx_vlm_mini.__file__).parent
CODE = [
    file
    for file in PACKAGE.rglob("*.py")
    if file.name != "describe.py" and not {"config", "families", "assets"} & {*file.parts}
]


def test_an_empty_config_is_llava_of_seven_billion():
    """The class defaults of transformers 5.23, as its LlavaConfig gives them."""
    config = llava.config({"model_type": "llava"})
    vision, decoder = config.vision, config.decoder
    assert (vision.hidden_size, vision.num_hidden_layers, vision.image_size, vision.patch_size) == (1024, 24, 336, 14)
    assert (vision.depth, vision.num_features, vision.hidden_act, vision.layer_norm_eps) == (
        23,
        576,
        "quick_gelu",
        1e-5,
    )
    assert (decoder.hidden_size, decoder.intermediate_size, decoder.num_key_value_heads) == (4096, 11008, 32)
    assert (decoder.head_dim, decoder.rope_theta, decoder.norms.rms_norm_eps) == (128, 10000.0, 1e-6)
    assert (config.image_token_id, config.projector.hidden_act, config.projector.bias) == (32000, "gelu", True)


@pytest.mark.parametrize(
    ("hf", "expected"),
    [
        ({"vision_config": {"model_type": "clip_vision_model"}}, {"vision.hidden_size": 768, "vision.patch_size": 32}),
        (
            {"vision_config": {"model_type": "siglip_vision_model"}},
            {"vision.patch_size": 16, "vision.hidden_act": "gelu_pytorch_tanh", "vision.layer_norm_eps": 1e-6,
             "vision.class_token": False, "vision.patch_bias": True, "vision.pre_norm": False},
        ),
        (
            {"text_config": {"model_type": "mistral"}},
            {"decoder.intermediate_size": 14336, "decoder.num_key_value_heads": 8, "decoder.sliding_window": 4096},
        ),
        ({"text_config": {"model_type": "mistral", "sliding_window": None}}, {"decoder.sliding_window": None}),
        (
            {"text_config": {"model_type": "qwen2"}},
            {"decoder.vocab_size": 151936, "decoder.biases.qkv_bias": True, "decoder.biases.o_bias": False, "decoder.sliding_window": None},
        ),
        (
            {"text_config": {"model_type": "qwen2", "num_hidden_layers": 3, "use_sliding_window": True, "max_window_layers": 1}},
            {"decoder.layer_types": ("full_attention", "sliding_attention", "sliding_attention")},
        ),
        ({"text_config": {"hidden_size": 64, "num_attention_heads": 4}}, {"decoder.head_dim": 16, "decoder.num_key_value_heads": 4}),
        ({"text_config": {"rope_theta": 5e5, "rope_scaling": None}}, {"decoder.rope_theta": 5e5, "decoder.rope_scaling": None}),
        (
            {"text_config": {"rope_parameters": {"rope_theta": 1e6, "rope_type": "linear", "factor": 2.0}}},
            {"decoder.rope_theta": 1e6, "decoder.rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        ),
        ({"text_config": {"attention_bias": True, "mlp_bias": True}}, {"decoder.biases.o_bias": True, "decoder.biases.mlp_bias": True}),
        ({"image_token_id": 7}, {"image_token_id": 7}),
        ({"image_token_index": 9}, {"image_token_id": 9}),
        ({"image_token_index": 9, "image_token_id": 7}, {"image_token_id": 7}),
        ({"vision_config": {}}, {"vision.hidden_size": 768}),
        ({"text_config": {"hidden_act": "swish"}, "projector_hidden_act": "gelu_new"}, {"decoder.hidden_act": "silu", "projector.hidden_act": "gelu_pytorch_tanh"}),
        (
            {"text_config": {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "default"}}},
            {"decoder.rope_scaling": {"type": "linear", "factor": 2}},
        ),
        (
            {"text_config": {"rope_scaling": {"type": "yarn", "factor": 2}, "original_max_position_embeddings": 9}},
            {"decoder.rope_scaling": {"type": "yarn", "factor": 2, "original_max_position_embeddings": 9}},
        ),
        ({"vision_feature_layer": [-2, 3]}, {"vision.feature_layers": (23, 3), "projector.input_size": 2048}),
        ({"vision_feature_select_strategy": "full"}, {"vision.num_features": 577}),
        ({"tie_word_embeddings": True}, {"decoder.tie_word_embeddings": True}),
        ({"text_config": {"tie_word_embeddings": True}}, {"decoder.tie_word_embeddings": True}),
    ],
)  # fmt: skip
def test_what_configs_say_and_leave_out(hf, expected):
    check_fields(llava.config(hf), expected)


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        (
            {"vision_config": {"model_type": "dinov2"}},
            "vision tower 'dinov2' is not supported .known: clip_vision_model",
        ),
        (
            {"text_config": {"model_type": "mamba"}},
            "decoder 'mamba' is not supported .known: llama, mistral, qwen2",
        ),
        (
            {"text_config": {"model_type": "gemma"}},
            "decoder 'gemma' is not supported .known: llama, mistral, qwen2",
        ),
        ({"text_config": {"hidden_act": "swish9"}}, "activation 'swish9'"),
        (
            {"text_config": {"num_hidden_layers": -1}},
            "num_hidden_layers must be a whole number from 1 to 100000000, not -1",
        ),
        ({"text_config": {"num_attention_heads": 6, "num_key_value_heads": 4}}, "is not a multiple of"),
        ({"text_config": {"vocab_size": 10**12}}, "vocab_size must be a whole number from 1 to 100000000"),
        ({"text_config": {"hidden_size": True}}, "hidden_size must be a whole number"),
        ({"text_config": {"rms_norm_eps": None}}, "rms_norm_eps must be a positive number, not None"),
        ({"text_config": {"rope_theta": -1}}, "rope_theta must be a positive number"),
        ({"text_config": {"rope_theta": float("nan")}}, "rope_theta must be a positive number"),
        ({"text_config": {"attention_bias": "x"}}, "qkv_bias must be true or false"),
        ({"text_config": {"model_type": "mistral", "sliding_window": "x"}}, "sliding_window must be a whole number"),
        ({"vision_config": {"layer_norm_eps": -1}}, "layer_norm_eps must be a positive number"),
        ({"image_token_index": -1}, "the image token must be a token id, not -1"),
        ({"image_token_index": None}, "the image token must be a token id, not None"),
        ({"vision_feature_layer": True}, "vision feature layer True"),
        ({"vision_feature_layer": 40}, "vision feature layer 40 does not exist; the tower has 24"),
        ({"vision_feature_layer": []}, "list of vision feature layers is empty"),
        ({"vision_feature_select_strategy": "cls"}, "'cls' is neither"),
        ({"vision_config": {"image_size": [336, 448]}}, "image_size must be square"),
    ],
)
def test_configs_that_make_no_model(hf, message):
    with pytest.raises(CheckpointError, match=message):
        llava.config(hf)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "spiral"}, "unknown rope type 'spiral'"),
        ({"rope_type": "linear"}, "'linear' lacks factor"),
        ({"type": "su"}, "'longrope' lacks short_factor, long_factor"),
        ({"rope_type": "yarn", "factor": 2.0, "truncate": False}, "truncate=false"),
        ({"rope_type": "linear", "factor": "x"}, "positive number as factor, not 'x'"),
        ({"rope_type": "dynamic", "factor": -1}, "positive number as factor, not -1"),
        ({"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0}, "different low_freq_factor"),
        (
            {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]},
            "needs 64 positive numbers as short_factor",
        ),
    ],
)
def test_rope_scalings_that_are_not_known(scaling, message):
    config = llava.config({"text_config": {"num_hidden_layers": 1, "rope_scaling": scaling}}).decoder
    with pytest.raises(CheckpointError, match=message):
        make_rope(config)


def test_a_scaling_that_depends_on_the_length_is_known_as_such():
    def limit(scaling: dict[str, Any]) -> list[int]:
        decoder = llava.config({"text_config": {"rope_scaling": scaling, "max_position_embeddings": 64}}).decoder
        return [length for length in (1, 16, 17, 64, 65, 9999) if depends_on_length(decoder, length)]

    assert limit({"type": "dynamic", "factor": 2.0}) == [65, 9999]
    assert limit({"rope_type": "longrope", "original_max_position_embeddings": 16}) == [17, 64, 65, 9999]
    assert limit({"type": "linear", "factor": 2.0}) == limit({}) == []


@pytest.mark.parametrize(
    "config",
    [
        BlockConfig, TiledConfig, VisionConfig, ShuffleConfig, PoolConfig, ProjectorConfig, NormConfig, ScaleConfig, BiasConfig,
        ContrastConfig, CrossAttentionConfig, WindowConfig, DecoderConfig, GridConfig, MergerConfig, Prescribed, QueryConfig,
        LayerShape, DeltaConfig, ExpertConfig, EmbeddingConfig, PerLayerConfig, GridPoolConfig, VLMConfig,
    ],
)  # fmt: skip
def test_every_field_has_a_reader_and_towers_stay_small(config):
    configs = "".join(file.read_text() for file in (PACKAGE / "config").glob("*.py"))
    code = "".join(file.read_text() for file in CODE)
    methods = r"    def (?!_).*?(?=\n    @|\n    def |\n\n\n|\Z)"  # properties among them
    code += "".join(re.findall(methods, configs, re.DOTALL))
    names = [field.name for field in fields(config)]
    assert [name for name in names if not re.search(rf"\.{name}\b", code)] == []
    assert len(names) <= (25 if config is DecoderConfig else 20)


def test_every_literal_has_a_user():
    families = "".join(file.read_text() for file in (PACKAGE / "families").rglob("*.py"))
    known = {
        *get_args(Activation),
        *get_args(BlindRows),
        *get_args(LayerType),
        *get_args(TwoWay),
        *get_args(NormType),
    }
    values = known - {"relu"}  # of models composed and trained here
    assert [value for value in sorted(values) if f'"{value}"' not in families] == []
    for table in (kernels.CPU, kernels.MLX):
        assert set(table.activations) == set(get_args(Activation))
    assert set(NORMS) == set(get_args(NormType)) and set(LAYERS) == set(get_args(LayerType))
    assert set(MLPS) == set(get_args(MLPType)) and '"plain"' in families


def test_towers_do_not_know_families():
    rooms = ("layers", "vision", "projectors", "decoder")
    for file in [PACKAGE / "model.py", *(file for room in rooms for file in (PACKAGE / room).rglob("*.py"))]:
        code = re.sub(r'"""(?s:.)*?"""|#.*', "", file.read_text()).lower()
        assert [family for family in FAMILIES if re.search(rf"\b{family}\b", code)] == [], file


def test_code_named_in_a_config_never_runs(copy_of, tmp_path):
    folder = copy_of()
    trap = "raise SystemExit('ran')"
    for name in ("modeling_llava.py", "evil.py", "processing_llava.py", "tokenization_llava.py"):
        (folder / name).write_text(trap)
    code = {"AutoConfig": "evil.A", "AutoModel": "modeling_llava.B", "AutoTokenizer": ["evil.C", None]}
    for file in ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        edit_json(folder / file, auto_map=code, model_file="evil.py", trust_remote_code=True)
    model, processor = load(folder)
    expected = load(PLAIN)[0]
    inputs = processor("Hi", [PHOTO])
    assert (model(inputs) == expected(inputs)).all()


@pytest.mark.parametrize(("dims", "base", "scaling"), [
    (12, 1e4, None), (20, 1e6, None), (80, 5e5, {"rope_type": "linear", "factor": 4.0}), (128, 1e6, {"type": "dynamic", "factor": 2.0}),
])  # fmt: skip
def test_far_positions_turn_as_transformers_turns_them(dims, base, scaling, either_kernels):
    """Its frequencies are rounded to float32, and a last bit of one moves the 3000th position's values by 1e-4 and more."""
    text = {"head_dim": dims, "rope_theta": base, "rope_scaling": scaling, "max_position_embeddings": 4096}
    rope = make_rope(llava.config({"text_config": text}).decoder)
    periods = (base ** (np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims)).astype(float)).astype(np.float32)
    stretch = scaling["factor"] if scaling and "rope_type" in scaling else 1
    turns = np.arange(3000, dtype=np.float32)[:, None] * (1 / periods / np.float32(stretch))
    expected = np.concatenate([np.cos(turns), np.sin(turns)], axis=1)
    x = mx.broadcast_to(mx.array([1.0] * (dims // 2) + [0.0] * (dims // 2)), (1, 1, 3000, dims))
    np.testing.assert_allclose(np.array(rope.at(0, 3000, total=3000)(x))[0, 0], expected, atol=2e-6)
