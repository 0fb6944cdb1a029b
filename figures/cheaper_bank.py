"""What a cheaper bank costs in accuracy: the default recipe, 30 epochs of it, with fewer negatives, a narrower bank, or one
kept in bf16.

    python figures/cheaper_bank.py --data-dir my_cifar10        runs what is missing, prints the table

`python bench.py overhead` says what each saves. A default is chosen by this table, so accuracy is that on 4 000 held-out
training images.
"""

import sys
from dataclasses import replace

import recipe
from sweep import Config, figure


def points(base: Config, scale: str = "cpu") -> dict[str, Config]:
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
