"""Figure 1 of the paper: what accuracy costs. Our method beside the two-branch ones, at equal epochs and at equal time.

    python figures/fig1_cost.py --scale demo                        the embedded shapes, a few minutes
    python figures/fig1_cost.py --data-dir my_cifar10               10 000 images, resnet10; two hours on two cores
    python figures/fig1_cost.py --scale paper                       CIFAR-100, ResNet-18, one GPU

Every point is a run of its own, whose learning rate falls to zero at its end: a line through a method's runs of several
lengths is what it reaches in a given time. Needs requirements-bench.txt. Learning rate and weight decay of the others are
in figures/field.py.
"""

import statistics
import sys
from dataclasses import replace

import plots
from field import NAMES, OURS, at_scale, contestant, lasting
from sweep import Config, figure, spread

EPOCHS = {"demo": (2, 4, 8), "cpu": (5, 10, 20), "paper": (50, 200, 400)}  # the last for one branch alone


def points(base: Config, scale: str = "cpu") -> dict[str, Config]:
    base = at_scale(base, scale)
    if scale == "cpu":
        base = replace(base, subset=10_000)
    elif scale == "paper":
        base = replace(base, dataset="cifar100")
    rows = {}
    for method, name in NAMES.items():
        short, long, longer = EPOCHS[scale]
        lengths = {"ours": (short, long, longer)}.get(method, (longer,) if method in OURS else (short, long))
        for epochs in lengths:
            rows[f"{name}, {epochs} epochs"] = lasting(contestant(base, method), epochs)
    return rows


def method_of(name: str) -> str:
    return name.rsplit(", ", 1)[0]


def seconds(runs: list[dict], name: str) -> float:
    """Training time: the median epoch's, over all seeds, for every epoch. What else ran on the machine counts for less."""
    mine = [run["epochs"] for run in runs if run["name"] == name]
    clocks = [[0.0, *(row["seconds"] for row in epochs)] for epochs in mine]
    return len(mine[0]) * statistics.median(b - a for clock in clocks for a, b in zip(clock, clock[1:]))


def draw(runs: list[dict], path) -> None:
    names = list(dict.fromkeys(run["name"] for run in runs))
    methods = list(dict.fromkeys(method_of(name) for name in names))
    figure, axes = plots.plt.subplots(1, 2, figsize=(11.5, 4.6), constrained_layout=True)
    for axis, (key, words) in zip(axes, plots.FIGURES.items()):
        for i, method in enumerate(methods):
            mine = [name for name in names if method_of(name) == method]
            values = [plots.percent(runs, name, key) for name in mine]
            axis.errorbar(
                [seconds(runs, name) / 60 for name in mine], [v.mean().item() for v in values],
                [plots.deviation(v) for v in values], marker="osp<>^dvP*X"[i], capsize=2, label=method,
                color=plots.plt.get_cmap("cividis")(i / len(methods)) if i else plots.ORANGE, linewidth=1 + (i == 0),
            )  # fmt: skip
        axis.set(xlabel="training time, minutes", ylabel=words, xscale="log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("{x:.2g}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=9)
    plots.finish(figure, title(runs, names), runs, path)


def title(runs: list[dict], names: list[str]) -> str:
    """Ours at its longest beside the best of the others at theirs, which takes about as long."""
    mine = [name for name in names if method_of(name) == "ours"]
    others = [name for name in names if method_of(name) not in [NAMES[own] for own in OURS]]
    best = max(others, key=lambda name: plots.percent(runs, name, "linear").mean())
    gain, error = plots.change(runs, mine[-1], best, "linear")
    margin = f" ± {error:.1f}" if len(plots.percent(runs, best, "linear")) > 1 else ""
    ratio = seconds(runs, mine[-1]) / seconds(runs, best)
    return f"Linear probe: {mine[-1]}, less {best}: {gain:+.1f}{margin} in {ratio:.2f} times the time"


def table(runs: list[dict]) -> str:
    """Markdown: a line a run length, accuracies as mean ± deviation over seeds, time as their mean."""
    lines = [
        "| method | linear | kNN (k = 200) | training, s | memory of a step, MiB | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(run["name"] for run in runs):
        mine = [run for run in runs if run["name"] == name]
        cells = [spread(runs, name, key) for key in ("linear", "knn")]
        cells += [f"{seconds(runs, name):.0f}", f"{mine[0]['step_mib']}", f"{len(mine)}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(figure("fig1_cost", __doc__, points, draw, show=table, memory=True))
