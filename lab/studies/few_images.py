"""Batch size and rate for few images: the default recipe on 1 000 and 2 500 of them.

    python -m lab.studies.few_images --scale demo                      the embedded shapes
    python -m lab.studies.few_images --data-dir my_cifar10 --seeds 0   half an hour on two cores

Muon's rate is 0.07 for a batch of 256. Smaller batches try it times the square root of their share
of 256, and twice that. Accuracy is measured on held-out training images, with the labels of the
images that trained. The network has width 16.
"""

import sys
from dataclasses import replace

from figures.sweep import figure
from lab.studies import default
from lab.studies.field_ideas import table
from lab.train import LabConfig

EPOCHS = {1000: 100, 2500: 80}
STEPS = {256: (0.07,), 128: (0.05, 0.1), 64: (0.035, 0.07)}  # batch and rates


def points(base: LabConfig, scale: str = "cpu") -> dict[str, LabConfig]:
    settings, rows = default.points(base, scale)[default.NAME], {}
    if scale == "demo":
        settings = replace(settings, holdout=200)
        return {f"1000 images, batch {b}": replace(settings, batch_size=b) for b in STEPS}
    settings = replace(settings, width=16, holdout=4000)
    for count, epochs in EPOCHS.items():
        for batch, rates in STEPS.items():
            for lr in rates:
                row = replace(settings, subset=count, epochs=epochs, batch_size=batch, lr=lr)
                rows[f"{count} images, batch {batch}, rate {lr}"] = row
    return rows


if __name__ == "__main__":
    sys.exit(figure("few_images", __doc__, points, show=table))
