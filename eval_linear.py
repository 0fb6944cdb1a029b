"""What did the backbone learn? kNN and linear probes on frozen features, few labels, fine-tuning, with two controls.

    python eval_linear.py runs/cifar10                         kNN and linear probe, a minute or two
    python eval_linear.py runs/cifar10 --few-labels            the linear probe with 1 % and 10 % of the labels too
    python eval_linear.py runs/cifar10 --augmented --finetune  the slow protocols too: training on augmented views
    python eval_linear.py runs/cifar10 --dataset stl10         transfer: the same backbone, probed on other images
    python eval_linear.py runs/cifar10 --export backbone.pt    the backbone alone, with torchvision's parameter names

Every figure stands beside the same figure for the untrained encoder (its BatchNorm statistics measured on the images,
its weights as they were before the first step) and for the raw pixels. What a method is worth is the distance to them.
"""

import argparse
import copy
import json
import os
import platform
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import data
from augment import Augment, plain
from config import Parser, check_device
from images import Dataset, Images, UserError
from models import Encoder, pick_device, pick_precision
from runs import new_encoder, read_checkpoint, save_tensors, save_text

STRENGTHS = (1e-1, 3e-2, 1e-2, 1e-3)  # L2 penalties a probe chooses from, by a tenth of its training features


# -------------------------------------------------------------------------------------------------------------- features


def eval_side(config: dict, images: Images) -> int:
    """The side at which images are shown in evaluation: --eval-size, or the images' own up to 4/3 of the training views.

    A crop shows things larger than the whole image does; somewhat larger images in evaluation make up for it (FixRes,
    arXiv 1906.06423). vit_tiny knows one size only.
    """
    size = config["size"]
    if config["eval_size"] or config["arch"] == "vit_tiny":
        return config["eval_size"] or size
    return min(max(images.side, size), round(size * 4 / 3))


@torch.no_grad()
def extract(encoder: Encoder, images: Images, size: int, device, quiet: bool = True) -> Tensor:
    """Frozen features (N, F) float32 on the CPU: the backbone in evaluation mode on the whole image at `size`."""
    was_training = encoder.training
    encoder.eval()
    features = []
    with tqdm(total=len(images), desc="features", unit=" images", unit_scale=True, leave=False, disable=quiet) as bar:
        for pixels, index in images.batches(torch.arange(len(images)), 500, device):
            features.append(encoder.features(plain(pixels, size)).cpu())  # (B, F)
            bar.update(len(index))
    encoder.train(was_training)
    return torch.cat(features)


def raw_pixels(images: Images, size: int) -> Tensor:
    """The control without a network: normalised pixels at no more than 32 a side, flattened to (N, 3 * side * side)."""
    size, cpu = min(size, 32), torch.device("cpu")
    return torch.cat([plain(x, size).flatten(1) for x, _ in images.batches(torch.arange(len(images)), 500, cpu)])


@torch.no_grad()
def settle_batchnorm(encoder: Encoder, images: Images, size: int, device, count: int = 2000) -> None:
    """Give an untrained encoder's BatchNorm layers the statistics of the images, the only fair start for a control."""
    norms = [m for m in encoder.backbone.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over the batches
    encoder.train()
    for pixels, _ in images.batches(some(images, count), 250, device):
        encoder.features(plain(pixels, size))
    encoder.eval()
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum


def some(images: Images, count: int) -> Tensor:
    """Indices of at most `count` images, always the same; at random, since folders list one class after the other."""
    return torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]


# ---------------------------------------------------------------------------------------------------------------- probes


def knn(train: Tensor, labels: Tensor, test: Tensor, truth: Tensor, k: int = 200, temperature: float = 0.1) -> float:
    """Accuracy of the weighted vote of the k nearest training features (cosine, weights exp(s / T)), as in NPID."""
    train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    k, classes, right = min(k, len(train)), int(labels.max()) + 1, 0
    for part, part_truth in zip(test.split(1000), truth.split(1000)):
        nearest, index = (part @ train.T).topk(k)  # (b, k)
        votes = part.new_zeros(len(part), classes).scatter_add_(1, labels[index], (nearest / temperature).exp())
        right += int((votes.argmax(1) == part_truth).sum())
    return right / len(test)


def linear_probe(train: Tensor, labels: Tensor, test: Tensor, truth: Tensor) -> float:
    """Accuracy of logistic regression on standardised features (N, F), fitted with L-BFGS.

    The L2 strength is the one of STRENGTHS that does best on a tenth of the training features; the fit is then repeated
    on all of them. The test set chooses nothing.
    """
    mean, std = train.mean(0), train.std(0).clamp(min=1e-6)
    train, test = (train - mean) / std, (test - mean) / std
    classes = int(labels.max()) + 1
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    held, kept = order[: len(train) // 10], order[len(train) // 10 :]
    strength, head = STRENGTHS[2], None
    if len(held) >= 10:
        scores = {}
        for candidate in STRENGTHS:  # strongest first, each fit starting from the one before
            head = _fit(train[kept], labels[kept], classes, candidate, head)
            scores[candidate] = _accuracy(head, train[held], labels[held])
        strength = max(scores, key=scores.__getitem__)
    return _accuracy(_fit(train, labels, classes, strength, head), test, truth)


def _fit(x: Tensor, y: Tensor, classes: int, strength: float, start: nn.Linear | None = None) -> nn.Linear:
    """Minimise cross-entropy + strength / 2 ‖weight‖² over (x, y) from `start`, or from zero."""
    head = nn.Linear(x.shape[1], classes)
    if start is None:
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    else:
        head.load_state_dict(start.state_dict())
    solver = torch.optim.LBFGS(head.parameters(), max_iter=50, tolerance_change=1e-6, line_search_fn="strong_wolfe")

    def closure():
        solver.zero_grad()
        loss = F.cross_entropy(head(x), y) + strength / 2 * head.weight.square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    return head


@torch.no_grad()
def _accuracy(head: nn.Module, x: Tensor, y: Tensor) -> float:
    return (head(x).argmax(1) == y).float().mean().item()


def few_labels(train: Tensor, labels: Tensor, test: Tensor, truth: Tensor, share: float, draws: int = 5):
    """Mean and standard deviation of the linear probe over draws of `share` of the labels, at least one a class."""
    accuracies = []
    for draw in range(draws):
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(draw))
        chosen = []
        for c in labels.unique():
            members = order[labels[order] == c]
            chosen.append(members[: max(1, round(share * len(members)))])
        chosen = torch.cat(chosen)
        accuracies.append(linear_probe(train[chosen], labels[chosen], test, truth))
    accuracies = torch.tensor(accuracies)
    return accuracies.mean().item(), accuracies.std().item()


def train_head(
    encoder: Encoder, dataset: Dataset, size: int, device, epochs: int, finetune: bool, seed: int = 0
) -> float:
    """Train a linear classifier on augmented views (random crop and flip); with finetune the backbone too.

    SGD with momentum 0.9 and a cosine: learning rate 0.1, no weight decay for the head alone (backbone frozen, in
    evaluation mode); 0.03 and 5e-4 for fine-tuning. Returns the accuracy on the test images.
    """
    torch.manual_seed(seed)
    encoder = copy.deepcopy(encoder).to(device)
    classes = int(dataset.labelled.labels.max()) + 1
    norm = nn.BatchNorm1d(encoder.feature_dim, affine=False)  # standardises the features as `linear_probe` does
    head = nn.Sequential(norm, nn.Linear(encoder.feature_dim, classes)).to(device)
    parameters = [*head.parameters()] + ([*encoder.backbone.parameters()] if finetune else [])
    lr, decay = (0.03, 5e-4) if finetune else (0.1, 0.0)
    optimizer = torch.optim.SGD(parameters, lr, 0.9, weight_decay=decay)
    count, labels = len(dataset.labelled), dataset.labelled.labels.to(device)
    batch = min(128, count)
    per_epoch = count // batch
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * per_epoch)
    augment = Augment(size, jitter_p=0, gray_p=0)
    encoder.train(finetune)
    head.train()
    name = "fine-tuning" if finetune else "linear, augmented"
    with tqdm(total=epochs * per_epoch * batch, desc=name, unit=" images", unit_scale=True, leave=False) as bar:
        for _ in range(epochs):
            for pixels, index in dataset.labelled.batches(torch.randperm(count)[: per_epoch * batch], batch, device):
                with torch.set_grad_enabled(finetune):
                    features = encoder.features(augment(pixels))  # (B, F)
                loss = F.cross_entropy(head(features), labels[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update(batch)
    head.eval()
    features = extract(encoder, dataset.test, size, device).to(device)
    return _accuracy(head, features, dataset.test.labels.to(device))


# -------------------------------------------------------------------------------------------------------- all of it, once


def knn_monitor(encoder: Encoder, dataset: Dataset, config: dict, device, k: int = 20, most=(5000, 1000)) -> float:
    """kNN on at most 5 000 training and 1 000 test images, for the progress of a run; never a result to report."""
    size, measured = eval_side(config, dataset.test), []
    for images, count in zip((dataset.labelled, dataset.test), most):
        part = images.take(some(images, count))
        measured += [extract(encoder, part, size, device), part.labels.cpu()]
    return knn(*measured, k)


def evaluate(
    checkpoint: dict,
    dataset: Dataset,
    size: int = 0,
    device: str = "auto",
    k: int = 200,
    slow: tuple[str, ...] = (),
    epochs: int = 20,
    controls: bool = True,
    quiet: bool = False,
) -> dict:
    """Measure a checkpoint's backbone: {"trained": {...}, "untrained": {...}, "raw": {...}} with fractions of 1.

    Each has "knn" and "linear"; slow may name "few_labels" (adds linear_1 and linear_10, with _std), "augmented" and
    "finetune" (add a figure each, networks only, after `epochs` epochs). size 0 is `eval_side`'s.
    """
    config = checkpoint["config"]
    device = pick_device(device)
    if not dataset.labelled or not dataset.test:
        advice = "name labelled images, --dataset cifar10 or --dataset folder --data-dir DIR"
        raise UserError(f"no labels to evaluate with: {advice}")
    size = size or eval_side(config, dataset.test)
    if config["arch"] == "vit_tiny" and size != config["size"]:
        raise UserError(f"vit_tiny knows the side it was trained at only: --size {config['size']}, not {size}")
    dataset = dataset.to(device)
    labels, truth = dataset.labelled.labels.cpu(), dataset.test.labels.cpu()
    trained = new_encoder(config)
    untrained = copy.deepcopy(trained)
    trained.load_state_dict(checkpoint["encoder"])
    contestants = {"trained": trained} | ({"untrained": untrained, "raw": None} if controls else {})
    results = {}
    for name, encoder in contestants.items():
        if encoder is None:
            train, test = raw_pixels(dataset.labelled, size), raw_pixels(dataset.test, size)
        else:
            encoder.to(device, memory_format=torch.channels_last)
            encoder.precision = pick_precision("auto", device)
            if name == "untrained":
                settle_batchnorm(encoder, dataset.labelled, size, device)
            train, test = (extract(encoder, part, size, device, quiet) for part in (dataset.labelled, dataset.test))
        row = {"knn": knn(train, labels, test, truth, k), "linear": linear_probe(train, labels, test, truth)}
        if "few_labels" in slow:
            for percent in (1, 10):
                row[f"linear_{percent}"], row[f"linear_{percent}_std"] = few_labels(
                    train, labels, test, truth, percent / 100
                )
        for protocol in ("augmented", "finetune"):
            if protocol in slow and encoder is not None:
                finetune = protocol == "finetune"
                row[protocol] = train_head(encoder, dataset, size, device, epochs, finetune)
        results[name] = row
    return results


def table(results: dict) -> str:
    """The results as aligned text, in percent."""
    heads = {"knn": "kNN", "linear": "linear", "linear_1": "linear, 1 %", "linear_10": "linear, 10 %"}
    heads |= {"augmented": "linear, augmented", "finetune": "fine-tuned"}
    columns = [key for key in heads if key in results["trained"]]

    def cell(row: dict, key: str) -> str:
        spread = f" ± {100 * row[key + '_std']:.1f}" if key + "_std" in row else ""
        return f"{100 * row[key]:.1f}{spread}" if key in row else "-"

    lines = [["%", *(heads[key] for key in columns)]]
    lines += [[name, *(cell(row, key) for key in columns)] for name, row in results.items()]
    return "\n".join(f"{name:<12}" + "".join(f"{text:>20}" for text in cells) for name, *cells in lines)


# ----------------------------------------------------------------------------------------------------------- command line


def hardware(device: str = "auto") -> str:
    """What the figures were measured on, in words."""
    if pick_device(device).type == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":", 1)[1].strip() if lines else name
    return f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"  # with its instruction set


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("run", metavar="RUN_OR_CHECKPOINT", help="a run's folder, or a checkpoint file")
    parser.add_argument("--dataset", choices=data.DATASETS, help="images to evaluate on [the run's own]")
    parser.add_argument("--data-dir", help="where they lie [as in the run]")
    parser.add_argument("--subset", type=int, help="labelled training images to use, 0 for all [as in the run]")
    parser.add_argument("--holdout", type=int, help="test on this many held-out training images [as in the run]")
    parser.add_argument("--size", type=int, default=0, help="side of the images in pixels [the run's]")
    parser.add_argument("--k", type=int, default=200, help="neighbours of kNN [200]")
    parser.add_argument("--few-labels", action="store_true", help="add linear probes with 1 %% and 10 %% of the labels")
    parser.add_argument("--augmented", action="store_true", help="add a linear probe trained on augmented views (slow)")
    parser.add_argument("--finetune", action="store_true", help="add fine-tuning of the whole network (slowest)")
    parser.add_argument("--epochs", type=int, default=20, help="epochs of --augmented and --finetune [20]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, as fractions of 1")
    parser.add_argument("--export", type=Path, metavar="FILE", help="write the backbone's state_dict there and stop")
    return parser.parse_args(argv)


def load_for(checkpoint: dict, args: argparse.Namespace) -> Dataset:
    """The run's own dataset, or the one the command line names; only its own inherits --subset and --holdout."""
    config = checkpoint["config"]
    name, place = args.dataset or config["dataset"], args.data_dir or config["data_dir"]
    own = name == config["dataset"] and (name != "folder" or place == config["data_dir"])
    inherited = config if own else {"subset": 0, "holdout": 0}
    subset = inherited["subset"] if args.subset is None else args.subset
    holdout = inherited["holdout"] if args.holdout is None else args.holdout
    cache = config["cache_gb"], config["workers"], config.get("cache_dir", "")
    return data.load(name, place, args.size or config["size"], subset, holdout, *cache)


def run(args: argparse.Namespace) -> None:
    checkpoint = read_checkpoint(args.run)
    if args.export:
        encoder = new_encoder(checkpoint["config"])
        encoder.load_state_dict(checkpoint["encoder"])
        save_tensors(encoder.backbone.state_dict(), args.export, "--export")
        print(f"{args.export}: the {checkpoint['config']['arch']} backbone, a plain state_dict")
        return
    if args.k < 1 or args.epochs < 1 or args.size < 0:
        raise UserError("--k and --epochs must be at least 1, and --size not negative")
    if args.json and not args.json.parent.is_dir():
        raise UserError(f"--json {args.json}: the folder {args.json.parent} does not exist")
    if args.json and args.json.is_dir():
        raise UserError(f"--json {args.json}: a folder; name a file in it")
    check_device(args.device)
    slow = tuple(name for name in ("few_labels", "augmented", "finetune") if getattr(args, name))
    started = time.perf_counter()
    dataset = load_for(checkpoint, args)
    results = evaluate(checkpoint, dataset, args.size, args.device, args.k, slow, args.epochs)
    seconds = time.perf_counter() - started
    print(f"{len(dataset.labelled)} labelled and {len(dataset.test)} test images, {seconds:.0f} s")
    print(table(results))
    if args.json:
        note = {"run": args.run, "k": args.k, "hardware": hardware(args.device), "date": time.strftime("%Y-%m-%d")}
        save_text(json.dumps(results | note | {"config": checkpoint["config"]}, indent=1) + "\n", args.json, "--json")


def main(argv: list[str] | None = None) -> int:
    try:
        run(parse(argv))
    except UserError as error:
        print(f"eval_linear.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("eval_linear.py: stopped, nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
