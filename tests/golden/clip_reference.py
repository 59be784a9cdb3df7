"""The tiny CLIP checkpoint and what transformers computes with it.

python tests/golden/clip_reference.py        # makes tests/golden/clip again; needs the `reference` extra
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from reference import GOLDEN, fill

FOLDER = GOLDEN / "clip"
IMAGES = ("photo.jpg", "shapes.png")
TEXTS = ("a house", "Two shapes, a red circle", "nothing at all of this: ünïcode & 42", "")
_WORDS = ["a house and two shapes", "red circle blue square", "nothing at all of this", "a photo of a house"]


def make_tokenizer() -> Any:
    """CLIP's kind of BPE, of a few words: lower case, words end in `</w>`."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(
        models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>", continuing_subword_prefix="")
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    pattern = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator(
        [*_WORDS, *(f"{sign} {sign}" for sign in "abcdefghijklmnopqrstuvwxyz0123456789&:,")], trainer
    )
    whole = json.loads(tokenizer.to_str())  # as CLIP's: each byte inside and at the end of a word, special tokens last
    vocabulary = whole["model"]["vocab"]
    for token in [*(sign + "</w>" for sign in alphabet), "<|startoftext|>", "<|endoftext|>"]:
        vocabulary.setdefault(token, len(vocabulary))
    tokenizer = Tokenizer.from_str(json.dumps(whole))
    tokenizer.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    first, last = (tokenizer.token_to_id(token) for token in ("<|startoftext|>", "<|endoftext|>"))
    tokenizer.post_processor = processors.RobertaProcessing(
        ("<|endoftext|>", last), ("<|startoftext|>", first), add_prefix_space=False, trim_offsets=False
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def make(folder: Path = FOLDER) -> None:
    """Write the checkpoint, its config with OpenAI's `eos_token_id` of 2."""
    from transformers import CLIPConfig, CLIPModel

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    tokenizer = make_tokenizer()
    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = CLIPConfig(
        text_config={
            **small, "vocab_size": tokenizer.get_vocab_size(), "max_position_embeddings": 40, "eos_token_id": 2,
            "bos_token_id": 0, "pad_token_id": 1, "projection_dim": 24,
        },
        vision_config={
            **small, "hidden_size": 48, "image_size": 30, "patch_size": 10, "hidden_act": "gelu", "projection_dim": 24,
        },
        projection_dim=24,
    )  # fmt: skip
    model = fill(CLIPModel(config).eval(), 77)
    model.logit_scale.data.fill_(2.7)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<|endoftext|>", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=1))
    images = {
        "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 30}, "do_center_crop": True,
        "crop_size": {"height": 30, "width": 30}, "do_convert_rgb": True, "resample": 3,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(images, indent=1))


def expected(folder: Path = FOLDER, texts: tuple[str, ...] = TEXTS) -> dict[str, np.ndarray]:
    """`input_ids` int[texts, L], `pixel_values` float32[images, 30, 30, 3], `logits` float32[images, texts]."""
    import torch
    from PIL import Image
    from transformers import AutoTokenizer, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    said = AutoTokenizer.from_pretrained(folder)(list(texts), padding=True, return_tensors="pt")
    opened = [Image.open(GOLDEN / name) for name in IMAGES]
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(opened, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        out = model(input_ids=said["input_ids"], attention_mask=said["attention_mask"], pixel_values=pixels)
    return {
        "input_ids": said["input_ids"].numpy().astype(np.int32),
        "pixel_values": np.moveaxis(pixels.numpy(), 1, -1),
        "logits": out.logits_per_image.numpy(),
    }


if __name__ == "__main__":
    make()
    np.savez_compressed(FOLDER / "expected.npz", **expected())
