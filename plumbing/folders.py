"""Datasets by name: downloads, folders, and which of their images train or test.

plumbing/layout.py reads a folder's layout from the names in it.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from plumbing import shapes
from plumbing.command_line import UserError
from plumbing.files import Dataset, Images, say
from plumbing.layout import Layout, digest, layout, listing, unwrapped

SHAPES = shapes.CLASSES
DOWNLOADS = {  # the class in torchvision.datasets, and what has to lie in --data-dir for it to find
    "cifar10": ("CIFAR10", "the folder cifar-10-batches-py (unpacked from cifar-10-python.tar.gz)"),
    "cifar100": ("CIFAR100", "the folder cifar-100-python (unpacked from cifar-100-python.tar.gz)"),
    "stl10": ("STL10", "the folder stl10_binary (unpacked from stl10_binary.tar.gz)"),
}


def download(name: str, root: Path) -> Dataset:
    import torchvision  # its datasets are slow to import

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
    for each in sets:
        array, labels = (each.data, each.labels) if name == "stl10" else (each.data.transpose(0, 3, 1, 2), each.targets)
        pixels, labels = torch.from_numpy(np.ascontiguousarray(array)), torch.tensor(np.asarray(labels)).long()
        images.append(Images(pixels, labels=None if (labels < 0).any() else labels, side=pixels.shape[-1]))
    return Dataset(images[0], images[-2], images[-1], tuple(sets[-1].classes))


def layout_of(root: Path) -> Layout:
    """The layout of what lies below root. Raises UserError where there is none."""
    if not root.is_dir():
        problem = "is a file" if root.is_file() else "no such folder"
        raise UserError(f"--data-dir {root}: {problem}; name the folder that holds your images")
    names, left_out = listing(root)
    try:
        return layout(names, left_out)
    except UserError as error:
        raise UserError(f"--data-dir {root}: {error}") from None


def folder(root: Path) -> Dataset:
    """The images below root, in the layout that their names show. Says in a line which that is."""
    shown = layout_of(root)
    say(f"{root}: {shown.said}")
    number = {name: c for c, name in enumerate(shown.classes)} | {None: -1}
    sets = []
    for pairs in (shown.train, shown.test):
        labels = torch.tensor([number[label] for _, label in pairs], dtype=torch.long) if shown.classes else None
        sets.append(Images(paths=[root / name for name, _ in pairs], labels=labels, root=root))
    train, test = sets
    return Dataset(train, train if shown.classes else None, test if len(test) else None, shown.classes, shown.lacks)


def split(dataset: Dataset, subset: int, holdout: int, root: Path) -> Dataset:
    """subset training images (0: all), and holdout others as the test set (0: the test set stays).

    Files under root are chosen by the hash of their names, so that new files move few others.
    """
    count, train, labels = len(dataset.train), dataset.train, dataset.train.labels
    if subset < 0 or holdout < 0 or subset + holdout > count or holdout == count:
        raise UserError(f"--subset {subset} and --holdout {holdout}: the dataset has {count} training images in all")
    if not subset and not holdout:
        return dataset
    order = shuffled_by_name(train, dataset.test, root)
    able = order if labels is None else order[labels[order] >= 0]
    if holdout and dataset.train is not dataset.labelled:
        raise UserError("--holdout needs labels on the training images, and this dataset has none")
    if holdout >= len(able):
        raise UserError(f"--holdout {holdout}: the dataset has {len(able)} training images with labels")
    held = able[len(able) - holdout :]
    train = train.take(order[~torch.isin(order, held)][: subset or count])
    labelled = train if dataset.labelled is dataset.train else dataset.labelled
    test, lacks = (dataset.train.take(held), "") if holdout else (dataset.test, dataset.lacks)
    return replace(dataset, train=train, labelled=labelled, test=test, lacks=lacks)


def shuffled_by_name(images: Images, test: Images | None, root: Path) -> Tensor:
    """An order (N,) that looks random and is always the same.

    A file's place follows from the hash of its name under root, without folders that lie around all
    images, those of test too: an order of numbers would put every image elsewhere as soon as one
    file is added.
    """
    if images.paths is None:
        return torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    paths = images.paths + (test.paths if test else [])
    hashes = [digest(name) for name in unwrapped([path.relative_to(root).as_posix() for path in paths])[: len(images)]]
    return torch.tensor(sorted(range(len(hashes)), key=hashes.__getitem__))


def drawn(count: int, seed: int, textured: bool) -> Images:
    pixels, labels = shapes.draw(count, seed, textured=textured)
    return Images(torch.from_numpy(pixels), labels=torch.from_numpy(labels), side=pixels.shape[-1])
