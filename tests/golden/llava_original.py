"""Tiny checkpoints as the authors of LLaVA write them, and their answers.

    python tests/golden/llava_original.py           rewrites them
    python tests/golden/llava_original.py NAME...   rewrites these only

Their code (github.com/haotian-liu/LLaVA) does not run with transformers 5. The oracle is therefore put together here of
transformers' CLIPVisionModel and LlamaForCausalLM or MistralForCausalLM, torch's Linear and GELU, and SentencePiece, as
llava_arch.py, mm_utils.py and conversation.py put theirs together; it shares nothing with the package.
"""

import io
import json
import math
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pieces import FOLDER as PIECES
from PIL import Image
from reference import CASES, GOLDEN, STEPS, USUAL

PREFIX = "model.vision_tower.vision_tower."


@dataclass(frozen=True)
class OriginalSpec:
    """A tiny checkpoint: config.json, the tower's config, and how its files are laid out.

    Attributes:
        inside: the tower's tensors lie in the checkpoint.
        pair: the tower's folder holds both of CLIP's towers.
        lone_projector: it lies in mm_projector.bin alone.
    """

    config: dict[str, Any]
    tower: dict[str, Any]
    tokenizer: dict[str, Any]
    form: str
    seed: int
    inside: bool = False
    pair: bool = False
    lone_projector: bool = False
    added_tokens: tuple[str, ...] = ()
    cases: tuple[str, ...] = USUAL


_COMMON: dict[str, Any] = {
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "hidden_act": "silu", "mm_vision_tower": "tower",
    "mm_vision_select_layer": -2, "use_mm_proj": True, "torch_dtype": "float16", "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}  # fmt: skip
SPECS = {
    "llava-original-internvit": OriginalSpec(
        config={
            **_COMMON, "model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"], "vocab_size": 440,
            "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 3,
            "num_key_value_heads": 3, "rms_norm_eps": 1e-5, "rope_scaling": None, "mm_hidden_size": 24,
            "mm_projector_type": "mlp2x_gelu", "mm_use_im_start_end": False, "mm_use_im_patch_token": False,
            "mm_vision_select_feature": "patch", "mm_vision_select_layer": -4, "image_aspect_ratio": "pad"},
        tower=dict(
            hidden_size=24, intermediate_size=40, num_hidden_layers=6, num_attention_heads=3, image_size=224, patch_size=28,
            model_type="intern_vit_6b", architectures=["InternVisionModel"], hidden_act="gelu", layer_norm_eps=1e-6,
            qkv_bias=False, qk_normalization=True, torch_dtype="bfloat16", use_flash_attn=True,
            auto_map={"AutoModel": "modeling_intern_vit.InternVisionModel"}),
        tokenizer={"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True},
        form="bins", seed=34),
    "llava-original-v0": OriginalSpec(
        config={
            **_COMMON, "model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"], "vocab_size": 443,
            "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 3,
            "rms_norm_eps": 1e-6, "mm_hidden_size": 48, "mm_use_im_start_end": True, "mm_use_im_patch_token": False},
        tower=dict(
            hidden_size=48, intermediate_size=72, num_hidden_layers=3, num_attention_heads=3, image_size=42, patch_size=14),
        tokenizer={"tokenizer_class": "LlamaTokenizer"}, added_tokens=("<im_patch>", "<im_start>", "<im_end>"),
        form="bin", seed=31, lone_projector=True),
    "llava-original-v1.5": OriginalSpec(
        config={
            **_COMMON, "model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"], "vocab_size": 440,
            "hidden_size": 60, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 3,
            "num_key_value_heads": 3, "rms_norm_eps": 1e-5, "rope_scaling": None, "mm_hidden_size": 36,
            "mm_projector_type": "mlp2x_gelu", "mm_use_im_start_end": False, "mm_use_im_patch_token": False,
            "mm_vision_select_feature": "patch", "image_aspect_ratio": "pad"},
        tower=dict(
            hidden_size=36, intermediate_size=50, num_hidden_layers=3, num_attention_heads=3, image_size=28, patch_size=7),
        tokenizer={"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True},
        form="bins", seed=32, pair=True),
    "llava-original-v1.6-mistral": OriginalSpec(
        config={
            **_COMMON, "model_type": "llava_mistral", "architectures": ["LlavaMistralForCausalLM"], "vocab_size": 440,
            "hidden_size": 56, "intermediate_size": 70, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None,
            "mm_hidden_size": 36, "mm_projector_type": "mlp2x_gelu", "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False, "mm_vision_select_feature": "patch", "image_aspect_ratio": "anyres",
            "mm_patch_merge_type": "spatial_unpad", "unfreeze_mm_vision_tower": True,
            "image_grid_pinpoints": [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]},
        tower=dict(
            hidden_size=36, intermediate_size=50, num_hidden_layers=3, num_attention_heads=3, image_size=24, patch_size=6),
        tokenizer={"tokenizer_class": "LlamaTokenizer", "legacy": True},
        form="safetensors", seed=33, inside=True),
}  # fmt: skip


def _random(module: Any, seed: int) -> None:
    """Random half-precision weights in which no norm, bias or embedding is at a neutral value."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in sorted(module.named_parameters()):
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim < 2:
                tensor.copy_(0.3 * noise + ("norm" in name and name.endswith("weight")))
            elif "embed" in name:
                tensor.copy_(0.7 * noise)
            else:
                tensor.copy_(1.4 * noise / tensor[0].numel() ** 0.5)
            tensor.copy_(tensor.half().float())


def _decoder_class(config: dict[str, Any]) -> tuple[Any, Any]:
    import transformers

    kind = "Mistral" if config["model_type"] == "llava_mistral" else "Llama"
    return getattr(transformers, f"{kind}Config"), getattr(transformers, f"{kind}ForCausalLM")


def make_decoder(config: dict[str, Any]) -> Any:
    config_class, model_class = _decoder_class(config)
    known = {
        key: value
        for key, value in config.items()
        if not key.startswith(("mm_", "image_", "model_type", "arch", "torch"))
    }
    theta = known.pop("rope_theta", 10000.0)
    known.pop("rope_scaling", None)
    return model_class._from_config(
        config_class(**known, rope_parameters={"rope_theta": theta, "rope_type": "default"}),
        attn_implementation="eager",
    ).eval()


def make_projector(config: dict[str, Any], width: int) -> Any:
    import torch

    kind = config.get("mm_projector_type", "linear")
    if kind == "linear":
        return torch.nn.Linear(width, config["hidden_size"])
    if kind == "identity":
        return torch.nn.Identity()
    layers: list[Any] = [torch.nn.LayerNorm(width)] if "ln" in kind else []
    layers.append(torch.nn.Linear(width, config["hidden_size"]))
    for _ in range(int(kind[3]) - 1):
        layers += [torch.nn.GELU(), torch.nn.Linear(config["hidden_size"], config["hidden_size"])]
    return torch.nn.Sequential(*layers)


def save(spec: OriginalSpec, folder: Path) -> None:
    import torch
    from internvl_reference import make_vision, write_vision
    from safetensors.torch import save_file
    from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(spec.config, indent=1))
    (folder / "tokenizer_config.json").write_text(json.dumps(spec.tokenizer, indent=1))
    shutil.copyfile(PIECES / "llama.model", folder / "tokenizer.model")
    if spec.added_tokens:
        ids = {token: 440 + i for i, token in enumerate(spec.added_tokens)}
        (folder / "added_tokens.json").write_text(json.dumps(ids))
    decoder, projector = make_decoder(spec.config), make_projector(spec.config, spec.tower["hidden_size"])
    intern = spec.tower.get("model_type") == "intern_vit_6b"
    newline = torch.nn.ParameterDict({"image_newline": torch.nn.Parameter(torch.zeros(spec.config["hidden_size"]))})
    vision = make_vision(spec.tower) if intern else CLIPVisionModel(CLIPVisionConfig(**spec.tower))
    if spec.pair:
        text = dict(
            hidden_size=24,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=30,
            bos_token_id=1,
            eos_token_id=2,
        )
        pair = CLIPModel(CLIPConfig(text_config=text, vision_config=spec.tower, projection_dim=16))
        _random(pair, spec.seed + 2)
    for number, module in enumerate((decoder, projector, newline, vision)):
        _random(module, 10 * spec.seed + number)
    tensors = {name: tensor.half() for name, tensor in decoder.state_dict().items()}
    lone = {f"model.mm_projector.{name}": tensor.half() for name, tensor in projector.state_dict().items()}
    tensors |= {} if spec.lone_projector else lone
    if "unpad" in spec.config.get("mm_patch_merge_type", ""):
        tensors["model.image_newline"] = newline["image_newline"].detach().half()
    if spec.form == "bin":  # as old files hold them
        for layer in range(spec.config["num_hidden_layers"]):
            tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    tower = folder / "tower"
    tower.mkdir()
    if spec.inside:
        for name, tensor in vision.state_dict().items():
            full = name if name.startswith("vision_model.") else f"vision_model.{name}"
            tensors[PREFIX + full] = tensor.half()
        (tower / "config.json").write_text(json.dumps({"model_type": "clip_vision_model", **spec.tower}, indent=1))
    elif intern:
        (tower / "config.json").write_text(json.dumps(spec.tower, indent=1))
        kernel = "embeddings.patch_embedding.weight"  # small, so that positions count
        parts = {k: v.half() / (64 if k == kernel else 1) for k, v in write_vision(vision).items()}
        save_file(parts, tower / "model.safetensors", {"format": "pt"})
    else:
        (pair if spec.pair else vision).half().save_pretrained(tower)
    side = spec.tower["image_size"]
    CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}).save_pretrained(
        tower
    )  # which the authors leave aside for an InternViT
    names = sorted(tensors)
    if spec.form == "bin":
        torch.save({name: tensors[name].clone() for name in names}, folder / "pytorch_model.bin")
        torch.save({name: tensor.detach().clone() for name, tensor in lone.items()}, folder / "mm_projector.bin")
        return
    stem, suffix = ("pytorch_model", "bin") if spec.form == "bins" else ("model", "safetensors")
    files = [f"{stem}-{i + 1:05}-of-00002.{suffix}" for i in range(2)]
    index = {"metadata": {}, "weight_map": {name: files[i % 2] for i, name in enumerate(names)}}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index, indent=1))
    for i, file in enumerate(files):
        part = {name: tensors[name].clone().contiguous() for name in names[i::2]}
        if suffix == "bin":
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file, {"format": "pt"})


def read_tensors(folder: Path) -> dict[str, Any]:
    """All tensors of a folder in float32; of mm_projector.bin what the others lack."""
    import torch
    from safetensors.torch import load_file

    tensors: dict[str, Any] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        tensors |= load_file(file)
    for file in [*sorted(folder.glob("pytorch_model*.bin")), *folder.glob("mm_projector.bin")]:
        tensors |= {name: tensor for name, tensor in torch.load(file).items() if name not in tensors}
    return {name: tensor.float() for name, tensor in tensors.items()}


SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the human's questions."
)


def write_prompt(kind: str, turns: Sequence[tuple[str, str]]) -> str:
    """conversation.py's `get_prompt` with an empty last turn of the assistant."""
    if kind == "v0":
        said = "".join(f"{'Human' if role == 'user' else 'Assistant'}: {text}###" for role, text in turns)
        return f"{SYSTEM}###{said}Assistant:"
    if kind == "v1":
        said = "".join(f"USER: {text} " if role == "user" else f"ASSISTANT: {text}</s>" for role, text in turns)
        return f"{SYSTEM} {said}ASSISTANT:"
    assert kind == "mistral"
    return "".join(f"[INST] {text} [/INST]" if role == "user" else f" {text} </s>" for role, text in turns)


def choose_resolution(size: tuple[int, int], choices: Sequence[Sequence[int]]) -> tuple[int, int]:
    """mm_utils.py's `select_best_resolution`: all sizes are (width, height)."""
    best, best_kept, best_waste = (0, 0), 0, math.inf
    for wide, high in choices:
        scale = min(wide / size[0], high / size[1])
        kept = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        if kept > best_kept or (kept == best_kept and wide * high - kept < best_waste):
            best, best_kept, best_waste = (wide, high), kept, wide * high - kept
    return best


def merge_features(features: Any, newline: Any, size: tuple[int, int], config: dict[str, Any], tile: int) -> Any:
    """llava_arch.py's arrangement of the features of a whole image and its tiles, (1 + tiles, patches, C)."""
    import torch

    kind = config.get("mm_patch_merge_type", "flat")
    if kind == "flat":
        return features.flatten(0, 1)
    across, down = (pixels // tile for pixels in choose_resolution(size, config["image_grid_pinpoints"]))
    side = math.isqrt(features.shape[1])
    grid = features[1:].view(down, across, side, side, -1)
    if "unpad" not in kind:
        return torch.cat([features[0], grid.permute(0, 2, 1, 3, 4).flatten(0, 3)])
    grid = grid.permute(4, 0, 2, 1, 3).flatten(1, 2).flatten(2, 3)
    rows, columns = grid.shape[1:]
    if size[0] / size[1] > columns / rows:
        bar = (rows - int(size[1] * (columns / size[0]))) // 2
        grid = grid[:, bar : rows - bar]
    else:
        bar = (columns - int(size[0] * (rows / size[1]))) // 2
        grid = grid[:, :, bar : columns - bar]
    grid = torch.cat([grid, newline[:, None, None].expand(*grid.shape[:-1], 1)], dim=-1)
    return torch.cat([features[0], grid.flatten(1, 2).T])


class Oracle:
    """A folder opened by the parts that the authors' code is made of, in float32."""

    def __init__(self, folder: Path, prompt: str) -> None:
        import sentencepiece
        from internvl_reference import make_vision, read_vision
        from safetensors.torch import load_file
        from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaTokenizer
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        self.config = json.loads((folder / "config.json").read_text())
        self.prompt = prompt
        tensors, tower = read_tensors(folder), folder / "tower"
        self.decoder = make_decoder(self.config)
        own = {name: tensors[name] for name in self.decoder.state_dict()}
        self.decoder.load_state_dict(own)
        inside = {name.removeprefix(PREFIX): value for name, value in tensors.items() if name.startswith(PREFIX)}
        known = json.loads((tower / "config.json").read_text())
        intern = known.get("model_type") == "intern_vit_6b"
        if intern:
            given = inside or {name: value.float() for name, value in load_file(tower / "model.safetensors").items()}
            stored = math.isqrt(given["embeddings.position_embedding"].shape[1])
            self.tower = make_vision({**known, "image_size": stored * known["patch_size"]})
            read_vision(self.tower, given)
        elif inside:
            settings = json.loads((tower / "config.json").read_text())
            self.tower = CLIPVisionModel(CLIPVisionConfig(**{k: v for k, v in settings.items() if k != "model_type"}))
            wanted = self.tower.state_dict()
            self.tower.load_state_dict({
                name: inside[name if name in inside else f"vision_model.{name}"] for name in wanted
            })  # fmt: skip
        else:
            self.tower = CLIPVisionModel.from_pretrained(tower).float()
        self.tower.eval()
        self.projector = make_projector(self.config, self.tower.config.hidden_size)
        given = {n.partition("mm_projector.")[2]: value for n, value in tensors.items() if "mm_projector." in n}
        self.projector.load_state_dict(given)
        self.newline = tensors.get("model.image_newline")
        self.images = CLIPImageProcessorPil.from_pretrained(tower)
        if intern:
            side = 448 if "448" in self.config["mm_vision_tower"] else 336
            self.images = CLIPImageProcessorPil(
                size=side, crop_size=side, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
            )
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        self.spaced = settings.get("legacy", True)
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        self.slow = LlamaTokenizer.from_pretrained(folder)  # for the other way of spaces
        added = folder / "added_tokens.json"
        special = {"<s>": 1, "</s>": 2, **(json.loads(added.read_text()) if added.is_file() else {})}
        self.special = special

    def encode(self, text: str) -> list[int]:
        """A text as LlamaTokenizer 4.37 with `use_fast=False` reads it, begin token included."""
        if not self.spaced:
            ids = self.slow(text).input_ids
            return list(ids)
        ids = [1]
        for part in re.split(f"({'|'.join(map(re.escape, self.special))})", text):
            ids += [self.special[part]] if part in self.special else self.pieces.encode(part)
        return ids

    def tokenize(self, text: str) -> list[int]:
        """mm_utils.py's `tokenizer_image_token`: -200 for an image."""
        first, *rest = (self.encode(chunk) for chunk in text.split("<image>"))
        return first + [token for chunk in rest for token in (-200, *chunk[1:])]

    def prepare(self, image: Image.Image) -> np.ndarray:
        """mm_utils.py's `process_images` of one image: float32[B, 3, height, width].

        Transparent pixels are white, as this package has them for every family. (The original's `convert("RGB")` shows
        what colour happens to be stored in them.)
        """
        shown, side = image.convert("RGBA"), self.images.crop_size["height"]
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), shown).convert("RGB")
        shape, pieces = self.config.get("image_aspect_ratio"), [image]
        if shape == "pad":
            longest = max(image.size)
            square = Image.new("RGB", (longest, longest), tuple(int(x * 255) for x in self.images.image_mean))
            square.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
            pieces = [square]
        elif shape == "anyres":
            wide, high = choose_resolution(image.size, self.config["image_grid_pinpoints"])
            by_width, by_height = wide / image.width, high / image.height
            if by_width < by_height:
                fitted = (wide, min(math.ceil(image.height * by_width), high))
            else:
                fitted = (min(math.ceil(image.width * by_height), wide), high)
            canvas = Image.new("RGB", (wide, high))
            canvas.paste(image.resize(fitted), ((wide - fitted[0]) // 2, (high - fitted[1]) // 2))
            corners = [(left, top) for top in range(0, high, side) for left in range(0, wide, side)]
            pieces = [canvas.crop((left, top, left + side, top + side)) for left, top in corners]
            pieces.insert(0, image.resize((side, side)))
        return np.concatenate([self.images(piece, return_tensors="np")["pixel_values"] for piece in pieces])

    def encode_image(self, image: Image.Image, pixels: np.ndarray) -> Any:
        import torch

        states = self.tower(torch.tensor(pixels), output_hidden_states=True).hidden_states
        features = states[self.config["mm_vision_select_layer"]]
        if self.config.get("mm_vision_select_feature", "patch") == "patch":
            features = features[:, 1:]
        features = self.projector(features)
        if self.config.get("image_aspect_ratio") != "anyres":
            return features[0]
        return merge_features(features, self.newline, image.size, self.config, self.tower.config.image_size)

    def answer(self, messages: list[dict[str, Any]], pictures: Path, steps: int = STEPS) -> dict[str, np.ndarray]:
        """Prompt ids (0 at an image's slots), pixels, and `steps` tokens decoded greedily with the cache; see
        `reference.Reference.answer`."""
        import torch

        mark = "<im_start><image><im_end>\n" if self.config.get("mm_use_im_start_end") else "<image>\n"
        turns = [
            (turn["role"], "".join(mark if part["type"] == "image" else part["text"] for part in turn["content"]))
            for turn in messages
        ]
        names = [part["image"] for turn in messages for part in turn["content"] if part["type"] == "image"]
        opened = [Image.open(io.BytesIO((pictures / name).read_bytes())) for name in names]
        pixels = [self.prepare(image) for image in opened]
        embed, ids, parts = self.decoder.get_input_embeddings(), [], []
        with torch.no_grad():
            features = [self.encode_image(image, rows) for image, rows in zip(opened, pixels, strict=True)]
            waiting = list(features)
            for token in self.tokenize(write_prompt(self.prompt, turns)):
                if token == -200:
                    parts.append(waiting.pop(0))
                    ids += [0] * len(parts[-1])
                else:
                    parts.append(embed(torch.tensor([token])))
                    ids.append(token)
            assert not waiting
            out = self.decoder(inputs_embeds=torch.cat(parts)[None], use_cache=True)
            known = torch.tensor(ids)[1:, None]
            prompt = torch.log_softmax(out.logits[0, :-1], dim=-1).gather(1, known)[:, 0]
            rows, tokens = [], []
            for _ in range(steps):
                rows.append(torch.log_softmax(out.logits[0, -1], dim=-1).numpy())
                tokens.append(int(rows[-1].argmax()))
                out = self.decoder(torch.tensor([[tokens[-1]]]), past_key_values=out.past_key_values, use_cache=True)
        answer = {
            "prompt_ids": np.array(ids, dtype=np.int32),
            "prompt_logprobs": prompt.numpy(),
            "token_ids": np.array(tokens, dtype=np.int32),
            "logprobs": np.stack(rows),
        }
        if pixels:
            answer["pixel_values"] = np.moveaxis(np.concatenate(pixels), 1, -1)
        return answer


PROMPTS = {
    "llava-original-internvit": "v1",
    "llava-original-v0": "v0",
    "llava-original-v1.5": "v1",
    "llava-original-v1.6-mistral": "mistral",
}


def expected_outputs(name: str, golden: Path = GOLDEN) -> dict[str, np.ndarray]:
    """What the oracle answers to every case, computed now: `case/what` to an array."""
    oracle = Oracle(golden / name, PROMPTS[name])
    return {  # of many pixels each twelfth row and column
        f"{case}/{what}": array[:, ::12, ::12] if what == "pixel_values" and array.shape[1] > 100 else array
        for case in SPECS[name].cases
        for what, array in oracle.answer(CASES[case], golden).items()
    }


def regenerate(names: Sequence[str], specs: Any, save: Any, expected_outputs: Any) -> None:
    """Make checkpoints of `specs` anew, of all where no names are given, and what their oracle answers."""
    for name in names or specs:
        folder = GOLDEN / name
        shutil.rmtree(folder, ignore_errors=True)
        save(specs[name], folder)
        expected = expected_outputs(name)
        np.savez_compressed(folder / "expected.npz", **expected)
        print(name, sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) // 1024, "KiB")
        for case in specs[name].cases:
            print("  ", case, len(expected[f"{case}/prompt_ids"]), "tokens ->", *expected[f"{case}/token_ids"])


if __name__ == "__main__":
    regenerate(sys.argv[1:], SPECS, save, expected_outputs)
