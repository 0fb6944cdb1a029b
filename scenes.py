"""Scenes for detection and segmentation: images with boxes and masks, drawn from a seed or read from COCO's or VOC's files.

shapes   drawn here: 200 to train on and 200 to test on, 64 x 64 pixels
coco     DIR/annotations/instances_train*.json and instances_val*.json, their images in DIR/train*/ and DIR/val*/
voc      DIR/Annotations/*.xml, JPEGImages, for segmentation SegmentationObject, and the lists train.txt and val.txt in
         ImageSets/Main, or /Segmentation; without ImageSets every fifth image, by name, is tested on
"""

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

import shapes
from images import UNREADABLE, UserError


@dataclass
class Scenes(torch.utils.data.Dataset):
    """Images and what is in them: an item is (image float (3, H, W) in [0, 1], target), as torchvision's detectors take.

    A target has boxes (M, 4) in pixels (x0, y0, x1, y1), labels (M,) from 1 in the order of classes, masks uint8 (M, H, W)
    for segmentation, and crowd bool (M,): objects that are neither trained on nor missed.
    """

    classes: tuple[str, ...]
    items: list
    load: Callable  # item -> image, boxes, labels, crowd, masks or None
    workers: int = 0  # processes that load

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        image, boxes, labels, crowd, masks = self.load(self.items[index])
        boxes = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        target = {"boxes": boxes, "labels": torch.as_tensor(labels).long(), "crowd": torch.as_tensor(crowd).bool()}
        if masks is not None:
            target["masks"] = torch.from_numpy(np.array(masks, np.uint8).reshape(-1, *image.shape[1:]))
        solid = (boxes[:, 2:] > boxes[:, :2]).all(1)  # COCO has some boxes without an area
        return torch.from_numpy(image).float() / 255, {key: value[solid] for key, value in target.items()}


def drawn(task: str, counts: tuple[int, int] = (200, 200)) -> list[Scenes]:
    """Training and test scenes of the embedded shapes, 64 x 64 pixels, always the same."""

    def load(scene):
        image, labels, masks = scene
        rows, columns = masks.any(2), masks.any(1)  # (M, S) each
        ends = [(side.argmax(1), side.shape[1] - side[:, ::-1].argmax(1)) for side in (columns, rows)]
        boxes = np.stack([ends[0][0], ends[1][0], ends[0][1], ends[1][1]], 1)  # (M, 4) tight
        return image, boxes, labels + 1, np.zeros(len(labels)), masks if task == "segmentation" else None

    seeds = range(counts[0]), range(1_000_000, 1_000_000 + counts[1])
    return [Scenes(shapes.CLASSES, [shapes.draw_scene(seed) for seed in part], load) for part in seeds]


def load(name: str, root: Path, task: str, subset: int = 0) -> list[Scenes]:
    """Training and test scenes; subset keeps that many of the training scenes, the same ones every time (0: all).

    Raises UserError, naming the option or file.
    """
    train, test = drawn(task) if name == "shapes" else {"coco": coco, "voc": voc}[name](root, task)
    if not 0 <= subset <= len(train) or not len(train) or not len(test):
        raise UserError(f"--subset {subset}: there are {len(train)} training and {len(test)} test images")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[: subset or None]
    return [replace(train, items=[train.items[i] for i in order]), test]


def coco(root: Path, task: str) -> list[Scenes]:
    parts = []
    for split in ("train", "val"):
        files = sorted(root.glob(f"annotations/instances_{split}*.json"))
        if not files:
            raise UserError(f"--data-dir {root}: no annotations/instances_{split}*.json in it, as COCO has")
        try:
            known = json.loads(files[-1].read_text())
            names = {c["id"]: c["name"] for c in known["categories"]}
            objects = {image["id"]: [] for image in known["images"]}
            for thing in known["annotations"]:
                objects[thing["image_id"]].append(thing)
            folder = root / files[-1].stem.removeprefix("instances_")
            items = [(folder / image["file_name"], objects[image["id"]]) for image in known["images"]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{files[-1]}: not COCO's instances ({type(error).__name__}: {error})") from error
        first = parts[0].classes if parts else tuple(names[i] for i in sorted(names))
        labels = {i: first.index(name) + 1 for i, name in names.items() if name in first}
        parts.append(Scenes(first, items, partial(_coco_scene, labels=labels, task=task), workers=2))
    return parts


def _coco_scene(item, labels: dict[int, int], task: str):
    path, things = item
    image, things = read(path), [thing for thing in things if thing["category_id"] in labels]
    boxes = [(x, y, x + w, y + h) for x, y, w, h in (thing["bbox"] for thing in things)]
    masks = None
    if task == "segmentation":
        masks = [mask_of(thing["segmentation"], *image.shape[1:], path) for thing in things]
    return image, boxes, [labels[t["category_id"]] for t in things], [t.get("iscrowd", 0) for t in things], masks


def mask_of(outline: list | dict, height: int, width: int, path="") -> np.ndarray:
    """COCO's segmentation as bool (height, width): polygons [[x, y, …], …] or run lengths down the columns."""
    if isinstance(outline, dict):
        counts = outline["counts"]
        if isinstance(counts, str):
            raise UserError(
                f"{path}: its mask is compressed RLE, which is not read here: polygons or lists of counts are"
            )
        return (np.repeat(np.arange(len(counts)) % 2, counts) > 0).reshape(width, height).T
    fine = Image.new("1", (4 * width, 4 * height))  # Pillow fills a pixel beyond the outline: a quarter of one here
    for polygon in outline:
        ImageDraw.Draw(fine).polygon([4 * v for v in polygon], fill=1)
    return np.array(fine)[2::4, 2::4]


def voc(root: Path, task: str) -> list[Scenes]:
    lists = root / "ImageSets" / ("Segmentation" if task == "segmentation" else "Main")
    names = sorted(path.stem for path in root.glob("Annotations/*.xml"))
    if not names:
        raise UserError(f"--data-dir {root}: no Annotations/*.xml in it, as VOC has")
    parts = [[name for i, name in enumerate(names) if (i % 5 == 0) == test] for test in (False, True)]
    if lists.is_dir():
        try:
            parts = [
                [line.split()[0] for line in (lists / f"{s}.txt").open() if line.strip()] for s in ("train", "val")
            ]
        except OSError as error:
            raise UserError(f"--data-dir {root}: {error.filename} cannot be read ({error.strerror})") from error
    parts = [[(root, name, _voc_objects(root / "Annotations" / f"{name}.xml")) for name in part] for part in parts]
    classes = tuple(sorted({thing[0] for part in parts for *_, things in part for thing in things}))
    return [Scenes(classes, part, partial(_voc_scene, classes=classes, task=task), workers=2) for part in parts]


def _voc_objects(path: Path) -> list[tuple[str, tuple[float, ...], bool]]:
    """Class, box and whether it is a difficult one, of every object. VOC counts pixels from 1, both ends within the box."""
    found = []
    try:
        for thing in ElementTree.parse(path).iter("object"):
            x0, y0, x1, y1 = (float(thing.find("bndbox").findtext(k)) for k in ("xmin", "ymin", "xmax", "ymax"))
            found.append((thing.findtext("name"), (x0 - 1, y0 - 1, x1, y1), thing.findtext("difficult") == "1"))
    except (OSError, ElementTree.ParseError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not VOC's annotations ({error})") from error
    return found


def _voc_scene(item, classes: tuple[str, ...], task: str):
    root, name, things = item
    image, masks = read(root / "JPEGImages" / f"{name}.jpg"), None
    if task == "segmentation":  # object k of the file has the value k, from 1; 255 is an edge
        values = read(root / "SegmentationObject" / f"{name}.png", mode=None)
        masks = [values == k + 1 for k in range(len(things))]
    labels = [classes.index(thing[0]) + 1 for thing in things]
    return image, [thing[1] for thing in things], labels, [thing[2] for thing in things], masks


def read(path: Path, mode: str | None = "RGB") -> np.ndarray:
    """uint8 (3, H, W), or the values (H, W) as they are stored for mode None. Not turned: boxes are in stored pixels."""
    try:
        with Image.open(path) as image:
            return np.array(image.convert(mode)).transpose(2, 0, 1) if mode else np.array(image)
    except UNREADABLE as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
