"""Features of whole images: those of a frozen backbone, and raw pixels as a control."""

import torch
from torch import Tensor, nn
from tqdm import tqdm

from plumbing.files import Images
from plumbing.image_ops import MEAN, STD, whole_image


@torch.no_grad()
def extract(encoder, images: Images, size: int, device, quiet: bool = True) -> Tensor:
    """Frozen features (N, F) float32 on the CPU: the backbone evaluated on whole images."""
    was_training = encoder.training
    encoder.eval()
    features = []
    with tqdm(total=len(images), desc="features", unit=" images", unit_scale=True, leave=False, disable=quiet) as bar:
        for pixels, index in images.batches(torch.arange(len(images)), 500, device):
            features.append(encoder.features(whole_image(pixels, size)).cpu())  # (B, F)
            bar.update(len(index))
    encoder.train(was_training)
    return torch.cat(features)


def raw_pixels(images: Images, size: int) -> Tensor:
    """The control without a network: normalised pixels, at most 32 per side, flat (N, F)."""
    size, batches = min(size, 32), images.batches(torch.arange(len(images)), 500, torch.device("cpu"))
    return torch.cat([whole_image(pixels.cpu(), size).flatten(1) for pixels, _ in batches])


@torch.no_grad()
def settle_batchnorm(encoder, images: Images, size: int, device, count: int = 2000) -> None:
    """Give an untrained encoder's BatchNorm layers the statistics of the images: a fair control."""
    norms = [m for m in encoder.backbone.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average over the batches
    encoder.train()
    for pixels, _ in images.batches(random_images(images, count), 250, device):
        encoder.features(whole_image(pixels, size))
    encoder.eval()
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum


def random_images(images: Images, count: int) -> Tensor:
    """Numbers of at most `count` random images, always the same: folders list class after class."""
    return torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]


def eval_side(config: dict, images: Images) -> int:
    """The side of images in evaluation: the run's --eval-size, or their own, 1 to 4/3 of --size.

    A crop shows things larger than the whole image does; somewhat larger images in evaluation make
    up for it (FixRes, arXiv 1906.06423). A vision transformer knows one side only.
    """
    size = config["size"]
    if config["eval_size"] or config["arch"].startswith("vit"):
        return config["eval_size"] or size
    return min(max(images.side, size), round(size * 4 / 3))


def preprocessing(config: dict) -> str:
    """What an exported backbone wants its images to be, in a sentence."""
    side = config["eval_size"] or round(config["size"] * 4 / 3)
    return f"Its images: RGB in [0, 1], {side} pixels a side, minus mean {MEAN}, over std {STD}."
