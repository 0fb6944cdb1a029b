"""The cures for infrequent updating, alone and together: corrected rule, SqrtKL, windows.

    python -m lab.studies.cures --scale demo            the embedded shapes, a few minutes
    python -m lab.studies.cures --data-dir my_cifar10   all 50 000 images, an hour on two cores

In instance discrimination a class sees its one positive once an epoch. Three things help: the
corrected rule moves every row in every step, SqrtKL gives every class a gradient in every step, and
a window lets an image come back soon. All eight combinations have the default recipe's other
settings, with a network of width 16 and the released code's tau 0.2, at which SqrtKL matters most.
"""

import itertools
import sys
from dataclasses import replace

from figures import plots
from figures.sweep import figure
from lab.studies import default
from lab.studies.field_ideas import table
from lab.train import LabConfig

NONE = "none: NPID's rule, random order"
LENGTHS = {"demo": 4, "cpu": 10, "paper": 200}
WINDOWS = {"demo": 256, "cpu": 2048, "paper": 2048}


def points(base: LabConfig, scale: str = "cpu") -> dict[str, LabConfig]:
    settings = default.points(base, scale)[default.NAME]
    settings = replace(settings, temperature=0.2, epochs=LENGTHS[scale], warmup=LENGTHS[scale] / 10)
    if scale == "cpu":
        settings = replace(settings, subset=0, width=16)
    cures = {
        "corrected rule": dict(bank_update="corrected"),
        "SqrtKL": dict(lam=20.0),
        "windows": dict(window=WINDOWS[scale]),
    }
    settings, rows = replace(settings, bank_update="npid", lam=0.0, window=0), {}
    for count in range(len(cures) + 1):
        for names in itertools.combinations(cures, count):
            change = {key: value for name in names for key, value in cures[name].items()}
            rows[" + ".join(names) or NONE] = replace(settings, **change)
    return rows


def draw(runs: list[dict], path) -> None:
    names = list(dict.fromkeys(run["name"] for run in runs))
    gains = {name: plots.change(runs, name, NONE, "knn")[0] for name in names if name != NONE}
    alone = ", ".join(f"{name} {gain:+.1f}" for name, gain in gains.items() if "+" not in name)
    title = f"What each cure adds to the kNN accuracy, alone: {alone}; all three {gains[names[-1]]:+.1f}"
    plots.bars(path, runs, names, title)


if __name__ == "__main__":
    sys.exit(figure("cures", __doc__, points, draw, show=table, looks=2, needs=("ageing",)))
