"""Tiny BLIP-2 and InstructBLIP checkpoints made and answered by transformers 5.23 on torch 2.13.

python tests/golden/blip_reference.py [NAME...]
"""

import io
import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blip_cases import SPECS, Spec, picture_and_text
from PIL import Image
from reference import CORPUS, GOLDEN, STEPS, fill, make_tokenizer, old_rope_keys, write_tensors

warnings.filterwarnings("ignore")


def make_opt_tokenizer() -> Any:
    """Byte-level, `</s>` in front of each text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    words.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=360, initial_alphabet=alphabet, special_tokens=special)
    )
    words.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    words.add_special_tokens(["<image>"])
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="</s>", eos_token="</s>", pad_token="<pad>")


def make_bert_tokenizer() -> Any:
    """Word pieces in lower case between `[CLS]` and `[SEP]`."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    words.normalizer, words.pre_tokenizer = (
        normalizers.BertNormalizer(lowercase=True),
        pre_tokenizers.BertPreTokenizer(),
    )
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=150, special_tokens=special))
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )


def save(spec: Spec, folder: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForImageTextToText, Blip2Processor, InstructBlipProcessor
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    instructed = spec.model_type == "instructblip"
    tokenizer = make_tokenizer("llama") if spec.tokenizer == "llama" else make_opt_tokenizer()
    reader = make_bert_tokenizer()
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    qformer = {**spec.qformer, **({"vocab_size": len(reader)} if instructed else {})}
    config = AutoConfig.for_model(
        spec.model_type, vision_config=spec.vision, qformer_config=qformer,
        text_config={**spec.text, "vocab_size": len(tokenizer) + 5, "eos_token_id": tokenizer.eos_token_id},
        image_token_index=image_token, **spec.extra,
    )  # fmt: skip
    model = fill(AutoModelForImageTextToText.from_config(config).eval(), spec.seed)
    with torch.no_grad():
        model.query_tokens.mul_(8)
        for name, tensor in model.named_parameters():
            if name.endswith("LayerNorm.weight"):
                tensor.add_(1)
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    content = json.loads((folder / "config.json").read_text())
    if "rope_parameters" in content["text_config"]:
        old_rope_keys(content)
    if not instructed:  # as older Hub folders: sparse, and without a word of the image token
        for key in ("layer_norm_eps", "hidden_act"):
            content["vision_config"].pop(key), content["qformer_config"].pop(key)
        for key in ("activation_function", "do_layer_norm_before", "tie_word_embeddings"):
            content["text_config"].pop(key, None)
    (folder / "config.json").write_text(json.dumps(content, indent=1))
    write_tensors(spec, folder, tensors)  # type: ignore[arg-type]
    images = BlipImageProcessorPil(size={"height": spec.vision["image_size"], "width": spec.vision["image_size"]})
    parts = (images, tokenizer, reader) if instructed else (images, tokenizer)
    kind = InstructBlipProcessor if instructed else Blip2Processor
    kind(*parts, num_query_tokens=spec.extra["num_query_tokens"]).save_pretrained(folder)
    if not instructed:
        stored = json.loads((folder / "processor_config.json").read_text())
        (folder / "preprocessor_config.json").write_text(json.dumps(stored.pop("image_processor"), indent=1))
        (folder / "processor_config.json").write_text(json.dumps(stored, indent=1))


class Reference:
    """A checkpoint folder opened by transformers in float32."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.model = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.processor = AutoProcessor.from_pretrained(folder, backend="pil")

    def inputs(self, image: str, text: str) -> dict[str, Any]:
        picture = Image.open(io.BytesIO((GOLDEN / image).read_bytes()))
        return dict(self.processor(images=picture, text=text, return_tensors="pt"))

    @torch.no_grad()
    def answer(self, image: str, text: str, steps: int = STEPS) -> dict[str, np.ndarray]:
        """As `Reference.answer` of reference.py."""
        inputs = self.inputs(image, text)
        ids = inputs["input_ids"]
        out = self.model(**inputs, use_cache=True)
        every = torch.log_softmax(out.logits[0], dim=-1)
        past = out.language_model_outputs.past_key_values
        rows, tokens = [every[-1].numpy()], [int(every[-1].argmax())]
        while len(rows) < steps:
            more = self.model.language_model(
                input_ids=torch.tensor([tokens[-1:]]), past_key_values=past, use_cache=True
            )
            rows.append(torch.log_softmax(more.logits[0, -1], dim=-1).numpy())
            tokens.append(int(rows[-1].argmax()))
        return {
            "prompt_ids": ids[0].numpy().astype(np.int32),
            "prompt_logprobs": every[:-1].gather(1, ids[0, 1:, None])[:, 0].numpy(),
            "token_ids": np.array(tokens, dtype=np.int32),
            "logprobs": np.stack(rows),
            "pixel_values": np.moveaxis(inputs["pixel_values"].numpy(), 1, -1),
        }

    @torch.no_grad()
    def mixing(self, image: str, text: str) -> np.ndarray:
        """The mean of the queries' weights on the image's features over layers and heads: float32[queries, P]."""
        found: list[Any] = []
        layers = [layer for layer in self.model.qformer.encoder.layer if hasattr(layer, "crossattention")]
        hooks = [
            layer.crossattention.attention.register_forward_hook(lambda *call: found.append(call[-1][1][0]))
            for layer in layers
        ]
        self.model(**self.inputs(image, text))
        for hook in hooks:
            hook.remove()
        return torch.cat(found).mean(dim=0).numpy()


def expected(name: str) -> dict[str, np.ndarray]:
    """`case/what` to an array, and `mixing` of the case `image`."""
    reference = Reference(GOLDEN / name)
    found = {"mixing": reference.mixing(*picture_and_text("image"))}
    for case in SPECS[name].cases:
        answer = reference.answer(*picture_and_text(case))
        found |= {f"{case}/{what}": array for what, array in answer.items()}
    return found


if __name__ == "__main__":
    for name in sys.argv[1:] or SPECS:
        folder = GOLDEN / name
        shutil.rmtree(folder, ignore_errors=True)
        save(SPECS[name], folder)
        arrays = expected(name)
        np.savez_compressed(folder / "expected.npz", **arrays)
        print(name, sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) // 1024, "KiB")
        for case in SPECS[name].cases:
            print("  ", case, arrays[f"{case}/prompt_ids"].tolist()[:12], "->", *arrays[f"{case}/token_ids"])
