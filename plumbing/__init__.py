"""What every script needs and no paper mentions: command line, devices, folders, pixels.

A script imports it before anything else: torch takes seconds to import.
"""

import os
import signal
import sys


def _leave(*_) -> None:
    os.write(2, b"stopped before anything was done\n")
    os._exit(128 + signal.SIGINT)


for number in (0, 1, 2):
    try:
        os.fstat(number)
    except OSError:  # closed: what is opened next would get the number, and be printed into
        os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)

# Ctrl-C during the imports of our scripts, until `command_line.command` takes over.
folder = os.path.dirname(os.path.abspath(getattr(sys.modules["__main__"], "__file__", None) or "/"))
ours = sys.argv[:1] == ["-m"] or folder in (root := os.path.dirname(__path__[0]), os.path.join(root, "figures"))
if ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _leave)
