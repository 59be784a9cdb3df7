"""What the `tokenizers` library is given and what it raises, kept in bounds.

Regular expressions of a tokenizer.json that could take for ever are refused before they read anything.

The library tries all ways in which a text may match. A repetition inside a repetition has as many ways as
there are subsets of the text, and several wide ones behind one another as many as a power of its length.
"""

import base64
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mlx_vlm_mini.errors import CheckpointError, VLMError
from mlx_vlm_mini.files import check_pointer

MOST_TOKENS = 2_000_000  # of a vocabulary; the largest that are known have a quarter of a million
LONGEST_TOKEN = 1000  # characters: the ways to join one are as many
_LONGEST_STRING = 20_000  # bytes of one in a tokenizer.json: a merge names two tokens, a letter may take six bytes
_MOST_GROWTH = 256  # times as long as it is a text may become; published ones leave it as long
_MOST_AROUND = 100  # tokens, or letters, that are put around every text
_LARGEST = 128 * 2**20  # bytes of a vocabulary's file; the largest that are known have a third of that
_MOST_REPEATED = 8  # repetitions without end in one alternative; the published ones have up to three
_LONGEST = 20_000  # characters
_PART = re.compile(
    r"\\(?:[pP]\{[^}]*\}|x\{[^}]*\}|.)|\[\^?\]?(?:\\.|\[:\^?\w+:\]|&&\[|[^\]\\])*\]+"  # escape, class of characters
    r"|(?P<open>\((?:\?(?:[a-zA-Z-]*[:)]|[=!>]|<[=!]|<\w+>))?)|(?P<close>\))|(?P<either>\|)"
    r"|(?P<times>[*+]|\{\d*,\})[?+]?|(?P<few>\?|\{\d*(?:,\d*)?\})[?+]?|.",
    re.DOTALL,
)


_CHARSMAP = re.compile(rb'"precompiled_charsmap"\s*:\s*("[^"]*"|[^\s,}]*)')


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


def check_strings(file: Path) -> None:
    """Raises CheckpointError where a tokenizer.json holds a string longer than tokens and expressions are, but for
    SentencePiece's table: each time such a token is written, all of it would be. And where that table is none: the
    library would write of it to stderr by itself."""
    data = file.read_bytes()
    for found in _CHARSMAP.finditer(data):
        if not _is_charsmap(found[1]):
            raise CheckpointError(f"{file} is broken: its precompiled_charsmap is no table of SentencePiece")
    content = np.frombuffer(data, dtype=np.uint8)
    quotes = np.flatnonzero(content == ord('"'))
    quotes = quotes[content[np.maximum(quotes - 1, 0)] != ord("\\")]
    for start in quotes[:-1][np.diff(quotes) > _LONGEST_STRING]:
        if b"precompiled_charsmap" not in content[max(start - 40, 0) : start].tobytes():
            raise CheckpointError(f"{file} has a string of more than {_LONGEST_STRING:,} bytes: no token is so long")


def _is_charsmap(written: bytes) -> bool:
    try:
        table = base64.b64decode(written.strip(b'"').replace(b"\\/", b"/"), validate=True)
        tree = int.from_bytes(table[:4], "little") // 4 * 4
        table[4 + tree :].decode()
    except ValueError:
        return False
    return written[:1] == b'"' and 4 <= 4 + tree <= len(table)


def check_growth(part: Any, file: Path) -> None:
    """Look through a part of a tokenizer for what makes much of little text.

    Args:
        part: its normalizer, decoder or post-processor; None where it has none.

    Raises:
        CheckpointError: it makes a text longer than any real one does.
    """
    content = json.loads(b"null" if part is None else part.__getstate__())
    times, around = _growth(content)
    if times > _MOST_GROWTH or around > _MOST_AROUND:
        what = f"{times:,} times as long" if times > _MOST_GROWTH else f"longer by {around:,} tokens or letters"
        raise CheckpointError(
            f"{file} makes every text {what}, at most {_MOST_GROWTH} times and {_MOST_AROUND} more are read"
        )


def _growth(step: Any) -> tuple[int, int]:
    """How many times as long a step makes a text at most, and what it puts around one."""
    if not isinstance(step, dict):
        return 1, 0
    times, around = 1, 0
    for steps in ("normalizers", "decoders", "processors"):
        for each in step.get(steps) or ():
            more, beside = _growth(each)
            times, around = times * more, around * more + beside
    kind, content = step.get("type"), str(step.get("content", ""))
    if kind == "Replace":
        pattern = step.get("pattern")
        found = pattern.get("String", "") if isinstance(pattern, dict) else ""
        # An expression may match between two letters.
        times = max(1, -(-len(content) // len(found))) if found else 1 + len(content)
    elif kind in ("Prepend", "WordPiece", "BPEDecoder"):
        around = len(str(step.get({"Prepend": "prepend", "WordPiece": "prefix"}.get(kind, "suffix"), "")))
    elif kind == "Precompiled":
        times = max(1, longest_replacement(base64.b64decode(step.get("precompiled_charsmap") or "")) // 32)
    elif kind == "TemplateProcessing":
        tokens = {name: len(each["ids"]) for name, each in step["special_tokens"].items()}
        for form in (step["single"], step["pair"]):
            put = [tokens.get(piece["SpecialToken"]["id"], 1) for piece in form if "SpecialToken" in piece]
            around, times = max(around, sum(put)), max(times, len(form) - len(put))
    return times, around


def longest_replacement(charsmap: bytes) -> int:
    """Bytes of the longest text that SentencePiece's table puts in place of another: behind its tree, whose size its
    first four bytes say, they stand with a zero byte after each."""
    size = int.from_bytes(charsmap[:4], "little")
    return max(map(len, charsmap[4 + size :].split(b"\0")), default=0)


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
