"""What the `tokenizers` library is given and what it raises, kept in bounds.

Regular expressions of a tokenizer.json that could take for ever are refused before they read anything.

The library tries all ways in which a text may match. A repetition inside a repetition has as many ways as
there are subsets of the text, and several wide ones behind one another as many as a power of its length.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_vlm_mini.errors import CheckpointError, VLMError
from mlx_vlm_mini.files import check_pointer

MOST_TOKENS = 2_000_000  # of a vocabulary; the largest that are known have a quarter of a million
LONGEST_TOKEN = 1000  # characters: the ways to join one are as many
_LARGEST = 128 * 2**20  # bytes of a vocabulary's file; the largest that are known have a third of that
_MOST_REPEATED = 8  # repetitions without end in one alternative; the published ones have up to three
_LONGEST = 20_000  # characters
_PART = re.compile(
    r"\\(?:[pP]\{[^}]*\}|x\{[^}]*\}|.)|\[\^?\]?(?:\\.|\[:\^?\w+:\]|&&\[|[^\]\\])*\]+"  # escape, class of characters
    r"|(?P<open>\((?:\?(?:[a-zA-Z-]*[:)]|[=!>]|<[=!]|<\w+>))?)|(?P<close>\))|(?P<either>\|)"
    r"|(?P<times>[*+]|\{\d*,\})[?+]?|(?P<few>\?|\{\d*(?:,\d*)?\})[?+]?|.",
    re.DOTALL,
)


@contextmanager
def library_errors(what: str, *, but: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn what the library raises into one line: plain `Exception`, or, where its code gives up, a kind of its own
    that is not even that.

    Args:
        but: what is left to the caller.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, (VLMError, KeyboardInterrupt, SystemExit, GeneratorExit, *but)):
            raise
        raise CheckpointError(f"{what}: {(str(error).splitlines() or [type(error).__name__])[0]}") from None


def check_size(file: Path) -> None:
    """Raises CheckpointError where a file that the library reads is larger than any vocabulary, or no vocabulary."""
    size = file.stat().st_size
    if size < 1000:
        check_pointer(file.read_bytes(), file)
    if size > _LARGEST:
        raise CheckpointError(f"{file} has {size >> 20} MB, at most {_LARGEST >> 20} MB are read")


def check_patterns(part: Any, file: Path) -> None:
    """Look through a part of a tokenizer.

    Args:
        part: its normalizer, pre-tokenizer or decoder; None where it has none.

    Raises:
        CheckpointError: an expression could take for ever.
    """
    state = b"null" if part is None else part.__getstate__()
    for pattern in _patterns(json.loads(state)):
        if len(pattern) > _LONGEST or not is_bounded(pattern):
            raise CheckpointError(f"{file} has an expression that could take for ever: {pattern[:60]!r}")


def _patterns(content: Any) -> Iterator[str]:
    waiting = [content]
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict):
            if isinstance(found.get("Regex"), str):
                yield found["Regex"]
            waiting += found.values()
        elif isinstance(found, list):
            waiting += found


def is_bounded(pattern: str) -> bool:
    """Whether no repetition without end has one inside it, and none has too many beside it."""
    counts = [0]  # of repetitions without end in this alternative of each open group
    most = [0]  # in the alternatives before it
    closed = 0  # in the group that has just ended
    for match in _PART.finditer(pattern):
        if match["open"] is not None and not match["open"].endswith(")"):
            counts.append(0)
            most.append(0)
        elif match["close"] is not None and len(counts) > 1:
            closed = max(counts.pop(), most.pop())
            counts[-1] += closed
            continue
        elif match["either"] is not None:
            most[-1], counts[-1] = max(most[-1], counts[-1]), 0
        elif match["times"] is not None:
            if closed:
                return False
            counts[-1] += 1
        elif match["few"] is not None and closed and match["few"] != "?":
            counts[-1] += _MOST_REPEATED * closed
        if counts[-1] > _MOST_REPEATED:
            return False
        closed = 0
    return True
