"""A tiny Qwen-VL-Chat as its authors write it, and its answers.

    python tests/golden/qwen_vl_oracle.py           rewrites it
    python tests/golden/qwen_vl_oracle.py NAME...   rewrites these only

transformers has no class for Qwen-VL, and the code on the Hub does not run with transformers 5. So the oracle is ours: written
in torch after the public sources (vllm-project/vllm: models/qwen_vl.py, models/qwen.py, layers/resampler.py; arXiv:2308.12966;
the README of QwenLM/Qwen-VL), with tiktoken for the text. It shares nothing with the package. Where both misread a source,
nothing here would show it.
"""

import io
import json
import math
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from llava_original import regenerate
from PIL import Image
from reference import CASES, CORPUS, GOLDEN, STEPS, USUAL

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
WORDS = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]
TAGS = ["<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>"]
RANKS = 281  # of the tiny vocabulary: every byte, and some merges


@dataclass(frozen=True)
class QwenSpec:
    """A tiny checkpoint: config.json, and generation_config.json's `chat_format`."""

    config: dict[str, Any]
    chat_format: str
    seed: int
    cases: tuple[str, ...] = (*USUAL, "long_text", "line_breaks", "system")


_CONFIG: dict[str, Any] = {
    "model_type": "qwen", "architectures": ["QWenLMHeadModel"], "torch_dtype": "bfloat16", "vocab_size": 500,
    "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig", "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"},
    "hidden_size": 128, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "kv_channels": 32,
    "layer_norm_epsilon": 1e-6, "max_position_embeddings": 1024, "seq_length": 84, "rotary_emb_base": 10000,
    "rotary_pct": 1.0, "use_dynamic_ntk": True, "use_logn_attn": True, "no_bias": True, "tie_word_embeddings": False,
    "onnx_safe": None, "emb_dropout_prob": 0.0, "use_cache": True, "use_flash_attn": False,
    "visual": {
        "width": 24, "layers": 2, "heads": 2, "mlp_ratio": 1.7, "patch_size": 7, "image_size": 140, "output_dim": 128,
        "n_queries": 16, "image_start_id": RANKS + len(CONTROLS) + 6},
}  # fmt: skip
SPECS = {"qwen-vl-chat": QwenSpec(config=_CONFIG, chat_format="chatml", seed=51)}


def train_ranks(count: int = RANKS) -> list[bytes]:
    """A byte-pair vocabulary of the corpus, by how often pairs come."""
    words: list[list[bytes]] = [[bytes([byte]) for byte in word.encode()] for text in CORPUS for word in _cut(text)]
    tokens = [bytes([byte]) for byte in range(256)]
    while len(tokens) < count:
        pairs: dict[bytes, int] = {}
        for word in words:
            for left, right in pairwise(word):
                pairs[left + right] = pairs.get(left + right, 0) + 1
        best = max(sorted(pairs), key=lambda pair: pairs[pair])
        tokens.append(best)
        words = [_join(word, best) for word in words]
    return tokens


def _cut(text: str) -> list[str]:
    return [" " + word for word in text.split()]


def _join(word: list[bytes], pair: bytes) -> list[bytes]:
    joined: list[bytes] = []
    for token in word:
        if joined and joined[-1] + token == pair:
            joined[-1] += token
        else:
            joined.append(token)
    return joined


def write_ranks(tokens: Sequence[bytes], file: Path) -> None:
    import base64

    file.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))


def shapes_of(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors, as the authors' code names them."""
    hidden, vocab, visual = config["hidden_size"], config["vocab_size"], config["visual"]
    wide, half, size = visual["width"], config["intermediate_size"] // 2, visual["output_dim"]
    mlp, queries = int(wide * visual["mlp_ratio"]), visual.get("n_queries", 256)
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (vocab, hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = f"transformer.h.{i}."
        shapes |= {
            layer + "ln_1.weight": (hidden,), layer + "attn.c_attn.weight": (3 * hidden, hidden),
            layer + "attn.c_attn.bias": (3 * hidden,), layer + "attn.c_proj.weight": (hidden, hidden),
            layer + "ln_2.weight": (hidden,), layer + "mlp.w1.weight": (half, hidden),
            layer + "mlp.w2.weight": (half, hidden), layer + "mlp.c_proj.weight": (hidden, half),
        }  # fmt: skip
        if not config["no_bias"]:
            shapes |= {layer + "attn.c_proj.bias": (hidden,), layer + "mlp.c_proj.bias": (hidden,)}
            shapes |= {layer + "mlp.w1.bias": (half,), layer + "mlp.w2.bias": (half,)}
    shapes |= {"transformer.ln_f.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    front = "transformer.visual."
    shapes |= {
        front + "positional_embedding": (256, wide),
        front + "conv1.weight": (wide, 3, visual["patch_size"], visual["patch_size"]),
    }
    linear = {
        "attn.in_proj": (3 * wide, wide), "attn.out_proj": (wide, wide), "mlp.c_fc": (mlp, wide), "mlp.c_proj": (wide, mlp),
    }  # fmt: skip
    norms = {
        front + "ln_pre": wide,
        front + "attn_pool.ln_q": size,
        front + "attn_pool.ln_kv": size,
        front + "ln_post": size,
    }
    for i in range(visual["layers"]):
        block = f"{front}transformer.resblocks.{i}."
        norms |= {block + "ln_1": wide, block + "ln_2": wide}
        for name, shape in linear.items():
            shapes |= {f"{block}{name}.weight": shape, f"{block}{name}.bias": shape[:1]}
    for name, width in norms.items():
        shapes |= {name + ".weight": (width,), name + ".bias": (width,)}
    pool = front + "attn_pool."
    return shapes | {
        pool + "query": (queries, size), pool + "pos_embed": (queries, size), pool + "kv_proj.weight": (size, wide),
        pool + "attn.in_proj_weight": (3 * size, size), pool + "attn.in_proj_bias": (3 * size,),
        pool + "attn.out_proj.weight": (size, size), pool + "attn.out_proj.bias": (size,), front + "proj": (size, size),
    }  # fmt: skip


def sincos(side: int, size: int) -> np.ndarray:
    """Places on a grid, float[side^2, size]: its column in the first half, its row in the second, as sines and cosines."""
    omega = 1 / 10000 ** (np.arange(size // 4) / (size / 4))
    angles = np.arange(side)[:, None] * omega
    line = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # (side, size / 2)
    columns, rows = np.tile(line, (side, 1)), np.repeat(line, side, axis=0)
    return np.concatenate([columns, rows], axis=1)


def draw_tensors(config: dict[str, Any], seed: int) -> dict[str, Any]:
    """Random bfloat16 tensors in which no norm or bias is neutral. The large ones are cuttings of one storage, each from
    another place, so that a file stays small: on the Hub, too, tensors may share one."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Any:
        return torch.randn(shape, generator=generator)

    shapes, fan_in = shapes_of(config), config["hidden_size"]
    shared = [name for name, shape in shapes.items() if shape[-1] == fan_in and len(shape) == 2 and shape[0] >= fan_in]
    shared = [name for name in shared if not name.endswith(("wte.weight", "query", "pos_embed"))]
    longest = max(math.prod(shapes[name]) for name in shared)
    pool = (1.4 * noise(longest + 1009 * len(shared)) / fan_in**0.5).bfloat16()
    tensors = {}
    for name, shape in shapes.items():
        if name in shared:
            start = 1009 * shared.index(name)
            tensors[name] = pool[start : start + math.prod(shape)].view(shape)
        elif name.endswith("attn_pool.pos_embed"):
            tensors[name] = torch.tensor(sincos(math.isqrt(shape[0]), shape[1])).bfloat16()
        elif len(shape) == 1:
            norm = ".ln_" in name and name.endswith("weight")
            tensors[name] = (0.3 * noise(*shape) + norm).bfloat16()
        elif "embed" in name or name.endswith(("wte.weight", "query")):
            tensors[name] = (0.7 * noise(*shape)).bfloat16()
        else:
            tensors[name] = (1.4 * noise(*shape) / math.prod(shape[1:]) ** 0.5).bfloat16()
    tensors["lm_head.weight"][RANKS : RANKS + 3] *= 0.1  # in the storage itself: answers that end at once show little
    return tensors


def save(spec: QwenSpec, folder: Path) -> None:
    import torch

    folder.mkdir(parents=True)
    end = RANKS
    (folder / "config.json").write_text(json.dumps(spec.config, indent=1))
    generation = {"chat_format": spec.chat_format, "eos_token_id": end, "pad_token_id": end, "max_new_tokens": 512}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=1))
    settings = {
        "tokenizer_class": "QWenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    write_ranks(train_ranks(), folder / "qwen.tiktoken")
    tensors = draw_tensors(spec.config, spec.seed)
    tensors["transformer.rotary_emb.inv_freq"] = torch.ones(4)  # as old files hold it
    storages = {name: tensor.untyped_storage().data_ptr() for name, tensor in tensors.items()}
    shared = [name for name in tensors if list(storages.values()).count(storages[name]) > 1]
    files = [f"pytorch_model-{i + 1:05}-of-00002.bin" for i in range(2)]
    index = {"metadata": {}, "weight_map": {name: files[name in shared] for name in tensors}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=1))
    for i, file in enumerate(files):
        torch.save({name: tensor for name, tensor in tensors.items() if (name in shared) == bool(i)}, folder / file)


class Oracle:
    """The model, in float32 and step by step, by the names of its checkpoint."""

    def __init__(self, folder: Path) -> None:
        import base64

        import tiktoken
        import torch

        self.config = json.loads((folder / "config.json").read_text())
        self.chat_format = json.loads((folder / "generation_config.json").read_text())["chat_format"]
        self.tensors: dict[str, Any] = {}
        for file in sorted(folder.glob("pytorch_model*.bin")):
            self.tensors |= {name: tensor.float() for name, tensor in torch.load(file).items()}
        lines = (folder / "qwen.tiktoken").read_bytes().splitlines()
        ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
        self.special = {token: len(ranks) + i for i, token in enumerate(CONTROLS + TAGS)}
        self.encoding = tiktoken.Encoding("Qwen", pat_str=WORDS, mergeable_ranks=ranks, special_tokens=self.special)
        self.slots = self.config["visual"].get("n_queries", 256)
        self.alpha = 1

    # text

    def encode(self, text: str) -> list[int]:
        """With tags of images and places as tokens; what controls a conversation is text here."""
        return self.encoding.encode(
            unicodedata.normalize("NFC", text), allowed_special=set(TAGS), disallowed_special=()
        )

    def write(self, messages: list[dict[str, Any]]) -> list[int]:
        """The prompt's ids; at an image's slots its padding."""
        texts, pictures = [], 0
        for message in messages:
            text = ""
            for part in message["content"]:
                if part["type"] == "image":
                    pictures += 1
                    text += f"Picture {pictures}: <img>{'<imgpad>' * self.slots}</img>\n"
                else:
                    text += part["text"]
            texts.append((message["role"], text))
        if self.chat_format == "raw":
            return self.encode("".join(text for _, text in texts))
        if texts[0][0] != "system":
            texts.insert(0, ("system", "You are a helpful assistant."))
        start, end, line = self.special["<|im_start|>"], self.special["<|im_end|>"], self.encode("\n")
        ids: list[int] = []
        for role, text in texts:
            ids += [start, *self.encode(role), *line, *self.encode(text), end, *line]
        return [*ids, start, *self.encode("assistant"), *line]

    # image

    def prepare(self, image: Image.Image) -> np.ndarray:
        """float32[3, side, side]; transparent pixels are white, as this package has them for every family."""
        side = self.config["visual"]["image_size"]
        white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        squashed = np.asarray(white.convert("RGB").resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32)
        return np.moveaxis((squashed / np.float32(255) - np.float32(MEAN)) / np.float32(STD), -1, 0)

    def norm(self, x: Any, name: str) -> Any:
        import torch

        own = self.tensors[name + ".weight"], self.tensors[name + ".bias"]
        return torch.nn.functional.layer_norm(x, x.shape[-1:], *own, eps=1e-6)

    def linear(self, x: Any, name: str) -> Any:
        y = x @ self.tensors[name + ".weight"].T
        return y + self.tensors[name + ".bias"] if name + ".bias" in self.tensors else y

    @staticmethod
    def spread(places: Any, count: int) -> Any:
        """Places of a square grid as those of one with `count` cells."""
        import torch

        stored, wanted = math.isqrt(len(places)), math.isqrt(count)
        if stored == wanted:
            return places
        grid = places.reshape(1, stored, stored, -1).permute(0, 3, 1, 2)
        grid = torch.nn.functional.interpolate(grid, size=(wanted, wanted), mode="bicubic", align_corners=False)
        return grid.permute(0, 2, 3, 1).flatten(0, 2)

    def see(self, pixels: np.ndarray) -> Any:
        """An image's embeddings, (slots, C)."""
        import torch

        front, visual = "transformer.visual.", self.config["visual"]
        kernel = self.tensors[front + "conv1.weight"]
        x = torch.nn.functional.conv2d(torch.tensor(pixels)[None], kernel, stride=visual["patch_size"])
        x = x.flatten(2).transpose(1, 2)[0]  # (P, width)
        x = self.norm(x + self.spread(self.tensors[front + "positional_embedding"], len(x)), front + "ln_pre")
        heads, size = visual["heads"], visual["width"] // visual["heads"]
        for i in range(visual["layers"]):
            block = f"{front}transformer.resblocks.{i}."
            fused = self.linear(self.norm(x, block + "ln_1"), block + "attn.in_proj").view(len(x), heads, 3, size)
            q, k, v = fused.permute(2, 1, 0, 3)  # each head's queries, keys and values stand together
            weights = torch.softmax(q @ k.transpose(1, 2) / size**0.5, dim=-1)
            x = x + self.linear((weights @ v).transpose(0, 1).flatten(1), block + "attn.out_proj")
            inner = torch.nn.functional.gelu(self.linear(self.norm(x, block + "ln_2"), block + "mlp.c_fc"))
            x = x + self.linear(inner, block + "mlp.c_proj")
        return self.pool(x)

    def pool(self, x: Any) -> Any:
        import torch

        front, width = "transformer.visual.", self.config["visual"]["output_dim"]
        pool = front + "attn_pool."
        places, query = self.tensors[pool + "pos_embed"], self.tensors[pool + "query"]
        values = self.norm(self.linear(x, pool + "kv_proj"), pool + "ln_kv")
        attention = torch.nn.MultiheadAttention(width, width // 128)
        attention.load_state_dict(
            {
                name.removeprefix(pool + "attn."): t
                for name, t in self.tensors.items()
                if name.startswith(pool + "attn.")
            }
        )
        keys = values + self.spread(places, len(x))
        out, _ = attention.eval()(self.norm(query, pool + "ln_q") + places, keys, values, need_weights=False)
        return self.norm(out, front + "ln_post") @ self.tensors[front + "proj"]

    # decoder

    def turn(self, x: Any, first: int) -> Any:
        """Rotary positions of (tokens, heads, D), the first of them number `first`."""
        import torch

        size = x.shape[-1]
        base = self.config["rotary_emb_base"] * self.alpha ** (size / (size - 2))
        frequencies = 1 / base ** (torch.arange(0, size, 2).float() / size)
        angles = torch.outer(torch.arange(first, first + len(x)).float(), frequencies)
        angles = torch.cat([angles, angles], dim=-1)[:, None]
        low, high = x.chunk(2, dim=-1)
        return x * angles.cos() + torch.cat([-high, low], dim=-1) * angles.sin()

    def rms(self, x: Any, name: str) -> Any:
        scale = (x.pow(2).mean(-1, keepdim=True) + self.config["layer_norm_epsilon"]).rsqrt()
        return x * scale * self.tensors[name + ".weight"]

    def read(self, x: Any, cache: list[Any]) -> Any:
        """Logits of tokens that are appended to the cache: (tokens, vocabulary)."""
        import torch

        config, first, length = self.config, len(cache[0][0]) if cache else 0, self.config["seq_length"]
        if not first and config["use_dynamic_ntk"]:  # fixed by the prompt, for the whole answer
            self.alpha = max(2 ** math.ceil(math.log(len(x) / length, 2) + 1) - 1, 1)
        heads, size = config["num_attention_heads"], config["kv_channels"]
        for i in range(config["num_hidden_layers"]):
            layer = f"transformer.h.{i}."
            fused = self.linear(self.rms(x, layer + "ln_1"), layer + "attn.c_attn")
            q, k, v = (part.view(len(x), heads, size) for part in fused.chunk(3, dim=-1))
            q, k = self.turn(q, first), self.turn(k, first)
            if config["use_logn_attn"]:
                factors = [math.log(n, length) if n > length else 1 for n in range(first + 1, first + len(x) + 1)]
                q = q * torch.tensor(factors)[:, None, None]
            if first:
                k, v = torch.cat([cache[i][0], k]), torch.cat([cache[i][1], v])
                cache[i] = k, v
            else:
                cache.append((k, v))
            scores = torch.einsum("qhd,khd->hqk", q, k) / size**0.5
            hidden = torch.arange(len(k)) > torch.arange(first, len(k))[:, None]
            weights = torch.softmax(scores.masked_fill(hidden, -math.inf), dim=-1)
            x = x + self.linear(torch.einsum("hqk,khd->qhd", weights, v).flatten(1), layer + "attn.c_proj")
            y = self.rms(x, layer + "ln_2")
            gated = self.linear(y, layer + "mlp.w1") * torch.nn.functional.silu(self.linear(y, layer + "mlp.w2"))
            x = x + self.linear(gated, layer + "mlp.c_proj")
        return self.rms(x, "transformer.ln_f") @ self.tensors["lm_head.weight"].T

    def answer(self, messages: list[dict[str, Any]], pictures: Path, steps: int = STEPS) -> dict[str, np.ndarray]:
        """Prompt ids, pixels, and `steps` tokens decoded greedily with the cache; see `reference.Reference.answer`."""
        import torch

        names = [part["image"] for turn in messages for part in turn["content"] if part["type"] == "image"]
        pixels = [self.prepare(Image.open(io.BytesIO((pictures / name).read_bytes()))) for name in names]
        ids, embed = self.write(messages), self.tensors["transformer.wte.weight"]
        with torch.no_grad():
            x = embed[torch.tensor(ids)]
            places = [i for i, token in enumerate(ids) if token == self.special["<imgpad>"]]
            if pixels:
                x[places] = torch.cat([self.see(image) for image in pixels])
            cache: list[Any] = []
            logits = self.read(x, cache)
            known = torch.tensor(ids)[1:, None]
            prompt = torch.log_softmax(logits[:-1], dim=-1).gather(1, known)[:, 0]
            rows, tokens = [], []
            for _ in range(steps):
                rows.append(torch.log_softmax(logits[-1], dim=-1).numpy())
                tokens.append(int(rows[-1].argmax()))
                logits = self.read(embed[torch.tensor([tokens[-1]])], cache)
        answer = {
            "prompt_ids": np.array(ids, dtype=np.int32),
            "prompt_logprobs": prompt.numpy(),
            "token_ids": np.array(tokens, dtype=np.int32),
            "logprobs": np.stack(rows),
        }
        return answer | ({"pixel_values": np.moveaxis(np.stack(pixels), 1, -1)} if pixels else {})


def expected_outputs(name: str, golden: Path = GOLDEN) -> dict[str, np.ndarray]:
    """What the oracle answers to every case, computed now: `case/what` to an array."""
    oracle = Oracle(golden / name)
    return {  # of pixels each tenth row and column
        f"{case}/{what}": array[:, ::10, ::10] if what == "pixel_values" else array
        for case in SPECS[name].cases
        for what, array in oracle.answer(CASES[case], golden).items()
    }


if __name__ == "__main__":
    regenerate(sys.argv[1:], SPECS, save, expected_outputs)
