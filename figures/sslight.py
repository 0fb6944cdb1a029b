"""View sampling for small networks: a single view, multi-crop, and SSLight's crops, with ours and two other methods.

    python figures/sslight.py --scale demo                          the embedded shapes and resnet18 alone, a few minutes
    python figures/sslight.py --data-dir my_cifar10                 three backbones; an hour and a half on two cores
    python figures/sslight.py --scale paper                         CIFAR-10, ResNet-18, 200 epochs, one GPU

"single" is what a method does without --views: one view for ours, two for a two-branch method. It stands there twice: with
as many epochs as the others, and with as many as take the arithmetic of SSLight's crops, counted and not timed, so that
they are the same on every machine. Learning rates are those of single views (figures/field.py) for all.
"""

import sys
from dataclasses import replace
from functools import lru_cache

import plots
from field import BEST, NAMES, at_scale, contestant, lasting
from sweep import Config, figure, spread

from eval_linear import evaluate
from images import Dataset
from measure import forward_flop
from models import build_backbone
from views import crops

METHODS = ("ours", *BEST)
TEACHER = ("moco",)  # those of them that send the global crops through a second network, without a backward pass
EPOCHS = {"demo": 2, "cpu": 8, "paper": 200}
BACKBONES = {  # what they need beside their names at each scale; a width of 0 is the usual one
    "demo": {"resnet18": {}},
    # fp32 on every machine for two of them: small depthwise convolutions and tokens are slower in bf16
    "cpu": {
        "mobilenet_v2": dict(width=0, size=16, precision="fp32"), "resnet18": {},
        "vit_tiny": dict(width=24, precision="fp32"),
    },
    "paper": {"mobilenet_v2": {}, "resnet18": {}, "vit_tiny": {}},
}  # fmt: skip
LONGER = "single, SSLight's time"
SAMPLINGS = {"single": "single", LONGER: "single", "multi-crop": "multicrop", "SSLight": "sslight"}
FIGURES = {"linear": "linear probe", "linear_10": "10 % of the labels", "linear_1": "1 % of the labels"}


def points(base: Config, scale: str = "cpu") -> dict[str, Config]:
    base = at_scale(base, scale)
    if scale == "cpu":
        base = replace(base, subset=2000, batch_size=64)
    rows = {}
    for arch, options in BACKBONES[scale].items():
        for method in METHODS:
            config = replace(contestant(base, method), arch=arch, **options)
            for words, name in SAMPLINGS.items():
                mine, epochs = replace(config, views=name), EPOCHS[scale]
                if words == LONGER:
                    epochs = round(epochs * work(replace(config, views="sslight")) / work(mine))
                rows[f"{arch}, {NAMES[method]}: {words}"] = lasting(mine, epochs)
    return rows


def work(config: Config) -> float:
    """Multiply-adds of the backbone for one image in a step; a backward pass counts as two forward ones."""
    made = crops(config)
    sides = [crop.augment.size for crop in made] * (1 if config.method == "ours" or len(made) > 1 else 2)
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
    found: dict[str, list[str]] = {}
    for name in dict.fromkeys(run["name"].rsplit(": ", 1)[0] for run in runs):
        arch, method = name.split(", ", 1)
        found.setdefault(arch, []).append(method)
    return found


def draw(runs: list[dict], path) -> None:
    found = kinds(runs)
    size = (2.5 + 3.2 * len(found), 8.5)
    picture, axes = plots.plt.subplots(
        3, len(found), figsize=size, constrained_layout=True, squeeze=False, sharex="col"
    )
    for row, (key, words) in zip(axes, FIGURES.items()):
        for axis, (arch, methods) in zip(row, found.items()):
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
    for axis, arch in zip(axes[0], found):
        axis.set_title(arch)
    picture.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=9)
    plots.finish(picture, title(runs), runs, path)


def title(runs: list[dict]) -> str:
    """SSLight's crops less the other samplings, on average over backbones and methods, and how often they are ahead."""
    pairs = [f"{arch}, {method}" for arch, methods in kinds(runs).items() for method in methods]
    lines = []
    for other in SAMPLINGS:
        if other != "SSLight":
            gains = [plots.change(runs, f"{pair}: SSLight", f"{pair}: {other}", "linear")[0] for pair in pairs]
            ahead = sum(gain > 0 for gain in gains)
            lines.append(f"{other} {sum(gains) / len(gains):+.1f} (ahead in {ahead} of {len(gains)})")
    return "Linear probe, SSLight's crops less " + "\n".join((lines[0], "; ".join(lines[1:])))


def table(runs: list[dict]) -> str:
    """Markdown: a line a backbone and method, a column a sampling, in it the figures of FIGURES."""
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
