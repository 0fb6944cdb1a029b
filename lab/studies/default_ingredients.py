"""What each ingredient of the paper is worth under the default recipe: Muon, a bank of one window.

    python -m lab.studies.default_ingredients --scale demo            a few minutes
    python -m lab.studies.default_ingredients --data-dir my_cifar10   two hours on two cores

The points are those of lab/studies/ingredients.py on the default recipe with a network of width 16.
The start of the bank is that of every image that enters the window.
"""

import sys
from dataclasses import replace

from figures.sweep import figure
from lab.studies import default, ingredients
from lab.train import LabConfig


def points(base: LabConfig, scale: str = "cpu") -> dict[str, LabConfig]:
    settings = default.points(base, scale)[default.NAME]
    return ingredients.points(replace(settings, width=settings.width or 16))


if __name__ == "__main__":
    sys.exit(figure("default_ingredients", __doc__, points, ingredients.draw))
