"""What every script needs and no paper mentions: command line, devices, folders, pixels.

A script imports it first: torch takes seconds to import, and until `command_line.command` takes
over, Ctrl-C would end in a traceback.
"""

import importlib.util
import os
import signal
import sys
from pathlib import Path


def _leave(*_) -> None:
    os.write(2, b"stopped before anything was done\n")
    os._exit(128 + signal.SIGINT)


for number in (0, 1, 2):
    try:
        os.fstat(number)
    except OSError:  # closed: what is opened next would get the number, and be printed into
        os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)

root, script = Path(__file__).parents[1].resolve(), getattr(sys.modules["__main__"], "__file__", None) or "/"
ours = sys.argv[:1] == ["-m"] or Path(script).resolve().parent in (root, root / "figures")  # no notebook, no test
if ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _leave)
if ours and not importlib.util.find_spec("torch"):
    print("torch is missing: activate the environment (source .venv/bin/activate) or make setup", file=sys.stderr)
    sys.exit(2)
