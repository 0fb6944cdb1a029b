"""What a cheaper bank costs in accuracy: fewer negatives, a narrower bank, or a bank in bf16.

    python -m lab.studies.cheaper_bank --data-dir my_cifar10 --seeds 0 1

30 epochs of the first round's default recipe. `python -m lab.bench overhead` says what each change
saves. This table chooses a default, so accuracy is measured on 4 000 held-out training images.
"""

import sys
from dataclasses import replace

from figures.sweep import figure
from lab.studies import recipe
from lab.train import LabConfig


def points(base: LabConfig, scale: str = "cpu") -> dict[str, LabConfig]:
    default = replace(recipe.held_out(base), epochs=30)
    changes = {
        "D = 2048, the whole bank": {"negatives": 0},
        "D = 2048, K = 1 000": {"negatives": 1000},
        "D = 512, the whole bank": {"negatives": 0, "dim": 512},
        "D = 2048, K = 1 000, bf16 bank": {"negatives": 1000, "bank_dtype": "bf16"},
    }
    return {name: replace(default, **change) for name, change in changes.items()}


if __name__ == "__main__":
    sys.exit(figure("cheaper_bank", __doc__, points))
