"""What did the backbone learn? kNN and linear probes on frozen features, few labels, fine-tuning, with two controls.

    python eval_linear.py runs/cifar10                         kNN and linear probe, a minute or two
    python eval_linear.py runs/cifar10 --few-labels            the linear probe with 1 % and 10 % of the labels too
    python eval_linear.py runs/cifar10 --augmented --finetune  the slow protocols too: training on augmented views
    python eval_linear.py RUN --finetune --mixup 1 --restore-last-stage 10     RUN without its last stage, as in S3L
    python eval_linear.py runs/cifar10 --dataset stl10         transfer: the same backbone, probed on other images
    python eval_linear.py runs/cifar10 --export backbone.pt    the backbone alone, with torchvision's parameter names

Every figure stands beside the same figure for the untrained encoder (its BatchNorm statistics measured on the images,
its weights as they were before the first step) and for the raw pixels. What a method is worth is the distance to them.
"""

import argparse
import copy
import json
import sys
import time
from pathlib import Path

import torch

import data
from config import Parser, check_device, command
from images import Dataset, Images, UserError
from measure import hardware
from models import Encoder, pick_device, pick_precision
from probes import extract, few_labels, knn, linear_probe, raw_pixels, settle_batchnorm, some, train_head
from runs import new_encoder, read_checkpoint, restore_last_stage, save_tensors, save_text


def eval_side(config: dict, images: Images) -> int:
    """The side at which images are shown in evaluation: --eval-size, or the images' own up to 4/3 of the training views.

    A crop shows things larger than the whole image does; somewhat larger images in evaluation make up for it (FixRes,
    arXiv 1906.06423). vit_tiny knows one size only.
    """
    size = config["size"]
    if config["eval_size"] or config["arch"] == "vit_tiny":
        return config["eval_size"] or size
    return min(max(images.side, size), round(size * 4 / 3))


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
    mixup: float = 0.0,
    restore: int = 0,
) -> dict:
    """Measure a checkpoint's backbone: {"trained": {...}, "untrained": {...}, "raw": {...}} with fractions of 1.

    Each has "knn" and "linear"; slow may name "few_labels" (adds linear_1 and linear_10, with _std), "augmented" and
    "finetune" (add a figure each, networks only, after `epochs` epochs). size 0 is `eval_side`'s. Fine-tuning has mixup
    with that alpha and, if the run was trained without its network's last stage, `restore` epochs of it before all.
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
                more = {}
                if finetune := protocol == "finetune":
                    encoder = restore_last_stage(encoder, config) if restore else encoder
                    more = {"alpha": mixup, "warmup": restore}
                row[protocol] = train_head(encoder, dataset, size, device, epochs, finetune, **more)
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
    parser.add_argument("--mixup", type=float, default=0.0, metavar="ALPHA", help="mixup in fine-tuning (S3L: 1) [off]")
    text = "fine-tune with the stage that --drop-last-stage left out, after so many epochs of it alone [0: without it]"
    parser.add_argument("--restore-last-stage", type=int, default=0, metavar="EPOCHS", help=text)
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


@command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    checkpoint = read_checkpoint(args.run)
    if args.export:
        encoder = new_encoder(checkpoint["config"])
        encoder.load_state_dict(checkpoint["encoder"])
        save_tensors(encoder.backbone.state_dict(), args.export, "--export")
        print(f"{args.export}: the {checkpoint['config']['arch']} backbone, a plain state_dict")
        return
    if args.k < 1 or args.epochs < 1 or args.size < 0:
        raise UserError("--k and --epochs must be at least 1, and --size not negative")
    if not (0 <= args.mixup < float("inf") and args.restore_last_stage >= 0):
        raise UserError("--mixup and --restore-last-stage must be finite and not negative")
    if (args.mixup or args.restore_last_stage) and not args.finetune:
        raise UserError("--mixup and --restore-last-stage belong to fine-tuning: add --finetune")
    if args.restore_last_stage and not checkpoint["config"].get("drop_last_stage"):
        raise UserError(f"--restore-last-stage: {args.run} was trained with all of its stages")
    if args.json and not args.json.parent.is_dir():
        raise UserError(f"--json {args.json}: the folder {args.json.parent} does not exist")
    if args.json and args.json.is_dir():
        raise UserError(f"--json {args.json}: a folder; name a file in it")
    check_device(args.device)
    slow = tuple(name for name in ("few_labels", "augmented", "finetune") if getattr(args, name))
    started = time.perf_counter()
    dataset = load_for(checkpoint, args)
    s3l = {"mixup": args.mixup, "restore": args.restore_last_stage}
    results = evaluate(checkpoint, dataset, args.size, args.device, args.k, slow, args.epochs, **s3l)
    seconds = time.perf_counter() - started
    print(f"{len(dataset.labelled)} labelled and {len(dataset.test)} test images, {seconds:.0f} s")
    print(table(results))
    if args.json:
        note = {"run": args.run, "k": args.k, "hardware": hardware(args.device), "date": time.strftime("%Y-%m-%d")}
        save_text(json.dumps(results | note | {"config": checkpoint["config"]}, indent=1) + "\n", args.json, "--json")


if __name__ == "__main__":
    sys.exit(main())
