"""View sampling on small networks: two global crops, multi-crop and SSLight's crops, five methods.

    python -m lab.studies.sslight --scale demo            shapes, resnet18 alone, a few minutes
    python -m lab.studies.sslight --data-dir my_cifar10   about three hours on two cores
    python -m lab.studies.sslight --scale paper           CIFAR-10, 200 epochs, one GPU

All runs have the default recipe's optimiser, and at cpu scale at least 2 000 steps. The samplings
see an image equally often, so the ones with local crops cost more arithmetic: the table says how
much. At cpu scale a run of resnet18 takes 2 to 9 minutes of one core and one of mobilenet_v2 9 to
18, though its steps have half as many images: so it has one method. All 54 runs took 5.3 hours of
one core, evaluations not counted.
"""

import sys
from dataclasses import replace
from functools import lru_cache

from figures import plots
from figures.field import NAMES, lasting
from figures.sweep import ROUND_ONE, figure, spread
from lab.backbones import build_backbone
from lab.crops import crops
from lab.evaluate import evaluate
from lab.measure import forward_flop
from lab.train import LabConfig
from plumbing.files import Dataset

NAMES = NAMES | {"swav": "SwAV"}
METHODS = ("ours", "simclr", "moco", "dino", "swav")
TEACHER = ("moco", "dino")  # these send the global crops through a second network, without a backward pass
CELLS = {  # the backbones of a scale, their settings and methods
    "demo": {"resnet18": (dict(width=8, size=16, subset=500, batch_size=64, epochs=2), METHODS)},
    "cpu": {
        "resnet18": (dict(width=16, size=16, subset=2000, batch_size=32, epochs=33), METHODS),
        # fp32 on every machine: small depthwise convolutions are slower in bf16
        "mobilenet_v2": (dict(size=16, subset=2000, batch_size=16, epochs=16, precision="fp32"), ("dino",)),
    },
    "paper": dict.fromkeys(("resnet18", "mobilenet_v2"), (dict(size=32, batch_size=512, epochs=200), METHODS)),
}  # fmt: skip
SAMPLINGS = {"two crops": "twice", "multi-crop": "multicrop", "SSLight": "sslight"}
FIGURES = {"linear": "linear probe", "linear_10": "10 % of the labels", "linear_1": "1 % of the labels"}


def points(base: LabConfig, scale: str = "cpu") -> dict[str, LabConfig]:
    default = LabConfig(dataset=base.dataset, data_dir=base.data_dir, device=base.device, knn_every=0, window=0)
    rows = {}
    for arch, (options, methods) in CELLS[scale].items():
        config = lasting(replace(default, arch=arch, **options), options["epochs"])
        for method in methods:
            own = replace(config, **settings(method, config.batch_size))
            rows |= {f"{arch}, {NAMES[method]}: {words}": replace(own, views=v) for words, v in SAMPLINGS.items()}
    return rows


def settings(method: str, batch: int) -> dict:
    """What a method trains with: the default recipe's Muon, whose rate goes with the batch's root.

    SwAV has four prototypes per image of a batch, as lightly's CIFAR-10 benchmark has.
    """
    rate = round(LabConfig.lr * (batch / LabConfig.batch_size) ** 0.5, 4)
    return dict(method=method, optimizer="muon", lr=rate, branch_setting=4.0 * batch if method == "swav" else 0.0)


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


def samplings(runs: list[dict]) -> list[str]:
    return list(dict.fromkeys(run["name"].rsplit(": ", 1)[1] for run in runs))


def draw(runs: list[dict], path) -> None:
    backbones = kinds(runs)
    widths = [len(methods) + 1 for methods in backbones.values()]
    picture, axes = plots.plt.subplots(
        3, len(backbones), figsize=(2.5 + sum(widths), 8.5), constrained_layout=True, squeeze=False, sharex="col",
        width_ratios=widths,
    )  # fmt: skip
    for row, (key, words) in zip(axes, FIGURES.items()):
        for axis, (arch, methods) in zip(row, backbones.items()):
            for i, (sampling, colour) in enumerate(zip(samplings(runs), plots.MARKERS)):
                values = [plots.percent(runs, f"{arch}, {method}: {sampling}", key) for method in methods]
                x = [place + 0.16 * (i - 1) for place in range(len(methods))]
                for place, seeds in zip(x, values):
                    axis.plot([place] * len(seeds), seeds, ".", color=colour, alpha=0.4, markersize=4)
                axis.errorbar(
                    x, [v.mean().item() for v in values], [plots.deviation(v) for v in values], linestyle="none",
                    marker=plots.MARKERS[colour], color=colour, capsize=2, label=sampling,
                )  # fmt: skip
            axis.set_xticks(range(len(methods)), [method.replace(", ", "\n") for method in methods])
            axis.set_xlim(-0.6, len(methods) - 0.4)
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
    for other in samplings(runs):
        if other != "SSLight":
            gains = [plots.change(runs, f"{pair}: SSLight", f"{pair}: {other}", "linear")[0] for pair in pairs]
            ahead = sum(gain > 0 for gain in gains)
            lines.append(f"{other} {sum(gains) / len(gains):+.1f} (ahead in {ahead} of {len(gains)})")
    return "Linear probe, SSLight's crops less " + "\n".join((lines[0], "; ".join(lines[1:])))


def table(runs: list[dict]) -> str:
    """Markdown: a line per backbone and method, a column per sampling, and the costs."""
    columns = samplings(runs)
    lines = [f"| | {' | '.join(columns)} | arithmetic |", "|" + "---|" * (len(columns) + 2)]
    configs = {run["name"]: LabConfig(**(ROUND_ONE | run["config"])) for run in runs}
    for arch, methods in kinds(runs).items():
        for method in methods:
            names = [f"{arch}, {method}: {sampling}" for sampling in columns]
            cells = [" / ".join(spread(runs, name, key) for key in FIGURES) for name in names]
            costs = [configs[name].epochs * work(configs[name]) for name in names]
            ratios = " / ".join(f"{cost / costs[0]:.1f}" for cost in costs)
            lines.append(f"| {arch}, {method} | {' | '.join(cells)} | {ratios} |")
    return "\n".join(lines)


if __name__ == "__main__":
    needs = ("linear_1", "linear_10")
    sys.exit(figure("sslight", __doc__, points, draw, show=table, measure=lambda base, scale: measure, needs=needs))
