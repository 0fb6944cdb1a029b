"""What every script needs and no paper mentions: command line, devices, folders, pixels."""

import os
import signal
import sys


def _ready() -> None:
    """Runs when a script starts: Ctrl-C during the imports, and descriptors that are closed.

    What is opened next would get the number of a closed stdout or stderr, and what a library prints
    would end up in that file.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free
    root, script = os.path.dirname(os.path.dirname(os.path.abspath(__file__))), sys.modules["__main__"]
    folder = os.path.dirname(os.path.abspath(getattr(script, "__file__", None) or "/"))
    own = sys.argv[:1] == ["-m"] or folder in (root, os.path.join(root, "figures"))
    if own and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave)


def leave(*_) -> None:
    """What Ctrl-C does until `command_line.command` takes over."""
    try:
        os.write(2, b"stopped before anything was done\n")
    finally:
        os._exit(128 + signal.SIGINT)


_ready()
