"""The first round's default recipe on 5 000 images, three seeds, with both controls.

    python -m lab.studies.recipe --data-dir my_cifar10

Each run is `python train.py --dataset folder --data-dir my_cifar10 --subset 5000 --seed SEED` with
the settings of `sweep.ROUND_ONE`, followed by `python eval_linear.py runs/folder`.
"""

import sys
from dataclasses import replace

from figures.sweep import ROUND_ONE, figure, spread
from lab.train import LabConfig

WHOLE = "30 epochs, the whole bank"


def points(base: LabConfig, scale: str = "cpu") -> dict[str, LabConfig]:
    """ROUND_ONE at every scale, and what takes the same time: only the images are the scale's."""
    images = dict(dataset=base.dataset, data_dir=base.data_dir, subset=base.subset)
    default = LabConfig(**ROUND_ONE, **images, device=base.device)
    return {"default": default, WHOLE: replace(default, epochs=30, negatives=0)}


def held_out(base: LabConfig) -> LabConfig:
    """The default, evaluated on 4 000 held-out training images (or half of them), to choose by."""
    return replace(points(base)["default"], holdout=min(4000, (base.subset or 50_000) // 2))


def table(runs: list[dict]) -> str:
    """Markdown: linear probe and kNN of the run and both controls, mean ± deviation over seeds."""
    lines = ["| | linear probe | kNN (k = 200) |", "|---|---|---|"]
    rows = runs + [{"name": name, "final": run["controls"][name]} for run in runs for name in ("untrained", "raw")]
    for name in dict.fromkeys(row["name"] for row in rows):
        lines.append(f"| {name} | {spread(rows, name, 'linear')} | {spread(rows, name, 'knn')} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(figure("recipe", __doc__, points, controls=True, show=table))
