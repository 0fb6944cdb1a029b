"""Settings as a dataclass with bounds, command lines made from them, errors in one line."""

import argparse
import functools
import math
import os
import shutil
import signal
import sys
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path

from plumbing.devices import pick_device

STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
MOVED = {"--momentum": "is now --bank-momentum (the bank's m); SGD's momentum is --sgd-momentum"}


class UserError(ValueError):
    """A mistake that the person at the keyboard can mend: one line, without a traceback."""


class DataLost(UserError):
    """Images can no longer be read, while the state of a run is still good: it can be saved."""


def loaded(loader):
    """The batches of a torch DataLoader. Raises DataLost, in one line, for what fails in it."""
    try:
        yield from loader
    except (OSError, RuntimeError, ValueError, SyntaxError) as error:  # a worker's error has its traceback as text
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        if isinstance(error, UserError):
            raise DataLost(reason.split("UserError: ")[-1]) from error
        advice = "" if "Error: " in reason else "; --workers 0 reads without further processes"
        raise DataLost(f"images cannot be loaded any more ({reason}){advice}") from error


def output(place: str) -> Path:
    """The `type` of an option that names a file to write: `Parser` checks it before any work."""
    return Path(place)


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line, and which says where an old flag went."""

    def __init__(self, *args, **options):
        super().__init__(*args, allow_abbrev=False, **options)

    def error(self, message: str):
        raise UserError(message)

    def parse_known_args(self, args=None, namespace=None):
        from plumbing.outputs import checked  # here: it needs UserError

        for word in sys.argv[1:] if args is None else args:
            flag_name = word.split("=")[0]
            if flag_name in MOVED and flag_name not in self._option_string_actions:
                raise UserError(f"{flag_name} {MOVED[flag_name]}")
        args, others = super().parse_known_args(args, namespace)
        for action in self._actions:
            place = getattr(args, action.dest, None)
            if place == [] and action.nargs != "*":  # what argparse makes of --out=--
                raise UserError(f"{action.option_strings[0]}: expected one argument")
            if action.type is output and place is not None:
                named = [value for key, value in vars(args).items() if key != action.dest]
                named = [value for value in named if isinstance(value, (str, Path)) and value]
                named += [Path(value, "last.pt") for value in named]
                checked(place, action.option_strings[0], named)
        return args, others


# ----------------------------------------------------------------------------------------- settings


def option(default, help, choices=None, above=None, at_least=None, at_most=None, free=False):
    """A field of a settings dataclass, its words for --help and its bounds.

    free: the setting may change when a run is resumed (where things lie, how fast they go).
    """
    bounds = {"above": above, "at_least": at_least, "at_most": at_most}
    return field(default=default, metadata={"help": help, "choices": choices, "free": free} | bounds)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# What no machine or method could use; a number without an entry may be 10^9 at most.
MOST = {
    "size": 1024, "eval_size": 1024, "size_start": 1024, "width": 2048, "hidden": 2**16, "dim": 2**16, "layers": 32,
    "epochs": 10**6, "warmup": 10**6, "batch_size": 2**20, "workers": 256, "lr": 1e6, "seed": 2**63 - 1,
}  # fmt: skip


def check_bounds(config, choices: bool = True) -> None:
    """Raises UserError, naming the flag, for a value of another type, or outside its bounds."""
    for f in fields(config):
        value, about, name = getattr(config, f.name), f.metadata, flag(f.name)
        kind = (int, float) if type(f.default) is float else type(f.default)
        if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
            raise UserError(f"{name} must be of the type {type(f.default).__name__}, not {value!r}"[:200])
        if choices and about["choices"] and value not in about["choices"]:
            raise UserError(f"{name}: unknown {value!r}, choose from {', '.join(about['choices'])}")
        if isinstance(value, (int, float)) and value > MOST.get(f.name, 10**9):
            raise UserError(f"{name} must be at most {MOST.get(f.name, 10**9):g}, not {value:g}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{name} must be a finite number, not {value}")
        low, high = about["at_least"], about["at_most"]
        if about["above"] is not None and not value > about["above"]:
            raise UserError(f"{name} must be greater than {about['above']}, not {value}")
        if low is not None and high is not None and not low <= value <= high:
            raise UserError(f"{name} must lie in [{low}, {high}], not {value}")
        if low is not None and not value >= low:
            words = "must not be negative" if low == 0 else f"must be at least {low}"
            raise UserError(f"{name} {words}, not {value}")


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
    workers: int = option(2, "processes that decode images which do not fit in memory", at_least=0, free=True)
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
        check_device(self.device)

    def ignored(self) -> tuple[str, ...]:
        """Settings that do nothing with the others, and are refused on a command line."""
        return ()

    def check_for(self, count: int) -> None:
        """Raises UserError, naming the flag, for values that do not fit count training images."""
        if self.batch_size > count:
            images = f"the dataset, which has {count} training images"
            raise UserError(f"--batch-size {self.batch_size} is larger than {images}")
        if 0 < self.window < self.batch_size:
            raise UserError(f"--window {self.window} is smaller than a batch of {self.batch_size}")
        others = count - self.batch_size
        if self.negatives > others:
            rows = f"the {others} rows that the bank has beside a batch"
            raise UserError(f"--negatives {self.negatives} is more than {rows}")


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

    def _attempt(self, call, *words) -> None:
        try:
            call(*words)
        except (OSError, ValueError) as error:  # full, without a reader, or closed
            self.error = self.error or error

    def write(self, text: str) -> int:
        self._attempt(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._attempt(self.stream.flush)
        if self.error:  # what waits in the buffer is written when Python ends: to nowhere
            self._attempt(lambda: os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno()))


@contextmanager
def streams():
    """stdout and stderr as `Stream`s."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(Stream, before)
    try:
        yield sys.stdout
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        sys.stdout, sys.stderr = before


@contextmanager
def raised_signals(message: str):
    """SIGTERM and SIGHUP raise KeyboardInterrupt(message, number), and Ctrl-C raises it at all."""

    def stop(number, _):
        raise KeyboardInterrupt(message, number)

    with ExitStack() as stack:
        for number in STOPPING:
            handler = signal.default_int_handler if number == signal.SIGINT else stop
            with suppress(ValueError):  # not the main thread: signals are somebody else's business
                if signal.getsignal(number) is not signal.SIG_IGN:
                    stack.callback(signal.signal, number, signal.signal(number, handler))
        yield


def out_of_memory(error: BaseException) -> bool:
    """Whether memory was not enough: Python's, torch's and the system's words for it."""
    words = ("out of memory", "allocate memory", "bad_alloc", "start new thread")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


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
        if out_of_memory(error):
            advice = "take fewer or smaller images, a smaller --batch-size, --size, --width or --dim, or fewer --jobs"
            return 2, f"{script}: out of memory: {advice}; what was saved before is kept"
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
        with streams() as printed, raised_signals(message):
            ended, line = outcome(lambda: main(argv), script, message)
            printed.flush()
            if isinstance(printed.error, BrokenPipeError):
                ended = ended or 141  # 128 + SIGPIPE, a signal that not every system has
            elif printed.error and not ended:
                ended, line = 2, f"{script}: the work is done, but what it printed is lost ({printed.error})"
            if line:
                print(" ".join(line.splitlines()), file=sys.stderr)
        return ended

    return status


def python() -> str:
    """How to call this Python from where the user is: `python`, if its environment is active."""
    if shutil.which("python") and Path(shutil.which("python")).absolute() == Path(sys.executable).absolute():
        return "python"
    executable, home = Path(sys.executable).absolute(), Path.cwd()
    return str(executable.relative_to(home)) if executable.is_relative_to(home) else str(executable)


def next_step(run: str, labelled: bool, program: str = "eval_linear.py") -> str:
    """What to do with a finished run: evaluate it, or look at it if its images have no labels."""
    if labelled:
        return f"evaluate it with: {python()} {program} {run}"
    return f"its images have no labels to evaluate with; look at it with: {python()} figures/page.py {run}"
