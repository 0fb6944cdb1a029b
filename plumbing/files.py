"""Datasets: images in memory or on disk, downloads, folders, and which of them train or test.

plumbing/layout.py reads a folder's layout from the names in it, plumbing/decoding.py decodes the
files before training starts.
"""

import os
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from plumbing import shapes
from plumbing.command_line import UserError, loaded
from plumbing.layout import digest, layout, listing
from plumbing.pixels import UNREADABLE, Range, decode


def say(line: str) -> None:
    """Print a line, in one process of a group, whatever characters file names have in them."""
    if os.environ.get("RANK", "0") == "0":
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        print(line.encode(encoding, "backslashreplace").decode(encoding))


@dataclass
class Images:
    """N square images: `pixels` uint8 (N, 3, S, S) in memory, or `paths` to be decoded.

    labels is (N,) or None. fit and span are those of `pixels.decode`, root is the folder that names
    of files count from.
    """

    pixels: Tensor | None = None
    paths: list[Path] | None = None
    labels: Tensor | None = None
    side: int = 0  # S
    workers: int = 2  # processes that decode images on disk
    fit: str = "crop"
    span: Range | None = None
    root: Path | None = None

    def __len__(self) -> int:
        return len(self.paths if self.pixels is None else self.pixels)

    def take(self, index: Tensor) -> "Images":
        return replace(
            self,
            pixels=None if self.pixels is None else self.pixels[index],
            paths=None if self.paths is None else [self.paths[i] for i in index.tolist()],
            labels=None if self.labels is None else self.labels[index],
        )

    def first(self, count: int) -> "Images":
        """The first images, which share the memory of these."""
        several = {name: getattr(self, name) for name in ("pixels", "paths", "labels")}
        return replace(self, **{name: x if x is None else x[:count] for name, x in several.items()})

    def names(self) -> list[str]:
        """The files' names below root, which stay when the folder moves."""
        return [(path.relative_to(self.root) if self.root else path).as_posix() for path in self.paths]

    def to(self, device: torch.device) -> "Images":
        """Move pixels in memory to the device if they take less than half of what is free there."""
        if self.pixels is None:
            return self
        if device.type == "cuda" and self.pixels.nbytes > torch.cuda.mem_get_info(device)[0] / 2:
            return self
        return replace(self, pixels=self.pixels.to(device))

    def batches(self, order: Tensor, batch_size: int, device: torch.device):
        """Yields (pixels uint8 (B, 3, S, S), index (B,) long) on the device, in the given order.

        Where batch_size does not divide the images, all batches share the remaining ones: BatchNorm
        refuses a batch of one image.
        """
        batches = order.tensor_split(max(1, len(order) // batch_size))
        if self.pixels is not None:
            # The order moves as a whole: every move waits for the device.
            places, indices = (order.to(d).tensor_split(len(batches)) for d in (self.pixels.device, device))
            for place, index in zip(places, indices):
                yield self.pixels[place].to(device), index
        else:
            batches = [batch.tolist() for batch in batches]
            loader = torch.utils.data.DataLoader(
                _Files(self),
                batch_sampler=batches,
                num_workers=self.workers,
                worker_init_fn=_leave_ctrl_c_to_the_main_process,
            )
            for pixels, index in loaded(loader):
                yield pixels.to(device), index.to(device)


def _leave_ctrl_c_to_the_main_process(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Files(torch.utils.data.Dataset):
    def __init__(self, images: Images):
        self.images = images

    def __getitem__(self, index: int):
        path = self.images.paths[index]
        try:
            return torch.from_numpy(decode(path, self.images.side, self.images.fit, self.images.span)), index
        except UNREADABLE as error:
            advice = "put it back and go on with --resume, or start anew without it"
            raise UserError(f"--data-dir: {path} can no longer be read ({reason(error, path)}): {advice}") from error


def reason(error: Exception, path: Path) -> str:
    """Why a file cannot be read, in one line without its name."""
    lines = (getattr(error, "strerror", None) or str(error)).replace(f" {str(path)!r}", "").splitlines()
    return lines[0] if lines else type(error).__name__


@dataclass
class Dataset:
    """`train` is for pretraining, `labelled` and `test` for evaluation.

    Both are None where the images have no labels. lacks says why there is nothing to evaluate with.
    """

    train: Images
    labelled: Images | None
    test: Images | None
    classes: tuple[str, ...]
    lacks: str = ""

    def to(self, device: torch.device) -> "Dataset":
        train = self.train.to(device)
        labelled = train if self.labelled is self.train else self.labelled and self.labelled.to(device)
        return replace(self, train=train, labelled=labelled, test=self.test and self.test.to(device))


# ---------------------------------------------------------------------------- downloads and folders

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


def folder(root: Path) -> Dataset:
    """The images below root, in the layout that their names show. Says in a line which that is."""
    if not root.is_dir():
        raise UserError(f"--data-dir {root}: no such folder; name the one that holds your images")
    names, closed = listing(root)
    try:
        shown = layout(names, closed)
    except UserError as error:
        raise UserError(f"--data-dir {root}: {error}") from None
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
    order = shuffled_by_name(train, root)
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


def shuffled_by_name(images: Images, root: Path) -> Tensor:
    """An order (N,) that looks random and is always the same.

    A file's place follows from the hash of its name under root: an order of numbers would put every
    image elsewhere as soon as one file is added.
    """
    if images.paths is None:
        return torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    hashes = [digest(path.relative_to(root).as_posix()) for path in images.paths]
    return torch.tensor(sorted(range(len(hashes)), key=hashes.__getitem__))


def drawn(count: int, seed: int, textured: bool) -> Images:
    pixels, labels = shapes.draw(count, seed, textured=textured)
    return Images(torch.from_numpy(pixels), labels=torch.from_numpy(labels), side=pixels.shape[-1])
