"""Images and what becomes of files: decoded once, in parallel, to uint8 tensors that the next start maps into memory.

Images of any size and mode are accepted: turned upright, converted to RGB, cropped to their central square and reduced.
An image is a row of the memory bank, so what cannot be read is found and left out before training starts.
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

# what Pillow raises for damaged files
UNREADABLE = (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError)
FEW = 2000  # images that are decoded in a second or two: no bar, no file


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
        if self.pixels is not None:  # the order moves as a whole: every move of its own would wait for the device
            here, there = (order.to(d).tensor_split(len(parts)) for d in (self.pixels.device, device))
            for place, index in zip(here, there):
                yield self.pixels[place].to(device), index
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


def decode_all(found: Dataset, size: int, cache_gb: float, workers: int, cache_dir: str) -> Dataset:
    """Decode every file once: kept in memory if all fit in cache_gb, checked and left on disk otherwise.

    What was decoded is kept as a file in cache_dir for the next start, unless it is "" or the images are few.
    """
    parts = [found.train] + ([found.test] if found.test else [])
    side = _choose_side(found.train.paths, size)
    total = sum(map(len, parts))
    in_memory = total * 3 * side * side <= cache_gb * 1e9
    done, bad = [], []
    quiet = {"disable": True} if total < FEW else {}
    with tqdm(total=total, desc="reading images", unit="image", **quiet) as bar:
        for part in parts:
            cached = _cache_file(part, side, cache_dir) if in_memory and cache_dir and total >= FEW else None
            pixels, readable = _cached(cached, len(part), side) or _decode_part(part, side, in_memory, bar)
            if cached and not cached.exists():
                _keep(cached, pixels, readable)
            bad += [path for path, fine in zip(part.paths, readable.tolist()) if not fine]
            part = replace(part, pixels=pixels, side=side, workers=workers)
            done.append(part if readable.all() else part.take(readable.nonzero()[:, 0]))
    if bad:
        named = ", ".join(map(str, bad[:5])) + (" …" if bad[5:] else "")
        print(f"skipped {len(bad)} of {total} images that cannot be read: {named}")
    if not len(done[0]):
        raise UserError(f"--data-dir: none of its {total} images can be read, for instance {bad[0]}")
    test = done[1] if found.test and len(done[1]) else None
    return replace(found, train=done[0], labelled=done[0] if found.labelled else None, test=test)


def _decode_part(part: Images, side: int, in_memory: bool, bar: tqdm) -> tuple[Tensor | None, Tensor]:
    """pixels uint8 (N, 3, side, side), or None, and which of the files can be read, bool (N,)."""

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
    return pixels, readable


def _cache_file(part: Images, side: int, folder: str) -> Path:
    """Where these very files are kept at this side: its name is a hash of all paths, sizes and times of change."""
    known = hashlib.blake2s(f"{side}".encode(), digest_size=12)
    for path in part.paths:
        about = os.stat(path)
        known.update(f"\0{path.absolute()}\0{about.st_size}\0{about.st_mtime_ns}".encode(errors="surrogateescape"))
    return Path(folder) / f"{known.hexdigest()}.pt"


def _cached(file: Path | None, count: int, side: int) -> tuple[Tensor, Tensor] | None:
    """What `_keep` wrote, mapped into memory: read from disk as it is used. None if there is nothing whole."""
    if not file or not file.is_file():
        return None
    try:
        kept = torch.load(file, mmap=True, weights_only=True)
        pixels, readable = kept["pixels"], kept["readable"]
        return (pixels, readable) if pixels.shape == (count, 3, side, side) and len(readable) == count else None
    except Exception:  # torch's readers raise a dozen kinds for a file that is not what they expect
        file.unlink()  # to be made anew
        return None


def _keep(file: Path, pixels: Tensor, readable: Tensor) -> None:
    part = file.with_suffix(f".{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"pixels": pixels, "readable": readable}, part)
        part.replace(file)
    except (OSError, RuntimeError) as error:  # a full disk is no reason not to train
        with suppress(OSError):
            part.unlink()
        print(f"the decoded images are not kept for the next start: {file.parent}: {str(error).splitlines()[0]}")


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
