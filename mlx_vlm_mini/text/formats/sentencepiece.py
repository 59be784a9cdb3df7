"""SentencePiece's tokenizer.model, read without SentencePiece and built with the `tokenizers` library.

Sources: sentencepiece_model.proto, bpe_model.cc and normalizer.cc of google/sentencepiece; convert_slow_tokenizer.py of
huggingface/transformers.
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from heapq import heappop, heappush
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.files import read_bytes
from mlx_vlm_mini.text.patterns import LONGEST_TOKEN, MOST_TOKENS

SPACE = "▁"  # U+2581, what stands for a space in pieces

Prefix = Literal["each", "first", "none"]
"""Which texts get a space in front: `each` between special tokens, only what the whole text begins with, or none."""

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # the kinds of pieces that are asked for here
_TEXT = (_NORMAL, _USER_DEFINED, _UNUSED)
_KINDS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}


class Piece(NamedTuple):
    """An entry of the vocabulary; its place is its id."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True, kw_only=True)
class SentencePiece:
    """What a tokenizer.model says.

    Attributes:
        model_type: "bpe" or "unigram".
        byte_fallback: whether an unknown character becomes its bytes.
        charsmap: SentencePiece's compiled table of character replacements (NFKC, say); empty for none.
        add_dummy_prefix: whether a text gets a space in front.
        remove_extra_whitespaces: whether spaces at the ends go, and several become one.
    """

    pieces: tuple[Piece, ...]
    model_type: str
    byte_fallback: bool
    unk_id: int
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool


def read_sentencepiece(file: Path) -> SentencePiece:
    """Read a tokenizer.model.

    Raises:
        CheckpointError: it is missing, broken, or of a kind that is not read here.
    """
    try:
        data = read_bytes(file)
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing; download it again") from None
    try:
        model = _parse(data)
    except (ValueError, IndexError, struct.error, TypeError):
        raise CheckpointError(f"{file} is no SentencePiece model, or is truncated; download it again") from None
    if model.model_type not in ("bpe", "unigram"):
        raise CheckpointError(f"{file} is SentencePiece's kind '{model.model_type}'; bpe and unigram are read here")
    if not 0 <= model.unk_id < len(model.pieces):
        raise CheckpointError(
            f"{file} has {len(model.pieces)} pieces, none of them number {model.unk_id} (unknown text)"
        )
    return model


def _parse(data: bytes) -> SentencePiece:
    pieces: list[Piece] = []
    trainer: dict[int, Any] | None = None
    normalizer: dict[int, Any] | None = None
    for number, value in _fields(data):
        if number == 1:
            entry = dict(_fields(_message(value)))
            (score,) = struct.unpack("<f", entry.get(2, b"\0\0\0\0"))
            pieces.append(Piece(_message(entry[1]).decode() if 1 in entry else "", score, int(entry.get(3, _NORMAL))))
        elif number == 2:
            trainer = dict(_fields(_message(value)))
        elif number == 3:
            normalizer = dict(_fields(_message(value)))
    if not pieces or trainer is None or normalizer is None:
        raise ValueError("a part is missing")
    if len(pieces) > MOST_TOKENS or any(len(piece.text) > LONGEST_TOKEN for piece in pieces):
        raise ValueError("a vocabulary of no model")
    if trainer.get(24) or not normalizer.get(5, 1):
        raise ValueError("spaces in a form that nobody uses")
    return SentencePiece(
        pieces=tuple(pieces),
        model_type=_KINDS[trainer.get(3, 1)] if trainer.get(3, 1) in _KINDS else str(trainer[3]),
        byte_fallback=bool(trainer.get(35, 0)),
        unk_id=int(trainer.get(40, 0)),
        charsmap=_message(normalizer.get(2, b"")),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
    )


def _message(value: Any) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number where bytes belong")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Fields of a protobuf message (protobuf.dev/programming-guides/encoding): number, and an int or bytes."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = data[place]
            place += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("a number without end")

    while place < len(data):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        if kind not in (1, 2, 5):
            raise ValueError("an unknown kind of field")
        length = {1: 8, 5: 4}[kind] if kind != 2 else varint()
        if place + length > len(data):
            raise ValueError("a field beyond the end")
        yield key >> 3, data[place : place + length]
        place += length


def _merges(vocab: Mapping[str, int], model: SentencePiece) -> list[tuple[str, str]]:
    """Every way to join two pieces to a third, best first: by the third's score, as SentencePiece chooses.

    Control pieces and bytes are no text, so nothing joins to them.
    """
    usable = {text: i for text, i in vocab.items() if model.pieces[i].kind in _TEXT}
    found = [
        (-model.pieces[i].score, i, cut, whole[:cut], whole[cut:])
        for whole, i in usable.items()
        for cut in range(1, len(whole))
        if whole[:cut] in usable and whole[cut:] in usable
    ]
    return [(left, right) for *_, left, right in sorted(found)]


def _has_ties(usable: Mapping[str, float]) -> bool:
    """Whether two pieces that are joined from others have one score, so that their place in the text decides."""
    joined = [
        score
        for text, score in usable.items()
        if any(text[:cut] in usable and text[cut:] in usable for cut in range(1, len(text)))
    ]
    return len(set(joined)) < len(joined)


class _Joiner:
    """SentencePiece's own joining, a pre-tokenizer for the `tokenizers` library, whose merges can have no equal ranks:
    of the neighbours that form a piece those of the highest score are joined first, of equal ones the leftmost."""

    def __init__(self, scores: Mapping[str, float]) -> None:
        self._scores = scores

    def pre_tokenize(self, text: Any) -> None:
        """The library's interface."""
        text.split(lambda _, part: [part[start:end] for start, end in self.join(part.normalized)])

    def join(self, text: str) -> list[tuple[int, int]]:
        """Where the pieces of a text begin and end; characters that are no pieces stay together."""
        ends = list(range(1, len(text) + 1))  # of the piece that begins at each character; 0 where none does any more
        starts = list(range(len(text)))  # of the piece that ends in front of each character's end
        waiting: list[tuple[float, int, int, int]] = []  # -score, start, middle, end

        def offer(start: int, middle: int) -> None:
            if start >= 0 and middle < len(text):
                end = ends[middle]
                score = self._scores.get(text[start:end])
                if score is not None:
                    heappush(waiting, (-score, start, middle, end))

        for middle in range(1, len(text)):
            offer(middle - 1, middle)
        while waiting:
            _, start, middle, end = heappop(waiting)
            if ends[start] != middle or ends[middle] != end:  # one of the two was joined to another
                continue
            ends[start], ends[middle], starts[end - 1] = end, 0, start
            if start:
                offer(starts[start - 1], start)
            offer(start, end)
        pieces: list[tuple[int, int]] = []
        unknown = False
        for start, end in enumerate(ends):
            if not end:
                continue
            before, unknown = unknown, text[start:end] not in self._scores
            if before and unknown:
                pieces[-1] = pieces[-1][0], end
            else:
                pieces.append((start, end))
        return pieces


def build_backend(model: SentencePiece, *, prefix: Prefix, names: Mapping[int, str] | None = None) -> Tokenizer:
    """A tokenizer that gives SentencePiece's ids.

    Control pieces and pieces that the model's makers defined become added tokens, as transformers makes them: text is
    split at them first. Nothing is put before or behind a text; a post-processor is the caller's. A unigram model may
    choose another of several equally likely segmentations than SentencePiece does.

    Args:
        prefix: where a space is put in front. `each` is what SentencePiece does when the texts between special tokens
            are given to it one by one (transformers: `legacy` true), `first` what transformers does with it false.
        names: pieces by id that go by another text (tokenizer_config.json's `added_tokens_decoder`).
    """
    texts = [(names or {}).get(i, piece.text) for i, piece in enumerate(model.pieces)]
    unk = texts[model.unk_id]
    joiner = None
    if model.model_type == "bpe":
        vocab: dict[str, int] = {}
        for i, text in enumerate(texts):
            vocab.setdefault(text, i)
        pieces = {text: model.pieces[i] for text, i in vocab.items()}
        usable = {text: piece.score for text, piece in pieces.items() if piece.kind in _TEXT}
        joiner = _Joiner(usable) if _has_ties(usable) else None
        merges = _merges(vocab, model) if joiner is None else []
        backend = Tokenizer(
            models.BPE(
                vocab,
                merges,
                unk_token=unk,
                fuse_unk=True,
                byte_fallback=model.byte_fallback,
                ignore_merges=joiner is not None,
            )
        )
    else:
        scored = [(text, piece.score) for text, piece in zip(texts, model.pieces, strict=True)]
        backend = Tokenizer(models.Unigram(scored, model.unk_id, model.byte_fallback))
    steps: list[Any] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.remove_extra_whitespaces:
        for spaces, rest in ((r"\A +", ""), (r" {2,}", " "), (rf"[ {SPACE}]+\z", "")):
            steps.append(normalizers.Replace(Regex(spaces), rest))
    if prefix == "first":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="first", split=False)
    else:
        steps += [normalizers.Prepend(SPACE)] if prefix == "each" else []
        steps.append(normalizers.Replace(" ", SPACE))
    backend.normalizer = normalizers.Sequence(steps)
    if joiner is not None:
        own = pre_tokenizers.PreTokenizer.custom(joiner)
        cuts = [own] if backend.pre_tokenizer is None else [backend.pre_tokenizer, own]
        backend.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    parts: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(parts if prefix == "none" else [*parts, decoders.Strip(" ", 1, 0)])
    special = [
        AddedToken(text, normalized=False, special=piece.kind == _CONTROL)
        for text, piece in zip(texts, model.pieces, strict=True)
        if piece.kind in (_CONTROL, _USER_DEFINED)
    ]
    backend.add_tokens(special)
    return backend
