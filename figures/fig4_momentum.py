"""Figure 4: accuracy against m, the momentum of the bank's update, for both rules.

    python figures/fig4_momentum.py --scale demo            the embedded shapes, a few minutes
    python figures/fig4_momentum.py --data-dir my_cifar10   5 000 images, 40 minutes on two cores
    python figures/fig4_momentum.py --scale paper           CIFAR-10, ResNet-18, 200 epochs, one GPU
    python figures/fig4_momentum.py --scale laptop --data-dir my_cifar10    50 000 images, 2 hours

At --scale laptop the ends, the released code's m = 0.5 and the best m of each rule have all seeds,
the others the first one.
m = 0 replaces a row by the direction of the step. m = 1 would leave the bank as its first forward
pass made it.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from figures import plots
from figures.sweep import figure
from lab.train import LabConfig

MOMENTA, RELEASED = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99), 0.5
RULES = {"corrected": "corrected rule", "npid": "NPID's rule"}


def name(words: str, m: float) -> str:
    return f"{words}, m = {m:g}"


def points(base: LabConfig, scale: str = "cpu") -> dict[str, LabConfig]:
    return {
        name(words, m): replace(base, bank_update=rule, bank_momentum=m)
        for rule, words in RULES.items()
        for m in MOMENTA
    }


def repeated(runs: list[dict]) -> list[str]:
    return [name(words, m) for words in RULES.values() for m in {MOMENTA[0], RELEASED, best(runs, words), MOMENTA[-1]}]


def best(runs: list[dict], words: str) -> float:
    return plots.highest(runs, {m: name(words, m) for m in MOMENTA})


def draw(runs: list[dict], path) -> None:
    (corrected, m), (npid, n) = ((words, best(runs, words)) for words in RULES.values())
    change = plots.changed(runs, name(corrected, m), name(npid, n), "knn")
    title = f"The {corrected} is best at m = {m:g}, {npid} at m = {n:g}; best against best {change} in kNN"
    names = {words: [name(words, m) for m in MOMENTA] for words in RULES.values()}
    plots.lines(path, runs, names, [f"{m:g}" for m in MOMENTA], "m, the momentum of the bank's update", title)


if __name__ == "__main__":
    sys.exit(figure("fig4_momentum", __doc__, points, draw, needs=("rank",), laptop=True, repeated=repeated))
