"""train.py with all that plugs in: crops, large banks, processes, other backbones and methods.

    python -m lab.train --dataset cifar10 --views sslight
    python -m lab.train --method simclr --optimizer sgd --lr 0.48 --weight-decay 5e-4
    torchrun --nproc-per-node=2 -m lab.train --window 0 --shard-bank
    python -m lab.train --resume runs/cifar10

It takes the options of train.py and those of `LabConfig`. lab/README.md says what plugs in where.
"""

import contextlib
import io
import sys
from dataclasses import dataclass, replace
from functools import partial

import torch

import train as core
from lab import ranks
from lab.backbones import ARCHITECTURES, MOBILE, RESNETS, encoder_for
from lab.crops import SAMPLINGS, VIEWS, Crops, crops
from lab.large_bank import Streamed, large_bank
from lab.s3l import start_from
from plumbing.command_line import UserError, command, flag, next_step, option, quoted
from plumbing.devices import pick_device
from plumbing.files import Dataset, Images
from plumbing.fingerprints import check_same, fingerprint
from plumbing.own_files import with_own_files
from plumbing.quality import said
from plumbing.runs import Journal, configure, read_checkpoint
from train import RECIPES, Config, Pretraining, load_dataset

METHODS = ("ours", "simclr", "moco", "mocov2", "byol", "simsiam", "barlow", "dino", "swav")

OURS_ALONE = (  # settings of the bank and of its losses; the other methods have heads of their own
    "temperature", "bank_momentum", "bank_init", "bank_update", "negatives", "lam", "kl_temperature", "cutmix",
    "layers", "hidden", "dim", "window", "visits", "bank_dtype", "shard_bank", "similarity_gb", "bank", "loss",
)  # fmt: skip


@dataclass
class LabConfig(Config):
    """`train.Config` and the settings of everything that plugs in."""

    arch: str = option("resnet10", "backbone", ARCHITECTURES)
    width: int = option(0, "channels of the first stage or vit_tiny's tokens (0: usual)", at_least=0, at_most=2048)
    bank_init: str = option("forward", "how the bank starts; carry: from --init-from", ("forward", "random", "carry"))
    method: str = option("ours", "the method; the others are two-branch methods", METHODS)
    branch_setting: float = option(0.0, "a two-branch method's own, see lab/baselines.py (0: usual)", at_least=0)
    views: str = option("single", "the crops of an image that a step sees, see lab/crops.py", VIEWS)
    drop_last_stage: bool = option(False, "train a ResNet without its last stage, as S3L does")
    torchvision_stem: bool = option(False, "a ResNet with torchvision's stem, also for views of up to 64 pixels")
    size_start: int = option(0, "side of the first views; it grows to --size (0: --size)", at_least=0, at_most=1024)
    init_from: str = option("", "start from the encoder of this run or checkpoint")
    bank_dtype: str = option("fp32", "numbers that the bank is kept in", ("fp32", "bf16"))
    shard_bank: bool = option(False, "split the bank's rows over the processes of torchrun", free=True)
    similarity_gb: float = option(1.0, "similarities (B, N) beyond this size are streamed, GB", above=0, free=True)

    def rows(self, count: int) -> int:
        """As in train.py; a two-branch method has no rows that age, and no window."""
        return super().rows(count) if self.method == "ours" else count

    def ignored(self) -> dict[str, str]:
        idle = super().ignored()
        if self.window or self.cutmix or self.negatives:
            idle["similarity_gb"] = "--window, --cutmix or --negatives"
        if self.views in SAMPLINGS:
            idle["crop_min"] = f"--views {self.views}"
        return idle if self.method == "ours" else idle | dict.fromkeys(OURS_ALONE, f"--method {self.method}")

    def check(self) -> None:
        super().check()
        if self.arch == "vit_tiny" and self.eval_size not in (0, self.size):
            raise UserError(f"--eval-size: vit_tiny knows one side only, its --size {self.size}, not {self.eval_size}")
        if self.width and self.arch in MOBILE:
            raise UserError(f"--width is an option of {', '.join(RESNETS)} and vit_tiny, not of {self.arch}")
        if self.size_start and (self.size_start > self.size or self.views in ("multicrop", "sslight")):
            raise UserError(f"--size-start: at most --size {self.size}, with --views single or twice")
        if self.size_start and self.arch == "vit_tiny":
            raise UserError("--size-start: vit_tiny cuts images of one size in patches, leave it out")
        if self.cutmix and self.views != "single":
            raise UserError(f"--cutmix mixes single views: leave it out or --views {self.views}")
        for name in ("drop_last_stage", "torchvision_stem"):
            if getattr(self, name) and self.arch not in RESNETS:
                raise UserError(f"{flag(name)} is an option of {', '.join(RESNETS)}, not of {self.arch}")
        self._check_method()

    def _check_method(self) -> None:
        """Raises UserError for what our own method's bank, or the other methods, do not take."""
        whole = {"--shard-bank": self.shard_bank, "--bank-dtype bf16": self.bank_dtype == "bf16"}
        whole["--bank-init carry"] = self.bank_init == "carry"
        for name, on in whole.items():
            if on and self.window:
                raise UserError(f"{name} is for a bank of all images: add --window 0")
        if 0 < self.branch_setting < 1 and self.method in ("simsiam", "swav"):
            raise UserError(f"--branch-setting {self.branch_setting:g}: --method {self.method} takes 1 or more")
        if self.branch_setting > 1 and self.method == "byol":
            raise UserError(f"--branch-setting {self.branch_setting:g}: --method byol takes m, at most 1")
        if self.branch_setting and self.method == "ours":
            raise UserError("--branch-setting belongs to the two-branch methods: name one with --method")
        if self.bank_init == "carry" and not (self.init_from and self.method == "ours"):
            raise UserError("--bank-init carry takes the bank of the run that --init-from names, with --method ours")


# ----------------------------------------------------------------------------- composing a learner


def build(config: LabConfig, count: int, device: torch.device):
    """The learner that config asks for, for count images. --init-from is left to `started`."""
    if config.method != "ours":
        from lab.baselines import TwoBranches  # here: it needs a package that our own method does not

        return TwoBranches(config, count, device)
    if config.shard_bank and (samples(config, count) or config.cutmix):
        raise UserError("--shard-bank reads all rows where they lie: --negatives 0 and no --cutmix")
    streamed = streams(config, count)
    if config.bank and (streamed or config.bank_dtype != "fp32"):
        raise UserError("--bank takes the bank's place: not with --bank-dtype bf16, --shard-bank or so many images")
    if config.loss and streamed:
        raise UserError("--loss needs all similarities: not with --shard-bank, and with more --similarity-gb")
    kinds = [Crops] * (config.views != "single") + [Streamed] * streamed
    learner = with_own_files(type("Pretraining", (*kinds, Pretraining), {}), config.bank, config.loss)
    encoder = encoder_for(config)
    bank = large_bank(config, count) if streamed or config.bank_dtype != "fp32" else None
    run = learner(config, count, device, encoder=encoder, bank=bank)
    if ranks.count() > 1:
        run.network = ranks.Gathered(run.network, device)
    return run


def started(config: LabConfig, count: int, device: torch.device, images: Images):
    """The learner of a new run: with the encoder and the bank of --init-from."""
    run = build(config, count, device)
    if config.init_from:
        before = read_checkpoint(config.init_from, LabConfig)
        start_from(run, before, config)
        if config.bank_init == "carry":
            check_same(before.get("images"), fingerprint(images), f"--init-from {config.init_from} --bank-init carry")
    return run


def samples(config: LabConfig, count: int) -> bool:
    """Whether a step samples negatives: there are more than K other rows."""
    return 0 < config.negatives < config.rows(count) - config.batch_size


def streams(config: LabConfig, count: int) -> bool:
    """Whether a step reads the bank in chunks: if the similarities (V B, N) would be too large."""
    size = 4 * len(crops(config)) * config.batch_size * count  # bytes
    able = not samples(config, count) and not config.cutmix and not config.window
    return config.shard_bank or (able and size > 1e9 * config.similarity_gb)


def view_side(config: LabConfig, done: float) -> int:
    """The side of the views after a share `done` of the steps: --size-start to --size.

    It grows over three quarters of the run (progressive resolution, as in arXiv 2104.00298), by an
    even number of pixels.
    """
    start = config.size_start or config.size
    return start + round((config.size - start) * min(1.0, done / 0.75) / 2) * 2


def grow_views(run, done: float) -> None:
    """The loop's `schedule` for --size-start. With --views single or twice no crop is local."""
    for augment in (run.augment, *(crop.augment for crop in getattr(run, "crops", ()))):
        augment.size = view_side(run.config, done)


# ----------------------------------------------------------------------------------------- running


def train(config: LabConfig, resume: dict | None = None, dataset: Dataset | None = None, watch=None) -> dict:
    """`train.train` for any `LabConfig`, in as many processes as torchrun started."""
    config.check()
    ranks.check_batch(config.batch_size)
    device = ranks.start(pick_device(config.device))
    options = {"schedule": grow_views} if config.size_start else {}
    if ranks.count() > 1:
        options |= {"stop": ranks.SharedStop(device), "journal": Journal if ranks.first() else ranks.QuietJournal}
        if ":" in config.device:  # a number that one process would take, but each has its own
            config = replace(config, device=device.type)
        if ranks.first():
            print(f"{ranks.count()} processes share every batch of {config.batch_size} images")
    dataset = dataset or load_dataset(config)
    first = partial(started, images=dataset.train)
    return core.train(config, resume, dataset, build if resume else first, watch, **options)


def run(argv: list[str] | None = None) -> int:
    config, checkpoint = configure(LabConfig, RECIPES, argv, __doc__.split("\n")[0])
    try:
        result = train(config, checkpoint)
    except RuntimeError as error:
        if ranks.count() == 1:
            raise
        gone = f"lab.train: another process of the group is gone ({str(error).splitlines()[0]})"
        advice = f"go on, with any number of processes: python -m lab.train --resume {quoted(config.folder())}"
        print(gone, advice, sep="\n", file=sys.__stderr__)  # in every process: the first may be the one that is gone
        return 1
    if ranks.first():
        print(f"done in {result['seconds']:.0f} s: loss {result['loss']:.3f}{said(result)}")
        print(next_step(result["out"], result["tested"], "-m lab.evaluate"))
    return 0


STOPPED = "stopped at once; what was saved before is in the run's folder"


def main(argv: list[str] | None = None) -> int:
    """The command line; with several processes the first one speaks for all."""
    with contextlib.nullcontext() if ranks.first() else contextlib.redirect_stderr(io.StringIO()):
        try:
            return command(run, "lab.train", STOPPED)(argv)
        finally:
            ranks.stop()


if __name__ == "__main__":
    from lab.train import main  # so that `LabConfig` is lab.train's, not __main__'s: the advice to resume names it

    sys.exit(main())
