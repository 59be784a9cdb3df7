"""Many requests at once: `Engine` for programs, `batch_generate` for scripts."""

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_vlm_mini.decoder.state import State
from mlx_vlm_mini.errors import ContextError, PromptError, VLMError, check_whole
from mlx_vlm_mini.images.source import ImageSource
from mlx_vlm_mini.inputs import Inputs
from mlx_vlm_mini.layers.memory import device_memory, free_memory, read_memory
from mlx_vlm_mini.model import VLM
from mlx_vlm_mini.processor import Processor
from mlx_vlm_mini.text.messages import Prompt, to_messages

from .answering import Choice, Chunk, FinishReason, Stats
from .batch import Batch, Job, Said, Turn
from .cache import Prefixes, make_state
from .decode import one_at_a_time
from .features import FEATURE_MEMORY, Features
from .options import Options

SHARE = 0.5  # of the memory that is free, for keys and values
PREFIX_SHARE = 0.25  # of these, for states of prompts that may come again


def sequence_memory(model: VLM, memory: int | float | str | None) -> int:
    """Bytes that sequences may take: what is left of `memory` beside the weights; by default a share of what is free,
    on a GPU of what the device recommends.

    Raises:
        PromptError: the weights alone take as much, or `memory` makes no sense.
    """
    if memory is None:
        is_gpu = mx.default_device().type == mx.DeviceType.gpu
        free = device_memory() - mx.get_active_memory() if is_gpu else free_memory()
        return int(SHARE * max(free, 0))
    granted, weights = read_memory(memory), sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    if granted <= weights:
        raise PromptError(f"the weights alone take {weights / 1e9:.2f} GB, and memory is {granted / 1e9:.2f} GB")
    return granted - weights


class Request:
    """An answer that an `Engine` gives: iterate over its chunks (`for` or `async for`), or ask for its `result`.

    Attributes:
        cancelled: whether nobody wants it any more.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._chunks: queue.SimpleQueue[Chunk | VLMError] = queue.SimpleQueue()
        self._wake = wake
        self._listen: Callable[[], None] = lambda: None
        self._job: Job | None = None
        self._ended = False
        self._guard = threading.Lock()
        self._whole = False
        self._callbacks: list[Callable[[Request], object]] = []
        self.cancelled = False

    def cancel(self) -> None:
        """Want no more of it: its row is free after the step that is being computed. Nothing happens where all of it
        was read."""
        self.cancelled = True
        if self._job is not None:
            self._job.cancelled = True
        self._give(PromptError("the request was cancelled"))
        self._wake()

    def add_done_callback(self, callback: "Callable[[Request], object]") -> None:
        """Have a function called with this request when all of its chunks are there to be read, or its error is; in
        whatever thread that happens, at once where it has happened. It must not wait."""
        with self._guard:
            if not self._whole:
                self._callbacks.append(callback)
                return
        callback(self)

    def _give(self, found: Chunk | VLMError) -> None:
        """Let the reader have a chunk, or the error that ends it."""
        self._chunks.put(found)
        self._listen()
        if isinstance(found, VLMError) or found.finish_reason is not None:
            with self._guard:
                self._whole, callbacks = True, self._callbacks
                self._callbacks = []
            for callback in callbacks:
                with suppress(Exception):  # of its own: others' answers are computed by this thread
                    callback(self)

    def __iter__(self) -> Iterator[Chunk]:
        """The chunks of `stream_generate`.

        Raises:
            VLMError: the prompt, an image or the checkpoint is at fault, or the engine was closed.
        """
        while not self._ended:
            found = self._chunks.get()
            if self.cancelled:
                return
            yield self._take(found)

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        """The same, in an event loop; no thread waits."""
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()

        def listen() -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(arrived.set)

        self._listen = listen
        while not self._ended:
            arrived.clear()
            try:
                found = self._chunks.get_nowait()
            except queue.Empty:
                await arrived.wait()
                continue
            if self.cancelled:
                return
            yield self._take(found)

    def _take(self, found: Chunk | VLMError) -> Chunk:
        if isinstance(found, VLMError):
            self._ended = True
            raise found
        self._ended = found.finish_reason is not None
        return found

    def result(self) -> "Answer":
        """The whole answer; its `error` says what went wrong."""
        answer = Answer()
        try:
            for chunk in self:
                answer.add(chunk)
        except VLMError as error:
            answer.error = str(error)
        return answer


@dataclass
class Answer:
    """A whole answer.

    Attributes:
        text: without what ended it, and without its thinking.
        token_ids: of all its tokens, the one that ended it included.
        logprobs: of these.
        finish_reason: "stop" or "length"; None where it failed.
        stats: what it cost; None where it did not begin.
        choices: how probable each choice is, where that was asked for.
        object: what it is the JSON of, where a schema was asked for and it is whole.
        error: what went wrong, in a line; None where nothing did.
        thinking: what the model thought before it answered.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stats: Stats | None = None
    choices: tuple[Choice, ...] = ()
    object: Any = None
    error: str | None = None
    thinking: str = ""

    def add(self, chunk: Chunk) -> None:
        """Append a chunk."""
        self.text += chunk.text
        self.thinking += chunk.thinking
        self.token_ids.append(chunk.token)
        self.logprobs.append(chunk.logprob)
        self.finish_reason, self.stats = chunk.finish_reason, chunk.stats
        self.choices, self.object = chunk.choices, chunk.object


class Engine:
    """Answers requests of many callers together (continuous batching), in a thread of its own.

        with Engine(model, processor, batch_size=8) as engine:
            request = engine.submit(messages, max_tokens=64)
            for chunk in request: ...

    Requests join the rows that are being decoded as soon as there is room, and leave when they end; a long prompt
    delays the others by one chunk at a time. Prompts that begin alike, by text and pictures, share what was read.
    """

    def __init__(
        self,
        model: VLM,
        processor: Processor,
        *,
        batch_size: int = 8,
        memory: int | float | str | None = None,
        feature_memory: int = FEATURE_MEMORY,
        prefix_memory: int | None = None,
        context: int | None = None,
        kv_bits: int | None = None,
        rotate: int | None = None,
        **options: Any,
    ) -> None:
        """
        Args:
            batch_size: answers that are decoded together at most.
            memory: what weights and sequences may take: bytes, a size ("12GB") or a share of the device's (0.5); by
                default the weights and half of what is free.
            feature_memory: bytes of pixels, and bytes of features, that are kept for pictures that come again.
            prefix_memory: bytes of states that are kept for prompts that begin alike; by default a quarter of
                what sequences may take.
            context: tokens that a prompt and its answer may have: a prompt without room for an answer is refused, and
                an answer ends there with the reason "length". None is no limit.
            kv_bits, rotate: as of `Chat`. Such caches have no rows: requests are answered by turns then, token by
                token, and do not share beginnings.
            options: defaults for every request, see `Options`.

        Raises:
            PromptError: an option makes no sense.
        """
        if type(batch_size) is not int or batch_size < 1:
            raise PromptError(f"batch_size must be a whole number of 1 or more, not {batch_size!r}")
        check_whole("context", context, 1)
        check_whole("prefix_memory", prefix_memory, 0)
        Options(**options)
        self.model, self.processor, self.options, self.context = model, processor, options, context
        self._features, self._pixels = Features(feature_memory), Features(feature_memory)  # of a thread each
        self._batch = _make_batch(
            model, processor, batch_size, self._features, sequence_memory(model, memory), prefix_memory, kv_bits, rotate
        )
        self._requests: dict[Job, Request] = {}
        self._arrived: queue.SimpleQueue[tuple[Request, Job] | None] = queue.SimpleQueue()
        self._closed, self._gate = False, threading.Lock()
        self._opening = ThreadPoolExecutor(1, thread_name_prefix="mlx-vlm-mini-images")
        self._thread = threading.Thread(target=self._run, name="mlx-vlm-mini-engine", daemon=True)
        self._thread.start()

    def submit(self, prompt: Prompt, *, images: ImageSource | Sequence[ImageSource] = (), **options: Any) -> Request:
        """Have a prompt answered; returns at once.

        Args:
            prompt: a text, a list of texts and images in order, or OpenAI-style messages.
            images: come before the text.
            options: for this request, see `Options`.

        Raises:
            PromptError: an option makes no sense, or the engine is closed. What is wrong with the prompt itself is
                raised where the request is read.
        """
        chosen, begin = Options(**{**self.options, **options}), time.perf_counter()
        request = Request(lambda: self._arrived.put(None))

        def arrive(prepared: "Future[Inputs]") -> None:
            try:
                inputs = prepared.result()
                request._job = job = Job(inputs, self._within_context(inputs, chosen), begin)
            except CancelledError:
                request._give(PromptError("the engine was closed"))
            except VLMError as error:
                request._give(error)
            except Exception as error:  # of this request alone: the others are answered
                request._give(VLMError(f"the prompt cannot be prepared: {error!r}"))
            else:
                job.cancelled = request.cancelled
                self._deliver(request, job)

        with self._gate:
            if self._closed:
                raise PromptError("the engine is closed")
            prepared = self._opening.submit(self._prepare, request, prompt, images, chosen)
        prepared.add_done_callback(arrive)
        return request

    def take_turn(self, inputs: Inputs, options: Options, turn: Turn, begin: float) -> Request:
        """Have a prompt of a conversation answered, of which `turn` lends the state; returns at once. See `Chat`.

        Args:
            inputs: as the processor gives them.
            begin: `time.perf_counter()` at which the caller began.
        """
        request = Request(lambda: self._arrived.put(None))
        request._job = job = Job(inputs, options, begin, turn=turn)
        self._deliver(request, job)
        return request

    def end_turn(self, request: Request, turn: Turn) -> State | None:
        """Cancel what is left of a turn, and wait until its state is given back; None where the computation failed, or
        where the engine's own thread asks."""
        if not turn.over.is_set():
            request.cancel()
            if threading.current_thread() is self._thread:  # that collects garbage
                return None
            turn.over.wait()
        return turn.state

    def _deliver(self, request: Request, job: Job) -> None:
        """Hand a job to the engine's thread."""
        with self._gate:
            if not self._closed:
                self._arrived.put((request, job))
                return
        job.give_up()
        request._give(PromptError("the engine was closed"))

    def _prepare(
        self, request: Request, prompt: Prompt, images: ImageSource | Sequence[ImageSource], chosen: Options
    ) -> Inputs:
        if request.cancelled:
            raise PromptError("the request was cancelled")
        messages = [
            message
            if isinstance(message["content"], str)
            else {
                **message,
                "content": [
                    self._pixels.prepare_part(self.processor, part, chosen.image_tokens) for part in message["content"]
                ],
            }
            for message in to_messages(prompt, images, self.processor.access)
        ]
        inputs = self.processor(messages, think=chosen.think)
        mx.eval(inputs.input_ids)
        return inputs

    def _within_context(self, inputs: Inputs, options: Options) -> Options:
        """Options whose answer ends where the context does."""
        length = len(inputs.slots)
        if self.context is None or length + options.max_tokens <= self.context:
            return options
        if length >= self.context:
            raise ContextError(
                f"the prompt has {length} tokens, and the model's context is {self.context} with the answer: shorten "
                "the conversation, or send fewer or smaller images"
            )
        return replace(options, max_tokens=self.context - length)

    def close(self) -> None:
        """End: requests that are not answered yet get an error."""
        with self._gate:
            self._closed = True
        self._opening.shutdown(wait=True, cancel_futures=True)
        self._arrived.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        """Steps of the batch, one after another; where there is nothing to do it waits for a request."""
        try:
            self._answer_requests()
        finally:
            with self._gate:
                self._closed = True
            self._take_in(wait=False)  # what arrived meanwhile
            self._fail(PromptError("the engine was closed"))

    def _answer_requests(self) -> None:
        while not self._closed:
            self._take_in(wait=not self._batch.busy)
            if self._closed or not self._batch.busy:
                continue
            try:
                said = one_at_a_time(self._batch.step)
            except Exception as error:  # a fault of the model ends what it was doing, not the engine
                self._fail(error if isinstance(error, VLMError) else VLMError(f"the engine failed: {error!r}"))
                continue
            for job, found in said:
                self._hand_over(job, found)

    def _take_in(self, *, wait: bool) -> None:
        """What was submitted and cancelled meanwhile."""
        while True:
            try:
                arrived = self._arrived.get(block=wait)
            except queue.Empty:
                return
            wait = False
            if arrived is not None:
                request, job = arrived
                if job.cancelled:
                    job.give_up()
                else:
                    self._requests[job] = request
                    self._batch.add(job)
            else:  # somebody cancelled: the batch gives up the rows, and the prompts need not be kept
                self._requests = {job: request for job, request in self._requests.items() if not job.cancelled}

    def _hand_over(self, job: Job, found: Chunk | VLMError) -> None:
        request = self._requests.get(job)
        if request is None:  # cancelled
            return
        request._give(found)
        if isinstance(found, VLMError) or found.finish_reason is not None:
            del self._requests[job]

    def _fail(self, error: VLMError) -> None:
        for request in self._requests.values():
            request._give(error)
        self._requests.clear()
        self._batch.clear()


def _make_batch(
    model: VLM,
    processor: Processor,
    size: int,
    features: Features,
    memory: int,
    prefix_memory: int | None,
    kv_bits: int | None,
    rotate: int | None,
) -> Batch:
    """A batch whose rows and kept states share so many bytes.

    Raises:
        PromptError: the model cannot be run so.
    """
    if kv_bits is not None or rotate is not None:
        make = partial(make_state, model, kv_bits=kv_bits, rotate=rotate)
        make()
        return Batch(model, processor, size=size, memory=memory, features=features, make_state=make)
    prefixes = Prefixes(int(PREFIX_SHARE * memory) if prefix_memory is None else prefix_memory)
    left = max(memory - prefixes.limit, 0)
    return Batch(model, processor, size=size, memory=left, features=features, prefixes=prefixes)


def batch_generate(
    model: VLM,
    processor: Processor,
    prompts: Sequence[Prompt | Mapping[str, Any]],
    *,
    batch_size: int = 8,
    memory: int | float | str | None = None,
    features: Features | None = None,
    progress: Callable[[int, int], None] | None = None,
    kv_bits: int | None = None,
    rotate: int | None = None,
    **options: Any,
) -> list[Answer]:
    """Answer many prompts, several at a time.

    Args:
        prompts: as for `generate`, or `{"prompt": ..., "images": [...], ...}` with options of its own.
        batch_size: answers that are decoded together at most.
        memory: as of `Engine`.
        features: where what images become is kept and found.
        progress: called with the number of answers that are whole, and of all.
        kv_bits, rotate: as of `Engine`.
        options: for all prompts, see `Options`.

    Returns:
        In the order of the prompts; one that fails has an `error` and does not stop the others.

    Raises:
        PromptError: an option makes no sense.
    """
    if type(batch_size) is not int or batch_size < 1:
        raise PromptError(f"batch_size must be a whole number of 1 or more, not {batch_size!r}")
    Options(**options)
    memory = sequence_memory(model, memory)
    batch = _make_batch(model, processor, batch_size, features or Features(), memory, None, kv_bits, rotate)
    answers = [Answer() for _ in prompts]
    of: dict[Job, int] = {}
    coming, done = iter(enumerate(prompts)), 0

    def end(number: int) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, len(answers))

    try:
        while True:
            while (
                batch.waiting < 2 and (following := next(coming, None)) is not None
            ):  # pictures are opened when needed
                number, prompt = following
                begin = time.perf_counter()
                own: dict[str, Any] = (
                    dict(prompt) if isinstance(prompt, Mapping) and "prompt" in prompt else {"prompt": prompt}
                )
                try:
                    asked, images = own.pop("prompt"), own.pop("images", ())
                    chosen = Options(**{**options, **own})
                    job = Job(
                        processor(asked, images, think=chosen.think, image_tokens=chosen.image_tokens), chosen, begin
                    )
                except (VLMError, TypeError) as error:
                    answers[number].error = str(error)
                    end(number)
                    continue
                of[job] = number
                batch.add(job)
            if not batch.busy:
                return answers
            said: list[Said] = one_at_a_time(batch.step)
            for job, found in said:
                number = of[job]
                if isinstance(found, VLMError):
                    answers[number].error = str(found)
                else:
                    answers[number].add(found)
                if isinstance(found, VLMError) or found.finish_reason is not None:
                    del of[job]
                    end(number)
    finally:
        batch.clear()
