"""View sampling for small networks: single views, multi-crop and SSLight's crops, three methods.

    python -m lab.studies.sslight --scale demo            shapes, resnet18 alone, a few minutes
    python -m lab.studies.sslight --data-dir my_cifar10   three backbones; 1.5 hours on two cores
    python -m lab.studies.sslight --scale paper           CIFAR-10, ResNet-18, 200 epochs, one GPU

"single" is a method without --views: one view for ours, two for a two-branch method. It runs twice:
for as many epochs as the others, and for the number of epochs that takes the arithmetic of
SSLight's crops. Arithmetic is counted, not timed, so the numbers are the same on every machine. All
runs use the learning rates of single views (figures/field.py).
"""

import sys
from dataclasses import replace
from functools import lru_cache

from figures import plots
from figures.field import BEST, NAMES, at_scale, contestant, lasting
from figures.sweep import figure, spread
from lab.backbones import build_backbone
from lab.crops import crops
from lab.evaluate import evaluate
from lab.measure import forward_flop
from lab.train import LabConfig
from plumbing.files import Dataset

METHODS = ("ours", *BEST)
TEACHER = ("moco",)  # these send the global crops through a second network, without a backward pass
EPOCHS = {"demo": 2, "cpu": 8, "paper": 200}
BACKBONES = {  # and their settings at each scale; a width of 0 is the usual one
    "demo": {"resnet18": {}},
    # fp32 on every machine: small depthwise convolutions and tokens are slower in bf16
    "cpu": {
        "mobilenet_v2": dict(width=0, size=16, precision="fp32"), "resnet18": {},
        "vit_tiny": dict(width=24, precision="fp32"),
    },
    "paper": {"mobilenet_v2": {}, "resnet18": {}, "vit_tiny": {}},
}  # fmt: skip
LONGER = "single, SSLight's time"
SAMPLINGS = {"single": "single", LONGER: "single", "multi-crop": "multicrop", "SSLight": "sslight"}
FIGURES = {"linear": "linear probe", "linear_10": "10 % of the labels", "linear_1": "1 % of the labels"}


def points(base: LabConfig, scale: str = "cpu") -> dict[str, LabConfig]:
    base = at_scale(base, scale)
    if scale == "cpu":
        base = replace(base, subset=2000, batch_size=64)
    rows = {}
    for arch, options in BACKBONES[scale].items():
        for method in METHODS:
            config = replace(contestant(base, method), arch=arch, **options)
            for words, name in SAMPLINGS.items():
                sampled, epochs = replace(config, views=name), EPOCHS[scale]
                if words == LONGER:
                    epochs = round(epochs * work(replace(config, views="sslight")) / work(sampled))
                rows[f"{arch}, {NAMES[method]}: {words}"] = lasting(sampled, epochs)
    return rows


def work(config: LabConfig) -> float:
    """Multiply-adds of the backbone for one image in a step; a backward pass counts twice."""
    views = crops(config)
    sides = [crop.augment.size for crop in views] * (1 if config.method == "ours" or len(views) > 1 else 2)
    taught = [side for side in sides if side == config.size] if config.method in TEACHER else []
    each = {side: multiply_adds(config.arch, config.size, config.width, side) for side in sides}
    return sum(3 * each[side] for side in sides) + sum(each[side] for side in taught)


@lru_cache
def multiply_adds(arch: str, size: int, width: int, side: int) -> float:
    """Of one image of that side, for a backbone made for `size`."""
    return forward_flop(build_backbone(arch, size, width or None), side) / 2


def measure(checkpoint: dict, dataset: Dataset) -> dict:
    device = checkpoint["config"]["device"]
    return evaluate(checkpoint, dataset, device=device, slow=("few_labels",), controls=False, quiet=True)["trained"]


def kinds(runs: list[dict]) -> dict[str, list[str]]:
    """The methods of every backbone that was run."""
    methods: dict[str, list[str]] = {}
    for name in dict.fromkeys(run["name"].rsplit(": ", 1)[0] for run in runs):
        arch, method = name.split(", ", 1)
        methods.setdefault(arch, []).append(method)
    return methods


def draw(runs: list[dict], path) -> None:
    backbones = kinds(runs)
    size = (2.5 + 3.2 * len(backbones), 8.5)
    picture, axes = plots.plt.subplots(
        3, len(backbones), figsize=size, constrained_layout=True, squeeze=False, sharex="col"
    )
    for row, (key, words) in zip(axes, FIGURES.items()):
        for axis, (arch, methods) in zip(row, backbones.items()):
            for i, (sampling, colour) in enumerate(zip(SAMPLINGS, plots.MARKERS)):
                values = [plots.percent(runs, f"{arch}, {method}: {sampling}", key) for method in methods]
                x = [place + 0.16 * (i - 1.5) for place in range(len(methods))]
                for place, seeds in zip(x, values):
                    axis.plot([place] * len(seeds), seeds, ".", color=colour, alpha=0.4, markersize=4)
                axis.errorbar(
                    x, [v.mean().item() for v in values], [plots.deviation(v) for v in values], linestyle="none",
                    marker=plots.MARKERS[colour], color=colour, capsize=2, label=sampling,
                )  # fmt: skip
            axis.set_xticks(range(len(methods)), [method.replace(", ", "\n") for method in methods])
            axis.grid(False, axis="x")
        row[0].set_ylabel(f"{words}, top-1 %")
    for axis, arch in zip(axes[0], backbones):
        axis.set_title(arch)
    picture.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=9)
    plots.finish(picture, title(runs), runs, path)


def title(runs: list[dict]) -> str:
    """SSLight's crops less the other samplings: the mean, and how often SSLight's are ahead."""
    pairs = [f"{arch}, {method}" for arch, methods in kinds(runs).items() for method in methods]
    lines = []
    for other in SAMPLINGS:
        if other != "SSLight":
            gains = [plots.change(runs, f"{pair}: SSLight", f"{pair}: {other}", "linear")[0] for pair in pairs]
            ahead = sum(gain > 0 for gain in gains)
            lines.append(f"{other} {sum(gains) / len(gains):+.1f} (ahead in {ahead} of {len(gains)})")
    return "Linear probe, SSLight's crops less " + "\n".join((lines[0], "; ".join(lines[1:])))


def table(runs: list[dict]) -> str:
    """Markdown: a line per backbone and method, a column per sampling with FIGURES."""
    lines = [f"| | {' | '.join(SAMPLINGS)} | epochs of {LONGER} |", "|" + "---|" * (len(SAMPLINGS) + 2)]
    for arch, methods in kinds(runs).items():
        for method in methods:
            names = {sampling: f"{arch}, {method}: {sampling}" for sampling in SAMPLINGS}
            cells = [" / ".join(spread(runs, name, key) for key in FIGURES) for name in names.values()]
            epochs = next(run["config"]["epochs"] for run in runs if run["name"] == names[LONGER])
            lines.append(f"| {arch}, {method} | {' | '.join(cells)} | {epochs} |")
    return "\n".join(lines)


if __name__ == "__main__":
    needs = ("linear_1", "linear_10")
    sys.exit(figure("sslight", __doc__, points, draw, show=table, measure=lambda base, scale: measure, needs=needs))
