"""What did the backbone learn? kNN and a linear probe on frozen features, with two controls.

    python eval_linear.py runs/cifar10                         a minute or two
    python eval_linear.py runs/cifar10 --dataset stl10         transfer: the same backbone on others
    python eval_linear.py runs/cifar10 --export backbone.pt    the backbone, torchvision's names

The same figures are measured for the untrained encoder (its weights as they were before the first
step, its BatchNorm statistics those of the images) and for the raw pixels. A method is worth its
distance from them. Few labels, augmented probes and fine-tuning: python -m lab.evaluate.
"""

import argparse
import copy
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
from models import ARCHITECTURES, Encoder, encoder_of
from plumbing.command_line import Parser, UserError, command
from plumbing.devices import pick_device, pick_precision
from plumbing.evaluation import accuracy_table, check_evaluation, dataset_options, evaluation_options, save_results
from plumbing.features import eval_side, extract, preprocessing, random_images, raw_pixels, settle_batchnorm
from plumbing.files import Dataset
from plumbing.runs import load_state, read_checkpoint, save_tensors

STRENGTHS = (1e-1, 3e-2, 1e-2, 1e-3)  # L2 penalties that a probe chooses from


def knn(train: Tensor, labels: Tensor, test: Tensor, truth: Tensor, k: int = 200, temperature: float = 0.1) -> float:
    """Accuracy of the vote of the k nearest training features, as in NPID.

    Features are (N, F), similarity s is the cosine, and a vote weighs exp(s / temperature).
    """
    train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    k, classes, right = min(k, len(train)), int(labels.max()) + 1, 0
    for features, answers in zip(test.split(1000), truth.split(1000)):
        nearest, index = (features @ train.T).topk(k)  # (b, k)
        votes = features.new_zeros(len(features), classes)
        votes.scatter_add_(1, labels[index], (nearest / temperature).exp())
        right += int((votes.argmax(1) == answers).sum())
    return right / len(test)


def linear_probe(train: Tensor, labels: Tensor, test: Tensor, truth: Tensor) -> float:
    """Accuracy of logistic regression on standardised features (N, F), fitted with L-BFGS.

    The L2 penalty is the one of STRENGTHS that does best on a tenth of the training features; the
    fit is then repeated on all of them. The test set chooses nothing.
    """
    mean, std = train.mean(0), train.std(0).clamp(min=1e-6)
    train, test = (train - mean) / std, (test - mean) / std
    classes = int(labels.max()) + 1
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    held, kept = order[: len(train) // 10], order[len(train) // 10 :]
    strength, head = STRENGTHS[2], None
    if len(held) >= 10:
        scores = {}
        for candidate in STRENGTHS:  # strongest first, each fit starts from the one before
            head = _fit(train[kept], labels[kept], classes, candidate, head)
            scores[candidate] = accuracy(head, train[held], labels[held])
        strength = max(scores, key=scores.__getitem__)
    return accuracy(_fit(train, labels, classes, strength, head), test, truth)


def _fit(x: Tensor, y: Tensor, classes: int, strength: float, start: nn.Linear | None = None) -> nn.Linear:
    """Minimise cross-entropy + strength / 2 ‖weight‖² over (x, y) from `start`, or from zero."""
    head = copy.deepcopy(start) if start else nn.Linear(x.shape[1], classes)
    if start is None:
        nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    solver = torch.optim.LBFGS(head.parameters(), max_iter=50, tolerance_change=1e-6, line_search_fn="strong_wolfe")

    def closure():
        solver.zero_grad()
        loss = F.cross_entropy(head(x), y) + strength / 2 * head.weight.square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    return head


@torch.no_grad()
def accuracy(head: nn.Module, x: Tensor, y: Tensor) -> float:
    return (head(x).argmax(1) == y).float().mean().item()


def knn_monitor(encoder: Encoder, dataset: Dataset, config: dict, device, k: int = 20, most=(5000, 1000)) -> float:
    """kNN on at most 5 000 training and 1 000 test images: a run's progress, never a result."""
    size, measured = eval_side(config, dataset.test), []
    for images, count in zip((dataset.labelled, dataset.test), most):
        images = images.take(random_images(images, count))
        measured += [extract(encoder, images, size, device), images.labels.cpu()]
    return knn(*measured, k)


def evaluate(
    checkpoint: dict, dataset: Dataset, size: int = 0, device: str = "auto", k: int = 200, controls: bool = True,
    quiet: bool = False, build=encoder_of, more=None,
) -> dict:  # fmt: skip
    """Evaluate a checkpoint's backbone: {"trained": {...}, "untrained": {...}, "raw": {...}}.

    Each has "knn" and "linear", as fractions of 1. size 0 is `eval_side`'s. build(config) makes the
    untrained encoder. more(encoder or None, dataset, size, train, test) returns further figures;
    train (N, F) and test are the features.
    """
    config = checkpoint["config"]
    device = pick_device(device)
    if not dataset.labelled or not dataset.test:
        advice = "name labelled images, --dataset cifar10 or --dataset folder --data-dir DIR"
        raise UserError(f"no labels to evaluate with: {advice}")
    size, dataset = size or eval_side(config, dataset.test), dataset.to(device)
    labels, truth = dataset.labelled.labels.cpu(), dataset.test.labels.cpu()
    encoders = {"trained": load_backbone(checkpoint, build)}
    if controls:
        encoders |= {"untrained": build(config), "raw": None}
    results = {}
    for name, encoder in encoders.items():
        if encoder is None:
            train, test = raw_pixels(dataset.labelled, size), raw_pixels(dataset.test, size)
        else:
            encoder.to(device, memory_format=torch.channels_last)
            encoder.precision = pick_precision("auto", device)
            if name == "untrained":
                settle_batchnorm(encoder, dataset.labelled, size, device)
            train, test = (extract(encoder, images, size, device, quiet) for images in (dataset.labelled, dataset.test))
        results[name] = {"knn": knn(train, labels, test, truth, k), "linear": linear_probe(train, labels, test, truth)}
        results[name] |= more(encoder, dataset, size, train, test) if more else {}
    return results


def load_backbone(checkpoint: dict, build=encoder_of) -> Encoder:
    """An encoder with the backbone of a checkpoint; its projector, which no probe uses, is new."""
    encoder = build(checkpoint["config"])
    state = {name: x for name, x in checkpoint["encoder"].items() if name.startswith("backbone.")}
    state = {name.removeprefix("backbone."): x for name, x in state.items()}
    load_state(encoder.backbone, state, "the checkpoint's backbone")
    return encoder


def load_for(config: dict, args: argparse.Namespace) -> Dataset:
    """The run's own dataset, or the one that the command line names."""
    return data.load(**dataset_options(config, args))


def program(argv: list[str] | None = None, parser: Parser | None = None, build=encoder_of, more_of=None) -> None:
    """The command line; lab.evaluate adds options to parser and makes `more` from them."""
    args = evaluation_options(parser or Parser(description=__doc__.split("\n")[0]), data.DATASETS).parse_args(argv)
    checkpoint = read_checkpoint(args.run)
    config = checkpoint["config"]
    if build is encoder_of and (config["arch"] not in ARCHITECTURES or config.get("drop_last_stage")):
        raise UserError(f"{args.run}: a run of lab.train; evaluate it with: python -m lab.evaluate {args.run}")
    if args.export:
        save_tensors(load_backbone(checkpoint, build).backbone.state_dict(), args.export, "--export")
        print(f"{args.export}: the {config['arch']} backbone, a plain state_dict. {preprocessing(config)}")
        return
    check_evaluation(args)
    more = more_of(args, config) if more_of else None
    started, dataset = time.perf_counter(), load_for(config, args)
    results = evaluate(checkpoint, dataset, args.size, args.device, args.k, build=build, more=more)
    seconds = time.perf_counter() - started
    print(f"{len(dataset.labelled)} labelled and {len(dataset.test)} test images, {seconds:.0f} s")
    print(accuracy_table(results))
    if args.json:
        save_results(results, config, args)


main = command(program)

if __name__ == "__main__":
    sys.exit(main())
