"""Small backbones: ours and the best two of the others, with parameters and arithmetic.

    python -m lab.studies.model_efficiency --scale demo                      a few minutes
    python -m lab.studies.model_efficiency --data-dir my_cifar10             four hours, two cores
    python -m lab.studies.model_efficiency --scale paper                     CIFAR-10, one GPU

Every backbone of lab/backbones.py takes part. At cpu scale ResNets have width 16 and vit_tiny has
48: a quarter of their channels. Mobile networks have their own width. Every method sees the same
number of views: a two-branch method runs for half the epochs. The table says what the backbone's
passes take in all, heads and Muon not counted. Seconds would compare the machines and what else
ran.
"""

import sys
from dataclasses import replace

from figures import plots
from figures.field import BEST, NAMES, base_of, contestant, lasting
from figures.sweep import figure, spread
from lab.backbones import ARCHITECTURES, MOBILE, build_backbone
from lab.studies.sslight import multiply_adds, work
from lab.train import LabConfig

METHODS = ("ours", *BEST)


def points(base: LabConfig, scale: str = "cpu") -> dict[str, LabConfig]:
    base = base_of(base, scale)
    epochs = 10 if scale == "cpu" else base.epochs
    rows = {}
    for arch in ARCHITECTURES:
        width = 0 if arch in MOBILE else base.width * (3 if arch == "vit_tiny" else 1)
        backbone = f"{arch} of width {width}" if width else arch
        for method in METHODS:
            config = replace(contestant(base, method), arch=arch, width=width)
            length = epochs if method == "ours" else epochs // 2
            rows[f"{backbone}, {NAMES[method]}"] = lasting(config, length, one_in=10)
    return rows


def cost(config: dict) -> tuple[float, float]:
    """Millions of the backbone's parameters, and of its multiply-adds for one training view."""
    arch, size, width = config["arch"], config["size"], config["width"]
    parameters = sum(p.numel() for p in build_backbone(arch, size, width or None).parameters())
    return parameters / 1e6, multiply_adds(arch, size, width, size) / 1e6


def total(config: dict) -> float:
    """TFLOP of a run's passes through the backbone, two for a multiply-add."""
    steps = config["epochs"] * (config["subset"] // config["batch_size"])
    return 2 * work(LabConfig(**config)) * steps * config["batch_size"] / 1e12


def draw(runs: list[dict], path) -> None:
    """A line per backbone, a marker per method: mean, deviation and every seed, of both figures."""
    backbones = backbones_of(runs)
    figure, axes = plots.plt.subplots(1, 2, figsize=(11, 0.55 * len(backbones) + 1.9), layout="constrained")
    for axis, (key, words) in zip(axes, plots.FIGURES.items()):
        for method, colour, shift in zip(METHODS, plots.MARKERS, (-0.22, 0.0, 0.22)):
            values = [plots.percent(runs, f"{backbone}, {NAMES[method]}", key) for backbone in backbones]
            means, spreads = [v.mean() for v in values], [plots.deviation(v) for v in values]
            y = [place + shift for place in range(len(backbones))]
            style = dict(fmt=plots.MARKERS[colour], color=colour, markersize=7, label=NAMES[method])
            axis.errorbar(means, y, xerr=spreads, **style)
            for place, seeds in zip(y, values):
                axis.plot(seeds, [place] * len(seeds), ".", color="black", markersize=3, zorder=3)
        axis.set(yticks=range(len(backbones)), yticklabels=backbones, xlabel=words)
        axis.invert_yaxis()
    axes[1].set_yticklabels([])
    axes[0].legend(loc="best")
    plots.finish(figure, title(runs), runs, path)


def backbones_of(runs: list[dict]) -> list[str]:
    """The backbones that have a run of every method."""
    names = {run["name"] for run in runs}
    backbones = dict.fromkeys(run["name"].split(", ")[0] for run in runs)
    return [b for b in backbones if all(f"{b}, {NAMES[m]}" in names for m in METHODS)]


def title(runs: list[dict]) -> str:
    """On how many backbones ours leads the better of the others, and by how much."""
    gains = {}
    for backbone in backbones_of(runs):
        ours, *others = (f"{backbone}, {NAMES[method]}" for method in METHODS)
        gains[backbone.split(" ")[0]] = min(plots.change(runs, ours, other, "linear")[0] for other in others)
    ahead = sum(gain > 0 for gain in gains.values())
    words = [f"{arch} {gain:+.1f}" for arch, gain in gains.items()]
    lines = (", ".join(words[i : i + 4]) for i in range(0, len(words), 4))
    head = f"Linear probe, ours less the better of the others: ahead on {ahead} of {len(gains)}"
    return "\n".join((head, *lines))


def table(runs: list[dict]) -> str:
    """Markdown: a line per backbone and method."""
    lines = [
        "| backbone | parameters, M | multiply-adds per view, M | method "
        "| linear | kNN (k = 200) | backbone, TFLOP | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(run["name"] for run in runs):
        own = [run for run in runs if run["name"] == name]
        backbone, method = name.split(", ", 1)
        parameters, madds = cost(own[0]["config"])
        cells = [backbone, f"{parameters:.2f}", f"{madds:.0f}", method]
        cells += [spread(runs, name, key) for key in ("linear", "knn")]
        cells += [f"{total(own[0]['config']):.1f}", str(len(own))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(figure("model_efficiency", __doc__, points, draw, show=table))
