"""The checkpoints and pictures that are measured, made from seeds: nothing has to be downloaded.

    python benchmarks/workloads.py [FOLDER] [--large]      FOLDER is /tmp/mlx-vlm-mini-workloads unless told

LLaVA-1.5's layout, so that mlx-vlm and transformers load the same folders. Of a tower and a decoder with

- S: 1 M parameters, 36 image tokens, float32;
- M: 84 M parameters, 576 image tokens, float32; M-4bit is the same, its decoder quantized by our `convert`;
- L (`--large`, 2.3 GB): the layers of LLaVA-1.5-7B, 4 a tower, float16.

The weights are random; rows of the head that would end an answer, or give a token without a text, are zero, so that a
greedy answer has as many tokens as it may. `questions.json` in each folder holds texts whose prompts have the lengths
that its keys say, with one picture. What exists already stays as it is.
"""

import argparse
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_vlm_mini.layers.cpu.blas import use_openblas

use_openblas()  # before anything imports mlx

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from PIL import Image

from mlx_vlm_mini import load
from mlx_vlm_mini.checkpoints.weights import hub_name, to_torch_layout
from mlx_vlm_mini.convert import convert
from mlx_vlm_mini.families import llava
from mlx_vlm_mini.model import VLM
from mlx_vlm_mini.processor import Processor

GOLDEN = Path(__file__).parent.parent / "tests" / "golden" / "llava-clip-llama"
FOLDER = Path("/tmp/mlx-vlm-mini-workloads")
SIZES: dict[str, dict[str, Any]] = {
    "S": {
        "dtype": "float32", "lengths": (64,),
        "vision_config": {
            "hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "num_hidden_layers": 3,
            "image_size": 84, "patch_size": 14,
        },
        "text_config": {
            "hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 4, "num_key_value_heads": 4,
            "head_dim": 32, "num_hidden_layers": 2, "vocab_size": 448,
        },
    },
    "M": {
        "dtype": "float32", "lengths": (589, 1000, 2000, 4000, 8000, 16000),
        "vision_config": {
            "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 5,
            "image_size": 336, "patch_size": 14,
        },
        "text_config": {
            "hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12, "num_key_value_heads": 12,
            "head_dim": 64, "num_hidden_layers": 6, "vocab_size": 2560,
        },
    },
    "L": {
        "dtype": "float16", "lengths": (589,),
        "vision_config": {
            "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 4,
            "image_size": 336, "patch_size": 14,
        },
        "text_config": {
            "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32,
            "head_dim": 128, "num_hidden_layers": 4, "vocab_size": 32064,
        },
    },
}  # fmt: skip
TEMPLATE = (  # short, as the golden's tokenizer cuts capital words into letters
    "{% for message in messages %}{{ message['role'][0].upper() + ': ' }}"
    "{% for part in message['content'] %}{{ '<image>\n' if part['type'] == 'image' else part['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
)


def make_checkpoint(name: str, folder: Path) -> None:
    """Write a random LLaVA of one of `SIZES`; a folder that exists is kept."""
    if folder.exists():
        return
    print(f"making {folder}", file=sys.stderr)
    sizes, work = SIZES[name], folder.with_suffix(".part")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    side = sizes["vision_config"]["image_size"]
    for file in ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "generation_config.json"):
        shutil.copyfile(GOLDEN / file, work / file)
    (work / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    settings = json.loads((GOLDEN / "preprocessor_config.json").read_text())
    settings |= {"crop_size": {"height": side, "width": side}, "size": {"shortest_edge": side}}
    (work / "preprocessor_config.json").write_text(json.dumps(settings))
    config = json.loads((GOLDEN / "config.json").read_text())
    config |= {"torch_dtype": sizes["dtype"], "image_seq_length": (side // 14) ** 2}
    for part in ("vision_config", "text_config"):
        config[part] |= sizes[part]
    config["text_config"]["max_position_embeddings"] = 32768
    (work / "config.json").write_text(json.dumps(config, indent=1))
    save_weights(config, work / "model.safetensors", getattr(mx, sizes["dtype"]))
    _, processor = load(work)
    lengths = {str(length): text_of_length(processor, length) for length in sizes["lengths"]}
    (work / "questions.json").write_text(json.dumps(lengths))
    work.rename(folder)


def save_weights(config: dict[str, Any], file: Path, dtype: mx.Dtype) -> None:
    """Random weights for all tensors that transformers' class has, by their names there."""
    understood = llava.config(config)
    whole = replace(understood.vision, feature_layers=(understood.vision.num_hidden_layers,))
    tensors = {}
    for number, (name, shaped) in enumerate(tree_flatten(VLM(replace(understood, vision=whole)).parameters())):
        shape, key = shaped.shape, mx.random.key(number)
        if len(shape) == 1:
            base = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            array = base + 0.05 * mx.random.normal(shape, key=key)
        else:
            deviation = 1.0 if "embed_tokens" in name else 0.02 if "pos_embed" in name else np.prod(shape[1:]) ** -0.5
            array = float(deviation) * mx.random.normal(shape, key=key)
        if name == "decoder.lm_head.weight":
            array = mx.where((mx.arange(shape[0]) < 3) | (mx.arange(shape[0]) >= 420), 0, array.T).T
        tensors[hub_name(name, llava.WEIGHTS)] = mx.contiguous(to_torch_layout(name, array).astype(dtype))
        mx.eval(tensors[hub_name(name, llava.WEIGHTS)])
    width = whole.hidden_size
    norm = "vision_tower.vision_model.post_layernorm"
    tensors |= {f"{norm}.weight": mx.ones(width, dtype=dtype), f"{norm}.bias": mx.zeros(width, dtype=dtype)}
    mx.save_safetensors(str(file), tensors, {"format": "pt"})


def text_of_length(processor: Processor, length: int) -> str:
    """A text whose prompt with one picture has exactly so many tokens."""
    picture = Image.new("RGB", (84, 84))
    text = "Is it"

    def tokens(text: str) -> int:
        return processor([picture, text]).input_ids.shape[1]

    each = tokens(text + " it") - tokens(text)
    text += " it" * ((length - tokens(text)) // each)
    for ending in ("", " a", " you", "x", " ax", " yellx"):
        if tokens(text + ending) == length:
            return text + ending
    raise ValueError(f"no text gives a prompt of {length} tokens: {tokens(text)} is the nearest")


def make_pictures(folder: Path) -> None:
    """A photograph of 12 megapixels, and 16 small pictures."""
    if folder.exists():
        return
    print(f"making {folder}", file=sys.stderr)
    work = folder.with_suffix(".part")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    draw_picture(0, 4000, 3000).save(work / "12mp.jpg", quality=90)
    for number in range(16):
        draw_picture(1 + number, 640, 480).save(work / f"small-{number:02}.jpg", quality=90)
    work.rename(folder)


def draw_picture(seed: int, width: int, height: int) -> Image.Image:
    """Soft shapes with grain, which compress about as a photograph does."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 100 + 2, width // 100 + 2, 3), dtype=np.uint8))
    soft = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    return Image.fromarray(np.clip(soft + rng.integers(-9, 10, soft.shape, dtype=np.int16), 0, 255).astype(np.uint8))


def make_workloads(folder: Path = FOLDER, *, large: bool = False) -> dict[str, Path]:
    """Make what is missing.

    Returns:
        Paths by name: S, M, M-4bit, pictures, and L where it was asked for.
    """
    found = {name: folder / name for name in ("S", "M", "M-4bit", "pictures", *(["L"] if large else []))}
    for name in ("S", "M", *(["L"] if large else [])):
        make_checkpoint(name, found[name])
    if not found["M-4bit"].exists():
        convert(str(found["M"]), found["M-4bit"], bits=4, check=False)
        shutil.copyfile(found["M"] / "questions.json", found["M-4bit"] / "questions.json")
    make_pictures(found["pictures"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER)
    parser.add_argument("--large", action="store_true")
    options = parser.parse_args()
    for name, path in make_workloads(options.folder, large=options.large).items():
        print(f"{name}: {path}")


if __name__ == "__main__":
    main()
