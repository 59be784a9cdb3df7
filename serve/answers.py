"""Answers of one request while they are given: admitted, watched for a client that leaves, with signs of life."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.types import Receive

from mlx_vlm_mini.errors import VLMError
from mlx_vlm_mini.generation.answering import Chunk, Stats
from mlx_vlm_mini.generation.engine import Engine, Request
from mlx_vlm_mini.generation.options import Options
from mlx_vlm_mini.images.source import read_images
from mlx_vlm_mini.text.thinking import SWITCH

from .bodies import Gone
from .limits import Limits
from .metrics import Metrics
from .models import Model, Models
from .questions import Question
from .refusals import Refusal, later, refuse

Found = tuple[int, Chunk] | None
"""A chunk and which of the answers it belongs to; None after some seconds without one."""


class Desk:
    """Takes questions to the models, as many at a time as the limits say.

    Attributes:
        busy: questions that wait or are answered.
        looking: the thread that finds out where models looked.
    """

    def __init__(self, models: Models, limits: Limits, metrics: Metrics, *, at_once: int) -> None:
        """
        Args:
            at_once: answers that are given together; `limits.queue` more may wait.
        """
        self.models, self.limits, self.metrics = models, limits, metrics
        self.busy = 0
        self._most = at_once + limits.queue
        self._opening = ThreadPoolExecutor(4, thread_name_prefix="mlx-vlm-mini-pictures")
        self.looking = ThreadPoolExecutor(1, thread_name_prefix="mlx-vlm-mini-looking")

    @contextmanager
    def admit(self) -> Iterator[None]:
        """A place among those that wait or are answered.

        Raises:
            Refusal: there is none left.
        """
        if self.busy >= self._most:
            raise later(f"{self.busy} requests wait or are answered, which is the limit: try again", 2)
        self.busy += 1
        self.metrics.busy.set(self.busy)
        try:
            yield
        finally:
            self.busy -= 1
            self.metrics.busy.set(self.busy)

    async def ask(self, question: Question, receive: Receive) -> "Answers":
        """Have a question answered; the first chunk has come, or the model has been silent for some seconds.

        Raises:
            Refusal: it cannot be answered.
            Gone: the client left.
        """
        answers = Answers(self, self.models.find(question.model), question, receive)
        try:
            await answers.begin()
        except BaseException:
            await answers.close()
            raise
        return answers

    async def check_form(self, options: Mapping[str, Any]) -> None:
        """Find out in a thread whether a schema can be followed, which may take seconds.

        Raises:
            Refusal: it cannot.
        """
        if "schema" in options:
            try:
                await asyncio.get_running_loop().run_in_executor(
                    self._opening, partial(Options, schema=options["schema"])
                )
            except VLMError as error:
                raise Refusal(400, str(error), "response_format") from None

    async def open_pictures(self, messages: Sequence[Mapping[str, Any]], engine: Engine) -> list[dict[str, Any]]:
        """Messages whose pictures are read: what is slow there, an address say, keeps nobody else waiting."""
        loop, opened, count = asyncio.get_running_loop(), [], 0
        for message in messages:
            content = message["content"]
            if not isinstance(content, str):
                parts: list[dict[str, Any]] = []
                for part in content:
                    if part["type"] != "image":
                        parts.append(part)
                        continue
                    access = engine.processor.access
                    pictures = await loop.run_in_executor(self._opening, read_images, part["image"], access)
                    count += len(pictures)
                    if count > self.limits.images:
                        most = self.limits.images
                        raise Refusal(
                            400, f"the messages hold more than {most} pictures, pages of PDFs counted", "messages"
                        )
                    parts += [{**part, "image": picture} for picture in pictures]
                content = parts
            opened.append({**message, "content": content})
        return opened

    def close(self) -> None:
        """End the threads."""
        for threads in (self._opening, self.looking):
            threads.shutdown(wait=True, cancel_futures=True)


@dataclass
class Answer:
    """One of the answers, as far as it has come.

    Attributes:
        stats: what it cost.
        finish_reason: None where it has not ended.
    """

    stats: Stats | None = None
    finish_reason: str | None = None


class Answers:
    """The answers to one request.

    Iterate over them once, and close them.

    Attributes:
        model: that gives them.
        engine: of the model.
        answers: as far as they have come, in order.
        first: what came first.
    """

    def __init__(self, desk: Desk, model: Model, question: Question, receive: Receive) -> None:
        self.model, self.question = model, question
        self.engine: Engine
        self.answers = [Answer() for _ in range(question.choices)]
        self.first: Found = None
        self._desk, self._receive = desk, receive
        self._begin = time.monotonic()
        self._until = self._begin + desk.limits.seconds
        self._requests: list[Request] = []
        self._arrived: asyncio.Queue[tuple[int, Chunk | VLMError | None]] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self._left = False
        self._stack = AsyncExitStack()

    async def begin(self) -> None:
        """Load the model, open the pictures, ask, and wait for what comes first."""
        self._stack.enter_context(self._desk.admit())
        watch = asyncio.create_task(self._watch())
        self._tasks.append(watch)
        opening = asyncio.create_task(self._open())
        try:
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + self._until - time.monotonic()):
                await asyncio.wait({watch, opening}, return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            raise self._late() from None
        finally:
            if not opening.done():
                opening.cancel()
                with suppress(asyncio.CancelledError, VLMError, Refusal):
                    await opening
        if self._left and not (opening.done() and not opening.cancelled()):
            raise Gone
        opening.result()
        self.first = await self._next()

    async def _open(self) -> None:
        self.engine = await self._stack.enter_async_context(self._desk.models.use(self.model))
        options = self._options()
        await self._desk.check_form(options)
        messages = await self._desk.open_pictures(self.question.messages, self.engine)
        for number in range(self.question.choices):
            own = {"seed": (options["seed"] + number) % 2**64} if options.get("seed") is not None else {}
            request = self.engine.submit(messages, **{**options, **own})
            self._requests.append(request)
            self._tasks.append(asyncio.create_task(self._pump(number, request)))
        self.question.messages.clear()  # the pictures' bytes are the engine's now

    def _options(self) -> dict[str, Any]:
        """The question's, with an effort to think where the model's template has a switch for that."""
        options, effort = dict(self.question.options), self.question.effort
        if effort is not None and "think" not in options and SWITCH in self.engine.processor.chat_template.source:
            options["think"] = effort
        return options

    async def _watch(self) -> None:
        """Wait until the client closes the connection."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._left = True
        self._arrived.put_nowait((0, None))

    async def _pump(self, number: int, request: Request) -> None:
        try:
            async for chunk in request:
                self._arrived.put_nowait((number, chunk))
        except VLMError as error:
            self._arrived.put_nowait((number, error))

    async def _next(self) -> Found:
        """What comes next; None after `limits.ping` seconds.

        Raises:
            Refusal: an answer failed, or takes too long.
            Gone: the client left.
        """
        left = self._until - time.monotonic()
        if left <= 0:
            raise self._late()
        try:
            async with asyncio.timeout(min(self._desk.limits.ping, left)):
                number, found = await self._arrived.get()
        except TimeoutError:
            return None
        if found is None or self._left:
            raise Gone
        if isinstance(found, VLMError):
            raise refuse(found)
        answer = self.answers[number]
        if answer.stats is None:
            self._desk.metrics.first_token.labels(self.model.name).observe(time.monotonic() - self._begin)
        answer.stats, answer.finish_reason = found.stats, found.finish_reason
        return number, found

    async def __aiter__(self) -> AsyncIterator[Found]:
        """All chunks from the first on, and None where a stream needs a sign of life.

        Raises:
            Refusal: an answer failed, or takes too long.
            Gone: the client left.
        """
        found = self.first
        while True:
            yield found
            if all(answer.finish_reason is not None for answer in self.answers):
                return
            found = await self._next()

    async def close(self) -> None:
        """End what is still being answered, and count what it cost."""
        for request, answer in zip(self._requests, self.answers, strict=False):
            if answer.finish_reason is None:
                request.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for answer in self.answers:
            if answer.stats is not None:
                self._desk.metrics.count(self.model.name, answer.stats)
        await self._stack.aclose()

    async def __aenter__(self) -> "Answers":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def note(self) -> str:
        """For the log: how many tokens."""
        stats = [answer.stats for answer in self.answers if answer.stats is not None]
        return f"{sum(each.prompt_tokens for each in stats)} + {sum(each.generated_tokens for each in stats)} tokens"

    def _late(self) -> Refusal:
        return Refusal(504, f"the answer took longer than {self._desk.limits.seconds:g} s")
