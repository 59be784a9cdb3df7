"""A Mac does not go to sleep while a long run goes on."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

KEEPER = "caffeinate"


@contextmanager
def awake() -> Iterator[None]:
    """On macOS, have the system's `caffeinate` keep the machine awake until this ends, or this process does."""
    keeper = shutil.which(KEEPER) if sys.platform == "darwin" else None
    if keeper is None:
        yield
        return
    # -i: for want of a user; -s: on mains at all; -m: disks; -w: until the process ends, however it does.
    command = [keeper, "-i", "-s", "-m", "-w", str(os.getpid())]
    try:
        running = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
    except OSError:  # the answers matter more
        yield
        return
    try:
        yield
    finally:
        running.terminate()
        running.wait()
