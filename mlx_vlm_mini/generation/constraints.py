"""An answer kept in a form: which tokens may come next, from llguidance, which follows the form token by token.

A form is about the answer's text. So the vocabulary that it is followed with is what each token adds to that text
(`text/token_bytes.py`); special tokens, which add none, are never allowed. One space in front of an answer is no part
of it: chat templates leave it to some models to write one.
"""

import threading
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

import mlx.core as mx
import numpy as np

from mlx_vlm_mini.errors import PromptError
from mlx_vlm_mini.text.forms import Form, Space, limits
from mlx_vlm_mini.text.thinking import ThinkingFilter
from mlx_vlm_mini.text.token_bytes import TokenBytes, read_token_bytes
from mlx_vlm_mini.text.tokenizer import TextStream, Tokenizer

_NO_TOKEN = "the tokenizer has no token for what must come next"
_MOST_SPACES = 4  # tokens of white space between an answer's thinking and its form


class Vocabulary:
    """The tokens of a tokenizer as llguidance takes them.

    Attributes:
        count: of tokens that have a logit.
        table: what each adds to a text.
        library: llguidance's tokenizer.
        texts: bool[count], the tokens that an answer may have: those with a text, and the ends.
        ends: ids that end an answer.
        spaces: ids of tokens of white space alone.
    """

    # What llguidance asks of an object that is a tokenizer to it:
    is_tokenizer_wrapper = True
    bos_token_id = None
    special_token_ids: tuple[int, ...] = ()

    def __init__(self, tokenizer: Tokenizer, count: int, ends: Collection[int], barred: Collection[int]) -> None:
        """
        Args:
            ends: ids that end an answer.
            barred: ids that an answer may not have, though they have a text: those of images.

        Raises:
            CheckpointError: it cannot be told what text the tokens give.
        """
        import llguidance

        self.count, self.table = count, read_token_bytes(tokenizer, count)
        usable = sorted(end for end in ends if end < count)
        hidden = {*usable, *barred}
        self.tokens = [b"" if number in hidden else token for number, token in enumerate(self.table.tokens)]
        self.eos_token_id = usable[0] if usable else None
        self.library = llguidance.LLTokenizer(self, eos_token=usable or None)
        self.texts = np.array([bool(token) for token in self.tokens])
        self.texts[usable] = True
        self.ends = usable
        self.spaces = [number for number, token in enumerate(self.tokens) if token and not token.strip()]

    def parts_of(self, text: str) -> list[int]:
        """The tokens that a text may begin with, and those that begin with it."""
        data = text.encode()
        return [
            n for n, token in enumerate(self.tokens) if token and (data.startswith(token) or token.startswith(data))
        ]

    def __call__(self, text: str) -> list[int]:
        """Ids of a text that goes on another."""
        return self.table.encode(text.decode() if isinstance(text, bytes) else text)


_kept: WeakKeyDictionary[Tokenizer, dict[Any, Vocabulary]] = WeakKeyDictionary()
_lock = threading.Lock()


def vocabulary_of(tokenizer: Tokenizer, count: int, ends: Collection[int], barred: Collection[int]) -> Vocabulary:
    """The vocabulary of a tokenizer, made once (0.8 s for 150,000 tokens); arguments and errors as of `Vocabulary`."""
    key = count, frozenset(ends), frozenset(barred)
    with _lock:
        own = _kept.setdefault(tokenizer, {})
        if key not in own:
            own[key] = Vocabulary(tokenizer, count, *key[1:])
        return own[key]


class Constraint:
    """An answer's form, followed token by token.

    The tokens that may come next depend on the token before alone, so they are found while the device computes the
    logits.

    Attributes:
        done: whether the answer is whole and nothing can follow it.
    """

    def __init__(self, form: Form, vocabulary: Callable[[], Vocabulary]) -> None:
        """`vocabulary` is made in a thread of its own, while the prompt is read."""
        self.form, self._make = form, vocabulary
        threading.Thread(target=self._prepare, name="mlx-vlm-mini-form", daemon=True).start()
        self._matcher: Any = None
        self._allowed = np.zeros(0, dtype=bool)
        self._single: int | None = None
        self.done = False

    def _prepare(self) -> None:
        with suppress(Exception):  # said where it is asked for again
            self._make()

    def begin(self) -> None:
        """Find the tokens that an answer may begin with.

        Raises:
            PromptError: the form cannot be followed with this vocabulary.
        """
        if self._matcher is not None:
            return
        import llguidance

        vocabulary = self._vocabulary = self._make()
        table: TokenBytes = vocabulary.table
        space: Space = ("always" if table.strips else "never") if self.form.spaced else "maybe"
        grammar = self.form.grammar(space, forcing=table.is_canonical)
        self._matcher = llguidance.LLMatcher(vocabulary.library, grammar, log_level=0, limits=limits())
        self._first = np.isin(np.arange(vocabulary.count), [*table.misfits], invert=True) if table.misfits else None
        self._find()
        self._first = None

    def ways(self, text: str) -> list[tuple[int, ...]]:
        """The token sequences that give an answer of this text as the tokenizer writes it: with and without a space in
        front, where both give it.

        Raises:
            PromptError: there is none.
        """
        self.begin()
        table = self._vocabulary.table
        spaced, bare = f" {text}", text
        wanted = [bare, spaced] if not self.form.spaced else [spaced if table.strips else bare]
        found = [(each, tuple(table.encode(each))) for each in wanted]
        whole = [ids for each, ids in found if b"".join(table.tokens[number] for number in ids) == each.encode()]
        if not whole:
            raise PromptError(f"the tokenizer has no tokens for the choice {text[:80]!r}")
        return whole

    @property
    def drops_space(self) -> bool:
        """Whether a space that the answer's text begins with is no part of it."""
        return not self.form.spaced

    def add(self, token: int) -> None:
        """Take a token that was chosen, and find those that may follow it.

        Raises:
            PromptError: nothing can follow, or llguidance's limits are reached.
        """
        self._matcher.consume_token(token)
        self._check()
        self.done = self._matcher.is_stopped()
        if not self.done:
            self._find()

    def _find(self) -> None:
        self._check()
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        allowed = np.unpackbits(bits, count=self._vocabulary.count, bitorder="little").view(bool)
        allowed &= self._vocabulary.texts
        if self._first is not None:
            allowed &= self._first
        number = int(np.count_nonzero(allowed))
        if not number:
            raise PromptError(f"the {self.form.kind} cannot be followed: {_NO_TOKEN}")
        self._single = int(allowed.argmax()) if number == 1 else None
        self._allowed = allowed

    def _check(self) -> None:
        if self._matcher.is_error():
            line = (self._matcher.get_error().splitlines() or [""])[0]
            why = _NO_TOKEN if "NoExtension" in line else line or "it is too complex"
            raise PromptError(f"the {self.form.kind} cannot be followed: {why}")

    @property
    def only(self) -> int | None:
        """The one token that may come next; None where there are several, or none. Errors as of `begin`."""
        self.begin()
        return None if self.done else self._single

    def allowed(self) -> mx.array:
        """bool[count], the tokens that may come next; all where the answer is whole. Errors as of `begin`."""
        self.begin()
        return mx.ones(self._vocabulary.count, dtype=mx.bool_) if self.done else mx.array(self._allowed)


class ConstraintAfterThinking(Constraint):
    """A form that begins where the answer's thinking has ended, and some white space behind that.

    While the model thinks every token may come that has a text, but none that ends the answer. Where the model itself
    opens its thinking, the answer may also begin with the form.
    """

    def __init__(
        self,
        form: Form,
        vocabulary: Callable[[], Vocabulary],
        thinking: ThinkingFilter,
        text: TextStream,
        markers: Mapping[int, str],
    ) -> None:
        """
        Args:
            thinking, text: as of the answer's first token.
            markers: texts of special tokens that are part of a marker around thinking, id to text.
        """
        super().__init__(form, vocabulary)
        self._thinking, self._text, self._markers = thinking, text, markers
        self._waits, self._spaces = True, 0
        self._opened = ""  # what may be the beginning of the marker that opens thinking

    @property
    def only(self) -> int | None:
        return None if self._waits else super().only

    def allowed(self) -> mx.array:
        found = super().allowed()
        if not self._waits:
            return found
        vocabulary, place = self._vocabulary, self._thinking.place
        free = np.zeros(vocabulary.count, dtype=bool)
        if place == "thinking":
            free |= vocabulary.texts
            free[vocabulary.ends] = False
            free[[token for token in self._markers if token < vocabulary.count]] = True
            return mx.array(free)
        if place == "beginning":
            free[self._openers()] = True
            if self._opened:
                return mx.array(free)
        elif self._spaces < _MOST_SPACES:
            free[vocabulary.spaces] = True
        return mx.maximum(found, mx.array(free))

    def _openers(self) -> list[int]:
        """The tokens that go on the marker that opens thinking, or begin it."""
        assert self._thinking.markers is not None
        marker = self._thinking.markers.open.removeprefix(self._opened)
        own = self._vocabulary.parts_of(marker)
        return own + [token for token, text in self._markers.items() if text and marker.startswith(text)]

    def add(self, token: int) -> None:
        if not self._waits:
            super().add(token)
            return
        before, text = self._thinking.place, self._text.add(token)
        _, said = self._thinking.add(text)
        place = self._thinking.place
        if before == "thinking":  # a token may end it and begin the answer
            self._waits = not said
            for each in self._vocabulary(said) if said else []:
                super().add(each)
        elif before == "between" and not self._vocabulary.tokens[token].strip():
            self._spaces += 1
        elif before == "beginning" and text and place != "text":
            self._opened = (self._opened + text).lstrip()  # as `ThinkingFilter` reads it
        else:
            self._waits = False
            super().add(token)
