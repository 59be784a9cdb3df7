"""Throws broken texts at what reads them: each must be read, or refused by a VLMError of one line, within 2 s and 1 GB.

    TMPDIR=/dev/shm nice python benchmarks/fuzz_texts.py                        all kinds, as often as stands below, 120 s a kind at most
    python benchmarks/fuzz_texts.py --seed 2 --lines 5000 --template 0     other mutants, other counts
    python benchmarks/fuzz_texts.py --seed 1 --one lines 1234              repeats an execution

| kind | what is changed | what reads it |
| --- | --- | --- |
| messages | prompts, messages and images: types, keys, sizes, odd characters | `to_messages` |
| prompts | the same, and special tokens typed in odd ways | the goldens' `Processor`, as for strangers and as for the user |
| lines | bytes and structure of lines of JSON | `read_prompts`, `read_examples` |
| template | blocks and expressions of the goldens' chat templates | `ChatTemplate` |
| tokenizer | steps, vocabularies and added tokens of the goldens' | `load_tokenizer`, encoding, decoding |
| settings | config.json, preprocessor_config.json, generation_config.json | `plan` by the headers, `load_processor` |

In `prompts` a text that a stranger typed must not become a special token either. One process; no model computes.
"""
# ruff: noqa: E501 - tables

import argparse
import faulthandler
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # a mutant may name a tower anywhere

import numpy as np
from fuzz_checkpoints import GOLDENS, NASTY, VALUES, WORDS, mutate, mutate_bytes
from PIL import Image

from mlx_vlm_mini.checkpoints.assembly import open_model
from mlx_vlm_mini.checkpoints.load import load_processor, plan
from mlx_vlm_mini.cli.questions import read_prompts
from mlx_vlm_mini.data.examples import read_examples
from mlx_vlm_mini.errors import VLMError
from mlx_vlm_mini.images.source import SERVED, Access
from mlx_vlm_mini.processor import Processor
from mlx_vlm_mini.text.literal import MARK, mark, unmark
from mlx_vlm_mini.text.messages import images_of, split_turns, text_of, to_messages
from mlx_vlm_mini.text.template import ChatTemplate, find_chat_template
from mlx_vlm_mini.text.tokenizer import TextStream, load_tokenizer

MOST_SECONDS, MOST_MEGABYTES = 2.0, 1000
KINDS = {
    "messages": 500_000,
    "prompts": 20_000,
    "lines": 300_000,
    "template": 20_000,
    "tokenizer": 20_000,
    "settings": 20_000,
}
OFFLINE = Access(files=True, pdfs=True)  # the user's own, but no address is asked
GOLDEN = GOLDENS[0].parent
ARRAYS = np.zeros((2, 3, 3), np.uint8), np.zeros(0), np.array([1.5, np.nan])
SMALL = Image.new("RGB", (9, 7), "red")
DATA = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///ywAAAAAAQABAAACAUwAOw=="
TEXTS = (
    "", " ", "\n", "Hi", "What is this?", "a" * 3000, "é" * 300, "\ud800", "a\udfffb", "\0", "\x1b[2J\r\n", "\ufeff", "\u2028", "\ue000",
    "\ue002\ue003", "".join(map(chr, range(0xE000, 0xE020))), "\U000f0000\U0010ffff", "\ufffd\uffff", "e\u0301" * 99, "\u202eabc", "😀👩‍👩‍👧",
    MARK, MARK[:5], f"a{MARK}b", "{{ 7 * 7 }}", "{% for x in y %}", "<image>", "<ima<image>ge>", "< image >", "<IMAGE>", "<|im_start|>system\n",
    "</s><s>[INST]", "<|im_end|", "<0x41>", "▁▁", "Ġ", "%s %d {} {0}", "~", "~root", "~\0", "~\ud800", "../x", "/", ".", "/dev/null", "a.pdf",
    "a.pdf[2]", "a[1-9]", "[", "*", "file:///%00", "file://", "http://127.0.0.1:1/a", "HTTPS://x", "data:", "data:,", DATA, DATA[:40],
    "data:application/pdf;base64,JVBERi0=", "image", "text", "user", "assistant", "system", "x" * 300, "True", "1",
)  # fmt: skip
KEYS = (
    "role", "content", "images", "type", "text", "image", "image_url", "url", "path", "base64", "video", "fps", "max_frames", "name",
    "tool_calls", "videos", "x", "", "\ud800", "cache_control",
)  # fmt: skip
LINES = [
    {"messages": [{"role": "user", "content": "What?"}], "id": 1},
    {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A."}], "images": ["shapes.png"]},
    {"messages": [{"role": "user", "content": [{"type": "image", "image": "shapes.png"}, {"type": "text", "text": "?"}]},
                  {"role": "assistant", "content": [{"type": "text", "text": "A."}]}], "kind": "colour"},
    {"messages": [{"role": "system", "content": "Be."}, {"role": "user", "content": "?", "images": ["strip.png"]}]},
    {"messages": [{"role": "user", "content": [{"type": "image"}, "?", {"type": "image_url", "image_url": {"url": "shapes.png"}}]}],
     "image": "shapes.png"},
    {"messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4", "fps": 1}]}], "videos": []},
    {"messages": [{"role": "user", "content": [{"type": "image", "path": "~/a.pdf[1-2]"}, {"type": "image", "base64": "R0lG"}]}]},
    {"image": "shapes.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A."}]},
    {"messages": "Hi"},
]  # fmt: skip
ANSWERED = [each for each in LINES if '"assistant"' in json.dumps(each) or "conversations" in each]
LINES_OF = {True: [each for each in LINES if each not in ANSWERED], False: ANSWERED}
STEPS: dict[str, list[Any]] = {
    "normalizer": [
        {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}, {"type": "NFC"},
        {"type": "Replace", "pattern": {"Regex": "a|b+"}, "content": ""}, {"type": "Lowercase"}, {"type": "StripAccents"}, {"type": "NFKD"},
        {"type": "Strip", "strip_left": True, "strip_right": True}, {"type": "Sequence", "normalizers": []}, {"type": "ByteLevel"},
        {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True},
        {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, {"type": "Nmt"},
    ],
    "pre_tokenizer": [
        {"type": "Split", "pattern": {"Regex": "\\s+"}, "behavior": "Isolated", "invert": False}, {"type": "Whitespace"},
        {"type": "Split", "pattern": {"String": ""}, "behavior": "MergedWithNext", "invert": True}, {"type": "Digits", "individual_digits": True},
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}, {"type": "Punctuation", "behavior": "Removed"},
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}, {"type": "UnicodeScripts"},
        {"type": "Sequence", "pretokenizers": []}, {"type": "BertPreTokenizer"}, {"type": "CharDelimiterSplit", "delimiter": "a"},
    ],
    "decoder": [
        {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}, {"type": "BPEDecoder", "suffix": "e"},
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "WordPiece", "prefix": "##", "cleanup": True},
        {"type": "CTC", "pad_token": "a", "word_delimiter_token": "b", "cleanup": True}, {"type": "Sequence", "decoders": []},
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False},
    ],
    "post_processor": [
        {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
         "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
         "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        {"type": "BertProcessing", "sep": ["a", 1], "cls": ["b", 2]}, {"type": "Sequence", "processors": []},
        {"type": "RobertaProcessing", "sep": ["a", 1], "cls": ["b", 2], "trim_offsets": True, "add_prefix_space": True},
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    ],
    "model": [
        {"type": "WordPiece", "unk_token": "a", "continuing_subword_prefix": "##", "max_input_chars_per_word": 9, "vocab": {"a": 0, "##b": 1}},
        {"type": "WordLevel", "unk_token": "a", "vocab": {"a": 0, "b": 5}}, {"type": "BPE", "vocab": {}, "merges": []},
        {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0], ["b", -1.0]], "byte_fallback": True}, {"type": "Unigram", "unk_id": None, "vocab": []},
        {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"], "dropout": 0.5, "unk_token": "c", "fuse_unk": True},
    ],
}  # fmt: skip


class Breach(Exception):
    """Something was read, and wrongly."""


def odd(rng: random.Random, depth: int = 0) -> Any:
    """A value of any kind."""
    what = rng.randrange(16)
    if what < 7:
        return typed(rng)
    if what < 9:
        return rng.choice(VALUES)
    if what < 11 and depth < 4:
        return [odd(rng, depth + 1) for _ in range(rng.choice((0, 1, 2, 2, 5)))]
    if what < 14 and depth < 4:
        return {rng.choice(KEYS): odd(rng, depth + 1) for _ in range(rng.choice((0, 1, 2, 3)))}
    return rng.choice(
        (
            b"", b"GIF89a", bytearray(3), memoryview(b"ab"), Path(typed(rng).replace("/", "")), SMALL, *ARRAYS,
            object(), range(3), ("a", None), {1, 2}, frozenset(), iter(["a"]), int, Exception("x"), 1j, {1: 2, (): 3},
        )
    )  # fmt: skip


def typed(rng: random.Random) -> str:
    """A text, sometimes of several."""
    text = "".join(rng.choice(TEXTS) for _ in range(rng.choice((1, 1, 1, 2, 3))))
    if rng.random() < 0.1 and text:
        place = rng.randrange(len(text))
        text = text[:place] + chr(rng.randrange(0x110000)) + text[place + 1 :]
    return (text * rng.choice((50, 300)))[:200_000] if rng.random() < 0.01 else text


def part(rng: random.Random) -> Any:
    kind = rng.choice(("text", "text", "image", "image_url", "video", "x"))
    if rng.random() < 0.15:
        return odd(rng)
    found: dict[Any, Any] = {"type": kind}
    if kind == "text":
        found["text"] = typed(rng)
    elif kind == "image" and rng.random() < 0.8:
        found[rng.choice(("image", "path", "url", "base64"))] = rng.choice((DATA, SMALL, "a.png"))
    elif kind == "image_url":
        found["image_url"] = rng.choice((DATA, {"url": DATA}, {"url": "a"}, {}))
    elif kind == "video":
        found |= {"video": rng.choice(("a.mp4", [SMALL], [])), "fps": rng.choice((None, 1, 0.5))}
    if rng.random() < 0.2:
        found[rng.choice(KEYS)] = odd(rng)
    return found


def message(rng: random.Random) -> Any:
    content = typed(rng) if rng.random() < 0.4 else [part(rng) for _ in range(rng.choice((0, 1, 2, 3)))]
    found: dict[Any, Any] = {"role": rng.choice(("user", "user", "assistant", "system", "tool")), "content": content}
    if rng.random() < 0.15:
        found["images"] = rng.choice((DATA, [DATA], [SMALL, DATA], odd(rng)))
    if rng.random() < 0.15:
        found[rng.choice(KEYS)] = odd(rng)
    if rng.random() < 0.03:
        del found[rng.choice([*found])]
    return found


def asked(rng: random.Random) -> tuple[Any, Any]:
    """A prompt, and images beside it."""
    what = rng.random()
    if what < 0.6:
        prompt: Any = [message(rng) for _ in range(rng.choice((1, 1, 2, 3, 6)))]
    elif what < 0.8:
        prompt = [rng.choice((typed(rng), DATA, SMALL, part(rng))) for _ in range(rng.choice((0, 1, 2, 4)))]
    else:
        prompt = typed(rng) if what < 0.9 else odd(rng)
    images = rng.choice(((), (), (), [DATA], DATA, SMALL, [SMALL, DATA])) if rng.random() < 0.9 else odd(rng)
    return prompt, images


class Fuzzer:
    """What of each kind is made of a number, and read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("shapes.png", "strip.png"):
            shutil.copy(GOLDEN / name, folder / name)
        self._processors: list[Processor] = []
        self._spoken: dict[tuple[int, bool], int] = {}
        self.templates = [found for golden in GOLDENS if (found := find_chat_template(golden))]
        self.tokenizers = [json.loads(file.read_text()) for golden in GOLDENS
                           if (file := golden / "tokenizer.json").is_file() and file.stat().st_size < 100_000]  # fmt: skip
        self.token_files = folder / "tokenizer"
        self.token_files.mkdir()
        self.copies: dict[Path, Path] = {}

    def processors(self) -> list[Processor]:
        if not self._processors:
            made = []
            for golden in GOLDENS:
                checkpoint = open_model(golden)
                if checkpoint.config.get("model_type") not in ("clip", "vilt"):
                    found = plan(checkpoint)
                    made.append(load_processor(checkpoint, found.family, found.config))
            self._processors = made
        return self._processors

    def messages(self, rng: random.Random) -> None:
        prompt, images = asked(rng)
        found = to_messages(prompt, images, rng.choice((None, SERVED, OFFLINE)))
        for each in found:
            text_of(each)
        images_of(found)
        split_turns(found)

    def prompts(self, rng: random.Random) -> None:
        processors = self.processors()
        number = rng.randrange(len(processors))
        processor, served = processors[number], rng.random() < 0.5
        processor.access = SERVED if served else OFFLINE
        if rng.random() < 0.5:
            prompt, images = asked(rng)
            processor(prompt, images)
            return
        controls = sorted({*processor._controls(), processor.image_token})
        text = "".join(
            rng.choice((lambda: rng.choice(controls), lambda: spoil(rng.choice(controls), rng), lambda: typed(rng)))()
            for _ in range(rng.choice((1, 1, 2, 4)))
        )
        images = [SMALL] if processor.config.takes_one_image else []
        count = self._count(processor, f"a{text}b", images)
        if (number, served) not in self._spoken:
            self._spoken[number, served] = self._count(processor, "ab", images)
        if count != self._spoken[number, served]:
            raise Breach(f"{processor.config.family}: {count - self._spoken[number, served]} special tokens were typed")

    def _count(self, processor: Processor, text: str, images: list[Any]) -> int:
        """Special tokens of a prompt."""
        ids = np.array(processor([{"role": "user", "content": text}] if not images else text, images).input_ids[0])
        return int(np.isin(ids, [processor.tokenizer.token_to_id(each) or -1 for each in processor._controls()]).sum())

    def lines(self, rng: random.Random) -> None:
        asks = rng.random() < 0.5
        seeds = LINES if rng.random() < 0.1 else LINES_OF[asks]
        found = [rng.choice(seeds) for _ in range(rng.choice((1, 1, 2, 3)))]
        if rng.random() < 0.6:
            found[0] = deepcopy(mutate(found[0], rng))
            if rng.random() < 0.3 and isinstance(found[0], dict):
                found[0][rng.choice(("images", "image", "messages", "conversations", "videos", "id", "kind"))] = (
                    rng.choice((typed(rng), [typed(rng)], rng.choice(VALUES), [message_of_json(rng)]))
                )
        data = b"\n".join(json.dumps(each).encode() for each in found)
        if rng.random() < 0.5:
            data = mutate_bytes(data, rng)
        file = self.folder / "lines.jsonl"
        file.write_bytes(data)
        if asks:
            for item in read_prompts(str(file), rng.choice((None, "Be brief."))):
                assert item is not None
                item.key({})
            return
        for example in read_examples(file):
            hash((example.where, example.kind))

    def template(self, rng: random.Random) -> None:
        parts = re.split(r"(\{[%{#].*?[%}#]\})", rng.choice(self.templates), flags=re.DOTALL)
        for _ in range(rng.choice((1, 1, 2, 4, 10))):
            place, what = rng.randrange(len(parts)), rng.randrange(7)
            if what == 0:
                del parts[place : place + rng.choice((1, 1, 3))]
                parts = parts or [""]
            elif what == 1:
                other = rng.randrange(len(parts))
                parts[place], parts[other] = parts[other], parts[place]
            elif what == 2:
                parts[place:place] = parts[place : place + rng.choice((1, 3, 9))] * rng.choice((1, 3))
            elif what == 3:
                names = re.findall(r"[A-Za-z_][\w.]*|'[^']*'|\d+", parts[place])
                if names:
                    parts[place] = parts[place].replace(rng.choice(names), rng.choice((*WORDS, *names)), 1)
            elif what == 4:
                piece = rng.choice(NASTY)
                parts.insert(
                    place, piece % tuple(rng.choice(WORDS) for _ in range(piece.replace("%%", "").count("%s")))
                )
            elif what == 5:
                operators = re.findall(r"==|!=|\+|~|\||\[|\]|\(|\)| in | not | and |:", parts[place])
                if operators:
                    parts[place] = parts[place].replace(
                        rng.choice(operators), rng.choice((*operators, "~", "*", "**", "|", "%", ",", "")), 1
                    )
            else:
                parts[place] = rng.choice(TEXTS) + parts[place]
        found = ChatTemplate(
            "".join(parts), {"bos_token": "<s>", "eos_token": "</s>"}, "<image>", rng.choice((None, "<video>"))
        )
        said: list[Any] = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": typed(rng)}]}]
        if rng.random() < 0.5:
            said += [{"role": "assistant", "content": typed(rng)}, {"role": "user", "content": "a"}]
        found.render(said, controls=("</s>", "<|im_end|>"))

    def tokenizer(self, rng: random.Random) -> None:
        known = rng.choice(self.tokenizers)
        content = {**known, "added_tokens": [*known["added_tokens"]]}
        for _ in range(rng.choice((0, 1, 1, 2))):
            step = rng.choice([*STEPS])
            made = rng.choice(STEPS[step])
            made = mutate(made, rng) if rng.random() < 0.6 else made
            plural = {
                "normalizer": "normalizers",
                "pre_tokenizer": "pretokenizers",
                "decoder": "decoders",
                "post_processor": "processors",
            }
            if step in plural and rng.random() < 0.6:
                made = {
                    "type": "Sequence",
                    plural[step]: rng.choice(([made], [made, content.get(step)], [content.get(step), made, made])),
                }
            content[step] = made
        for _ in range(rng.choice((0, 0, 1, 3))):
            token = {"id": rng.choice((0, 1, 5, 400, 10**6)), "content": typed(rng), "special": rng.random() < 0.5}
            token |= {key: rng.random() < 0.5 for key in ("single_word", "lstrip", "rstrip", "normalized")}
            content["added_tokens"].append(mutate(token, rng) if rng.random() < 0.3 else token)
        if rng.random() < 0.5:
            content = mutate(content, rng)
        settings: Any = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": True,
                         "added_tokens_decoder": {"3": {"content": "<x>", "special": True}}, "additional_special_tokens": ["<y>"]}  # fmt: skip
        (self.token_files / "tokenizer_config.json").write_text(
            json.dumps(mutate(settings, rng) if rng.random() < 0.4 else {})
        )
        (self.token_files / "tokenizer.json").write_text(json.dumps(content))
        found = load_tokenizer(self.token_files)
        controls = found.controls()
        for text in ("Hi <image> there, é 1234 \n\n  " + "a" * 50, typed(rng), "".join(list(controls)[:3]) + "b"):
            text = unmark(text)
            ids, offsets = found.encode_with_offsets(mark([text], controls)[0], image_token="<image>")
            if len(ids) != len(offsets):
                raise Breach(f"{len(ids)} ids, {len(offsets)} offsets")
            found.decode(ids)
            stream = TextStream(found)
            for token in [*ids[:20], rng.choice((0, 10**6, 2**31))]:
                stream.add(token)
            stream.finish()

    def settings(self, rng: random.Random) -> None:
        golden = rng.choice(GOLDENS)
        if golden not in self.copies:
            self.copies[golden] = Path(shutil.copytree(golden, self.folder / golden.name))
        folder, changed = self.copies[golden], []
        names = (
            "config.json",
            "preprocessor_config.json",
            "processor_config.json",
            "generation_config.json",
            "video_preprocessor_config.json",
        )
        try:
            for name in names:
                file = golden / name
                if rng.random() < 0.4 and (file.is_file() or name == "generation_config.json"):
                    data = (
                        file.read_bytes()
                        if file.is_file()
                        else b'{"eos_token_id": [1, 2], "chat_format": "chatml", "do_sample": true}'
                    )
                    data = (
                        json.dumps(mutate(json.loads(data), rng)).encode()
                        if rng.random() < 0.9
                        else mutate_bytes(data, rng)
                    )
                    (folder / name).write_bytes(data)
                    changed.append(name)
            checkpoint = open_model(folder)
            if checkpoint.config.get("model_type") in ("clip", "vilt"):
                return
            found = plan(checkpoint)
            processor = load_processor(checkpoint, found.family, found.config)
            processor("Hi", [SMALL] if processor.config.takes_one_image else [])
        finally:
            for name in changed:
                if (golden / name).is_file():
                    shutil.copy(golden / name, folder / name)
                else:
                    (folder / name).unlink()


def message_of_json(rng: random.Random) -> Any:
    return {
        "role": rng.choice(("user", "assistant", 1)),
        "content": rng.choice((typed(rng), None, [], [{"type": "image"}])),
    }


def spoil(token: str, rng: random.Random) -> str:
    """A token typed in an odd way."""
    place, other = (
        rng.randrange(len(token) + 1),
        rng.choice(("", " ", "\n", "\u200b", MARK[0], MARK[:3], token, "\u0301", "é")),
    )
    return rng.choice(
        (token[:place] + other + token[place:], token * 2, other + token, token + other, token[place:] + token[:place])
    )


def say(*what: object) -> None:
    print(*what, flush=True)


def execute(run: Callable[[random.Random], None], rng: random.Random) -> tuple[str, float, str | None]:
    """Run one input: its outcome, the seconds it took, and what is wrong with them, if anything."""
    begun, wrong = time.process_time(), None
    signal.setitimer(signal.ITIMER_REAL, 30)
    try:
        run(rng)
        outcome = "read"
    except VLMError as error:
        outcome = "refused"
        wrong = None if str(error).isprintable() and str(error) else f"its message: {str(error)[:200]!r}"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        outcome, wrong = "failed", f"{error!r:.300} in {where.filename}:{where.lineno}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    took = time.process_time() - begun
    return outcome, took, f"{took:.1f} s" if took > MOST_SECONDS and wrong is None else wrong


def _stop(*_: object) -> None:
    raise TimeoutError("30 s")


def fuzz(counts: dict[str, int], seed: int, seconds: float) -> int:
    """All executions; how many of them failed."""
    rows, failed = [], 0
    signal.signal(signal.SIGALRM, _stop)
    with tempfile.TemporaryDirectory() as place:
        fuzzer = Fuzzer(Path(place))
        for kind, count in counts.items():
            outcomes, wrongs, slowest, begun = Counter[str](), 0, (0.0, 0), time.monotonic()
            peak = 0.0
            for number in range(count):
                if number % 100 == 0:
                    faulthandler.dump_traceback_later(300, exit=True)  # where a library never comes back
                outcome, took, wrong = execute(getattr(fuzzer, kind), random.Random(f"{seed} {kind} {number}"))
                memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
                    2**20 if sys.platform == "darwin" else 1024
                )
                if number and memory > peak + MOST_MEGABYTES:  # the first reads what all need
                    wrong = wrong or f"{memory - peak:.0f} MB more"
                peak = memory if not number or wrong else peak
                outcomes[outcome] += 1
                slowest = max(slowest, (took, number))
                if wrong is not None:
                    wrongs += 1
                    say(f"{kind} {number}: {wrong}")
                if time.monotonic() - begun > seconds:
                    break
            failed += wrongs
            row = f"| {kind} | {outcomes.total():,} | {outcomes['read']:,} | {outcomes['refused']:,} | {wrongs} | {slowest[0]:.2f} s |"
            rows.append(row)
            say(row, f"{time.monotonic() - begun:.0f} s, {memory:.0f} MB, slowest {slowest[1]}" if count else "")
        faulthandler.cancel_dump_traceback_later()
    say(
        "| kind | executions | read | refused in one line | failures | slowest |\n| --- | ---: | ---: | ---: | ---: | ---: |"
    )
    say("\n".join(rows))
    return failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=120, help="of a kind at most (default: 120)")
    parser.add_argument("--one", nargs=2, metavar=("KIND", "NUMBER"))
    for each, usual in KINDS.items():
        parser.add_argument(f"--{each}", type=int, default=usual, metavar="N", help=f"executions (default: {usual:,})")
    given = parser.parse_args()
    if given.one:
        with tempfile.TemporaryDirectory() as place:
            getattr(Fuzzer(Path(place)), given.one[0])(random.Random(f"{given.seed} {given.one[0]} {given.one[1]}"))
    else:
        sys.exit(int(fuzz({kind: getattr(given, kind) for kind in KINDS}, given.seed, given.seconds) > 0))
