"""A run's folder: config.json, metrics.jsonl (a line per epoch), progress.png and last.pt.

last.pt is the checkpoint. A new one is written next to the old one and then renamed, so a whole
one exists at every moment. It loads with `torch.load(..., weights_only=True)`: plain numbers,
strings and tensors.
"""

import json
import math
import os
import signal
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import asdict, fields, replace
from multiprocessing import parent_process
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from plumbing.automatic import chosen
from plumbing.command_line import (
    DataLost,
    Parser,
    Settings,
    UserError,
    add_settings,
    check_bounds,
    flag,
    python,
    quoted,
    trap,
)
from plumbing.fingerprints import check_same, fingerprint
from plumbing.outputs import RUN_FILES, check_folder, check_zip, locked, replacing, save_tensors, save_text


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, after the run was saved; args are (message, signal number)."""


# -------------------------------------------------------------------------------------- checkpoints


def read_checkpoint(place: str, kind=Settings) -> dict:
    """The checkpoint in a run's folder, or a checkpoint file, on the CPU, checked.

    Its config has types and bounds of `kind`, where that knows the setting.
    Raises UserError if the file is not a whole checkpoint.
    """
    path = Path(place) / "last.pt" if Path(place).is_dir() else Path(place)
    if not place or not path.is_file():
        about = "a run's folder holds one after its first epoch" if Path(place).exists() else "no such file or folder"
        raise UserError(f"{place or repr(place)}: no checkpoint there ({about})")
    try:
        check_zip(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        _check_content(checkpoint)
        return checkpoint | {"config": _checked_config(checkpoint["config"], kind)}
    except Exception as error:  # torch's readers raise a dozen kinds, and the checks stumble over what they expect
        reason = str(error) if isinstance(error, UserError) else type(error).__name__
        raise UserError(f"{path}: damaged or not a checkpoint ({reason})") from error


NUMBER = (int, float)
CONTENT = {
    "config": dict, "encoder": dict, "optimizer": dict, "step": int, "sums": Tensor, "seconds": NUMBER, "history": list,
}  # fmt: skip
LOOKS = ("knn", "recovered", "rank")  # figures of an epoch that `train.figures` may add


def _check_content(checkpoint: dict) -> None:
    """Raises UserError for what is missing, of another type or not finite."""
    _check_types(checkpoint, CONTENT)
    for name, x in _tensors(checkpoint, ""):
        if x.layout != torch.strided or x.untyped_storage().nbytes() < x.nbytes:
            raise UserError(f"{name} is no plain tensor")
        if not torch.isfinite(x).all() or (name.endswith("running_var") and (x < 0).any()):
            raise UserError(f"{name} has values that are not finite: the run diverged, or the file is damaged")
    bank, images = checkpoint.get("bank", {}), checkpoint.get("images", {})
    _check_types(images, {"files": Tensor, "sample": str} if images else {})
    for state in (checkpoint["encoder"], bank):
        _check_types(state, dict.fromkeys(state, Tensor))
    for row in checkpoint["history"]:
        names = ["epoch", "step", "loss", "lr", "seconds"] + ["nce"] * bool(bank) + [n for n in LOOKS if n in row]
        _check_types(row, dict.fromkeys(names, NUMBER))
    low, high = checkpoint.get("span") or (0, 1)
    _check_types({"low": low, "high": high}, {"low": NUMBER, "high": NUMBER})
    _check_types({"side": 0} | checkpoint, {"side": int})
    files = images and images["files"]
    if (bank and bank["weight"].ndim != 2) or (images and (files.dtype, files.ndim) != (torch.long, 1)):
        raise UserError("the rows of its bank, or its list of images, have another shape")


def _check_types(content: dict, types: dict) -> None:
    for name, kind in types.items():
        value = content.get(name)
        if not isinstance(name, str) or not isinstance(value, kind):
            raise UserError(f"{name} is missing or of the wrong type")
        if kind is NUMBER and not math.isfinite(value):
            raise UserError(f"{name} is not finite")


def _tensors(content, name: str):
    """(name, tensor) of every tensor in nested dictionaries and lists."""
    if isinstance(content, Tensor):
        yield name, content
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield from _tensors(value, f"{name}.{key}".strip("."))


def _checked_config(config: dict, kind) -> dict:
    """Settings with the types and bounds of kind. They name no place outside to write to."""
    known = {f.name: config[f.name] for f in fields(kind) if f.name in config}
    missing = {f.name for f in fields(kind.__mro__[-3:][0])} - known.keys()  # those of lab.train may be missing
    if missing:
        raise UserError(f"its settings lack {', '.join(sorted(missing))}")
    check_bounds(kind(**known), choices=False)
    for name in ("cache_dir", "data_dir"):
        place, dataset = Path(config[name]), config["dataset"]
        read = name == "data_dir" and (dataset == "folder" or any(place.glob(dataset[:5] + "*")))  # not written to
        if not read and not place.resolve().is_relative_to(Path.cwd().resolve()):
            config = config | {name: getattr(kind, name, "data")}
    return config


def load_state(target, state: dict, name: str) -> None:
    """Load a state_dict. Raises UserError that starts with `name` if it does not fit the target."""
    own = [dict(group) for group in getattr(target, "param_groups", ())]
    try:
        target.load_state_dict(state)
        for before, group in zip(own, getattr(target, "param_groups", ())):
            changed = [k for k in before.keys() & group.keys() - {"lr", "params"} if before[k] != group[k]]
            fits = all(x is None or x.shape == p.shape for p in group["params"] for x in target.state[p].values())
            if changed or not fits:
                raise ValueError(f"{', '.join(changed) or 'momentum'} of the optimizer differs")
    except Exception as error:  # torch's loaders raise many kinds
        words = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
        raise UserError(f"{name} has another shape ({words})") from error


# ---------------------------------------------------------------------------- the settings of a run


def configure(config_class, recipes: dict, argv: list[str] | None, description: str, automatic: bool = False):
    """The settings that a command line asks for, and the checkpoint to resume from, if any.

    automatic: without --recipe, settings follow from the pictures of a folder, and a line says so.
    """
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
    _refuse_idle(config, given)
    refuse_to_replace(config.folder(), overwrite)
    check_folder(config.folder())
    if automatic and not recipe and config.dataset == "folder":
        config = replace(config, **chosen(config.data_dir, given))
    config.overwrite = overwrite
    return config, None


def _refuse_idle(config, given: dict) -> None:
    """Raises UserError for a flag that does nothing, and for SGD with Muon's weight decay."""
    for name, why in config.ignored().items():
        if name in given:
            raise UserError(f"{flag(name)} means nothing with {why}: leave it out")
    if config.optimizer == "sgd" and config.lr * config.weight_decay > 0.05 * (1 - config.sgd_momentum):
        problem = f"SGD at rate {config.lr:g} with weight decay {config.weight_decay:g} shrinks the weights to nothing"
        raise UserError(f"--optimizer sgd: {problem}; try --weight-decay 1e-4")


def refuse_to_replace(folder: Path, overwrite: bool = False) -> None:
    if (folder / "last.pt").exists() and not overwrite:
        advice = f"--resume {quoted(folder)} goes on with it, --out starts elsewhere, --overwrite anew"
        raise UserError(f"{folder} holds a run: {advice}")


def _resumed(config_class, place: str, given: dict):
    """The settings in a checkpoint, with what may change changed; the run goes on in its folder."""
    checkpoint = read_checkpoint(place, config_class)
    settings = {f.name: f for f in fields(config_class)}
    if unknown := ", ".join(sorted(checkpoint["config"].keys() - settings)):
        advice = "if python -m lab.train made the run, resume it there"
        raise UserError(f"--resume {place}: has settings that this program does not know ({unknown}): {advice}")
    before = config_class(**checkpoint["config"])
    for name, value in given.items():
        had = getattr(before, name)
        if not settings[name].metadata["free"] and value != had:
            advice = f"; to train on, start a new run: python -m lab.train --init-from {quoted(place)} --epochs {value}"
            advice = advice * (name == "epochs")
            raise UserError(f"--resume {place}: the run has {flag(name)} {had}, it cannot go on with {value}{advice}")
    for name in {"bank", "loss"} - given.keys():
        if getattr(before, name):  # a stranger's checkpoint must not choose what code runs
            had = f"{flag(name)} {getattr(before, name)}"
            raise UserError(f"--resume {place}: the run was trained with {had}: name the file again")
    file = Path(place) / "last.pt" if Path(place).is_dir() else Path(place)
    config = replace(before, **({"out": str(file.parent)} | given))
    last = config.folder() / "last.pt"
    if last.exists() and not last.samefile(file):
        problem = f"{config.folder()} holds a run, whose last.pt would be replaced"
        raise UserError(f"--resume {place}: {problem}; name another folder with --out")
    return config, checkpoint


# -------------------------------------------------------------------------------------- the journal


PACE = 100  # steps, from whose time a run's length is told


class Journal:
    """Keeps a run's folder: counts its steps, adds up its losses, notes its epochs, saves.

    config is the run's settings, run its learner, images its `Images`, resume a checkpoint.
    As a context it makes the folder and shows the progress bar; a FloatingPointError inside becomes
    a UserError that says where training diverged. A quiet journal writes and prints nothing.
    """

    quiet = False

    def __init__(self, config, run, images, resume: dict | None = None):
        self.config, self.run, self.count, self.path = config, run, len(images), config.folder()
        self.images = fingerprint(images)
        self.span = images.span and [images.span.low, images.span.high]  # of pictures of more than 8 bits
        self.side = images.side
        self.per_epoch = self.count // config.batch_size  # the last images of an epoch's order wait for the next
        self.total, self.lr = config.epochs * self.per_epoch, config.lr
        self.step, self.seconds, self.history = 0, 0.0, []
        sums = torch.zeros(len(run.LOSSES), dtype=torch.float64)
        self.resumed, self.held = bool(resume), ExitStack()
        if resume:
            check_same(resume.get("images"), self.images, f"--resume {self.path}")
            run.load(resume)
            if not 0 <= resume["step"] <= self.total or resume["sums"].shape != sums.shape:
                raise UserError(f"--resume: step {resume['step']} of {self.total} and its losses do not fit the run")
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
        self.paced = self.step + 1  # the first step here compiles, and is not typical
        return self

    def __exit__(self, kind, error, _):
        self.bar.close()
        with self.held:
            if kind is FloatingPointError:
                raise self.diverged() from None
            if isinstance(error, DataLost):
                rows = self.config.rows(self.count)
                moving = rows < self.count and self.step % (rows // self.config.batch_size) == 0
                if self.step and not moving:  # images may be entering a window: no state to save
                    self.interrupted(getattr(error, "signal", 0), str(error))
                raise UserError(f"{error}; {self._kept()}") from error

    @property
    def epoch(self) -> int:
        """The epochs that are complete."""
        return self.step // self.per_epoch

    def add(self, losses: Tensor) -> None:
        """Count a step and its losses (as many as run.LOSSES)."""
        self.bar.set_description(f"epoch {self.epoch + 1}/{self.config.epochs}", refresh=False)
        self.sums += losses.to(self.sums.device)
        self.step += 1
        self.bar.update(self.config.batch_size)
        if self.step in (self.paced, self.paced + PACE) and not self.quiet:
            self._forecast(time.perf_counter() - self.started)

    def _forecast(self, seconds: float) -> None:
        """After a hundred steps, a line says how long the others will take; without looks."""
        if self.step == self.paced:
            self.before = seconds
        elif self.step < self.total:
            left, each = self.total - self.step, (seconds - self.before) / PACE
            minutes = math.ceil(left * each / 60)
            self.bar.write(f"{each:.3g} s per step on this machine: {left} more steps take about {minutes} min")

    def epoch_ends(self, look) -> None:
        """Note the mean losses of an epoch and what look() gives, save where it is due, draw."""
        c, last = self.config, self.step == self.total
        sums = self.sums.tolist()  # the one wait for a GPU in an epoch
        if not all(map(math.isfinite, sums)):
            raise self.diverged()
        self.seconds = time.perf_counter() - self.started
        row = {"epoch": self.epoch, "step": self.step, "lr": self.lr, "seconds": round(self.seconds, 1)}
        row |= {name: value / self.per_epoch for name, value in zip(self.run.LOSSES, sums)}
        self.history.append(row)
        self.sums.zero_()
        try:
            row |= look()
        except DataLost:  # of the test images: the epoch itself is whole
            self.save()
            raise
        self.bar.set_postfix(loss=f"{row['loss']:.3f}", **{k: f"{row[k]:.1%}" for k in LOOKS[:2] if k in row})
        if last or self.epoch % c.save_every == 0:
            self.save()
        elif not self.quiet:
            self._save_metrics()
        if not self.quiet and (last or (c.knn_every and self.epoch % c.knn_every == 0)):
            draw_progress(self.history, self.run.choices, self.path / "progress.png")
        self.started = time.perf_counter() - self.seconds  # looking and saving are not training

    def save(self) -> None:
        """Write the checkpoint, unless losses or weights are no longer finite."""
        if not all(torch.isfinite(x).all() for x in (self.sums, *self.run.encoder.parameters())):
            raise self.diverged()
        state = self.run.state()  # in every process: a bank in parts is collected from all
        progress = {"config": asdict(self.config), "step": self.step, "sums": self.sums.cpu()}
        progress |= {"seconds": self.seconds, "history": self.history, "images": self.images}
        progress |= {"span": self.span, "side": self.side}
        if not self.quiet:
            save_tensors(state | progress, self.path / "last.pt", "the checkpoint")
            self._save_metrics()

    def interrupted(self, number: int, reason: str = "") -> None:
        """Save in the middle of an epoch. Raises Interrupted, or UserError if there is a reason."""
        self.seconds = time.perf_counter() - self.started
        self.save()
        program = "train.py" if type(self.config).__module__ in ("train", "__main__") else "-m lab.train"
        again = f"{python()} {program} --resume {quoted(self.path)}"
        message = f"stopped after step {self.step} of {self.total}, saved; go on with: {again}"
        raise UserError(f"{reason}; {message}") if reason and not number else Interrupted(message, number)

    def _kept(self) -> str:
        place = self.path / "last.pt"
        return f"{place} is the last good checkpoint" if place.exists() else "nothing was saved yet"

    def diverged(self) -> UserError:
        problem = f"the loss is no longer finite at step {self.step}, learning rate {self.lr:.4g}"
        return UserError(f"{problem}: try a smaller --lr; {self._kept()}")

    def _start_folder(self) -> None:
        """Make the folder and note the settings in it; an older checkpoint goes, unless resumed."""
        try:
            busy = f"--out {self.path}: another process is training there; wait for it, or name another folder"
            self.held.enter_context(locked(self.path, busy))
            refuse_to_replace(self.path, self.resumed or getattr(self.config, "overwrite", True))
            for name in [f"{name}*.part" for name in RUN_FILES] + ["last.pt"] * (not self.resumed):
                for file in self.path.glob(name):  # a part is what a killed run leaves
                    file.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"--out {self.path}: cannot write there ({error.strerror})") from error
        settings = asdict(self.config) | {"precision": self.run.encoder.precision}
        save_text(json.dumps(settings, indent=1) + "\n", self.path / "config.json", "the configuration")
        self._save_metrics()

    def _save_metrics(self) -> None:
        lines = "".join(json.dumps(row) + "\n" for row in self.history)
        save_text(lines, self.path / "metrics.jsonl", "the metrics")


def draw_progress(history: list[dict], choices: int | None, path: Path) -> None:
    """The NCE loss, and the kNN accuracy or the figures without labels, over epochs.

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
        left.axhline(math.log(choices), color="gray", linestyle="--", linewidth=1, label=f"guessing: ln {choices}")
        left.legend(fontsize=8)
    left.set(xlabel="epoch", ylabel=words, title="telling the images apart")
    _draw_looks(history, right)
    for axis in (left, right):
        axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    with replacing(path, "the picture") as place:
        figure.savefig(place, dpi=110, format="png")
    plt.close(figure)


def _draw_looks(history: list[dict], axis) -> None:
    """kNN, or without labels the share of recovered pictures and, on a second axis, the rank."""
    blind = any("recovered" in row for row in history)
    looks = [row for row in history if ("recovered" if blind else "knn") in row]
    epochs, shares = [row["epoch"] for row in looks], [100 * row["recovered" if blind else "knn"] for row in looks]
    axis.plot(epochs, shares, "o-", color="#d55e00")
    axis.set(xlabel="epoch", ylabel="kNN accuracy, %", title="what the features know of the classes")
    if blind:
        axis.set(ylabel="recovered, %", title="what the features know of the pictures")
        second = axis.twinx()
        second.plot(epochs, [row["rank"] for row in looks], "s--", color="#009e73")
        second.set_ylabel("effective rank (dashed)")
        axis.set_ylim(0, 100), second.set_ylim(bottom=0)


class SignalCatcher:
    """Within it, Ctrl-C, SIGTERM and SIGHUP are noted in `signal`; a second acts as usual."""

    signal = 0

    def __enter__(self):
        self.caught = ExitStack()
        self.caught.enter_context(trap(self._note))
        return self

    def _note(self, number: int, _) -> None:
        self.signal = number
        self.caught.close()
        if number == signal.SIGINT and not parent_process():
            with suppress(OSError, ValueError):  # unbuffered: the signal may have come while a line was written
                os.write(sys.stderr.fileno(), b"\nstopping after this step and saving; again to stop at once\n")

    def __exit__(self, kind, error, _):
        self.caught.close()
        if isinstance(error, DataLost):
            error.signal = self.signal  # a signal to the whole group ends the workers first
