"""The tiny QLLaMA (InternVL-14B-224px) checkpoint, and what our own writing of the authors' code computes with it.

python tests/golden/qllama_reference.py        # makes tests/golden/qllama again; needs the `reference` extra

transformers has no such class. The vision tower is transformers' InternVLVisionModel; all else is written here in torch
after modeling_internvl.py, modeling_qllama.py and __init__.py of
clip_benchmark/clip_benchmark/models/internvl_huggingface, and internvl_g/internvl/model/internvl_stage2 (matching) and
internvl_g/eval/evaluate_caption.py of github.com/OpenGVLab/InternVL (2410d1d). Where those fix 96 queries and a tower of
3200 numbers, the config says it here.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from internvl_reference import RMSNorm, make_vision, opaque, read_vision, write_vision
from PIL import Image
from qllama_cases import CAPTION, CONFIG, IMAGES, SPECS, TEXTS, picture_and_text
from reference import GOLDEN, STEPS, fill
from torch import nn

FOLDER = GOLDEN / "qllama"
LONGEST = 80  # tokens of a text that is compared


class Attention(nn.Module):
    """Queries of one width on keys and values of another, which may come with positions."""

    def __init__(self, size: int, seen: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.o_proj = (nn.Linear(size, size, bias=False) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(seen, size, bias=False) for _ in range(2))
        self.weights: Any = None

    def split(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2)

    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor | None) -> torch.Tensor:
        scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
        if hidden is not None:
            scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
        self.weights = scores.softmax(dim=-1)
        return self.o_proj((self.weights @ v).transpose(1, 2).flatten(2))


class CrossAttention(Attention):
    def __init__(self, size: int, seen: int, heads: int, eps: float) -> None:
        super().__init__(size, seen, heads)
        self.norm1, self.norm2 = RMSNorm(size, eps), RMSNorm(seen, eps)

    def forward(self, x: torch.Tensor, vision: torch.Tensor) -> torch.Tensor:
        vision = self.norm2(vision)
        q, k, v = self.q_proj(self.norm1(x)), self.k_proj(vision), self.v_proj(vision)
        return self.mix(self.split(q), self.split(k), self.split(v), None)


def turn(x: torch.Tensor, start: int) -> torch.Tensor:
    """Rotary positions from `start` on."""
    size = x.shape[-1]
    frequencies = 10000.0 ** (-torch.arange(0, size, 2).float() / size)
    angles = torch.arange(start, start + x.shape[2]).float()[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    one, other = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat([-other, one], dim=-1) * angles.sin()


class Layer(nn.Module):
    def __init__(self, config: dict[str, Any], number: int) -> None:
        super().__init__()
        text = config["qllama_config"]
        size, inner, eps = text["hidden_size"], text["intermediate_size"], text["rms_norm_eps"]
        self.queries = config["num_query_token"]
        self.self_attn = Attention(size, size, text["num_attention_heads"])
        self.cross_attn = None
        if number % config["cross_attention_frequency"] == 0:
            seen = config["vision_config"]["hidden_size"]
            self.cross_attn = CrossAttention(size, seen, text["num_attention_heads"], eps)
        self.mlp = nn.ModuleDict({
            "gate_proj": nn.Linear(size, inner, bias=False), "up_proj": nn.Linear(size, inner, bias=False),
            "down_proj": nn.Linear(inner, size, bias=False),
        })  # fmt: skip
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(size, eps), RMSNorm(size, eps)

    def forward(self, x: torch.Tensor, vision: Any, hidden: torch.Tensor, past: Any) -> tuple[torch.Tensor, Any]:
        y, attn = self.input_layernorm(x), self.self_attn
        start = 0 if past is None else past[0].shape[2]
        q, k = (turn(attn.split(each), start) for each in (attn.q_proj(y), attn.k_proj(y)))
        v = attn.split(attn.v_proj(y))
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        x = x + attn.mix(q, k, v, hidden)
        if self.cross_attn is not None and vision is not None and x.shape[1] >= self.queries:
            queries, text = x[:, : self.queries], x[:, self.queries :]
            x = torch.cat([queries + self.cross_attn(queries, vision), text], dim=1)
        y = self.post_attention_layernorm(x)
        y = self.mlp["down_proj"](F.silu(self.mlp["gate_proj"](y)) * self.mlp["up_proj"](y))
        return x + y, (k, v)


class Llama(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        text = config["qllama_config"]
        size = text["hidden_size"]
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(text["vocab_size"], size),
            "layers": nn.ModuleList(Layer(config, number) for number in range(text["num_hidden_layers"])),
            "norm": RMSNorm(size, text["rms_norm_eps"]),
        })  # fmt: skip
        self.lm_head = nn.Linear(size, text["vocab_size"], bias=False)

    def run(self, x: torch.Tensor, vision: Any, hidden: torch.Tensor, past: Any = None) -> tuple[torch.Tensor, Any]:
        kept = []
        for layer, own in zip(self.model["layers"], past or [None] * len(self.model["layers"]), strict=True):
            x, keys = layer(x, vision, hidden, own)
            kept.append(keys)
        return self.model["norm"](x), kept


class Pool(nn.Module):
    """Attention pooling: the mean asks."""

    def __init__(self, size: int, heads: int, out: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1_q, self.norm1_k, self.norm1_v = (nn.LayerNorm(size, eps=1e-5) for _ in range(3))
        self.cross_attn = nn.Module()
        for letter in "qkv":
            setattr(self.cross_attn, letter, nn.Linear(size, size, bias=False))
            setattr(self.cross_attn, f"{letter}_bias", nn.Parameter(torch.zeros(size)))
        self.cross_attn.proj = nn.Linear(size, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = []
        for letter, given in (("q", x.mean(1, keepdim=True)), ("k", x), ("v", x)):
            normed = getattr(self, f"norm1_{letter}")(given)
            y = F.linear(normed, getattr(self.cross_attn, letter).weight, getattr(self.cross_attn, f"{letter}_bias"))
            parts.append(y.view(y.shape[0], y.shape[1], self.heads, -1).transpose(1, 2))
        q, k, v = parts
        weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.cross_attn.proj((weights @ v).transpose(1, 2).flatten(2))[:, 0]


def causal(length: int) -> torch.Tensor:
    """What is hidden: bool[length, length]."""
    return torch.ones(length, length, dtype=torch.bool).triu(1)


class Model(nn.Module):
    """The authors' model by its config.json."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        side = config.get("force_image_size") or config["vision_config"]["image_size"]
        vision = {**config["vision_config"], "image_size": side}
        width, size = vision["hidden_size"], config["qllama_config"]["hidden_size"]
        heads, out = config["attn_pool_num_heads"], config["clip_embed_dim"]
        self.vision_model, self.qllama = make_vision(vision), Llama(config)
        self.query_tokens = nn.Parameter(torch.zeros(1, config["num_query_token"], size))
        self.text_projection = nn.Parameter(torch.zeros(size, out))
        self.logit_scale = nn.Parameter(torch.zeros([]))
        self.clip_projector, self.clip_projector2 = Pool(width, heads, out), Pool(size, heads, out)
        self.itm_head = nn.Linear(size, 2)
        for name, module in self.vision_model.named_modules():  # transformers' class gives these 1e-6 always
            if name.endswith(("q_norm", "k_norm")) and hasattr(module, "variance_epsilon"):
                module.variance_epsilon = vision["layer_norm_eps"]
        self.eval()

    def names(self) -> dict[str, torch.Tensor]:
        """Its tensors as the authors' files have them."""
        given = {name: value for name, value in self.state_dict().items() if not name.startswith("vision_model.")}
        return given | {f"vision_model.{name}": value for name, value in write_vision(self.vision_model).items()}

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        own = {name: value.float() for name, value in tensors.items() if not name.startswith("vision_model.")}
        read_vision(self.vision_model, {n: v.float() for n, v in tensors.items() if n not in own}, "vision_model.")
        missing, extra = self.load_state_dict(own, strict=False)
        assert not extra and all(name.startswith("vision_model.") for name in missing)

    def see(self, pixels: torch.Tensor) -> torch.Tensor:
        """All the tower's tokens, the class token first."""
        return self.vision_model(pixels, output_hidden_states=True).hidden_states[-1]

    def prefill(self, vision: torch.Tensor, ids: list[int]) -> tuple[torch.Tensor, Any]:
        queries = self.query_tokens.shape[1]
        x = torch.cat([self.query_tokens, self.qllama.model["embed_tokens"](torch.tensor([ids]))], dim=1)
        hidden = causal(x.shape[1])
        hidden[:queries, :queries] = False
        return self.qllama.run(x, vision, hidden)

    def image_vector(self, pixels: torch.Tensor, mode: str) -> torch.Tensor:
        vision = self.see(pixels)
        pooled = self.clip_projector(vision)
        if mode == "g":
            nothing = torch.zeros(1, 1, dtype=torch.bool)
            asked = self.clip_projector2(self.qllama.run(self.query_tokens, vision, nothing)[0])
            pooled = pooled / pooled.norm(dim=1, keepdim=True) + asked / asked.norm(dim=1, keepdim=True)
        return pooled / pooled.norm(dim=1, keepdim=True)

    def text_vector(self, ids: list[int]) -> torch.Tensor:
        """Padded with zeros to 80 tokens, as the authors do it, and the padding hidden."""
        padded = torch.tensor([ids + [0] * (LONGEST - len(ids))])
        hidden = causal(LONGEST) | (padded == 0)
        out, _ = self.qllama.run(self.qllama.model["embed_tokens"](padded), None, hidden)
        vector = out[:, (padded[0] > 0).sum() - 1] @ self.text_projection
        return vector / vector.norm(dim=1, keepdim=True)

    def match(self, pixels: torch.Tensor, ids: list[int]) -> torch.Tensor:
        """Both scores of a pair, as in training: everything sees everything, and the queries' mean is read."""
        x = torch.cat([self.query_tokens, self.qllama.model["embed_tokens"](torch.tensor([ids]))], dim=1)
        out, _ = self.qllama.run(x, self.see(pixels), torch.zeros(1, 1, dtype=torch.bool))
        return self.itm_head(out[:, : self.query_tokens.shape[1]]).mean(dim=1)[0]


def save(folder: Path = FOLDER, config: dict[str, Any] | None = None, *, seed: int = 41, settings: bool = True) -> None:
    """Write a checkpoint; without `settings` it lacks preprocessor_config.json."""
    from safetensors.torch import save_file

    config = CONFIG if config is None else config
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model = fill(Model(config), seed)
    with torch.no_grad():
        model.logit_scale.fill_(2.7)
        model.query_tokens.mul_(10)
    tensors = {name: tensor.half().contiguous() for name, tensor in model.names().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "float16"}, indent=1))
    shutil.copy(GOLDEN / "sentencepiece" / "llama.model", folder / "tokenizer.model")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    content = {**names, "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(content, indent=1))
    if settings:
        side = config.get("force_image_size") or config["vision_config"]["image_size"]
        images = {
            "feature_extractor_type": "CLIPFeatureExtractor", "do_center_crop": True, "crop_size": side, "size": side,
            "do_resize": True, "do_normalize": True, "resample": 3,
            "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
        }  # fmt: skip
        (folder / "preprocessor_config.json").write_text(json.dumps(images, indent=1))


class Reference:
    """A checkpoint folder opened in float32."""

    def __init__(self, folder: Path) -> None:
        import sentencepiece
        from safetensors.torch import load_file

        self.folder, self.config = folder, json.loads((folder / "config.json").read_text())
        self.model = Model(self.config)
        self.model.load(load_file(folder / "model.safetensors"))
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))

    def ids(self, text: str) -> list[int]:
        """A text as LlamaTokenizer gives it, without `</s>`."""
        return [self.pieces.bos_id(), *self.pieces.encode(text)]

    def whole(self, text: str) -> list[int]:
        """With `</s>`, cut to 80 tokens."""
        return [*self.ids(text)[: LONGEST - 1], self.pieces.eos_id()]

    def pixels(self, name: str) -> torch.Tensor:
        image = opaque(Image.open(GOLDEN / name))
        side = self.config.get("force_image_size") or self.config["vision_config"]["image_size"]
        if (self.folder / "preprocessor_config.json").exists():
            from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

            return CLIPImageProcessorPil.from_pretrained(self.folder)(image, return_tensors="pt")["pixel_values"]
        scaled = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC), np.float32) / 255
        mean, std = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)
        return torch.from_numpy((scaled - mean) / std).permute(2, 0, 1)[None]

    @torch.no_grad()
    def answer(self, image: str, text: str, steps: int = STEPS) -> dict[str, np.ndarray]:
        """As `Reference.answer` of reference.py, with zeros as ids of the queries."""
        pixels, ids = self.pixels(image), self.ids(text)
        hidden, past = self.model.prefill(self.model.see(pixels), ids)
        queries = self.config["num_query_token"]
        prompt = [0] * queries + ids
        every = torch.log_softmax(self.model.qllama.lm_head(hidden[0]), dim=-1)
        rows, tokens = [every[-1].numpy()], [int(every[-1].argmax())]
        while len(rows) < steps:
            x = self.model.qllama.model["embed_tokens"](torch.tensor([tokens[-1:]]))
            hidden, past = self.model.qllama.run(x, None, torch.zeros(1, 1, dtype=torch.bool), past)
            rows.append(torch.log_softmax(self.model.qllama.lm_head(hidden[0, -1]), dim=-1).numpy())
            tokens.append(int(rows[-1].argmax()))
        return {
            "prompt_ids": np.array(prompt, dtype=np.int32),
            "prompt_logprobs": every[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0].numpy(),
            "token_ids": np.array(tokens, dtype=np.int32),
            "logprobs": np.stack(rows),
            "pixel_values": np.moveaxis(pixels.numpy(), 1, -1),
        }

    @torch.no_grad()
    def scores(self, images: tuple[str, ...] = IMAGES, texts: tuple[str, ...] = TEXTS) -> dict[str, np.ndarray]:
        """`c` and `g`: logits float32[images, texts]; `match`: both scores float32[images, texts, 2]."""
        pixels = [self.pixels(name) for name in images]
        said = torch.cat([self.model.text_vector(self.whole("summarize:" + text)) for text in texts])
        found = {
            mode: torch.cat([self.model.image_vector(each, mode) for each in pixels]) @ said.T for mode in ("c", "g")
        }
        found = {mode: (self.model.logit_scale.exp() * cosines).numpy() for mode, cosines in found.items()}
        pairs = [[self.model.match(each, self.whole(text)) for text in texts] for each in pixels]
        return {**found, "match": torch.stack([torch.stack(row) for row in pairs]).numpy()}

    @torch.no_grad()
    def mixing(self, image: str) -> np.ndarray:
        """The mean of the queries' weights over layers and heads, of a prompt with text: float32[queries, P]."""
        self.model.prefill(self.model.see(self.pixels(image)), self.ids(CAPTION))
        weights = [layer.cross_attn.weights[0] for layer in self.model.qllama.model["layers"] if layer.cross_attn]
        return torch.cat(weights).mean(dim=0).numpy()


def expected(folder: Path = FOLDER) -> dict[str, np.ndarray]:
    """`case/what` of the prompts of test_parity.py and of a caption, `scores/mode`, and `mixing`."""
    reference = Reference(folder)
    found: dict[str, np.ndarray] = {"mixing": reference.mixing("photo.jpg")}
    asked = {case: picture_and_text(case) for case in SPECS["qllama"].cases} | {"caption": ("shapes.png", CAPTION)}
    for case, (image, text) in asked.items():
        found |= {f"{case}/{what}": array for what, array in reference.answer(image, text).items()}
    return found | {f"scores/{mode}": array for mode, array in reference.scores().items()}


if __name__ == "__main__":
    save()
    np.savez_compressed(FOLDER / "expected.npz", **expected())
    print(sum(file.stat().st_size for file in FOLDER.iterdir()) // 1024, "KiB")
