"""Settings as a dataclass with bounds, command lines made from them, errors in one line."""

import argparse
import functools
import math
import os
import shutil
import signal
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

from plumbing.devices import pick_device

MOVED = {"--momentum": "is now --bank-momentum (the bank's m); SGD's momentum is --sgd-momentum"}


class UserError(ValueError):
    """A mistake that the person at the keyboard can mend: one line, without a traceback."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line, and which says where an old flag went."""

    def __init__(self, *args, **options):
        super().__init__(*args, allow_abbrev=False, **options)

    def error(self, message: str):
        raise UserError(message)

    def parse_known_args(self, args=None, namespace=None):
        for word in sys.argv[1:] if args is None else args:
            flag_name = word.split("=")[0]
            if flag_name in MOVED and flag_name not in self._option_string_actions:
                raise UserError(f"{flag_name} {MOVED[flag_name]}")
        return super().parse_known_args(args, namespace)


# ----------------------------------------------------------------------------------------- settings


def option(default, help, choices=None, above=None, at_least=None, at_most=None, free=False):
    """A field of a settings dataclass, its words for --help and its bounds.

    free: the setting may change when a run is resumed (where things lie, how fast they go).
    """
    bounds = {"above": above, "at_least": at_least, "at_most": at_most}
    return field(default=default, metadata={"help": help, "choices": choices, "free": free} | bounds)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_bounds(config) -> None:
    """Raises UserError, naming the flag, for a value outside the bounds of its field."""
    for f in fields(config):
        value, about, name = getattr(config, f.name), f.metadata, flag(f.name)
        if about["choices"] and value not in about["choices"]:
            raise UserError(f"{name}: unknown {value!r}, choose from {', '.join(about['choices'])}")
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
    knn_every: int = option(5, "epochs between looks at the kNN accuracy (0: never)", at_least=0, free=True)
    save_every: int = option(1, "epochs between checkpoints; one more when the run ends", above=0, free=True)
    device: str = option("auto", "auto, cpu, cuda or mps", free=True)
    precision: str = option("auto", "numbers that the network computes in", ("auto", "fp32", "bf16"))
    compile: bool = option(False, "compile the encoder with torch.compile", free=True)
    workers: int = option(2, "processes that decode images which do not fit in memory", at_least=0, free=True)
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


def command(main, name: str = "", stopped: str = "stopped, nothing was written"):
    """The main() of a script as a function that returns its exit status.

    0, or what main returns; 2 after a UserError, told in one line; 130 after Ctrl-C (143 after
    SIGTERM), when `stopped` or the interruption's own message says what was kept; 141 if nobody
    reads its output any more, as after `| head`.
    """

    @functools.wraps(main)
    def status(argv: list[str] | None = None) -> int:
        script = name or Path(main.__globals__["__file__"]).name
        try:
            ended = main(argv)
            sys.stdout.flush()
        except UserError as error:
            print(f"{script}: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt as interrupt:
            message, number = interrupt.args or (f"{script}: {stopped}", signal.SIGINT)
            print(message, file=sys.stderr)
            return 128 + number
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
            return 141  # 128 + SIGPIPE, a signal that not every system has
        return ended or 0

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
