"""Every setting of a run: one dataclass, the recipes, the checks, and the command line made from them."""

import argparse
import functools
import math
import os
import signal
import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import data
from bank import RULES
from images import UserError
from loss import DIRECTIONS
from models import ARCHITECTURES, MOBILE, RESNETS, pick_device
from runs import read_checkpoint

POSITIVE = "size layers hidden dim epochs save_every temperature kl_temperature lr crop_min cache_gb".split()
NOT_NEGATIVE = "subset holdout width size_start eval_size negatives lam cutmix weight_decay warmup knn_every workers similarity_gb".split()
VIEWS = ("single", "twice", "multicrop", "sslight")
SHARES = "momentum sgd_momentum crop_min jitter jitter_p gray blur power".split()
METHODS = ("ours", "simclr", "moco", "mocov2", "byol", "simsiam", "barlow", "dino")


def option(default, help, choices=None):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Config:
    """Every hyperparameter; each field is a flag of the same name (`lam` is lambda, `momentum` the bank's m)."""

    dataset: str = option("shapes", "what to train on", data.DATASETS)
    data_dir: str = option("data", "where the images lie, or are downloaded to")
    subset: int = option(0, "train on this many images only (0: all)")
    holdout: int = option(0, "use this many training images as the test set, to choose settings by")
    method: str = option("ours", "the method; the others are two-branch ones to compare with", METHODS)
    arch: str = option("resnet10", "backbone", ARCHITECTURES)
    width: int = option(
        0, "channels of a ResNet's first stage (0: 32 for resnet10, 64 for others) or of vit_tiny (0: 192)"
    )
    drop_last_stage: bool = option(False, "train a ResNet without its last stage, as S3L does (see eval_linear.py)")
    size: int = option(24, "side of the training views, pixels")
    size_start: int = option(0, "side of the views at the start, which grows to --size (0: --size all along)")
    eval_size: int = option(0, "side of the images in evaluation, pixels (0: their own, up to 4/3 of --size)")
    layers: int = option(2, "linear layers of the projector")
    hidden: int = option(2048, "hidden width of the projector")
    dim: int = option(2048, "D, the dimension of the embedding and of the bank's rows")
    temperature: float = option(0.07, "tau of the instance discrimination loss")
    momentum: float = option(0.75, "m of the bank's update, in [0, 1]")
    bank_init: str = option("forward", "how the bank starts; carry: from --init-from", ("forward", "random", "carry"))
    bank_update: str = option("corrected", "how the bank moves", RULES)
    bank_dtype: str = option("fp32", "numbers the bank is kept in; bf16 takes half the memory", ("fp32", "bf16"))
    negatives: int = option(1000, "K rows drawn beside the batch's own (0, or as many as there are: the whole bank)")
    lam: float = option(0.0, "lambda, the weight of SqrtKL")
    kl_temperature: float = option(1.0, "T of SqrtKL's softmax")
    kl_direction: str = option("p||u", "KL(P||u) or KL(u||P)", DIRECTIONS)
    kl_detach: bool = option(True, "hold u constant in SqrtKL")
    power: float = option(0.5, "exponent of P in SqrtKL's u, in [0, 1]")
    views: str = option("single", "the crops of an image that a step sees, see views.py", VIEWS)
    crop_min: float = option(0.2, "smallest area of a crop of --views single or twice, as a share of the image")
    jitter: float = option(0.4, "strength of brightness, contrast and saturation jitter; hue has a quarter of it")
    jitter_p: float = option(0.8, "probability of the colour jitter")
    gray: float = option(0.2, "probability of a greyscale view")
    blur: float = option(0.0, "probability of a Gaussian blur")
    cutmix: float = option(0.0, "alpha of CutMix (0: off)")
    epochs: int = option(36, "passes over the training images")
    batch_size: int = option(128, "images a step")
    lr: float = option(0.1, "peak learning rate of SGD")
    sgd_momentum: float = option(0.9, "momentum of SGD")
    weight_decay: float = option(1e-4, "weight decay of SGD")
    warmup: float = option(2.0, "epochs of linear warm-up before the cosine")
    seed: int = option(0, "seed of everything random but the choice of --subset and --holdout")
    init_from: str = option("", "start from the encoder of this run or checkpoint")
    out: str = option("", "folder of the run (empty: runs/<dataset>)")
    knn_every: int = option(5, "epochs between looks at the kNN accuracy (0: never)")
    save_every: int = option(1, "epochs between checkpoints; there is one at the end and when stopped, too")
    device: str = option("auto", "auto, cpu, cuda or mps")
    precision: str = option("auto", "auto, fp32 or bf16", ("auto", "fp32", "bf16"))
    compile: bool = option(False, "compile the encoder with torch.compile")
    workers: int = option(2, "processes that decode images which do not fit in memory")
    cache_gb: float = option(4.0, "decoded images up to this size are kept in memory, GB")
    cache_dir: str = option("runs/decoded", "decoded folders are kept here for the next start (empty: nowhere)")
    shard_bank: bool = option(False, "split the bank's rows over the processes of torchrun")
    similarity_gb: float = option(1.0, "similarities (B, N) up to this size are held whole, larger ones streamed, GB")

    def folder(self) -> Path:
        return Path(self.out or f"runs/{self.dataset}")

    def jitter_strengths(self) -> tuple[float, float, float, float]:
        return self.jitter, self.jitter, self.jitter, self.jitter / 4

    def check(self) -> None:
        """Raises UserError, naming the flag, for values that no dataset could make right."""
        for f in fields(self):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            if choices and value not in choices:
                raise UserError(f"{flag(f.name)}: unknown {value!r}, choose from {', '.join(choices)}")
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{flag(f.name)} must be a finite number, not {value}")
        for name in POSITIVE:
            if not getattr(self, name) > 0:
                raise UserError(f"{flag(name)} must be greater than 0, not {getattr(self, name)}")
        for name in NOT_NEGATIVE:
            if not getattr(self, name) >= 0:
                raise UserError(f"{flag(name)} must not be negative, not {getattr(self, name)}")
        for name in SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{flag(name)} must lie in [0, 1], not {getattr(self, name)}")
        if self.batch_size < 2:
            raise UserError(f"--batch-size must be at least 2 (BatchNorm needs two images), not {self.batch_size}")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed must lie in [0, 2^63), not {self.seed}")
        if self.arch == "vit_tiny" and self.eval_size not in (0, self.size):
            raise UserError(f"--eval-size: vit_tiny knows one side only, its --size {self.size}, not {self.eval_size}")
        check_device(self.device)
        if self.width and self.arch in MOBILE:
            raise UserError(f"--width is an option of {', '.join(RESNETS)} and vit_tiny, not of {self.arch}")
        if self.size_start and (self.size_start > self.size or self.views in ("multicrop", "sslight")):
            raise UserError(f"--size-start: at most --size {self.size}, with --views single or twice")
        if self.size_start and self.arch == "vit_tiny":
            raise UserError("--size-start: vit_tiny cuts images of one size in patches, leave it out")
        if self.cutmix and self.views != "single":
            raise UserError(f"--cutmix mixes single views: leave it out or --views {self.views}")
        if self.drop_last_stage and self.arch not in RESNETS:
            raise UserError(f"--drop-last-stage is an option of {', '.join(RESNETS)}, not of {self.arch}")
        if self.bank_init == "carry" and not (self.init_from and self.method == "ours"):
            raise UserError("--bank-init carry takes the bank of the run that --init-from names, with --method ours")


# laptop: the fields above; demo: a small network for `make demo`; released: the released script's CIFAR-10 command;
# gpu: CIFAR-10 on one GPU, NOT MEASURED YET. Its temperature, m, K = N / 5 and head are what is best or as good as any in the
# README's small runs, lr is the default's for four times the batch, and lr x weight decay the 1e-4 of the released script.
RECIPES = {
    "laptop": {},
    "demo": dict(width=16, dim=256, hidden=512, negatives=0, epochs=12, knn_every=3),
    "released": dict(
        arch="resnet18", size=32, layers=3, hidden=2048, dim=2048, temperature=0.2, momentum=0.5,
        bank_init="forward", bank_update="npid", negatives=10_000, lam=20.0, kl_temperature=1.0, cutmix=0.5,
        epochs=200, batch_size=512, lr=1.0, sgd_momentum=0.9, weight_decay=1e-4, warmup=0.0,
    ),
    "gpu": dict(
        dataset="cifar10", arch="resnet18", size=32, negatives=10_000, epochs=200, batch_size=512, lr=0.4,
        weight_decay=2.5e-4, warmup=10.0, save_every=10, compile=True,
    ),
}  # fmt: skip
# What may change when a run goes on: where things are and how fast they run.
FREE_ON_RESUME = {
    "out",
    "shard_bank",
    "data_dir",
    "knn_every",
    "save_every",
    "device",
    "compile",
    "workers",
    "cache_gb",
    "cache_dir",
    "similarity_gb",
}


# --------------------------------------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """One whose complaints are one line, like all others."""

    def error(self, message: str):
        raise UserError(message)


def command(main, name: str = "", stopped: str = "stopped, nothing was written"):
    """The main() of a script, whose exit status it gives: 0, or what main returns; 2 after a UserError, told in one line; 130 after Ctrl-C, when
    `stopped` says what was kept; 141 if nobody reads its output any more, as after `| head`."""

    @functools.wraps(main)
    def status(argv: list[str] | None = None) -> int:
        script = name or Path(main.__globals__["__file__"]).name
        try:
            ended = main(argv)
            sys.stdout.flush()
        except UserError as error:
            print(f"{script}: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print(f"{script}: {stopped}", file=sys.stderr)
            return 128 + signal.SIGINT
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
            return 141  # 128 + SIGPIPE, a signal that not every system has
        return ended or 0

    return status


def check_device(name: str) -> None:
    try:
        pick_device(name)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--device: {error}") from error


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def parse(argv: list[str] | None, description: str) -> tuple[Config, dict | None]:
    """The configuration that a command line asks for, and the checkpoint to resume from, if any."""
    parser = Parser(description=description, allow_abbrev=False)
    start = "settings to start from; other flags override them"
    parser.add_argument("--recipe", choices=RECIPES, help=f"{start} [laptop]")
    parser.add_argument("--resume", default="", metavar="FILE_OR_RUN", help="go on with a run that stopped")
    parser.add_argument("--overwrite", action="store_true", help="start anew where --out holds a run already")
    for f in fields(Config):
        extra = {"type": type(f.default), "metavar": f.name.upper()}
        if isinstance(f.default, bool):
            extra = {"action": argparse.BooleanOptionalAction}
        choices = f" ({', '.join(f.metadata['choices'])})" if f.metadata["choices"] else ""
        text = f"{f.metadata['help']}{choices} [{f.default}]"
        parser.add_argument(flag(f.name), default=argparse.SUPPRESS, help=text, **extra)
    given = vars(parser.parse_args(argv))
    recipe, resume, overwrite = given.pop("recipe"), given.pop("resume"), given.pop("overwrite")
    if resume:
        if recipe or overwrite:
            raise UserError("--resume goes on with the run as it is: leave out --recipe and --overwrite")
        return _resumed(resume, given)
    config = Config(**(RECIPES[recipe or "laptop"] | given))
    config.check()
    refuse_to_replace(config.folder(), overwrite)
    return config, None


def refuse_to_replace(folder: Path, overwrite: bool = False) -> None:
    if (folder / "last.pt").exists() and not overwrite:
        advice = f"--resume {folder} goes on with it, --out starts elsewhere, --overwrite anew"
        raise UserError(f"{folder} holds a run: {advice}")


def _resumed(place: str, given: dict) -> tuple[Config, dict]:
    """The configuration stored in a checkpoint, with what may change changed; it goes on in the folder it lies in."""
    checkpoint = read_checkpoint(place)
    try:
        before = Config(**checkpoint["config"])
    except TypeError as error:
        raise UserError(f"--resume {place}: written by another version of this code ({error})") from error
    for name, value in given.items():
        had = getattr(before, name)
        if name not in FREE_ON_RESUME and value != had:
            raise UserError(f"--resume {place}: the run has {flag(name)} {had}, it cannot go on with {value}")
    home = Path(place) if Path(place).is_dir() else Path(place).parent
    config = replace(before, **({"out": str(home)} | given))
    if config.folder() != home:
        refuse_to_replace(config.folder())
    return config, checkpoint
