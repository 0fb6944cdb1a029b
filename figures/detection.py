"""Detection and segmentation: Mask R-CNN on a pretrained backbone and on the same backbone from scratch, few labelled scenes.

    python figures/detection.py --scale demo                a few minutes
    python figures/detection.py                             half an hour on two cores
    python figures/detection.py --scale paper               ResNet-18 pretrained on CIFAR-10, one GPU

Pretrained without labels on the embedded shapes (--scale paper: CIFAR-10), then fine-tuned and tested on drawn scenes of 64
pixels, whose boxes and masks are known exactly: `eval_detection.transfer`. The picture shows the first test scenes and what
the detectors of the first seed are sure of by half.
"""

import sys
from dataclasses import replace

import numpy as np
import plots
from sweep import Config, figure, spread

import scenes
from eval_detection import FIGURES, predict, transfer
from eval_linear import evaluate
from images import Dataset
from models import pick_device

CONTESTANTS = {"pretrained": plots.BLUE, "scratch": plots.ORANGE}
FINETUNING = {"demo": (40, 4), "cpu": (200, 20), "paper": (1000, 40)}  # labelled scenes, and epochs on them
PRETRAINING = {"demo": 4, "cpu": 10, "paper": 200}
SHOWN = 6


def points(base: Config, scale: str = "cpu") -> dict[str, Config]:
    place = base.dataset if scale == "paper" else "shapes"
    return {
        "ours": replace(base, dataset=place, subset=base.subset if scale == "demo" else 0, epochs=PRETRAINING[scale])
    }


class Measure:
    """The linear probe and kNN of a run, what both detectors reach, and what they see in the first test scenes."""

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
            who: [sure(found) for found, _ in predict(model, first, pick_device(device))]
            for who, model in detectors.items()
        }
        return figures | {"scenes": self.images, "fine-tuning epochs": self.epochs, "seen": seen}


def sure(found: dict) -> list[dict]:
    """Detections with a score above a half, as COCO's files have them: mask as run lengths down the columns."""
    rows = []
    for i in (found["scores"] > 0.5).nonzero()[:, 0].tolist():
        flat = found["masks"][i].T.flatten().numpy()
        ends = np.flatnonzero(np.diff(flat, prepend=False, append=not flat[-1]))
        lengths = np.diff(ends, prepend=0).tolist()
        box = [round(v, 1) for v in found["boxes"][i].tolist()]
        rows.append({"label": found["labels"][i].item(), "box": box, "segmentation": {"counts": lengths}})
    return rows


def draw(runs: list[dict], path) -> None:
    figure = plots.plt.figure(figsize=(12, 4.6), constrained_layout=True)
    left, right = figure.subfigures(1, 2, width_ratios=(1, 2))
    bars(left.subplots(), runs)
    pictures(right.subplots(3, SHOWN), runs[0]["final"]["seen"])
    gains = []
    for key in ("box_ap", "mask_ap"):
        mine = [
            {"name": who, "seed": r["seed"], "final": {key: r["final"][f"{who} {key}"]}}
            for who in CONTESTANTS
            for r in runs
        ]
        gains.append("{} {:+.1f} ± {:.1f}".format(FIGURES[key], *plots.change(mine, *CONTESTANTS, key)))
    images, epochs = runs[0]["final"]["scenes"], runs[0]["final"]["fine-tuning epochs"]
    title = f"Mask R-CNN after {epochs} epochs on {images} labelled scenes; pretrained less from scratch: {', '.join(gains)}"
    plots.finish(figure, title, runs, path)


def bars(axis, runs: list[dict]) -> None:
    for (who, colour), shift in zip(CONTESTANTS.items(), (-0.2, 0.2)):
        values = [plots.percent(runs, runs[0]["name"], f"{who} {key}") for key in FIGURES]
        places = [i + shift for i in range(len(FIGURES))]
        means, spreads = [v.mean().item() for v in values], [plots.deviation(v) for v in values]
        axis.bar(places, means, 0.38, yerr=spreads, color=colour, alpha=0.8, label=who)
        for place, seeds in zip(places, values):
            axis.plot([place] * len(seeds), seeds, ".", color="black", markersize=4)
    axis.set(xticks=range(len(FIGURES)), xticklabels=FIGURES.values(), ylabel="average precision, %")
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    axis.grid(False, axis="x")


def pictures(axes, seen: dict[str, list]) -> None:
    """The truth in the first row, below it what each detector sees: boxes, outlines of masks, names of classes."""
    _, test = scenes.drawn("segmentation", (0, SHOWN))
    truth = [
        [
            {"label": label, "box": box, "mask": mask}
            for label, box, mask in zip(target["labels"].tolist(), target["boxes"].tolist(), target["masks"].numpy())
        ]
        for _, target in test
    ]
    for row, (who, found) in zip(axes, [("truth", truth), *((who, seen[who]) for who in CONTESTANTS)]):
        row[0].set_ylabel(who)
        for axis, (image, _), things in zip(row, test, found):
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
    """Markdown: a line a backbone, mean ± standard deviation over the seeds, in percent."""
    lines = [f"| backbone | {' | '.join(FIGURES.values())} | seeds |", "|---" * (len(FIGURES) + 2) + "|"]
    for who in CONTESTANTS:
        cells = [spread(runs, runs[0]["name"], f"{who} {key}") for key in FIGURES]
        lines.append(f"| {who} | {' | '.join(cells)} | {len(runs)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(
        figure(
            "detection", __doc__, points, draw, show=table, needs=("pretrained mask_ap",),
            measure=lambda base, scale: Measure(*FINETUNING[scale]),
        )
    )  # fmt: skip
