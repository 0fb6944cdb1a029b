"""Batched operations on images on any device: crop, resize, flip, blur and colour.

Every operation takes its parameters as tensors with one value per image. A test compares each with
torchvision's function of the same name on equal parameters (tests/test_augment.py). A crop, its
resize and the flip are two small matrix products, one for rows and one for columns: exact,
antialiased, and fast on a CPU. Randomness comes from torch's default generators.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # CIFAR-10's, as in the released code
GRAY = (0.2989, 0.587, 0.114)  # torchvision's luma


def whole_image(pixels: Tensor, size: int) -> Tensor:
    """The view for evaluation: the whole image at `size`, normalised.

    uint8 (B, 3, S, S) -> (B, 3, size, size)
    """
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
    """Made once: copying Python numbers to a GPU makes the host wait for it."""
    return torch.tensor(values, device=device, dtype=dtype)


def uniform(like: Tensor, low: float, high: float) -> Tensor:
    """A number in [low, high) for each image of like (B, …): (B,)."""
    return low + (high - low) * torch.rand(len(like), device=like.device)


def coin(like: Tensor, p: float) -> Tensor:
    """True with probability p for each image of like (B, …): (B,)."""
    return torch.rand(len(like), device=like.device) < p


# ----------------------------------------------------------------------------------------- geometry


def random_crop(batch: int, side: int, scale, ratio, device="cpu", tries: int = 10):
    """RandomResizedCrop's boxes for square images: (top, left, height, width), each (B,).

    Boxes are whole pixels, as floats.

    As in torchvision, area and aspect are drawn until the box fits in the image. All `tries` are
    drawn at once, and the first that fits is taken. If none does, the box is the whole image.
    """
    area = side * side * (scale[0] + (scale[1] - scale[0]) * torch.rand(batch, tries, device=device))
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = (low + (high - low) * torch.rand(batch, tries, device=device)).exp()
    width, height = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()  # (B, tries)
    fits = (width >= 1) & (width <= side) & (height >= 1) & (height <= side)
    first = fits.float().argmax(1, keepdim=True)  # (B, 1)
    any_fits = fits.any(1)
    width = width.gather(1, first)[:, 0].masked_fill(~any_fits, side)  # (B,)
    height = height.gather(1, first)[:, 0].masked_fill(~any_fits, side)
    top = (torch.rand(batch, device=device) * (side - height + 1)).floor()
    left = (torch.rand(batch, device=device) * (side - width + 1)).floor()
    return top, left, height, width


def random_box(like: Tensor, area: Tensor) -> Tensor:
    """Masks (B, 1, H, W) of a box inside each image of like (B, 3, H, W), with its shape and place.

    area (B,) is the box's share of the image; it holds up to rounding to whole pixels.
    """
    height, width = like.shape[2:]
    box_h, box_w = ((side * area.sqrt()).round() for side in (height, width))  # (B,)
    top = (uniform(like, 0, 1) * (height - box_h + 1)).floor()
    left = (uniform(like, 0, 1) * (width - box_w + 1)).floor()
    y, x = torch.arange(height, device=like.device), torch.arange(width, device=like.device)
    in_rows = (y >= top[:, None]) & (y < (top + box_h)[:, None])  # (B, H)
    in_columns = (x >= left[:, None]) & (x < (left + box_w)[:, None])  # (B, W)
    return (in_rows[:, :, None] & in_columns[:, None, :])[:, None]


def resized_crop(x: Tensor, top, left, height, width, size: int, flip: Tensor | None = None) -> Tensor:
    """Crop each image to its own box and resize it, bilinear and antialiased.

    (B, 3, S, S) -> (B, 3, size, size); flip (B,) says which images to mirror.
    """
    batch, _, side, _ = x.shape
    both = _resize_matrix(torch.cat([top, left]), torch.cat([height, width]), side, size)
    rows, columns = both.chunk(2)  # (B, size, S)
    if flip is not None:  # a mirrored image is one whose columns are read backwards
        columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    x = rows @ x.transpose(1, 2).reshape(batch, side, 3 * side)  # (B, size, 3 S): the channels side by side
    x = x.view(batch, size * 3, side) @ columns.transpose(1, 2)  # (B, size 3, size)
    return x.view(batch, size, 3, size).transpose(1, 2).contiguous()  # (B, 3, size, size)


def _resize_matrix(start: Tensor, length: Tensor, source: int, size: int) -> Tensor:
    """(B, size, source): the weight of each source pixel of the box in each output pixel."""
    scale = length / size  # (B,) source pixels an output pixel
    support = scale.clamp(min=1)[:, None, None]  # shrinking widens the triangle: that is the antialiasing
    centre = start[:, None] + (torch.arange(size, device=start.device) + 0.5) * scale[:, None]  # (B, size)
    pixel = torch.arange(source, device=start.device) + 0.5  # (source,)
    weight = (pixel - centre[:, :, None]).abs_().div_(support).neg_().add_(1).clamp_(min=0)  # (B, size, source)
    inside = (pixel > start[:, None]) & (pixel < (start + length)[:, None])  # (B, source)
    weight.mul_(inside.float()[:, None])
    return weight.div_(weight.sum(2, keepdim=True))


def gaussian_blur(x: Tensor, sigma: Tensor, largest: float | None = None) -> Tensor:
    """Blur each image with its own sigma (B,), reflected at the borders.

    The kernel reaches 3 of the largest sigma.
    """
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


# ------------------------------------------------------------------------------------------- colour
# x (B, 3, H, W) in [0, 1], one factor an image (B,), as in torchvision.transforms.functional.


def rgb_to_grayscale(x: Tensor) -> Tensor:
    red, green, blue = x.unbind(1)
    gray = (GRAY[0] * red).add_(green, alpha=GRAY[1]).add_(blue, alpha=GRAY[2])  # (B, H, W)
    return gray[:, None].expand_as(x)


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor[:, None, None, None]).clamp_(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    # The mean of the grey image is the grey of the mean colour.
    mean = x.flatten(2).mean(2) @ _constant(GRAY, x.device, x.dtype)  # (B,)
    shift = mean * (1 - factor)
    return (x * factor[:, None, None, None]).add_(shift[:, None, None, None]).clamp_(0, 1)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(rgb_to_grayscale(x), x, factor[:, None, None, None]).clamp_(0, 1)


def adjust_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by `shift` (B,) turns in HSV; value and saturation stay."""
    red, green, blue = x.unbind(1)  # (B, H, W)
    value, lowest = x.amax(1), x.amin(1)
    chroma = value - lowest
    per_chroma = chroma.clamp(min=1e-12).reciprocal_()
    sector = torch.where(value == green, ((blue - red) * per_chroma).add_(2), ((red - green) * per_chroma).add_(4))
    sector = torch.where(value == red, (green - blue) * per_chroma, sector)  # the hue in sixths of a turn
    sector.add_(6 * shift[:, None, None])
    sector.sub_((sector / 6).floor_().mul_(6))  # [0, 6)
    # A channel is at `value` for a third of the turn, at `lowest` for a third, else on a ramp.
    ramps = (sector - 3).abs_().sub_(1), (sector - 2).abs_().neg_().add_(2), (sector - 4).abs_().neg_().add_(2)
    out = torch.empty_like(x)
    for channel, ramp in zip(out.unbind(1), ramps):  # red, green, blue
        torch.addcmul(lowest, chroma, ramp.clamp_(0, 1), out=channel)
    return out


def solarize(x: Tensor, threshold: float = 0.5) -> Tensor:
    """Invert what is as bright as the threshold or brighter."""
    return torch.where(x >= threshold, 1 - x, x)
