"""A run's folder: config.json, metrics.jsonl (one line an epoch), progress.png and last.pt, the checkpoint.

A checkpoint is written beside the old one and renamed into its place, so at every moment a whole one exists, and it
loads with `torch.load(..., weights_only=True)`: plain numbers, strings and tensors.
"""

import copy
import json
import math
import os
import signal
from contextlib import contextmanager
from pathlib import Path

import torch

from images import UserError
from models import Encoder


def read_checkpoint(place: str) -> dict:
    """The checkpoint of a run's folder, or a checkpoint file, on the CPU. Raises UserError if it is not a whole one."""
    path = Path(place) / "last.pt" if Path(place).is_dir() else Path(place)
    if not path.is_file():
        raise UserError(f"{place}: no checkpoint there (a run's folder holds one after its first epoch)")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's readers raise a dozen kinds for a file that is not what they expect
        raise UserError(f"{path}: damaged or not a checkpoint ({type(error).__name__})") from error
    if not isinstance(checkpoint, dict) or not {"config", "encoder", "optimizer"} <= checkpoint.keys():
        raise UserError(f"{path}: not a checkpoint of train.py")
    return checkpoint


def new_encoder(config: dict) -> Encoder:
    """The encoder of a run as it was built, before any step: the same seed gives the same weights."""
    torch.manual_seed(config["seed"])
    arch, size, width, dim, layers, hidden = (config[k] for k in ("arch", "size", "width", "dim", "layers", "hidden"))
    layers = layers if config.get("method", "ours") == "ours" else 0  # the others bring heads of their own
    return Encoder(arch, size, width or None, dim, layers, hidden, config.get("drop_last_stage", False))


def restore_last_stage(encoder: Encoder, config: dict) -> Encoder:
    """A copy of an encoder that was trained with --drop-last-stage, with that stage added as it is before any step."""
    whole, encoder = new_encoder(config | {"drop_last_stage": False}), copy.deepcopy(encoder)
    encoder.backbone.layer4, encoder.feature_dim = whole.backbone.layer4, whole.feature_dim
    return encoder  # its projector, which no probe reads, fits the features before that stage


@contextmanager
def replacing(path: Path, name: str):
    """Yields a place beside `path` to write to. It takes the place of `path` if all went well and vanishes otherwise.

    What was there before therefore survives a full disk and an interruption. Raises UserError, with `name` in front.
    """
    part = path.with_name(path.name + ".part")
    try:
        yield part
        part.replace(path)
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        reason, kept = str(error).splitlines()[0], "; what was there before is untouched" if path.is_file() else ""
        raise UserError(f"{name} {path} cannot be written ({reason}): is the disk full?{kept}") from error
    finally:
        part.unlink(missing_ok=True)


def save_tensors(content, path: Path, name: str) -> None:
    with replacing(path, name) as part, open(part, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def save_text(text: str, path: Path, name: str) -> None:
    with replacing(path, name) as part:
        part.write_text(text)


def start_folder(out: Path, config: dict, keep: bool) -> None:
    """Make the folder and note the configuration in it; without keep, an older checkpoint goes."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not keep:
            (out / "last.pt").unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot write there ({error.strerror})") from error
    save_text(json.dumps(config, indent=1) + "\n", out / "config.json", "the configuration")


def save_metrics(out: Path, history: list[dict]) -> None:
    save_text("".join(json.dumps(row) + "\n" for row in history), out / "metrics.jsonl", "the metrics")


def draw_progress(history: list[dict], choices: int | None, path: Path) -> None:
    """The NCE loss beside ln M, what guessing among M rows of the bank costs, and the kNN accuracy, epoch by epoch.

    Without a bank (choices None), the loss alone.
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
    with replacing(path, "the picture") as part:
        figure.savefig(part, dpi=110, format="png")
    plt.close(figure)


class SignalCatcher:
    """Within it, Ctrl-C and SIGTERM are noted in `signal` instead of raised; a second one acts as usual."""

    signal = 0

    def __enter__(self):
        def note(number, _):
            self.signal = number
            signal.signal(number, self.before[number])

        try:
            self.before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: signals are somebody else's business
            self.before = {}

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
