"""The options of an evaluation's command line, and its table."""

import argparse
import json
import time
from pathlib import Path

from plumbing.command_line import Parser, UserError, check_device
from plumbing.devices import hardware
from plumbing.files import Dataset
from plumbing.runs import save_text
from plumbing.scores import neighbours

HEADS = {"knn": "kNN", "linear": "linear", "knn_balanced": "kNN, balanced", "linear_balanced": "linear, balanced"}
HEADS |= {"linear_1": "linear, 1 %", "linear_10": "linear, 10 %"}
HEADS |= {"augmented": "linear, augmented", "finetune": "fine-tuned"}


def evaluation_options(parser: Parser, datasets: tuple[str, ...]) -> Parser:
    """parser with the options that eval_linear.py and lab.evaluate share."""
    parser.add_argument("run", metavar="RUN_OR_CHECKPOINT", help="a run's folder, or a checkpoint file")
    parser.add_argument("--dataset", choices=datasets, help="images to evaluate on [the run's own]")
    parser.add_argument("--data-dir", help="where they lie [as in the run]")
    parser.add_argument("--subset", type=int, help="labelled training images to use, 0 for all [as in the run]")
    parser.add_argument("--holdout", type=int, help="test on this many held-out training images [as in the run]")
    parser.add_argument(
        "--size", type=int, default=0, help="side of the images in pixels [1 to 4/3 of the run's --size]"
    )
    parser.add_argument("--k", type=int, default=200, help="neighbours of kNN [200]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, as fractions of 1")
    parser.add_argument("--export", type=Path, metavar="FILE", help="write the backbone's state_dict there and stop")
    return parser


def check_evaluation(args: argparse.Namespace) -> None:
    """Raises UserError, naming the option, for what no run could make right."""
    if args.k < 1 or args.size < 0:
        raise UserError("--k must be at least 1, and --size not negative")
    if args.json and not args.json.parent.is_dir():
        raise UserError(f"--json {args.json}: the folder {args.json.parent} does not exist")
    if args.json and args.json.is_dir():
        raise UserError(f"--json {args.json}: a folder; name a file in it")
    check_device(args.device)


def accuracy_table(results: dict) -> str:
    """The results of `eval_linear.evaluate` as aligned text, in percent."""
    columns = [key for key in HEADS if key in results["trained"]]

    def cell(row: dict, key: str) -> str:
        spread = f" ± {100 * row[key + '_std']:.1f}" if key + "_std" in row else ""
        return f"{100 * row[key]:.1f}{spread}" if key in row else "-"

    lines = [["%", *(HEADS[key] for key in columns)]]
    lines += [[name, *(cell(row, key) for key in columns)] for name, row in results.items()]
    return "\n".join(f"{name:<12}" + "".join(f"{text:>20}" for text in cells) for name, *cells in lines)


def dataset_options(config: dict, args: argparse.Namespace) -> dict:
    """What `data.load` needs for the run's own dataset, or for the one that the command line names.

    Only the run's own dataset inherits --subset and --holdout. Downloads are not looked for in a
    folder of images.
    """
    name, before = args.dataset or config["dataset"], config["data_dir"]
    if not args.data_dir and name == "folder" != config["dataset"]:
        raise UserError("--dataset folder: name it with --data-dir")
    apart = "folder" in (name, config["dataset"]) and name != config["dataset"]
    place = args.data_dir or ("data" if apart else before)
    own = name == config["dataset"] and (name != "folder" or Path(place).resolve() == Path(before).resolve())
    inherited = config if own else {"subset": 0, "holdout": 0}
    options = {
        key: inherited[key] if getattr(args, key) is None else getattr(args, key) for key in ("subset", "holdout")
    }
    size = args.size or max(config["size"], config["eval_size"] * 7 // 8)  # decoded sides are 8/7 of it
    options |= {"name": name, "data_dir": place, "size": size}
    return options | {key: config[key] for key in ("cache_gb", "workers", "cache_dir", "fit") if key in config}


def save_results(results: dict, config: dict, args: argparse.Namespace, dataset: Dataset, notes: list[str]) -> None:
    """Write the figures, and what they were measured with, as JSON to --json."""
    note = {
        "run": args.run,
        "k": neighbours(args.k, dataset.labelled.labels),
        "cautions": notes,
        "hardware": hardware(args.device),
        "date": time.strftime("%Y-%m-%d"),
    }
    save_text(json.dumps(results | note | {"config": config}, indent=1) + "\n", args.json, "--json")
