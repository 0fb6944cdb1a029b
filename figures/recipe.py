"""The default recipe on 5 000 images, three seeds, beside both controls: the first table of the README.

    python figures/recipe.py --data-dir my_cifar10        runs what is missing, prints the table

Each run is `python train.py --dataset folder --data-dir my_cifar10 --subset 5000 --seed SEED` followed by
`python eval_linear.py runs/folder`.
"""

import sys
from dataclasses import replace

from sweep import Config, figure, spread

WHOLE = "30 epochs, the whole bank"


def points(base: Config, scale: str = "cpu") -> dict[str, Config]:
    """The defaults of `config.Config`, whatever the scale, and what takes the same time: only the images are the scale's."""
    default = Config(dataset=base.dataset, data_dir=base.data_dir, subset=base.subset, device=base.device)
    return {"default": default, WHOLE: replace(default, epochs=30, negatives=0)}


def held_out(base: Config) -> Config:
    """The default, read on 4 000 held-out training images (or half of them): for what it is chosen by."""
    return replace(points(base)["default"], holdout=min(4000, (base.subset or 50_000) // 2))


def table(runs: list[dict]) -> str:
    """Markdown: kNN and linear probe of the trained encoder and of both controls, mean ± deviation over seeds, percent."""
    lines = ["| | linear probe | kNN (k = 200) |", "|---|---|---|"]
    rows = runs + [{"name": name, "final": run["controls"][name]} for run in runs for name in ("untrained", "raw")]
    for name in dict.fromkeys(row["name"] for row in rows):
        lines.append(f"| {name} | {spread(rows, name, 'linear')} | {spread(rows, name, 'knn')} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(figure("recipe", __doc__, points, controls=True, show=table))
