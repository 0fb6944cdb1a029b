"""Do SSLight's crops need another learning rate than single views? (For sslight_short.py.)

    python -m lab.studies.sslight_lr --data-dir my_cifar10   a quarter of an hour on two cores

ResNet-18 alone: every method with its learning rate in sslight_short.py, a quarter, half and twice
as much, and single views with their own, at equal epochs. Accuracy is measured on 4 000 held-out
training images.
"""

import sys
from dataclasses import replace

from figures.field import NAMES
from figures.sweep import figure
from lab.studies import sslight_short
from lab.train import LabConfig

FACTORS = (0.25, 0.5, 1, 2)


def points(base: LabConfig, scale: str = "cpu") -> dict[str, LabConfig]:
    held, rows = 200 if scale == "demo" else 4000, {}
    settings = {name: replace(config, holdout=held) for name, config in sslight_short.points(base, scale).items()}
    for method in sslight_short.METHODS:
        single, crops = (settings[f"resnet18, {NAMES[method]}: {kind}"] for kind in ("single", "SSLight"))
        rows[f"{NAMES[method]}, single, lr {single.lr:.3g}"] = single
        for factor in FACTORS:
            rows[f"{NAMES[method]}, SSLight, lr {factor * crops.lr:.3g}"] = replace(crops, lr=factor * crops.lr)
    return rows


if __name__ == "__main__":
    sys.exit(figure("sslight_lr", __doc__, points))
