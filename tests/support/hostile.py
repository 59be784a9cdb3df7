"""Checkpoints from an enemy, each a good one with one thing changed; what reads them must refuse them in a line."""

import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import PHOTO, PLAIN
from pickles import Call, Name, archive, tensor

from mlx_vlm_mini import load
from mlx_vlm_mini.grounding.mask_decoder import load_mask_decoder

Change = Callable[[Path], object]
RAN = "ran"
"""What code in a file would make, beside the checkpoint."""


def header(content: Any, data: bytes = b"", length: int | None = None) -> Change:
    """A file of tensors with this header."""
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    start = struct.pack("<Q", len(raw) if length is None else length)
    return lambda folder: (folder / "model.safetensors").write_bytes(start + raw + data)


def one(**changes: Any) -> dict[str, Any]:
    return {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


def index(weight_map: Any) -> Change:
    return lambda folder: (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def written(name: str, content: bytes | str) -> Change:
    raw = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(raw)


def edited(name: str, part: str | None = None, **changes: Any) -> Change:
    """Keys of a JSON file, or of an object in it."""

    def change(folder: Path) -> None:
        file = folder / name
        content = json.loads(file.read_text()) if file.exists() else {}
        (content if part is None else content[part]).update(changes)
        file.write_text(json.dumps(content))

    return change


def linked(name: str, target: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return change


def pipe(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


def sparse(name: str, size: int) -> Change:
    """A file that takes no room on the disk, and would take gigabytes of memory."""

    def change(folder: Path) -> None:
        with (folder / name).open("wb") as file:
            file.truncate(size)

    return change


def pickled(content: object = None, raw: bytes | None = None, files: dict[str, bytes] | None = None) -> Change:
    """PyTorch's file in place of the tensors: an object, or the bytes of a pickle."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        file = folder / "pytorch_model.bin"
        if raw is None and files is None:
            archive(file, content)
            return
        with zipfile.ZipFile(file, "w") as made:
            for name, data in {"archive/data.pkl": raw or b"", "archive/data/0": b"\0" * 16, **(files or {})}.items():
                made.writestr(name, data)

    return change


def template(source: str) -> Change:
    return lambda folder: (folder / "chat_template.jinja").write_text(source)


def tokenizer(change: Callable[[dict[str, Any]], object]) -> Change:
    def made(folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        change(content)
        (folder / "tokenizer.json").write_text(json.dumps(content))

    return made


def arrays_with_objects(folder: Path) -> None:
    np.savez(folder / "vae-oid.npz", **{"_vq_vae._embedding": np.array([Runs()], dtype=object)})  # type: ignore[arg-type]


class Runs:
    """What `pickle` would run."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {RAN}",)


def _call(module: str, name: str) -> Change:
    return pickled({"a": Call(Name(module, name), f"touch {RAN}")})


_POPEN = "cycler.__init__.__globals__.os.popen('touch ran').read()"
_DEEP = "[" * 100_000
_REGEX = {"type": "Split", "pattern": {"Regex": "(\\w+\\s*)+$"}, "behavior": "Isolated", "invert": False}
_TWICE = b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
CASES: dict[str, Change] = {
    "safetensors: nothing in it": written("model.safetensors", b""),
    "safetensors: a text": written("model.safetensors", "<!doctype html>"),
    "safetensors: a header of 2^63 bytes": header({}, length=1 << 63),
    "safetensors: a header longer than the file": header({}, length=1 << 20),
    "safetensors: a header that is no UTF-8": header(b"\xff\xfe{}"),
    "safetensors: a header of 100,000 lists in one another": header(_DEEP.encode()),
    "safetensors: a header that lists four million numbers": header(b'{"x":[' + b"0," * 4_000_000 + b"0]}"),
    "safetensors: a negative shape": header(one(shape=[-2]), b"\0" * 8),
    "safetensors: a shape of 2^62 x 4": header(one(shape=[1 << 62, 4]), b"\0" * 8),
    "safetensors: a side of 2^64": header(one(shape=[1 << 64, 0], data_offsets=[0, 0])),
    "safetensors: a shape of 100,000 sides": header(one(shape=[9] * 100_000), b"\0" * 8),
    "safetensors: offsets that go backwards": header(one(data_offsets=[8, 0]), b"\0" * 8),
    "safetensors: an offset that is NaN": header(one(data_offsets=[0, float("nan")]), b"\0" * 8),
    "safetensors: a tensor beyond the end": header(one(data_offsets=[8, 16]), b"\0" * 8),
    "safetensors: two tensors in one place": header({**one(), "y": one()["x"]}, b"\0" * 8),
    "safetensors: bytes in front of the first tensor": header(one(data_offsets=[8, 16]), b"\0" * 16),
    "safetensors: bytes behind the last tensor": header(one(), b"\0" * 16),
    "safetensors: one name twice": header(_TWICE, b"\0"),
    "safetensors: a name that moves the cursor": header({"a\n\x1b[2Jb": one()["x"]}, b"\0" * 8),
    "safetensors: an unknown type": header(one(dtype="F8_E5M2"), b"\0" * 8),
    "index: a file above the folder": index({"x": "../model.safetensors"}),
    "index: a file from the root": index({"x": "/etc/passwd"}),
    "index: a name with a zero byte": index({"x": "model.safetensors\0"}),
    "index: no map": index([]),
    "index: a pipe among the files": lambda folder: (index({"x": "pipe"})(folder), pipe("pipe")(folder)),
    "links: tensors elsewhere": linked("model.safetensors", "/dev/zero"),
    "links: a tokenizer elsewhere": linked("tokenizer.json", "/etc/passwd"),
    "links: a folder elsewhere": linked("tower", "/etc"),
    "config: a pipe": pipe("config.json"),
    "config: 1 GB": sparse("config.json", 1 << 30),
    "config: no UTF-8": written("config.json", b"\xff\xfe"),
    "config: 100,000 lists in one another": written("config.json", _DEEP),
    "config: a number of 5,000 digits": written("config.json", '{"model_type": ' + "9" * 5000 + "}"),
    "config: ten billion layers": edited("config.json", "text_config", num_hidden_layers=10**10),
    "config: -1 layers": edited("config.json", "text_config", num_hidden_layers=-1),
    "config: no heads": edited("config.json", "text_config", num_attention_heads=0, num_key_value_heads=0),
    "config: 10^18 words": edited("config.json", "text_config", vocab_size=10**18),
    "config: 10^8 words of 10^8 numbers": edited("config.json", "text_config", vocab_size=10**8, hidden_size=10**8),
    "config: patches of no pixels": edited("config.json", "vision_config", patch_size=0),
    "config: images of 10^9 pixels a side": edited("config.json", "vision_config", image_size=10**9),
    "config: an eps that is NaN": edited("config.json", "text_config", rms_norm_eps=float("nan")),
    "config: code to be run": edited("config.json", model_type="evil", auto_map={"AutoModel": "modeling_evil.Evil"}),
    "generation_config: an end that is no token": edited("generation_config.json", eos_token_id=[{}]),
    "preprocessor_config: images of 10^9 pixels a side": edited(
        "preprocessor_config.json", do_resize=True, size={"height": 10**9, "width": 10**9}
    ),
    "tokenizer: 100,000 lists in one another": written("tokenizer.json", '{"model": ' + _DEEP),
    "tokenizer: 1 GB": sparse("tokenizer.json", 1 << 30),
    "tokenizer: an expression that takes for ever": tokenizer(lambda content: content.update(pre_tokenizer=_REGEX)),
    "tokenizer: 50,001 more tokens": written(
        "tokenizer_config.json", '{"added_tokens_decoder": {' + ",".join(f'"{i}":0' for i in range(50_001)) + "}}"
    ),
    "template: a program through __globals__": template("{{ " + _POPEN + " }}"),
    "template: classes through format": template("{{ '{0.__class__.__mro__}'.format(messages) }}"),
    "template: another file": template("{% include '/etc/passwd' %}"),
    "template: 10^10 letters": template("{{ 'a' * 10**10 }}"),
    "template: 10^10 loops": template("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"),
    "template: a text doubled 60 times": template(
        "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
    ),
    "template: a list of itself 60 times": template(
        "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}"
    ),
    "template: a width of 10^9": template("{{ '%1000000000d' % 1 }}"),
    "template: a macro that calls itself": template("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
    "bin: os.system": pickled(raw=pickle.dumps({"a": Runs()})),
    "bin: builtins.eval": _call("builtins", "eval"),
    "bin: builtins.getattr": _call("builtins", "getattr"),
    "bin: INST": pickled(raw=b"(X\x09\0\0\0touch ranios\nsystem\n."),
    "bin: OBJ": pickled(raw=b"(cos\nsystem\nS'touch ran'\no."),
    "bin: NEWOBJ": pickled(raw=b"\x80\x02ccollections\nOrderedDict\n)\x81."),
    "bin: EXT1": pickled(raw=b"\x80\x02\x82\x01."),
    "bin: a tensor whose insides are set": pickled(
        raw=b"\x80\x02}X\x01\0\0\0a"
        b"ctorch._utils\n_rebuild_tensor_v2\n(((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu"
        b"K\x04tQK\x00(K\x02t(K\x01t\x89}tR}X\x04\0\0\0fileX\x0b\0\0\0/etc/passwdsbs."
    ),
    "bin: a memory of 2^32 places": pickled(raw=b"\x80\x02}r\xff\xff\xff\xff" + b"Nr\xff\xff\xff\x7f" + b"u."),
    "bin: a name of nested tuples": pickled(raw=b"\x80\x02}" + b")" + b"q\0h\0\x86" * 60 + b"Ns."),
    "bin: a text that says it has 2^60 bytes": pickled(raw=b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b"x."),
    "bin: a tensor larger than its storage": pickled({"a": tensor(shape=(1 << 31, 1 << 31), strides=(0, 0))}),
    "bin: two pickles": pickled(raw=b"}.", files={"b/data.pkl": b"}."}),
    "npz: objects": arrays_with_objects,
}  # fmt: skip


def read(folder: Path) -> object:
    """Read a checkpoint as a program would that answers one question about a picture."""
    if (folder / "vae-oid.npz").exists():
        return load_mask_decoder(folder / "vae-oid.npz")
    model, processor = load(folder)
    return model(processor("Hi", [PHOTO]))


def make(name: str, place: Path) -> Path:
    """The checkpoint of a case, in a folder of its own."""
    folder = place / "checkpoint"
    shutil.copytree(PLAIN, folder, ignore=shutil.ignore_patterns("expected.npz"))
    CASES[name](folder)
    return folder
