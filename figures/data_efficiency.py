"""How little data will do: pretrained on 1 000 to 50 000 images, read with all their labels, 10 % and 1 % of them.

    python figures/data_efficiency.py --scale demo                  the embedded shapes, a few minutes
    python figures/data_efficiency.py --data-dir my_cifar10         an hour on two cores
    python figures/data_efficiency.py --scale paper                 CIFAR-10, ResNet-18, one GPU

Labels are those of the images that were pretrained on. At one size every method sees as many views: a two-branch one runs
for half the epochs. Beside them stands the same backbone trained from scratch with the same labels and for as many steps as
ours is pretrained, the crops and flips of fine-tuning for its augmentation.
"""

import sys
from dataclasses import replace

import plots
from field import BEST, NAMES, at_scale, contestant, lasting
from sweep import Config, figure, spread

from eval_linear import eval_side, evaluate
from images import Dataset
from models import pick_device, pick_precision
from probes import draw_labels, train_head
from runs import new_encoder

EPOCHS = {  # of ours, by the number of images
    "demo": {200: 10, 1000: 4},
    "cpu": {1000: 100, 2500: 40, 10_000: 14, 50_000: 4},
    "paper": {1000: 800, 2500: 400, 10_000: 200, 50_000: 200},
}
LABELS = {"all labels": "linear", "10 % of the labels": "linear_10", "1 %": "linear_1"}
SCRATCH = "from scratch"


def points(base: Config, scale: str = "cpu") -> dict[str, Config]:
    rows = {}
    for count, epochs in EPOCHS[scale].items():
        for method in ("ours", *BEST):
            config = contestant(at_scale(base, scale), method)
            epochs_here = epochs if method == "ours" else epochs // 2
            rows[f"{NAMES[method]}, {count} images"] = lasting(replace(config, subset=count), epochs_here)
    return rows


def measure(checkpoint: dict, dataset: Dataset) -> dict:
    """The figures of the frozen backbone, and beside our own method's those of training from scratch."""
    config = checkpoint["config"]
    figures = evaluate(checkpoint, dataset, 0, config["device"], 200, ("few_labels",), 0, False, True)["trained"]
    return figures | (from_scratch(config, dataset) if config["method"] == "ours" else {})


def from_scratch(config: dict, dataset: Dataset) -> dict:
    """Accuracies of the backbone trained with all labels, 10 % and 1 %, each for config's number of steps."""
    device, size = pick_device(config["device"]), eval_side(config, dataset.test)
    steps, figures = config["epochs"] * (len(dataset.train) // config["batch_size"]), {}
    for share, key in zip((1.0, 0.1, 0.01), LABELS.values()):
        chosen = draw_labels(dataset.labelled.labels.cpu(), share, config["seed"])
        part = replace(dataset, labelled=dataset.labelled.take(chosen)).to(device)
        encoder = new_encoder(config)
        encoder.precision = pick_precision("auto", device)
        epochs = max(1, round(steps / (len(chosen) // min(128, len(chosen)))))
        figures[f"scratch_{key}"] = train_head(encoder, part, size, device, epochs, True, config["seed"])
    return figures


def rows_of(runs: list[dict]) -> dict[str, dict[int, list[dict]]]:
    """Runs by method and number of images; those from scratch are runs of their own."""
    found: dict[str, dict[int, list[dict]]] = {}
    for run in runs:
        method, count = run["name"].rsplit(", ", 1)
        found.setdefault(method, {}).setdefault(int(count.split()[0]), []).append(run)
    scratch = [
        {count: [run | {"final": {k: run["final"][f"scratch_{k}"] for k in LABELS.values()}} for run in mine]}
        for count, mine in found["ours"].items()
    ]
    return found | {SCRATCH: {count: mine for row in scratch for count, mine in row.items()}}


def draw(runs: list[dict], path) -> None:
    found = rows_of(runs)
    figure, axes = plots.plt.subplots(1, 3, figsize=(11, 4), constrained_layout=True, sharey=True)
    colours = (plots.ORANGE, plots.BLUE, plots.GREEN, plots.GREY)
    for axis, (words, key) in zip(axes, LABELS.items()):
        for (method, sizes), colour in zip(found.items(), colours):
            values = [plots.percent(mine, mine[0]["name"], key) for mine in sizes.values()]
            axis.errorbar(
                list(sizes), [v.mean().item() for v in values], [plots.deviation(v) for v in values],
                marker=plots.MARKERS.get(colour, "o"), capsize=2, color=colour, label=method,
            )  # fmt: skip
        axis.set(xscale="log", xlabel="images, and labels' share of them", title=words)
        axis.set_xticks(list(sizes), [f"{count:,}".replace(",", " ") for count in sizes], minor=False)
        axis.minorticks_off()
    axes[0].set_ylabel("top-1, %")
    axes[0].legend()
    plots.finish(figure, title(found), runs, path)


def title(found: dict) -> str:
    """Where pretraining with ours is better than no pretraining, and by how much at the smallest size."""
    gains = []
    for words, key in LABELS.items():
        for count in found["ours"]:
            ours, scratch = (
                sum(run["final"][key] for run in found[m][count]) / len(found[m][count]) for m in ("ours", SCRATCH)
            )
            gains.append((100 * (ours - scratch), f"{count} images, {words}"))
    (most, where), (least, there) = max(gains), min(gains)
    return f"Frozen features of ours less training from scratch: {most:+.1f} ({where}) to {least:+.1f} ({there})"


def table(runs: list[dict]) -> str:
    """Markdown: a line a method and number of images, accuracies as mean ± deviation over the seeds."""
    found = rows_of(runs)
    lines = [f"| images | method | {' | '.join(LABELS)} | seeds |", "|---|---|---|---|---|---|"]
    for count in found["ours"]:
        for method in found:
            mine = found[method][count]
            cells = [spread(mine, mine[0]["name"], key) for key in LABELS.values()]
            lines.append(f"| {count} | {method} | {' | '.join(cells)} | {len(mine)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    needs = ("linear_1", "linear_10")
    sys.exit(
        figure("data_efficiency", __doc__, points, draw, show=table, measure=lambda base, scale: measure, needs=needs)
    )
