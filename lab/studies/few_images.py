"""Batch size and m for few images: the default recipe on 1 000 and 2 500 of them.

    python -m lab.studies.few_images --scale demo                      the embedded shapes
    python -m lab.studies.few_images --data-dir my_cifar10 --seeds 0   half an hour on two cores

Muon's rate is 0.07 for a batch of 256 and changes with the square root of the batch. Accuracy is
measured on held-out training images, with the labels of the images that trained. The network has
width 16.
"""

import sys
from dataclasses import replace

from figures.sweep import figure
from lab.studies import default
from lab.studies.field_ideas import table
from lab.train import LabConfig

EPOCHS = {1000: 100, 2500: 60}
BATCHES = (64, 128, 256)


def points(base: LabConfig, scale: str = "cpu") -> dict[str, LabConfig]:
    settings, rows = default.points(base, scale)[default.NAME], {}
    if scale == "demo":
        settings = replace(settings, holdout=200)
        return {f"1000 images, batch {b}": replace(settings, batch_size=b) for b in BATCHES}
    settings = replace(settings, width=16, holdout=4000)
    for count, epochs in EPOCHS.items():
        for batch in BATCHES:
            lr = round(0.07 * (batch / 256) ** 0.5, 3)
            row = replace(settings, subset=count, epochs=epochs, batch_size=batch, lr=lr)
            for m in (0.5, 0.75) if count == 1000 else (settings.bank_momentum,):
                rows[f"{count} images, batch {batch}, m = {m}"] = replace(row, bank_momentum=m)
    return rows


if __name__ == "__main__":
    sys.exit(figure("few_images", __doc__, points, show=table))
