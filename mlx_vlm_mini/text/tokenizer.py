"""Text to token ids and back, by the `tokenizers` library from the folder's tokenizer.json or tokenizer.model.

transformers' AutoTokenizer would import torch wherever it is installed; the file alone decides here.
"""

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing

from mlx_vlm_mini.errors import CheckpointError, PromptError
from mlx_vlm_mini.files import read_json

from .formats.bytelevel import MERGES, VOCABULARY, read_byte_level
from .formats.ranks import RANKS, read_tiktoken
from .formats.sentencepiece import Prefix, build_backend, read_sentencepiece
from .formats.wordpieces import WORDS, read_word_pieces
from .literal import MARK, unmark
from .patterns import (
    LONGEST_TOKEN,
    check_growth,
    check_patterns,
    check_size,
    check_strings,
    library_errors,
    longest_replacement,
)

_CLASS_DEFAULTS = {  # of classes whose tokenizer_config.json may leave them out
    "GemmaTokenizer": {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"},
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "QWenTokenizer": {"eos_token": "<|endoftext|>"},
    "Qwen2Tokenizer": {"eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
}
MOST_ADDED = 50_000  # tokens beside the vocabulary: they are looked for one by one
_KEPT_WORDS = 100
_SENTENCEPIECE_CLASSES = ("", "LlamaTokenizer", "InternLM2Tokenizer")
"""Classes whose tokenizer.model is known to be read as theirs is."""


class Tokenizer:
    """A tokenizer.json with the special tokens that tokenizer_config.json names.

    Attributes:
        special_tokens: `bos_token`, `eos_token`, ... to their text.
    """

    def __init__(self, backend: Backend, special_tokens: dict[str, str]) -> None:
        self.backend = backend
        self.special_tokens = special_tokens
        self._literal: _Literal | None = None
        # The library keeps what words became: 10,000 of them, and where nothing splits a text before (Llama) all of it
        # is a word, of 7 KB. So each message of a long conversation stayed.
        limit = getattr(backend.model, "_resize_cache", None)
        if limit is not None:
            limit(_KEPT_WORDS)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with the special tokens of the file's post-processor around them or without.

        Raises:
            PromptError: the text holds what no UTF-8 gives (a lone surrogate).
        """
        return self._encoding(text, add_special_tokens).ids

    def controls(self, kept: str | None = None, *, template: str = "", served: str | None = None) -> frozenset[str]:
        """The tokens that only a chat template may write: the special ones, and others of the form `<|...|>` that it
        names, since some files do not call theirs special.

        Args:
            kept: expression for those that are language, which people may write, too.
            template: the chat template.
            served: expression for tokens that are none of these, but that people may not write here.
        """
        named = set(self.special_tokens.values())
        found = set()
        for token in self.backend.get_added_tokens_decoder().values():
            text = token.content
            if not text.strip() or (kept is not None and re.fullmatch(kept, text)):
                continue
            marks_roles = re.fullmatch(r"<\|[^|]+\|>", text) is not None and text in template
            if token.special or text in named or marks_roles or (served is not None and re.fullmatch(served, text)):
                found.add(text)
        return frozenset(found)

    def _encoding(self, text: str, add_special_tokens: bool) -> "_Encoding":
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:
                raise PromptError("the prompt is not valid UTF-8 text") from None
        with library_errors(f"the tokenizer cannot read {unmark(text[:40])!r}"):
            if MARK in text:
                if self._literal is None:
                    self._literal = _Literal(self.backend)
                return self._literal.encode(text, add_special_tokens)
            found = self.backend.encode(text, add_special_tokens=add_special_tokens)
            return _Encoding(found.ids, found.offsets)

    def has_bos(self, text: str, image_token: str) -> bool:
        """Whether a prompt has a `bos_token` in front, of which images may stand."""
        bos = self.special_tokens.get("bos_token")
        return bool(bos) and re.match(f"(?:{re.escape(image_token)})*{re.escape(bos or '')}", text) is not None

    def encode_with_offsets(self, text: str, *, image_token: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of a whole prompt, and where each token's text begins and ends: one `bos_token`, whether the chat
        template wrote it or not.

        Args:
            image_token: may stand in front of the `bos_token` that the template wrote.
        """
        encoding = self._encoding(text, not self.has_bos(text, image_token))
        return encoding.ids, encoding.offsets

    def encode_piece(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The same of a text that goes on a prompt: no special tokens are put around it."""
        encoding = self._encoding(text, False)
        return encoding.ids, encoding.offsets

    def encode_behind_images(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The same of a text that begins a prompt behind images, with a `bos_token` in front of it: what follows that
        is a text of its own."""
        bos = self.special_tokens.get("bos_token", "")
        first = self.token_to_id(bos)
        if first is None or not text.startswith(bos):
            return self.encode_piece(text)
        ids, offsets = self.encode_piece(text[len(bos) :])
        return [first, *ids], [(0, len(bos)), *((len(bos) + start, len(bos) + end) for start, end in offsets)]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; ids beyond the vocabulary give nothing."""
        with library_errors("the tokenizer cannot write its tokens"):
            text: str = self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def special_in(self, text: str) -> dict[int, str]:
        """The special tokens that a text has inside, id to text: `decode` leaves them out."""
        return {
            token_id: token.content
            for token_id, token in self.backend.get_added_tokens_decoder().items()
            if token.special and token.content and token.content in text
        }

    def show(self, tokens: Collection[str]) -> None:
        """Make these tokens text as others are, which `decode` gives, where they are special ones."""
        added = self.backend.get_added_tokens_decoder().values()
        if any(each.special and each.content in tokens for each in added):
            content = json.loads(self.backend.to_str())
            for each in content["added_tokens"]:
                each["special"] = each["special"] and each["content"] not in tokens
            self.backend = Backend.from_str(json.dumps(content))

    def token_to_id(self, token: str) -> int | None:
        """Id of a token, None where there is no such token."""
        found: int | None = self.backend.token_to_id(token)
        return found

    def id_to_token(self, token_id: int) -> str | None:
        """Token of an id, None beyond the vocabulary."""
        if not 0 <= token_id < 1 << 32:  # all that the library takes
            return None
        found: str | None = self.backend.id_to_token(token_id)
        return found


class _Encoding(NamedTuple):
    ids: list[int]
    offsets: list[tuple[int, int]]


class _Literal:
    """A tokenizer for texts with marks: what is marked is text to it, every other token is what it always is.

    It shares its vocabulary and all its steps with `backend`, but knows its added tokens by another text, with the
    mark in front; the tokens that a text has without a mark inside are written so.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = Backend(backend.model)
        for step in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
            if getattr(backend, step) is not None:
                setattr(self._backend, step, getattr(backend, step))
        self._known: dict[str, str] = {}  # tokens that go by another text -> expression
        self._texts: dict[int, str] = {}  # of added tokens but spaces
        steps = backend.normalizer
        keeps_mark = steps is None or MARK in steps.normalize_str(MARK)
        added = []
        for token_id, token in sorted(backend.get_added_tokens_decoder().items()):
            text = token.content
            if any(map(str.isalnum, text)) or (token.special and text.strip()):
                self._texts[token_id] = text
                # Where a normalizer puts a space in front, Llama's, one that is normalized may be found nowhere else.
                if steps is None or not token.normalized or token_id in backend.encode(f"a{text}a").ids:
                    bounds = (r"(?<!\w)", r"(?!\w)") if token.single_word else ("", "")
                    self._known[text] = f"{bounds[0]}{re.escape(text)}{bounds[1]}(?!{MARK})"
                    options = {"lstrip": token.lstrip, "rstrip": token.rstrip, "special": True}
                    token = AddedToken(MARK + text, normalized=token.normalized and keeps_mark, **options)
            added.append((token_id, token))
        self._backend.add_tokens([token for _, token in added])
        self._ids = {self._backend.token_to_id(token.content): token_id for token_id, token in added}

    def encode(self, text: str, add_special_tokens: bool) -> _Encoding:
        """Ids of a text with marks; offsets are into it as it is."""
        present = sorted((token for token in self._known if token in text), key=len, reverse=True)
        pattern = "|".join([MARK, *(self._known[token] for token in present)])
        written: list[str] = []
        cuts: list[int] = []  # where marks were
        places: list[int] = []  # of each character written, in the text
        end = 0
        for match in re.finditer(pattern, text):
            written.append(text[end : match.start()])
            places += range(end, match.start())
            end = match.end()
            if match[0] == MARK:
                cuts.append(len(places))
            else:
                written.append(MARK + match[0])
                places += [match.start()] * len(MARK) + list(range(match.start(), end))
        whole = "".join([*written, text[end:]])
        places += range(end, len(text) + 1)
        found = self._backend.encode(whole, add_special_tokens=add_special_tokens)
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for token_id, (start, stop) in zip(found.ids, found.offsets, strict=True):
            place = (places[start], places[stop - 1] + 1) if stop > start else (places[start], places[start])
            own = self._ids.get(token_id, token_id)
            known = self._texts.get(own) in self._known
            if known and MARK in whole[start:stop]:
                more = [own]
            elif stop > start and own in self._texts and (known or bisect_right(cuts, start) < bisect_left(cuts, stop)):
                # The vocabulary itself joined the characters, or the token is found by its own text.
                letters = [each.id for letter in self._texts[own] for each in self._backend.model.tokenize(letter)]
                more = [each for each in letters if each not in self._texts]
            else:
                more = [own]
            ids += more
            offsets += [place] * len(more)
        return _Encoding(ids, offsets)


class TextStream:
    """Token ids to text as they come; bytes of an unfinished character wait for the rest.

    The last piece shown is decoded again with each new token, since decoders strip a leading space and join bytes.
    (The `tokenizers` library's own DecodeStream gives up on byte sequences that are no UTF-8.)
    """

    def __init__(self, tokenizer: Tokenizer, shown: Mapping[int, str] | None = None) -> None:
        """`shown`: texts of special tokens, id to text, that are to show all the same."""
        self._tokenizer, self._special = tokenizer, shown or {}
        self._ids: list[int] = []
        self._start = 0  # of the last piece shown
        self._shown = 0  # tokens whose text was shown

    def add(self, token_id: int) -> str:
        """The text that this token completes, often one word, sometimes nothing."""
        self._ids.append(token_id)
        text = self._tokenizer.decode(self._ids[self._start :])
        if token_id in self._special:
            return self._show(text) + self._special[token_id]
        return "" if text.endswith("\ufffd") else self._show(text)

    def finish(self) -> str:
        """What still waited when the answer ended."""
        return self._show(self._tokenizer.decode(self._ids[self._start :]))

    def _show(self, text: str) -> str:
        before = self._tokenizer.decode(self._ids[self._start : self._shown])
        if len(text) <= len(before):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return text[len(before) :]


def _text_of(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read tokenizer.json (or qwen.tiktoken, vocab.json and merges.txt, vocab.txt, or tokenizer.model),
    tokenizer_config.json, special_tokens_map.json and added_tokens.json.

    Raises:
        CheckpointError: there is no tokenizer, or one of the files is broken.
    """
    settings, more, added = (
        read_json(folder / name) if (folder / name).is_file() else {}
        for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    )
    special = dict(_CLASS_DEFAULTS.get(_class_of(settings), {}))
    for source in (more, settings):
        for key, value in source.items():
            text = _text_of(value)
            if key.endswith("_token") and isinstance(text, str):
                special[key] = text
    for listed, name in ((settings.get("added_tokens_decoder"), "tokenizer_config.json"), (added, "added_tokens.json")):
        if isinstance(listed, dict | list) and len(listed) > MOST_ADDED:
            raise CheckpointError(f"{folder}/{name} adds {len(listed):,} tokens, at most {MOST_ADDED:,} are read")
    file = folder / "tokenizer.json"
    try:
        with library_errors(
            f"{folder}: the tokenizer's files do not make one", but=(TypeError, ValueError, AttributeError)
        ):
            if file.is_file():
                backend = _from_json(file)
            elif (folder / RANKS).is_file():
                backend = read_tiktoken(folder / RANKS)
            else:
                byte_level = (folder / VOCABULARY).is_file() and (folder / MERGES).is_file()
                words = (folder / WORDS).is_file() and not (folder / "tokenizer.model").is_file()
                if byte_level:
                    backend = read_byte_level(folder, gpt2=_class_of(settings) == "GPT2Tokenizer")
                elif words:
                    backend = read_word_pieces(folder, settings)
                else:
                    backend = _from_sentencepiece(folder, settings, special)
                own = sorted((int(token_id), text) for text, token_id in added.items())
                tokens = [(token_id, AddedToken(text, special=True, normalized=False)) for token_id, text in own]
                _add(backend, tokens, "added_tokens.json", folder)
            _add_tokens(backend, settings, list(special.values()), folder)
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder}/tokenizer_config.json is malformed: {error!r}") from None
    return Tokenizer(backend, special)


def _class_of(settings: dict[str, Any]) -> str:
    return str(settings.get("tokenizer_class") or "").removesuffix("Fast")


def _from_json(file: Path) -> Backend:
    check_size(file)
    check_strings(file)
    with library_errors(f"{file} is broken"):
        backend = Backend.from_file(str(file))
    if len(backend.get_added_tokens_decoder()) > MOST_ADDED:
        raise CheckpointError(f"{file} adds more than {MOST_ADDED:,} tokens to its vocabulary")
    for part in (backend.normalizer, backend.pre_tokenizer, backend.decoder):
        check_patterns(part, file)
    for part in (backend.normalizer, backend.decoder, backend.post_processor):
        check_growth(part, file)
    backend.no_truncation()
    backend.no_padding()
    return backend


def _from_sentencepiece(folder: Path, settings: dict[str, Any], special: dict[str, str]) -> Backend:
    """Llama's tokenizer from a tokenizer.model, as transformers 4 with `use_fast=False` reads it.

    Without `legacy` in its settings it is true, as it was when folders without tokenizer.json were made.
    """
    file = folder / "tokenizer.model"
    if not file.is_file():
        raise CheckpointError(
            f"{folder} has no tokenizer.json and no tokenizer.model; save one with transformers: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    if _class_of(settings) not in _SENTENCEPIECE_CLASSES:
        raise CheckpointError(
            f"{file} belongs to a {settings['tokenizer_class']}, whose tokenizer.model is not read here; save a "
            "tokenizer.json with transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    model = read_sentencepiece(file)
    if longest_replacement(model.charsmap) > LONGEST_TOKEN:
        raise CheckpointError(f"{file} puts more than {LONGEST_TOKEN:,} bytes in place of a character")
    added = settings.get("added_tokens_decoder") or {}
    names = {int(token_id): _text_of(entry) for token_id, entry in added.items()}
    legacy = settings.get("legacy") is not False
    spaced = model.add_dummy_prefix if legacy else settings.get("add_prefix_space") is not False
    prefix: Prefix = "none" if not spaced else "each" if legacy else "first"
    backend = build_backend(model, prefix=prefix, names={i: name for i, name in names.items() if isinstance(name, str)})
    for key, text in _CLASS_DEFAULTS["LlamaTokenizer"].items():
        special.setdefault(key, text)
    if (
        backend.token_to_id(special["unk_token"]) is not None
    ):  # a token in texts, as in transformers' and in tokenizer.json
        backend.add_special_tokens([special["unk_token"]])
    before = [special["bos_token"]] if settings.get("add_bos_token") is not False else []
    behind = [special["eos_token"]] if settings.get("add_eos_token") else []
    backend.add_special_tokens([text for text in (*before, *behind) if backend.token_to_id(text) is None])
    around = [(text, backend.token_to_id(text)) for text in dict.fromkeys([*before, *behind])]
    if around:
        backend.post_processor = TemplateProcessing(single=[*before, "$A", *behind], special_tokens=around)
    return backend


def _add_tokens(backend: Backend, settings: dict[str, Any], special: list[str], folder: Path) -> None:
    """Add the tokens that only tokenizer_config.json lists, which take the next free ids, and its flags to all."""
    added = settings.get("added_tokens_decoder") or {}
    tokens = []
    for token_id, entry in sorted(added.items(), key=lambda item: int(item[0])):
        text = _text_of(entry)
        if not isinstance(text, str):
            continue
        options = {key: entry[key] for key in ("lstrip", "rstrip", "normalized", "single_word") if key in entry}
        tokens.append((int(token_id), AddedToken(text, special=bool(entry.get("special", False)), **options)))
    _add(backend, tokens, "tokenizer_config.json", folder)
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    named = [_text_of(entry) for entry in [*special, *(extra.values() if isinstance(extra, dict) else extra)]]
    backend.add_special_tokens([text for text in named if isinstance(text, str) and backend.token_to_id(text) is None])


def _add(backend: Backend, tokens: Sequence[tuple[int, AddedToken]], file: str, folder: Path) -> None:
    """Add tokens, in the order of their ids, which must be the next free ones; all at once: each time the library
    builds its table of them anew."""
    new = {token.content: token_id for token_id, token in tokens[::-1] if backend.token_to_id(token.content) is None}
    backend.add_tokens([token for _, token in tokens])
    for content, token_id in new.items():
        if backend.token_to_id(content) != token_id:
            raise CheckpointError(
                f"{folder}/{file} gives '{content}' the id {token_id}, "
                f"the next free one of the tokenizer is {backend.token_to_id(content)}"
            )
