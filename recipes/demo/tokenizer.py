"""Make the tokenizer of the demonstration model: byte-level BPE over the words of its questions and answers.

python recipes/demo/tokenizer.py SCENES_JSONL FOLDER
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 570  # with `<image>`, which compose adds, and some to spare, 576 of the decoder


def texts(file: Path) -> Iterator[str]:
    for line in file.read_text(encoding="utf-8").splitlines():
        for message in json.loads(line)["messages"]:
            for part in message["content"]:
                if part["type"] == "text":
                    yield part["text"]
                    yield " " + part["text"]


def main() -> None:
    file, folder = Path(sys.argv[1]), Path(sys.argv[2])
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=1,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(file), trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("USER: ", " ASSISTANT: ")])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 2048, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
