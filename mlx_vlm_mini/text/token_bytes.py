"""What each token adds to a text, as bytes: the tokenizer's decoder read as a table, for answers in a given form.

A decoder of the `tokenizers` library is a chain of steps. Those of language models are byte-level (GPT-2's letters for
bytes), SentencePiece's (a mark for spaces, `<0x0A>` for bytes, a space dropped at the beginning), or both.

Source: the decoders of github.com/huggingface/tokenizers.
"""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer as Backend

from mlx_vlm_mini.errors import CheckpointError

from .formats.ranks import byte_letters
from .patterns import library_errors
from .tokenizer import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")

Piece = str | bytes
"""What is known of a token between two steps: its text, or the bytes that it stands for."""


@dataclass(frozen=True, eq=False)
class TokenBytes:
    """The table of a tokenizer.

    Attributes:
        tokens: bytes by token id; empty for an id that gives no text: one without a token, and special tokens.
        strips: whether decoding drops the space that a text begins with.
        misfits: ids that give other bytes where they begin a text, a dropped space aside.
    """

    tokens: tuple[bytes, ...]
    strips: bool
    misfits: frozenset[int]
    _tokenize: Callable[[str], list[int]] | None

    @property
    def is_canonical(self) -> bool:
        """Whether `encode` gives the ids that the tokenizer gives, where it can."""
        return self._tokenize is not None

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        return {token: number for number, token in reversed([*enumerate(self.tokens)]) if token}

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self.tokens), default=0)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text that goes on another one, which give exactly its bytes: the tokenizer's own, or else from
        its beginning the longest token each time. It ends where there is no token."""
        data = text.encode()
        ids = [] if self._tokenize is None else self._tokenize(text)
        if ids and b"".join(map(self._token, ids)) == data:
            return ids
        ids, place = [], 0
        while place < len(data):
            found = (data[place : place + length] for length in range(self._longest, 0, -1))
            token = next((token for token in found if token in self._ids), None)
            if token is None:
                break
            ids.append(self._ids[token])
            place += len(token)
        return ids

    def _token(self, number: int) -> bytes:
        return self.tokens[number] if number < len(self.tokens) else b""


def read_token_bytes(tokenizer: Tokenizer, count: int) -> TokenBytes:
    """The table of a tokenizer's first `count` tokens.

    Raises:
        CheckpointError: the decoder has a step that is not read here.
    """
    backend = tokenizer.backend
    with library_errors("the tokenizer's decoder cannot be read"):
        decoder = None if backend.decoder is None else json.loads(backend.decoder.__getstate__())
    steps = [*_flat(decoder, "decoders")]
    change, strips = _read_steps(steps)
    tokens = [b""] * count
    special = {number for number, token in backend.get_added_tokens_decoder().items() if token.special}
    misfits = set()
    marks = {step["replacement"] for step in steps if step["type"] == "Metaspace"}
    for text, number in backend.get_vocab(with_added_tokens=True).items():
        if number < count and number not in special:
            piece = change(text)
            tokens[number] = piece if isinstance(piece, bytes) else piece.encode(errors="replace")
            if any(mark in text[1:] for mark in marks):  # of a text's first token all of these go
                misfits.add(number)
    return TokenBytes(tuple(tokens), strips, frozenset(misfits), _continuing(backend))


def _flat(step: Any, inner: str) -> Iterable[dict[str, Any]]:
    """The steps of a chain, those of chains in it included."""
    if step is None:
        return
    if step["type"] == "Sequence":
        for each in step[inner]:
            yield from _flat(each, inner)
    else:
        yield step


def _read_steps(steps: list[dict[str, Any]]) -> tuple[Callable[[str], Piece], bool]:
    """What the steps make of a token's text, and whether they drop the space that a text begins with."""
    changes: list[Callable[[Piece], Piece]] = []
    fused, strips = False, False
    for step in steps:
        kind = step["type"]
        if kind == "ByteLevel":
            changes.append(_from_letters())
            fused = True
        elif kind == "ByteFallback":
            changes.append(_from_number)
        elif kind == "Fuse":
            fused = True
        elif kind == "Replace" and "String" in step["pattern"] and not (fused and len(step["pattern"]["String"]) > 1):
            changes.append(_replacing(step["pattern"]["String"], step["content"]))
        elif kind == "Metaspace":
            changes.append(_replacing(step["replacement"], " "))
            strips = step["prepend_scheme"] != "never"
            fused = True
        elif kind == "Strip" and fused and (step["content"], step["start"], step["stop"]) == (" ", 1, 0):
            strips = True
        elif kind == "Strip" and not step["start"] and not step["stop"]:
            continue
        else:
            raise CheckpointError(f"the tokenizer's decoder has a step '{kind}', which answers in a form do not know")
    if not fused:  # the library puts a space between tokens
        raise CheckpointError("the tokenizer does not say how its tokens become a text, which answers in a form need")

    def change(text: str) -> Piece:
        piece: Piece = text
        for each in changes:
            piece = each(piece)
        return piece

    return change, strips


def _from_letters() -> Callable[[Piece], Piece]:
    values = byte_letters()
    table, known = {ord(letter): chr(byte) for byte, letter in values.items()}, "".join(values.values())

    def change(piece: Piece) -> Piece:
        if isinstance(piece, bytes) or piece.strip(known):  # other letters: it is text as it stands
            return piece
        return piece.translate(table).encode("latin-1")

    return change


def _from_number(piece: Piece) -> Piece:
    found = None if isinstance(piece, bytes) else _BYTE.fullmatch(piece)
    return piece if found is None else bytes([int(found[1], 16)])


def _replacing(old: str, new: str) -> Callable[[Piece], Piece]:
    return lambda piece: piece if isinstance(piece, bytes) else piece.replace(old, new)


def _continuing(backend: Backend) -> Callable[[str], list[int]] | None:
    """Ids of a text that goes on another one: nothing is put in front of it, and it has no special tokens. None where
    a step is not one of the library's own."""
    try:
        steps = [
            None if part is None else json.loads(part.__getstate__())
            for part in (backend.normalizer, backend.pre_tokenizer)
        ]
    except Exception:  # a step in Python has no state: the library raises its plain kind
        return None
    normalizer = [step for step in _flat(steps[0], "normalizers") if step["type"] != "Prepend"]
    pre_tokenizer = [_without_space(step) for step in _flat(steps[1], "pretokenizers")]
    content: dict[str, Any] = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "post_processor": None,
        "normalizer": {"type": "Sequence", "normalizers": normalizer} if normalizer else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre_tokenizer} if pre_tokenizer else None,
        "decoder": None, "model": {"type": "BPE", "vocab": {}, "merges": []},
    }  # fmt: skip
    with library_errors("the tokenizer cannot be read"):
        frame, own = Backend.from_str(json.dumps(content)), Backend(backend.model)
        for name in ("normalizer", "pre_tokenizer"):
            if getattr(frame, name) is not None:
                setattr(own, name, getattr(frame, name))

    def tokenize(text: str) -> list[int]:
        try:
            return list(own.encode(text, add_special_tokens=False).ids)
        except BaseException:  # the library raises what is not even an Exception; `encode` finds tokens without it
            return []

    return tokenize


def _without_space(step: dict[str, Any]) -> dict[str, Any]:
    """A pre-tokenizer's step that puts no space in front of a text."""
    if step["type"] == "Metaspace":
        return {**step, "prepend_scheme": "never"}
    return {**step, "add_prefix_space": False} if step["type"] == "ByteLevel" else step
