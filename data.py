"""Datasets by name, decoded once to uint8 tensors in memory, or read from disk batch by batch when they do not fit.

    shapes, shapes-textured   drawn here from a seed (shapes.py), nothing to download
    cifar10, cifar100, stl10  through torchvision, downloaded to --data-dir on first use (stl10: its unlabelled split)
    folder                    your own images under --data-dir, in one of three layouts:
                                  train/<class>/*.jpg + test/<class>/*.jpg
                                  <class>/*.jpg          a fifth of each class is kept for testing
                                  *.jpg                  no labels: pretraining only

Images of any size and mode are accepted: turned upright, converted to RGB, cropped to their central square and reduced.
An image is a row of the memory bank, so what cannot be read is found and left out before training starts.
"""

import os
import signal
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

import shapes

DATASETS = ("shapes", "shapes-textured", "cifar10", "cifar100", "stl10", "folder")
EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm"}
DOWNLOADS = {  # the class in torchvision.datasets, and what has to lie in --data-dir for it to find
    "cifar10": ("CIFAR10", "the folder cifar-10-batches-py (unpacked from cifar-10-python.tar.gz)"),
    "cifar100": ("CIFAR100", "the folder cifar-100-python (unpacked from cifar-100-python.tar.gz)"),
    "stl10": ("STL10", "the folder stl10_binary (unpacked from stl10_binary.tar.gz)"),
}

# what Pillow raises for damaged files
UNREADABLE = (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError)


class UserError(ValueError):
    """A mistake that the person at the keyboard can mend: printed as one line, without a traceback."""


@dataclass
class Images:
    """N square images: in memory as `pixels` uint8 (N, 3, S, S), or as `paths` to be decoded; `labels` (N,) or None."""

    pixels: Tensor | None = None
    paths: list[Path] | None = None
    labels: Tensor | None = None
    side: int = 0  # S
    workers: int = 2  # processes that decode, for images read from disk

    def __len__(self) -> int:
        return len(self.paths if self.pixels is None else self.pixels)

    def take(self, index: Tensor) -> "Images":
        return replace(
            self,
            pixels=None if self.pixels is None else self.pixels[index],
            paths=None if self.paths is None else [self.paths[i] for i in index.tolist()],
            labels=None if self.labels is None else self.labels[index],
        )

    def to(self, device: torch.device) -> "Images":
        """Move pixels in memory to the device if they take less than half of what is free there."""
        if self.pixels is None:
            return self
        if device.type == "cuda" and self.pixels.nbytes > torch.cuda.mem_get_info(device)[0] / 2:
            return self
        return replace(self, pixels=self.pixels.to(device))

    def batches(self, order: Tensor, batch_size: int, device: torch.device):
        """Yields (pixels uint8 (B, 3, S, S), index (B,) long) on the device, in the given order.

        Where batch_size does not divide the images, the rest is shared out among the batches instead of making a small
        one: BatchNorm refuses a batch of one.
        """
        parts = order.tensor_split(max(1, len(order) // batch_size))
        if self.pixels is not None:
            for index in parts:
                yield self.pixels[index.to(self.pixels.device)].to(device), index.to(device)
        else:
            files = _Files(self.paths, self.side)
            batches = [part.tolist() for part in parts]
            for pixels, index in torch.utils.data.DataLoader(
                files, batch_sampler=batches, num_workers=self.workers, worker_init_fn=_leave_ctrl_c_to_the_main_process
            ):
                yield pixels.to(device), index.to(device)


def _leave_ctrl_c_to_the_main_process(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Files(torch.utils.data.Dataset):
    def __init__(self, paths: list[Path], side: int):
        self.paths, self.side = paths, side

    def __getitem__(self, index: int):
        return torch.from_numpy(decode(self.paths[index], self.side)), index


@dataclass
class Dataset:
    """`train` is what is pretrained on; `labelled` and `test` are for evaluation, None where there are no labels."""

    train: Images
    labelled: Images | None
    test: Images | None
    classes: tuple[str, ...]

    def to(self, device: torch.device) -> "Dataset":
        train = self.train.to(device)
        labelled = train if self.labelled is self.train else self.labelled and self.labelled.to(device)
        return replace(self, train=train, labelled=labelled, test=self.test and self.test.to(device))


def load(
    name: str,
    data_dir: str = "data",
    size: int = 32,
    subset: int = 0,
    holdout: int = 0,
    cache_gb: float = 4.0,
    workers: int = 2,
) -> Dataset:
    """A dataset by name, ready to train on.

    size is the side of the views in pixels, from which the side that large images are reduced to follows; subset keeps
    that many training images (0: all), holdout takes that many others of them as the test set, for choosing settings
    without looking at the real one; both are the same images for every seed. Decoded images are kept in memory up to
    cache_gb, and read from disk by as many processes as workers beyond. Raises UserError, naming the option or file.
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
        found = _decode_all(found, size, cache_gb, workers)
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


def decode(path: Path, side: int) -> np.ndarray:
    """One image file as uint8 (3, side, side): upright, RGB, its central square. Raises what Pillow raises."""
    with Image.open(path) as image:
        image.draft("RGB", (side, side))  # JPEG: skip resolution that would be thrown away
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):  # 16-bit and float greyscale, which Pillow would clip
            values = np.asarray(image, dtype=np.float64)
            low, high = (0, 65535) if image.mode.startswith("I") else (values.min(), values.max())
            image = Image.fromarray(((values - low) / max(high - low, 1e-12) * 255).clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
        if image.size != (side, side):
            image = ImageOps.fit(image, (side, side), Image.Resampling.BILINEAR)
        return np.asarray(image).transpose(2, 0, 1).copy()


def _decode_all(found: Dataset, size: int, cache_gb: float, workers: int) -> Dataset:
    """Decode every file once: kept in memory if all fit in cache_gb, checked and left on disk otherwise."""
    parts = [found.train] + ([found.test] if found.test else [])
    side = _choose_side(found.train.paths, size)
    total = sum(map(len, parts))
    in_memory = total * 3 * side * side <= cache_gb * 1e9
    done, bad = [], []
    quiet = {"disable": True} if total < 2000 else {}
    with tqdm(total=total, desc="reading images", unit="image", **quiet) as bar:
        for part in parts:
            part, unreadable = _decode_part(part, side, in_memory, bar)
            done.append(replace(part, workers=workers))
            bad += unreadable
    if bad:
        named = ", ".join(map(str, bad[:5])) + (" …" if bad[5:] else "")
        print(f"skipped {len(bad)} of {total} images that cannot be read: {named}")
    if not len(done[0]):
        raise UserError(f"--data-dir: none of its {total} images can be read, for instance {bad[0]}")
    test = done[1] if found.test and len(done[1]) else None
    return replace(found, train=done[0], labelled=done[0] if found.labelled else None, test=test)


def _decode_part(part: Images, side: int, in_memory: bool, bar: tqdm) -> tuple[Images, list[Path]]:
    def attempt(path):
        try:
            return decode(path, side)
        except UNREADABLE:
            return None

    pixels = torch.empty((len(part), 3, side, side), dtype=torch.uint8) if in_memory else None
    readable = torch.zeros(len(part), dtype=torch.bool)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow lets go of the interpreter while it decodes
        for start in range(0, len(part), 1024):  # in pieces, so that few decoded images wait at a time
            for i, image in enumerate(pool.map(attempt, part.paths[start : start + 1024]), start):
                bar.update()
                if image is not None:
                    readable[i] = True
                    if in_memory:
                        pixels[i] = torch.from_numpy(image)
    bad = [path for path, fine in zip(part.paths, readable.tolist()) if not fine]
    part = replace(part, pixels=pixels, side=side)
    return (part if not bad else part.take(readable.nonzero()[:, 0])), bad


def _choose_side(paths: list[Path], size: int) -> int:
    """Small images that share one square size stay as they are; others are brought to a little more than a view."""
    limit = max(64, round(size * 8 / 7))
    seen = set()
    for path in paths[:: max(1, len(paths) // 64)]:  # about 64 of them, from all classes
        try:
            with Image.open(path) as image:
                seen.add(image.size)
        except UNREADABLE:
            continue
    width, height = seen.pop() if len(seen) == 1 else (0, 1)
    return width if width == height and width <= limit else limit
