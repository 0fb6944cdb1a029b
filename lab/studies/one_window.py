"""A bank of one window next to the paper's bank of all images: 50 000 images, 10 epochs.

    python -m lab.studies.one_window --scale demo            the embedded shapes, a few minutes
    python -m lab.studies.one_window --data-dir my_cifar10   three hours on two cores

Both rows have the default recipe's other settings and the same number of views.
"""

import math
import sys
from dataclasses import replace

from figures import plots
from figures.sweep import figure
from lab.studies import default
from lab.studies.field_ideas import table
from lab.train import LabConfig

WINDOW, WHOLE = "a bank of one window", "every image in the bank"


def points(base: LabConfig, scale: str = "cpu") -> dict[str, LabConfig]:
    whole = default.points(base, scale)[default.NAME]
    if scale != "demo":
        whole = replace(whole, subset=0, epochs=10 if scale == "cpu" else 200, warmup=1.0)
    rows = 512 if scale == "demo" else 2048
    return {WINDOW: replace(whole, window=rows), WHOLE: replace(whole, window=0)}


def choices(run: dict) -> int:
    """M, the rows that a step's softmax runs over: the window's, or those of whole batches of N."""
    config, last = run["config"], run["epochs"][-1]
    return config["window"] or last["step"] // last["epoch"] * config["batch_size"]


def draw(runs: list[dict], path) -> None:
    """The NCE loss as a share of what guessing costs, over epochs, and both accuracies."""
    figure, (left, right) = plots.plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for i, (name, colour) in enumerate(((WINDOW, plots.BLUE), (WHOLE, plots.ORANGE))):
        nce, own = plots.history(runs, name, "nce"), [run for run in runs if run["name"] == name]  # (S, E)
        label = f"{name}: M = {own[0]['config']['window'] or 'N'}"
        plots.band(left, range(1, nce.shape[1] + 1), nce / math.log(choices(own[0])), colour, label)
        for place, key in enumerate(plots.FIGURES):
            values = plots.percent(runs, name, key)
            x, mean = place + 0.4 * (i - 0.5), values.mean().item()
            right.bar(x, mean, 0.36, color=colour, alpha=0.8, yerr=plots.deviation(values))
            right.plot([x] * len(values), values, ".", color="black", markersize=4)
            right.text(x, 2, f"{mean:.1f}", ha="center", color="white")
    left.set(xlabel="epoch", ylabel="NCE loss / ln M (1: guessing)", ylim=(0, None))
    left.legend()
    words = [label.split(",")[0] for label in plots.FIGURES.values()]
    right.set(xticks=range(len(words)), xticklabels=words, ylabel="top-1 accuracy, %")
    right.grid(False, axis="x")
    gains = [f"{plots.change(runs, WINDOW, WHOLE, key)[0]:+.1f} {word}" for key, word in zip(plots.FIGURES, words)]
    plots.finish(figure, f"A bank of one window, less a bank of every image: {', '.join(gains)}", runs, path)


if __name__ == "__main__":
    sys.exit(figure("one_window", __doc__, points, draw, show=table))
