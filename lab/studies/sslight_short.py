"""Several crops per image in short runs, 248 steps. Single views get SSLight's arithmetic too.

    python -m lab.studies.sslight_short --scale demo            resnet18 alone, a few minutes
    python -m lab.studies.sslight_short --data-dir my_cifar10   1.5 hours on two cores
    python -m lab.studies.sslight_short --scale paper           CIFAR-10, 200 epochs, one GPU

"single" is a method without --views: one view for ours, two for a two-branch method. It runs twice:
for as many epochs as the others, and for the number of epochs that takes the arithmetic of
SSLight's crops. Arithmetic is counted, not timed, so the numbers are the same on every machine. All
runs use SGD at the learning rates of single views (figures/field.py). sslight.py has longer runs.
"""

import sys
from dataclasses import replace

from figures.field import BEST, NAMES, at_scale, lasting, with_sgd
from figures.sweep import figure
from lab.studies.sslight import draw, measure, table, work
from lab.train import LabConfig

METHODS = ("ours", *BEST)
EPOCHS = {"demo": 2, "cpu": 8, "paper": 200}
BACKBONES = {  # and their settings at each scale; a width of 0 is the usual one
    "demo": {"resnet18": {}},
    # fp32 on every machine: small depthwise convolutions and tokens are slower in bf16
    "cpu": {
        "mobilenet_v2": dict(width=0, size=16, precision="fp32"), "resnet18": {},
        "vit_tiny": dict(width=24, precision="fp32"),
    },
    "paper": {"mobilenet_v2": {}, "resnet18": {}, "vit_tiny": {}},
}  # fmt: skip
LONGER = "single, SSLight's time"
SAMPLINGS = {"single": "single", LONGER: "single", "multi-crop": "multicrop", "SSLight": "sslight"}


def points(base: LabConfig, scale: str = "cpu") -> dict[str, LabConfig]:
    base = at_scale(base, scale)
    if scale == "cpu":
        base = replace(base, subset=2000, batch_size=64)
    rows = {}
    for arch, options in BACKBONES[scale].items():
        for method in METHODS:
            config = replace(with_sgd(base, method), arch=arch, **options)
            for words, name in SAMPLINGS.items():
                sampled, epochs = replace(config, views=name), EPOCHS[scale]
                if words == LONGER:
                    epochs = round(epochs * work(replace(config, views="sslight")) / work(sampled))
                rows[f"{arch}, {NAMES[method]}: {words}"] = lasting(sampled, epochs)
    return rows


if __name__ == "__main__":
    needs = ("linear_1", "linear_10")
    sys.exit(
        figure("sslight_short", __doc__, points, draw, show=table, measure=lambda base, scale: measure, needs=needs)
    )
