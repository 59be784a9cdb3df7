"""What Tab offers: commands, settings, and paths where a path can stand."""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from .line import is_shown

PATHS_AFTER = {
    "/image": True,
    "/attend": False,
    "/save": False,
    "/load": False,
    "/model": False,
}  # whether pictures alone are offered
_AT = re.compile(r"(?:(?<=[ \t\n(\[{])|\A)@(?P<path>\"[^\"\n]*|(?:\\.|[^ \t\n\\\"])*\\?)\Z")


@dataclass(frozen=True)
class Offer:
    """A completion: `text` in place of the last `length` characters; `shown` stands in the menu, with a `note`."""

    text: str
    length: int
    shown: str
    note: str = ""


def complete(line: str, commands: Mapping[str, str], settings: Mapping[str, str]) -> list[Offer]:
    """What can stand at the end of a line.

    Args:
        line: what was typed, up to the cursor.
        commands: their names, `/help` and so on, and what they do.
        settings: names for `/set`, and what they are now.
    """
    first, space, rest = line.partition(" ")
    if not space and line.startswith("/"):
        return _of(line, commands, end=" ")
    if at := _AT.search(line):
        return list(_paths(at["path"], pictures=True))
    if first == "/set" and " " not in rest:
        return _of(rest.replace("-", "_"), settings, end=" ")
    if first in PATHS_AFTER and first in commands and space:
        return list(_paths(rest, pictures=PATHS_AFTER[first]))
    return []


def _of(typed: str, names: Mapping[str, str], *, end: str) -> list[Offer]:
    return [Offer(name + end, len(typed), name, note) for name, note in names.items() if name.startswith(typed)]


def _paths(typed: str, *, pictures: bool) -> Iterator[Offer]:
    """Folders and files that go on as typed, in quotes where the typed path stands in quotes, else with escapes."""
    quote = typed[:1] if typed[:1] in ("'", '"') else ""
    path = typed[1:] if quote else re.sub(r"\\(.)", r"\1", typed).removesuffix("\\")
    folder, name = os.path.split(path)
    try:
        entries = sorted(Path(os.path.expanduser(folder) or ".").iterdir())  # noqa: PTH111 - never raises
    except (OSError, ValueError):
        return
    for entry in entries:
        if not entry.name.startswith(name) or (entry.name.startswith(".") and not name) or not entry.name.isprintable():
            continue
        is_folder = entry.is_dir()
        if pictures and not is_folder and not is_shown(entry.name):
            continue
        whole = os.path.join(folder, entry.name) + ("/" if is_folder else "")  # noqa: PTH118 - keeps `~` and `./`
        text = quote + whole + (quote if not is_folder else "") if quote else _escape(whole)
        yield Offer(text, len(typed), entry.name + ("/" if is_folder else ""))


def _escape(path: str) -> str:
    return re.sub(r"([ \t\\\"'])", r"\\\1", path)
