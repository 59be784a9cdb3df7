"""Several answers decoded together: rows of a batch that come and go between steps.

Decoding is bound by reading the weights, so that eight rows cost little more than one. A prompt is read alone, in
chunks that take turns with steps of the rows; then its sequence becomes a row. Each row gives what its prompt gives
alone.
What cannot be a row (see `can_be_row`) is decoded beside the batch, in the same turns.
"""

import time
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import cast

import mlx.core as mx

from mlx_vlm_mini.config import DecoderConfig
from mlx_vlm_mini.decoder.state import State
from mlx_vlm_mini.errors import VLMError
from mlx_vlm_mini.inputs import Inputs
from mlx_vlm_mini.model import VLM
from mlx_vlm_mini.processor import Processor

from .answering import Answering, Chunk
from .cache import Prefixes
from .decode import checked, read_in_chunks, wired_memory
from .features import Features
from .options import Options


def can_be_row(model: VLM) -> bool:
    """Whether a model's sequences can be rows of a batch.

    Those cannot whose layers attend to images (Llama 3.2 Vision), or whose rotary positions depend on how long the
    sequence is (dynamic NTK, LongRoPE, Qwen's prompt NTK).
    """
    by_length = any(rope.depends_on != "nothing" for rope in model.decoder.ropes.values())
    return model.decoder.config.cross_attention is None and not by_length


def bytes_per_token(config: DecoderConfig, dtype: mx.Dtype) -> int:
    """Of the keys and values of all layers that read text."""
    shapes = [config.shape(kind) for kind in config.layer_types if kind != "cross_attention"]
    return sum(2 * shape.num_kv_heads * shape.head_dim for shape in shapes) * dtype.size


@dataclass(eq=False)
class Job:
    """A prompt to be answered.

    Attributes:
        inputs: as the processor gives them.
        options: how to answer.
        begin: `time.perf_counter()` at which the caller began.
        cancelled: set by whoever wants no more of it.
    """

    inputs: Inputs
    options: Options
    begin: float = field(default_factory=time.perf_counter)
    cancelled: bool = False


Said = tuple[Job, Chunk | VLMError]
"""What a step gives of a job: a chunk, or the error that ended it."""


@dataclass(eq=False)
class _Row:
    """An answer that is being given.

    Attributes:
        fault: why its next token cannot be chosen.
    """

    job: Job
    answer: Answering
    fault: VLMError | None = None

    @property
    def done(self) -> bool:
        """Whether the token that is being computed is its last."""
        return self.answer.stats.generated_tokens + 1 >= self.job.options.max_tokens


@dataclass(eq=False)
class _Group:
    """Rows that are decoded in one step.

    Attributes:
        state: their sequences; a batch where `batched`.
        token, logprob: of each row the token that comes next, int[B] and float[B]; being computed.
    """

    state: State
    rows: list[_Row]
    token: mx.array
    logprob: mx.array
    batched: bool

    def join(self, other: "_Group") -> None:
        """Take in another batch's rows."""
        self.state.extend(other.state)
        self.rows += other.rows
        self.token = mx.concatenate([self.token, other.token])
        self.logprob = mx.concatenate([self.logprob, other.logprob])

    def keep(self, places: list[int]) -> None:
        """Keep these rows only."""
        if len(places) == len(self.rows):
            return
        self.rows = [self.rows[place] for place in places]
        if self.rows and self.batched:
            self.state.keep(places)
            chosen = mx.array(places)
            self.token, self.logprob = self.token[chosen], self.logprob[chosen]

    def step(self, model: VLM) -> list[Said]:
        """One token of each row; rows that ended are given up."""
        decoder, token, logprob = model.decoder, self.token, self.logprob
        logits, last = None, [False] * len(self.rows)
        if not all(row.done for row in self.rows):
            for place, row in enumerate(self.rows):
                row.answer.choose.add(token[place : place + 1])
            logits = decoder.logits(decoder(decoder.read(token[:, None]), self.state))[:, 0]
            mx.async_eval(logits)
        if any(row.answer.choose.constraint is not None for row in self.rows):  # what may follow is found meanwhile
            last = _follow(self.rows, cast(list[int], token.tolist()))
        if logits is not None:
            self.token, self.logprob = _choose(self.rows, logits)
            mx.async_eval(self.token, self.logprob)
        said: list[Said] = []
        kept = []
        ids, logprobs = cast(list[int], token.tolist()), cast(list[float], logprob.tolist())
        for place, row in enumerate(self.rows):
            if row.job.cancelled:
                continue
            try:
                chunk = row.answer.chunk(checked(ids[place], logprobs[place], decoder, last=last[place]))
            except VLMError as error:
                said.append((row.job, error))
                continue
            if chunk.finish_reason is None and row.fault is not None:
                said += [(row.job, chunk), (row.job, row.fault)]
                continue
            said.append((row.job, chunk))
            if chunk.finish_reason is None:
                kept.append(place)
        self.keep(kept)
        return said


def _follow(rows: Sequence[_Row], tokens: Sequence[int]) -> list[bool]:
    """Of each row whether its token completes the form that its answer has."""
    last = [False] * len(rows)
    for place, row in enumerate(rows):
        try:
            last[place] = row.answer.choose.follow(tokens[place])
        except Exception as error:  # of this row's form
            row.fault = fault_of(error)
    return last


def _choose(rows: Sequence[_Row], logits: mx.array) -> tuple[mx.array, mx.array]:
    """Tokens int[B] and log-probabilities float[B] of logits float[B, vocab_size]: in one where all are greedy."""
    if all(row.answer.choose.greedy for row in rows):
        token, logprob = rows[0].answer.choose(logits, _allowed(rows, logits.shape[-1]))
        return token, logprob[:, 0]
    tokens, logprobs = [], []
    for place, row in enumerate(rows):
        try:
            token, logprob = row.answer.choose(logits[place : place + 1])
        except Exception as error:  # of a sampler or a logits processor of this row's own
            row.fault = fault_of(error)
            token, logprob = mx.zeros(1, dtype=mx.uint32), mx.zeros((1, 1), dtype=logits.dtype)
        tokens.append(token)
        logprobs.append(logprob[:, 0])
    return mx.concatenate(tokens), mx.concatenate(logprobs)


def _allowed(rows: Sequence[_Row], count: int) -> mx.array | None:
    """bool[B, count]: of each row the tokens that may come next; None where no answer has a form."""
    forms = [row.answer.choose.constraint for row in rows]
    if all(form is None for form in forms):
        return None
    return mx.stack([mx.ones(count, dtype=mx.bool_) if form is None else form.allowed() for form in forms])


def fault_of(error: Exception) -> VLMError:
    """What is said of an error that ends one answer and no other."""
    return error if isinstance(error, VLMError) else VLMError(f"the answer failed: {error!r}")


class Batch:
    """Answers several prompts together.

    Attributes:
        size: rows at most.
        memory: bytes that keys and values of all rows may take; a row is admitted only where it fits, and always where
            there is no other.
    """

    def __init__(
        self,
        model: VLM,
        processor: Processor,
        *,
        size: int,
        memory: int,
        features: Features,
        prefixes: Prefixes | None = None,
    ) -> None:
        """
        Args:
            features: where what images become is kept and found.
            prefixes: where states of prompts are kept and found.
        """
        self.model, self.processor, self.size, self.memory = model, processor, size, memory
        self._features, self._prefixes = features, prefixes
        self._groups: list[_Group] = []
        self._waiting: deque[Job] = deque()
        self._reading: tuple[Job, Generator[int, None, _Group]] | None = None
        self._batched = can_be_row(model)
        self._wired, self._run = False, ExitStack()
        self._bytes = bytes_per_token(model.config.decoder, model.dtype)

    def add(self, job: Job) -> None:
        """Have a prompt answered."""
        self._waiting.append(job)

    @property
    def rows(self) -> int:
        """Answers that are being given."""
        return sum(len(group.rows) for group in self._groups)

    @property
    def waiting(self) -> int:
        """Prompts that are not read yet."""
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self._waiting or self._groups or self._reading)

    def step(self) -> list[Said]:
        """One chunk of one prompt, and one token of each row."""
        said: list[Said] = []
        if not self._wired:
            self._wired = True
            self._run.enter_context(wired_memory())
        self._drop_cancelled()
        if self._reading is None and self._waiting and self._fits(self._waiting[0]):
            job = self._waiting.popleft()
            self._reading = job, self._read(job)
        if self._reading is not None:
            said += self._read_on(*self._reading)
        for group in self._groups:
            said += group.step(self.model)
        self._groups = [group for group in self._groups if group.rows]
        if not self.busy:
            self._end()
        return said

    def clear(self) -> None:
        """Give up all prompts and rows."""
        self._waiting.clear()
        self._groups, self._reading = [], None
        self._end()

    def _end(self) -> None:
        """Nothing is left to do: memory need not stay resident."""
        self._wired = False
        self._run.close()

    def _drop_cancelled(self) -> None:
        self._waiting = deque(job for job in self._waiting if not job.cancelled)
        if self._reading is not None and self._reading[0].cancelled:
            self._reading[1].close()
            self._reading = None
        for group in self._groups:
            group.keep([place for place, row in enumerate(group.rows) if not row.job.cancelled])
        self._groups = [group for group in self._groups if group.rows]

    def _fits(self, job: Job) -> bool:
        if not self.rows:
            return True
        longest = len(job.inputs.slots) + job.options.max_tokens
        for group in self._groups:
            left = [row.job.options.max_tokens - row.answer.stats.generated_tokens for row in group.rows]
            longest = max(longest, group.state.start + max(left))
        return self.rows < self.size and (self.rows + 1) * longest * self._bytes <= self.memory

    def _read_on(self, job: Job, reading: Generator[int, None, _Group]) -> list[Said]:
        """One chunk of a prompt; after its last one it becomes a row."""
        try:
            next(reading)
        except StopIteration as end:
            self._reading = None
            self._admit(end.value)
        except Exception as error:  # of this prompt: the rows are whole
            self._reading = None
            return [(job, fault_of(error))]
        return []

    def _read(self, job: Job) -> Generator[int, None, _Group]:
        """Read a prompt: yields after each chunk."""
        options, model = job.options, self.model
        state, cached = model.make_state(), 0
        if self._prefixes is not None:
            state, cached = self._prefixes.find(model, job.inputs)
        answer = Answering(
            model, self.processor, job.inputs, options, begin=job.begin, features=self._features, cached=cached
        )
        reading = model.read(job.inputs, cached, answer.find)
        mx.eval(reading.embeddings, reading.beside)
        answer.read_images()
        logits = yield from read_in_chunks(model.decoder, reading, state, options.prefill_step)
        answer.read_prompt(logits, state)
        token, logprob = answer.choose(logits)
        mx.eval(token, logprob)
        if self._prefixes is not None:
            self._prefixes.add(job.inputs, state)
        return _Group(state, [_Row(job, answer)], token, logprob[:, 0], batched=False)

    def _admit(self, group: _Group) -> None:
        if not self._batched:
            self._groups.append(group)
            return
        group.state, group.batched = State.merge([group.state]), True
        if self._groups:
            self._groups[0].join(group)
        else:
            self._groups.append(group)
