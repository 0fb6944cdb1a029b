"""Small backbones: ours and the best two of the others, with parameters and arithmetic.

    python -m lab.studies.model_efficiency --scale demo                      a few minutes
    python -m lab.studies.model_efficiency --data-dir my_cifar10 --seeds 0   hours on two cores
    python -m lab.studies.model_efficiency --scale paper                     CIFAR-10, one GPU

Every method sees the same number of views: a two-branch method runs for half the epochs. The table
says what the backbone's passes take in all, heads and Muon not counted. Seconds would compare the
machines and what else ran.
"""

import sys
from dataclasses import replace

from figures import plots
from figures.field import BEST, NAMES, base_of, contestant, lasting
from figures.sweep import figure, spread
from lab.backbones import ARCHITECTURES, build_backbone
from lab.studies.sslight import multiply_adds, work
from lab.train import LabConfig


def points(base: LabConfig, scale: str = "cpu") -> dict[str, LabConfig]:
    base = base_of(base, scale)
    epochs = 10 if scale == "cpu" else base.epochs
    rows = {}
    for arch in ARCHITECTURES:
        for method in ("ours", *BEST):
            config = replace(contestant(base, method), arch=arch, width=base.width if arch == "resnet10" else 0)
            length = epochs if method == "ours" else epochs // 2
            rows[f"{arch}, {NAMES[method]}"] = lasting(config, length, one_in=10)
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
    names = list(dict.fromkeys(run["name"] for run in runs))
    plots.bars(path, runs, names, title(runs))


def title(runs: list[dict]) -> str:
    """On how many backbones ours leads the better of the others, and by how much."""
    gains = {}
    for arch in dict.fromkeys(run["config"]["arch"] for run in runs):
        ours, *others = (plots.percent(runs, f"{arch}, {NAMES[m]}", "linear").mean() for m in ("ours", *BEST))
        gains[arch] = (ours - max(others)).item()
    ahead = sum(gain > 0 for gain in gains.values())
    words = ", ".join(f"{arch} {gain:+.1f}" for arch, gain in gains.items())
    return f"Linear probe, ours less the better of the others: ahead on {ahead} of {len(gains)}\n{words}"


def table(runs: list[dict]) -> str:
    """Markdown: a line per backbone and method."""
    lines = [
        "| backbone | parameters, M | multiply-adds per view, M | method "
        "| linear | kNN (k = 200) | backbone, TFLOP | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(run["name"] for run in runs):
        own = [run for run in runs if run["name"] == name]
        arch, method = name.split(", ", 1)
        parameters, madds = cost(own[0]["config"])
        cells = [arch, f"{parameters:.2f}", f"{madds:.0f}", method, *(spread(runs, name, k) for k in ("linear", "knn"))]
        cells += [f"{total(own[0]['config']):.1f}", str(len(own))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(figure("model_efficiency", __doc__, points, draw, show=table))
