"""The search for the default recipe: one changed setting per row, held-out images.

    python -m lab.studies.search --scale demo            the embedded shapes, a few minutes
    python -m lab.studies.search --data-dir my_cifar10   two hours on two cores

Accuracy is measured on held-out training images. All rows have equal numbers of views, so a row
with larger steps has fewer of them. The network has width 16, a quarter of the arithmetic of the
default's.
"""

import sys
from dataclasses import replace

from figures.sweep import figure
from lab.studies.field_ideas import changed, draw, table
from lab.train import LabConfig

CENTRE = "the centre"
EPOCHS = {"demo": 4, "cpu": 36, "paper": 200}
SETTINGS = dict(  # of the centre: the second round's prototype
    dim=512, hidden=512, negatives=0, optimizer="muon", lr=0.05, muon_momentum=0.6, weight_decay=0.3, warmup=2.0,
    temperature=0.1, bank_momentum=0.5, window=1024, visits=8, crop_min=0.2,
)  # fmt: skip
SGD = dict(optimizer="sgd", lr=0.1, weight_decay=1e-4)
LARGE_BATCH = dict(batch_size=256, lr=0.07)
CHANGES = {
    CENTRE: {},
    "no weight decay": dict(weight_decay=0.0),
    "weight decay 1": dict(weight_decay=1.0),
    "crops from 0.1 of the image": dict(crop_min=0.1),
    "D = 256": dict(dim=256),
    "batch 256, rate 0.07": LARGE_BATCH,
    "τ = 0.15": dict(temperature=0.15),
    "16 visits": dict(visits=16),
    "crops from 0.1, batch 256, rate 0.07": LARGE_BATCH | dict(crop_min=0.1),
    "SGD": SGD,
    "every image in the bank": dict(window=0),
    "rate 0.03": dict(lr=0.03),
    "rate 0.08": dict(lr=0.08),
    "m = 0.75": dict(bank_momentum=0.75),
    "window of 512": dict(window=512),
    "window of 2 048": dict(window=2048),
    "jitter 0.6, grey 0.3": dict(jitter=0.6, gray=0.3),
    "CutMix": dict(cutmix=0.5),
    "three layers in the projector": dict(layers=3),
    "SGD, every image in the bank": SGD | dict(window=0),
    "τ = 0.2 and λ = 20": dict(temperature=0.2, lam=20.0),
    "m = 0.25": dict(bank_momentum=0.25),
    "Muon's momentum 0.8": dict(muon_momentum=0.8),
    "4 visits": dict(visits=4),
}


def points(base: LabConfig, scale: str = "cpu") -> dict[str, LabConfig]:
    epochs, holdout = EPOCHS[scale], 200 if scale == "demo" else 4000
    centre = replace(base, **SETTINGS, epochs=epochs, holdout=holdout)
    if scale == "demo":
        centre = replace(centre, dim=64, hidden=128, window=256, warmup=1.0)
    if scale == "paper":
        centre = replace(centre, window=4096)
    return changed(centre, CHANGES)


if __name__ == "__main__":
    sys.exit(figure("search", __doc__, points, draw, show=table))
