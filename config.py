"""Every setting of a run: one dataclass, the recipes, the checks, and the command line made from them."""

import argparse
import math
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import data
from bank import RULES
from data import UserError
from loss import DIRECTIONS
from models import ARCHITECTURES, RESNETS, pick_device
from runs import read_checkpoint

POSITIVE = "size layers hidden dim epochs temperature kl_temperature lr crop_min cache_gb".split()
NOT_NEGATIVE = "subset holdout width eval_size negatives lam cutmix weight_decay warmup knn_every workers seed".split()
SHARES = "momentum sgd_momentum crop_min blur".split()


def option(default, help, choices=None):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Config:
    """Every hyperparameter; each field is a flag of the same name (`lam` is lambda, `momentum` the bank's m)."""

    dataset: str = option("shapes", "what to train on", data.DATASETS)
    data_dir: str = option("data", "where the images lie, or are downloaded to")
    subset: int = option(0, "train on this many images only (0: all)")
    holdout: int = option(0, "use this many training images as the test set, to choose settings by")
    arch: str = option("resnet10", "backbone", ARCHITECTURES)
    width: int = option(0, "channels of a ResNet's first stage (0: 32 for resnet10, 64 for the others)")
    size: int = option(24, "side of the training views, pixels")
    eval_size: int = option(0, "side of the images in evaluation, pixels (0: their own, up to 4/3 of --size)")
    layers: int = option(2, "linear layers of the projector")
    hidden: int = option(2048, "hidden width of the projector")
    dim: int = option(2048, "D, the dimension of the embedding and of the bank's rows")
    temperature: float = option(0.07, "tau of the instance discrimination loss")
    momentum: float = option(0.75, "m of the bank's update, in [0, 1]")
    bank_init: str = option("forward", "how the bank starts", ("forward", "random"))
    bank_update: str = option("corrected", "how the bank moves", RULES)
    negatives: int = option(0, "K rows sampled beside the batch's own (0: the whole bank)")
    lam: float = option(0.0, "lambda, the weight of SqrtKL")
    kl_temperature: float = option(1.0, "T of SqrtKL's softmax")
    kl_direction: str = option("p||u", "KL(P||u) or KL(u||P)", DIRECTIONS)
    kl_detach: bool = option(True, "hold u constant in SqrtKL")
    crop_min: float = option(0.2, "smallest area of a crop, as a share of the image")
    blur: float = option(0.0, "probability of a Gaussian blur")
    cutmix: float = option(0.0, "alpha of CutMix (0: off)")
    epochs: int = option(30, "passes over the training images")
    batch_size: int = option(128, "images a step")
    lr: float = option(0.1, "peak learning rate of SGD")
    sgd_momentum: float = option(0.9, "momentum of SGD")
    weight_decay: float = option(1e-4, "weight decay of SGD")
    warmup: float = option(2.0, "epochs of linear warm-up before the cosine")
    seed: int = option(0, "seed of everything random but the choice of --subset and --holdout")
    init_from: str = option("", "start from the encoder of this run or checkpoint")
    out: str = option("", "folder of the run (empty: runs/<dataset>)")
    knn_every: int = option(5, "epochs between looks at the kNN accuracy (0: never)")
    device: str = option("auto", "auto, cpu, cuda or mps")
    precision: str = option("auto", "auto, fp32 or bf16", ("auto", "fp32", "bf16"))
    compile: bool = option(False, "compile the encoder with torch.compile")
    workers: int = option(2, "processes that decode images which do not fit in memory")
    cache_gb: float = option(4.0, "decoded images up to this size are kept in memory, GB")

    def folder(self) -> Path:
        return Path(self.out or f"runs/{self.dataset}")

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
        try:
            pick_device(self.device)
        except (ValueError, RuntimeError) as error:
            raise UserError(f"--device: {error}") from error
        if self.width and self.arch not in RESNETS:
            raise UserError(f"--width is an option of {', '.join(RESNETS)}, not of {self.arch}")


# The released script's settings (its CIFAR-10 command); the default recipe is in the fields above.
RECIPES = {
    "laptop": {},
    "released": dict(
        arch="resnet18", size=32, layers=3, hidden=2048, dim=2048, temperature=0.2, momentum=0.5,
        bank_init="forward", bank_update="npid", negatives=10_000, lam=20.0, kl_temperature=1.0, cutmix=0.5,
        epochs=200, batch_size=512, lr=1.0, sgd_momentum=0.9, weight_decay=1e-4, warmup=0.0,
    ),
}  # fmt: skip
# What a run may go on with changed, because its result does not depend on it.
FREE_ON_RESUME = {"out", "data_dir", "knn_every", "device", "compile", "workers", "cache_gb"}


# --------------------------------------------------------------------------------------------------------- command line


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def parse(argv: list[str] | None, description: str) -> tuple[Config, dict | None]:
    """The configuration that a command line asks for, and the checkpoint to resume from, if any."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    start = "settings to start from; other flags override them"
    parser.add_argument("--recipe", default="laptop", choices=RECIPES, help=start)
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
    if not resume:
        config = Config(**(RECIPES[recipe] | given))
        config.check()
        last = config.folder() / "last.pt"
        if last.exists() and not overwrite:
            advice = f"--resume {last.parent} goes on with it, --out starts elsewhere, --overwrite anew"
            raise UserError(f"{last.parent} holds a run: {advice}")
        return config, None
    checkpoint = read_checkpoint(resume)
    try:
        before = Config(**checkpoint["config"])
    except TypeError as error:
        raise UserError(f"--resume {resume}: written by another version of this code ({error})") from error
    for name, value in given.items():
        if name not in FREE_ON_RESUME and value != getattr(before, name):
            had = getattr(before, name)
            raise UserError(f"--resume {resume}: the run has {flag(name)} {had}, it cannot go on with {value}")
    place = {} if Path(resume).is_file() and "out" not in given else {"out": given.get("out", resume)}
    return replace(before, **(given | place)), checkpoint
