"""Figure 1: what accuracy costs. Our method and two-branch methods, at equal epochs and equal time.

    python figures/fig1_cost.py --scale demo            the embedded shapes, a few minutes
    python figures/fig1_cost.py --data-dir my_cifar10   10 000 images, 5.5 hours on two cores
    python figures/fig1_cost.py --scale paper           CIFAR-100, ResNet-18, one GPU

Every point is a run of its own, whose learning rate falls to zero at its end. So the line through a
method's runs of several lengths shows what the method reaches in a given time. That time is the
run's number of views at the method's images/s (lab/studies/throughput.py, which takes turns), so it
does not depend on what else ran beside a run. Needs requirements-bench.txt. The methods' settings:
figures/field.py.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from figures import plots
from figures.field import NAMES, OURS, base_of, contestant, lasting
from figures.sweep import RESULTS, figure, measured_rate, rates_of, spread, training_seconds
from lab.train import LabConfig

EPOCHS = {"demo": (2, 4, 8), "cpu": (10, 20, 40), "paper": (50, 100, 200)}  # the last length is for one branch alone
RATES = RESULTS / "bench" / "methods-cpu.json"  # python -m lab.studies.throughput field --device cpu
SLOW = ("simsiam", "barlow")  # have the longer run alone: with Muon a step takes 20 times as long as ours
ONE_WAY = 1.5  # MoCo v2 one way has a cheaper step: it gets this many times the longest of the others, too
AS_LONG = 7 / 8  # of our longest run takes as long as the longest of SimCLR, by RATES


def points(base: LabConfig, scale: str = "cpu") -> dict[str, LabConfig]:
    base = base_of(base, scale)
    if scale == "cpu":
        base = replace(base, subset=10_000)
    elif scale == "paper":
        base = replace(base, dataset="cifar100")
    rows = {}
    for method, name in NAMES.items():
        short, long, longer = EPOCHS[scale]
        lengths = (short, long, round(ONE_WAY * long)) if method == "mocov2" else (short, long)
        if method in OURS:
            lengths = (short, long, round(AS_LONG * longer), longer) if method == "ours" else (longer,)
        elif method in SLOW:
            lengths = (long,)
        for epochs in lengths:
            rows[f"{name}, {epochs} epochs"] = lasting(contestant(base, method), epochs, one_in=10)
    return rows


def method_of(name: str) -> str:
    return name.rsplit(", ", 1)[0]


def seconds(runs: list[dict], name: str) -> float:
    """Training time: the run's views at the measured images/s of its method (RATES).

    Without a measured rate: by the clock of all seeds.
    """
    own = [run for run in runs if run["name"] == name]
    rate, views = rate_of(own[0]), images_of(own[0]["config"])
    if rate:
        return views / rate
    return training_seconds(*(run["epochs"] for run in own))


def images_of(config: dict) -> int:
    """The images that a run's steps see."""
    return config["subset"] // config["batch_size"] * config["batch_size"] * config["epochs"]


def rates() -> dict:
    return rates_of(RATES)


def rate_of(run: dict) -> float | None:
    method = next((key for key, words in NAMES.items() if words == method_of(run["name"])), "")
    return measured_rate(rates(), method, run["config"])


def draw(runs: list[dict], path) -> None:
    names = list(dict.fromkeys(run["name"] for run in runs))
    methods = list(dict.fromkeys(method_of(name) for name in names))
    figure, axes = plots.plt.subplots(1, 2, figsize=(11.5, 4.6), constrained_layout=True)
    where = f" ({rates()['hardware'].split(',')[0]}, {rates()['threads']} threads)" if rates() else ""
    for axis, (key, words) in zip(axes, plots.FIGURES.items()):
        for i, method in enumerate(methods):
            own = [name for name in names if method_of(name) == method]
            values = [plots.percent(runs, name, key) for name in own]
            axis.errorbar(
                [seconds(runs, name) / 60 for name in own], [v.mean().item() for v in values],
                [plots.deviation(v) for v in values], marker="osp<>^dvP*X"[i], capsize=2, label=method,
                color=plots.plt.get_cmap("cividis")(i / len(methods)) if i else plots.ORANGE, linewidth=1 + (i == 0),
            )  # fmt: skip
        axis.set(xlabel=f"training time, minutes{where}", ylabel=words, xscale="log")
        axis.xaxis.set_major_locator(plots.plt.LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=9)
    plots.finish(figure, title(runs, names), runs, path)


def title(runs: list[dict], names: list[str]) -> str:
    """Our longest run compared with the best run of the others, which takes about as long."""
    ours = [name for name in names if method_of(name) == "ours"][-1]
    others = [name for name in names if method_of(name) not in [NAMES[own] for own in OURS]]
    best = max(others, key=lambda name: plots.percent(runs, name, "linear").mean())
    ratio = seconds(runs, ours) / seconds(runs, best)
    return (
        f"Linear probe: {ours}, less {best}: {plots.changed(runs, ours, best, 'linear')} in {ratio:.2f} times the time"
    )


def table(runs: list[dict]) -> str:
    """Markdown: a line per method and length, accuracies as mean ± deviation over the seeds.

    What a step costs stands next to them; runs from before FLOPs were counted have none.
    """
    heads = ("method", "linear", "kNN (k = 200)", "training, s", "images/s", "GFLOP per image", "step's MiB", "seeds")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in dict.fromkeys(run["name"] for run in runs):
        own = [run for run in runs if run["name"] == name]
        cells = [spread(runs, name, key) for key in ("linear", "knn")]
        views, taken = images_of(own[0]["config"]), seconds(runs, name)
        cells += [f"{taken:.0f}", f"{views / taken:.0f}" if views else "-"]
        cells.append(f"{own[0]['gflop']:.2f}" if "gflop" in own[0] else "-")
        cells += [f"{own[0].get('step_mib', '-')}", f"{len(own)}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(figure("fig1_cost", __doc__, points, draw, show=table, costs=True))
