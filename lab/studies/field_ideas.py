"""What might improve our method at the same price: one changed setting per row, held-out images.

    python -m lab.studies.field_ideas --scale demo            the embedded shapes, a few minutes
    python -m lab.studies.field_ideas --data-dir my_cifar10   half an hour on two cores
    python -m lab.studies.field_ideas --scale paper           CIFAR-10, ResNet-18, one GPU

Accuracy is measured on held-out training images. Rows that change the cost of a view or a step
change the number of epochs too, so that all rows take about the same arithmetic.
"""

import statistics
import sys
from dataclasses import replace

from figures import plots
from figures.field import at_scale, lasting
from figures.sweep import figure, spread
from lab.train import LabConfig

EPOCHS = {"demo": 4, "cpu": 10, "paper": 200}


def points(base: LabConfig, scale: str = "cpu") -> dict[str, LabConfig]:
    epochs, side = EPOCHS[scale], base.size
    base = replace(lasting(at_scale(base, scale), epochs), holdout=200 if scale == "demo" else 4000)

    def even(share: float) -> int:
        return round(side * share / 2) * 2

    changes = {
        "the default": {},
        "τ = 0.05": dict(temperature=0.05),
        "τ = 0.1": dict(temperature=0.1),
        "D four times as wide": dict(dim=4 * base.dim),
        "three layers in the projector": dict(layers=3),
        "softmax over the whole bank": dict(negatives=0),
        "half the batch and learning rate": dict(batch_size=base.batch_size // 2, lr=base.lr / 2),
        "no warm-up": dict(warmup=0.0),
        "weight decay 5e-4": dict(weight_decay=5e-4),
        "crops from 0.08 of the image": dict(crop_min=0.08),
        "crops from 0.3": dict(crop_min=0.3),
        "jitter 0.6": dict(jitter=0.6),
        "two views a step, half the epochs": dict(views="twice", epochs=epochs // 2, warmup=base.warmup / 2),
        "views of 5/6 the side, 1.4 times the epochs": dict(size=even(5 / 6), epochs=round(1.4 * epochs)),
        "views that grow from half the side, 1.4 times the epochs": dict(
            size_start=even(1 / 2), epochs=round(1.4 * epochs)
        ),
    }
    return changed(base, changes)


def changed(base: LabConfig, changes: dict[str, dict]) -> dict[str, LabConfig]:
    """base with each of the changes; the first is none, others that change nothing are left out."""
    first, rows = next(iter(changes)), {name: replace(base, **change) for name, change in changes.items()}
    return {name: config for name, config in rows.items() if name == first or config != base}


def draw(runs: list[dict], path) -> None:
    names = list(dict.fromkeys(run["name"] for run in runs))
    gains = {name: plots.change(runs, name, names[0], "linear")[0] for name in names[1:]}
    best = max(gains, key=gains.__getitem__)
    words = plots.changed(runs, best, names[0], "linear")
    title = f"Linear probe on held-out images, less {names[0]}'s: at most {words}\nwith {best}"
    plots.bars(path, runs, names, title)


def table(runs: list[dict]) -> str:
    """Markdown: a line per change, accuracies as mean ± deviation over the seeds."""
    lines = ["| changed | linear | kNN (k = 200) | training, s | seeds |", "|---|---|---|---|---|"]
    for name in dict.fromkeys(run["name"] for run in runs):
        seconds = [run["epochs"][-1]["seconds"] for run in runs if run["name"] == name]
        cells = [spread(runs, name, key) for key in ("linear", "knn")] + [f"{statistics.median(seconds):.0f}"]
        lines.append(f"| {name} | {' | '.join(cells)} | {len(seconds)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(figure("field_ideas", __doc__, points, draw, show=table))
