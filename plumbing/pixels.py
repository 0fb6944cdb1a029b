"""One image file to a square of bytes: upright, RGB, reduced, with one range of values per dataset.

Images of any size and mode are accepted. Files of more than 8 bits per value ("deep": 16-bit and
float greyscale) need the range of values that becomes 0 to 255. It is one range for the whole
dataset (`Range`), so that a dark picture stays darker than a bright one.
"""

import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

UNREADABLE = (Exception,)  # Pillow's readers raise a dozen kinds for damaged files, some of them RuntimeError
FITS = ("crop", "pad")
GREY = (127, 127, 127)  # beside padded images


class Deep(Exception):
    """The file has more than 8 bits per value, and no range of values was given."""


@dataclass(frozen=True)
class Range:
    """The values low to high become 0 to 255; what lies beyond becomes 0 or 255."""

    low: float
    high: float

    def __call__(self, values: np.ndarray) -> np.ndarray:
        scaled = (values.astype(np.float64) - self.low) / max(self.high - self.low, 1e-30) * 255
        return scaled.clip(0, 255).round().astype(np.uint8)

    @classmethod
    def of(cls, extremes: Iterable[tuple[float, float, bool]]) -> "Range":
        """The range of a dataset, from (smallest, largest, whether whole numbers) of its files.

        Whole numbers from 0 have a range of so many bits: 0 to 4095 if the largest is 3000.
        """
        lows, highs, whole = zip(*extremes)
        if all(whole) and min(lows) >= 0:
            return cls(0, 2 ** max(1, int(max(highs)).bit_length()) - 1)
        return cls(float(min(lows)), float(max(highs)))


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


def range_of(paths: list[Path], workers: int) -> Range | None:
    """The range of the deep files; None if none of them can be read."""
    with ThreadPoolExecutor(workers) as pool:
        readable = [each for each in pool.map(extremes, paths) if each]
    return Range.of(readable) if readable else None


def decode(path: Path, side: int, fit: str = "crop", span: Range | None = None) -> np.ndarray:
    """One image file as uint8 (3, side, side): upright and RGB.

    fit "crop" takes the central square, "pad" shows the whole image with grey beside it. Raises
    what Pillow raises (UNREADABLE), ValueError for a value that is not finite, and Deep if the file
    needs a span.
    """
    with Image.open(path) as image:
        image.draft("RGB", (side, side))  # JPEG: skip resolution that is not needed
        if image.width * image.height > 2**26:
            raise ValueError("more than 67 million pixels, which would take gigabytes to decode")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):
            if span is None:
                raise Deep
            image = Image.fromarray(span(_finite(image)))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
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
            with Image.open(path) as image:
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
