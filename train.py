"""Pretrain a backbone without labels: one branch, one view per image, one memory bank.

The method of arXiv 2404.19289. A step is `Pretraining.step`, the loop around it is `train`.

    python train.py --recipe demo                                  drawn shapes, a few minutes
    python train.py --dataset cifar10                              downloaded on first use
    python train.py --dataset folder --data-dir my_images          your own pictures
    python train.py --dataset cifar10 --recipe released            the released script's settings
    python train.py --resume runs/cifar10                          go on where a run stopped

A run lies in --out (runs/<dataset>): config.json, metrics.jsonl (a line per epoch), progress.png
and last.pt, written atomically every --save-every epochs and at the end. eval_linear.py reads it.

Every random draw is a function of (seed, step): torch's generators are seeded anew before images
enter the bank and before each step, the order of images once per pass. So a resumed run needs no
generator's state, and repeats the uninterrupted run to the last bit on a CPU.
"""

import plumbing  # isort: skip  # noqa: F401  first: Ctrl-C while torch is imported
import math
import sys
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

import data
from bank import RULES, MemoryBank
from data import Augment, Batch, cutmix, seed_of, shuffled, windows
from eval_linear import knn_monitor
from loss import nce, sqrt_kl
from models import ARCHITECTURES, encoder_of
from plumbing.command_line import Settings, command, next_step, option
from plumbing.devices import keep_freed_memory, looking_is_free, pick_device, pick_precision
from plumbing.files import Dataset, Images
from plumbing.optimizer import optimizer_of, set_rate
from plumbing.own_files import with_own_files
from plumbing.quality import quality, said
from plumbing.runs import Journal, SignalCatcher, configure, load_state


@dataclass
class Config(Settings):
    """Every hyperparameter. Each field is a flag of the same name; `lam` is lambda.

    `Settings` adds where a run lies, what it looks at and what it computes with.
    """

    dataset: str = option("shapes", "what to train on", data.DATASETS)
    data_dir: str = option("data", "where the images lie, or are downloaded to", free=True)
    subset: int = option(0, "train on this many images only (0: all)", at_least=0)
    holdout: int = option(0, "use this many training images as the test set, to choose settings", at_least=0)
    arch: str = option("resnet10", "backbone", ARCHITECTURES)
    width: int = option(0, "channels of the first stage (0: 32 for resnet10, 64 for others)", at_least=0, at_most=2048)
    size: int = option(24, "side of the training views, pixels", above=0, at_most=1024)
    eval_size: int = option(0, "side of evaluated images (0: their own, up to 4/3 of --size)", at_least=0, at_most=1024)
    layers: int = option(2, "linear layers of the projector", above=0, at_most=32)
    hidden: int = option(512, "hidden width of the projector", above=0, at_most=2**16)
    dim: int = option(256, "D, the dimension of the embedding and of the bank's rows", above=0, at_most=2**16)
    temperature: float = option(0.1, "tau of the NCE loss", above=0)
    bank_momentum: float = option(0.75, "m of the bank's update", at_least=0, at_most=1)
    bank_init: str = option("forward", "how the bank starts", ("forward", "random"))
    bank_update: str = option("corrected", "how the bank moves", RULES)
    negatives: int = option(0, "K rows sampled as negatives (0, or all beside a batch: all rows)", at_least=0)
    lam: float = option(0.0, "lambda, the weight of SqrtKL", at_least=0)
    kl_temperature: float = option(1.0, "T of SqrtKL's softmax", above=0)
    crop_min: float = option(0.2, "smallest area of a crop, as a share of the image", above=0, at_most=1)
    jitter: float = option(0.4, "strength of the colour jitter; hue has a quarter of it", at_least=0, at_most=1)
    jitter_p: float = option(0.8, "probability of the colour jitter", at_least=0, at_most=1)
    gray: float = option(0.2, "probability of a greyscale view", at_least=0, at_most=1)
    blur: float = option(0.0, "probability of a Gaussian blur", at_least=0, at_most=1)
    cutmix: float = option(0.0, "alpha of CutMix (0: off)", at_least=0)
    window: int = option(1024, "W, the images that train at a time and have rows in the bank (0: all)", at_least=0)
    visits: int = option(16, "r, the passes that an image has in the window", above=0)
    epochs: int = option(40, "length, in N / batch steps each", above=0, at_most=10**6)
    batch_size: int = option(256, "images per step (BatchNorm needs two)", at_least=2, at_most=2**20)
    optimizer: str = option("muon", "muon: orthogonalised steps of weight matrices", ("sgd", "muon"))
    lr: float = option(0.07, "peak learning rate; Muon's is for matrices, others have twice it", above=0, at_most=1e6)
    muon_momentum: float = option(0.6, "momentum of Muon", at_least=0, at_most=1)
    sgd_momentum: float = option(0.9, "momentum of SGD", at_least=0, at_most=1)
    weight_decay: float = option(0.3, "weight decay; Muon's is decoupled and for matrices", at_least=0)
    warmup: float = option(2.0, "epochs of linear warm-up before the cosine", at_least=0, at_most=10**6)
    seed: int = option(0, "seed of every draw but --subset and --holdout", at_least=0, at_most=2**63 - 1)


# laptop: the fields above. demo: a small network for `make demo`. hour: all 50 000 images of
# CIFAR-10 in about an hour of one core. released: the released script's CIFAR-10 command. paper:
# the same with the corrected rule. gpu: CIFAR-10 on one GPU, NOT MEASURED YET; it has the default's
# method and a step for twice the batch.
RECIPES = {
    "laptop": {},
    "demo": dict(
        width=16, batch_size=128, lr=0.05, bank_momentum=0.5, visits=8, epochs=12, knn_every=3, precision="fp32",
    ),
    "hour": dict(dataset="cifar10", window=2048),
    "released": dict(
        arch="resnet18", size=32, layers=3, hidden=2048, dim=2048, temperature=0.2, bank_momentum=0.5,
        bank_init="forward", bank_update="npid", negatives=10_000, lam=20.0, kl_temperature=1.0, crop_min=0.2,
        jitter=0.4, cutmix=0.5, window=0, epochs=200, batch_size=512, optimizer="sgd", lr=1.0, sgd_momentum=0.9,
        weight_decay=1e-4, warmup=0.0,
    ),
    "gpu": dict(
        dataset="cifar10", arch="resnet18", size=32, window=4096, epochs=200, batch_size=512, lr=0.1, warmup=10.0,
        save_every=10, compile=True,
    ),
}  # fmt: skip
RECIPES["paper"] = RECIPES["released"] | {"bank_update": "corrected"}


class Pretraining:
    """What a run learns with and has learnt: encoder, bank, optimiser. `step` is the method.

    count is N, the number of images. encoder and bank replace those that config describes.
    Extensions override `look`, `network` and `losses`, see lab/README.md.
    """

    LOSSES = ("loss", "nce", "sqrt_kl")  # what `step` returns
    bank_class, nce, sqrt_kl = MemoryBank, staticmethod(nce), staticmethod(sqrt_kl)  # or yours: --bank, --loss

    def __init__(self, config: Config, count: int, device: torch.device, encoder=None, bank=None):
        c = self.config = config
        self.device = device
        self.encoder = (encoder or encoder_of(asdict(c))).to(device, memory_format=torch.channels_last)
        self.encoder.precision = pick_precision(c.precision, device, self.encoder)
        self.network = torch.compile(self.encoder) if c.compile else self.encoder
        rows = c.rows(count)  # W, or all N
        settings = c.bank_momentum, c.bank_update, c.temperature
        self.bank = (bank or self.bank_class(rows, c.dim, *settings, window=rows < count)).to(device)
        self.negatives = c.negatives if c.negatives < rows - c.batch_size else 0  # K, or 0 for all
        jitter = (c.jitter, c.jitter, c.jitter, c.jitter / 4)
        self.augment = Augment(
            c.size, (c.crop_min, 1.0), jitter=jitter, jitter_p=c.jitter_p, gray_p=c.gray, blur_p=c.blur
        )
        self.optimizer = optimizer_of(c, self.encoder.parameters())

    @property
    def choices(self) -> int:
        """The number of rows that a step's softmax runs over."""
        return self.negatives + self.config.batch_size if self.negatives else self.bank.size

    def enter(self, images: Images, entering: Tensor) -> None:
        """Section "feature calibrate": entering (E,) get rows, by default the encoder's."""
        self.bank.enter(entering)
        if self.config.bank_init == "forward":
            batches = images.batches(entering, self.config.batch_size, self.device)
            views = ((self.augment(pixels), index) for pixels, index in batches)
            self.bank.init_forward(self.encoder, views, entering)

    def step(self, pixels: Tensor, index: Tensor, lr: float) -> Tensor:  # (B, 3, S, S), (B,)
        """One step on images and their indices: returns (3,) L, L_NCE and L_SqrtKL, detached.

        Raises FloatingPointError, before weights or bank have moved, if the loss is not finite. On
        CUDA it does not look, because looking stalls the GPU.
        """
        batch = self.look(pixels, index)
        z = self.network(batch.views)  # (B, D) unit rows
        l_nce, l_kl, seen = self.losses(z, batch)
        loss = l_nce + self.config.lam * l_kl
        losses = torch.stack([loss, l_nce, l_kl]).detach()
        if looking_is_free(losses) and not torch.isfinite(losses).all():
            raise FloatingPointError
        set_rate(self.optimizer, lr)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        # The bank moves last, with the z and P of this step: it moves in place, and autograd still
        # needs the old rows. The released code moves it first, but its losses use old rows too.
        with self.encoder.autocast(z):
            self.bank.update(z, batch.index, weight=batch.weight, **seen)
        return losses

    def look(self, pixels: Tensor, index: Tensor) -> Batch:
        """The views that a step trains on: one per image, mixed in pairs if CutMix is on."""
        batch = Batch(self.augment(pixels), index)
        return cutmix(batch, self.config.cutmix) if self.config.cutmix else batch

    def losses(self, z: Tensor, batch: Batch) -> tuple[Tensor, Tensor, dict]:
        """L_NCE, L_SqrtKL (0 if lambda is 0), and what `bank.update` needs to know of them."""
        c, bank = self.config, self.bank
        columns = bank.sample(batch.images, self.negatives) if self.negatives else None  # (M,), or None for all
        own = bank.locate(batch.index, columns)  # (B,) the column of each image's own row
        with self.encoder.autocast(z):  # this product may run in bf16 too
            similarity = bank.similarity(z, columns).float()  # (B, M) cosines
        target = batch.target(own, similarity.shape[1])  # (B,), or (B, M) shares after CutMix
        l_nce = self.nce(similarity, target, c.temperature, weight=batch.weight)
        l_kl = self.sqrt_kl(similarity, c.kl_temperature, weight=batch.weight) if c.lam else torch.zeros_like(l_nce)
        return l_nce, l_kl, {"similarity": similarity, "columns": columns, "target": target}

    def state(self) -> dict:
        return {name: getattr(self, name).state_dict() for name in ("encoder", "bank", "optimizer")}

    def load(self, checkpoint: dict) -> None:
        for name in ("encoder", "bank", "optimizer"):
            load_state(getattr(self, name), checkpoint.get(name, {}), f"--resume: the run's {name}")


def learning_rate(config: Config, step: int, per_epoch: int) -> float:
    """Linear warm-up, then half a cosine that would reach 0 one step after the last."""
    warmup, total = config.warmup * per_epoch, config.epochs * per_epoch
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def train(
    config: Config, resume: dict | None = None, dataset: Dataset | None = None, build=Pretraining, watch=None,
    schedule=None, journal=Journal, stop: SignalCatcher | None = None,
) -> dict:  # fmt: skip
    """Pretrain as config says; returns the last epoch's figures and the run's folder ("out").

    resume is a checkpoint of the same settings; without it, a run in the same folder is replaced.
    dataset is what `load_dataset` gave. build(config, N, device) makes the learner. After every
    epoch watch(run, dataset, epoch) returns figures to note; before every step schedule(run, share
    of the steps done) may change the run. journal keeps the run's folder, stop ends it early.
    Raises UserError for what the user can mend (a diverging loss is one) and Interrupted after
    Ctrl-C or SIGTERM. The run's last.pt is good in every case.
    """
    config.check()
    keep_freed_memory()
    device, batch = pick_device(config.device), config.batch_size  # B
    dataset = (dataset or load_dataset(config)).to(device)
    count = len(dataset.train)  # N
    run, stop = build(config, count, device), stop or SignalCatcher()
    with journal(config, run, dataset.train, resume) as log, stop:
        run.encoder.train()
        rows, visits = config.rows(count), min(config.visits, config.epochs)
        per_pass = rows // batch  # steps; the images of an incomplete batch sit this pass out
        passes = dataset.train.read_ahead(windows(count, rows, visits, config.seed, log.step // per_pass))
        while log.step < log.total and not stop.signal:
            number, images, entering = next(passes)
            done = log.step - number * per_pass  # steps of this pass that a resumed run has made
            if not done and len(entering):
                torch.manual_seed(seed_of(config.seed, f"pass {number}" if number else "bank"))
                run.enter(dataset.train, entering)
            last = min(per_pass, done + log.total - log.step)
            order = shuffled(images, config.seed, "epoch", number)[done * batch : last * batch]
            for pixels, index in dataset.train.batches(order, batch, device):
                torch.manual_seed(seed_of(config.seed, "step", log.step))
                if schedule:
                    schedule(run, log.step / log.total)
                log.lr = learning_rate(config, log.step, log.per_epoch)
                log.add(run.step(pixels, index, log.lr))
                if log.step % log.per_epoch == 0:
                    log.epoch_ends(lambda: figures(run, dataset, log, watch))
                if stop.signal:
                    break
        if log.step < log.total:
            log.interrupted(stop.signal)
    return log.history[-1] | {"out": str(log.path), "tested": bool(dataset.test)}


def figures(run, dataset: Dataset, log: Journal, watch) -> dict:
    """After an epoch: kNN, or without labels `quality`, where due, and what watch returns."""
    c, row = run.config, {}
    if c.knn_every and (log.step == log.total or log.epoch % c.knn_every == 0) and dataset.test:
        if dataset.labelled:
            row["knn"] = knn_monitor(run.encoder, dataset, asdict(c), run.device)
        else:
            row = quality(run.encoder, dataset.test, asdict(c), Augment(c.size), run.device)
    return row | (watch(run, dataset, log.epoch) if watch else {})


def load_dataset(c: Config) -> Dataset:
    size = max(c.size, c.eval_size * 7 // 8)  # decoded sides are 8/7 of it
    dataset = data.load(c.dataset, c.data_dir, size, c.subset, c.holdout, c.cache_gb, c.workers, c.cache_dir, c.fit)
    c.check_for(len(dataset.train))
    return dataset


@command
def main(argv: list[str] | None = None) -> None:
    config, checkpoint = configure(Config, RECIPES, argv, __doc__.split("\n")[0], automatic=True)
    result = train(config, checkpoint, build=with_own_files(Pretraining, config.bank, config.loss))
    print(f"done in {result['seconds']:.0f} s: loss {result['loss']:.3f}{said(result)}")
    print(next_step(result["out"], result["tested"]))


if __name__ == "__main__":
    sys.exit(main())
