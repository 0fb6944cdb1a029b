"""The options of an evaluation's command line, and its table."""

import argparse
import json
import time
from pathlib import Path

from plumbing.command_line import Parser, UserError, check_device, flag
from plumbing.devices import hardware
from plumbing.export import weights_file
from plumbing.files import Dataset, say
from plumbing.labels import read_labels
from plumbing.outputs import output, save_text
from plumbing.scores import cautions, neighbours, summary

HEADS = {"knn": "kNN", "linear": "linear", "knn_balanced": "kNN, balanced", "linear_balanced": "linear, balanced"}
HEADS |= {"linear_1": "linear, 1 %", "linear_10": "linear, 10 %"}
HEADS |= {"augmented": "linear, augmented", "finetune": "fine-tuned"}

# Options that write something and stop, with the options that still mean something next to them.
ALONE = {"export": ("backbone", ()), "features": ("features", ("dataset", "data_dir", "subset", "size", "device"))}


def evaluation_options(parser: Parser, datasets: tuple[str, ...]) -> Parser:
    """parser with the options that eval_linear.py and lab.evaluate share."""
    parser.add_argument("run", metavar="RUN_OR_CHECKPOINT", help="a run's folder, or a checkpoint file")
    parser.add_argument("--dataset", choices=datasets, help="images to evaluate on [the run's own]")
    parser.add_argument("--data-dir", help="where they lie [as in the run]")
    parser.add_argument("--subset", type=int, help="labelled training images to use, 0 for all [as in the run]")
    parser.add_argument("--holdout", type=int, help="test on this many held-out training images [as in the run]")
    parser.add_argument("--size", type=int, default=0, help="side of the images, px [1 to 4/3 of the run's --size]")
    parser.add_argument("--k", type=int, default=200, help="neighbours of kNN [200]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--json", type=output, metavar="FILE", help="write the figures there, as fractions of 1")
    words = "write the backbone's state_dict there, what rebuilds it into a .json beside it, and stop"
    parser.add_argument("--export", type=weights_file, metavar="FILE", help=words)
    parser.add_argument("--features", type=output, metavar="FILE", help="write all features there (.npz) and stop")
    parser.add_argument("--labels", type=Path, metavar="FILE", help="CSV with path,class per line: labels for a folder")
    return parser


def evaluation_arguments(parser: Parser, datasets: tuple[str, ...], argv) -> argparse.Namespace:
    """The command line of an evaluation. Raises UserError for what no run could make right."""
    args = evaluation_options(parser, datasets).parse_args(argv)
    if args.k < 1 or not 0 <= args.size <= 1024:
        raise UserError("--k must be at least 1, and --size not negative and at most 1024")
    own = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    for name, (what, others) in ALONE.items():
        for other in own - {"run", name, *others} if name in own else ():
            raise UserError(f"--{name} writes the {what} and stops: leave out {flag(other)}")
    check_device(args.device)
    if args.labels:
        read_labels(args.labels)  # before the pictures, which can take long
    return args


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

    Only the run's own dataset inherits --subset and --holdout; for another folder, a line says so.
    Downloads are not looked for in a folder of images.
    """
    name, before = args.dataset or config["dataset"], config["data_dir"]
    if not args.data_dir and name == "folder" != config["dataset"]:
        raise UserError("--dataset folder: name it with --data-dir")
    if args.data_dir and name.startswith("shapes"):
        raise UserError(f"--data-dir means nothing with --dataset {name}: add --dataset folder, or leave it out")
    apart = "folder" in (name, config["dataset"]) and name != config["dataset"]
    place = args.data_dir or ("data" if apart else before)
    own = name == config["dataset"] and (name != "folder" or Path(place).resolve() == Path(before).resolve())
    inherited = config if own else {"subset": 0, "holdout": 0}
    options = {"subset": args.subset, "holdout": args.holdout}
    lost = [f"{flag(key)} {config[key]}" for key, value in options.items() if value is None and config[key]]
    if lost and not own and name == config["dataset"]:
        say(f"caution: the run's {' and '.join(lost)} holds for {before} alone: name it again if {place} needs it")
    options = {key: inherited[key] if value is None else value for key, value in options.items()}
    size = args.size or max(config["size"], config["eval_size"] * 7 // 8)  # decoded sides are 8/7 of it
    options |= {"name": name, "data_dir": place, "size": size}
    return options | {key: config[key] for key in ("cache_gb", "workers", "cache_dir", "fit") if key in config}


def report(results: dict, checkpoint: dict, dataset: Dataset, args: argparse.Namespace, started: float) -> None:
    """Write the figures to --json, and print them as a table with what to beware of."""
    notes = cautions(checkpoint, dataset)
    k = neighbours(args.k, dataset.labelled.labels)
    save_results(results | {"k": k}, checkpoint, args, notes)  # before: the reader may be gone
    print(summary(dataset, args.k, time.perf_counter() - started))
    rows = "untrained: before its first step; raw: the pixels alone; majority: the largest class as every answer"
    print(accuracy_table(results), rows, *notes, sep="\n")


def save_results(results: dict, checkpoint: dict, args: argparse.Namespace, notes: list[str]) -> None:
    """Write the figures, and what they were measured with, as JSON to --json, if it is given."""
    if args.json:
        note = {"run": args.run, "cautions": notes, "hardware": hardware(args.device)}
        note |= {"date": time.strftime("%Y-%m-%d"), "config": checkpoint["config"], "step": checkpoint["step"]}
        save_text(json.dumps(results | note, indent=1) + "\n", args.json, "--json")
