"""Many questions answered together into one file, or onto stdout, continued where an earlier run was stopped."""

import queue
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_vlm_mini.errors import PromptError, VLMError

from .answers import Keys, Output
from .awake import awake
from .interrupt import Interrupts
from .part import Part, part_files
from .progress import Progress, Tally
from .questions import Item, Questions, check_pictures, forget_digests
from .writing import neutralize

if TYPE_CHECKING:
    from mlx_vlm_mini.generation.answering import Chunk
    from mlx_vlm_mini.generation.engine import Request

AHEAD = 2  # times the rows: questions that are asked and not answered
HELD = 8  # times the rows: answers that wait for one before them, so that lines come in the order of the questions
_WAIT_S = 0.2
_EACH = 256  # questions that were answered before, after each of which a run looks up

Todo = Iterator[tuple[str, Item] | None]


def left_to_do(
    questions: Questions, output: Output, settings: Mapping[str, Any], part: Part | None, tally: Tally
) -> Todo:
    """What the output lacks of a part of the questions, with its keys; None where there is nothing yet, or not for a
    while. A question that is asked again has a key of its own.

    Args:
        tally: what is found is counted there.
    """
    forget_digests()  # files may have changed since another run of this process
    asked, again = Keys(), Counter[str]()
    part = part or Part(1, 1)
    if questions.count is not None:
        tally.total = questions.count * questions.size
        tally.share = part.share(questions.count) * questions.size
    total = share = place = 0
    for group in questions.groups:
        if group is None:
            yield None
            continue
        total += len(group)
        mine, place = part.has(place), place + 1
        for item in group:
            name = item.identity
            number = 1
            if not asked.add(name):
                again[name] += 1
                number += again[name]
            if not mine:
                continue
            share += 1
            key = item.key(settings) + (f"-{number}" if number > 1 else "")
            if key not in output.done:
                yield key, item
                continue
            tally.held += 1
            if not tally.held % _EACH:
                yield None
    tally.total, tally.share = total, share


@dataclass
class _Asked:
    key: str
    item: Item
    request: "Request | None" = None
    error: str | None = None
    is_whole: bool = False


class Asking:
    """Asks questions ahead and writes the answers in the order of the questions.

    Attributes:
        tally: what was answered.
    """

    def __init__(
        self,
        output: Output,
        ask: Callable[[Item], "Request"] | None,
        rows: int,
        progress: Progress,
        check: Callable[[], None],
    ) -> None:
        """
        Args:
            ask: has an item answered; None where all items are at fault.
            rows: answers that are given at a time.
            check: is called between two answers; raises where the run is to end.
        """
        self.tally = progress.tally
        self._output, self._ask, self._progress, self._check = output, ask, progress, check
        self._most_open, self._most = AHEAD * rows, HELD * rows
        self._asked: deque[_Asked] = deque()
        self._ended: queue.SimpleQueue[_Asked] = queue.SimpleQueue()
        self._open = 0

    def answer(self, todo: Todo) -> None:
        """Answer all; what cannot be answered is written with its error, and counted."""
        more = True
        while more or self._asked:
            while more and self._open < self._most_open and len(self._asked) < self._most:
                try:
                    found = next(todo)
                except StopIteration:
                    more = False
                    break
                self._check()
                if found is None:
                    break
                self._begin(*found)
            while self._asked and self._asked[0].is_whole:
                self._settle(self._asked.popleft())
            self._progress.update()
            self._wait(block=not more or self._open >= self._most_open or len(self._asked) >= self._most)
            self._check()

    def _begin(self, key: str, item: Item) -> None:
        asked = _Asked(key, item, error=item.fault, is_whole=item.fault is not None)
        self._asked.append(asked)
        if asked.is_whole:
            return
        assert self._ask is not None
        try:
            asked.request = self._ask(item)
        except (VLMError, MemoryError) as error:
            asked.error, asked.is_whole = _line_of(error), True
        else:
            self._open += 1
            asked.request.add_done_callback(lambda _: self._ended.put(asked))

    def _wait(self, *, block: bool) -> None:
        """Note which answers are whole; where `block`, wait a while for one."""
        try:
            block = block and self._open > 0 and not (self._asked and self._asked[0].is_whole)
            while True:
                self._ended.get(block, _WAIT_S if block else None).is_whole = True
                self._open -= 1
                block = False
        except queue.Empty:
            return

    def _settle(self, asked: _Asked) -> None:
        entry: dict[str, Any] = {}
        if asked.request is not None:
            try:
                entry = as_object(list(asked.request), {}, False)
            except (VLMError, MemoryError) as error:
                asked.error = _line_of(error)
        if asked.error is not None:
            entry = {"error": asked.error}
            self.tally.failed += 1
            self._progress.clear()
            click.echo(f"Error: {asked.error}", err=True)
        else:
            self.tally.answered += 1
        self._output.write(asked.key, asked.item.named | entry)
        self._progress.update(_show(asked.item))


def _line_of(error: BaseException) -> str:
    return " ".join(str(error).split()) or "out of memory"


def _show(item: Item) -> str:
    return neutralize(" ".join(Path(name).name for name in item.images)).replace("\n", " ")


def answer_many(
    model: str,
    questions: Questions,
    path: Path | None,
    *,
    part: Part | None,
    batch_size: int,
    memory: str | None,
    loading: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """Answer all questions of a part into a file or onto stdout.

    Raises:
        PromptError: some could not be answered.
        KeyboardInterrupt: there was a Ctrl-C.
    """
    tally = Tally(unit=questions.unit)
    taken = [] if path is None or part is not None else [file for _, file in part_files(path)]
    with ExitStack() as stack:
        output = stack.enter_context(Output(path, part))
        progress = Progress(tally, output.path if output.regular else None, part)
        progress.remove(*taken)
        stack.callback(progress.clear)
        interrupts = stack.enter_context(Interrupts())
        progress.say("looking at what there is to do")
        todo = left_to_do(questions, output, {"model": model, **loading, **options}, part, tally)
        first = []  # up to the first question that needs the model; those before it failed already
        for found in todo:
            interrupts.check()
            if found is not None:
                first.append(found)
                if found[1].fault is None:
                    break
        try:
            if first:
                stack.enter_context(awake())
                ask: Callable[[Item], Request] | None = None
                if first[-1][1].fault is None:
                    progress.say(f"loading {model}")
                    ask = stack.enter_context(_engine(model, batch_size, memory, loading, options))
                progress.start()
                Asking(output, ask, batch_size, progress, interrupts.check).answer(chain(first, todo))
        finally:
            progress.note(running=False)
        progress.clear()
        if tally.held:
            click.echo(f"{output.path} holds {tally.held} of {tally.share} answers already", err=True)
        if part is None and output.path is not None:
            progress.remove(output.path)
    if tally.failed:
        raise PromptError(f"{tally.failed} of {tally.share} could not be answered: see their lines of output")


@contextmanager
def _engine(
    model: str, batch_size: int, memory: str | None, loading: dict[str, Any], options: dict[str, Any]
) -> Iterator[Callable[[Item], "Request"]]:
    """Load a model; gives what has an item answered."""
    from mlx_vlm_mini import Engine, load
    from mlx_vlm_mini.generation.features import Features
    from mlx_vlm_mini.text.messages import images_of

    vlm, processor = load(model, **loading)
    pixels, tokens = Features(), options["image_tokens"]

    def ask(item: Item) -> "Request":
        messages = [
            message
            if isinstance(message["content"], str)
            else {**message, "content": [pixels.prepare_part(processor, part, tokens) for part in message["content"]]}
            for message in item.opened()
        ]
        check_pictures(item, [part["image"].origin.sha256 for part in images_of(messages)])
        return engine.submit(messages)

    with Engine(vlm, processor, batch_size=batch_size, memory=memory, **options) as engine:
        yield ask


def as_object(chunks: list["Chunk"], more_timings: dict[str, float], interrupted: bool) -> dict[str, Any]:
    """What is written of an answer."""
    stats = asdict(chunks[-1].stats) if chunks else {}
    more: dict[str, Any] = {}
    if chunks and chunks[-1].object is not None:
        more["object"] = chunks[-1].object
    if chunks and chunks[-1].choices:
        more["choices"] = [asdict(choice) for choice in chunks[-1].choices]
    counts = ("prompt_tokens", "image_tokens", "cached_tokens")
    times = ("image_s", "prefill_s", "first_token_s", "decode_s")
    return {
        **({"thinking": thinking} if (thinking := "".join(chunk.thinking for chunk in chunks)) else {}),
        "text": "".join(chunk.text for chunk in chunks),
        **more,
        "token_ids": [chunk.token for chunk in chunks],
        "logprobs": [chunk.logprob for chunk in chunks],
        "finish_reason": "interrupted" if interrupted else chunks[-1].finish_reason,
        **{key: stats.get(key, 0) for key in counts},
        "timings": {**more_timings, **{key: stats.get(key, 0.0) for key in times}},
        "peak_memory_bytes": stats.get("peak_memory_bytes", 0),
    }
