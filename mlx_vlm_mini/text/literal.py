"""What people write is text: a mark inside the tokens that they typed, so that neither a chat template nor a tokenizer
takes them for the tokens themselves.

The mark is random and new in each process, so nobody can write one.
"""

import re
import secrets
from collections.abc import Collection, Sequence
from itertools import accumulate

from mlx_vlm_mini.errors import PromptError

MARK = "".join(chr(0xE000 + secrets.randbelow(0x1900)) for _ in range(12))
"""Stands behind the first character of a token that is text: letters of Unicode's private area, 2^151 ways."""


def mark(texts: Sequence[str], tokens: Collection[str]) -> list[str]:
    """Texts with a mark inside each of `tokens`, also inside those that several of the texts make together once a
    template has put them behind one another, with or without the spaces at their ends.

    Raises:
        PromptError: a text holds the mark itself.
    """
    if any(MARK in text for text in texts):
        raise PromptError("the text holds this program's own mark for text: leave it out")
    stripped = [text.strip() for text in texts]
    joined = "".join(stripped)
    present = [token for token in tokens if token and (token in joined or any(token in text for text in texts))]
    if not present:
        return list(texts)
    starts = re.compile(f"(?=({alternatives(present)}))(.)", re.DOTALL)
    begins = list(accumulate((len(text) for text in stripped), initial=0))
    across = {
        number
        for match in starts.finditer(joined)
        for number in range(1, len(texts))
        if match.start() < begins[number] < match.start() + len(match[1]) and stripped[number]
    }
    marked = []
    for number, text in enumerate(texts):
        found = starts.sub(lambda match: match[2] + MARK, text)
        space = len(found) - len(found.lstrip()) if number in across else 0
        marked.append(found[:space] + MARK + found[space:] if number in across else found)
    return marked


def unmark(text: str) -> str:
    """A text as it was written."""
    return text.replace(MARK, "")


def alternatives(tokens: Collection[str]) -> str:
    """An expression for one of several tokens; where several begin, the longest."""
    return "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))
