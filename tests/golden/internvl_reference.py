"""InternVL's references: transformers' classes for its own layout, and for the authors' a composition that we wrote.

`internvl_chat` is remote code, which nothing here runs. Its parts are written anew after github.com/OpenGVLab/InternVL
(modeling_internvl_chat.py, modeling_internlm2.py, conversation.py, dynamic_preprocess), or are transformers' classes where
those compute the same: InternVLVisionModel, and Llama, Qwen2, Qwen3 and Phi-3.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, InternVLProcessor, InternVLVisionConfig, InternVLVisionModel

TOKENS = ["<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>"]
OLD = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
NEW = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
CHATML = ("<|im_start|>system\n", "<|im_start|>user\n", "<|im_start|>assistant\n")
PHI = ("<|system|>\n", "<|user|>\n", "<|assistant|>\n")
TEMPLATES = {  # what opens system, user and assistant; separator; system message
    "Hermes-2": (CHATML, "<|im_end|>", OLD),
    "internlm2-chat": (CHATML, "<|im_end|>", OLD),
    "internvl2_5": (CHATML, "<|im_end|>\n", NEW),
    "phi3-chat": (PHI, "<|end|>", OLD),
}


class ImagesOnly(InternVLProcessor):
    """InternVL's processor without its video half, which needs torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, image_seq_length: int = 256,
                 chat_template: str | None = None, **kwargs: Any) -> None:  # fmt: skip
        super().__init__(image_processor, tokenizer, None, image_seq_length, chat_template, **kwargs)

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


def name_image_tokens(tokenizer: Any) -> Any:
    """The tokenizer with InternVL's image tokens under the names that its processor asks for."""
    from transformers import PreTrainedTokenizerFast

    names = dict(zip(("start_image_token", "end_image_token", "context_image_token"), TOKENS, strict=False))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizer.eos_token, pad_token=tokenizer.pad_token,
        extra_special_tokens={**names, "video_token": "<video>"},
    )  # fmt: skip


def render(template: str, messages: list[dict[str, Any]], system: str | None = None) -> str:
    """A conversation as the authors write it, `<image>` where an image goes."""
    said = [
        "".join("<image>\n" if part["type"] == "image" else part["text"] for part in message["content"])
        for message in messages
    ]
    turns = list(zip([message["role"] for message in messages], said, strict=True))
    if turns and turns[0][0] == "system":
        system = turns.pop(0)[1]
    if template == "internvl_zh":
        text = (system or "") + " "
        for role, words in turns:
            text += f"<human>: {words} " if role == "user" else f"<bot>: {words}</s>"
        return text + "<bot>:"
    (before, user, assistant), separator, default = TEMPLATES[template]
    text = before + (default if system is None else system) + separator
    for role, words in turns:
        text += (user if role == "user" else assistant) + words + separator
    return text + assistant


def grid_of(width: int, height: int, fewest: int, most: int, side: int) -> tuple[int, int]:
    """Columns and rows: a set of pairs, sorted by area, the nearest ratio, and the rule for ties."""
    pairs = {(i, j) for n in range(fewest, most + 1) for i in range(1, n + 1) for j in range(1, n + 1)}
    allowed = sorted(
        (pair for pair in pairs if fewest <= pair[0] * pair[1] <= most), key=lambda pair: pair[0] * pair[1]
    )
    chosen, nearest = (1, 1), float("inf")
    for columns, rows in allowed:
        distance = abs(width / height - columns / rows)
        if distance < nearest:
            chosen, nearest = (columns, rows), distance
        elif distance == nearest and width * height > 0.5 * side * side * columns * rows:
            chosen = (columns, rows)
    return chosen


def cut(image: Image.Image, config: dict[str, Any], side: int) -> list[Image.Image]:
    if not config.get("dynamic_image_size", False):
        return [image]
    columns, rows = grid_of(
        image.width, image.height, config.get("min_dynamic_patch", 1), config.get("max_dynamic_patch", 6), side
    )
    whole = image.resize((columns * side, rows * side))
    tiles = []
    for number in range(columns * rows):
        x, y = number % columns * side, number // columns * side
        tiles.append(whole.crop((x, y, x + side, y + side)))
    if config.get("use_thumbnail", False) and len(tiles) > 1:
        tiles.append(image.resize((side, side)))
    return tiles


def squared(image: Image.Image) -> Image.Image:
    """`pad2square`: in the middle of a square of the mean colour."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), (int(0.485 * 255), int(0.456 * 255), int(0.406 * 255)))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def as_tensor(image: Image.Image, side: int) -> torch.Tensor:
    scaled = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC), np.float32) / 255
    mean, std = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)
    return torch.from_numpy((scaled - mean) / std).permute(2, 0, 1)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class InternLM2Layer(nn.Module):
    """The layer of InternLM2: fused queries, keys and values, which are told apart behind the product."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        size, self.heads, self.kv_heads = (
            config["hidden_size"],
            config["num_attention_heads"],
            config["num_key_value_heads"],
        )
        self.head_dim, self.config = size // self.heads, config
        bias = config.get("bias", True)
        self.attention = nn.ModuleDict({
            "wqkv": nn.Linear(size, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=bias),
            "wo": nn.Linear(size, size, bias=bias),
        })  # fmt: skip
        inner = config["intermediate_size"]
        self.feed_forward = nn.ModuleDict({
            "w1": nn.Linear(size, inner, bias=False), "w2": nn.Linear(inner, size, bias=False),
            "w3": nn.Linear(size, inner, bias=False),
        })  # fmt: skip
        self.attention_norm, self.ffn_norm = (RMSNorm(size, config["rms_norm_eps"]) for _ in range(2))

    def rotate(self, x: torch.Tensor, start: int, length: int) -> torch.Tensor:
        """Rotary positions from `start` on; the base grows with the whole length beyond the trained one."""
        trained, dims, base = self.config["max_position_embeddings"], self.head_dim, self.config["rope_theta"]
        scaling = self.config.get("rope_scaling")
        if scaling is not None and length > trained:
            growth = scaling["factor"] * length / trained - (scaling["factor"] - 1)
            base = base * growth ** (dims / (dims - 2))
        frequencies = 1.0 / base ** (torch.arange(0, dims, 2).float() / dims)
        angles = torch.arange(start, start + x.shape[2]).float()[:, None] * frequencies
        one, other = x.chunk(2, dim=-1)
        return torch.cat([one * angles.cos() - other * angles.sin(), other * angles.cos() + one * angles.sin()], -1)

    def forward(self, x: torch.Tensor, past: Any) -> tuple[torch.Tensor, Any]:
        batch, length, _ = x.shape
        groups = self.heads // self.kv_heads
        qkv = self.attention["wqkv"](self.attention_norm(x))
        qkv = qkv.reshape(batch, length, self.kv_heads, groups + 2, self.head_dim)
        q = qkv[:, :, :, :groups].flatten(2, 3).transpose(1, 2)
        k, v = qkv[:, :, :, groups].transpose(1, 2), qkv[:, :, :, groups + 1].transpose(1, 2)
        start = 0 if past is None else past[0].shape[2]
        q, k = self.rotate(q, start, start + length), self.rotate(k, start, start + length)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        every_k, every_v = (each.repeat_interleave(groups, dim=1) for each in (k, v))
        scores = q @ every_k.transpose(-1, -2) / self.head_dim**0.5
        hidden = torch.ones(length, start + length, dtype=torch.bool).triu(start + 1)
        weights = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1)
        x = x + self.attention["wo"]((weights @ every_v).transpose(1, 2).reshape(batch, length, -1))
        y = self.ffn_norm(x)
        return x + self.feed_forward["w2"](F.silu(self.feed_forward["w1"](y)) * self.feed_forward["w3"](y)), (k, v)


class InternLM2(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        size, depth = config["hidden_size"], config["num_hidden_layers"]
        self.model = nn.ModuleDict({
            "tok_embeddings": nn.Embedding(config["vocab_size"], size),
            "layers": nn.ModuleList(InternLM2Layer(config) for _ in range(depth)),
            "norm": RMSNorm(size, config["rms_norm_eps"]),
        })  # fmt: skip
        self.output = nn.Linear(size, config["vocab_size"], bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.model["tok_embeddings"]

    def step(self, x: torch.Tensor, past: Any) -> tuple[torch.Tensor, Any]:
        kept = []
        for layer, own in zip(self.model["layers"], past or [None] * len(self.model["layers"]), strict=True):
            x, keys = layer(x, own)
            kept.append(keys)
        return self.output(self.model["norm"](x)), kept


VISION_NAMES = (  # the authors' to transformers'
    ("embeddings.class_embedding", "embeddings.cls_token"),
    ("embeddings.position_embedding", "embeddings.position_embeddings"),
    ("embeddings.patch_embedding.", "embeddings.patch_embeddings.projection."),
    ("encoder.layers.", "encoder.layer."),
    (".attn.proj.", ".attention.projection_layer."),
    (".attn.", ".attention."),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".ls1", ".lambda_1"),
    (".ls2", ".lambda_2"),
)
VISION = {
    "image_size": 224, "patch_size": 14, "qkv_bias": False, "hidden_size": 3200, "num_attention_heads": 25,
    "intermediate_size": 12800, "qk_normalization": True, "num_hidden_layers": 48, "hidden_act": "gelu",
    "norm_type": "rms_norm", "layer_norm_eps": 1e-6,
}  # fmt: skip


def make_vision(config: dict[str, Any]) -> InternVLVisionModel:
    values = {**VISION, **config}
    same = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "norm_type",
            "layer_norm_eps", "image_size", "patch_size")  # fmt: skip
    return InternVLVisionModel(
        InternVLVisionConfig(
            attention_bias=values["qkv_bias"],
            use_qk_norm=values["qk_normalization"],
            attn_implementation="eager",
            **{key: values[key] for key in same},
        )
    )


def write_vision(model: InternVLVisionModel) -> dict[str, torch.Tensor]:
    """Its tensors as the authors' files have them."""
    given, found = dict(model.state_dict()), {}
    for name, tensor in given.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            tensor = torch.cat([given[name.replace(".q_proj.", f".{each}_proj.")] for each in "qkv"])
            name = name.replace(".q_proj.", ".qkv.")
        for theirs, ours in VISION_NAMES:
            name = name.replace(ours, theirs)
        found[name] = tensor
    return found


def read_vision(model: InternVLVisionModel, tensors: dict[str, torch.Tensor], prefix: str = "") -> None:
    """The other way."""
    found = {}
    for name, tensor in tensors.items():
        for theirs, ours in VISION_NAMES:
            name = name.replace(theirs, ours)
        name = name.removeprefix(prefix)
        if ".attention.qkv." in name:
            for each, part in zip("qkv", tensor.chunk(3), strict=True):
                found[name.replace(".qkv.", f".{each}_proj.")] = part
        else:
            found[name] = tensor
    model.load_state_dict(found)


def make_decoder(config: dict[str, Any]) -> nn.Module:
    if config["architectures"] == ["InternLM2ForCausalLM"]:
        return InternLM2(config)
    names = {
        "LlamaForCausalLM": "llama",
        "Phi3ForCausalLM": "phi3",
        "Qwen2ForCausalLM": "qwen2",
        "Qwen3ForCausalLM": "qwen3",
    }
    values = {key: value for key, value in config.items() if key not in ("architectures", "model_type")}
    hf = AutoConfig.for_model(names[config["architectures"][0]], **values)
    return AutoModelForCausalLM.from_config(hf, attn_implementation="eager")


class ChatModel(nn.Module):
    """The authors' model by its config.json."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.vision_model, self.language_model = (
            make_vision(config["vision_config"]),
            make_decoder(config["llm_config"]),
        )
        self.factor = round(1 / config.get("downsample_ratio", 0.5))
        joined, size = self.vision_model.config.hidden_size * self.factor**2, config["llm_config"]["hidden_size"]
        self.mlp1 = nn.Sequential(nn.LayerNorm(joined), nn.Linear(joined, size), nn.GELU(), nn.Linear(size, size))
        self.eval()

    def names(self) -> dict[str, torch.Tensor]:
        """Its tensors as the authors' files have them."""
        given = {name: value for name, value in self.state_dict().items() if not name.startswith("vision_model.")}
        return given | {f"vision_model.{name}": value for name, value in write_vision(self.vision_model).items()}

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        own = {name: value for name, value in tensors.items() if not name.startswith("vision_model.")}
        read_vision(self.vision_model, {n: value for n, value in tensors.items() if n not in own}, "vision_model.")
        missing, extra = self.load_state_dict(own, strict=False)
        assert not extra and all(name.startswith("vision_model.") for name in missing)

    def shuffle(self, x: torch.Tensor) -> torch.Tensor:
        n, wide, high, channels = x.shape
        f = self.factor
        x = x.reshape(n, wide, high // f, channels * f).transpose(1, 2)
        x = x.reshape(n, high // f, wide // f, channels * f * f)
        return x if self.config.get("ps_version", "v1") == "v1" else x.transpose(1, 2)

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        out = self.vision_model(pixel_values, output_hidden_states=True)
        x = out.hidden_states[self.config.get("select_layer", -1)][:, 1:]
        side = int(x.shape[1] ** 0.5)
        x = self.shuffle(x.reshape(len(x), side, side, -1))
        return self.mlp1(x.flatten(1, 2)).flatten(0, 1)

    def step(self, embeddings: torch.Tensor, past: Any) -> tuple[torch.Tensor, Any]:
        if isinstance(self.language_model, InternLM2):
            return self.language_model.step(embeddings, past)
        out = self.language_model(inputs_embeds=embeddings, past_key_values=past, use_cache=True)
        return out.logits, out.past_key_values


class Pieces:
    """InternLM2's tokenizer as its authors' code has it: SentencePiece between the tokens that were added, `<s>` in front."""

    def __init__(self, folder: Path) -> None:
        import sentencepiece

        self.model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        added = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
        self.ids = {token["content"]: int(token_id) for token_id, token in added.items()}

    def __call__(self, text: str) -> dict[str, list[int]]:
        ids = [self.model.bos_id()]
        for part in re.split("(" + "|".join(map(re.escape, self.ids)) + ")", text):
            ids += [self.ids[part]] if part in self.ids else self.model.encode(part)
        return {"input_ids": ids}

    def convert_tokens_to_ids(self, token: str) -> int:
        return self.ids[token]


def open_tokenizer(folder: Path) -> Any:
    """Text to ids, by the folder's files: transformers, or SentencePiece's library."""
    from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

    if (folder / "tokenizer.model").exists():
        return Pieces(folder)
    if (folder / "tokenizer.json").exists():
        return PreTrainedTokenizerFast.from_pretrained(folder)
    return Qwen2Tokenizer.from_pretrained(folder)


def save_pieces(folder: Path) -> int:
    """InternLM2's tokenizer files; returns the number of tokens.

    As in the real ones, the last pieces of tokenizer.model go by other names, and further tokens follow them.
    """
    model = Path(__file__).parent / "sentencepiece" / "llama.model"
    (folder / "tokenizer.model").write_bytes(model.read_bytes())
    pieces = 440
    names = {0: "<unk>", 1: "<s>", 2: "</s>", pieces - 2: "<|im_end|>", pieces - 1: "<|im_start|>"}
    names |= {pieces + i: token for i, token in enumerate(TOKENS)}
    added = {str(i): {"content": text, "special": True, "normalized": False} for i, text in names.items()}
    settings = {
        "tokenizer_class": "InternLM2Tokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "pad_token": "</s>", "added_tokens_decoder": added, "additional_special_tokens": list(names.values())[3:],
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    (folder / "added_tokens.json").write_text(json.dumps({text: i for i, text in names.items() if i >= 438}))
    return pieces + len(TOKENS)


class ChatReference:
    """A folder in the authors' layout, in float32."""

    def __init__(self, folder: Path) -> None:
        from safetensors.torch import load_file

        self.config = json.loads((folder / "config.json").read_text())
        self.model = ChatModel(self.config)
        tensors: dict[str, torch.Tensor] = {}
        for file in sorted(folder.glob("model*.safetensors")):
            tensors |= load_file(file)
        self.model.load(tensors)
        self.tokenizer = open_tokenizer(folder)

    def answer(self, messages: list[dict[str, Any]], pictures: Path, steps: int) -> dict[str, np.ndarray]:
        """As `reference.Reference.answer`."""
        vision = {**VISION, **self.config["vision_config"]}
        side = self.config.get("force_image_size") or vision["image_size"]
        tokens = int((side // vision["patch_size"]) ** 2 * self.config.get("downsample_ratio", 0.5) ** 2)
        text, rows = render(self.config["template"], messages, self.config.get("system_message")), []
        for part in (part for message in messages for part in message["content"] if part["type"] == "image"):
            tiles = cut(opaque(Image.open(pictures / part["image"])), self.config, side)
            rows += [as_tensor(squared(tile) if self.config.get("pad2square") else tile, side) for tile in tiles]
            text = text.replace("<image>", "<img>" + "<IMG_CONTEXT>" * tokens * len(tiles) + "</img>", 1)
        ids = torch.tensor([self.tokenizer(text)["input_ids"]])
        chosen, logprobs = [], []
        with torch.no_grad():
            embeddings = self.model.language_model.get_input_embeddings()(ids).clone()
            if rows:
                slots = ids[0] == self.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
                embeddings[0, slots] = self.model.features(torch.stack(rows))
            logits, past = self.model.step(embeddings, None)
            prompt = torch.log_softmax(logits[0, :-1], dim=-1).gather(1, ids[0, 1:, None])[:, 0]
            while True:
                logprobs.append(torch.log_softmax(logits[0, -1], dim=-1).numpy())
                chosen.append(int(logprobs[-1].argmax()))
                if len(chosen) == steps:
                    break
                token = self.model.language_model.get_input_embeddings()(torch.tensor([[chosen[-1]]]))
                logits, past = self.model.step(token, past)
        answer = {
            "prompt_ids": ids[0].numpy().astype(np.int32), "prompt_logprobs": prompt.numpy(),
            "token_ids": np.array(chosen, dtype=np.int32), "logprobs": np.stack(logprobs),
        }  # fmt: skip
        return answer | ({"pixel_values": torch.stack(rows).permute(0, 2, 3, 1).numpy()} if rows else {})


def opaque(image: Image.Image) -> Image.Image:
    """RGB; transparency shows white, as everywhere in this repository (the authors' code drops it)."""
    if image.mode != "RGBA":
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")
