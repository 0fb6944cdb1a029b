"""The last round of the search for the default recipe: temperature and m.

    python -m lab.studies.finalists --scale demo                      the embedded shapes
    python -m lab.studies.finalists --data-dir my_cifar10 --seeds 0   half an hour on two cores

All rows have what the search (lab/studies/search.py) found best: batches of 256, 16 visits; and
D = 256, which costs less. Accuracy is measured on held-out training images.
"""

import sys
from dataclasses import replace

from figures.sweep import figure
from lab.studies import search
from lab.studies.field_ideas import changed, draw, table
from lab.train import LabConfig

CHANGES = {
    "τ = 0.1, m = 0.5": {},
    "τ = 0.15, m = 0.5": dict(temperature=0.15),
    "τ = 0.1, m = 0.75": dict(bank_momentum=0.75),
    "τ = 0.15, m = 0.75": dict(temperature=0.15, bank_momentum=0.75),
}


def points(base: LabConfig, scale: str = "cpu") -> dict[str, LabConfig]:
    best = replace(search.points(base, scale)[search.CENTRE], visits=16)
    if scale == "cpu":
        best = replace(best, **search.LARGE_BATCH, dim=256)
    return changed(best, CHANGES)


if __name__ == "__main__":
    sys.exit(figure("finalists", __doc__, points, draw, show=table))
