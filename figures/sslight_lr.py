"""Do SSLight's crops want another learning rate than single views? On held-out training images, for `figures/sslight.py`.

    python figures/sslight_lr.py --data-dir my_cifar10              a quarter of an hour on two cores

ResNet-18 alone: every method with the learning rate that it has there, half, a quarter, and twice as much, beside single
views with their own, at equal epochs. Accuracy is that on 4 000 held-out training images.
"""

import sys
from dataclasses import replace

import sslight
from field import NAMES
from sweep import Config, figure

FACTORS = (0.25, 0.5, 1, 2)


def points(base: Config, scale: str = "cpu") -> dict[str, Config]:
    held, rows = 200 if scale == "demo" else 4000, {}
    found = {name: replace(config, holdout=held) for name, config in sslight.points(base, scale).items()}
    for method in sslight.METHODS:
        single, crops = (found[f"resnet18, {NAMES[method]}: {kind}"] for kind in ("single", "SSLight"))
        rows[f"{NAMES[method]}, single, lr {single.lr:.3g}"] = single
        for factor in FACTORS:
            rows[f"{NAMES[method]}, SSLight, lr {factor * crops.lr:.3g}"] = replace(crops, lr=factor * crops.lr)
    return rows


if __name__ == "__main__":
    sys.exit(figure("sslight_lr", __doc__, points))
