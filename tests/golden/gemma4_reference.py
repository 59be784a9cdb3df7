"""What the reference of Gemma 4 needs besides transformers' models: its tokens, a template like the published ones, numbers in
buffers, configs as the Hub has them, processors without sound and videos, and a budget of tokens for each image."""

import json
from pathlib import Path
from typing import Any

import numpy as np

try:
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
    from transformers.models.gemma4.processing_gemma4 import Gemma4Processor
except ImportError:  # an older transformers: this folder's paths are asked for all the same
    Gemma4Processor = Gemma4ImageProcessorPil = object

FAMILIES = ("gemma4", "gemma4_unified")
PLACES = {
    "image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>", "audio_token": "<|audio|>",
    "boa_token": "<|audio>", "eoa_token": "<audio|>",
}  # fmt: skip
TOKENS = ["<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>", "<|video|>"]

_SAID = (  # a message's parts; of an answer what it thought is left out
    "{%- macro spoken(text) -%}{%- set kept = namespace(text='') -%}{%- for piece in text.split('<channel|>') -%}"
    "{%- set kept.text = kept.text + piece.split('<|channel>')[0] -%}{%- endfor -%}{{- kept.text | trim -}}{%- endmacro -%}"
    "{%- macro said(message, image) -%}{%- set answer = message['role'] == 'assistant' -%}"
    "{%- set parts = [{'type': 'text', 'text': message['content']}] if message['content'] is string else message['content'] -%}"
    "{%- for part in parts -%}{%- if part['type'] == 'image' -%}{{- image -}}"
    "{%- elif answer -%}{{- spoken(part['text']) -}}{%- else -%}{{- part['text'] | trim -}}{%- endif -%}{%- endfor -%}{%- endmacro -%}"
)
_TURNS = (
    "{{- bos_token -}}{%- set thinks = enable_thinking is defined and enable_thinking -%}"
    "{%- set opened = messages[0]['role'] in ['system', 'developer'] -%}{%- if thinks or opened -%}{{- '<|turn>system\n' -}}"
    "{%- if thinks -%}{{- '<|think|>\n' -}}{%- endif -%}{%- if opened -%}{{- said(messages[0], image) -}}{%- endif -%}"
    "{{- '<turn|>\n' -}}{%- endif -%}{%- for message in (messages[1:] if opened else messages) -%}"
    "{{- '<|turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' + said(message, image) + '<turn|>\n' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|turn>model\n' -}}"
)
_THOUGHT = "{%- if not thinks -%}{{- '<|channel>thought\n<channel|>' -}}{%- endif -%}"
_END = "{%- endif -%}"
SMALL = "{%- set image = '<|image|>' -%}" + _SAID + _TURNS + _END  # which says nothing of thoughts
LARGE = "{%- set image = '<|image|>' -%}" + _SAID + _TURNS + _THOUGHT + _END
APART = "{%- set image = '\n\n<|image|>\n\n' -%}" + _SAID + _TURNS + _THOUGHT + _END  # as the first ones


def add_tokens(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Any:
    """Gemma's tokenizer with Gemma 4's tokens."""
    from transformers import GemmaTokenizer

    gemma = GemmaTokenizer(vocab=vocab, merges=merges, extra_special_tokens=PLACES)
    gemma.add_special_tokens({"additional_special_tokens": TOKENS})
    return gemma


def token_ids(tokenizer: Any) -> dict[str, Any]:
    """How a config names the tokens of pictures."""
    names = {
        "image_token_id": "<|image|>", "boi_token_id": "<|image>", "eoi_token_id": "<image|>", "audio_token_id": "<|audio|>",
        "boa_token_id": "<|audio>", "eoa_token_index": "<audio|>", "video_token_id": "<|video|>",
    }  # fmt: skip
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}


def fill_buffers(model: Any, seed: int) -> None:
    """Random numbers where transformers has buffers, and around 1 where a parameter multiplies."""
    import torch

    generator = torch.Generator().manual_seed(seed + 1000)

    def noise(tensor: Any) -> Any:
        return torch.randn(tensor.shape, generator=generator)

    config, embeddings = model.config, model.get_input_embeddings().weight
    unsaid = [config.image_token_id, config.audio_token_id, config.video_token_id]
    bounds = {"input_min": -2.0, "input_max": 1.5, "output_min": -2.5, "output_max": 3.0}
    with torch.no_grad():
        for name, tensor in [*model.named_buffers(), *model.named_parameters()]:
            last = name.rpartition(".")[2]
            if last in ("layer_scalar", "std_scale", "per_expert_scale") or name.endswith("router.scale"):
                tensor.copy_(0.8 + 0.2 * noise(tensor))
            elif last == "weight" and ("_ln" in name or "pos_norm" in name):
                tensor.copy_(1 + 0.3 * noise(tensor))
            elif name.endswith("q_norm.weight"):  # scores are not scaled, and sharper ones enlarge what is rounded
                tensor.mul_(0.5)
            elif "embed_tokens" in name and last == "weight":  # so that a token is not its own answer
                tensor.mul_(0.2)
            elif last == "weight" and ("embedding_projection" in name or "patch_dense" in name):
                tensor.copy_(1.4 * noise(tensor) / tensor.shape[1] ** 0.5)
            elif last == "std_bias":
                tensor.copy_(0.5 * noise(tensor))
            elif last in bounds:
                tensor.copy_(bounds[last] + 0.3 * noise(tensor))
        embeddings[unsaid] = (
            0  # transformers takes what was said of these for places of images, and gives them others' rows
        )


def keep_spare_tensors(folder: Path) -> None:
    """Tensors that the Hub's files of E2B hold and nobody reads: keys and values of layers that share others', and what hears."""
    import torch
    from safetensors.torch import load_file, save_file

    file, generator = folder / "model.safetensors", torch.Generator().manual_seed(3)
    tensors, text = load_file(file), json.loads((folder / "config.json").read_text())["text_config"]
    layer = "model.language_model.layers.{}.self_attn.".format
    for number in range(text["num_hidden_layers"] - text["num_kv_shared_layers"], text["num_hidden_layers"]):
        for name in ("k_proj.weight", "v_proj.weight", "k_norm.weight"):
            tensors[layer(number) + name] = torch.randn(tensors[layer(0) + name].shape, generator=generator)
    for name in ("model.audio_tower.layers.0.norm.weight", "model.embed_audio.embedding_projection.weight"):
        tensors[name] = torch.randn(4, 6, generator=generator)
    save_file(tensors, file, {"format": "pt"})


def as_on_the_hub(config: dict[str, Any]) -> None:
    """A config as google/gemma-4-31B-it's: the head size of full layers by a name of its own, and `default` rotary positions of
    the tower; what the classes default to is left out."""
    text, vision = config["text_config"], config["vision_config"]
    kinds = text["layer_types"]
    own = text.pop("per_layer_config")[str(kinds.index("full_attention"))]
    text["global_head_dim"] = own["head_dim"]
    text["num_global_key_value_heads"] = own.get("num_key_value_heads")
    for key in ("rope_parameters", "rms_norm_eps", "hidden_activation", "attention_bias"):
        text.pop(key)
    if "head_dim" in vision:
        vision["rope_parameters"] = {"rope_type": "default", "rope_theta": 100.0}
        vision |= {"global_head_dim": vision["head_dim"], "default_output_length": 280}
    for key in ("hidden_activation", "rms_norm_eps", "attention_bias"):
        vision.pop(key, None)
    for part in (config, text, vision):
        part.pop("dtype", None)
        part.pop("tie_word_embeddings", None)
    config["torch_dtype"] = "bfloat16"


class ImagesOnly(Gemma4Processor):  # type: ignore[misc]
    """The processor without sound and videos."""

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None, **kwargs: Any
    ) -> None:
        from transformers.processing_utils import ProcessorMixin

        for name in (*PLACES, "image_token_id", "audio_token_id"):
            setattr(self, name, getattr(tokenizer, name))
        self.video_token, self.video_token_id = "<|video|>", tokenizer.convert_tokens_to_ids("<|video|>")
        self.image_seq_length, self.audio_seq_length, self.audio_ms_per_token = 280, 750, 40
        ProcessorMixin.__init__(self, image_processor=image_processor, tokenizer=tokenizer, chat_template=chat_template)

    merges = False
    """Whether it is the 12B's, whose own image processor needs torchvision."""

    def merged(self, inputs: Any) -> dict[str, Any]:
        """Patches of a square that is pooled elsewhere put together as one, row by row of its pixels."""
        import torch

        k = self.image_processor.pooling_kernel_size
        columns, rows = (inputs["image_position_ids"][0].max(dim=0).values + 1).tolist()
        side = int((inputs["pixel_values"].shape[-1] // 3) ** 0.5)
        pixels = inputs["pixel_values"][0, : rows * columns].reshape(rows // k, k, columns // k, k, side, side, 3)
        pixels = pixels.permute(0, 2, 1, 4, 3, 5, 6).reshape(1, rows * columns // k**2, -1)
        down, across = torch.meshgrid(torch.arange(rows // k), torch.arange(columns // k), indexing="ij")
        places = torch.stack([across, down], dim=-1).reshape(1, -1, 2)
        return {**inputs, "pixel_values": pixels, "image_position_ids": places}

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]

    def with_budgets(self, text: str, images: list[Any], budgets: list[int | None]) -> Any:
        """What the model takes, each image prepared by itself with its own budget and padded to the largest."""
        import torch

        usual = self.image_processor.max_soft_tokens
        found = [
            self.image_processor(image, max_soft_tokens=budget or usual, return_tensors="pt")
            for image, budget in zip(images, budgets, strict=True)
        ]
        if self.merges:
            found = [self.merged(each) for each in found]
        for each in found:
            count = int(each["num_soft_tokens_per_image"][0])
            text = text.replace("<|image|>", "<|image>" + "\0" * count + "<image|>", 1)
        inputs = self.tokenizer(text.replace("\0", "<|image|>"), add_special_tokens=False, return_tensors="pt")
        most = max(each["pixel_values"].shape[1] for each in found)

        def padded(name: str, value: float) -> Any:
            parts = [each[name] for each in found]
            return torch.cat([
                torch.nn.functional.pad(part, (0, 0, 0, most - part.shape[1]), value=value) for part in parts
            ])  # fmt: skip

        inputs["pixel_values"], inputs["image_position_ids"] = (
            padded("pixel_values", 0),
            padded("image_position_ids", -1),
        )
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == self.image_token_id).long()
        return inputs


ImagesOnly.__name__ = Gemma4Processor.__name__


def open_processor(folder: Path) -> ImagesOnly:
    """The processor of a folder; the 12B's images are put together from Gemma 4's other patches."""
    unified = json.loads((folder / "config.json").read_text())["model_type"] == "gemma4_unified"
    if not unified:
        return ImagesOnly.from_pretrained(folder, backend="pil")
    from transformers import GemmaTokenizer

    settings = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    own = {key: settings[key] for key in ("patch_size", "pooling_kernel_size", "max_soft_tokens")}
    processor = ImagesOnly(
        Gemma4ImageProcessorPil(**own), GemmaTokenizer.from_pretrained(folder),
        (folder / "chat_template.jinja").read_text(),
    )  # fmt: skip
    processor.merges = True
    return processor


def name_unified(folder: Path) -> None:
    """The image processor's class as the 12B's files have it."""
    file = folder / "processor_config.json"
    content = json.loads(file.read_text())
    content["image_processor"]["image_processor_type"] = "Gemma4UnifiedImageProcessor"
    content["processor_class"] = "Gemma4UnifiedProcessor"
    file.write_text(json.dumps(content, indent=2))


def budgets_of(messages: list[dict[str, Any]]) -> list[int | None]:
    """What each image's part says of its tokens."""
    return [part.get("tokens") for message in messages for part in message["content"] if part["type"] == "image"]


def pixels_of(inputs: Any, *, unified: bool) -> np.ndarray:
    """The images' pixels row by row, of which every twelfth is kept for the goldens' size: float32[1, N / 12, 1, 3]."""
    found = []
    for patches, places in zip(inputs["pixel_values"].numpy(), inputs["image_position_ids"].numpy(), strict=True):
        real = (places >= 0).all(axis=-1)
        columns, rows = places[real].max(axis=0) + 1
        side = int((patches.shape[-1] // 3) ** 0.5)
        grid = patches[real].reshape(rows, columns, side, side, 3).transpose(0, 2, 1, 3, 4)
        found.append(grid.reshape(-1, 3) if unified else 2 * (grid.reshape(-1, 3) - np.float32(0.5)))
    return np.concatenate(found)[None, ::12, None]
