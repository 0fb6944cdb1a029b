"""Transfer: pretrained on one dataset, evaluated on another. CIFAR-10 and the embedded shapes.

    python -m lab.studies.transfer --scale demo            the embedded shapes alone, a few minutes
    python -m lab.studies.transfer --data-dir my_cifar10   half an hour on two cores
    python -m lab.studies.transfer --scale paper           also CIFAR-100, STL-10; one GPU

Rows are datasets for pretraining, columns are datasets for evaluation. Every method sees the same
number of views: a two-branch method runs for half the epochs. The untrained encoder and raw pixels
are controls.
"""

import sys
from dataclasses import replace

import data
from figures.field import BEST, NAMES, base_of, contestant, lasting
from figures.sweep import figure, spread
from lab.evaluate import evaluate
from lab.train import LabConfig
from plumbing.files import Dataset

EPOCHS = {"demo": 4, "cpu": 20, "paper": 200}


def places(scale: str, own: str) -> tuple[str, ...]:
    others = {"demo": (), "cpu": ("shapes",), "paper": ("shapes", "cifar100", "stl10")}[scale]
    return tuple(dict.fromkeys((own, *others)))


def points(base: LabConfig, scale: str = "cpu") -> dict[str, LabConfig]:
    base, rows = base_of(base, scale), {}
    for place in places(scale, base.dataset):
        for method in ("ours", *BEST):
            config = replace(contestant(base, method), dataset=place)
            epochs = EPOCHS[scale] // (1 if method == "ours" else 2)
            rows[f"{NAMES[method]} on {place}"] = lasting(config, epochs, one_in=10)
    return rows


class Measure:
    """Linear probe and kNN of a run on each of `targets`.

    Every target has as many labelled images as the run was pretrained on.
    """

    def __init__(self, targets: tuple[str, ...], data_dir: str):
        self.targets, self.data_dir = targets, data_dir

    def __call__(self, checkpoint: dict, dataset: Dataset) -> dict:
        config, figures = checkpoint["config"], {}
        for name in self.targets:
            target = dataset
            if name != config["dataset"]:
                target = data.load(name, self.data_dir, config["size"], config["subset"], 0, config["cache_gb"])
            results = evaluate(checkpoint, target, device=config["device"], quiet=True)
            figures |= {f"{who} {key} {name}": value for who, row in results.items() for key, value in row.items()}
        return figures | {key: figures[f"trained {key} {config['dataset']}"] for key in ("knn", "linear")}


def measure(base: LabConfig, scale: str) -> Measure:
    return Measure(places(scale, base.dataset), base.data_dir)


def targets_of(runs: list[dict]) -> list[str]:
    return [key.split()[-1] for key in runs[0]["final"] if key.startswith("trained linear")]


def table(runs: list[dict]) -> str:
    """Markdown: a line per method and pretraining dataset, a column per target: linear / kNN."""
    targets = targets_of(runs)
    lines = [f"| pretrained on | {' | '.join(targets)} | seeds |", "|---" * (len(targets) + 2) + "|"]
    rows = [(run["name"], "trained", run) for run in runs]
    rows += [(who, who, run) for who in ("untrained", "raw") for run in runs if run["method"] == "ours"]
    for name in dict.fromkeys(name for name, _, _ in rows):
        own = {run["seed"]: run | {"name": who} for other, who, run in rows if other == name}
        who = next(iter(own.values()))["name"]
        cells = [
            " / ".join(spread(list(own.values()), who, f"{who} {key} {target}") for key in ("linear", "knn"))
            for target in targets
        ]
        lines.append(f"| {name} | {' | '.join(cells)} | {len(own)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    needs = ("untrained linear shapes",)  # other figures' runs were not probed elsewhere
    sys.exit(figure("transfer", __doc__, points, show=table, needs=needs, measure=measure))
