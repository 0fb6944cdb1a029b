"""How many negatives a step needs: accuracy against K, the rows drawn beside the batch's own, up to the whole bank.

    python figures/negatives.py --scale demo                        the embedded shapes, a few minutes
    python figures/negatives.py --data-dir my_cifar10               5 000 images, half an hour on two cores
    python figures/negatives.py --scale paper                       CIFAR-10, ResNet-18, 200 epochs, one GPU

Losses and bank update cost as much as the rows they touch, so K sets their share of a step. The released code draws 10 000
of CIFAR-10's 50 000 rows. A default is chosen by this figure, so accuracy is that on held-out training images.
"""

import sys
from dataclasses import replace

import plots
from sweep import Config, figure

SHARES = {"N / 20": 20, "N / 10": 10, "N / 5": 5, "2 N / 5": 2.5, "all N": 0}


def points(base: Config, scale: str = "cpu") -> dict[str, Config]:
    count = base.subset or 50_000
    if scale == "cpu":  # the width of bank and projector that the default has
        base = replace(base, dim=2048, hidden=2048, epochs=10)
    base = replace(base, holdout=min(4000, count // 2))
    return {name: replace(base, negatives=int(count / share) if share else 0) for name, share in SHARES.items()}


def draw(runs: list[dict], path) -> None:
    names = list(SHARES)
    changes = {name: plots.change(runs, name, "all N", "knn") for name in names[:-1]}
    words = "; ".join(f"{name} {gain:+.1f} ± {error:.1f}" for name, (gain, error) in changes.items())
    title = f"kNN with K negatives less that with the whole bank: {words}"
    plots.lines(path, runs, {"held-out images": names}, names, "K, rows drawn beside the batch's own", title)


if __name__ == "__main__":
    sys.exit(figure("negatives", __doc__, points, draw))
