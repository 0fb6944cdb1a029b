"""Plots that the figures share: colours for colour-blind readers, lines and bars with their spread.

Every function takes the runs of `sweep.sweep`: dictionaries with "name", "seed", "final", "epochs".
"""

import math
from collections import Counter

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt

BLUE, ORANGE, GREEN, GREY, PURPLE = "#0072b2", "#d55e00", "#009e73", "#666666", "#cc79a7"  # Okabe and Ito's
MARKERS = {BLUE: "o", ORANGE: "s", GREEN: "^", GREY: "d", PURPLE: "v"}
FIGURES = {"linear": "linear probe, top-1 %", "knn": "kNN (k = 200), top-1 %"}

plt.rcParams.update({
    "figure.dpi": 110, "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11,
    "figure.titlesize": 12, "legend.frameon": False, "axes.grid": True, "grid.alpha": 0.25,
})  # fmt: skip


def percent(runs: list[dict], name: str, key: str) -> torch.Tensor:
    """The final accuracies (S,) of a point, in percent and in the order of the seeds."""
    own = sorted((run for run in runs if run["name"] == name), key=lambda run: run["seed"])
    return torch.tensor([100 * run["final"][key] for run in own], dtype=torch.float64)


def highest(runs: list[dict], names: dict, key: str = "knn"):
    """The key of `names` whose point has the highest mean, among the points with the most seeds."""
    values = {k: percent(runs, name, key) for k, name in names.items()}
    most = max(map(len, values.values()))
    return max(names, key=lambda k: values[k].mean().item() if most and len(values[k]) == most else -1.0)


def deviation(values: torch.Tensor) -> float:
    return values.std().item() if len(values) > 1 else 0.0


def change(runs: list[dict], name: str, other: str, key: str) -> tuple[float, float]:
    """How much higher point `name` is than `other`, in percent points, and the standard error.

    Over the seeds that both have. With none of them the difference is nan, with one the error: a
    sweep may be drawn before it is complete.
    """
    both = {run["seed"] for run in runs if run["name"] == name} & {run["seed"] for run in runs if run["name"] == other}
    runs = [run for run in runs if run["seed"] in both]
    a, b = percent(runs, name, key), percent(runs, other, key)
    error = ((a.var() + b.var()) / len(both)) ** 0.5 if len(both) > 1 else torch.nan
    return (a.mean() - b.mean()).item(), float(error)


def changed(runs: list[dict], name: str, other: str, key: str) -> str:
    """`change` in words."""
    gain, error = change(runs, name, other, key)
    return f"{gain:+.1f} with one seed" if math.isnan(error) else f"{gain:+.1f} ± {error:.1f}"


def settings(runs: list[dict]) -> str:
    """What the picture was measured on, for its foot, without what differs between its runs."""
    config = runs[0]["config"]
    same = {key: len({str(run["config"].get(key)) for run in runs}) == 1 for key in config}
    count = f"{config['subset']:,} images of ".replace(",", " ") if config["subset"] else ""
    words = {
        "subset": count + ("a folder" if config["dataset"] == "folder" else config["dataset"]),
        "arch": config["arch"] + (f" of width {config['width']}" if config["width"] else ""),
        "size": f"{config['size']} px views", "dim": f"D = {config['dim']}", "epochs": f"{config['epochs']} epochs",
    }  # fmt: skip
    counts = Counter(run["name"] for run in runs).values()
    seeds = f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else max(counts)
    shown = [text for key, text in words.items() if same[key]] + [f"{seeds} seed{'s' * (max(counts) > 1)}"]
    machines = Counter(run["hardware"] for run in runs).most_common()
    return "; ".join([", ".join(shown), *(machine for machine, _ in machines)])


def finish(figure, title: str, runs: list[dict], path) -> None:
    figure.suptitle(title)
    figure.supxlabel(settings(runs), fontsize=8, color=GREY)
    figure.savefig(path, format="png")
    plt.close(figure)


def lines(path, runs: list[dict], points: dict[str, list[str]], labels: list[str], xlabel: str, title: str) -> None:
    """Linear probe and kNN, side by side, over equally spaced labels.

    Shows the mean, the standard deviation and every run. points gives, for each line's legend, the
    names of its points, one per label.
    """
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for axis, (key, words) in zip(axes, FIGURES.items()):
        for i, (legend, names) in enumerate(points.items()):
            colour = (BLUE, ORANGE, GREEN)[i]
            x = torch.arange(len(names)) + 0.08 * (i - (len(points) - 1) / 2)  # next to each other, not on top
            values = [percent(runs, name, key) for name in names]
            for place, seeds in zip(x.tolist(), values):
                axis.plot([place] * len(seeds), seeds, ".", color=colour, alpha=0.4, markersize=5)
            means, spreads = [v.mean().item() for v in values], [deviation(v) for v in values]
            axis.errorbar(x, means, spreads, color=colour, marker=MARKERS[colour], capsize=3, label=legend)
        axis.set(xlabel=xlabel, ylabel=words, xticks=range(len(labels)), xticklabels=labels)
    axes[0].legend()
    finish(figure, title, runs, path)


def bars(path, runs: list[dict], names: list[str], title: str) -> None:
    """Two horizontal bars per point, linear probe and kNN, with deviation and every run."""
    figure, axis = plt.subplots(figsize=(10, 0.6 * len(names) + 1.5), constrained_layout=True)
    for (key, words), colour, shift in zip(FIGURES.items(), (BLUE, ORANGE), (-0.19, 0.19)):
        values = [percent(runs, name, key) for name in names]
        means = [v.mean().item() for v in values]
        y = [place + shift for place in range(len(names))]
        axis.barh(
            y, means, 0.36, color=colour, alpha=0.8, label=words.split(",")[0], xerr=[deviation(v) for v in values]
        )
        for place, seeds, mean in zip(y, values, means):
            axis.plot(seeds, [place] * len(seeds), ".", color="black", markersize=4)
            axis.text(1, place, f"{mean:.1f}", va="center", color="white", fontsize=9)
    axis.set(yticks=range(len(names)), yticklabels=names, xlabel="top-1 accuracy, %")
    axis.invert_yaxis()
    axis.grid(False, axis="y")
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    finish(figure, title, runs, path)


def band(axis, x, values: torch.Tensor, colour: str, label: str = "", style: str = "-") -> None:
    """A line through the mean of values (S, X) over seeds; the range of the seeds is shaded."""
    axis.plot(x, values.mean(0), color=colour, label=label, linestyle=style, marker=MARKERS[colour], markersize=3)
    axis.fill_between(x, values.amin(0), values.amax(0), color=colour, alpha=0.2, linewidth=0)


def history(runs: list[dict], name: str, key: str) -> torch.Tensor:
    """The epochs' figures (S, X) of a point, from the epochs that have them."""
    own = [run for run in runs if run["name"] == name]
    return torch.tensor([[row[key] for row in run["epochs"] if key in row] for run in own], dtype=torch.float64)
