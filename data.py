"""Datasets by name, the batch that a step sees, augmentation and CutMix.

    shapes, shapes-textured   drawn from a seed (plumbing/shapes.py), nothing to download
    cifar10, cifar100, stl10  through torchvision, downloaded to --data-dir on first use
    folder                    your own images under --data-dir: train/<class>/ and test/<class>/,
                              or <class>/ (a fifth is kept for testing), or without labels

plumbing/ reads a folder's layout and its files. Every random draw is a function of (seed, step).
"""

import hashlib
import itertools
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from plumbing import folders, image_ops
from plumbing.command_line import UserError
from plumbing.files import Dataset, decode_all
from plumbing.image_ops import coin, uniform

DATASETS = ("shapes", "shapes-textured", *folders.DOWNLOADS, "folder")


def load(
    name: str, data_dir="data", size=24, subset=0, holdout=0, cache_gb=4.0, workers=2, cache_dir="", fit="crop"
) -> Dataset:
    """A dataset by name, ready to train on.

    size is the side of the views in pixels; large images are reduced to a little more. subset keeps
    that many training images (0: all). holdout takes that many others as the test set, to choose
    settings without the real one; both are the same images for every seed. Decoded images stay in
    memory up to cache_gb, then `workers` processes read them from disk; cache_dir keeps a folder's
    for the next start ("": not kept). fit: crop or pad. Raises UserError, naming option or file.
    """
    if name in ("shapes", "shapes-textured"):
        train, test = (folders.drawn(n, seed, name == "shapes-textured") for n, seed in ((10_000, 0), (2_000, 1)))
        dataset = Dataset(train, train, test, folders.SHAPES)
    elif name in folders.DOWNLOADS:
        dataset = folders.download(name, Path(data_dir))
    elif name == "folder":
        dataset = folders.folder(Path(data_dir))
    else:
        raise UserError(f"--dataset: unknown {name!r}, choose from {', '.join(DATASETS)}")
    dataset = folders.split(dataset, subset, holdout, Path(data_dir))
    if dataset.train.pixels is None:
        dataset = decode_all(dataset, size, cache_gb, workers, cache_dir, fit)
    return dataset


def seed_of(*numbers) -> int:
    """A seed that depends on all numbers, in 32 bits: torch's CPU generator uses no more."""
    return int.from_bytes(hashlib.blake2s(repr(numbers).encode(), digest_size=4).digest(), "big")


def shuffled(images: Tensor, *numbers) -> Tensor:
    """The images (W,) in a random order that follows from the numbers."""
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed_of(*numbers)))]


def windows(count: int, size: int, visits: int, seed: int, start: int = 0):
    """Yields (number, images in the window (W,), images that enter) from pass `start` on.

    All N images stand in a random order. The window of W = size images slides along it by W /
    visits images after each pass. So an image has at least `visits` passes, fewer if it is one of
    the first window (PIC's sliding window, arXiv 2006.14618). At the end of the order both its
    halves are shuffled anew, so that no image is in the window twice; where N < 2 W, the order
    stays. With W = N (or size 0) all images enter in pass 0 and stay: the paper.
    """
    size = min(size, count) or count
    stride = max(1, size // visits) if size < count else 0
    order = shuffled(torch.arange(count), seed, "order") if stride else torch.arange(count)
    stream, begin = order, 0
    for number in itertools.count():
        if begin + size > len(stream):
            if count >= 2 * size:
                order = torch.cat([shuffled(half, seed, "order", number) for half in order.tensor_split(2)])
            stream, begin = torch.cat([stream[begin:], order]), 0
        images = stream[begin : begin + size]
        if number >= start:
            yield number, images, images[size - stride :] if number else images
        begin += stride


@dataclass
class Batch:
    """What a step trains on: one row per view.

    views is (B, 3, H, W). index (B,) is each view's image. images (I,) is index without repeats.
    weight (B,) is how much each view counts (None: all alike). After CutMix, share[i] of view i
    shows its own image, and the other area shows the image of view partner[i]; both are (B,).
    """

    views: Tensor
    index: Tensor
    images: Tensor | None = None
    weight: Tensor | None = None
    partner: Tensor | None = None
    share: Tensor | None = None

    def __post_init__(self):
        if self.images is None:
            self.images = self.index

    def target(self, own: Tensor, columns: int) -> Tensor:
        """NCE's target: own (B,), the own rows' columns, or after CutMix shares (B, columns)."""
        if self.partner is None:
            return own
        shares = self.share.new_zeros(len(own), columns)  # (B, M)
        shares.scatter_add_(1, own[:, None], self.share[:, None])
        return shares.scatter_add_(1, own[self.partner][:, None], 1 - self.share[:, None])


@dataclass
class Augment:
    """uint8 (B, 3, S, S) -> one normalised float view per image (B, 3, size, size), channels_last.

    scale and ratio are the ranges of area and aspect of a RandomResizedCrop. jitter is the strength
    of (brightness, contrast, saturation, hue), applied with probability jitter_p. blur_sigma is in
    output pixels. Every image draws its own parameters from torch's default generators. Defaults:
    the released code's CIFAR settings at our default size.
    """

    size: int = 24
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    jitter_p: float = 0.8
    gray_p: float = 0.2
    blur_p: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize_p: float = 0.0
    flip_p: float = 0.5

    def __call__(self, pixels: Tensor) -> Tensor:
        x = pixels.float() / 255  # (B, 3, S, S)
        box = image_ops.random_crop(len(x), x.shape[-1], self.scale, self.ratio, x.device)
        x = image_ops.resized_crop(x, *box, self.size, flip=coin(x, self.flip_p))  # (B, 3, size, size)
        x = self.color_jitter(x)
        x = torch.lerp(x, image_ops.rgb_to_grayscale(x), coin(x, self.gray_p).float()[:, None, None, None])
        if self.blur_p > 0:
            sigma = uniform(x, *self.blur_sigma)
            blurred = image_ops.gaussian_blur(x, sigma, self.blur_sigma[1])
            x = torch.where(coin(x, self.blur_p)[:, None, None, None], blurred, x)
        if self.solarize_p > 0:
            x = torch.where(coin(x, self.solarize_p)[:, None, None, None], image_ops.solarize(x), x)
        return image_ops.normalize(x)

    def color_jitter(self, x: Tensor) -> Tensor:
        """Four adjustments, each image with its own strengths; the batch shares their order."""
        on = coin(x, self.jitter_p).float()  # (B,) an image that is left out gets the neutral strength
        adjust = (
            image_ops.adjust_brightness, image_ops.adjust_contrast, image_ops.adjust_saturation, image_ops.adjust_hue,
        )  # fmt: skip
        for k in torch.randperm(4).tolist():
            strength = on * uniform(x, -self.jitter[k], self.jitter[k])
            if self.jitter[k] > 0:
                x = adjust[k](x, strength if k == 3 else 1 + strength)
        return x


def cutmix(batch: Batch, alpha: float) -> Batch:
    """Paste a box of another view of the batch into each view (CutMix, arXiv 1905.04899).

    Beta(alpha, alpha) draws the shares of the area, and the larger of share and 1 - share stays the
    image's own, as in the released code. So share is at least about 1/2 (boxes are whole pixels),
    and target_ij = share_i [j = y_i] + (1 - share_i) [j = y_partner(i)].
    """
    views = batch.views  # (B, 3, H, W)
    share = torch.distributions.Beta(alpha, alpha).sample((len(views),)).to(views.device, non_blocking=True)  # (B,)
    share = torch.maximum(share, 1 - share)
    partner = torch.randperm(len(views), device=views.device)
    box = image_ops.random_box(views, 1 - share)  # (B, 1, H, W)
    mixed = torch.where(box, views[partner], views).contiguous(memory_format=torch.channels_last)
    return replace(batch, views=mixed, partner=partner, share=1 - box.float().mean((1, 2, 3)))
