"""How an answer is asked for: lengths, sampling, stops."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from mlx_vlm_mini.borrow import borrow_uncompiled
from mlx_vlm_mini.errors import PromptError
from mlx_vlm_mini.text.forms import Form, make_form

from .constraints import Constraint
from .decode import PREFILL_STEP, Chooser, LogitsProcessor, Sampler, Seeded

_MANY = 2**62
_LIMITS: dict[str, tuple[float, float]] = {
    "max_tokens": (1, _MANY), "temperature": (1e-4, 1e4), "top_p": (0.0, 1.0), "min_p": (0.0, 1.0), "top_k": (0, _MANY),
    "repetition_penalty": (0.01, 100.0), "seed": (0, 2**64 - 1), "prefill_step": (1, _MANY), "image_tokens": (1, _MANY),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to answer.

    Attributes:
        max_tokens: tokens of an answer at most.
        temperature: 0 always takes the likeliest token.
        top_p, min_p, top_k, repetition_penalty: mlx-lm's samplers and penalty; at their defaults off.
        seed: makes a sampled answer repeatable: its n-th token depends on the seed and n, whatever else draws numbers.
        stop: texts that end the answer; they are not part of it.
        schema, choices, regex, grammar: one of these keeps the answer in a form, see `text/forms.py: make_form`.
        image_tokens: of an image at most, in families that take any size: 70, 140, 280, 560 or 1120 of Gemma 4, any
            number of Qwen2-VL and later ones; None: as the checkpoint says. What an image's own part of a message says
            comes first: `{"type": "image", "image": ..., "tokens": 1120}`.
        sampler, logits_processors: own ones, in mlx-lm's form, in place of those above.
        think: whether the model is to think before it answers; None: as its chat template does by default.
        prefill_step: prompt tokens a chunk.
        progress: called with prompt tokens read and prompt tokens in all.
        probabilities: find how probable each of the choices is, see `Chunk.choices`.
        form: what the answer's form is; None where it has none.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 0.0
    min_p: float = 0.0
    top_k: int = 0
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | Sequence[str] = ()
    think: bool | None = None
    image_tokens: int | None = None
    sampler: Sampler | None = None
    logits_processors: Sequence[LogitsProcessor] | None = None
    prefill_step: int = PREFILL_STEP
    progress: Callable[[int, int], None] | None = None
    schema: Any = None
    choices: Sequence[str] | None = None
    regex: str | None = None
    grammar: str | None = None
    probabilities: bool = False
    form: Form | None = field(init=False, repr=False, compare=False, default=None)

    def __post_init__(self) -> None:
        """Raises PromptError where an option has another type, is out of range, or no form that can be followed."""
        for name, (low, high) in _LIMITS.items():
            value, whole = getattr(self, name), type(high) is int
            if value is None and name in ("seed", "repetition_penalty", "image_tokens"):
                continue
            if not isinstance(value, int if whole else int | float) or isinstance(value, bool):
                raise PromptError(f"{name} must be a {'whole number' if whole else 'number'}, not {value!r}")
            if not (low <= value <= high or (name == "temperature" and value == 0)):
                limit = f"{low} or more" if high == _MANY else f"between {low} and {high}"
                limit = f"0 or more ({low} to {high} where it is not 0)" if name == "temperature" else limit
                raise PromptError(f"{name} must be {limit}, not {value}")
        if not isinstance(self.stop, str) and not (
            isinstance(self.stop, Sequence) and all(isinstance(stop, str) for stop in self.stop)
        ):
            raise PromptError(f"stop must be a text or a list of texts, not {self.stop!r}")
        for name, given in (("sampler", self.sampler), ("progress", self.progress)):
            if given is not None and not callable(given):
                raise PromptError(f"{name} must be a function, not {given!r}")
        processors = () if self.logits_processors is None else self.logits_processors
        if not isinstance(processors, Sequence) or not all(map(callable, processors)):
            raise PromptError(f"logits_processors must be a list of functions, not {self.logits_processors!r}")
        if not isinstance(self.think, bool | None):
            raise PromptError(f"think must be True, False or None, not {self.think!r}")
        form = make_form(schema=self.schema, choices=self.choices, regex=self.regex, grammar=self.grammar)
        object.__setattr__(self, "form", form)
        if self.probabilities and self.choices is None:
            raise PromptError("probabilities are those of choices, and here are no choices")

    @property
    def stops(self) -> tuple[str, ...]:
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        return tuple(stop for stop in stops if stop)

    def make_sampler(self, vocab_size: int) -> Sampler:
        sampler = self.sampler or self._choose_sampler(vocab_size)
        return sampler if self.seed is None else Seeded(sampler, self.seed)

    def _choose_sampler(self, vocab_size: int) -> Sampler:
        top_k = self.top_k if self.top_k < vocab_size else 0  # mlx-lm refuses what would leave nothing out
        sampler: Sampler = borrow_uncompiled("sample_utils").make_sampler(
            temp=self.temperature, top_p=self.top_p, min_p=self.min_p, top_k=top_k
        )
        return sampler

    def make_logits_processors(self) -> Sequence[LogitsProcessor]:
        if self.logits_processors is not None:
            return self.logits_processors
        processors: Sequence[LogitsProcessor] = borrow_uncompiled("sample_utils").make_logits_processors(
            repetition_penalty=self.repetition_penalty
        )
        return processors

    def make_chooser(self, vocab_size: int, prompt: mx.array, constraint: Constraint | None = None) -> Chooser:
        """What chooses the tokens of one answer; `prompt` int[L] is for the logits processors."""
        greedy = self.sampler is None and self.temperature == 0
        sampler, processors = self.make_sampler(vocab_size), self.make_logits_processors()
        foreign = self.sampler is not None
        return Chooser(prompt, sampler, processors, greedy=greedy, foreign=foreign, constraint=constraint)
