"""A bank of one window next to the paper's bank of all images: 50 000 images, 10 epochs.

    python -m lab.studies.one_window --scale demo            the embedded shapes, a few minutes
    python -m lab.studies.one_window --data-dir my_cifar10   two hours on two cores

Both rows have the default recipe's other settings and the same number of views.
"""

import sys
from dataclasses import replace

from figures.sweep import figure
from lab.studies import default
from lab.studies.field_ideas import table
from lab.train import LabConfig


def points(base: LabConfig, scale: str = "cpu") -> dict[str, LabConfig]:
    whole = default.points(base, scale)[default.NAME]
    if scale != "demo":
        whole = replace(whole, subset=0, epochs=10 if scale == "cpu" else 200, warmup=1.0)
    rows = 512 if scale == "demo" else 2048
    return {"a bank of one window": replace(whole, window=rows), "every image in the bank": replace(whole, window=0)}


if __name__ == "__main__":
    sys.exit(figure("one_window", __doc__, points, show=table))
