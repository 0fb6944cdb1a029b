"""What did the backbone learn? kNN and a linear probe on frozen features, with two controls.

    python eval_linear.py runs/cifar10                         a minute or two
    python eval_linear.py runs/cifar10 --dataset stl10         transfer: the same backbone on others
    python eval_linear.py runs/cifar10 --export backbone.pt    the backbone, torchvision's names

The same figures are measured for the untrained encoder (its weights as they were before the first
step, its BatchNorm statistics those of the images) and for the raw pixels. A method is worth its
distance from them. Few labels, augmented probes and fine-tuning: python -m lab.evaluate.
"""

import plumbing  # isort: skip  # noqa: F401  first: Ctrl-C while torch is imported
import copy
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
from models import ARCHITECTURES, Encoder, encoder_of
from plumbing import quality
from plumbing.command_line import Parser, UserError, command, quoted
from plumbing.devices import pick_device
from plumbing.evaluation import dataset_options, evaluation_arguments, report
from plumbing.export import export
from plumbing.features import eval_side, extract, random_images, raw_pixels, ready, save_features
from plumbing.files import Dataset
from plumbing.labels import with_labels
from plumbing.runs import load_state, read_checkpoint
from plumbing.scores import check_labels, figures, majority, neighbours, share_right, standardised

STRENGTHS = (1e-1, 3e-2, 1e-2, 1e-3)  # L2 penalties that a probe chooses from


def knn(train: Tensor, labels: Tensor, test: Tensor, truth: Tensor, k=200, temperature=0.1, score=share_right):
    """Accuracy of the vote of the k nearest training features, as in NPID.

    Features are (N, F), similarity s is the cosine, and a vote weighs exp(s / temperature).
    """
    train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    k, classes, answers = min(k, len(train)), int(labels.max()) + 1, []
    for features in test.split(max(1, min(1000, 10**8 // len(train)))):  # (b, N), 400 MB at most
        nearest, index = (features @ train.T).topk(k)  # (b, k)
        votes = features.new_zeros(len(features), classes)
        votes.scatter_add_(1, labels[index], (nearest / temperature).exp())
        answers.append(votes.argmax(1))
    return score(torch.cat(answers), truth)


def linear_probe(train: Tensor, labels: Tensor, test: Tensor, truth: Tensor, score=share_right):
    """Accuracy of logistic regression on standardised features (N, F), fitted with L-BFGS.

    The L2 penalty is the one of STRENGTHS that does best on a tenth of the training features; the
    fit is then repeated on all of them. The test set chooses nothing.
    """
    train, test = standardised(train, test)
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
    return accuracy(_fit(train, labels, classes, strength, head), test, truth, score)


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
def accuracy(head: nn.Module, x: Tensor, y: Tensor, score=share_right):
    return score(head(x).argmax(1), y)


def knn_monitor(encoder: Encoder, dataset: Dataset, config: dict, device, k: int = 20, most=(5000, 1000)) -> float:
    """kNN on at most 5 000 training and 1 000 test images: a run's progress, never a result."""
    size, measured = eval_side(config, dataset.test), []
    for images, count in zip((dataset.labelled, dataset.test), most):
        images = images.take(random_images(images, count))
        measured += [extract(encoder, images, size, device).to(device), images.labels.to(device)]
    return knn(*measured, neighbours(k, measured[1]))


def evaluate(
    checkpoint: dict, dataset: Dataset, size: int = 0, device: str = "auto", k: int = 200, controls: bool = True,
    quiet: bool = False, build=encoder_of, more=None,
) -> dict:  # fmt: skip
    """Evaluate a checkpoint's backbone: {"trained": {...}, "untrained": {...}, "raw": {...}}.

    Each has "knn" and "linear", as fractions of 1; so has "majority", the commonest class's share.
    k is cut to `neighbours`, size 0 means `eval_side`. build(config) makes an untrained encoder.
    more(name, encoder or None, dataset, size, train (N, F), test) returns further figures.
    """
    config, device = checkpoint["config"], pick_device(device)
    check_labels(dataset)
    size, dataset = size or eval_side(config, dataset.test), dataset.to(device)
    labels, truth = dataset.labelled.labels.cpu(), dataset.test.labels.cpu()
    k, results = neighbours(k, labels), {}
    encoders = {"trained": load_backbone(checkpoint, build)}
    if controls:
        encoders |= {"untrained": build(config), "raw": None}
    for name, encoder in encoders.items():
        if encoder is None:
            train, test = raw_pixels(dataset.labelled, size), raw_pixels(dataset.test, size)
        else:
            ready(encoder, device, dataset.labelled if name == "untrained" else None, size)
            of, parts = "" if quiet else name, (dataset.labelled, dataset.test)
            train, test = (extract(encoder, images, size, device, of) for images in parts)
        right = knn(train, labels, test, truth, k, score=torch.eq), linear_probe(train, labels, test, truth, torch.eq)
        results[name] = figures(*right, truth) | (more(name, encoder, dataset, size, train, test) if more else {})
    return results | ({"majority": majority(labels, truth)} if controls else {})


def load_backbone(checkpoint: dict, build=encoder_of) -> Encoder:
    """An encoder with the backbone of a checkpoint; its projector, which no probe uses, is new."""
    encoder = build(checkpoint["config"])
    state = {k.removeprefix("backbone."): x for k, x in checkpoint["encoder"].items() if k.startswith("backbone.")}
    load_state(encoder.backbone, state, "the checkpoint's backbone")
    return encoder


def load_for(config: dict, args) -> Dataset:
    """The run's own dataset, or the one that the command line names."""
    return with_labels(data.load(**dataset_options(config, args)), args.labels)


def program(argv=None, parser: Parser | None = None, build=encoder_of, more_of=None, kind=None) -> None:
    """The command line; lab.evaluate adds options to parser and makes `more` from them."""
    from train import Config  # imported late, because train imports this file

    args = evaluation_arguments(parser or Parser(description=__doc__.split("\n")[0]), data.DATASETS, argv)
    checkpoint = read_checkpoint(args.run, kind or Config)
    config = checkpoint["config"]
    beyond = config["arch"] not in ARCHITECTURES or config.get("drop_last_stage") or config.get("torchvision_stem")
    if build is encoder_of and beyond:
        raise UserError(f"{args.run}: a run of lab.train; evaluate it with: python -m lab.evaluate {quoted(args.run)}")
    trained = load_backbone(checkpoint, build)
    if args.export:
        return export(trained.backbone, config, args.export, checkpoint.get("side"))
    more = more_of(args, config) if more_of else None
    started, dataset = time.perf_counter(), load_for(config, args)
    if args.features:
        return save_features(trained, dataset, checkpoint, args)
    if quality.judged(dataset, more):
        return quality.report(trained, build(config), checkpoint, dataset, data.Augment(config["size"]), args)
    results = evaluate(checkpoint, dataset, args.size, args.device, args.k, build=build, more=more)
    report(results, checkpoint, dataset, args, started)


main = command(program)

if __name__ == "__main__":
    sys.exit(main())
