"""Every file of a dataset is decoded once, in parallel, to uint8 tensors.

Every image has a row in the memory bank, so a file that cannot be decoded is left out before
training starts.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from plumbing import cache
from plumbing.command_line import UserError
from plumbing.files import Dataset, Images, reason, say
from plumbing.pixels import UNREADABLE, Deep, Range, common_side, decode, lost_share, range_of, sample

FEW = 2000  # fewer images than that are decoded in a second or two: no bar, no file
DEEP = "more than 8 bits per value"


def decode_all(
    dataset: Dataset, size: int, cache_gb: float, workers: int, cache_dir: str, fit: str = "crop"
) -> Dataset:
    """Decode every file once. Images that fit in cache_gb together stay in memory.

    Others are checked and stay on disk. The decoded images are kept as a file in cache_dir for the
    next start, unless cache_dir is "" or the images are few. Of train.labels, -1 stands for images
    without a label.
    """
    train = _labelled_first(dataset.train)
    listed = [train] + ([dataset.test] if dataset.test else [])
    sizes, halved = sample(train.paths)
    side, lost = common_side(sizes, size), lost_share(sizes) if fit == "crop" else 0
    if lost > 0.005:
        say(f"images are cut to their central squares: {lost:.0%} of them lies outside (--fit pad shows all)")
    if halved:
        say("some images have 16 bits per colour, of which the upper 8 are used: values below 256 become black")
    total = sum(map(len, listed))
    in_memory = total * 3 * side * side <= cache_gb * 1e9
    most = 2e9 * cache_gb if in_memory and total >= FEW and cache_dir else 0
    done, bad, span = [], {}, None
    quiet = {"disable": True} if total < FEW else {}
    with tqdm(total=total, desc="reading images", unit="image", **quiet) as bar:
        for images in listed:
            images = replace(images, side=side, workers=workers, fit=fit, span=span)
            images, readable, reasons = _read(images, in_memory, cache_dir, most, bar)
            bad |= {images.paths[i]: why for i, why in reasons.items()}
            span = images.span
            done.append(images if readable.all() else images.take(readable.nonzero()[:, 0]))
    if bad:
        named = ", ".join(f"{path} ({why})" for path, why in list(bad.items())[:5]) + (" …" if len(bad) > 5 else "")
        say(f"skipped {len(bad)} of {total} images that cannot be read: {named}")
    if not len(done[0]):
        path, why = next(iter(bad.items()))
        raise UserError(f"--data-dir: none of its {total} images can be read, for instance {path} ({why})")
    return _with_parts(dataset, *done)


def _labelled_first(images: Images) -> Images:
    if images.labels is None or (images.labels >= 0).all():
        return images
    return images.take((images.labels < 0).long().argsort(stable=True))


def _with_parts(dataset: Dataset, train: Images, test: Images | None = None) -> Dataset:
    """The dataset with decoded images; its labelled ones are the first of train."""
    labelled, lacks = None, dataset.lacks
    if dataset.labelled:
        count = int((train.labels >= 0).sum())
        labelled = train.first(count) if count < len(train) else train
        train = replace(train, labels=None) if count < len(train) else train
        lacks = lacks or ("" if count else "none of the images with labels can be read")
    if test is not None and not len(test):
        test, lacks = None, "none of the test images can be read"
    return replace(dataset, train=train, labelled=labelled or None, test=test, lacks=lacks)


def _read(images: Images, in_memory: bool, cache_dir: str, most: float, bar: tqdm):
    """The images decoded, which of them can be read, bool (N,), and why not, by number.

    `most` is the size up to which decoded images are kept in cache_dir; 0: not at all.
    """

    def fits(content: dict) -> bool:
        known = content["span"] is None or images.span in (None, Range(*content["span"]))
        return known and content["pixels"].shape == (count, 3, images.side, images.side)

    count = len(images)
    place = cache.place_of(images.paths, (images.side, images.fit), cache_dir) if most else None
    content = cache.kept(place, fits) if place else None
    if content:
        pixels, readable = content["pixels"], content["readable"]
        images = replace(images, span=Range(*content["span"]) if content["span"] else images.span)
    else:
        pixels = torch.empty((count, 3, images.side, images.side), dtype=torch.uint8) if in_memory else None
        readable = torch.zeros(count, dtype=torch.bool)
    before = int(readable.sum())
    bar.update(before)
    reasons = _decode(images, (~readable).nonzero()[:, 0].tolist(), pixels, readable, bar)
    deep = [i for i, why in reasons.items() if why == DEEP]
    if deep:
        span = images.span or range_of([images.paths[i] for i in deep], os.cpu_count()) or Range(0, 1)
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
        except Deep:
            return DEEP
        except UNREADABLE as error:
            return reason(error, images.paths[i])

    reasons = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow lets go of the interpreter while it decodes
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
