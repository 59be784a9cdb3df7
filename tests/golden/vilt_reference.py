"""The tiny ViLT checkpoint and what transformers computes with it.

python tests/golden/vilt_reference.py        # makes tests/golden/vilt again; needs the `reference` extra
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from reference import GOLDEN, fill

FOLDER = GOLDEN / "vilt"
CASES = {  # image and question
    "house": ("photo.jpg", "What is it?"),
    "shapes": ("shapes.png", "how many SHAPES are there in the picture"),
}
ANSWERS = ("yes", "no", "2", "house", "red", "circle", "blue", "left")


def make_tokenizer() -> Any:
    """BERT's WordPiece, lower case, of a few words."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    letters = "abcdefghijklmnopqrstuvwxyz?."
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + letter for letter in letters)]
    words += ["what", "is", "it", "how", "many", "there", "in", "the", "shape", "##s", "pic", "##ture"]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(words[:5])
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def make(folder: Path = FOLDER) -> None:
    from transformers import ViltConfig, ViltForQuestionAnswering

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    tokenizer = make_tokenizer()
    config = ViltConfig(
        vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=24, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=48, image_size=40, patch_size=8,
        id2label=dict(enumerate(ANSWERS)), label2id={answer: number for number, answer in enumerate(ANSWERS)},
    )  # fmt: skip
    model = fill(ViltForQuestionAnswering(config).eval(), 78)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    images = {"image_processor_type": "ViltImageProcessor", "size": {"shortest_edge": 40}, "size_divisor": 8}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))


def expected(folder: Path = FOLDER, cases: dict[str, tuple[str, str]] = CASES) -> dict[str, np.ndarray]:
    """Of each case `input_ids` int[L], `pixel_values` float32[height, width, 3], `logits` float32[answers]."""
    import torch
    from PIL import Image
    from tokenizers import Tokenizer
    from transformers import ViltForQuestionAnswering
    from transformers.models.vilt.image_processing_pil_vilt import ViltImageProcessorPil

    model = ViltForQuestionAnswering.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer, processor = (
        Tokenizer.from_file(str(folder / "tokenizer.json")),
        ViltImageProcessorPil.from_pretrained(folder),
    )
    found = {}
    for name, (image, question) in cases.items():
        ids = torch.tensor([tokenizer.encode(question).ids])
        pixels = processor([Image.open(GOLDEN / image)], do_convert_rgb=True, return_tensors="pt")
        with torch.no_grad():
            out = model(input_ids=ids, attention_mask=torch.ones_like(ids), **pixels)
        found |= {
            f"{name}/input_ids": ids[0].numpy().astype(np.int32),
            f"{name}/pixel_values": np.moveaxis(pixels["pixel_values"][0].numpy(), 0, -1),
            f"{name}/logits": out.logits[0].numpy(),
        }
    return found


if __name__ == "__main__":
    make()
    np.savez_compressed(FOLDER / "expected.npz", **expected())
