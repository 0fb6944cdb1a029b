"""A run's folder: config.json, metrics.jsonl (a line per epoch), progress.png and last.pt.

last.pt is the checkpoint. A new one is written next to the old one and then renamed, so a whole
one exists at every moment. It loads with `torch.load(..., weights_only=True)`: plain numbers,
strings and tensors.
"""

import json
import math
import os
import signal
import time
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from plumbing.command_line import Parser, UserError, add_settings, flag, python


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, after the run was saved; args are (message, signal number)."""


# ----------------------------------------------------------------------------------- writing safely


@contextmanager
def replacing(path: Path, name: str):
    """Yields a place next to `path` to write to, which replaces `path` only if all went well.

    So a full disk or an interruption leaves the old file whole. Raises UserError that starts with
    `name`.
    """
    beside = path.with_name(path.name + ".part")
    try:
        yield beside
        beside.replace(path)
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        reason, kept = str(error).splitlines()[0], "; what was there before is untouched" if path.is_file() else ""
        raise UserError(f"{name} {path} cannot be written ({reason}): is the disk full?{kept}") from error
    finally:
        beside.unlink(missing_ok=True)


def save_tensors(content, path: Path, name: str) -> None:
    with replacing(path, name) as place, open(place, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def save_text(text: str, path: Path, name: str) -> None:
    with replacing(path, name) as place:
        place.write_text(text)


# -------------------------------------------------------------------------------------- checkpoints


def read_checkpoint(place: str) -> dict:
    """The checkpoint in a run's folder, or a checkpoint file, on the CPU.

    Its config has today's names. Raises UserError if the file is not a whole checkpoint.
    """
    path = Path(place) / "last.pt" if Path(place).is_dir() else Path(place)
    if not path.is_file():
        raise UserError(f"{place}: no checkpoint there (a run's folder holds one after its first epoch)")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's readers raise a dozen kinds
        raise UserError(f"{path}: damaged or not a checkpoint ({type(error).__name__})") from error
    if not isinstance(checkpoint, dict) or not {"config", "encoder", "optimizer"} <= checkpoint.keys():
        raise UserError(f"{path}: not a checkpoint of train.py")
    return checkpoint | {"config": migrate_config(checkpoint["config"])}


# Settings that left the core or became arguments, at the values that mean "off".
_OFF = {
    "method": "ours", "views": "single", "drop_last_stage": False, "size_start": 0, "init_from": "",
    "bank_dtype": "fp32", "shard_bank": False, "similarity_gb": 1.0,
    "kl_direction": "p||u", "kl_detach": True, "power": 0.5,
}  # fmt: skip


# What runs had before these settings existed.
BEFORE = {"optimizer": "sgd", "muon_momentum": 0.6, "window": 0, "visits": 8}


def migrate_config(config: dict) -> dict:
    """A stored configuration under today's names, with every setting that came later."""
    config = BEFORE | config
    if "momentum" not in config:
        return config
    config = {name: value for name, value in config.items() if name not in _OFF or value != _OFF[name]}
    return {"bank_momentum" if name == "momentum" else name: value for name, value in config.items()}


def load_state(target, state: dict, name: str) -> None:
    """Load a state_dict. Raises UserError that starts with `name` if it has another shape."""
    try:
        target.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"{name} has another shape ({str(error).splitlines()[-1].strip()})") from error


# ---------------------------------------------------------------------------- the settings of a run


def configure(config_class, recipes: dict, argv: list[str] | None, description: str):
    """The settings that a command line asks for, and the checkpoint to resume from, if any."""
    parser = Parser(description=description)
    parser.add_argument("--recipe", choices=recipes, help="settings to start from; other flags override them [laptop]")
    parser.add_argument("--resume", metavar="FILE_OR_RUN", help="go on with a run that stopped")
    parser.add_argument("--overwrite", action="store_true", help="start anew where --out holds a run already")
    add_settings(parser, config_class)
    given = vars(parser.parse_args(argv))
    recipe, resume, overwrite = given.pop("recipe"), given.pop("resume"), given.pop("overwrite")
    if resume is not None:
        if recipe or overwrite:
            raise UserError("--resume goes on with the run as it is: leave out --recipe and --overwrite")
        return _resumed(config_class, resume, given)
    config = config_class(**(recipes[recipe or "laptop"] | given))
    config.check()
    refuse_to_replace(config.folder(), overwrite)
    return config, None


def refuse_to_replace(folder: Path, overwrite: bool = False) -> None:
    if (folder / "last.pt").exists() and not overwrite:
        advice = f"--resume {folder} goes on with it, --out starts elsewhere, --overwrite anew"
        raise UserError(f"{folder} holds a run: {advice}")


def _resumed(config_class, place: str, given: dict):
    """The settings in a checkpoint, with what may change changed; the run goes on in its folder."""
    checkpoint = read_checkpoint(place)
    settings = {f.name: f for f in fields(config_class)}
    unknown = sorted(checkpoint["config"].keys() - settings)
    if unknown:
        advice = "if python -m lab.train made the run, resume it there"
        raise UserError(
            f"--resume {place}: has settings that this program does not know ({', '.join(unknown)}): {advice}"
        )
    before = config_class(**checkpoint["config"])
    for name, value in given.items():
        had = getattr(before, name)
        if not settings[name].metadata["free"] and value != had:
            raise UserError(f"--resume {place}: the run has {flag(name)} {had}, it cannot go on with {value}")
    home = Path(place) if Path(place).is_dir() else Path(place).parent
    config = replace(before, **({"out": str(home)} | given))
    if config.folder() != home:
        refuse_to_replace(config.folder())
    return config, checkpoint


# -------------------------------------------------------------------------------------- the journal


class Journal:
    """Keeps a run's folder: counts its steps, adds up its losses, notes its epochs, saves.

    config is the run's settings, run its learner, count the number of images, resume a checkpoint.
    As a context it makes the folder and shows the progress bar; a FloatingPointError inside becomes
    a UserError that says where training diverged. A quiet journal writes and prints nothing.
    """

    quiet = False

    def __init__(self, config, run, count: int, resume: dict | None = None):
        self.config, self.run, self.count, self.path = config, run, count, config.folder()
        self.per_epoch = count // config.batch_size  # the last images of an epoch's order wait for the next
        self.total, self.lr = config.epochs * self.per_epoch, config.lr
        self.step, self.seconds, self.history = 0, 0.0, []
        sums = torch.zeros(len(run.LOSSES), dtype=torch.float64)
        self.resumed, self.named = bool(resume), False
        if resume:
            run.load(resume)
            self.step, sums, self.seconds, self.history = (resume[k] for k in ("step", "sums", "seconds", "history"))
        # Losses add up on a GPU: looking at one stalls it, and `epoch_ends` looks at all of them.
        self.sums = sums.to(run.device if run.device.type == "cuda" else "cpu")

    def __enter__(self):
        c, batch = self.config, self.config.batch_size
        if not self.quiet:
            self._start_folder()
            where = f"{c.arch} on {self.run.device} in {self.run.encoder.precision}"
            if c.rows(self.count) < self.count:
                where += f", in windows of {c.window} with {min(c.visits, c.epochs)} visits"
            print(f"{c.dataset}: {self.count} images, {where}, {self.total} steps -> {self.path}")
        extent = {"total": self.total * batch, "initial": self.step * batch}
        self.bar = tqdm(**extent, unit=" images", unit_scale=True, smoothing=0.05, disable=self.quiet or None)
        if not self.resumed:
            self.bar.set_description("bank: one forward pass")
        self.started = time.perf_counter() - self.seconds
        return self

    def __exit__(self, kind, error, _):
        self.bar.close()
        if kind is FloatingPointError:
            raise self.diverged() from None

    @property
    def epoch(self) -> int:
        """The epochs that are complete."""
        return self.step // self.per_epoch

    def add(self, losses: Tensor) -> None:
        """Count a step and its losses (as many as run.LOSSES)."""
        if self.step % self.per_epoch == 0 or not self.named:
            self.named = True
            self.bar.set_description(f"epoch {self.epoch + 1}/{self.config.epochs}")
        self.sums += losses.to(self.sums.device)
        self.step += 1
        self.bar.update(self.config.batch_size)

    def epoch_ends(self, look) -> None:
        """Note the mean losses of an epoch and what look() gives, save where it is due, draw."""
        c, last = self.config, self.step == self.total
        sums = self.sums.tolist()  # the one wait for a GPU in an epoch
        if not all(map(math.isfinite, sums)):
            raise self.diverged()
        self.seconds = time.perf_counter() - self.started
        row = {"epoch": self.epoch, "step": self.step, "lr": self.lr, "seconds": round(self.seconds, 1)}
        row |= {name: value / self.per_epoch for name, value in zip(self.run.LOSSES, sums)}
        row |= look()
        if "knn" in row:
            self.bar.set_postfix(loss=f"{row['loss']:.3f}", knn=f"{row['knn']:.1%}")
        self.history.append(row)
        self.sums.zero_()
        if last or self.epoch % c.save_every == 0:
            self.save()
        elif not self.quiet:
            self._save_metrics()
        if not self.quiet and (last or (c.knn_every and self.epoch % c.knn_every == 0)):
            draw_progress(self.history, self.run.choices, self.path / "progress.png")
        self.started = time.perf_counter() - self.seconds  # looking and saving are not training

    def save(self) -> None:
        """Write the checkpoint, unless the weights are no longer finite."""
        if not all(torch.isfinite(p).all() for p in self.run.encoder.parameters()):
            raise self.diverged()
        state = self.run.state()  # in every process: a bank in parts is collected from all
        progress = {"config": asdict(self.config), "step": self.step, "sums": self.sums.cpu()}
        progress |= {"seconds": self.seconds, "history": self.history}
        if not self.quiet:
            save_tensors(state | progress, self.path / "last.pt", "the checkpoint")
            self._save_metrics()

    def interrupted(self, number: int) -> None:
        """Save in the middle of an epoch, and raise Interrupted."""
        if not all(map(math.isfinite, self.sums.tolist())):
            raise self.diverged()
        self.seconds = time.perf_counter() - self.started
        self.save()
        message = f"stopped after step {self.step} of {self.total}, saved"
        raise Interrupted(f"{message}; go on with: {self._program()} --resume {self.path}", number)

    def diverged(self) -> UserError:
        place = self.path / "last.pt"
        kept = f"{place} is the last good checkpoint" if place.exists() else "nothing was saved yet"
        problem = f"the loss is no longer finite at step {self.step}, learning rate {self.lr:.4g}"
        return UserError(f"{problem}: try a smaller --lr; {kept}")

    def _program(self) -> str:
        program = "train.py" if type(self.config).__module__ in ("train", "__main__") else "-m lab.train"
        return f"{python()} {program}"

    def _start_folder(self) -> None:
        """Make the folder and note the settings in it; an older checkpoint goes, unless resumed."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not self.resumed:
                (self.path / "last.pt").unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"--out {self.path}: cannot write there ({error.strerror})") from error
        settings = asdict(self.config) | {"precision": self.run.encoder.precision}
        save_text(json.dumps(settings, indent=1) + "\n", self.path / "config.json", "the configuration")
        self._save_metrics()

    def _save_metrics(self) -> None:
        lines = "".join(json.dumps(row) + "\n" for row in self.history)
        save_text(lines, self.path / "metrics.jsonl", "the metrics")


def draw_progress(history: list[dict], choices: int | None, path: Path) -> None:
    """The NCE loss and the kNN accuracy over epochs.

    ln M, what guessing among M rows of the bank costs, is a dashed line. Without a bank (choices
    None), the loss alone.
    """
    import matplotlib  # here: it takes a second to import

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), constrained_layout=True)
    key, words = ("nce", "NCE loss, nats") if choices else ("loss", "loss")
    left.plot([row["epoch"] for row in history], [row[key] for row in history], color="#0072b2")
    if choices:
        left.axhline(math.log(choices), color="gray", linestyle="--", linewidth=1)
        end = (history[-1]["epoch"], math.log(choices))
        left.annotate(f"guessing: ln {choices}", end, ha="right", va="top", color="gray", fontsize=8)
    left.set(xlabel="epoch", ylabel=words, title="telling the images apart")
    looks = [row for row in history if "knn" in row]
    right.plot([row["epoch"] for row in looks], [100 * row["knn"] for row in looks], "o-", color="#d55e00")
    right.set(xlabel="epoch", ylabel="kNN accuracy, %", title="what the features know of the classes")
    for axis in (left, right):
        axis.xaxis.get_major_locator().set_params(integer=True)
    with replacing(path, "the picture") as place:
        figure.savefig(place, dpi=110, format="png")
    plt.close(figure)


class SignalCatcher:
    """Within it, Ctrl-C and SIGTERM are noted in `signal`, not raised; a second acts as usual."""

    signal = 0

    def __enter__(self):
        def note(number, _):
            self.signal = number
            signal.signal(number, self.before[number])

        try:
            self.before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: signals are somebody else's business
            self.before = {}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
