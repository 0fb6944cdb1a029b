"""Growing views, the best idea of field_ideas.py, at the length of the first default recipe.

    python -m lab.studies.growing_views --data-dir my_cifar10       half an hour on two cores

This table chooses a default, so accuracy is measured on 4 000 held-out training images. Small views
are cheap: runs with growing views get 1.4 times the epochs, which takes about the same time.
"""

import sys
from dataclasses import replace

from figures.sweep import figure
from lab.studies import field_ideas, recipe
from lab.train import LabConfig


def points(base: LabConfig, scale: str = "cpu") -> dict[str, LabConfig]:
    default = recipe.held_out(base)
    growing = replace(default, size_start=default.size // 4 * 2, epochs=round(1.4 * default.epochs))
    return {"the default": default, "growing views, 1.4 times the epochs": growing}


if __name__ == "__main__":
    sys.exit(figure("growing_views", __doc__, points, show=field_ideas.table))
