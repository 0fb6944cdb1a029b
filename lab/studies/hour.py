"""The recipe of an hour: all 50 000 images of CIFAR-10, three seeds, with both controls.

    python -m lab.studies.hour --scale demo                     the embedded shapes, a minute
    python -m lab.studies.hour --data-dir my_cifar10 --jobs 1   three to four hours on two cores

A run is `python train.py --recipe hour`, with a folder in place of the download. The recipe means
both cores, so one run at a time.
"""

import sys
from dataclasses import replace

from figures.sweep import figure
from lab.studies import default
from lab.studies.recipe import table
from lab.train import LabConfig
from train import RECIPES

NAME = "recipe of an hour"


def points(base: LabConfig, scale: str = "cpu") -> dict[str, LabConfig]:
    config = default.points(base, scale)[default.NAME]
    if scale == "demo":
        return {NAME: config}
    return {NAME: replace(config, **(RECIPES["hour"] | {"dataset": base.dataset}), subset=0)}


if __name__ == "__main__":
    sys.exit(figure("hour", __doc__, points, controls=True, show=table))
