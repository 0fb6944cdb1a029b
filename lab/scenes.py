"""Images with boxes and masks, for detection and segmentation: drawn, or COCO's or VOC's files.

    shapes   drawn from a seed: 200 images to train on and 200 to test on, 64 x 64 pixels
    coco     DIR/annotations/instances_train*.json and instances_val*.json, and the images in
             DIR/train*/ and DIR/val*/
    voc      DIR/Annotations/*.xml and DIR/JPEGImages/, for segmentation DIR/SegmentationObject/;
             trainval.txt and test.txt in DIR/ImageSets/Main/ (or Segmentation/) list the images,
             or train.txt and val.txt where there is no list of test images

Without ImageSets, every fifth image of a VOC folder, by name, is for testing.
"""

import json
import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.ops import masks_to_boxes

from plumbing import shapes
from plumbing.command_line import UserError
from plumbing.files import UNREADABLE


@dataclass
class Scenes(torch.utils.data.Dataset):
    """Images and their objects, as torchvision's detectors take them.

    An item is (image float (3, H, W) in [0, 1], target). A target has boxes (M, 4) in pixels (x0,
    y0, x1, y1), labels (M,) from 1 in the order of classes, masks uint8 (M, H, W) for segmentation,
    and crowd bool (M,): objects that are neither trained on nor counted as missed.
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


def load(name: str, root: Path, task: str, subset: int = 0) -> list[Scenes]:
    """Training and test scenes of a dataset for "detection" or "segmentation".

    subset keeps that many of the training scenes, always the same (0: all). Raises UserError, which
    names the option or file.
    """
    train, test = drawn(task) if name == "shapes" else {"coco": coco, "voc": voc}[name](root, task)
    if not 0 <= subset <= len(train) or not len(train) or not len(test):
        raise UserError(f"--subset {subset}: there are {len(train)} training and {len(test)} test images")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[: subset or None]
    return [replace(train, items=[train.items[i] for i in order]), test]


def read_image(path: Path, mode: str | None = "RGB") -> np.ndarray:
    """uint8 (3, H, W); for mode None the values (H, W) as the file stores them.

    Images are not turned upright, because boxes are in the file's own pixels.
    """
    try:
        with Image.open(path) as image:
            return np.array(image.convert(mode)).transpose(2, 0, 1) if mode else np.array(image)
    except UNREADABLE as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


def check_files(paths: list[Path], source: Path) -> None:
    """Raises UserError, before training starts, for images that `source` names and nobody has."""
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"{source}: {len(missing)} of its {len(paths)} images are missing, for instance {missing[0]}")


# ------------------------------------------------------------------------------------------- shapes


def drawn(task: str, counts: tuple[int, int] = (200, 200)) -> list[Scenes]:
    """Training and test scenes of the embedded shapes, 64 x 64 pixels, always the same."""

    def load(scene):
        image, labels, masks = scene
        boxes = masks_to_boxes(torch.from_numpy(masks)) + torch.tensor([0, 0, 1, 1])  # the last pixel is inside
        return image, boxes, labels + 1, np.zeros(len(labels)), masks if task == "segmentation" else None

    seeds = range(counts[0]), range(1_000_000, 1_000_000 + counts[1])
    return [Scenes(shapes.CLASSES, [shapes.draw_scene(seed) for seed in split], load) for split in seeds]


# --------------------------------------------------------------------------------------------- COCO


def coco(root: Path, task: str) -> list[Scenes]:
    classes, splits = None, []
    for split in ("train", "val"):
        files = sorted(root.glob(f"annotations/instances_{split}*.json"))
        if not files:
            raise UserError(f"--data-dir {root}: no annotations/instances_{split}*.json in it, as COCO has")
        names, items = _coco_instances(files[-1], root)
        classes = tuple(names[i] for i in sorted(names)) if classes is None else classes
        labels = {i: classes.index(name) + 1 for i, name in names.items() if name in classes}
        splits.append(Scenes(classes, items, partial(_coco_scene, labels=labels, task=task), workers=2))
    return splits


def _coco_instances(file: Path, root: Path) -> tuple[dict[int, str], list]:
    """The classes' names by id, and (path, annotations) of every image."""
    try:
        content = json.loads(file.read_text())
        names = {c["id"]: c["name"] for c in content["categories"]}
        if not all(isinstance(name, str) for name in names.values()):
            raise ValueError("the name of a category is no text")
        objects = {image["id"]: [] for image in content["images"]}
        for annotation in content["annotations"]:
            _check_annotation(annotation)
            if annotation["category_id"] not in names:
                raise ValueError(f"annotation {annotation.get('id')} has an unknown class")
            objects[annotation["image_id"]].append(annotation)
        folder = root / file.stem.removeprefix("instances_")
        items = [(_inside(folder, image["file_name"]), objects[image["id"]]) for image in content["images"]]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise UserError(f"{file}: not COCO's instances ({type(error).__name__}: {error})") from error
    check_files([path for path, _ in items], file)
    return names, items


def _check_annotation(annotation: dict) -> None:
    """Raises ValueError for fields that no scene could be made of."""
    if not _numbers(annotation["bbox"]) or len(annotation["bbox"]) != 4 or annotation.get("iscrowd", 0) not in (0, 1):
        raise ValueError(f"annotation {annotation.get('id')}: bbox must be four numbers and iscrowd 0 or 1")
    hash(annotation["category_id"])
    outline = annotation.get("segmentation", [])
    if isinstance(outline, dict):
        fine = isinstance(outline["counts"], str) or _numbers(outline["counts"])
    else:
        fine = all(_numbers(polygon) and len(polygon) >= 4 and len(polygon) % 2 == 0 for polygon in outline)
    if not fine:
        raise ValueError(f"annotation {annotation.get('id')}: segmentation is no list of polygons or counts")


def _numbers(values) -> bool:
    kinds = isinstance(values, list) and all(type(x) in (int, float) for x in values)
    return kinds and all(math.isfinite(x) and abs(x) < 1e6 for x in values)


def _inside(folder: Path, name: str) -> Path:
    """The file called name in a folder. Raises ValueError if the name leads out of it."""
    if not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{name!r} is no file in {folder}")
    return folder / name


def _coco_scene(item, labels: dict[int, int], task: str):
    path, objects = item
    image, objects = read_image(path), [o for o in objects if o["category_id"] in labels]
    boxes = [(x, y, x + w, y + h) for x, y, w, h in (o["bbox"] for o in objects)]
    masks = None
    if task == "segmentation":
        try:
            masks = [mask_of(o["segmentation"], *image.shape[1:], path) for o in objects]
        except (ValueError, KeyError, TypeError) as error:
            problem = f"its segmentation does not fit ({type(error).__name__}: {error})"
            raise error if isinstance(error, UserError) else UserError(f"{path}: {problem}") from error
    return image, boxes, [labels[o["category_id"]] for o in objects], [o.get("iscrowd", 0) for o in objects], masks


def mask_of(outline: list | dict, height: int, width: int, path="") -> np.ndarray:
    """COCO's segmentation as bool (height, width).

    outline is a list of polygons [[x, y, …], …], or has run lengths down the columns.
    """
    if isinstance(outline, dict):
        counts = outline["counts"]
        if isinstance(counts, str):
            advice = "which is not supported: polygons and lists of counts are"
            raise UserError(f"{path}: its mask is compressed RLE, {advice}")
        return (np.repeat(np.arange(len(counts)) % 2, counts) > 0).reshape(width, height).T
    fine = Image.new("1", (4 * width, 4 * height))  # Pillow fills a pixel beyond the outline: now a quarter of one
    for polygon in outline:
        ImageDraw.Draw(fine).polygon([4 * v for v in polygon], fill=1)
    return np.array(fine)[2::4, 2::4]


# ---------------------------------------------------------------------------------------------- VOC


def voc(root: Path, task: str) -> list[Scenes]:
    annotations = root / "Annotations"
    splits = []
    for names in _voc_splits(root, task):
        splits.append([(root, name, _voc_objects(annotations / f"{name}.xml")) for name in names])
        check_files([root / "JPEGImages" / f"{name}.jpg" for name in names], annotations)
        if task == "segmentation":
            check_files([root / "SegmentationObject" / f"{name}.png" for name in names], annotations)
    classes = tuple(sorted({name for items in splits for *_, objects in items for name, *_ in objects}))
    return [Scenes(classes, items, partial(_voc_scene, classes=classes, task=task), workers=2) for items in splits]


def _voc_splits(root: Path, task: str) -> list[list[str]]:
    """The names of the training and of the test images."""
    names = sorted(path.stem for path in root.glob("Annotations/*.xml"))
    if not names:
        raise UserError(f"--data-dir {root}: no Annotations/*.xml in it, as VOC has")
    lists = root / "ImageSets" / ("Segmentation" if task == "segmentation" else "Main")
    if not lists.is_dir():
        return [[name for i, name in enumerate(names) if (i % 5 == 0) == test] for test in (False, True)]
    try:
        splits = ("trainval", "test") if (lists / "test.txt").exists() else ("train", "val")
        texts = [(lists / f"{split}.txt").read_text() for split in splits]
    except OSError as error:
        raise UserError(f"--data-dir {root}: {error.filename} cannot be read ({error.strerror})") from error
    listed = [[line.split()[0] for line in text.splitlines() if line.strip()] for text in texts]
    for name in sum(listed, []):
        if "/" in name or name in (".", ".."):
            raise UserError(f"{lists}: {name!r} is no name of an image")
    return listed


def _voc_objects(path: Path) -> list[tuple[str, tuple[float, ...], bool]]:
    """Class, box, and whether it is a difficult one, of every object.

    VOC counts pixels from 1, and both ends lie within the box.
    """
    objects = []
    try:
        for element in ElementTree.parse(path).iter("object"):
            x0, y0, x1, y1 = (float(element.find("bndbox").findtext(k)) for k in ("xmin", "ymin", "xmax", "ymax"))
            box = [x0 - 1, y0 - 1, x1, y1]
            if not _numbers(box) or not element.findtext("name"):
                raise ValueError("an object without a name, or with an absurd box")
            objects.append((element.findtext("name"), tuple(box), element.findtext("difficult") == "1"))
    except (OSError, ElementTree.ParseError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not VOC's annotations ({error})") from error
    return objects


def _voc_scene(item, classes: tuple[str, ...], task: str):
    root, name, objects = item
    image, masks = read_image(root / "JPEGImages" / f"{name}.jpg"), None
    if task == "segmentation":  # object k of the file has the value k, from 1; 255 is an edge
        values = read_image(root / "SegmentationObject" / f"{name}.png", mode=None)
        masks = [values == k + 1 for k in range(len(objects))]
    names, boxes, difficult = zip(*objects) if objects else ((), (), ())
    return image, boxes, [classes.index(name) + 1 for name in names], difficult, masks
