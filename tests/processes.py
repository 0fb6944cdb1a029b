"""Processes of a test's own: forks of this one, in which torch is imported already."""

import os
import signal
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context

import torch
from torch.distributed import TCPStore

from plumbing.command_line import STOPPING

FORK = get_context("fork")
GRACE = 120  # seconds that a process may take


class Forked(FORK.Process):
    """A process that runs main(words) after prepare() as a script would: one thread, own streams.

    It ends with the status that main returns. What it inherits is what the test has patched.
    """

    def __init__(self, main, words=(), prepare=lambda: None):
        super().__init__()
        self.main, self.words, self.prepare = main, [str(word) for word in words], prepare
        self.printed = [tempfile.TemporaryFile("w+", errors="replace") for _ in range(2)]
        self.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """Whatever happened, it does not live on."""
        self.kill()
        self.join()

    def run(self):
        for number in STOPPING:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        for number, file in enumerate(self.printed, 1):
            os.dup2(file.fileno(), number)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
        torch.set_num_threads(1)
        self.prepare()
        sys.exit(self.main(self.words))

    def ended(self, seconds=GRACE) -> tuple[int, str, str]:
        """The exit status (-9: killed), and what it wrote to stdout and to stderr."""
        self.join(seconds)
        status = self.exitcode
        self.__exit__()
        return status, *(text_of(file) for file in self.printed)

    def wait_for(self, condition, seconds=GRACE):
        """Wait until condition() holds, also of a process that has just ended."""
        deadline, alive = time.monotonic() + seconds, True
        while not condition():
            if not alive or time.monotonic() > deadline:
                raise AssertionError(self.ended(0))
            time.sleep(0.01)
            alive = self.is_alive()


def text_of(file) -> str:
    file.seek(0)
    return file.read()


@contextmanager
def group(main, words=(), size=2):
    """Processes that run main(words) as torchrun starts them: a list, by rank.

    They meet at a store of this process, which lives on when one of them ends.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    names = {"WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    names |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}

    def prepare(rank):
        own = names | {"RANK": rank, "LOCAL_RANK": rank}
        return lambda: os.environ.update({name: str(value) for name, value in own.items()})

    with ExitStack() as stack:
        yield [stack.enter_context(Forked(main, words, prepare(rank))) for rank in range(size)]
