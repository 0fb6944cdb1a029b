"""Small backbones: ours beside the best two of the others on six of them, with their parameters and their arithmetic.

    python figures/model_efficiency.py --scale demo                 the embedded shapes, a few minutes
    python figures/model_efficiency.py --data-dir my_cifar10 --seeds 0       two hours on two cores, one seed
    python figures/model_efficiency.py --scale paper                CIFAR-10, 200 epochs, one GPU

Every method sees as many views: a two-branch one runs for half the epochs.
"""

import sys
from dataclasses import replace

import plots
from field import BEST, NAMES, at_scale, contestant, lasting
from sslight import multiply_adds
from sweep import Config, figure, spread

from models import build_backbone

ARCHITECTURES = ("resnet10", "mobilenet_v3_small", "mobilenet_v2", "efficientnet_b0", "vit_tiny", "resnet18")


def points(base: Config, scale: str = "cpu") -> dict[str, Config]:
    base = at_scale(base, scale)
    epochs = 10 if scale == "cpu" else base.epochs
    rows = {}
    for arch in ARCHITECTURES:
        for method in ("ours", *BEST):
            config = replace(contestant(base, method), arch=arch, width=base.width if arch == "resnet10" else 0)
            rows[f"{arch}, {NAMES[method]}"] = lasting(config, epochs if method == "ours" else epochs // 2)
    return rows


def cost(config: dict) -> tuple[float, float]:
    """Millions of parameters of the backbone, and millions of multiply-adds for one training view."""
    arch, size, width = config["arch"], config["size"], config["width"]
    parameters = sum(p.numel() for p in build_backbone(arch, size, width or None).parameters())
    return parameters / 1e6, multiply_adds(arch, size, width, size) / 1e6


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
    """Markdown: a line a backbone and method."""
    lines = [
        "| backbone | parameters, M | multiply-adds a view, M | method | linear | kNN (k = 200) | training, s | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(run["name"] for run in runs):
        mine = [run for run in runs if run["name"] == name]
        arch, method = name.split(", ", 1)
        parameters, madds = cost(mine[0]["config"])
        seconds = sum(run["epochs"][-1]["seconds"] for run in mine) / len(mine)
        accuracies = f"{spread(runs, name, 'linear')} | {spread(runs, name, 'knn')}"
        lines.append(
            f"| {arch} | {parameters:.2f} | {madds:.0f} | {method} | {accuracies} | {seconds:.0f} | {len(mine)} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(figure("model_efficiency", __doc__, points, draw, show=table))
