"""Where the program starts: before anything is imported that takes time."""

import os
import signal
import sys


def start() -> None:
    """Run the command line. Ctrl-C ends it with 130 from the beginning, and a stream that is closed is as /dev/null."""
    open_closed()
    at_ease = signal.getsignal(signal.SIGINT)
    if at_ease is signal.default_int_handler:  # else a shell's background job, which ignores it
        signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))
    from .main import main

    signal.signal(signal.SIGINT, at_ease)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def open_closed() -> None:
    """Put /dev/null in the place of stdin, stdout and stderr where they are closed: else the next file that is opened
    would be taken for one of them."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            stream = os.fdopen(number, mode, closefd=False)
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
