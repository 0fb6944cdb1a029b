"""Harder views at the default recipe's own width: what raises its linear probe?

    python -m lab.studies.harder_views --scale demo                      the embedded shapes
    python -m lab.studies.harder_views --data-dir my_cifar10 --seeds 0   45 minutes on two cores

The search ran with a network of width 16. One of width 32 learns the pretext task better, so it may
want harder views. Accuracy is measured on held-out training images.
"""

import sys
from dataclasses import replace

from figures.sweep import figure
from lab.studies import default
from lab.studies.field_ideas import changed, draw, table
from lab.train import LabConfig

CHANGES = {
    "the default recipe": {},
    "crops from 0.1 of the image": dict(crop_min=0.1),
    "τ = 0.15": dict(temperature=0.15),
    "crops from 0.1, τ = 0.15": dict(crop_min=0.1, temperature=0.15),
    "weight decay 0.6": dict(weight_decay=0.6),
    "jitter 0.6, grey 0.3": dict(jitter=0.6, gray=0.3),
}


def points(base: LabConfig, scale: str = "cpu") -> dict[str, LabConfig]:
    held_out = {"demo": 200, "cpu": 4000, "paper": 5000}[scale]
    return changed(replace(default.points(base, scale)[default.NAME], holdout=held_out), CHANGES)


if __name__ == "__main__":
    sys.exit(figure("harder_views", __doc__, points, draw, show=table))
