"""How well do the two figures without labels, recovered and rank, predict both accuracies?

    python -m lab.studies.quality --scale demo              the embedded shapes alone, a few minutes
    python -m lab.studies.quality --data-dir DIR --seeds 0  half an hour on two cores

DIR holds two folders of images in classes, or links to them: cifar10/ and photos/. On each of the
three datasets nine short runs differ in one setting. Of each run's frozen network the probe and kNN
are measured, and the two figures of plumbing/quality.py on the test images: `recovered` once with
the run's own views, and once with the same views for all, as train.py and eval_linear.py show it.
"""

import sys
from dataclasses import replace

import torch

from data import Augment
from eval_linear import eval_side, evaluate, load_backbone
from figures import plots
from figures.field import lasting
from figures.sweep import figure
from lab.backbones import encoder_of
from lab.train import LabConfig, build
from plumbing.devices import pick_device
from plumbing.features import ready
from plumbing.files import Dataset
from plumbing.quality import quality

DATASETS = {  # settings that make a short run of each
    "shapes": dict(width=16, epochs=8),
    "cifar10": dict(width=16, subset=5000, epochs=12),
    "photos": dict(width=16, size=32, epochs=24, batch_size=128, lr=0.05),
}
SETTINGS = {
    "default": {}, "τ = 0.03": dict(temperature=0.03), "τ = 0.5": dict(temperature=0.5),
    "m = 0": dict(bank_momentum=0.0), "rate / 10": dict(lr=0.1), "epochs / 4": dict(epochs=0.25),
    "all rows": dict(window=0), "crops from 0.6": dict(crop_min=0.6), "no colour changes": dict(jitter=0.0, gray=0.0),
}  # fmt: skip
SCALED = ("lr", "epochs")  # these are factors of the dataset's own
FIGURES = {"recovered": "recovered, own views", "recovered_same": "recovered, same views", "rank": "effective rank"}
ACCURACIES = {"linear": "linear probe", "knn": "kNN"}


def points(base: LabConfig, scale: str = "cpu") -> dict[str, LabConfig]:
    rows = {}
    for name, own in list(DATASETS.items())[: 1 if scale == "demo" else None]:  # shapes come first
        run = LabConfig(dataset="shapes", data_dir=base.data_dir, device=base.device, knn_every=0, **own)
        if name != "shapes":
            run = replace(run, dataset="folder", data_dir=f"{base.data_dir}/{name}")
        if scale == "demo":
            run = replace(run, subset=1000, width=8, size=16, epochs=4, window=256)
        for words, change in SETTINGS.items():
            change = {key: getattr(run, key) * value if key in SCALED else value for key, value in change.items()}
            config = replace(run, **change)
            rows[f"{name}: {words}"] = lasting(config, int(config.epochs))
    return rows


def measure(checkpoint: dict, dataset: Dataset) -> dict:
    config = checkpoint["config"]
    device = pick_device(config["device"])
    figures = evaluate(checkpoint, dataset, device=config["device"], controls=False, quiet=True)["trained"]
    encoder, images = load_backbone(checkpoint, encoder_of), dataset.test.to(device)
    ready(encoder, device, None, eval_side(config, images))
    own = build(LabConfig(**config), len(dataset.train), device).augment
    for augment, ending in ((own, ""), (Augment(config["size"]), "_same")):
        row = quality(encoder, images, config, augment, device)
        figures |= {"recovered" + ending: row["recovered"], "rank": row["rank"]}
    return figures


def agreement(runs: list[dict], key: str, accuracy: str) -> float:
    """Spearman's correlation of a figure with an accuracy: 1 where both order the runs alike."""
    values = torch.tensor([[run["final"][k] for run in runs] for k in (key, accuracy)], dtype=torch.double)  # (2, R)
    ranks = (values[:, :, None] - values[:, None]).sign().sum(2)  # (2, R): equal values have equal ranks
    return torch.corrcoef(ranks)[0, 1].item()


def by_dataset(runs: list[dict]) -> dict[str, list[dict]]:
    groups: dict[str, list[dict]] = {}
    for run in runs:
        groups.setdefault(run["name"].split(": ")[0], []).append(run)
    return groups


def draw(runs: list[dict], path) -> None:
    groups = by_dataset(runs)
    size = (2 + 3.4 * len(groups), 3.2 * len(FIGURES))
    picture, axes = plots.plt.subplots(
        len(FIGURES), len(groups), figsize=size, constrained_layout=True, squeeze=False, sharey="col"
    )
    for row, (key, words) in zip(axes, FIGURES.items()):
        for axis, (name, own) in zip(row, groups.items()):
            for words_of, (setting, marker) in enumerate(zip(SETTINGS, "os^vdDXP*")):
                seen = [run["final"] for run in own if run["name"] == f"{name}: {setting}"]
                x = [figures[key] * (1 if key == "rank" else 100) for figures in seen]
                y = [100 * figures["linear"] for figures in seen]
                colour = plots.plt.colormaps["tab10"](words_of)
                axis.plot(x, y, marker, color=colour, label=setting, linestyle="none")
            axis.set(xlabel=words if key == "rank" else f"{words}, %")
            axis.set_title(f"{name}: Spearman {agreement(own, key, 'linear'):+.2f}")
        row[0].set_ylabel("linear probe, top-1 %")
    axes[0, -1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    plots.finish(picture, title(runs), runs, path)


def title(runs: list[dict]) -> str:
    worst = {key: min(agreement(own, key, "linear") for own in by_dataset(runs).values()) for key in FIGURES}
    words = "\n".join(f"{FIGURES[key]} {value:+.2f}" for key, value in worst.items())
    return f"Lowest Spearman correlation with the probe:\n{words}"


def table(runs: list[dict]) -> str:
    """Markdown: every run's figures, then Spearman's correlations with both accuracies."""
    lines = ["| run | linear | kNN | recovered, own views | recovered, same views | effective rank |", "|---" * 6 + "|"]
    for run in runs:
        cells = [f"{100 * run['final'][key]:.1f}" for key in ("linear", "knn", "recovered", "recovered_same")]
        lines.append(f"| {run['name']} | {' | '.join(cells)} | {run['final']['rank']:.1f} |")
    lines += ["", f"| dataset | accuracy | {' | '.join(FIGURES.values())} |", "|---" * 5 + "|"]
    for name, own in by_dataset(runs).items():
        for accuracy, words in ACCURACIES.items():
            cells = [f"{agreement(own, key, accuracy):+.2f}" for key in FIGURES]
            lines.append(f"| {name} | {words} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(
        figure("quality", __doc__, points, draw, show=table, needs=("recovered_same",), measure=lambda *_: measure)
    )
