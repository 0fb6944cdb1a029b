"""Evaluation beyond kNN and the linear probe: few labels, augmented views, fine-tuning.

    python -m lab.evaluate RUN --few-labels               probes with 1 % and 10 % of the labels
    python -m lab.evaluate RUN --augmented --finetune     the slow protocols, on augmented views
    python -m lab.evaluate RUN --finetune --mixup 1 --restore-last-stage 10
                                                          as in S3L (arXiv 2103.13559), for a run
                                                          without its network's last stage

It extends eval_linear.py: same options, same controls, same table. It knows every backbone of
lab/backbones.py.
"""

import copy
import math
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2 import MixUp
from tqdm import tqdm

import eval_linear
from data import Augment
from eval_linear import accuracy, linear_probe
from lab.backbones import encoder_of
from lab.s3l import restore_last_stage
from lab.train import LabConfig
from models import Encoder
from plumbing.command_line import Parser, UserError, command
from plumbing.devices import pick_precision
from plumbing.features import extract
from plumbing.files import Dataset

FINETUNING_RATE = 0.03  # of SGD, from scratch and after SGD
SHARES = {"linear_1": 0.01, "linear_10": 0.1}  # of the labels


def evaluate(
    checkpoint: dict, dataset: Dataset, size: int = 0, device: str = "auto", k: int = 200, slow: tuple[str, ...] = (),
    epochs: int = 20, controls: bool = True, quiet: bool = False, mixup: float = 0.0, restore: int = 0,
) -> dict:  # fmt: skip
    """Evaluate a checkpoint's backbone as `eval_linear.evaluate` does, and with the slow protocols.

    slow names any of: "few_labels" (adds "linear_1" and "linear_10", the means over draws, and
    their "_std"); "augmented" and "finetune" (add a figure each, for networks only, after `epochs`
    epochs). mixup is the alpha of mixup in fine-tuning. restore is for a run without its network's
    last stage: fine-tuning adds that stage, and trains it alone for so many epochs first. Raises
    UserError for a side that the network does not know, and for images without labels.
    """
    check_side(checkpoint["config"], size)
    more = Protocols(checkpoint["config"], slow, epochs, mixup, restore)
    return eval_linear.evaluate(checkpoint, dataset, size, device, k, controls, quiet, encoder_of, more)


def check_side(config: dict, size: int) -> None:
    side = size or config["eval_size"]
    if config["arch"].startswith("vit") and side not in (0, config["size"]):
        known = f"knows the side that it was trained at only: --size {config['size']}, not {side}"
        raise UserError(f"{config['arch']} {known}")


@dataclass
class Protocols:
    """The slow protocols, as the `more` of `eval_linear.evaluate`; fields as in `evaluate`."""

    config: dict
    slow: tuple[str, ...] = ()
    epochs: int = 20
    mixup: float = 0.0
    restore: int = 0

    def __call__(
        self, name: str, encoder: Encoder | None, dataset: Dataset, size: int, train: Tensor, test: Tensor
    ) -> dict:
        figures = {}
        if "few_labels" in self.slow:
            labels, truth = dataset.labelled.labels.cpu(), dataset.test.labels.cpu()
            for key, share in SHARES.items():
                figures[key], figures[f"{key}_std"] = few_labels(train, labels, test, truth, share)
        if encoder is None:
            return figures
        device = next(encoder.parameters()).device
        if "augmented" in self.slow:
            figures["augmented"] = train_head(encoder, dataset, size, device, self.epochs, finetune=False)
        if "finetune" in self.slow:
            encoder = restore_last_stage(encoder, self.config) if self.restore else encoder
            options = {"finetune": True, "alpha": self.mixup, "warmup": self.restore}
            options["rate"] = finetuning_rate(self.config) if name == "trained" else FINETUNING_RATE
            figures["finetune"] = train_head(encoder, dataset, size, device, self.epochs, **options)
        return figures


# --------------------------------------------------------------------------------------- few labels


def few_labels(
    train: Tensor, labels: Tensor, test: Tensor, truth: Tensor, share: float, draws: int = 5, probe=None
) -> tuple[float, float]:
    """Mean and standard deviation of a probe's accuracy over draws of `share` of the labels.

    probe is called as `linear_probe`, which it is unless given.
    """
    probe, accuracies = probe or linear_probe, []
    for draw in range(draws):
        chosen = draw_labels(labels, share, draw)
        accuracies.append(probe(train[chosen], labels[chosen], test, truth))
    accuracies = torch.tensor(accuracies)
    return accuracies.mean().item(), accuracies.std().item()


def draw_labels(labels: Tensor, share: float, draw: int) -> Tensor:
    """Indices of `share` of each class of labels (N,), at least one image per class.

    Another draw (a seed) gives other images.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(draw))
    members = [order[labels[order] == c] for c in labels.unique()]
    return torch.cat([m[: max(1, round(share * len(m)))] for m in members])


# ----------------------------------------------------------- a head on augmented views, fine-tuning


def train_head(
    encoder: Encoder, dataset: Dataset, size: int, device, epochs: int, finetune: bool, seed: int = 0,
    alpha: float = 0.0, warmup: int = 0, view: int = 0, rate: float = FINETUNING_RATE,
) -> float:  # fmt: skip
    """Train a linear classifier on augmented views (random crop and flip): its test accuracy.

    Views have the side `view` (0: size), test images have `size`. finetune trains a copy of the
    backbone too. SGD with momentum 0.9 and a cosine schedule: learning rate 0.1 and no weight decay
    for the head on a frozen backbone, `rate` and 5e-4 for fine-tuning (`finetuning_rate` has the
    rate for a run). alpha is mixup's (arXiv 1710.09412; 0: off). warmup is for fine-tuning: that
    many epochs before the schedule starts, in which a ResNet's last stage and the classifier learn
    at the full rate and everything else is frozen (S3L, arXiv 2103.13559).
    """
    torch.manual_seed(seed)
    encoder = copy.deepcopy(encoder).to(device)
    if finetune and pick_precision("auto", device, encoder) == "fp32":  # `ready` chose for forward passes alone
        encoder.precision = "fp32"
    labels = dataset.labelled.labels.to(device)
    classes, count = int(labels.max()) + 1, len(labels)
    norm = nn.BatchNorm1d(encoder.feature_dim, affine=False)  # standardises the features as `linear_probe` does
    head = nn.Sequential(norm, nn.Linear(encoder.feature_dim, classes)).to(device)
    batch, mixup = min(128, count), MixUp(alpha=alpha or 1.0, num_classes=classes)
    per_epoch = count // batch
    optimizer, schedule = _optimiser(encoder, head, finetune and rate, epochs * per_epoch)
    augment = Augment(view or size, jitter_p=0, gray_p=0)
    encoder.train(finetune)
    name, total = "fine-tuning" if finetune else "linear, augmented", (warmup + epochs) * per_epoch * batch
    with tqdm(total=total, desc=name, unit=" images", unit_scale=True, leave=False) as bar:
        for epoch in range(warmup + epochs):
            if warmup:
                _freeze_all_but_last_stage(encoder, frozen=epoch < warmup)
            for pixels, index in dataset.labelled.batches(torch.randperm(count)[: per_epoch * batch], batch, device):
                views, target = augment(pixels), labels[index]
                if alpha:
                    views, target = mixup(views, target)  # shares (B, classes): cross-entropy is linear in them
                with torch.set_grad_enabled(finetune):
                    features = encoder.features(views)  # (B, F)
                loss = F.cross_entropy(head(features), target)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if epoch >= warmup:
                    schedule.step()
                bar.update(batch)
    head.eval()
    features = extract(encoder, dataset.test, size, device).to(device)
    return accuracy(head, features, dataset.test.labels.to(device))


def finetuning_rate(config: dict) -> float:
    """The rate for fine-tuning a run's network, lower after Muon.

    Muon leaves smaller weights, which a step of SGD turns further. On held-out photographs, one run
    after Muon, eight epochs at 0.002, 0.005, 0.01 and 0.03 ended at 75.2, 77.5, 76.4 and 65.5 %.
    """
    return 0.005 if config.get("optimizer") == "muon" else FINETUNING_RATE


def _optimiser(encoder: Encoder, head: nn.Module, rate: float, steps: int):
    parameters = [*head.parameters()] + ([*encoder.backbone.parameters()] if rate else [])
    lr, decay = (rate, 5e-4) if rate else (0.1, 0.0)
    optimizer = torch.optim.SGD(parameters, lr, 0.9, weight_decay=decay)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def _freeze_all_but_last_stage(encoder: Encoder, frozen: bool) -> None:
    for stage, module in encoder.backbone.named_children():
        if stage != "layer4":  # in evaluation mode too: BatchNorm's statistics are frozen as well
            module.requires_grad_(not frozen).train(not frozen)


# ------------------------------------------------------------------------------------- command line


def slow_options() -> Parser:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--few-labels", action="store_true", help="add linear probes with 1 %% and 10 %% of the labels")
    parser.add_argument("--augmented", action="store_true", help="add a linear probe trained on augmented views (slow)")
    parser.add_argument("--finetune", action="store_true", help="add fine-tuning of the whole network (slowest)")
    parser.add_argument("--mixup", type=float, default=0.0, metavar="ALPHA", help="mixup in fine-tuning (S3L: 1) [off]")
    text = "fine-tune with the stage that --drop-last-stage left out, after so many epochs of it alone [0: without it]"
    parser.add_argument("--restore-last-stage", type=int, default=0, metavar="EPOCHS", help=text)
    parser.add_argument("--epochs", type=int, help="epochs of --augmented and --finetune [20]")
    return parser


def protocols_of(args, config: dict) -> Protocols:
    """The protocols that a command line asks for. Raises UserError for options that do not fit."""
    if args.epochs is not None and args.epochs < 1:
        raise UserError("--epochs must be at least 1")
    if args.epochs and not (args.augmented or args.finetune):
        raise UserError("--epochs means nothing without --augmented or --finetune: leave it out")
    if not (0 <= args.mixup < math.inf and args.restore_last_stage >= 0):
        raise UserError("--mixup and --restore-last-stage must be finite and not negative")
    if (args.mixup or args.restore_last_stage) and not args.finetune:
        raise UserError("--mixup and --restore-last-stage belong to fine-tuning: add --finetune")
    if args.restore_last_stage and not config.get("drop_last_stage"):
        raise UserError(f"--restore-last-stage: {args.run} was trained with all of its stages")
    check_side(config, args.size)
    slow = tuple(name for name in ("few_labels", "augmented", "finetune") if getattr(args, name))
    return Protocols(config, slow, args.epochs or 20, args.mixup, args.restore_last_stage)


@command
def main(argv: list[str] | None = None) -> None:
    eval_linear.program(argv, slow_options(), encoder_of, protocols_of, LabConfig)


if __name__ == "__main__":
    sys.exit(main())
