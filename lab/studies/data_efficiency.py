"""Data efficiency: pretrained on 1 000 to 50 000 images, evaluated with 100 %, 10 % and 1 % labels.

    python -m lab.studies.data_efficiency --scale demo            the embedded shapes, a few minutes
    python -m lab.studies.data_efficiency --data-dir my_cifar10   six hours on two cores
    python -m lab.studies.data_efficiency --scale paper           CIFAR-10, ResNet-18, one GPU

The labels belong to the pretraining images. At one size every method sees the same number of views:
a two-branch method runs for half the epochs. For comparison, the same backbone is trained from
scratch with the same labels, for as many steps as ours is pretrained, with the crops and flips of
fine-tuning.
"""

import sys
from dataclasses import replace

from eval_linear import eval_side
from figures import plots
from figures.field import BEST, NAMES, base_of, contestant, lasting
from figures.sweep import figure, spread
from lab.backbones import encoder_of
from lab.evaluate import draw_labels, evaluate, train_head
from lab.train import LabConfig
from plumbing.devices import pick_device, pick_precision
from plumbing.files import Dataset

SIZES = {  # the number of images, and what the default recipe changes for it; epochs are of ours
    "demo": {200: dict(epochs=10, batch_size=64), 1000: dict(epochs=4)},
    "cpu": {
        1000: dict(epochs=100, batch_size=128), 2500: dict(epochs=80, batch_size=128), 5000: dict(epochs=40),
        10_000: dict(epochs=20), 50_000: dict(epochs=10, window=2048),
    },
    "paper": {
        1000: dict(epochs=800, batch_size=128), 2500: dict(epochs=400, batch_size=128), 5000: dict(epochs=200),
        10_000: dict(epochs=200), 50_000: dict(epochs=200),
    },
}  # fmt: skip
LABELS = {"all labels": "linear", "10 % of the labels": "linear_10", "1 %": "linear_1"}
METHODS = ("ours", "parametric", *BEST)
SCRATCH = "from scratch"


def points(base: LabConfig, scale: str = "cpu") -> dict[str, LabConfig]:
    base, rows = base_of(base, scale), {}
    for count, changes in SIZES[scale].items():
        for method in METHODS:
            config = contestant(replace(base, subset=count, **changes), method)
            epochs = config.epochs // 2 if method in BEST else config.epochs
            rows[f"{NAMES[method]}, {count} images"] = lasting(config, epochs, one_in=10)
    return rows


def measure(checkpoint: dict, dataset: Dataset) -> dict:
    """The figures of the frozen backbone; for ours, those of training from scratch too."""
    config = checkpoint["config"]
    figures = evaluate(checkpoint, dataset, device=config["device"], slow=("few_labels",), controls=False, quiet=True)
    ours = config["method"] == "ours" and config["bank_init"] == "forward"  # and not the parametric classifier
    return figures["trained"] | (from_scratch(config, dataset) if ours else {})


def from_scratch(config: dict, dataset: Dataset) -> dict:
    """Accuracies of the backbone trained with 100 %, 10 % and 1 % labels, for config's steps."""
    device, size = pick_device(config["device"]), eval_side(config, dataset.test)
    steps, figures = config["epochs"] * (len(dataset.train) // config["batch_size"]), {}
    for share, key in zip((1.0, 0.1, 0.01), LABELS.values()):
        chosen = draw_labels(dataset.labelled.labels.cpu(), share, config["seed"])
        subset = replace(dataset, labelled=dataset.labelled.take(chosen)).to(device)
        encoder = encoder_of(config)
        encoder.precision = pick_precision("auto", device)
        epochs = max(1, round(steps / (len(chosen) // min(128, len(chosen)))))
        figures[f"scratch_{key}"] = train_head(encoder, subset, size, device, epochs, True, config["seed"])
    return figures


def rows_of(runs: list[dict]) -> dict[str, dict[int, list[dict]]]:
    """Runs by method and number of images; training from scratch counts as a method."""
    rows: dict[str, dict[int, list[dict]]] = {}
    for run in runs:
        method, count = run["name"].rsplit(", ", 1)
        rows.setdefault(method, {}).setdefault(int(count.split()[0]), []).append(run)
    scratch = {count: [from_scratch_of(run) for run in ours] for count, ours in rows["ours"].items()}
    return rows | {SCRATCH: scratch}


def from_scratch_of(run: dict) -> dict:
    """The training from scratch that was measured with a run of ours, as a run of its own."""
    return run | {"final": {key: run["final"][f"scratch_{key}"] for key in LABELS.values()}}


def draw(runs: list[dict], path) -> None:
    rows = rows_of(runs)
    figure, axes = plots.plt.subplots(1, 3, figsize=(11, 4), constrained_layout=True, sharey=True)
    colours = (plots.ORANGE, plots.PURPLE, plots.BLUE, plots.GREEN, plots.GREY)
    for axis, (words, key) in zip(axes, LABELS.items()):
        for (method, sizes), colour in zip(rows.items(), colours):
            values = [plots.percent(own, own[0]["name"], key) for own in sizes.values()]
            axis.errorbar(
                list(sizes), [v.mean().item() for v in values], [plots.deviation(v) for v in values],
                marker=plots.MARKERS.get(colour, "o"), capsize=2, color=colour, label=method,
            )  # fmt: skip
        axis.set(xscale="log", xlabel="images, and labels' share of them", title=words)
        axis.set_xticks(list(sizes), [f"{count:,}".replace(",", " ") for count in sizes], minor=False)
        axis.minorticks_off()
    axes[0].set_ylabel("top-1, %")
    axes[0].legend()
    plots.finish(figure, title(rows), runs, path)


def title(rows: dict) -> str:
    """The largest and the smallest gain of pretraining with ours over training from scratch."""
    gains = []
    for words, key in LABELS.items():
        for count in rows["ours"]:
            ours, scratch = (
                sum(run["final"][key] for run in rows[m][count]) / len(rows[m][count]) for m in ("ours", SCRATCH)
            )
            gains.append((100 * (ours - scratch), f"{count} images, {words}"))
    (most, best), (least, worst) = max(gains), min(gains)
    return f"Frozen features of ours less training from scratch: {most:+.1f} ({best}) to {least:+.1f} ({worst})"


def table(runs: list[dict]) -> str:
    """Markdown: a line per method and number of images, accuracies as mean ± deviation."""
    rows = rows_of(runs)
    lines = [f"| images | method | {' | '.join(LABELS)} | kNN, all | seeds |", "|---" * 7 + "|"]
    for count in rows["ours"]:
        for method in rows:
            own = rows[method][count]
            cells = [spread(own, own[0]["name"], key) for key in LABELS.values()]
            cells.append("-" if method == SCRATCH else spread(own, own[0]["name"], "knn"))
            lines.append(f"| {count} | {method} | {' | '.join(cells)} | {len(own)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    needs = ("linear_1", "linear_10")
    sys.exit(
        figure("data_efficiency", __doc__, points, draw, show=table, measure=lambda base, scale: measure, needs=needs)
    )
