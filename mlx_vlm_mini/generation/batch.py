"""Several answers decoded together: rows of a batch that come and go between steps.

Decoding is bound by reading the weights, so that eight rows cost little more than one. A prompt is read alone, in
chunks that take turns with steps of the rows; then its sequence becomes a row. Each row gives what its prompt gives
alone. Sequences whose caches have no batched form (quantized and rotating ones) are decoded one by one, in the same
turns.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_vlm_mini.decoder.state import Aside, State
from mlx_vlm_mini.errors import VLMError
from mlx_vlm_mini.inputs import Inputs
from mlx_vlm_mini.model import VLM
from mlx_vlm_mini.processor import Processor

from .answering import Answering, Chunk
from .cache import Prefixes
from .decode import KEPT_IMAGES, checked, read_in_chunks, wired_memory
from .features import Features
from .options import Options

GROWTH = 256  # tokens by which mlx-lm's caches grow at a time


@dataclass(frozen=True)
class Cost:
    """Bytes that sequences take.

    Attributes:
        token: keys and values of all layers that keep them.
        row: what does not grow with the tokens: states of linear attention.
        image_row: keys and values that layers of their own keep of an image's row of pixels.
        weights: what a step of decoding reads, whatever the rows.
        activations: while a prompt is read, of each token of a chunk.
        pixel: while an image is encoded, of each number of its pixels.
    """

    token: int
    row: int
    image_row: int
    weights: int
    activations: int
    pixel: float

    @classmethod
    def of(cls, model: VLM) -> "Cost":
        """A model's."""
        config, size = model.config.decoder, model.dtype.size
        kinds = Counter(config.layer_types)
        images, linear = kinds.pop("cross_attention", 0), kinds.pop("linear_attention", 0)
        shapes = [(config.shape(kind), count) for kind, count in kinds.items()]
        shapes = [(shape, count) for shape, count in shapes if shape.shared_with is None]
        vision = model.config.vision
        patch = 1 if vision is None else 3 * vision.patch_size**2
        row = image_row = 0
        if (delta := config.delta) is not None:
            state = delta.num_value_heads * delta.value_head_dim * delta.key_head_dim * mx.float32.size
            row = linear * (state + (delta.conv_kernel - 1) * delta.mixed_size * size)
        if images:
            features = vision.num_features
            image_row = images * 2 * config.num_key_value_heads * config.head_dim * features * size
        return cls(
            token=sum(2 * shape.num_kv_heads * shape.head_dim * count for shape, count in shapes) * size,
            row=row,
            image_row=image_row,
            weights=sum(array.nbytes for _, array in tree_flatten(model.decoder.parameters())),
            activations=_activations(config.hidden_size, config.intermediate_size, size),
            pixel=0.0 if vision is None else _activations(vision.hidden_size, vision.intermediate_size, size) / patch,
        )

    def rows(self, count: int, length: int, image_rows: int) -> int:
        """Of rows that are stored as long as the longest, at most."""
        return count * ((length + GROWTH) * self.token + self.row + image_rows * self.image_row)

    def admitting(self, job: "Job") -> int:
        """Of a prompt that is read and becomes a row: the row, and besides it first the activations, then the copy that
        joins the others."""
        length, options = len(job.inputs.slots), job.options
        row = self.rows(1, length + options.max_tokens, job.image_rows)
        pixels = max((image.pixel_values.size for image in job.inputs.images), default=0)
        chunk = min(length, options.prefill_step)
        return row + max(self.rows(1, length, job.image_rows), chunk * self.activations, int(pixels * self.pixel))


def _activations(hidden: int, intermediate: int, size: int) -> int:
    """Bytes that a layer needs for a token at a time, about: the stream, queries, keys, values, the feed-forward."""
    return (8 * hidden + 3 * intermediate) * size


@dataclass(eq=False)
class Turn:
    """What a conversation lends to a batch while it answers a turn.

    Attributes:
        state: of the conversation; once it is `over`, with the answer as far as that was computed, or None where the
            computation failed.
        cached: tokens of the prompt that it holds.
        features: where what images become is kept and found.
        context: tokens that the conversation may have, for the statistics.
        over: set when the state is given back.
    """

    state: State | None
    cached: int
    features: Features
    context: int
    over: threading.Event = field(default_factory=threading.Event)

    def end(self, state: State | None) -> None:
        """Give the state back."""
        if not self.over.is_set():
            self.state = state
            self.over.set()


@dataclass(eq=False)
class Job:
    """A prompt to be answered.

    Attributes:
        inputs: as the processor gives them.
        options: how to answer.
        begin: `time.perf_counter()` at which the caller began.
        cancelled: set by whoever wants no more of it.
        turn: the conversation whose turn it is; None where it is none's.
    """

    inputs: Inputs
    options: Options
    begin: float = field(default_factory=time.perf_counter)
    cancelled: bool = False
    turn: Turn | None = None

    def give_up(self) -> None:
        """It has not become a row, and will not."""
        if self.turn is None:
            return
        state = self.turn.state
        try:
            if state is not None:
                state.evaluate()
        except Exception:  # what failed cannot be computed now
            state = None
        self.turn.end(state)

    @property
    def image_rows(self) -> int:
        """Rows of pixels of all its images."""
        return sum(image.rows for image in self.inputs.images)


Said = tuple[Job, Chunk | VLMError]
"""What a step gives of a job: a chunk, or the error that ended it."""


@dataclass(eq=False)
class _Row:
    """An answer that is being given.

    Attributes:
        fault: why its next token cannot be chosen.
        aside: what its conversation's state goes back to; None where it is none's.
    """

    job: Job
    answer: Answering
    fault: VLMError | None = None
    aside: Aside | None = None

    @property
    def left(self) -> int:
        """Tokens that it may still have."""
        return self.job.options.max_tokens - self.answer.stats.generated_tokens

    @property
    def done(self) -> bool:
        """Whether the token that is being computed is its last."""
        return self.left <= 1


class _Shape(NamedTuple):
    """What of a row matters for memory: tokens now, tokens that may follow, and its images' rows of pixels."""

    length: int
    left: int
    image_rows: int


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

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        lengths = self.state.lengths
        return [*lengths] if isinstance(lengths, tuple) else [lengths] * len(self.rows)

    @property
    def shapes(self) -> list[_Shape]:
        """What of each row matters for memory."""
        return [_Shape(self.state.start, row.left, row.job.image_rows) for row in self.rows]

    def nbytes(self, cost: Cost, *others: _Shape) -> int:
        """Bytes that its rows may come to take, together with other rows."""
        shapes = [*self.shapes, *others]
        longest = max(shape.length for shape in shapes) + max(shape.left for shape in shapes)
        return cost.rows(len(shapes), longest, max(shape.image_rows for shape in shapes))

    def padding(self, *others: int) -> int:
        """Tokens by which its rows, and others of these lengths, are stored longer than they are."""
        lengths = [*self.lengths, *others]
        return len(lengths) * max(lengths) - sum(lengths)

    def join(self, other: "_Group") -> None:
        """Take in another batch's rows."""
        self.state.extend(other.state)
        self.rows += other.rows
        self.token = mx.concatenate([self.token, other.token])
        self.logprob = mx.concatenate([self.logprob, other.logprob])

    def keep(self, places: list[int]) -> None:
        """Keep these rows only; conversations get the states of the others back."""
        if len(places) == len(self.rows):
            return
        for place in {*range(len(self.rows))} - {*places}:
            row = self.rows[place]
            if row.job.turn is not None:
                state = self.state.extract(place, row.aside) if self.batched else self.state
                state.evaluate()
                row.job.turn.end(state)
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

    Rows of one group are stored as long as its longest. A row that would lengthen the others, or be lengthened, by more
    bytes than the weights have is decoded in a group of its own, for which a step reads the weights once more.

    Attributes:
        size: rows at most.
        memory: bytes that all rows may take; a row is admitted only where it fits, and always where there is no other.
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
        make_state: Callable[[], State] | None = None,
    ) -> None:
        """
        Args:
            features: where what images become is kept and found.
            prefixes: where states of prompts are kept and found.
            make_state: gives states that cannot be rows of a batch, in place of the model's own.
        """
        self.model, self.processor, self.size, self.memory = model, processor, size, memory
        self._features, self._prefixes = features, prefixes
        self._groups: list[_Group] = []
        self._waiting: deque[Job] = deque()
        self._reading: tuple[Job, Generator[int, None, _Group]] | None = None
        self._wired, self._run = False, ExitStack()
        self._make_state, self._batched = make_state or model.make_state, make_state is None
        self.cost = Cost.of(model)

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
        before = self.rows
        for group in self._groups:
            said += group.step(self.model)
        if self.rows < before:
            self._regroup()
        if not self.busy:
            self._end()
        return said

    def clear(self) -> None:
        """Give up all prompts and rows."""
        for job in (*self._waiting, *([] if self._reading is None else [self._reading[0]])):
            job.give_up()
        for turn in (row.job.turn for group in self._groups for row in group.rows):
            if turn is not None:
                turn.end(None)
        self._waiting.clear()
        self._groups, self._reading = [], None
        self._end()

    def _end(self) -> None:
        """Nothing is left to do: memory need not stay resident."""
        self._wired = False
        self._run.close()

    def _drop_cancelled(self) -> None:
        for job in self._waiting:
            if job.cancelled:
                job.give_up()
        self._waiting = deque(job for job in self._waiting if not job.cancelled)
        if self._reading is not None and self._reading[0].cancelled:
            self._reading[1].close()
            self._reading[0].give_up()
            self._reading = None
        for group in self._groups:
            group.keep([place for place, row in enumerate(group.rows) if not row.job.cancelled])
        self._regroup()

    def _fits(self, job: Job) -> bool:
        if not self.rows:
            return True
        taken = self.cost.admitting(job) + sum(group.nbytes(self.cost) for group in self._groups)
        # A layer's caches are copied when rows come and go, and when they grow: the old ones, and two copies.
        taken += 2 * taken // len(self.model.decoder.layers)
        return self.rows < self.size and taken <= self.memory

    def _regroup(self) -> None:
        """Drop groups without rows; where rows have left, two groups may have become one."""
        groups = [group for group in self._groups if group.rows]
        self._groups = groups if len(groups) < 2 else []
        for group in groups if not self._groups else []:
            self._place(group)

    def _place(self, group: _Group) -> None:
        """Let rows join those that are most alike in length, or be a group."""
        apart = sum(each.nbytes(self.cost) for each in self._groups)
        others = [other for other in self._groups if other.batched and group.batched]
        for other in sorted(others, key=lambda each: each.padding(*group.lengths)):
            if other.padding(*group.lengths) * self.cost.token > self.cost.weights:
                break
            if apart - other.nbytes(self.cost) + other.nbytes(self.cost, *group.shapes) <= self.memory:
                other.join(group)
                return
        self._groups.append(group)

    def _read_on(self, job: Job, reading: Generator[int, None, _Group]) -> list[Said]:
        """One chunk of a prompt; after its last one it becomes a row."""
        try:
            next(reading)
        except StopIteration as end:
            self._reading = None
            self._admit(end.value)
        except Exception as error:  # of this prompt: the rows are whole
            self._reading = None
            job.give_up()
            return [(job, fault_of(error))]
        return []

    def _read(self, job: Job) -> Generator[int, None, _Group]:
        """Read a prompt: yields after each chunk."""
        options, model, turn = job.options, self.model, job.turn
        own = None if turn is None else turn.state
        state, cached = (self._make_state(), 0) if own is None or turn is None else (own, turn.cached)
        keep = job.inputs.image_ends[-KEPT_IMAGES:]  # where other prompts may part from this one
        prefixes = self._prefixes if state.can_be_row else None
        if prefixes is not None:
            found = prefixes.find(model, job.inputs)
            keep.append(found.shared)
            if found.length > cached:
                state, cached = found.state, found.length
        answer = Answering(
            model, self.processor, job.inputs, options, begin=job.begin, cached=cached,
            features=self._features if turn is None else turn.features, context=None if turn is None else turn.context,
        )  # fmt: skip
        reading = model.read(job.inputs, cached, answer.find)
        mx.eval(reading.embeddings, reading.beside)
        answer.read_images()
        logits = yield from read_in_chunks(model.decoder, reading, state, options.prefill_step, keep, options.progress)
        answer.read_prompt(logits, state)
        token, logprob = answer.choose(logits)
        mx.eval(token, logprob)
        if prefixes is not None and (turn is None or not turn.cached):  # a conversation keeps its later turns
            prefixes.add(job.inputs, state)
        return _Group(state, [_Row(job, answer)], token, logprob[:, 0], batched=False)

    def _admit(self, group: _Group) -> None:
        (row,) = group.rows
        if self._batched and group.state.can_be_row:
            row.aside = None if row.job.turn is None else group.state.aside()
            group.state, group.batched = State.merge([group.state]), True
        self._place(group)
