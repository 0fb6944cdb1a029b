"""Transfer: pretrained on one set of images, read on another. CIFAR-10 and the embedded shapes, each from each.

    python figures/transfer.py --scale demo                         the embedded shapes alone, a few minutes
    python figures/transfer.py --data-dir my_cifar10                half an hour on two cores
    python figures/transfer.py --scale paper                        CIFAR-10, CIFAR-100 and STL-10, ResNet-18, one GPU

Rows are what was pretrained on, columns what is probed. Every method sees as many views: a two-branch one runs for half the
epochs. The untrained encoder and raw pixels stand beside them.
"""

import sys
from dataclasses import replace

from field import BEST, NAMES, at_scale, contestant, lasting
from sweep import Config, figure, spread

import data
from eval_linear import evaluate
from images import Dataset

EPOCHS = {"demo": 4, "cpu": 10, "paper": 200}


def places(scale: str, own: str) -> tuple[str, ...]:
    others = {"demo": (), "cpu": ("shapes",), "paper": ("shapes", "cifar100", "stl10")}[scale]
    return tuple(dict.fromkeys((own, *others)))


def points(base: Config, scale: str = "cpu") -> dict[str, Config]:
    base, rows = at_scale(base, scale), {}
    for place in places(scale, base.dataset):
        for method in ("ours", *BEST):
            epochs = EPOCHS[scale] // (1 if method == "ours" else 2)
            rows[f"{NAMES[method]} on {place}"] = lasting(replace(contestant(base, method), dataset=place), epochs)
    return rows


class Measure:
    """The linear probe and kNN of a run on each of `targets`, with as many labelled images as it was pretrained on."""

    def __init__(self, targets: tuple[str, ...]):
        self.targets = targets

    def __call__(self, checkpoint: dict, dataset: Dataset) -> dict:
        config, figures = checkpoint["config"], {}
        for name in self.targets:
            there = dataset
            if name != config["dataset"]:
                there = data.load(name, config["data_dir"], config["size"], config["subset"], 0, config["cache_gb"])
            found = evaluate(checkpoint, there, device=config["device"], quiet=True)
            figures |= {f"{who} {key} {name}": value for who, row in found.items() for key, value in row.items()}
        return figures | {key: figures[f"trained {key} {config['dataset']}"] for key in ("knn", "linear")}


def targets_of(runs: list[dict]) -> list[str]:
    return [key.split()[-1] for key in runs[0]["final"] if key.startswith("trained linear")]


def table(runs: list[dict]) -> str:
    """Markdown: a line a method and place it was pretrained on, columns the places it is read on: linear / kNN."""
    targets = targets_of(runs)
    lines = [f"| pretrained on | {' | '.join(targets)} | seeds |", "|---" * (len(targets) + 2) + "|"]
    rows = [(run["name"], "trained", run) for run in runs]
    rows += [(who, who, run) for who in ("untrained", "raw") for run in runs if run["method"] == "ours"]
    for name in dict.fromkeys(name for name, _, _ in rows):
        mine = {run["seed"]: (who, run) for other, who, run in rows if other == name}
        cells = []
        for target in targets:
            both = [
                spread([{"name": "", "final": {"x": run["final"][f"{who} {key} {target}"]}} for who, run in mine.values()], "", "x")
                for key in ("linear", "knn")
            ]  # fmt: skip
            cells.append(" / ".join(both))
        lines.append(f"| {name} | {' | '.join(cells)} | {len(mine)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    needs = ("untrained linear shapes",)  # other figures' runs were not probed elsewhere
    sys.exit(
        figure(
            "transfer",
            __doc__,
            points,
            show=table,
            needs=needs,
            measure=lambda base, scale: Measure(places(scale, base.dataset)),
        )
    )
