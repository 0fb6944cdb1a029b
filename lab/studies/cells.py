"""Blood cells: pretrained on the training pictures without labels, then found on the test pictures.

    python -m lab.studies.cells --scale demo              drawn scenes of shapes, a few minutes
    python -m lab.studies.cells --data-dir my_cells       two hours on two cores
    python -m lab.studies.cells --scale paper --data-dir my_cells      ResNet-18, one GPU

The folder has VOC's format (lab/scenes.py). The pictures that its lists name for training lie, as
links, in runs/cells: the network is pretrained on them alone, with the settings that train.py
chooses for such a folder, and for longer because they are few. A Faster R-CNN with thin heads then
learns their boxes, once on that network and once from scratch (`transfer` in lab/detection.py).
"""

import sys
from dataclasses import replace
from pathlib import Path

from figures import plots
from figures.sweep import ROOT, figure
from lab import scenes
from lab.detection import transfer
from lab.scenes import Scenes
from lab.studies.detection import bars, gain, keys_of, table
from lab.train import LabConfig
from plumbing import automatic
from plumbing.command_line import UserError
from plumbing.files import Dataset

PICTURES, SIDE = 292, 480  # of the folder that docs/photos.md is about
PRETRAINING = {"demo": 4, "cpu": 600, "paper": 2000}  # epochs
FINETUNING = {"demo": 8, "cpu": 20, "paper": 60}
SHORTER = {"demo": 0, "cpu": 240, "paper": 480}  # side of the pictures in detection; 0: their own


def points(base: LabConfig, scale: str = "cpu") -> dict[str, LabConfig]:
    default = LabConfig(device=base.device, knn_every=0, epochs=PRETRAINING[scale])
    if scale == "demo":
        return {"ours": replace(default, subset=500, width=8, size=16, window=256, warmup=1.0)}
    chosen = automatic.settings(PICTURES, SIDE) | dict(epochs=PRETRAINING[scale])
    config = replace(default, dataset="folder", data_dir=str(pretraining_pictures(Path(base.data_dir))), **chosen)
    return {"ours": replace(config, arch="resnet18", width=0) if scale == "paper" else config}


def pretraining_pictures(root: Path) -> Path:
    """A folder with links to the training pictures of a VOC folder; root itself if it is none."""
    if not (root / "Annotations").is_dir():
        return root  # redrawing needs no pictures, and a sweep says what is missing
    folder = ROOT / "runs" / "cells" / root.resolve().name
    folder.mkdir(parents=True, exist_ok=True)
    train, _ = scenes.load("voc", root, "detection")
    wanted = {f"{name}.jpg" for _, name, _ in train.items}
    for old in folder.iterdir():
        if old.name not in wanted:
            raise UserError(f"{folder}: {old.name} is not one of the training pictures; remove the folder")
    for name in wanted - {path.name for path in folder.iterdir()}:
        (folder / name).symlink_to((root / "JPEGImages" / name).resolve())
    return folder


class Measure:
    """Both detectors' average precision."""

    def __init__(self, root: str, scale: str):
        self.root, self.scale = root, scale

    def scenes(self) -> list[Scenes]:
        if self.scale == "demo":
            return scenes.drawn("detection", (40, 20))
        return scenes.load("voc", Path(self.root), "detection")

    def __call__(self, checkpoint: dict, dataset: Dataset) -> dict:
        config, epochs = checkpoint["config"], FINETUNING[self.scale]
        results, _ = transfer(
            checkpoint, *self.scenes(), size=SHORTER[self.scale], epochs=epochs, seed=config["seed"],
            device=config["device"], thin_heads=True,
        )  # fmt: skip
        return {f"{who} {key}": value for who, row in results.items() for key, value in row.items()}


def draw(runs: list[dict], path) -> None:
    picture, axis = plots.plt.subplots(figsize=(8, 4.4), constrained_layout=True)
    bars(axis, runs)
    gains = ", ".join(gain(runs, key) for key in keys_of(runs))
    plots.finish(picture, f"Faster R-CNN, pretrained less from scratch:\n{gains}", runs, path)


def measure(base: LabConfig, scale: str) -> Measure:
    return Measure(base.data_dir, scale)


if __name__ == "__main__":
    sys.exit(figure("cells", __doc__, points, draw, show=table, measure=measure, needs=("scratch box_ap",)))
