"""The learning rate of every compared method: a few rates each, on held-out training images.

    python -m lab.studies.field_lr --data-dir my_cifar10                half an hour on two cores

The rates lie around the method's usual one: 0.1 for ours, and for the others 0.06, as in lightly's
benchmark. The sum of the held-out linear and kNN accuracies chooses; the choices are
`figures.field.LR`.
"""

import sys
from dataclasses import replace

from figures.field import LR, NAMES, at_scale, with_sgd
from figures.sweep import figure, spread
from lab.train import LabConfig

EPOCHS = {"demo": 2, "cpu": 10, "paper": 50}
HELD_OUT = {"demo": 300, "cpu": 4000, "paper": 5000}


def rates(method: str) -> tuple[float, ...]:
    """Doubled or halved from the method's own until it no longer helps."""
    return {
        "ours": (0.025, 0.05, 0.1, 0.2), "npid": (0.00625, 0.0125, 0.025, 0.05, 0.1, 0.2),
        "parametric": (0.025, 0.05, 0.1, 0.2, 0.4),
        "moco": (0.03, 0.06, 0.12, 0.24), "mocov2": (0.03, 0.06, 0.12, 0.24),
        # solo-learn uses a tenth of the loss, which is as good as a tenth of the rate
        "barlow": (0.00006, 0.0002, 0.0006, 0.002, 0.006, 0.02),
        "byol": (0.03, 0.06, 0.12, 0.24, 0.48, 0.96, 1.92), "simsiam": (0.03, 0.06, 0.12, 0.24, 0.48, 0.96),
    }.get(method, (0.03, 0.06, 0.12, 0.24, 0.48))  # fmt: skip


def points(base: LabConfig, scale: str = "cpu") -> dict[str, LabConfig]:
    base = replace(at_scale(base, scale), epochs=EPOCHS[scale], holdout=HELD_OUT[scale])
    searched = [method for method in NAMES if method != "moco"]  # takes what MoCo v2 takes
    return {f"{NAMES[method]}, lr {lr:g}": with_sgd(base, method, lr) for method in searched for lr in rates(method)}


def table(runs: list[dict]) -> str:
    """Markdown: a line per method, its rates with linear / kNN, the choice in bold."""
    lines = ["| method | learning rate for a batch of 128: linear / kNN on held-out images |", "|---|---|"]
    for method, words in NAMES.items():
        cells = []
        for lr in rates(method):
            name = f"{words}, lr {lr:g}"
            if any(run["name"] == name for run in runs):
                text = f"{lr:g}: {spread(runs, name, 'linear')} / {spread(runs, name, 'knn')}"
                cells.append(f"**{text}**" if lr == LR[method] else text)
        lines += [f"| {words} | {'; '.join(cells)} |"] * bool(cells)
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(figure("field_lr", __doc__, points, show=table))
