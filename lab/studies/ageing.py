"""How rows of the bank age, and what each cure for infrequent updating does to it.

    python -m lab.studies.ageing --scale demo            the embedded shapes, a few minutes
    python -m lab.studies.ageing --data-dir my_cifar10   as lab.studies.cures, whose runs these are

In the middle of the run: the cosine of a row with a fresh embedding of its image, against the steps
since the image last pulled the row. The dotted lines are the cosines of two fresh embeddings.
"""

import sys

from figures import plots
from figures.plots import plt
from figures.sweep import figure, spread
from lab.studies.cures import points


def middle(run: dict) -> dict:
    """The look in the middle of a run."""
    looks = [row for row in run["epochs"] if "ageing" in row]
    return looks[(len(looks) - 1) // 2]


def curve(runs: list[dict], name: str) -> tuple[list[float], list[float], float]:
    """Ages, cosines and the cosine of two fresh views, as means over the seeds."""
    looks = [middle(run) for run in runs if run["name"] == name]
    pairs = [[sum(values) / len(looks) for values in zip(*bins)] for bins in zip(*(look["ageing"] for look in looks))]
    ages, cosines = map(list, zip(*pairs))
    return ages, cosines, sum(look["two_views"] for look in looks) / len(looks)


def table(runs: list[dict]) -> str:
    lines = [
        "| cures | oldest rows, steps | their cosine | two fresh views | linear | kNN (k = 200) |",
        "|---" * 6 + "|",
    ]
    for name in dict.fromkeys(run["name"] for run in runs):
        ages, cosines, fresh = curve(runs, name)
        figures = [spread(runs, name, key) for key in ("linear", "knn")]
        lines.append(f"| {name} | {ages[-1]:.0f} | {cosines[-1]:.2f} | {fresh:.2f} | {figures[0]} | {figures[1]} |")
    return "\n".join(lines)


def draw(runs: list[dict], path) -> None:
    names = list(dict.fromkeys(run["name"] for run in runs))
    picture, axes = plt.subplots(1, 2, figsize=(11, 4.4), constrained_layout=True, sharey=True)
    for axis, windows in zip(axes, (False, True)):
        own = [name for name in names if ("windows" in name) == windows]
        for name, colour in zip(own, plots.MARKERS):
            ages, cosines, fresh = curve(runs, name)
            axis.plot(
                ages,
                cosines,
                color=colour,
                marker=plots.MARKERS[colour],
                label=f"{name}; kNN {spread(runs, name, 'knn')}",
            )
            axis.axhline(fresh, color=colour, linestyle=":", linewidth=1)
        axis.set(xlabel="steps since the image last pulled its row", title="windows" if windows else "random order")
        axis.set_xlim(left=0)
        axis.legend(fontsize=8, loc="best")
    axes[0].set(ylabel="cosine of the row with a fresh embedding")
    gaps = {name: curve(runs, name) for name in names}
    worst, best = (pick(names, key=lambda name: gaps[name][2] - gaps[name][1][-1]) for pick in (max, min))
    words = [f"{gaps[name][2] - gaps[name][1][-1]:.2f} ({name})" for name in (worst, best)]
    title = f"How far the oldest rows lie below two fresh views, in cosine: from {words[0]}\nto {words[1]}"
    plots.finish(picture, title, runs, path)


if __name__ == "__main__":
    sys.exit(figure("ageing", __doc__, points, draw, show=table, looks=2, needs=("ageing",)))
