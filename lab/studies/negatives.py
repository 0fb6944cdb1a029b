"""How many negatives a step needs: accuracy against K, from N / 20 to the whole bank.

    python -m lab.studies.negatives --scale demo            the embedded shapes, a few minutes
    python -m lab.studies.negatives --data-dir my_cifar10   half an hour on two cores
    python -m lab.studies.negatives --scale paper           CIFAR-10, ResNet-18, one GPU

The cost of the losses and of the bank's update is proportional to the rows that they touch, so K
sets their share of a step. The released code draws 10 000 of CIFAR-10's 50 000 rows. This figure
chooses a default, so accuracy is measured on held-out training images.
"""

import sys
from dataclasses import replace

from figures import plots
from figures.sweep import ROUND_ONE, figure
from lab.train import LabConfig

SHARES = {"N / 20": 20, "N / 10": 10, "N / 5": 5, "2 N / 5": 2.5, "all N": 0}


def points(base: LabConfig, scale: str = "cpu") -> dict[str, LabConfig]:
    count = base.subset or 50_000
    if scale == "cpu":  # the default's width of bank and projector
        base = replace(base, dim=ROUND_ONE["dim"], hidden=ROUND_ONE["hidden"], epochs=10)
    base = replace(base, holdout=min(4000, count // 2))
    return {name: replace(base, negatives=int(count / share) if share else 0) for name, share in SHARES.items()}


def draw(runs: list[dict], path) -> None:
    names = list(SHARES)
    words = "; ".join(f"{name} {plots.changed(runs, name, 'all N', 'knn')}" for name in names[:-1])
    title = f"kNN with K negatives less that with the whole bank: {words}"
    plots.lines(path, runs, {"held-out images": names}, names, "K, rows drawn as negatives", title)


if __name__ == "__main__":
    sys.exit(figure("negatives", __doc__, points, draw))
