"""Why does 1 % of the labels of 2 500 images not tell ours from SimCLR? Three ways to find out.

    python -m lab.studies.few_labels --scale demo            the embedded shapes, a few minutes
    python -m lab.studies.few_labels --data-dir my_cifar10   half an hour on two cores

1. The measure: 50 draws of the labels instead of the five of lab/studies/data_efficiency.py.
2. The classifier: the nearest class mean, by cosine, beside the linear probe, which has a strength
   of regularisation that 25 labels cannot choose.
3. The features: twice the length, and a higher temperature, for both methods.

All accuracies are on the test images; they explain a result and choose no setting.
"""

import sys
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from eval_linear import evaluate, linear_probe
from figures.field import NAMES
from figures.sweep import figure, spread
from lab.evaluate import few_labels
from lab.studies import data_efficiency
from lab.train import LabConfig
from plumbing.files import Dataset

IMAGES = {"demo": 200, "cpu": 2500, "paper": 2500}
METHODS = ("ours", "simclr")
WARMER = 0.2  # temperature; the search chose 0.1 for ours and 0.07 for SimCLR
DRAWS, SHARE = 50, 0.01
COLUMNS = {
    "few_probe": "linear probe, 1 %", "few_mean": "nearest class mean, 1 %", "linear": "linear probe, all",
    "knn": "kNN, all",
}  # fmt: skip


def points(base: LabConfig, scale: str = "cpu") -> dict[str, LabConfig]:
    rows = data_efficiency.points(base, scale)
    usual = {method: rows[f"{NAMES[method]}, {IMAGES[scale]} images"] for method in METHODS}
    warm = {"ours": dict(temperature=WARMER), "simclr": dict(branch_setting=WARMER)}
    changes = {
        "": lambda method, config: config,
        ", twice the epochs": lambda method, config: replace(config, epochs=2 * config.epochs),
        f", temperature {WARMER}": lambda method, config: replace(config, **warm[method]),
    }
    return {
        f"{NAMES[method]}{words}": changed(method, usual[method])
        for words, changed in changes.items()
        for method in METHODS
    }


def measure(checkpoint: dict, dataset: Dataset) -> dict:
    device = checkpoint["config"]["device"]
    return evaluate(checkpoint, dataset, device=device, controls=False, quiet=True, more=few)["trained"]


def few(name: str, encoder, dataset: Dataset, size: int, train: Tensor, test: Tensor) -> dict:
    """Mean accuracies of two classifiers of features (N, F) over draws of 1 % of the labels."""
    labels, truth = dataset.labelled.labels.cpu(), dataset.test.labels.cpu()
    probes = {"few_probe": linear_probe, "few_mean": nearest_mean}
    return {key: few_labels(train, labels, test, truth, SHARE, DRAWS, probe)[0] for key, probe in probes.items()}


def nearest_mean(train: Tensor, labels: Tensor, test: Tensor, truth: Tensor) -> float:
    """Accuracy of taking the class whose mean feature (C, F) has the largest cosine."""
    classes = labels.unique()
    means = torch.stack([train[labels == c].mean(0) for c in classes])  # (C, F)
    guess = classes[(test @ F.normalize(means, dim=1).T).argmax(1)]
    return (guess == truth).float().mean().item()


def table(runs: list[dict]) -> str:
    """Markdown: a line per method and setting, accuracies as mean ± deviation over the seeds."""
    lines = [f"| | {' | '.join(COLUMNS.values())} | seeds |", "|---" * (len(COLUMNS) + 2) + "|"]
    for name in dict.fromkeys(run["name"] for run in runs):
        cells = [spread(runs, name, key) for key in COLUMNS]
        lines.append(f"| {name} | {' | '.join(cells)} | {sum(run['name'] == name for run in runs)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    needs = ("few_probe", "few_mean")
    sys.exit(figure("few_labels", __doc__, points, show=table, measure=lambda base, scale: measure, needs=needs))
