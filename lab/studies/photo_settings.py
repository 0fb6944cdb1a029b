"""Which views, network and length do photographs want, at about equal time?

    python -m lab.studies.photo_settings --scale demo                      the embedded shapes
    python -m lab.studies.photo_settings --data-dir my_photos --seeds 0    three hours on two cores

A run trains on all training images. Its frozen features of the same images are judged by
cross-validation: the probe and kNN (k = 100) learn from four fifths of the labels and are tested on
the fifth that is left. The test images are not looked at. The row from 96 pixels on of
plumbing/automatic.py follows from this table.
"""

import statistics
import sys
from dataclasses import replace

import torch

from eval_linear import eval_side, knn, linear_probe, load_backbone
from figures.sweep import figure, spread
from lab.backbones import encoder_of
from lab.train import LabConfig
from plumbing.devices import pick_device
from plumbing.features import extract, ready
from plumbing.files import Dataset

STRONG = dict(jitter=0.8, blur=0.5, crop_min=0.08)
TRIALS = {
    "width 32, 96 px, 40 epochs": {},
    "whole pictures, padded": dict(fit="pad"),
    "jitter 0.8": dict(jitter=0.8),
    "jitter 1, grey 0.4": dict(jitter=1.0, gray=0.4),
    "jitter 0.8, blur 0.5, crops from 0.08": STRONG,
    "the same, width 48, 22 epochs": STRONG | dict(width=48, epochs=22),
    "the same, 112 px, 32 epochs": STRONG | dict(size=112, eval_size=144, epochs=32),
    "jitter 0.8, 80 epochs": dict(jitter=0.8, epochs=80),
    "jitter 0.8, 120 epochs": dict(jitter=0.8, epochs=120),
}


def points(base: LabConfig, scale: str = "cpu") -> dict[str, LabConfig]:
    own = dict(batch_size=128, lr=0.05, bank_momentum=0.75, window=1024, visits=16, epochs=40)
    if scale != "demo":
        own |= dict(dataset="folder", size=96, eval_size=128, width=32)
    settings = LabConfig(**(dict(dataset=base.dataset, data_dir=base.data_dir, device=base.device, knn_every=0) | own))
    if scale == "paper":
        settings = replace(settings, arch="resnet18", epochs=400)
    if scale == "demo":
        settings = replace(settings, subset=1000, width=8, size=16, epochs=4, window=256, warmup=1.0)
    rows = {}
    for name, change in TRIALS.items():
        share = change.get("epochs", 40) / 40
        small = {"width": 8, "size": 16, "eval_size": 0} if scale == "demo" else {}
        rows[name] = replace(settings, **(change | small | {"epochs": max(2, round(share * settings.epochs))}))
    return rows


@torch.no_grad()
def measure(checkpoint: dict, dataset: Dataset, folds: int = 5) -> dict:
    """Both accuracies on the labelled training images, by cross-validation."""
    config, images = checkpoint["config"], dataset.labelled
    device, labels, figures = pick_device(config["device"]), images.labels.cpu(), {"linear": 0.0, "knn": 0.0}
    encoder, side = load_backbone(checkpoint, encoder_of), eval_side(config, images)
    ready(encoder, device, None, side)
    features = extract(encoder, images.to(device), side, device)  # (N, F)
    fold = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)) % folds  # (N,)
    for own in range(folds):
        learns, tested = fold != own, fold == own
        parts = features[learns], labels[learns], features[tested], labels[tested]
        share = tested.double().mean().item()
        with torch.enable_grad():
            figures["linear"] += share * linear_probe(*parts)
        figures["knn"] += share * knn(*parts, 100)
    return figures | {"folds": folds}


def table(runs: list[dict]) -> str:
    """Markdown: a line per trial, accuracies as mean ± deviation over the seeds, in percent."""
    lines = ["| trial | linear | kNN (k = 100) | training, s of one core | seeds |", "|---" * 5 + "|"]
    for name in dict.fromkeys(run["name"] for run in runs):
        seconds = [run["epochs"][-1]["seconds"] for run in runs if run["name"] == name]
        cells = [spread(runs, name, key) for key in ("linear", "knn")]
        cells += [f"{statistics.median(seconds):.0f}", str(len(seconds))]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(figure("photo_settings", __doc__, points, show=table, measure=lambda *_: measure, needs=("folds",)))
