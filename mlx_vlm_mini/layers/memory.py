"""How much memory there is."""

import os
import resource
from collections.abc import Iterator
from pathlib import Path


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
