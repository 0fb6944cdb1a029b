"""Detection and segmentation with few labelled scenes: a pretrained backbone, and one from scratch.

    python -m lab.studies.detection --scale demo    a few minutes
    python -m lab.studies.detection                 half an hour on two cores
    python -m lab.studies.detection --scale paper   ResNet-18 pretrained on CIFAR-10, one GPU

The backbone is pretrained without labels on the embedded shapes (--scale paper: CIFAR-10). A Mask
R-CNN is then fine-tuned and tested on drawn scenes of 64 pixels, whose boxes and masks are known
exactly (`transfer` in lab/detection.py). The picture shows the first test scenes, and the
detections of the first seed with a score above a half.
"""

import sys
from dataclasses import replace

import numpy as np

from eval_linear import evaluate
from figures import plots
from figures.sweep import figure, spread
from lab import scenes
from lab.detection import FIGURES, predict, transfer
from lab.train import LabConfig
from plumbing.devices import pick_device
from plumbing.files import Dataset

CONTESTANTS = {"pretrained": plots.BLUE, "scratch": plots.ORANGE}
FINETUNING = {"demo": (40, 4), "cpu": (200, 20), "paper": (1000, 40)}  # labelled scenes, and epochs on them
PRETRAINING = {"demo": 4, "cpu": 10, "paper": 200}
SHOWN = 6


def points(base: LabConfig, scale: str = "cpu") -> dict[str, LabConfig]:
    dataset, subset = base.dataset if scale == "paper" else "shapes", base.subset if scale == "demo" else 0
    return {"ours": replace(base, dataset=dataset, subset=subset, epochs=PRETRAINING[scale])}


class Measure:
    """Linear probe and kNN of a run, both detectors' scores and their detections."""

    def __init__(self, images: int, epochs: int):
        self.images, self.epochs = images, epochs

    def __call__(self, checkpoint: dict, dataset: Dataset) -> dict:
        device, seed = checkpoint["config"]["device"], checkpoint["config"]["seed"]
        figures = evaluate(checkpoint, dataset, device=device, controls=False, quiet=True)["trained"]
        train, test = scenes.drawn("segmentation", (self.images, 200))
        results, detectors = transfer(
            checkpoint, train, test, "segmentation", epochs=self.epochs, seed=seed, device=device
        )
        figures |= {f"{who} {key}": value for who, row in results.items() for key, value in row.items()}
        first = replace(test, items=test.items[:SHOWN])
        seen = {
            who: [confident(detected) for detected, _ in predict(model, first, pick_device(device))]
            for who, model in detectors.items()
        }
        return figures | {"scenes": self.images, "fine-tuning epochs": self.epochs, "seen": seen}


def confident(detected: dict) -> list[dict]:
    """Detections with a score above a half; masks are run lengths down the columns, as in COCO."""
    rows = []
    for i in (detected["scores"] > 0.5).nonzero()[:, 0].tolist():
        flat = detected["masks"][i].T.flatten().numpy()
        ends = np.flatnonzero(np.diff(flat, prepend=False, append=not flat[-1]))
        lengths = np.diff(ends, prepend=0).tolist()
        box = [round(v, 1) for v in detected["boxes"][i].tolist()]
        rows.append({"label": detected["labels"][i].item(), "box": box, "segmentation": {"counts": lengths}})
    return rows


def draw(runs: list[dict], path) -> None:
    figure = plots.plt.figure(figsize=(12, 4.6), constrained_layout=True)
    left, right = figure.subfigures(1, 2, width_ratios=(1, 2))
    bars(left.subplots(), runs)
    pictures(right.subplots(3, SHOWN), runs[0]["final"]["seen"])
    gains = [gain(runs, key) for key in ("box_ap", "mask_ap")]
    images, epochs = runs[0]["final"]["scenes"], runs[0]["final"]["fine-tuning epochs"]
    title = f"Mask R-CNN after {epochs} epochs on {images} labelled scenes"
    title += f"; pretrained less from scratch: {', '.join(gains)}"
    plots.finish(figure, title, runs, path)


def keys_of(runs: list[dict]) -> list[str]:
    """The figures that the runs' detectors have."""
    return [key for key in FIGURES if f"scratch {key}" in runs[0]["final"]]


def gain(runs: list[dict], key: str) -> str:
    """What pretraining changes of a figure, in words."""
    scores = [
        {"name": who, "seed": run["seed"], "final": {key: run["final"][f"{who} {key}"]}}
        for who in CONTESTANTS
        for run in runs
    ]
    return f"{FIGURES[key]} {plots.changed(scores, *CONTESTANTS, key)}"


def bars(axis, runs: list[dict]) -> None:
    keys = keys_of(runs)
    for (who, colour), shift in zip(CONTESTANTS.items(), (-0.2, 0.2)):
        values = [plots.percent(runs, runs[0]["name"], f"{who} {key}") for key in keys]
        places = [i + shift for i in range(len(keys))]
        means, spreads = [v.mean().item() for v in values], [plots.deviation(v) for v in values]
        axis.bar(places, means, 0.38, yerr=spreads, color=colour, alpha=0.8, label=who)
        for place, seeds in zip(places, values):
            axis.plot([place] * len(seeds), seeds, ".", color="black", markersize=4)
    axis.set(xticks=range(len(keys)), xticklabels=[FIGURES[key] for key in keys], ylabel="average precision, %")
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    axis.grid(False, axis="x")


def pictures(axes, seen: dict[str, list]) -> None:
    """Boxes, outlines of masks and names of classes: the truth, then what each detector sees."""
    _, test = scenes.drawn("segmentation", (0, SHOWN))
    truth = [
        [
            {"label": label, "box": box, "mask": mask}
            for label, box, mask in zip(target["labels"].tolist(), target["boxes"].tolist(), target["masks"].numpy())
        ]
        for _, target in test
    ]
    for row, (who, columns) in zip(axes, [("truth", truth), *((who, seen[who]) for who in CONTESTANTS)]):
        row[0].set_ylabel(who)
        for axis, (image, _), things in zip(row, test, columns):
            axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
            light = "white" if image.median() < 0.5 else "black"
            for thing in things:
                x0, y0, x1, y1 = (v - 0.5 for v in thing["box"])  # imshow puts the centre of the first pixel at 0
                axis.add_patch(
                    plots.plt.Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=light, linewidth=0.8)
                )
                mask = thing["mask"] if "mask" in thing else scenes.mask_of(thing["segmentation"], *image.shape[1:])
                if 0 < mask.sum() < mask.size:
                    axis.contour(mask, levels=[0.5], colors=[CONTESTANTS.get(who, plots.GREEN)], linewidths=1)
                name = test.classes[thing["label"] - 1]
                axis.text(x0, y0, name, color=light, fontsize=6, va="bottom", clip_on=True)


def table(runs: list[dict]) -> str:
    """Markdown: a line per backbone, mean ± standard deviation over the seeds, in percent."""
    keys = keys_of(runs)
    lines = [f"| backbone | {' | '.join(FIGURES[key] for key in keys)} | seeds |", "|---" * (len(keys) + 2) + "|"]
    for who in CONTESTANTS:
        cells = [spread(runs, runs[0]["name"], f"{who} {key}") for key in keys]
        lines.append(f"| {who} | {' | '.join(cells)} | {len(runs)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(
        figure(
            "detection", __doc__, points, draw, show=table, needs=("pretrained mask_ap",),
            measure=lambda base, scale: Measure(*FINETUNING[scale]),
        )
    )  # fmt: skip
