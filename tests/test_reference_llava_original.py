"""The reference suite, the original LLaVA: the goldens recomputed live, and variants that no golden has."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from llava_original import (
    PREFIX,
    PROMPTS,
    SPECS,
    Oracle,
    choose_resolution,
    expected_outputs,
    make_projector,
    merge_features,
)
from parity import check_answer, check_golden
from pieces import FOLDER, texts
from reference import CASES, GOLDEN

from mlx_vlm_mini import load
from mlx_vlm_mini.projectors.arrange import pack
from mlx_vlm_mini.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.reference
INTERN, V0, V15, V16 = sorted(SPECS)


@pytest.mark.parametrize("name", sorted(SPECS))
def test_the_goldens_are_what_the_oracle_gives_today(name):
    check_golden(GOLDEN / name, expected_outputs(name))


def compare(folder, prompt, case, steps=5):
    expected = Oracle(folder, prompt).answer(CASES[case], GOLDEN, steps)
    check_answer(*load(folder, conversation=prompt), CASES[case], expected, step=32)


VARIANTS = {
    "the last layer, its class token": (V0, {"mm_vision_select_layer": -1, "mm_vision_select_feature": "cls_patch"}),
    "an early layer": (V15, {"mm_vision_select_layer": 1}),
    "bars for v0": (V0, {"image_aspect_ratio": "pad", "mm_use_im_start_end": False}),
    "the middle for 1.5": (V15, {"image_aspect_ratio": "square"}),
    "linear where it is not said": (V0, {"mm_projector_type": "linear"}),
    "tiles as a grid": (V16, {"mm_patch_merge_type": "spatial"}),
    "tiles one by one": (V16, {"mm_patch_merge_type": "flat"}),
    "tiles written as text": (V16, {"image_grid_pinpoints": "[[72, 24], [24, 24], [96, 96]]"}),
    "grouped queries in Llama": (V16, {"model_type": "llava_llama", "rope_theta": 500.0}),
    "three layers": (V15, {"mm_projector_type": "mlp3x_gelu"}),
    "an InternViT's last layer, its class token": (
        INTERN, {"mm_vision_select_layer": -1, "mm_vision_select_feature": "cls_patch"}),
    "an InternViT without bars": (INTERN, {"image_aspect_ratio": "square", "mm_vision_select_layer": -2}),
    "an InternViT inside": (INTERN, {"inside": True}),
    "an InternViT for 448 pixels": (INTERN, {"mm_vision_tower": "tower/../tower/448/.."}),
    "a norm before the projector": (INTERN, {"mm_projector_type": "mlp2x_gelu_ln"}),
    "no projector": (V0, {"mm_projector_type": "identity"}),
    "space behind special tokens": (V15, {"legacy": True}),
    "none behind special tokens": (V0, {"legacy": False}),
}  # fmt: skip


@pytest.mark.parametrize("prompt", sorted(set(PROMPTS.values())))
@pytest.mark.parametrize("kind", sorted(VARIANTS))
def test_variants(kind, prompt, tmp_path):
    import torch

    name, changes = VARIANTS[kind]
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / name, folder)
    legacy = changes.get("legacy")
    if legacy is not None:
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "legacy": legacy, "add_bos_token": True}))
    changes = {key: value for key, value in changes.items() if key != "legacy"}
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps(config))
    if "mm_patch_merge_type" in changes:
        from safetensors.torch import load_file, save_file

        for file in folder.glob("model-*.safetensors"):
            save_file({k: v for k, v in load_file(file).items() if k != "model.image_newline"}, file, {"format": "pt"})
    if changes.get("mm_projector_type") == "identity":
        (folder / "mm_projector.bin").unlink()
    if changes.pop("inside", False):
        from safetensors.torch import load_file

        tower = load_file(folder / "tower/model.safetensors")
        rows = tower["embeddings.position_embedding"].float()
        grid = rows[:, 1:].reshape(1, 8, 8, -1).permute(0, 3, 1, 2)
        grid = torch.nn.functional.interpolate(grid, size=12, mode="bicubic", align_corners=False)
        tower["embeddings.position_embedding"] = torch.cat([rows[:, :1], grid.flatten(2).transpose(1, 2)], dim=1).half()
        file = folder / "pytorch_model-00001-of-00002.bin"
        torch.save({**torch.load(file), **{PREFIX + k: v for k, v in tower.items()}}, file)
        (folder / "tower/model.safetensors").unlink()
    if "448" in changes.get("mm_vision_tower", ""):
        (folder / "tower/448").mkdir()
    if "mlp" in changes.get("mm_projector_type", ""):
        torch.manual_seed(1)
        fresh = make_projector(config, config["mm_hidden_size"]).state_dict()
        for file in folder.glob("pytorch_model-*.bin"):
            kept = {k: v for k, v in torch.load(file).items() if "mm_projector" not in k}
            more = {f"model.mm_projector.{k}": v for k, v in fresh.items()} if "00001" in file.name else {}
            torch.save({**kept, **more}, file)
    if isinstance(config.get("image_grid_pinpoints"), str):
        pinpoints = json.loads(config["image_grid_pinpoints"])
        oracle = {**config, "image_grid_pinpoints": pinpoints}
        (folder / "config.json").write_text(json.dumps(oracle))
    for case in ("two_images", "two_turns"):
        compare(folder, prompt, case)
    (folder / "config.json").write_text(json.dumps(config))
    load(folder)[1]("Hi", [GOLDEN / "photo.jpg"])


@pytest.mark.parametrize("kind", ["flat", "spatial", "spatial_unpad"])
def test_merged_tiles_equal_the_oracle(kind):
    import torch

    pinpoints = [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]
    turned = [(high, wide) for wide, high in pinpoints]
    merge = {"flat": "flat", "spatial": "grid", "spatial_unpad": "unpad_floor"}[kind]
    rng = np.random.default_rng(5)
    config = {"mm_patch_merge_type": kind, "image_grid_pinpoints": pinpoints}
    for _ in range(300):
        width, height = (int(side) for side in rng.integers(1, 300, 2))
        wide, high = choose_resolution((width, height), pinpoints)
        tiles = 1 + wide * high // 24**2
        features = torch.arange(tiles * 16 * 2.0).reshape(tiles, 16, 2)
        newline = torch.tensor([-1.0, -2.0])
        expected = merge_features(features, newline, (width, height), config, 24)
        packed = pack(
            mx.array(features.numpy()), mx.array(newline.numpy()) if merge == "unpad_floor" else None,
            (height, width), turned, tile_size=24, merge=merge,
        )  # fmt: skip
        np.testing.assert_array_equal(np.array(packed), expected.numpy())


def test_tokens_of_prompts_equal_sentencepiece(tmp_path):
    """As the slow tokenizer splits at special tokens and hands the rest to SentencePiece."""
    oracle = Oracle(GOLDEN / V0, "v0")
    tokenizer = load_tokenizer(GOLDEN / V0)
    assert (FOLDER / "llama.model").read_bytes() == (GOLDEN / V0 / "tokenizer.model").read_bytes()
    parts = list(texts(3000, seed=9))
    for one, two, three in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        text = f"{one}</s>{two}<im_start>{three}"
        assert tokenizer.encode(text) == oracle.encode(text), text
