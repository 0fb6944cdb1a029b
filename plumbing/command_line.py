"""Settings as a dataclass with bounds, command lines made from them, errors in one line."""

import argparse
import difflib
import functools
import math
import os
import shlex
import shutil
import signal
import sys
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path

from plumbing.devices import pick_device

STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
NO_MEMORY = ("MemoryError", "out of memory", "allocate memory", "bad_alloc", "start new thread", "create a primitive")


class UserError(ValueError, argparse.ArgumentTypeError):
    """A mistake that the person at the keyboard can mend: one line, without a traceback.

    Raised by the `type` of an option, it keeps its words, and argparse adds the option's name.
    """


class DataLost(UserError):
    """Images can no longer be read, while the state of a run is still good: it can be saved."""


def loaded(loader):
    """The batches of a torch DataLoader. Raises DataLost, in one line, for what fails in it."""
    try:
        batches = iter(loader)
        if getattr(loader, "num_workers", 0):
            with suppress(AttributeError, ValueError):  # Windows, and threads that are not the main one
                # For a worker that is killed, torch's handler would raise in the middle of a step.
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        yield from batches
    except (OSError, RuntimeError, ValueError, SyntaxError) as error:  # a worker's error has its traceback as text
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        if isinstance(error, UserError):
            raise DataLost(reason.split("UserError: ")[-1]) from error
        advice = "" if isinstance(error, FileNotFoundError) else "; --workers 0 reads without further processes"
        raise DataLost(f"images cannot be loaded any more ({reason}){advice}") from error


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line."""

    def __init__(self, *args, **options):
        super().__init__(*args, allow_abbrev=False, **options)

    def error(self, message: str):
        unknown = message.partition("unrecognized arguments: ")[2].split("=")[0].split(" ")[0]
        near = difflib.get_close_matches(unknown, self._option_string_actions, n=1)
        raise UserError(message + "".join(f"; did you mean {name}?" for name in near))

    def parse_known_args(self, args=None, namespace=None):
        for word in sys.argv[1:] if args is None else args:
            if word.partition("=")[2] == "--":  # argparse would take it for no value at all
                raise UserError(f"{word[:-3]}: expected one argument")
        args, others = super().parse_known_args(args, namespace)
        given = {name: value for name, value in vars(args).items() if isinstance(value, (str, Path)) and value}
        places = [os.path.realpath(value) for value in given.values()]
        for name, value in given.items():
            if isinstance(value, Path) and places.count(os.path.realpath(value)) > 1:  # a file to write to
                raise UserError(f"{flag(name)} {value}: another option names the same file; name another")
        return args, others


# ----------------------------------------------------------------------------------------- settings


def option(default, help, choices=None, above=None, at_least=None, at_most=10**9, free=False):
    """A field of a settings dataclass, its words for --help, and bounds if it is a number.

    free: the setting may change when a run is resumed (where things lie, how fast they go).
    """
    bounds = {"above": above, "at_least": at_least, "at_most": at_most}
    return field(default=default, metadata={"help": help, "choices": choices, "free": free} | bounds)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_bounds(config, choices: bool = True) -> None:
    """Raises UserError, naming the flag, for a value of another type, or outside its bounds."""
    for f in fields(config):
        value, about, kind = getattr(config, f.name), f.metadata, type(f.default)
        low, above, high = about["at_least"], about["above"], about["at_most"]
        known, problem = about["choices"] if choices else None, ""
        if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool) != (kind is bool):
            problem = f"must be of the type {kind.__name__}"
        elif known and value not in known:
            raise UserError(f"{flag(f.name)}: unknown {value!r}, choose from {', '.join(known)}")
        elif kind not in (int, float):
            continue
        elif value > high:
            problem = f"must be at most {high:g}"
        elif not math.isfinite(value):
            problem = "must be a finite number"
        elif above is not None and value <= above:
            problem = f"must be greater than {above}"
        elif low is not None and value < low:
            problem = f"must be at least {low}" if low else "must not be negative"
        if problem:
            raise UserError(f"{flag(f.name)} {problem}, not {value!r:.80}")


@dataclass
class Settings:
    """What the settings of all runs share; subclasses are dataclasses of `option` fields."""

    out: str = option("", "folder of the run (empty: runs/<dataset>)", free=True)
    knn_every: int = option(
        5, "epochs between looks at the features: kNN, or figures without labels (0: never)", at_least=0, free=True
    )
    save_every: int = option(1, "epochs between checkpoints; one more when the run ends", above=0, free=True)
    device: str = option("auto", "auto, cpu, cuda or mps", free=True)
    precision: str = option("auto", "numbers that the network computes in", ("auto", "fp32", "bf16"))
    compile: bool = option(False, "compile the encoder with torch.compile", free=True)
    workers: int = option(2, "processes to decode images that do not fit in memory", at_least=0, at_most=256, free=True)
    fit: str = option("crop", "what is done to images that are not square: cut or padded", ("crop", "pad"))
    cache_gb: float = option(4.0, "decoded images up to this size stay in memory, GB", above=0, free=True)
    bank: str = option("", "file with your own MemoryBank (EXERCISES.md)", free=True)
    loss: str = option("", "file with your own nce, and sqrt_kl", free=True)
    cache_dir: str = option("runs/decoded", "where decoded folders are kept (empty: nowhere)", free=True)

    def folder(self) -> Path:
        return Path(self.out or f"runs/{self.dataset}")

    def rows(self, count: int) -> int:
        """The images of count that train at a time and have rows in the bank: W, or all N."""
        return min(self.window, count) or count

    def check(self) -> None:
        """Raises UserError, naming the flag, for values that no dataset could make right."""
        check_bounds(self)
        width, size = self.width, self.size
        side = size if size <= 64 else size // 4  # of the maps that 1x1 convolutions of stride 2 halve
        least = 8 if side <= 32 else 16  # with fewer channels they corrupt torch's memory on some CPUs
        if 0 < width < least:
            raise UserError(f"--width must be 0, the usual one, or at least {least} at --size {size}, not {width}")
        check_device(self.device)

    def ignored(self) -> dict[str, str]:
        """Settings that do nothing, with the reason: a command line must not name them."""
        cases = [
            (self.optimizer == "sgd", "--optimizer sgd", ("muon_momentum",)),
            (not self.window, "--window 0", ("visits",)),
            (not self.lam, "--lam 0", ("kl_temperature",)),
            (not self.jitter, "--jitter 0", ("jitter_p",)),
            (self.dataset.startswith("shapes"), f"--dataset {self.dataset} (folder: your own images)", ("data_dir",)),
            (self.dataset != "folder", f"--dataset {self.dataset}", ("fit", "workers", "cache_dir", "cache_gb")),
        ]
        return {name: why for idle, why, names in cases if idle for name in names}

    def check_for(self, count: int) -> None:
        """Raises UserError, naming the flag, for values that do not fit count training images."""
        if count < 2:
            raise UserError(f"the dataset has {count} training image: at least two are needed")
        if self.batch_size > count:
            images = f"the dataset, which has {count} training images"
            raise UserError(f"--batch-size {self.batch_size} is larger than {images}: try {max(2, count // 2)}")
        rows = self.rows(count)
        if rows < self.batch_size:
            raise UserError(f"--window {self.window} is smaller than a batch of {self.batch_size}")
        entering = rows // min(self.visits, self.epochs)
        if rows < count and entering < 2 and self.bank_init == "forward":
            images = "one image would enter the window at a time, and BatchNorm needs two"
            raise UserError(f"--visits {self.visits}: {images}; take at most {rows // 2}")
        others = rows - self.batch_size
        if self.negatives > others:
            beside = f"the {others} rows that the bank has beside a batch"
            raise UserError(f"--negatives {self.negatives} is more than {beside}")


def check_device(name: str) -> None:
    try:
        pick_device(name)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--device: {error}") from error


def add_settings(parser: argparse.ArgumentParser, config_class) -> None:
    """A flag for every field of config_class; what is not given stays out of the result."""
    shared = {f.name for f in fields(Settings)}
    for f in sorted(fields(config_class), key=lambda f: f.name in shared):  # these come last in --help
        extra = {"type": type(f.default), "metavar": f.name.upper()}
        if isinstance(f.default, bool):
            extra = {"action": argparse.BooleanOptionalAction}
        choices = f" ({', '.join(f.metadata['choices'])})" if f.metadata["choices"] else ""
        text = f"{f.metadata['help']}{choices} [{f.default}]".replace("%", "%%")
        parser.add_argument(flag(f.name), default=argparse.SUPPRESS, help=text, **extra)


# ------------------------------------------------------------------------------------------ scripts


class Stream:
    """A stream that can always be written to: what nobody can read is lost, the work goes on."""

    def __init__(self, stream):
        self.stream, self.error = stream or open(os.devnull, "w"), None
        with suppress(AttributeError, ValueError, OSError):
            self.stream.reconfigure(errors="backslashreplace")  # for streams that are strictly ASCII

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._attempt(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._attempt(self.stream.flush)

    def _attempt(self, call, *text: str) -> None:
        try:
            call(*text)
        except (OSError, ValueError) as error:  # full, without a reader, or closed
            self.error = self.error or error
            with suppress(OSError, ValueError):  # what waits in the buffer goes nowhere, now and when Python ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


@contextmanager
def trap(handler):
    """SIGINT, SIGTERM and SIGHUP go to handler(number, frame); but SIGHUP not under nohup."""
    with ExitStack() as stack:
        for number in STOPPING:
            if number in STOPPING[:2] or signal.getsignal(number) is not signal.SIG_IGN:
                with suppress(ValueError):  # not the main thread: signals are somebody else's business
                    stack.callback(signal.signal, number, signal.signal(number, handler))
        yield


def outcome(call, script: str, stopped: str) -> tuple[int, str]:
    """The exit status of call(), and the line that says why it is not 0."""
    try:
        return call() or 0, ""
    except SystemExit as end:  # --help
        return end.code or 0, ""
    except UserError as error:
        return 2, f"{script}: {error}"
    except KeyboardInterrupt as interrupt:
        message, number = interrupt.args or (stopped, signal.SIGINT)
        return 128 + number, message
    except (MemoryError, RuntimeError, OSError) as error:
        if any(words in repr(error) for words in NO_MEMORY):
            advice = "take fewer or smaller images, a smaller --batch-size, --size, --width or --dim, or fewer --jobs"
            return 2, f"{script}: out of memory: {advice}; what was saved before is kept"
        if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            why = str(error).splitlines()[0]
            return 2, f"{script}: --compile: torch.compile failed ({why}); --no-compile does without"
        if not getattr(error, "filename", None):
            raise
        return 2, f"{script}: {error.filename}: {error.strerror or error}"


def command(main, name: str = "", stopped: str = "stopped; what was saved before is kept"):
    """The main() of a script as a function that returns its exit status.

    0, or what main returns; 2 after a UserError, told in one line; 130 after Ctrl-C (143 after
    SIGTERM, 129 after SIGHUP), when `stopped` or the interruption's own message says what was kept.
    Where nobody can read what it prints, the work goes on: 141 if the reader went away, as after
    `| head`, 2 if the place was full.
    """

    @functools.wraps(main)
    def status(argv: list[str] | None = None) -> int:
        script = name or Path(main.__globals__["__file__"]).name
        message = f"{script}: {stopped}"

        def stop(number, _):
            raise KeyboardInterrupt(message, number)

        with redirect_stdout(Stream(sys.stdout)) as printed, redirect_stderr(Stream(sys.stderr)), trap(stop):
            ended, line = outcome(lambda: main(argv), script, message)
            printed.flush()
            if isinstance(printed.error, BrokenPipeError):
                ended = ended or 141  # 128 + SIGPIPE, a signal that not every system has
            elif printed.error and not ended:
                ended, line = 2, f"{script}: the work is done, but what it printed is lost ({printed.error})"
            if line:
                print(" ".join(line.splitlines()), file=sys.stderr, flush=True)
        return ended

    return status


def python() -> str:
    """How to call this Python from where the user is: `python`, if its environment is active."""
    if shutil.which("python") and Path(shutil.which("python")).absolute() == Path(sys.executable).absolute():
        return "python"
    executable, home = Path(sys.executable).absolute(), Path.cwd()
    return quoted(executable.relative_to(home) if executable.is_relative_to(home) else executable)


def quoted(place) -> str:
    """A path as a shell takes it, for a command to copy."""
    return shlex.quote(str(place))


def next_step(run: str, tested: bool, program: str = "eval_linear.py") -> str:
    """What to do with a finished run: evaluate it, or look at it if no images are kept for that."""
    if tested:
        return f"evaluate it with: {python()} {program} {quoted(run)}"
    return f"no images are kept to evaluate it with; look at it with: {python()} figures/page.py {quoted(run)}"
