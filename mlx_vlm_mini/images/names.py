"""Names of files as people and systems write them -> the files that are there."""

import difflib
import errno
import os
import re
import sys
import unicodedata
import urllib.parse
from pathlib import Path

_SPACES = {0x202F: " ", 0xA0: " "}  # macOS puts the first before AM and PM in the names of screenshots
_MOST_NAMES = 20_000  # of a folder that is looked through


def local_path(name: str | Path) -> Path:
    """A path as it is written: `~/a.png`, `file:///home/me/a%20b.png`."""
    if isinstance(name, str) and name[:7].lower() == "file://":
        rest = name[7:]
        name = urllib.parse.unquote(rest[max(rest.find("/"), 0) :])
    try:
        return Path(os.path.expanduser(name))  # noqa: PTH111 - leaves an unknown user as it is
    except ValueError:  # no user has a name with a zero or half a character in it
        return Path(name)


def find_file(name: str | Path) -> Path:
    """The file of that name; where it is not there, the only one whose name looks the same: accents are one character
    or two (macOS's and Linux's habits), spaces are of several kinds. The path as it is written where there is none."""
    path = local_path(name)
    try:
        if path.exists():
            return path
        found = Path(path.anchor) if path.anchor else Path()
        for part in path.parts[1:] if path.anchor else path.parts:
            if not (step := found / part).exists() and part != "..":
                (alike,) = (each for each in _names_in(found) if _plain(each) == _plain(part))
                step = found / alike
            found = step
        return found
    except (OSError, ValueError):  # none, or several
        return path


def not_found(path: Path) -> str:
    """That a picture is not there, and which name comes near."""
    try:
        known = {_plain(name).lower(): name for name in _names_in(path.parent)}
    except (OSError, ValueError):
        known = {}
    near = difflib.get_close_matches(_plain(path.name).lower(), known, 1, 0.75)
    return f"image not found: {path}" + (f"; there is {known[near[0]]!r}" if near else "")


def unreadable(path: Path, error: Exception) -> str:
    """Why a file or a folder cannot be read, with macOS's remedy where its privacy settings forbid it."""
    reason = getattr(error, "strerror", None) or str(error)
    if sys.platform == "darwin" and getattr(error, "errno", None) == errno.EPERM:
        reason += ": allow this terminal in System Settings > Privacy & Security > Files and Folders"
    return f"{path}: {reason}"


def natural(path: Path) -> tuple[list[str | int], str]:
    """For sorting: numbers in names go by their size, frame2 before frame12."""
    parts = re.split(r"(\d+)", path.name)
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], path.name


def _names_in(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return [entry.name for entry, _ in zip(entries, range(_MOST_NAMES), strict=False)]


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name.translate(_SPACES))
