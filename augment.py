"""Batched augmentation: a whole batch of uint8 images becomes views in a few tensor operations, on any device.

Every image draws its own parameters. Each operation takes them as tensors, one value an image, so it can be compared
with torchvision's functional of the same name on equal parameters (`tests/test_augment.py`). A crop, its resize and the
flip are two small matrix products, one for rows and one for columns: fast on a CPU, exact, and antialiased.

All randomness comes from torch's default generators, which `train.py` seeds before every step.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # CIFAR-10's, as in the released code
GRAY = (0.2989, 0.587, 0.114)  # torchvision's luma


@dataclass
class Augment:
    """uint8 (B, 3, S, S) -> one normalised float view of each image (B, 3, size, size), channels_last.

    scale and ratio are RandomResizedCrop's ranges of area and aspect; jitter is (brightness, contrast, saturation, hue)
    applied with probability jitter_p; blur_sigma is in output pixels. Defaults: the released code's CIFAR settings.
    """

    size: int = 32
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
        x = pixels.float().div_(255)  # (B, 3, S, S)
        top, left, height, width = random_crop(len(x), x.shape[-1], self.scale, self.ratio, x.device)
        x = resized_crop(x, top, left, height, width, self.size, flip=_coin(x, self.flip_p))  # (B, 3, size, size)
        x = self.color_jitter(x)
        x = torch.lerp(x, rgb_to_grayscale(x), _coin(x, self.gray_p).float()[:, None, None, None])
        if self.blur_p > 0:
            sigma = _uniform(x, *self.blur_sigma)
            largest = None if x.device.type == "cpu" else self.blur_sigma[1]  # to look for it, a GPU would wait
            x = torch.where(_coin(x, self.blur_p)[:, None, None, None], gaussian_blur(x, sigma, largest), x)
        if self.solarize_p > 0:
            x = torch.where(_coin(x, self.solarize_p)[:, None, None, None], solarize(x), x)
        return normalize(x)

    def color_jitter(self, x: Tensor) -> Tensor:
        """The four adjustments with every image's own strengths; their order is drawn once for the batch."""
        on = _coin(x, self.jitter_p).float()  # (B,) an image left out gets the neutral strength
        operations = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
        for k in torch.randperm(4).tolist():
            strength = on * _uniform(x, -self.jitter[k], self.jitter[k])
            if self.jitter[k] > 0:
                x = operations[k](x, strength if k == 3 else 1 + strength)
        return x


def plain(pixels: Tensor, size: int) -> Tensor:
    """The view used for evaluation: the whole image at `size`, normalised. uint8 (B, 3, S, S) -> (B, 3, size, size)."""
    x = pixels.float() / 255
    if x.shape[-1] != size:
        zero = torch.zeros(len(x), device=x.device)
        x = resized_crop(x, zero, zero, zero + x.shape[-1], zero + x.shape[-1], size)
    return normalize(x)


def normalize(x: Tensor) -> Tensor:
    mean, std = (_constant(values, x.device, x.dtype)[:, None, None] for values in (MEAN, STD))  # (3, 1, 1)
    return (x - mean).div_(std).contiguous(memory_format=torch.channels_last)


@lru_cache
def _constant(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Made once, since to copy Python's numbers to a GPU is to wait for it."""
    return torch.tensor(values, device=device, dtype=dtype)


def _uniform(like: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * torch.rand(len(like), device=like.device)  # (B,)


def _coin(like: Tensor, p: float) -> Tensor:
    return torch.rand(len(like), device=like.device) < p  # (B,)


# ----------------------------------------------------------------------------------------------------------- geometry


def random_crop(batch: int, side: int, scale, ratio, device="cpu", tries: int = 10):
    """RandomResizedCrop's boxes for square images: (top, left, height, width), each (B,), whole pixels as floats.

    As in torchvision, area and aspect are drawn until the box fits in the image; all `tries` are drawn at once and the
    first that fits is taken. If none does, the box is the whole image.
    """
    area = side * side * (scale[0] + (scale[1] - scale[0]) * torch.rand(batch, tries, device=device))
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = (low + (high - low) * torch.rand(batch, tries, device=device)).exp()
    width, height = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()  # (B, tries)
    fits = (width >= 1) & (width <= side) & (height >= 1) & (height <= side)
    first = fits.float().argmax(1, keepdim=True)  # (B, 1)
    found = fits.any(1)
    width = width.gather(1, first)[:, 0].masked_fill(~found, side)  # (B,)
    height = height.gather(1, first)[:, 0].masked_fill(~found, side)
    top = (torch.rand(batch, device=device) * (side - height + 1)).floor()
    left = (torch.rand(batch, device=device) * (side - width + 1)).floor()
    return top, left, height, width


def resized_crop(x: Tensor, top, left, height, width, size: int, flip: Tensor | None = None) -> Tensor:
    """Crop each image to its own box and resize it, bilinear and antialiased: (B, 3, S, S) -> (B, 3, size, size)."""
    batch, _, side, _ = x.shape
    both = _resize_matrix(torch.cat([top, left]), torch.cat([height, width]), side, size)
    rows, columns = both.chunk(2)  # (B, size, S)
    if flip is not None:  # a mirrored image is one whose columns are read backwards
        columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    x = rows @ x.transpose(1, 2).reshape(batch, side, 3 * side)  # (B, size, 3 S): the channels side by side
    x = x.view(batch, size * 3, side) @ columns.transpose(1, 2)  # (B, size 3, size)
    return x.view(batch, size, 3, size).transpose(1, 2).contiguous()  # (B, 3, size, size)


def _resize_matrix(start: Tensor, length: Tensor, source: int, size: int) -> Tensor:
    """(B, size, source): how much each source pixel of [start, start + length) gives to each output pixel."""
    scale = length / size  # (B,) source pixels an output pixel
    support = scale.clamp(min=1)[:, None, None]  # shrinking widens the triangle: that is the antialiasing
    centre = start[:, None] + (torch.arange(size, device=start.device) + 0.5) * scale[:, None]  # (B, size)
    pixel = torch.arange(source, device=start.device) + 0.5  # (source,)
    weight = (pixel - centre[:, :, None]).abs_().div_(support).neg_().add_(1).clamp_(min=0)  # (B, size, source)
    inside = (pixel > start[:, None]) & (pixel < (start + length)[:, None])  # (B, source)
    weight.mul_(inside.float()[:, None])
    return weight.div_(weight.sum(2, keepdim=True))


def gaussian_blur(x: Tensor, sigma: Tensor, largest: float | None = None) -> Tensor:
    """Blur each image with its own sigma (B,), reflecting at the borders; the kernel reaches 3 of the largest sigma."""
    side = x.shape[-1]
    reach = min(side - 1, math.ceil(3 * (largest or float(sigma.max()))))
    offset = torch.arange(-reach, reach + 1, device=x.device)  # (R,)
    kernel = (-0.5 * (offset / sigma[:, None]) ** 2).exp()  # (B, R)
    kernel = kernel / kernel.sum(1, keepdim=True)
    source = (torch.arange(side, device=x.device)[:, None] + offset).abs()  # (S, R) reflected at the first pixel
    source = side - 1 - (side - 1 - source).abs()  # ... and at the last
    matrix = x.new_zeros(len(x), side, side)
    matrix.scatter_add_(2, source.expand(len(x), -1, -1), kernel[:, None].expand(-1, side, -1).to(x.dtype))
    return matrix[:, None] @ x @ matrix.transpose(1, 2)[:, None]


# -------------------------------------------------------------------------------------------------------------- colour
# x (B, 3, H, W) in [0, 1], one factor an image (B,), as in torchvision.transforms.functional.


def rgb_to_grayscale(x: Tensor) -> Tensor:
    red, green, blue = x.unbind(1)
    gray = (GRAY[0] * red).add_(green, alpha=GRAY[1]).add_(blue, alpha=GRAY[2])  # (B, H, W)
    return gray[:, None].expand_as(x)


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor[:, None, None, None]).clamp_(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    mean = x.flatten(2).mean(2) @ _constant(
        GRAY, x.device, x.dtype
    )  # (B,) the mean of the grey image is the grey of the mean
    shift = mean * (1 - factor)
    return (x * factor[:, None, None, None]).add_(shift[:, None, None, None]).clamp_(0, 1)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(rgb_to_grayscale(x), x, factor[:, None, None, None]).clamp_(0, 1)


def adjust_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by `shift` (B,) turns in HSV: value and saturation stay, so only (max, min) and the angle matter."""
    red, green, blue = x.unbind(1)  # (B, H, W)
    value, lowest = x.amax(1), x.amin(1)
    chroma = value - lowest
    per_chroma = chroma.clamp(min=1e-12).reciprocal_()
    after_red, after_green, after_blue = (
        (green - blue) * per_chroma,
        (blue - red) * per_chroma,
        (red - green) * per_chroma,
    )
    sector = torch.where(value == green, after_green.add_(2), after_blue.add_(4))
    sector = torch.where(value == red, after_red, sector).add_(6 * shift[:, None, None])  # the hue in sixths of a turn
    sector.sub_((sector / 6).floor_().mul_(6))  # [0, 6)
    # A channel is at `value` for a third of the turn, at `lowest` for a third, and on a ramp between the two.
    ramps = (sector - 3).abs_().sub_(1), (sector - 2).abs_().neg_().add_(2), (sector - 4).abs_().neg_().add_(2)
    out = torch.empty_like(x)
    for channel, ramp in zip(out.unbind(1), ramps):  # red, green, blue
        torch.addcmul(lowest, chroma, ramp.clamp_(0, 1), out=channel)
    return out


def solarize(x: Tensor, threshold: float = 0.5) -> Tensor:
    """Invert what is as bright as the threshold or brighter."""
    return torch.where(x >= threshold, 1 - x, x)


# -------------------------------------------------------------------------------------------------------------- CutMix


def cutmix(views: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """Paste a box of another view of the batch into each view (CutMix, arXiv 1905.04899; released code).

    Returns the mixed views (B, 3, H, W), partner (B,) long and weight (B,), the share of the area that is the image's
    own: target_i = weight_i [y_i] + (1 - weight_i) [y_partner(i)]. Beta(alpha, alpha) draws the share, and the larger
    of share and 1 - share stays the image's own, so weight is at least about 1/2 (boxes are whole pixels).
    """
    batch, _, height, width = views.shape
    share = torch.distributions.Beta(alpha, alpha).sample((batch,)).to(views.device, non_blocking=True)  # (B,)
    share = torch.maximum(share, 1 - share)
    partner = torch.randperm(batch, device=views.device)
    # a box that lies inside the image, so that its area is what was drawn up to rounding
    box_h = (height * (1 - share).sqrt()).round()
    box_w = (width * (1 - share).sqrt()).round()
    top = (_uniform(views, 0, 1) * (height - box_h + 1)).floor()
    left = (_uniform(views, 0, 1) * (width - box_w + 1)).floor()
    y, x = torch.arange(height, device=views.device), torch.arange(width, device=views.device)
    in_rows = (y >= top[:, None]) & (y < (top + box_h)[:, None])  # (B, H)
    in_columns = (x >= left[:, None]) & (x < (left + box_w)[:, None])  # (B, W)
    box = (in_rows[:, :, None] & in_columns[:, None, :])[:, None]  # (B, 1, H, W)
    mixed = torch.where(box, views[partner], views).contiguous(memory_format=torch.channels_last)
    return mixed, partner, 1 - box_h * box_w / (height * width)
