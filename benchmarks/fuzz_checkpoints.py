"""Checkpoints from an enemy: the table of tests/support/hostile.py, and a fuzzer of everything that is read.

    python benchmarks/fuzz_checkpoints.py table                               the table in SECURITY.md
    nice python benchmarks/fuzz_checkpoints.py fuzz [SECONDS] [SEED] [KIND]   mutants of tests/golden, in this process

The fuzzer changes what the goldens hold by its structure (numbers, keys, opcodes, parts of templates) and reads it as
the package does. A mutant may be read, or refused by a VLMError of one line; all else is a failure, and so are 2 s of
the processor and 1 GB more memory. Each has a number: `fuzz 1 NUMBER KIND` repeats what is printed.
"""
# ruff: noqa: E501 - tables

import io
import json
import math
import pickletools
import random
import resource
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests/support"), str(ROOT / "tests/golden")]

import hostile
from checkpoints import PHOTO
from pickles import archive, tensor

from mlx_vlm_mini.checkpoints.folder import Checkpoint, open_checkpoint, parse_header, read_header
from mlx_vlm_mini.checkpoints.load import load_processor, plan, read_config
from mlx_vlm_mini.checkpoints.pickled import read_pickled
from mlx_vlm_mini.checkpoints.weights import load_whole
from mlx_vlm_mini.errors import VLMError
from mlx_vlm_mini.scoring import clip, vilt
from mlx_vlm_mini.text.template import ChatTemplate, find_chat_template
from mlx_vlm_mini.text.tokenizer import load_tokenizer

GOLDENS = sorted(file.parent for file in hostile.PLAIN.parent.glob("*/config.json"))
VALUES: list[Any] = [
    -1, 0, 1, 2, 3, 7, 255, 4096, 2**31 - 1, 2**31, 2**63, 10**10, 10**30, -(10**10), 0.5, -1.5, 1e308, 1e-320, math.nan,
    math.inf, -math.inf, True, False, None, "", "x", "../x", "/etc/passwd", "\0", "\ud800", "é" * 50, "a" * 5000, "1",
    [], {}, [[]], [0], [1] * 300, [None], {"a": 1}, {"": {}}, [{}], {"type": "x"}, {"content": "x"}, {"Regex": "(a+)+"},
]  # fmt: skip
NASTY = (
    "{{ %s * 99999 }}", "{{ %s ~ %s }}", "{%% for i in range(9999) %%}", "{%% endfor %%}", "{%% if %s %%}", "{%% endif %%}",
    "{%% set ns.x = [%s, ns.x] %%}", "{{ %s.__class__ }}", "{{ %s|tojson(indent=2) }}", "{{ %s|join(%s) }}", "{{ %s[%s:] }}",
    "{%% macro f(a, b=%s) %%}{{ a }}{{ f(%s) }}{%% endmacro %%}", "{{ f(%s) }}", "{{ '%%s' %% %s }}", "{{ %s.replace(%s, %s) }}",
    "{{ %s|replace(%s, %s) }}", "{{ %s|batch(%s)|list }}", "{{ %s|sort|unique|list }}", "{{ %s.split(%s) }}", "{{ %s|map('%s')|list }}",
    "{{ (%s)|string|length }}", "{%% set ns = namespace(x=%s) %%}", "{{ ns.x + %s }}", "{%% for a, b in %s.items() %%}", "{{ %s ** %s }}",
    "{{ [%s] == [%s] }}", "{{ {%s: %s} }}", "{{ %s|attr('format')(%s) }}", "{%% filter indent(%s) %%}", "{%% endfilter %%}", "{{ loop(%s) }}",
)  # fmt: skip
WORDS = (
    "messages", "message", "ns", "ns.x", "'a'", "''", "'a' * 999", "[1, 2]", "1", "0", "-1", "10**9", "1.5", "none", "true",
    "message.content", "messages[0]", "loop", "range(99)", "namespace", "dict", "cycler", "self", "caller", "bos_token", "(1,)",
    "raise_exception", "strftime_now('%Y')", "'{}{:9}'", "x", "f", "loop.index", "messages|length", "{'a': 1}", "varargs",
)  # fmt: skip


def mutate(content: Any, rng: random.Random) -> Any:
    """Change a few places of a JSON value."""
    content = deepcopy(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        places: list[tuple[Any, Any]] = []
        waiting = [content]
        while waiting:
            part = waiting.pop()
            pairs = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
            for key, value in pairs:
                places.append((part, key))
                waiting.append(value)
            if len(places) > 5000:
                break
        if not places:
            return rng.choice(VALUES)
        part, key = rng.choice(places)
        what = rng.random()
        if what < 0.15:
            del part[key]
        elif what < 0.3 and len(places) > 1:
            other, name = rng.choice(places)
            part[key] = deepcopy(other[name]) if not isinstance(other, list) or name < len(other) else 0
        elif what < 0.45 and type(part[key]) in (int, float):
            part[key] = part[key] * rng.choice((-1, 2, 3, 10, 1000, 10**6)) + rng.choice((-1, 0, 1))
        else:
            part[key] = deepcopy(rng.choice(VALUES))
    return content


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    raw = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        place = rng.randrange(len(raw) + 1)
        what = rng.randrange(5)
        if what == 0 and raw:
            raw[place % len(raw)] ^= 1 << rng.randrange(8)
        elif what == 1:
            del raw[place : place + rng.choice((1, 4, 100))]
        elif what == 2:
            raw[place:place] = rng.randbytes(rng.choice((1, 4, 8)))
        elif what == 3:
            raw[place:place] = raw[place : place + rng.choice((3, 30))] * rng.choice((1, 50))
        else:
            raw = raw[:place]
    return bytes(raw)


class Fuzzer:
    """What of each kind is read, and how."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoints = [open_checkpoint(golden) for golden in GOLDENS]
        self.plain = [each for each in self.checkpoints if each.config.get("model_type") not in ("clip", "vilt")]
        for checkpoint in self.checkpoints:
            _ = checkpoint.tensors
        files = [file for golden in GOLDENS for file in golden.glob("model*.safetensors")]
        self.headers = [(file.read_bytes()[8 : 8 + int.from_bytes(file.read_bytes()[:8], "little")]) for file in files]
        self.templates = [found for golden in GOLDENS if (found := find_chat_template(golden))]
        self.pickles = [
            zipfile.ZipFile(archive(folder / "x.bin", {"a": tensor(), "b": tensor(strides=(1, 2))})).read("archive/data.pkl"),
            *(zipfile.ZipFile(file).read(name) for file in [hostile.PLAIN.parent / "tensors.bin"]
              for name in zipfile.ZipFile(file).namelist() if name.endswith("data.pkl")),
        ]  # fmt: skip

    def header(self, rng: random.Random) -> None:
        raw = rng.choice(self.headers)
        if rng.random() < 0.7:
            content = json.loads(raw)
            chosen = rng.sample(sorted(content), min(len(content), 4))
            raw = json.dumps(mutate({name: content[name] for name in chosen}, rng)).encode()
        else:
            raw = mutate_bytes(raw, rng)
        if rng.random() < 0.8:
            parse_header(raw, Path("x"), 8 + len(raw))
            return
        file = self.folder / "x.safetensors"
        file.write_bytes(mutate_bytes(len(raw).to_bytes(8, "little") + raw + b"\0" * 64, rng))
        tensors, _ = read_header(file)
        checkpoint = Checkpoint(self.folder, {}, headers=[(tensors, {})])
        for name in list(tensors)[:2]:
            _ = checkpoint.read(name).shape

    def index(self, rng: random.Random) -> None:
        content = {"metadata": {"total_size": 1}, "weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(mutate(content, rng)))
        try:
            _ = Checkpoint(self.folder, {}).tensors
        finally:
            (self.folder / "model.safetensors.index.json").unlink()

    def config(self, rng: random.Random) -> None:
        known = rng.choice(self.checkpoints)
        config = mutate(known.config, rng)
        if not isinstance(config, dict):
            return
        checkpoint = Checkpoint(known.folder, config, headers=known._headers)
        if known.config.get("model_type") in ("clip", "vilt"):
            if known.config["model_type"] == "clip":
                load_whole(checkpoint, "clip", clip.WEIGHTS, lambda: clip.CLIP(clip.read_config(config)))
            else:
                load_whole(checkpoint, "vilt", vilt.WEIGHTS, lambda: vilt.ViLT(vilt.read_config(config)))
        else:
            plan(checkpoint)

    def settings(self, rng: random.Random) -> None:
        """Everything but weights and the tokenizer's own file, up to a prompt with a picture."""
        known = rng.choice(self.plain)
        family, config = read_config(known)
        for file in known.folder.glob("*.json"):
            target = self.folder / file.name
            target.write_bytes(file.read_bytes())
            if file.name not in ("tokenizer.json", "config.json", "vocab.json") and rng.random() < 0.5:
                target.write_text(json.dumps(mutate(json.loads(file.read_text()), rng)))
        for file in [*known.folder.glob("*.jinja"), *known.folder.glob("*.model"), *known.folder.glob("*.t*t*")]:
            (self.folder / file.name).write_bytes(file.read_bytes())
        try:
            processor = load_processor(Checkpoint(self.folder, known.config), family, config)
            processor(["Hi", PHOTO] if not config.text_alone else "Hi")
        finally:
            for file in self.folder.iterdir():
                if file.is_file():
                    file.unlink()

    def tokenizer(self, rng: random.Random) -> None:
        golden = rng.choice(GOLDENS)
        names = [file for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt",
                 "qwen.tiktoken", "tokenizer_config.json") for file in golden.glob(name)]  # fmt: skip
        chosen = rng.choice(names)
        try:
            for file in names:
                data = file.read_bytes()
                if file == chosen:
                    whole = file.suffix == ".json" and rng.random() < 0.7
                    data = json.dumps(mutate(json.loads(data), rng)).encode() if whole else mutate_bytes(data, rng)
                (self.folder / file.name).write_bytes(data)
            found = load_tokenizer(self.folder)
            found.decode(found.encode("Hi <image> there, é 1234 \n\n  " + "a" * 50))
        finally:
            for file in names:
                (self.folder / file.name).unlink(missing_ok=True)

    def template(self, rng: random.Random) -> None:
        source = rng.choice(self.templates)
        for _ in range(rng.choice((1, 2, 4, 10))):
            piece = rng.choice(NASTY)
            piece = piece % tuple(rng.choice(WORDS) for _ in range(piece.replace("%%", "").count("%s")))
            place = rng.choice([0, len(source), source.find("{%", rng.randrange(len(source) + 1))])
            source = source[:place] + piece + source[place:]
        if rng.random() < 0.2:
            source = mutate_bytes(source.encode(), rng).decode(errors="replace")
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}
        ChatTemplate(source, {"bos_token": "<s>"}, "<image>").render([message, {"role": "assistant", "content": "No"}])

    def pickle(self, rng: random.Random) -> None:
        raw = rng.choice(self.pickles)
        if rng.random() < 0.7:
            places = [place for _, _, place in pickletools.genops(raw)]
            parts = [raw[a:b] for a, b in zip(places, [*places[1:], len(raw)], strict=True)]
            for _ in range(rng.choice((1, 2, 4))):
                place, what = rng.randrange(len(parts)), rng.randrange(5)
                if what == 0:
                    del parts[place]
                elif what == 1:
                    parts.insert(place, rng.choice(parts))
                elif what == 2:
                    parts.insert(
                        place,
                        rng.choice(pickletools.opcodes).code.encode("latin-1") + rng.randbytes(rng.choice((0, 1, 4))),
                    )
                elif what == 3:
                    parts[place] = mutate_bytes(parts[place], rng)
                else:
                    parts.insert(
                        place, rng.choice((b"cos\nsystem\n", b"cbuiltins\neval\n", b"R", b"b", b"\x81", b"\x93", b"Q"))
                    )
            raw = b"".join(parts)
        else:
            raw = mutate_bytes(raw, rng)
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as made:
            made.writestr("archive/data.pkl", raw)
            for key in range(12):
                made.writestr(f"archive/data/{key}", b"\0" * 64)
        data = stream.getvalue()
        read_pickled(Path("x.bin"), io.BytesIO(mutate_bytes(data, rng) if rng.random() < 0.2 else data))


KINDS = ("header", "index", "config", "settings", "tokenizer", "template", "pickle")


def fuzz(seconds: float, seed: int, only: str | None) -> int:
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    slowest: dict[str, tuple[float, int]] = dict.fromkeys(KINDS, (0.0, 0))
    spent, failures = Counter[str](), 0
    with tempfile.TemporaryDirectory() as place:
        fuzzer, end = Fuzzer(Path(place)), time.monotonic() + seconds
        first = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        number = seed
        while number == seed or time.monotonic() < end:
            kind = only or min(KINDS, key=lambda each: spent[each])  # each has an equal share of the time
            run: Callable[[random.Random], None] = getattr(fuzzer, kind)
            begun = time.process_time()
            try:
                run(random.Random(f"{kind} {number}"))
                outcome = "read"
            except VLMError as error:
                outcome = "refused" if len(str(error).splitlines()) == 1 else "FAILED"
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                outcome, failures = "FAILED", failures + 1
                where = traceback.extract_tb(error.__traceback__)[-1]
                print(f"{kind} {number}: {error!r:.200} in {where.filename}:{where.lineno}", flush=True)
            took = time.process_time() - begun
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            if memory > first + 2**20:
                print(f"{kind} {number}: {(memory - first) / 2**20:.1f} GB", flush=True)
                first, failures = memory, failures + 1
            if took > 2:
                print(f"{kind} {number}: {took:.1f} s", flush=True)
                failures += 1
            counts[kind][outcome] += 1
            spent[kind] += took
            slowest[kind] = max(slowest[kind], (took, number))
            number += 1
    print(
        "| kind | executions | read | refused in one line | failures | slowest |\n| --- | ---: | ---: | ---: | ---: | ---: |"
    )
    for kind, found in counts.items():
        print(
            f"| {kind} | {found.total():,} | {found['read']:,} | {found['refused']:,} | {found['FAILED']} | {slowest[kind][0]:.2f} s |"
        )
    print(f"{sum(found.total() for found in counts.values()):,} executions, {failures} failures")
    return int(failures > 0)


def table() -> int:
    """The table, with what each file gives; 1 where one is not refused, or takes over 2 s."""
    worst = 0.0
    print("| file | what is said |\n| --- | --- |")
    for name in hostile.CASES:
        with tempfile.TemporaryDirectory() as place:
            folder, begun = hostile.make(name, Path(place)), time.process_time()
            try:
                hostile.read(folder)
            except VLMError as error:
                said = str(error).replace(f"{folder}/", "").replace(str(folder), "FOLDER").replace("|", "\\|")
            else:
                print(f"{name} was read")
                return 1
            worst = max(worst, time.process_time() - begun)
            print(f"| {name} | {said} |")
    print(f"\n{len(hostile.CASES)} files, the slowest {worst:.2f} s")
    return int(worst > 2)


if __name__ == "__main__":
    if sys.argv[1:2] == ["table"]:
        sys.exit(table())
    if sys.argv[1:2] != ["fuzz"]:
        sys.exit(__doc__)
    given = dict(enumerate(sys.argv[2:]))
    sys.exit(fuzz(float(given.get(0, 60)), int(given.get(1, 0)), given.get(2)))
