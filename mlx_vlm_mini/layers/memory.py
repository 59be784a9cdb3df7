"""How much memory there is, and how much somebody grants."""

import os
import re
import resource
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx

from mlx_vlm_mini.errors import PromptError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def device_memory() -> int:
    """Bytes that the device can use: on a GPU what it recommends, else the machine's memory."""
    if mx.default_device().type == mx.DeviceType.gpu:
        recommended = mx.device_info().get("max_recommended_working_set_size")
        if isinstance(recommended, int):
            return recommended
    return min(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), _address_space())


def read_memory(amount: int | float | str) -> int:
    """Bytes of a number of them, of a share of the device's memory (`0.5`, `"50%"`), or of a text like `"12GB"`.

    Raises:
        PromptError: it is none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(%|([kmgt]i?)?b?)\s*", str(amount).lower())
    if match is None or isinstance(amount, bool):
        raise PromptError(f"memory must be bytes, a size like 12GB, or a share like 0.5 or 50%, not {amount!r}")
    number, unit = float(match[1]), match[2]
    if unit == "%" or (not unit and "." in match[1]):
        share = number / 100 if unit == "%" else number
        if share > 1:
            raise PromptError(f"a share of the memory is at most 1 or 100%, not {amount}: a size is like 12GB")
        return int(share * device_memory())
    return int(number * _UNITS[match[3] or ""])


def free_memory() -> int:
    """Bytes that programs can have without swapping, as far as the system says it."""
    limit = _address_space()
    for line in _memory_lines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return min(int(rest.split()[0]) * 1024, limit)
    return min(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2, limit)


def _address_space() -> int:
    """Bytes that the process may still map (ulimit -v)."""
    limit, used = resource.getrlimit(resource.RLIMIT_AS)[0], Path("/proc/self/statm")
    if limit < 0:
        return 1 << 62
    pages = int(used.read_text().split()[0]) if used.is_file() else 0
    return max(limit - pages * os.sysconf("SC_PAGE_SIZE"), 0)


def _memory_lines() -> Iterator[str]:
    file = Path("/proc/meminfo")
    yield from file.read_text().splitlines() if file.is_file() else ()
