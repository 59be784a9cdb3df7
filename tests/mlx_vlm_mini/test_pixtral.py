"""Pixtral and Mistral 3: sizes, break tokens, frequencies, layouts, places; parity is test_parity.py's."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import PHOTO, SHAPES, check_fields, edit_json, with_paths
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from quantized import check_compensation, check_eight_bits, make_wide_with
from reference import CASES, GOLDEN

from mlx_vlm_mini import attend, load, stream_generate
from mlx_vlm_mini.checkpoints.describe import describe
from mlx_vlm_mini.checkpoints.folder import open_checkpoint
from mlx_vlm_mini.checkpoints.load import plan
from mlx_vlm_mini.cli.main import main
from mlx_vlm_mini.decoder.masks import Causal
from mlx_vlm_mini.errors import CheckpointError, ImageError
from mlx_vlm_mini.families import find_family, mistral3, pixtral
from mlx_vlm_mini.grounding.attend import find_boxes
from mlx_vlm_mini.layers.angles import grid_angles
from mlx_vlm_mini.preprocessing.grid import EdgeGrid
from mlx_vlm_mini.preprocessing.settings import image_settings

NAMES = ("pixtral", "mistral3")


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module", params=NAMES)
def loaded(request):
    return load(GOLDEN / request.param)


def copy_of(name, folder):
    return Path(shutil.copytree(GOLDEN / name, folder))


def check_answers(folder, name, cases=("image", "text")):
    """A folder answers as the golden of this name does."""
    model, processor = load(folder)
    with np.load(GOLDEN / name / "expected.npz") as expected:
        for case in cases:
            chunks = list(stream_generate(model, processor, with_paths(CASES[case]), max_tokens=6))
            tokens = expected[f"{case}/token_ids"][:6].tolist()
            assert [chunk.token for chunk in chunks] == tokens
            chosen = expected[f"{case}/logprobs"][np.arange(6), tokens]
            np.testing.assert_allclose([chunk.logprob for chunk in chunks], chosen, atol=1e-4)


# sizes


@pytest.mark.parametrize(
    ("factor", "longest", "size", "expected"),
    [
        (16, 1024, (480, 640), (480, 640)), (16, 1024, (1, 17), (16, 32)), (16, 1024, (2000, 3000), (688, 1024)),
        (16, 1024, (1025, 3), (1024, 16)), (28, 1540, (1080, 1920), (868, 1540)), (28, 1540, (1540, 1541), (1540, 1540)),
    ],
)  # fmt: skip
def test_sides_are_rounded_up_and_never_enlarged(factor, longest, size, expected):
    """2000 / (3000 / 1024) is 682.67, which becomes 682 and then 43 tokens."""
    grid = EdgeGrid(patch_size=factor, merge=1, max_height=longest, max_width=longest)
    assert grid.fit(size) == expected
    assert grid.count_tokens(size) == expected[0] * expected[1] // factor**2 <= grid.max_tokens


@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 500), st.integers(1, 500))
def test_every_size_fits_into_the_frame(height, width, most_down, most_across):
    grid = EdgeGrid(patch_size=7, merge=2, max_height=most_down, max_width=most_across)
    try:
        found = grid.fit((height, width))
    except ImageError:
        ratio = max(height / most_down, width / most_across)
        assert min(height, width) / ratio < 1
        return
    for side, was, most in zip(found, (height, width), (most_down, most_across), strict=True):
        assert side % 14 == 0 and 14 <= side < min(was, most) + 14


@pytest.mark.parametrize(
    ("hf", "expected"),
    [
        ({}, (16, 1, 1024, 1024)),
        ({"size": {"longest_edge": 1540}, "patch_size": 14, "merge_size": 2}, (14, 2, 1540, 1540)),
        ({"size": {"height": 64, "width": 32}}, (16, 1, 64, 32)),
        ({"size": 99}, (16, 1, 99, 99)),
    ],
)
@pytest.mark.parametrize("name", ["PixtralImageProcessor", "PixtralImageProcessorFast", None])
def test_settings(hf, expected, name):
    settings = image_settings({**hf, "image_processor_type": name}, "Pixtral")
    grid = settings.tiling
    assert (grid.patch_size, grid.merge, grid.max_height, grid.max_width) == expected
    assert settings.size is None and settings.resample == 3 and settings.crop_size is None


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        ({"size": {"shortest_edge": 5}}, "names no longest_edge"),
        ({"do_resize": False}, "images in patches need do_resize"),
        ({"patch_size": {"height": 16, "width": 16}}, "a whole number above 0 as patch_size"),
    ],
)
def test_settings_that_make_no_grid(hf, message):
    with pytest.raises(CheckpointError, match=message):
        image_settings({**hf, "image_processor_type": "PixtralImageProcessor"}, "Pixtral")


def test_the_processors_patches_count(tmp_path):
    """Whatever its part for images says; what it leaves out config.json says, as in mlx-community's Mistral Small 3.1."""
    folder = copy_of("mistral3", tmp_path / "model")
    file = folder / "processor_config.json"
    content = json.loads(file.read_text())
    content["image_processor"]["patch_size"] = {"height": 99, "width": 99}
    content.pop("spatial_merge_size")
    file.write_text(json.dumps(content))
    check_answers(folder, "mistral3", ["image"])
    file.write_text(json.dumps(content | {"spatial_merge_size": 1}))
    with pytest.raises(CheckpointError, match="makes a token of 6 pixels a side, config.json of 12"):
        load(folder)[1]([PHOTO, "Hi"])


def test_an_image_that_is_too_long(tmp_path):
    Image.new("RGB", (2010, 10)).save(tmp_path / "long.png")
    done = run("generate", GOLDEN / "pixtral", "-p", "Hi", "-i", tmp_path / "long.png")
    assert done.exit_code == 1
    message = "Error: an image of 2010x10 pixels is too long and narrow for one of 100x100: crop it first\n"
    assert done.stderr == message


def test_limits_of_pixels_are_refused():
    with pytest.raises(CheckpointError, match="family 'mistral3' has no limits of pixels"):
        load(GOLDEN / "mistral3", max_pixels=1000)


# the prompt


@pytest.mark.parametrize(("name", "rows", "columns"), [("pixtral", 7, 11), ("mistral3", 5, 7)])
def test_break_tokens_are_no_slots(name, rows, columns):
    """Odd numbers of tokens; a token ends each row, and takes no feature."""
    model, processor = load(GOLDEN / name)
    inputs = processor([SHAPES, "Hi"])
    tokens = [processor.tokenizer.id_to_token(token) for token in inputs.input_ids[0].tolist()]
    row = ["[IMG]"] * columns
    laid = [*([*row, "[IMG_BREAK]"] * rows)[:-1], "[IMG_END]"]
    start = tokens.index("[IMG]")
    assert tokens[start : start + len(laid)] == laid
    assert np.flatnonzero(inputs.slots).tolist() == [i for i, token in enumerate(tokens) if token == "[IMG]"]
    reading = model.read(inputs)
    assert (inputs.images[0].tokens, reading.visible, reading.memory) == (rows * columns, Causal(), None)


@pytest.mark.parametrize("name", NAMES)
def test_the_familys_own_template_writes_the_goldens_prompts(name, tmp_path):
    """Of folders without one; they have a system message besides."""
    folder = copy_of(name, tmp_path / "model")
    for file in ("chat_template.json", "chat_template.jinja"):
        (folder / file).unlink(missing_ok=True)
    own, theirs = load(folder)[1], load(GOLDEN / name)[1]
    assert own.chat_template.source == find_family(plan(open_checkpoint(folder)).checkpoint.config).CHAT_TEMPLATE
    system = {"role": "system", "content": "Be brief."}
    for case in ("side_by_side", "two_turns"):
        for messages in (with_paths(CASES[case]), [system, *with_paths(CASES[case])]):
            one, other = (each(messages).input_ids.tolist() for each in (own, theirs))
            assert one == other


# the tower


@pytest.mark.parametrize("dims", [16, 10])
def test_frequencies_alternate(dims):
    row, column = np.array([0, 3, 40]), np.array([0, 5, 2])
    found = grid_angles(row, column, dims, alternating=True)
    frequencies = [10000.0 ** (-2 * i / dims) for i in range(dims // 2)]
    expected = [
        [r * f for f in frequencies[::2]] + [c * f for f in frequencies[1::2]] for r, c in zip(row, column, strict=True)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_images_do_not_see_one_another(loaded):
    model, processor = loaded
    both = processor([PHOTO, "and", SHAPES])
    alone = [model.encode(image) for image in both.images]
    embedded = model.read(both).embeddings[0][mx.array(np.flatnonzero(both.slots))]
    np.testing.assert_array_equal(np.array(embedded), np.array(mx.concatenate(alone)))


# layouts


def memory(name):
    """A Hub name as transformers 5 has it in memory."""
    if name.startswith("language_model.lm_head"):
        return name.removeprefix("language_model.")
    return "model." + name.replace("language_model.model.", "language_model.", 1)


def hub(name):
    """A golden's name as the Hub's files have it."""
    if name.startswith("lm_head"):
        return "language_model." + name
    return (
        name.removeprefix("model.").replace("language_model.", "language_model.model.", 1)
        if name.startswith("model.")
        else name
    )


def community(name):
    return name.replace("vision_tower.", "vision_tower.vision_model.")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", [hub, memory, community])
def test_tensors_go_by_many_names(name, layout, tmp_path):
    folder = copy_of(name, tmp_path / "model")
    tensors = {}
    for file in sorted(folder.glob("model*.safetensors")):
        tensors |= {hub(key): array for key, array in mx.load(str(file)).items()}
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    tensors = {layout(key): array for key, array in tensors.items()}
    if layout is community:  # whose convolutions are in MLX's form, and whose Pixtral has a type of its own
        kernel = "vision_tower.vision_model.patch_conv.weight"
        tensors[kernel] = mx.contiguous(tensors[kernel].transpose(0, 2, 3, 1))
        edit_json(folder / "config.json", model_type=name)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "mlx" if layout is community else "pt"})
    check_answers(folder, name)


def test_a_head_that_is_not_there_is_tied(tmp_path):
    """As transformers saves a Mistral 3 whose config says nothing of it; a head in the file counts."""
    folder = copy_of("mistral3", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config.pop("tie_word_embeddings")
    (folder / "config.json").write_text(json.dumps(config))
    assert "lm_head" in load(folder)[0].decoder
    for file in folder.glob("model-*.safetensors"):
        tensors = {key: array for key, array in mx.load(str(file)).items() if "lm_head" not in key}
        mx.save_safetensors(str(file), tensors, {"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"].pop("lm_head.weight")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    model, processor = load(folder)
    assert "lm_head" not in model.decoder and np.isfinite(np.array(model(processor("Hi")))).all()


@pytest.mark.parametrize(
    ("family", "hf", "expected"),
    [
        (pixtral, {"text_config": {"model_type": "mistral"}}, {
            "vision.hidden_size": 1024, "vision.num_hidden_layers": 24, "vision.intermediate_size": 4096,
            "vision.num_attention_heads": 16, "vision.layer_norm_eps": 1e-5, "vision.hidden_act": "gelu",
            "vision.patch_size": 16, "vision.image_size": 16, "vision.feature_layers": (23,), "vision.pre_norm": True,
            "vision.post_norm": False, "vision.patch_bias": False, "vision.blocks.norm_type": "rms_norm",
            "vision.blocks.gated_mlp": True, "vision.blocks.mlp_bias": False, "vision.blocks.qkv_bias": False,
            "vision.blocks.o_bias": False, "vision.grid.alternating": True, "vision.grid.frames": None,
            "projector.bias": True, "projector.hidden_act": "gelu", "projector.merger": None,
            "decoder.sliding_window": 4096, "decoder.norms.rms_norm_eps": 1e-6, "decoder.tie_word_embeddings": False,
            "image_token_id": 32000,
        }),
        (mistral3, {}, {
            "vision.hidden_act": "gelu", "vision.patch_size": 14, "vision.image_size": 28, "vision.layer_norm_eps": 1e-5,
            "vision.feature_layers": (24,), "projector.input_size": 4096, "projector.bias": False,
            "projector.norm_eps": 1e-5, "projector.merger.kind": "channels", "projector.hidden_size": 5120,
            "decoder.intermediate_size": 32768, "decoder.rope_theta": 1e9, "decoder.sliding_window": None,
            "decoder.head_dim": 128, "decoder.tie_word_embeddings": True, "image_token_id": 10,
        }),
        (mistral3, {"text_config": {"rms_norm_eps": 1e-3}, "vision_config": {}}, {
            "vision.patch_size": 16, "projector.norm_eps": 1e-3, "decoder.sliding_window": 4096, "decoder.vocab_size": 32000,
        }),
    ],
    ids=["pixtral", "mistral3", "mistral3 with parts"],
)  # fmt: skip
def test_what_configs_leave_out(family, hf, expected):
    """The class defaults of transformers 5.23."""
    check_fields(family.config(hf), expected)


def test_how_a_pixtral_is_told():
    for hf in ({"model_type": "llava", "vision_config": {"model_type": "pixtral"}}, {"model_type": "pixtral"}):
        assert find_family(hf) is pixtral
    assert find_family({"model_type": "llava", "vision_config": {}}) is not pixtral
    assert find_family({"model_type": "mistral3"}) is mistral3


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("pixtral", {"vision_config": {"rope_theta": 5e5}}, "rope_theta must be 10000"),
        ("pixtral", {"vision_config": {"head_dim": 8}}, "head_dim must be hidden_size / num_attention_heads"),
        ("pixtral", {"vision_feature_select_strategy": "default"}, "no class token"),
        ("pixtral", {"vision_feature_layer": 7}, "vision feature layer 7 does not exist"),
        ("mistral3", {"vision_feature_layer": [-1, -2]}, "must be one layer"),
        ("mistral3", {"text_config": {"model_type": "ministral"}}, "decoder 'ministral' is not supported"),
        ("mistral3", {"spatial_merge_size": 0}, "factor must be a whole number from 1"),
    ],
)
def test_configs_that_make_no_model(name, changes, message, tmp_path):
    folder = copy_of(name, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        load(folder)


# places


@pytest.mark.parametrize(("name", "factor"), [("pixtral", 8), ("mistral3", 12)])
def test_tokens_show_their_part_of_the_picture(name, factor):
    """Of a picture that was shrunk and then squashed into whole tokens."""
    model, processor = load(GOLDEN / name)
    (image,) = processor([GOLDEN / "strip.png", "Hi"]).images
    boxes = find_boxes(model, processor, image)
    rows, columns = (side // factor for side in image.pixel_values.shape[1:3])
    top, left = (np.linspace(0, side, count + 1) for side, count in ((40, rows), (160, columns)))
    expected = [(left[j], top[i], left[j + 1], top[i + 1]) for i in range(rows) for j in range(columns)]
    np.testing.assert_allclose(boxes, expected, atol=1e-9)


def test_what_a_token_shows_is_what_it_is_made_of(loaded):
    """A patch that changes moves the token whose sources name it and no other, as long as they do not see one another."""
    model, processor = loaded
    (image,) = processor([SHAPES, "Hi"]).images
    sources = model.sources(image)
    rows, columns = (side // model.config.vision.patch_size for side in image.pixel_values.shape[1:3])
    assert sorted(sources.ravel().tolist()) == list(range(rows * columns))
    patches = mx.random.normal((1, rows, columns, model.config.vision.hidden_size), key=mx.random.key(0))
    numbers = mx.arange(rows * columns).reshape(1, rows, columns, 1)
    before = np.array(model.projector(patches)).reshape(1, len(sources), -1)
    for patch in (0, 13, 70):
        changed = np.array(model.projector(mx.where(numbers == patch, -patches, patches))).reshape(before.shape)
        (moved,) = np.flatnonzero(np.abs(changed - before).max(axis=-1)[0] > 1e-6)
        assert patch in sources[moved]


def test_attention_leaves_break_tokens_out(loaded):
    found = attend(*loaded, [PHOTO, "and ", SHAPES, "?"], max_tokens=2)
    images = loaded[1]([PHOTO, "and ", SHAPES, "?"]).images
    assert [each.weights.shape[-1] for each in found.images] == [image.tokens for image in images]
    assert all(np.isfinite(each.boxes).all() for each in found.images)
    assert 0 < sum(float(each.weights.sum()) for each in found.images) < len(found.token_ids)


# files


WIDE = {
    "pixtral": {"text_config": {"hidden_size": 128, "intermediate_size": 192},
                "vision_config": {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}},
    "mistral3": {"text_config": {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32},
                 "vision_config": {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "head_dim": 32}},
}  # fmt: skip


def small(settings):
    if "size" in settings:
        settings["size"] = {"longest_edge": 40}


@pytest.mark.parametrize("name", NAMES)
def test_quantized(name, tmp_path):
    """All parts, and the check layer by layer, which sees no harm at 8 bits."""
    model = check_eight_bits(make_wide_with(small, name, tmp_path / "wide", WIDE[name]), tmp_path / "out")
    assert (model.vision.blocks[0].mlp.gate_proj.bits, model.projector.layers[0].bits) == (8, 8)


def test_rounding_with_compensation(tmp_path):
    """The merging layer, too, whose inputs come picture by picture."""
    check_compensation(make_wide_with(small, "mistral3", tmp_path / "wide", WIDE["mistral3"]), tmp_path)


def test_what_info_says():
    found = describe(GOLDEN / "mistral3", check=True)
    assert (found["family"], found["image_token"], found["unused"]) == ("mistral3", "[IMG]", 0)
    own = {"max_height": 96, "max_width": 96, "max_image_tokens": 64, "patch_size": 6}
    assert own.items() <= found["vision"].items() and "image_size" not in found["vision"]


def test_all_tensors_are_used():
    for name in NAMES:
        planned = plan(open_checkpoint(GOLDEN / name))
        assert planned.unused == () and find_family(planned.checkpoint.config) is planned.family


@pytest.mark.parametrize(
    ("name", "why"), [("pixtral", "takes images of any size"), ("mistral3", "joins image features")]
)
def test_training_is_refused(name, why, tmp_path):
    data = tmp_path / "data.jsonl"
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A."}]
    data.write_text(json.dumps({"image": str(PHOTO), "messages": messages}) + "\n")
    done = run("train", GOLDEN / name, "--data", data, "--output", tmp_path / "out")
    assert done.exit_code == 1 and f"family '{name}' {why}, which cannot be trained yet" in done.stderr
