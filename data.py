"""Datasets by name, split into what is trained on, what is probed with and what is tested on.

    shapes, shapes-textured   drawn here from a seed (shapes.py), nothing to download
    cifar10, cifar100, stl10  through torchvision, downloaded to --data-dir on first use (stl10: its unlabelled split)
    folder                    your own images under --data-dir, in one of three layouts:
                                  train/<class>/*.jpg + test/<class>/*.jpg
                                  <class>/*.jpg          a fifth of each class is kept for testing
                                  *.jpg                  no labels: pretraining only

What the files go through stands in images.py.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import shapes
from images import Dataset, Images, UserError, decode_all

DATASETS = ("shapes", "shapes-textured", "cifar10", "cifar100", "stl10", "folder")
EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm"}
DOWNLOADS = {  # the class in torchvision.datasets, and what has to lie in --data-dir for it to find
    "cifar10": ("CIFAR10", "the folder cifar-10-batches-py (unpacked from cifar-10-python.tar.gz)"),
    "cifar100": ("CIFAR100", "the folder cifar-100-python (unpacked from cifar-100-python.tar.gz)"),
    "stl10": ("STL10", "the folder stl10_binary (unpacked from stl10_binary.tar.gz)"),
}


def load(
    name: str,
    data_dir: str = "data",
    size: int = 32,
    subset: int = 0,
    holdout: int = 0,
    cache_gb: float = 4.0,
    workers: int = 2,
    cache_dir: str = "",
) -> Dataset:
    """A dataset by name, ready to train on.

    size is the side of the views in pixels, from which the side that large images are reduced to follows; subset keeps
    that many training images (0: all), holdout takes that many others of them as the test set, for choosing settings
    without looking at the real one; both are the same images for every seed. Decoded images are kept in memory up to
    cache_gb, and read from disk by as many processes as workers beyond; those of folders are kept decoded in cache_dir for
    the next start ("": they are not). Raises UserError, naming the option or file.
    """
    if name in ("shapes", "shapes-textured"):
        train, test = (_drawn(n, seed, name == "shapes-textured") for n, seed in ((10_000, 0), (2_000, 1)))
        found = Dataset(train, train, test, shapes.CLASSES)
    elif name in DOWNLOADS:
        found = _download(name, Path(data_dir))
    elif name == "folder":
        found = _folder(Path(data_dir))
    else:
        raise UserError(f"--dataset: unknown {name!r}, choose from {', '.join(DATASETS)}")
    found = _split(found, subset, holdout)
    if found.train.pixels is None:
        found = decode_all(found, size, cache_gb, workers, cache_dir)
    return found


def _split(found: Dataset, subset: int, holdout: int) -> Dataset:
    count = len(found.train)
    if subset < 0 or holdout < 0 or subset + holdout > count or holdout == count:
        raise UserError(f"--subset {subset} and --holdout {holdout}: the dataset has {count} training images in all")
    if not subset and not holdout:
        return found
    if holdout and found.train is not found.labelled:
        raise UserError("--holdout needs labels on the training images, and this dataset has none")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    train = found.train.take(order[: subset or count - holdout])
    labelled = train if found.labelled is found.train else found.labelled
    test = found.train.take(order[count - holdout :]) if holdout else found.test
    return replace(found, train=train, labelled=labelled, test=test)


def _drawn(count: int, seed: int, textured: bool) -> Images:
    pixels, labels = shapes.draw(count, seed, textured=textured)
    return Images(torch.from_numpy(pixels), labels=torch.from_numpy(labels), side=pixels.shape[-1])


def _download(name: str, root: Path) -> Dataset:
    import torchvision  # here, because its datasets are slow to import

    kind, files = DOWNLOADS[name]
    splits = [{"train": True}, {"train": False}]
    if name == "stl10":
        splits = [{"split": "unlabeled"}, {"split": "train"}, {"split": "test"}]
    new = [folder for folder in (root, *root.parents) if not folder.exists()]  # innermost first
    try:
        sets = [getattr(torchvision.datasets, kind)(root, download=True, **split) for split in splits]
    except (OSError, RuntimeError) as error:
        for folder in new:
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()
        advice = f"put {files} in {root} yourself, or name its place with --data-dir"
        raise UserError(f"--dataset {name}: cannot download it ({error}); {advice}") from error
    images = []
    for part in sets:
        array, labels = (part.data, part.labels) if name == "stl10" else (part.data.transpose(0, 3, 1, 2), part.targets)
        pixels, labels = torch.from_numpy(np.ascontiguousarray(array)), torch.tensor(np.asarray(labels)).long()
        images.append(Images(pixels, labels=None if (labels < 0).any() else labels, side=pixels.shape[-1]))
    return Dataset(images[0], images[-2], images[-1], tuple(sets[-1].classes))


# -------------------------------------------------------------------------------------------------------------- folders


def _folder(root: Path) -> Dataset:
    if not root.is_dir():
        raise UserError(f"--data-dir {root}: no such folder; name the one that holds your images")
    if (root / "train").is_dir():
        names = sorted({d.name for split in ("train", "test") for d in _subfolders(root / split)})
        train, test = (_listed(root / split, names) for split in ("train", "test"))
        train = train or Images(paths=_images_in(root / "train"))  # unlabelled, beside a test/<class>/ or alone
    elif _images_in(root):
        names, train, test = [], Images(paths=_images_in(root)), None
    else:
        names = [d.name for d in _subfolders(root) if _images_in(d)]
        everything = _listed(root, names)
        train = test = None
        if names:
            order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(0))
            kept = torch.zeros(len(everything), dtype=torch.bool)
            for c in range(len(names)):
                members = order[everything.labels[order] == c]
                kept[members[: len(members) // 5]] = True
            train, test = everything.take((~kept).nonzero()[:, 0]), everything.take(kept.nonzero()[:, 0])
    if not train:
        places = "neither in it, nor in its train/, nor in folders named after classes"
        raise UserError(f"--data-dir {root}: no images found, {places} ({' '.join(sorted(EXTENSIONS))})")
    return Dataset(train, train if train.labels is not None else None, test or None, tuple(names))


def _subfolders(folder: Path) -> list[Path]:
    return sorted(d for d in folder.iterdir() if d.is_dir() and not d.name.startswith(".")) if folder.is_dir() else []


def _images_in(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in EXTENSIONS and not p.name.startswith("."))


def _listed(folder: Path, names: list[str]) -> Images:
    """All images of folder/<class>/, with the class's place in `names` as the label."""
    each = [_images_in(folder / name) if (folder / name).is_dir() else [] for name in names]
    labels = [c for c, paths in enumerate(each) for _ in paths]
    return Images(paths=sum(each, []), labels=torch.tensor(labels, dtype=torch.long))
