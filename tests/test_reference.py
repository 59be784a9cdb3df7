"""The reference suite: expected outputs recomputed live with transformers and torch, and more than the goldens hold.

pytest -m reference        needs the `reference` extra
"""

import io
import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import published
import pytest
from checkpoints import edit_json, random_mask_decoder
from parity import TOLERANCE, check_answer, check_golden, check_turns
from PIL import Image
from reference import CASES, GOLDEN, SPECS, Reference, expected_outputs

from mlx_vlm_mini import load
from mlx_vlm_mini.checkpoints.load import plan
from mlx_vlm_mini.checkpoints.weights import rename
from mlx_vlm_mini.decoder.cross_attention import Span, look
from mlx_vlm_mini.decoder.rope import make_rope
from mlx_vlm_mini.families import llava, llava_next, mllama, paligemma
from mlx_vlm_mini.grounding.mask_decoder import load_mask_decoder
from mlx_vlm_mini.images.source import open_image
from mlx_vlm_mini.preprocessing.anyres import count_tokens
from mlx_vlm_mini.preprocessing.canvas import Canvas, choose_canvas, fit_size, possible_grids
from mlx_vlm_mini.preprocessing.pixels import preprocess
from mlx_vlm_mini.preprocessing.settings import LLAVA_NEXT_PINPOINTS, image_settings
from mlx_vlm_mini.projectors.arrange import pack

pytestmark = pytest.mark.reference


@pytest.mark.parametrize("name", sorted(SPECS))
def test_the_goldens_are_what_the_reference_gives_today(name):
    check_golden(GOLDEN / name, expected_outputs(name))


def compare(folder, messages, chat_template, steps=6):
    """Our prefill and cached decoding against the reference's, distribution by distribution."""
    expected = Reference(folder, chat_template).answer(messages, GOLDEN, steps)
    check_answer(*load(folder), messages, expected)


def variant(name, folder, text=None, vision=None, **changes):
    """A golden checkpoint with other numbers in its config, which ask for no other tensors."""
    import shutil

    shutil.copytree(GOLDEN / name, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= text or {}
    config["vision_config"] |= vision or {}
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


ROPES = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn with a factor": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 1.3},
    "yarn with mscale": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.7, "mscale_all_dim": 0.9, "beta_fast": 16.0},
    "longrope": {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 48,
                 "short_factor": [1.0 + 0.1 * i for i in range(10)], "long_factor": [2.0 + 0.3 * i for i in range(10)]},
}  # fmt: skip


@pytest.mark.parametrize("old_keys", [False, True])
@pytest.mark.parametrize("kind", sorted(ROPES))
def test_rope_scalings(kind, old_keys, tmp_path):
    """Below and above the length that a scaling turns at: the cases have 27 to 82 tokens, `image` 37."""
    scaling = ROPES[kind]
    rope = (
        {"rope_theta": 1000.0, "rope_scaling": scaling}
        if old_keys
        else {"rope_parameters": {**scaling, "rope_theta": 1000.0}}
    )
    text = {"max_position_embeddings": 32 if kind == "dynamic" else 64, **rope}
    folder = variant("llava-clip-llama", tmp_path / "model", text)
    if not old_keys:
        config = json.loads((folder / "config.json").read_text())
        for key in ("rope_theta", "rope_scaling"):
            config["text_config"].pop(key)
        (folder / "config.json").write_text(json.dumps(config))
    for case in ("image", "text", "two_turns"):
        compare(folder, CASES[case], SPECS["llava-clip-llama"].chat_template)


@pytest.mark.parametrize(("kind", "length"), [(kind, length) for kind in sorted(ROPES) for length in (16, 300)])
def test_rope_alone_equals_transformers(kind, length):
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    sizes = {"hidden_size": 40, "num_attention_heads": 2, "num_hidden_layers": 1, "max_position_embeddings": 64}
    x = torch.randn(1, 2, length, 20, generator=torch.Generator().manual_seed(0))
    config = LlamaConfig(**sizes, rope_parameters={"rope_theta": 1000.0, **ROPES[kind]})
    expected, _ = apply_rotary_pos_emb(x, x, *LlamaRotaryEmbedding(config)(x, torch.arange(length)[None]))
    rope = make_rope(
        llava.config({"text_config": {**sizes, "rope_theta": 1000.0, "rope_scaling": ROPES[kind]}}).decoder
    )
    np.testing.assert_allclose(
        np.array(rope.at(0, length, total=length)(mx.array(x.numpy()))), expected.numpy(), atol=TOLERANCE
    )


# Not here because the reference itself fails: feature layer 0 outside a list (taken for none), and decoding with a
# window of one (its cache keeps all of `[-0:]`).
VARIANTS = {
    "one early layer": ("llava-clip-llama", {}, {}, {"vision_feature_layer": 1}),
    "embeddings as features": ("llava-clip-llama", {}, {}, {"vision_feature_layer": [0]}),
    "last layer": ("llava-clip-llama", {}, {}, {"vision_feature_layer": -1}),
    "default strategy on siglip": ("llava-siglip-qwen2", {}, {}, {"vision_feature_select_strategy": "default"}),
    "tanh in the projector": ("llava-clip-llama", {}, {}, {"projector_hidden_act": "gelu_pytorch_tanh"}),
    "gelu in the tower": ("llava-clip-llama", {}, {"hidden_act": "gelu"}, {}),
    "gelu in the decoder": ("llava-clip-llama", {"hidden_act": "gelu_pytorch_tanh"}, {}, {}),
    "other eps": ("llava-clip-llama", {"rms_norm_eps": 0.1}, {"layer_norm_eps": 0.1}, {}),
    "no window": ("llava-clip-mistral", {"sliding_window": None}, {}, {}),
    "window of two": ("llava-clip-mistral", {"sliding_window": 2}, {}, {}),
    "tiles, the last layer": ("llava-next-clip-mistral", {}, {}, {"vision_feature_layer": -1}),
    "no caps": ("paligemma2-gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}, {}, {}),
    "window of the whole prompt": ("paligemma2-gemma2", {"sliding_window": 20}, {}, {}),
    "other layers slide": ("paligemma2-gemma2", {
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}, {}, {}),
    "gelu in Gemma means tanh": ("paligemma-gemma", {"hidden_act": "gelu"}, {}, {}),
    "Meta's computation": ("mllama-transformers", {}, {"intermediate_layers_indices": [3, 1, 2]}, {"semantics": "meta"}),
    "transformers' computation": ("mllama-meta", {}, {}, {"semantics": "transformers"}),
    "other eps in tiles and gates": ("mllama-meta", {"rms_norm_eps": 0.1}, {"norm_eps": 0.1}, {}),
    "other activations": (
        "mllama-transformers", {"hidden_act": "gelu"}, {"hidden_act": "quick_gelu", "intermediate_layers_indices": [3, 3, 0]},
        {}),
    "windows in the last layers": ("llava-siglip-qwen2", {
        "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}, {}, {}),
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(VARIANTS))
def test_variants(kind, tmp_path):
    name, text, vision, changes = VARIANTS[kind]
    folder = variant(name, tmp_path / "model", text, vision, **changes)
    if "vision_feature_select_strategy" in changes:
        edit_json(folder / "processor_config.json", **changes)
    for case in ("two_images", "text" if "text" in SPECS[name].cases else "image"):
        compare(folder, CASES[case], SPECS[name].chat_template)


TEXTS = (
    "a",
    " lead",
    "trail ",
    "two\nlines\n",
    "<loc0012> and <seg001>x",
    "naïve 日本 🙂",
    "tab\there",
    "  a   b",
)  # fmt: skip; what is typed of <bos> and <eos> is text here, see test_literal.py


@pytest.mark.parametrize("text", TEXTS)
def test_prompt_ids_of_paligemma_equal_the_reference(text):
    _, processor = load(GOLDEN / "paligemma-gemma")
    reference = Reference(GOLDEN / "paligemma-gemma").processor
    expected = reference(text="<image>" + text, images=[Image.open(GOLDEN / "shapes.png")], return_tensors="np")
    inputs = processor(text, [GOLDEN / "shapes.png"])
    np.testing.assert_array_equal(np.array(inputs.input_ids), expected["input_ids"])


@pytest.mark.parametrize("text", [None, "gemma", "gemma2"])
def test_defaults_of_paligemma_equal_the_reference(text):
    from transformers import AutoConfig, PaliGemmaConfig

    whole, sparse = PaliGemmaConfig().to_dict(), {}
    if text is not None:
        whole["text_config"] = AutoConfig.for_model(text).to_dict()
        whole["projection_dim"] = whole["text_config"]["hidden_size"]
        sparse = {"text_config": {"model_type": text}, "projection_dim": whole["projection_dim"]}
    expected = paligemma.config(whole)
    plain = replace(expected.decoder, rope_scaling=None)  # where transformers writes {"rope_type": "default"}
    assert paligemma.config(sparse) == replace(expected, decoder=plain)


def test_a_second_turn_equals_the_reference():
    name = "llava-clip-llama"
    check_turns(name, Reference(GOLDEN / name, SPECS[name].chat_template))


IMAGE_SETTINGS = [
    ("CLIP", {"size": {"shortest_edge": 30}, "crop_size": 30}),
    ("CLIP", {"size": 30, "crop_size": {"height": 41, "width": 26}, "resample": 1}),
    ("CLIP", {"size": {"shortest_edge": 30, "longest_edge": 37}, "do_center_crop": False}),
    ("CLIP", {"do_resize": False, "crop_size": 30, "image_mean": 0.4, "image_std": [0.1, 0.2, 0.3]}),
    ("Siglip", {"size": {"height": 28, "width": 33}, "resample": 2}),
    ("Siglip", {"size": {"max_height": 28, "max_width": 33}}),
    ("Siglip", {"do_rescale": False}),
    ("Siglip", {"do_resize": False, "do_normalize": False}),
    ("Llava", {"do_pad": True, "size": {"shortest_edge": 30}, "crop_size": 30}),
    ("Llava", {"do_pad": True, "do_normalize": False, "do_resize": False, "do_center_crop": False}),
]


@pytest.mark.parametrize(("kind", "settings"), IMAGE_SETTINGS)
def test_pixels_equal_the_reference(kind, settings):
    from reference import make_image_processor

    reference = make_image_processor(kind, settings)
    ours = image_settings({**settings, "image_processor_type": f"{kind}ImageProcessor"}, "CLIP")
    rng = np.random.default_rng(0)
    for _ in range(40):
        height, width = rng.integers(5, 90, 2)
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        expected = reference(image)["pixel_values"][0].transpose(1, 2, 0)
        np.testing.assert_allclose(preprocess(image, ours), expected, atol=1e-5)


TILINGS = [
    {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}},
    {"size": {"height": 24, "width": 24}, "crop_size": 24, "do_center_crop": False, "do_resize": False, "resample": 2},
    {"size": 30, "crop_size": 24, "image_mean": 0.4, "image_std": [0.1, 0.2, 0.3]},
    {"size": 30, "crop_size": {"height": 24, "width": 24}, "do_center_crop": False, "do_rescale": False},
]


@pytest.mark.parametrize("settings", TILINGS)
def test_tiles_equal_the_reference(settings):
    from reference import make_image_processor

    settings = {**settings, "image_grid_pinpoints": [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]}
    reference = make_image_processor("LlavaNext", settings)
    ours = image_settings(settings, "LlavaNext")
    rng = np.random.default_rng(2)
    for _ in range(40):
        height, width = rng.integers(1, 110, 2)
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        expected = np.moveaxis(reference(image)["pixel_values"][0], 1, -1)
        np.testing.assert_allclose(llava_next.pixels(image, ours), expected, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "largest"),
    [
        ({"size": {"height": 24, "width": 24}}, 150),
        (
            {"size": {"height": 31, "width": 31}, "resample": 3, "max_image_tiles": 6, "image_mean": [0.1, 0.2, 0.3]},
            150,
        ),
        ({"size": {"height": 17, "width": 17}, "max_image_tiles": 1, "do_normalize": False}, 60),
        ({"size": {"height": 560, "width": 560}, "image_std": [0.3, 0.2, 0.1]}, 1500),
    ],
)
def test_canvases_equal_the_reference(settings, largest):
    """Pixels, number and order of tiles, and the canvas; one that is 2000 times as long as wide among them."""
    from reference import make_image_processor

    reference = make_image_processor("Mllama", settings)
    ours = image_settings(settings, "Mllama")
    tiles = ours.tiling.max_tiles
    rng = np.random.default_rng(2)
    for height, width in [*rng.integers(1, largest, (40 if largest < 200 else 5, 2)).tolist(), (1, 2000), (300, 2)]:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        expected = reference(image, return_tensors="np")
        used = expected["aspect_ratio_mask"][0, 0].astype(bool)
        pixels = np.moveaxis(expected["pixel_values"][0, 0], 1, -1)
        np.testing.assert_allclose(mllama.pixels(image, ours), pixels[used], atol=1e-5, rtol=1e-6)
        assert (pixels[~used] == 0).all()
        grid = choose_canvas((height, width), ours.tiling)
        assert possible_grids(tiles).index(grid) + 1 == expected["aspect_ratio_ids"][0, 0]


def test_canvases_of_many_sizes_equal_the_reference():
    from transformers.models.mllama import image_processing_pil_mllama as reference

    for tile_size, tiles in ((560, 4), (448, 4), (336, 9)):
        for size in sizes_of_images(400):
            canvas = reference.get_optimal_tiled_canvas(*size, tiles, tile_size)
            grid = choose_canvas(size, Canvas(tile_size=tile_size, max_tiles=tiles))
            assert tuple(count * tile_size for count in grid) == canvas
            assert fit_size(size, grid, tile_size) == reference.get_image_size_fit_to_canvas(*size, *canvas, tile_size)


@pytest.mark.parametrize("places", [[], [3], [0], [0, 1], [2, 5], [2, 3, 7], [0, 4, 5, 6], [1, 3, 4, 8, 9], [11]])
def test_what_tokens_see_equals_the_reference(places):
    """Of prompts of 12 tokens with image tokens at these places, each image having another number of tiles."""
    from transformers.models.mllama.processing_mllama import (
        convert_sparse_cross_attention_mask_to_dense,
        get_cross_attention_token_mask,
    )  # fmt: skip

    ids = [99 if place in places else 5 for place in range(12)]
    tiles = [1 + place % 4 for place in places]
    spans = [Span(place, count, 4) for place, count in zip(places, tiles, strict=True)]
    sight = look(spans, 12, 0, blind_attend=True, whole=True)
    if not places:
        assert sight is None
        return
    sparse = get_cross_attention_token_mask(ids, 99)
    dense = convert_sparse_cross_attention_mask_to_dense([sparse], [tiles], 4, 12)[0].reshape(12, -1).astype(bool)
    dense[~dense.any(axis=1)] = True
    mask = np.ones_like(dense) if sight.mask is None else np.array(sight.mask)
    np.testing.assert_array_equal(mask, dense)


def test_defaults_of_llama_vision_equal_the_reference():
    from transformers import MllamaConfig

    whole = MllamaConfig().to_dict()
    expected = mllama.config(whole)
    plain = replace(expected.decoder, rope_scaling=None)  # where transformers writes {"rope_type": "default"}
    assert mllama.config({}) == replace(expected, decoder=plain)


def sizes_of_images(number):
    """Heights and widths: most like photos, some extreme, and ties."""
    rng = np.random.default_rng(3)
    photos = np.exp(rng.uniform(np.log(100), np.log(4000), (number - 100, 2))).astype(int)
    extreme = rng.integers(1, 12, (50, 2)) * rng.integers(1, 900, (50, 2))
    squares = np.repeat(rng.integers(1, 3000, (50, 1)), 2, axis=1)
    return [tuple(map(int, size)) for size in np.concatenate([photos, extreme, squares])]


def test_numbers_of_tokens_equal_the_reference():
    """With LLaVA-NeXT's own pinpoints, tiles of 336 pixels and patches of 14."""
    from reference import make_image_processor, make_tokenizer
    from transformers import LlavaNextProcessor

    processor = LlavaNextProcessor(
        make_image_processor("LlavaNext", {"size": {"shortest_edge": 336}}), make_tokenizer("llama"),
        patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip
    assert [list(size) for size in LLAVA_NEXT_PINPOINTS] == processor.image_processor.image_grid_pinpoints
    named = [(899, 1024), (480, 640), (336, 336), (200, 300), (2000, 300), (220, 1056), (88, 55)]
    sizes = [*named, *sizes_of_images(500)]
    expected = processor._get_num_multimodal_tokens(sizes)["num_image_tokens"]
    assert [count_tokens(size, LLAVA_NEXT_PINPOINTS, tile_size=336, side=24) for size in sizes] == expected
    assert expected[: len(named)] == [2634, 2340, 1176, 1464, 1368, 1744, 984]


@pytest.mark.parametrize("pinpoints", [None, [[24, 24]], [[72, 72], [24, 48]]])
def test_packed_features_equal_the_reference(pinpoints, tmp_path):
    """A pinpoint of a single tile among them."""
    import torch

    changes = {} if pinpoints is None else {"image_grid_pinpoints": pinpoints}
    folder = variant("llava-next-clip-mistral", tmp_path / "model", **changes)
    reference = Reference(folder)
    config = load(folder)[0].config
    newline = torch.arange(2.0)
    for size in sizes_of_images(150):
        tiles = reference.count_tiles(size)
        features = torch.arange(tiles * 16 * 2.0).reshape(tiles, 16, 2)
        (expected,), _ = reference.model.model.pack_image_features([features], [size], "default", newline)
        packed = pack(
            mx.array(features.numpy()), mx.array(newline.numpy()), size, config.image_grid_pinpoints, tile_size=24
        )
        np.testing.assert_array_equal(np.array(packed), expected.numpy())


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_colours_equal_the_reference(mode):
    from reference import make_image_processor

    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 256, (20, 31, 4), dtype=np.uint8))
    image = image.convert("RGB").convert(mode) if mode in ("CMYK", "YCbCr", "HSV", "P") else image.convert(mode)
    if mode in ("RGBA", "LA", "P", "L", "1"):
        buffer = io.BytesIO()
        image.save(buffer, "PNG", **({"transparency": 3} if mode == "P" else {}))
        image = Image.open(buffer)
    reference = make_image_processor("Siglip", {"do_resize": False})
    expected = reference(image)["pixel_values"][0].transpose(1, 2, 0)
    ours = preprocess(
        open_image(image), image_settings({"do_resize": False, "image_processor_type": "SiglipImageProcessor"}, "")
    )
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_masks_equal_the_reference(tmp_path):
    """big_vision's decoder composed of torch's own layers; its names of them are those of the file."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(
                nn.Conv2d(128, 128, 3, padding=1), nn.ReLU(), nn.Conv2d(128, 128, 3, padding=1), nn.ReLU(),
                nn.Conv2d(128, 128, 1),
            )  # fmt: skip

        def forward(self, x):
            return x + self.net(x)

    ups = [(128, 128), (128, 64), (64, 32), (32, 16)]
    layers = [nn.Conv2d(512, 128, 1), nn.ReLU(), Block(), Block()]
    for sizes in ups:
        layers += [nn.ConvTranspose2d(*sizes, 4, stride=2, padding=1), nn.ReLU()]
    reference = nn.Sequential(*layers, nn.Conv2d(16, 1, 1))
    arrays = random_mask_decoder(tmp_path / "vae-oid.npz")
    decoder = {
        name.removeprefix("decoder."): torch.tensor(array) for name, array in arrays.items() if "decoder" in name
    }
    reference.load_state_dict(decoder)
    codes = np.random.default_rng(2).integers(0, 128, (3, 16))
    with torch.no_grad():
        x = torch.tensor(arrays["_vq_vae._embedding"])[torch.tensor(codes)].reshape(3, 4, 4, 512)
        expected = reference(x.permute(0, 3, 1, 2))[:, 0].numpy()
    masks = load_mask_decoder(tmp_path / "vae-oid.npz")(codes)
    np.testing.assert_allclose(masks, expected, atol=1e-5 * np.abs(expected).max())


OWN_SUITES = (
    "Qwen/",
    "google/gemma-4-E",
    "PaddlePaddle/",
    "baidu/",
    "deepseek-community/",
    "ibm-granite/",
    "lightonai/",
)


@pytest.mark.parametrize("name", sorted(name for name in published.CONFIGS if not name.startswith(OWN_SUITES)))
def test_full_size_tensors_equal_the_reference(name):
    """Names and shapes that the reference's class gives a published config, on the meta device, all find their place."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    hf = published.CONFIGS[name]
    with torch.device("meta"):
        reference = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**hf))
    shapes = {theirs: tuple(tensor.shape) for theirs, tensor in reference.state_dict().items()}
    tied = hf["model_type"] in ("paligemma", "gemma3", "gemma4", "gemma4_unified")
    if tied or hf["text_config"].get("tie_word_embeddings"):  # files hold it once
        assert shapes.pop("lm_head.weight") == shapes["model.language_model.embed_tokens.weight"]
    planned = plan(published.without_data(hf, shapes))  # refuses what is missing, superfluous or of another shape
    assert {theirs.partition("vision_tower.")[2].removeprefix("vision_model.") for theirs in planned.unused} == (
        {"post_layernorm.weight", "post_layernorm.bias"} if planned.config.family.startswith("llava") else set()
    )
    ours = published.published(name)
    numbers = {rename(theirs, planned.family.WEIGHTS): shape for theirs, shape in shapes.items()}
    numbers.pop((), None)
    assert numbers == {rename(theirs, planned.family.WEIGHTS): info.shape for theirs, info in ours.tensors.items()}
