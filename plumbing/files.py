"""Files to pixels: image files are decoded once, in parallel, to uint8 tensors.

A folder's decoded images are kept as a file, which the next start maps into memory. Images of any
size and mode are accepted: turned upright, converted to RGB, cropped to their central square and
reduced. Every image has a row in the memory bank, so a file that cannot be decoded is left out
before training starts.
"""

import hashlib
import os
import signal
import struct
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from plumbing import shapes
from plumbing.command_line import UserError, loaded
from plumbing.runs import check_zip

# What Pillow raises for damaged files.
UNREADABLE = (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError)
FEW = 2000  # fewer images than that are decoded in a second or two: no bar, no file


@dataclass
class Images:
    """N square images: `pixels` uint8 (N, 3, S, S) in memory, or `paths` to be decoded.

    labels is (N,) or None.
    """

    pixels: Tensor | None = None
    paths: list[Path] | None = None
    labels: Tensor | None = None
    side: int = 0  # S
    workers: int = 2  # processes that decode images on disk

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
            files = _Files(self.paths, self.side)
            batches = [batch.tolist() for batch in batches]
            loader = torch.utils.data.DataLoader(
                files, batch_sampler=batches, num_workers=self.workers, worker_init_fn=_leave_ctrl_c_to_the_main_process
            )
            for pixels, index in loaded(loader):
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
    """`train` is for pretraining, `labelled` and `test` for evaluation.

    Both are None where the images have no labels.
    """

    train: Images
    labelled: Images | None
    test: Images | None
    classes: tuple[str, ...]

    def to(self, device: torch.device) -> "Dataset":
        train = self.train.to(device)
        labelled = train if self.labelled is self.train else self.labelled and self.labelled.to(device)
        return replace(self, train=train, labelled=labelled, test=self.test and self.test.to(device))


def decode(path: Path, side: int) -> np.ndarray:
    """One image file as uint8 (3, side, side): upright, RGB, its central square.

    Raises what Pillow raises, see UNREADABLE.
    """
    with Image.open(path) as image:
        image.draft("RGB", (side, side))  # JPEG: skip resolution that is not needed
        if image.width * image.height > 2**26:
            raise ValueError("more than 67 million pixels, which would take gigabytes to decode")
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


def decode_all(dataset: Dataset, size: int, cache_gb: float, workers: int, cache_dir: str) -> Dataset:
    """Decode every file once. Images that fit in cache_gb together stay in memory.

    Others are checked and stay on disk. The decoded images are kept as a file in cache_dir for the
    next start, unless cache_dir is "" or the images are few.
    """
    listed = [dataset.train] + ([dataset.test] if dataset.test else [])
    side = _choose_side(dataset.train.paths, size)
    total = sum(map(len, listed))
    in_memory = total * 3 * side * side <= cache_gb * 1e9
    done, bad = [], []
    quiet = {"disable": True} if total < FEW else {}
    with tqdm(total=total, desc="reading images", unit="image", **quiet) as bar:
        for images in listed:
            cached = _cache_file(images, side, cache_dir) if in_memory and cache_dir and total >= FEW else None
            pixels, readable = _cached(cached, len(images), side) or _decode(images, side, in_memory, bar)
            if cached and not cached.exists():
                _keep(cached, pixels, readable)
            bad += [path for path, fine in zip(images.paths, readable.tolist()) if not fine]
            images = replace(images, pixels=pixels, side=side, workers=workers)
            done.append(images if readable.all() else images.take(readable.nonzero()[:, 0]))
    if bad:
        named = ", ".join(map(str, bad[:5])) + (" …" if bad[5:] else "")
        print(f"skipped {len(bad)} of {total} images that cannot be read: {named}")
    if not len(done[0]):
        raise UserError(f"--data-dir: none of its {total} images can be read, for instance {bad[0]}")
    test = done[1] if dataset.test and len(done[1]) else None
    return replace(dataset, train=done[0], labelled=done[0] if dataset.labelled else None, test=test)


def _decode(images: Images, side: int, in_memory: bool, bar: tqdm) -> tuple[Tensor | None, Tensor]:
    """pixels uint8 (N, 3, side, side), or None, and which of the files can be read, bool (N,)."""

    def attempt(path):
        try:
            return decode(path, side)
        except UNREADABLE:
            return None

    pixels = torch.empty((len(images), 3, side, side), dtype=torch.uint8) if in_memory else None
    readable = torch.zeros(len(images), dtype=torch.bool)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow lets go of the interpreter while it decodes
        for start in range(0, len(images), 1024):  # in pieces, so that few decoded images wait at a time
            for i, image in enumerate(pool.map(attempt, images.paths[start : start + 1024]), start):
                bar.update()
                if image is not None:
                    readable[i] = True
                    if in_memory:
                        pixels[i] = torch.from_numpy(image)
    return pixels, readable


def _cache_file(images: Images, side: int, folder: str) -> Path:
    """Where the decoded images lie: its name is a hash of all paths, sizes and times of change."""
    known = hashlib.blake2s(f"{side}".encode(), digest_size=12)
    for path in images.paths:
        about = os.stat(path)
        known.update(f"\0{path.absolute()}\0{about.st_size}\0{about.st_mtime_ns}".encode(errors="surrogateescape"))
    return Path(folder) / f"{known.hexdigest()}.pt"


def _cached(file: Path | None, count: int, side: int) -> tuple[Tensor, Tensor] | None:
    """What `_keep` wrote, mapped into memory and read as it is used; None if it is not whole."""
    if not file or not file.is_file():
        return None
    try:
        check_zip(file)
        kept = torch.load(file, mmap=True, weights_only=True)
        pixels, readable = kept["pixels"], kept["readable"]
        return (pixels, readable) if pixels.shape == (count, 3, side, side) and len(readable) == count else None
    except Exception:  # torch's readers raise a dozen kinds for a file that is not what they expect
        file.unlink()  # to be made anew
        return None


def _keep(file: Path, pixels: Tensor, readable: Tensor) -> None:
    beside = file.with_suffix(f".{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"pixels": pixels, "readable": readable}, beside)
        beside.replace(file)
    except (OSError, RuntimeError) as error:  # a full disk is no reason not to train
        with suppress(OSError):
            beside.unlink()
        print(f"the decoded images are not kept for the next start: {file.parent}: {str(error).splitlines()[0]}")


def _choose_side(paths: list[Path], size: int) -> int:
    """The side of the decoded images.

    Small images that share one square size stay as they are; others become a little larger than a
    view.
    """
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


# ---------------------------------------------------------------------------- downloads and folders

SHAPES = shapes.CLASSES
EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm"}
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
    if not root.is_dir():
        raise UserError(f"--data-dir {root}: no such folder; name the one that holds your images")
    if (root / "train").is_dir():
        names = sorted({d.name for split in ("train", "test") for d in _subfolders(root / split)})
        train, test = (_listed(root / split, names) for split in ("train", "test"))
        train = train or Images(paths=_images_in(root / "train"))  # unlabelled
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


def split(dataset: Dataset, subset: int, holdout: int) -> Dataset:
    count = len(dataset.train)
    if subset < 0 or holdout < 0 or subset + holdout > count or holdout == count:
        raise UserError(f"--subset {subset} and --holdout {holdout}: the dataset has {count} training images in all")
    if not subset and not holdout:
        return dataset
    if holdout and dataset.train is not dataset.labelled:
        raise UserError("--holdout needs labels on the training images, and this dataset has none")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    train = dataset.train.take(order[: subset or count - holdout])
    labelled = train if dataset.labelled is dataset.train else dataset.labelled
    test = dataset.train.take(order[count - holdout :]) if holdout else dataset.test
    return replace(dataset, train=train, labelled=labelled, test=test)


def drawn(count: int, seed: int, textured: bool) -> Images:
    pixels, labels = shapes.draw(count, seed, textured=textured)
    return Images(torch.from_numpy(pixels), labels=torch.from_numpy(labels), side=pixels.shape[-1])
