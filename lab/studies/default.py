"""The default recipe on 5 000 images, three seeds, with both controls.

    python -m lab.studies.default --scale demo            the embedded shapes, a few minutes
    python -m lab.studies.default --data-dir my_cifar10   half an hour on two cores

A run is `python train.py --dataset folder --data-dir my_cifar10 --subset 5000 --seed SEED`, with
`python eval_linear.py runs/folder` after it.
"""

import sys
from dataclasses import replace

from figures.sweep import figure
from lab.studies.recipe import table
from lab.train import LabConfig

NAME = "default recipe"


def points(base: LabConfig, scale: str = "cpu") -> dict[str, LabConfig]:
    """Today's defaults; the demo's network and number of images are small."""
    default = LabConfig(dataset=base.dataset, data_dir=base.data_dir, device=base.device, knn_every=0)
    if scale == "demo":
        return {NAME: replace(default, subset=1000, width=8, size=16, epochs=4, warmup=1.0, window=512)}
    return {NAME: replace(default, subset=5000 if scale == "cpu" else 0)}


if __name__ == "__main__":
    sys.exit(figure("default", __doc__, points, controls=True, show=table))
