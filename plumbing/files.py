"""Files to pixels: every image is decoded once, in parallel, to uint8 tensors.

Images of any size and mode are accepted: upright, RGB, one square size. Files of more than 8 bits
per value ("deep": 16-bit and float greyscale) need the range of values that becomes 0 to 255. It is
one range for the whole dataset (`Range`), so that a dark picture stays darker than a bright one.
Every image has a row in the memory bank, so a file that cannot be decoded is left out before
training starts. plumbing/folders.py says which files there are, and which of them train or test.
"""

import math
import os
import signal
import sys
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor
from tqdm import tqdm

from plumbing import cache
from plumbing.command_line import UserError, loaded

UNREADABLE = (Exception,)  # Pillow's readers raise a dozen kinds for damaged files, some of them RuntimeError
GREY = (127, 127, 127)  # beside padded images
FEW = 2000  # fewer images than that are decoded in a second or two: no bar, no file
DEEP = "more than 8 bits per value"
warnings.filterwarnings("ignore", module=r"PIL\b")  # they name no file; what cannot be read is said anyway


# ---------------------------------------------------------------------------------- one image file


@dataclass(frozen=True)
class Range:
    """The values low to high become 0 to 255; what lies beyond becomes 0 or 255."""

    low: float
    high: float

    def __call__(self, values: np.ndarray) -> np.ndarray:
        scaled = (values.astype(np.float64) - self.low) / max(self.high - self.low, 1e-30) * 255
        return scaled.clip(0, 255).round().astype(np.uint8)

    @classmethod
    def of(cls, paths: list[Path]) -> "Range":
        """The range of the deep files of a dataset; 0 to 1 if none of them can be read.

        Whole numbers from 0 have a range of so many bits: 0 to 4095 if the largest is 3000.
        """
        with ThreadPoolExecutor(threads()) as pool:
            readable = [each for each in pool.map(extremes, paths) if each]
        lows, highs, whole = zip(*readable or [(0, 1, True)])
        if all(whole) and min(lows) >= 0:
            return cls(0, 2 ** max(1, int(max(highs)).bit_length()) - 1)
        return cls(float(min(lows)), float(max(highs)))


def threads() -> int:
    """How many files are decoded at a time: each is a whole picture in memory."""
    return min(8, os.cpu_count() or 1)


def opened(path: Path) -> Image.Image:
    """`Image.open`, but of a JPEG any size: `draft` makes it small before it is decoded."""
    try:
        return Image.open(path)
    except Image.DecompressionBombError:
        with suppress(SyntaxError):  # it is no JPEG
            image = JpegImageFile(path)
            if "progressive" not in image.info:  # one that is keeps all its numbers while it is decoded
                return image
        raise


def extremes(path: Path) -> tuple[float, float, bool] | None:
    """The smallest and the largest value of a deep file, and whether its values are whole numbers.

    None if it cannot be read.
    """
    try:
        with Image.open(path) as image:
            values = _finite(image)
        return values.min().item(), values.max().item(), image.mode.startswith("I")
    except UNREADABLE:
        return None


def decode(path: Path, side: int, fit: str = "crop", span: Range | None = None) -> np.ndarray:
    """One image file as uint8 (3, side, side): upright and RGB.

    fit "crop" takes the central square, "pad" shows the whole image with grey beside it. Raises
    what Pillow raises (UNREADABLE), and ValueError for a value that is not finite, and for a DEEP
    file without a span.
    """
    with opened(path) as image:
        image.draft("RGB", (side, side))  # JPEG: skip resolution that is not needed
        if image.width * image.height > 2**26:
            raise ValueError("more than 67 million pixels, which would take gigabytes to decode")
        image.getexif()
        image.info.pop("exif", None)  # Pillow would write it anew without the turn, and fails at odd tags
        ImageOps.exif_transpose(image, in_place=True)  # here and below, a copy would be of full size
        if image.mode.startswith(("I", "F")):
            if span is None:
                raise ValueError(DEEP)
            image = Image.fromarray(span(_finite(image)))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image if image.mode == "RGB" else image.convert("RGB")
        if image.size != (side, side):
            if fit == "pad":
                image = ImageOps.pad(image, (side, side), Image.Resampling.BILINEAR, color=GREY)
            else:
                image = ImageOps.fit(image, (side, side), Image.Resampling.BILINEAR)
        return np.asarray(image).transpose(2, 0, 1).copy()


def _finite(image: Image.Image) -> np.ndarray:
    values = np.asarray(image)
    if not np.isfinite(values).all():
        raise ValueError("a value is not finite")
    return values


def sample(paths: list[Path], count: int = 64) -> tuple[list[tuple[int, int]], bool]:
    """(width, height) of about `count` of the files, spread over all of them; upright.

    And whether one of them has 16 bits per colour, of which Pillow gives the upper 8.
    """
    sizes, halved = [], False
    for path in paths[:: max(1, len(paths) // count)]:
        try:
            with opened(path) as image:
                coloured = not image.mode.startswith(("I", "F"))
                halved |= coloured and any(";16" in str(tile[3]) for tile in image.tile)
                turned = image.width != image.height and image.getexif().get(274, 1) in (5, 6, 7, 8)
                sizes.append(image.size[::-1] if turned else image.size)
        except UNREADABLE:
            continue
    return sizes, halved


def common_side(sizes: list[tuple[int, int]], size: int) -> int:
    """The side of the decoded images, for views of `size` pixels.

    Small images that share one square size stay as they are; others become a little larger than a
    view.
    """
    limit = max(64, round(size * 8 / 7))
    width, height = sizes[0] if len(set(sizes)) == 1 else (0, 1)
    return width if width == height and width <= limit else limit


def lost_share(sizes: list[tuple[int, int]]) -> float:
    """The mean share of the images that lies outside their central squares."""
    return 1 - math.fsum(min(size) / max(size) for size in sizes) / len(sizes) if sizes else 0.0


# -------------------------------------------------------------------------------- images, datasets


def say(line: str) -> None:
    """Print a line, in one process of a group, whatever characters file names have in them."""
    if os.environ.get("RANK", "0") == "0":
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        print(line.encode(encoding, "backslashreplace").decode(encoding))


@dataclass
class Images:
    """N square images: `pixels` uint8 (N, 3, S, S) in memory, or `paths` to be decoded.

    labels is (N,) or None. fit and span are those of `decode`, root is the folder that names
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
    ahead: "Ahead | None" = field(default=None, init=False, repr=False)  # no copy has it: numbers are others there

    def __len__(self) -> int:
        return len(self.paths if self.pixels is None else self.pixels)

    def take(self, index: Tensor | slice) -> "Images":
        """The images of these numbers; those of a slice share the memory of these."""
        pixels, labels = (x if x is None else x[index] for x in (self.pixels, self.labels))
        numbers = range(len(self))[index] if isinstance(index, slice) else index.tolist()
        paths = self.paths and [self.paths[i] for i in numbers]
        return replace(self, pixels=pixels, paths=paths, labels=labels)

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
            if self.ahead and self.ahead.holds(order):
                loader = self.ahead.batches(batches)
            else:
                loader = torch.utils.data.DataLoader(
                    _Files(replace(self)),
                    batch_sampler=batches,
                    num_workers=self.workers,
                    generator=torch.Generator(),  # a loader draws a number: not from the generator of the views
                    worker_init_fn=_leave_ctrl_c_to_the_main_process,
                )
            for pixels, index in loaded(loader):
                yield pixels.to(device), index.to(device)

    def read_ahead(self, passes):
        """The passes of `data.windows`, while images on disk are read for this one and the next.

        So an image is read once while it is in the window, and not once per visit. Where all images
        are in the window or in memory, nothing is read ahead.
        """
        number, images, entering = next(passes)
        if self.pixels is not None or len(images) == len(self):
            yield number, images, entering
            yield from passes
            return
        self.ahead = Ahead(_Files(replace(self)).__getitem__, self.workers)
        try:
            for following in passes:
                self.ahead.hold(images, following[1])
                yield number, images, entering
                number, images, entering = following
        finally:
            self.ahead.close()
            self.ahead = None


class Ahead:
    """The images of this window and of the next, by number, as they are read in threads.

    read(i) gives image i as (uint8 (3, S, S), i). At most as many images are held as the two
    windows have.
    """

    def __init__(self, read, workers: int):
        self.read, self.pool = read, ThreadPoolExecutor(max(1, workers))
        self.images: dict[int, Future] = {}

    def hold(self, window: Tensor, following: Tensor) -> None:
        """Begin to read what is missing of the images (W,) of both; what is in neither goes."""
        wanted = dict.fromkeys([*window.tolist(), *following.tolist()])  # this window's first
        self.images = {i: self.images.get(i) or self.pool.submit(self.read, i) for i in wanted}

    def holds(self, order: Tensor) -> bool:
        return all(i in self.images for i in order.tolist())

    def batches(self, numbers: list[list[int]]):
        """Yields (pixels uint8 (B, 3, S, S), index (B,)); raises what read raised."""
        for batch in numbers:
            yield torch.stack([self.images[i].result()[0] for i in batch]), torch.tensor(batch)

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)
        self.images = {}


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


# ------------------------------------------------------------------------------- decoding a dataset


def decode_all(
    dataset: Dataset, size: int, cache_gb: float, workers: int, cache_dir: str, fit: str = "crop"
) -> Dataset:
    """Decode every file once. Images that fit in cache_gb together stay in memory.

    Others are checked and stay on disk. The decoded images are kept as a file in cache_dir for the
    next start, unless cache_dir is "" or the images are few. Of train.labels, -1 stands for images
    without a label.
    """
    train = dataset.train
    if train.labels is not None:  # the labelled ones first
        train = train.take((train.labels < 0).long().argsort(stable=True))
    listed = [train] + ([dataset.test] if dataset.test else [])
    sizes, halved = sample(train.paths)
    side, lost = common_side(sizes, size), lost_share(sizes) if fit == "crop" else 0
    if lost > 0.005:
        say(f"images are cut to their central squares, and lose about {lost:.0%} of their areas (--fit pad shows all)")
    if halved:
        say("some images have 16 bits per colour, of which the upper 8 are used: values below 256 become black")
    total = sum(map(len, listed))
    in_memory = total * 3 * side * side <= cache_gb * 1e9
    most = 2e9 * cache_gb if in_memory and total >= FEW and cache_dir else 0
    done, bad, span = [], {}, None
    with tqdm(total=total, desc="reading images", unit="image", disable=total < FEW or None) as bar:
        for images in listed:
            images = replace(images, side=side, workers=workers, fit=fit, span=span)
            images, readable, reasons = _read(images, in_memory, cache_dir, most, bar)
            bad |= {images.paths[i]: why for i, why in reasons.items()}
            span = images.span
            done.append(images if readable.all() else _without_others(images, readable.nonzero()[:, 0]))
    if bad:
        named = ", ".join(f"{path} ({why})" for path, why in list(bad.items())[:5]) + (" …" if len(bad) > 5 else "")
        say(f"skipped {len(bad)} of {total} images that cannot be read: {named}")
    if not len(done[0]):
        path, why = next(iter(bad.items()))
        raise UserError(f"--data-dir: none of its {total} images can be read, for instance {path} ({why})")
    return _with_parts(dataset, *done)


def _without_others(images: Images, kept: Tensor) -> Images:
    """The images of these ascending numbers, in the same memory: `take` needs as much again."""
    few, pixels = replace(images, pixels=None).take(kept), images.pixels
    if pixels is not None:
        for start, rows in zip(range(0, len(kept), 1024), kept.split(1024)):
            pixels[start : start + len(rows)] = pixels[rows]  # each moves to a place before those that still wait
        few.pixels = pixels[: len(kept)]
    return few


def _with_parts(dataset: Dataset, train: Images, test: Images | None = None) -> Dataset:
    """The dataset with decoded images; its labelled ones are the first of train."""
    labelled, lacks = None, dataset.lacks
    if dataset.labelled:
        count = int((train.labels >= 0).sum())
        labelled = train.take(slice(count)) if count < len(train) else train
        train = replace(train, labels=None) if count < len(train) else train
        lacks = lacks or ("" if count else "none of the images with labels can be read")
    if test is not None and not len(test):
        test, lacks = None, lacks or "none of the test images can be read"
    return replace(dataset, train=train, labelled=labelled or None, test=test, lacks=lacks)


def _read(images: Images, in_memory: bool, cache_dir: str, most: float, bar: tqdm):
    """The images decoded, which of them can be read, bool (N,), and why not, by number.

    `most` is the size up to which decoded images are kept in cache_dir; 0: not at all.
    """
    place = cache.place_of(images.paths, (images.side, images.fit, images.span), cache_dir) if most else None
    content = cache.kept(place) if place else None
    if content:
        pixels, readable = content["pixels"], content["readable"]
        images = replace(images, span=Range(*content["span"]) if content["span"] else images.span)
    else:
        pixels = torch.empty((len(images), 3, images.side, images.side), dtype=torch.uint8) if in_memory else None
        readable = torch.zeros(len(images), dtype=torch.bool)
    before = int(readable.sum())
    bar.update(before)
    reasons = _decode(images, (~readable).nonzero()[:, 0].tolist(), pixels, readable, bar)
    deep = [i for i, why in reasons.items() if why == DEEP]
    if deep:
        span = images.span or Range.of([images.paths[i] for i in deep])
        images = replace(images, span=span)
        say(f"{len(deep)} images of more than 8 bits per value: {span.low:g} to {span.high:g} become 0 to 255")
        reasons |= _decode(images, deep, pixels, readable, bar)
        reasons = {i: why for i, why in reasons.items() if not readable[i]}
    if place and readable.sum() > before:
        span = images.span and (images.span.low, images.span.high)
        problem = cache.keep(place, {"pixels": pixels, "readable": readable, "span": span}, most)
        if problem:
            say(f"the decoded images are not kept for the next start: {problem}")
    return replace(images, pixels=pixels), readable, reasons


def _decode(images: Images, numbers: list[int], pixels: Tensor | None, readable: Tensor, bar: tqdm) -> dict[int, str]:
    """Decode the images of these numbers into pixels (None: only try), and note which can be read.

    Returns why the others cannot.
    """

    def attempt(i: int):
        try:
            return decode(images.paths[i], images.side, images.fit, images.span)
        except UNREADABLE as error:
            return reason(error, images.paths[i])

    reasons = {}
    with ThreadPoolExecutor(threads()) as pool:  # Pillow lets go of the interpreter while it decodes
        for start in range(0, len(numbers), 1024):  # in pieces, so that few decoded images wait at a time
            piece = numbers[start : start + 1024]
            for i, image in zip(piece, pool.map(attempt, piece)):
                bar.update()
                if isinstance(image, str):
                    reasons[i] = image
                else:
                    readable[i] = True
                    if pixels is not None:
                        pixels[i] = torch.from_numpy(image)
    return reasons
