"""Which files a run was trained on: row i of its bank stands for image i of this list.

A file is known by its name below the folder and its size, so that the folder can move. Images that
are not files (downloads and drawings are always the same) have no fingerprint.
"""

import hashlib
import os
from itertools import takewhile
from pathlib import Path

import torch
from torch import Tensor

from plumbing.command_line import UserError
from plumbing.files import Images
from plumbing.layout import digest, part_of

SAMPLE = 16  # files whose content is compared too: some formats give all pictures one size


def of_files(images: Images) -> Tensor | None:
    """A number (N,) for each file, from its name and its size."""
    if images.paths is None:
        return None
    return _numbers(images.names(), map(_size, images.paths))


def _numbers(names, sizes) -> Tensor:
    hashes = [digest(f"{name}\0{size}") for name, size in zip(names, sizes)]
    return torch.tensor([int.from_bytes(each[:8], "big", signed=True) for each in hashes], dtype=torch.long)


def fingerprint(images: Images) -> dict:
    """What a checkpoint keeps of its list of files: a number for each, a hash of some contents."""
    files = of_files(images)
    if files is None:
        return {}
    known = hashlib.blake2s()
    for path in images.paths[:: max(1, -(-len(images) // SAMPLE))]:
        known.update(_content(path))
    return {"files": files, "sample": known.hexdigest()}


def check_same(stored: dict | None, now: dict, name: str) -> None:
    """Raises UserError, which starts with `name`, unless the images are those of a checkpoint.

    stored is what `fingerprint` gave then, now what it gives today. Images that are no files pass.
    """
    if not stored or not now:
        return
    before = stored["files"]
    gone, new = (int((~torch.isin(a, b)).sum()) for a, b in ((before, now["files"]), (now["files"], before)))
    if gone or new:
        problem = f"{gone} of its {len(before)} images are gone, renamed or changed, and {new} are new"
    elif not torch.equal(before, now["files"]):
        problem = "its images have another order"
    elif stored["sample"] != now["sample"]:
        problem = "its images have the same names and sizes, but show something else"
    else:
        return
    raise UserError(f"{name}: {problem}; name their folder with --data-dir, or start a new run")


def among(stored: dict | None, images: Images) -> Tensor:
    """Which of the images (N,) a checkpoint was trained on, as far as it knows.

    Its --data-dir may have been a level higher or lower: names count from every folder around root,
    and from those that lie around all images, but not from within test/.
    """
    known = torch.zeros(len(images), dtype=torch.bool)
    if not stored or images.paths is None:
        return known
    above = Path(os.path.abspath(images.root)).parts[1:] if images.root else ()
    paths, sizes = [(*above, *name.split("/")) for name in images.names()], list(map(_size, images.paths))
    shared = os.path.commonprefix([path[:-1] for path in paths])[len(above) :]
    wrapper = list(takewhile(lambda folder: part_of(folder) in ("", "train"), shared))
    for level in range(len(above) + len(wrapper) + 1):
        known |= torch.isin(_numbers(["/".join(path[level:]) for path in paths], sizes), stored["files"])
    return known


def twins(train: Images, test: Images) -> list[tuple[int, int]]:
    """(test image, training image) for each test image whose content a training image has too.

    Of images in memory the pixels count, of images on disk the files' bytes.
    """
    if train.pixels is not None and test.pixels is not None:
        keys = [[hash(image.numpy().tobytes()) for image in images.pixels.cpu()] for images in (train, test)]
    else:
        sizes = [[_size(path) for path in images.paths] for images in (train, test)]
        shared = {*sizes[0]} & {*sizes[1]}  # only these need to be read
        keys = [
            [_content(path) if size in shared else path for path, size in zip(images.paths, each)]
            for images, each in zip((train, test), sizes)
        ]
    place = {key: i for i, key in enumerate(keys[0])}
    return [(i, place[key]) for i, key in enumerate(keys[1]) if key in place]


def _size(path) -> int:
    try:
        return os.path.getsize(path)
    except OSError:
        return -1


def _content(path) -> bytes:
    try:
        return hashlib.blake2s(path.read_bytes()).digest()
    except OSError:
        return b""
