"""What grows with every turn or picture; benchmarks/long_use.py measures hundreds and thousands of them."""

import gc
import os
from pathlib import Path

import mlx.core as mx
import pytest
from checkpoints import PHOTO, SHAPES

from mlx_vlm_mini import Chat

STATM = Path("/proc/self/statm")


@pytest.mark.skipif(not STATM.exists(), reason="/proc tells how much memory there is")
def test_texts_that_never_come_again_are_not_kept(llava):
    """A Llama's text is one word to the tokenizer, which kept the first 10,000 of them."""
    _, processor = llava

    def encode(first: int, last: int) -> int:
        for number in range(first, last):
            processor.tokenizer.encode(f"Number {number}? " * 12)
        return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = encode(0, 1100)
    assert encode(1100, 2300) - before < 3 << 20  # 8 MB more, if all were kept


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="it lists open files")
def test_turns_leave_no_arrays_and_no_files(llava, tmp_path):
    chat = Chat(*llava, context=120, on_full="drop", max_tokens=1, feature_memory=1 << 16)

    def talk() -> tuple[int, int]:
        list(chat.send(["What is it?", PHOTO]))
        list(chat.edit(["And this?", SHAPES]))
        list(chat.fork().send("Hello"))
        chat.save(tmp_path / "talk.json", cache=True)
        list(Chat.load(tmp_path / "talk.json", *llava).send("Again"))
        chat.undo()
        gc.collect()
        return mx.get_active_memory(), len(list(Path("/dev/fd").iterdir()))

    for _ in range(2):
        talk()
    memory, files = talk()
    for _ in range(2):
        later, now = talk()
        assert now == files and later <= memory + 4096
