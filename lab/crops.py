"""View sampling, --views: how many crops of an image a step sees, and how much each counts.

    single     one crop, as in arXiv 2404.19289
    twice      two of the same kind: what a second look at every image brings
    multicrop  2 global crops of scale .14 to 1, 6 local crops of .05 to .14 at 96/224 of the size;
               every crop, and every pair of crops, counts alike (SwAV, arXiv 2006.09882)
    sslight    2 global crops of scale .3 to 1, 6 local crops of .05 to .3 at 128/224 of the size;
               global crops, or pairs of them, have .4 of the weight (SSLight, arXiv 2210.02808)

Solarisation: multicrop and sslight solarise the second global crop with probability .2, whatever
the size. Blur: only if --size is above 64 pixels do they blur, the first global crop always, the
second with probability .1, local crops with .5. Up to 64 pixels they do not blur, as is usual on
CIFAR: a blur leaves little to see. A --blur that is not 0 replaces these probabilities of a blur,
whatever the size.

A crop is a row of the batch that counts less: `Crops` repeats the images' indices, crop after crop,
and gives every row its weight. Losses are weighted means and the bank's update is linear in z, so
nothing else changes.
"""

from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor, nn

from data import Augment, Batch
from lab.backbones import patch_of
from models import SMALL

# Global crops, local crops, their ranges of scale, a local crop's share of the side, the global
# crops' share of the weight.
SAMPLINGS = {
    "multicrop": (2, 6, (0.14, 1.0), (0.05, 0.14), 96 / 224, None),
    "sslight": (2, 6, (0.3, 1.0), (0.05, 0.3), 128 / 224, 0.4),
}
VIEWS = ("single", "twice", *SAMPLINGS)


@dataclass
class Crop:
    """One of the crops of every image and its weight; the weights of an image's crops sum to 1."""

    augment: Augment
    weight: float = 1.0
    local: bool = False


def crops(config) -> list[Crop]:
    """The crops that config's --views asks for, global ones first."""
    jitter = (config.jitter, config.jitter, config.jitter, config.jitter / 4)
    single = Augment(
        config.size, (config.crop_min, 1.0), jitter=jitter, jitter_p=config.jitter_p, gray_p=config.gray,
        blur_p=config.blur,
    )  # fmt: skip
    if config.views not in SAMPLINGS:
        count = 2 if config.views == "twice" else 1
        return [Crop(single, 1 / count) for _ in range(count)]
    globals_, locals_, wide, narrow, share, weight = SAMPLINGS[config.views]
    unit = patch_of(config.size) if config.arch == "vit_tiny" else 2
    small = max(1, round(config.size * share / unit)) * unit

    def augment(blur_p: float, **options) -> Augment:
        return replace(single, blur_p=config.blur or (blur_p if config.size > SMALL else 0.0), **options)

    kinds = [augment((1.0, 0.1)[i], scale=wide, solarize_p=(0.0, 0.2)[i]) for i in range(globals_)]
    kinds += [augment(0.5, scale=narrow, size=small)] * locals_
    is_local = [False] * globals_ + [True] * locals_
    return [Crop(*each) for each in zip(kinds, shared(is_local, weight), is_local)]


def shared(local: list[bool], share: float | None) -> list[float]:
    """Weights that sum to 1: all alike (None), or `share` for those that are not local together."""
    if share is None:
        return [1 / len(local) for _ in local]
    return [(1 - share) / sum(local) if far else share / (len(local) - sum(local)) for far in local]


def pairs(config) -> dict[tuple[int, int], float]:
    """The weights of a two-branch method's pairs (crop, global crop); their sum is 1.

    A pair compares a crop with a global crop. If all pairs count alike, local crops have 6/7 of the
    weight: 12 of 14 pairs.
    """
    chosen = crops(config)
    wanted = [(i, j) for i in range(len(chosen)) for j, other in enumerate(chosen) if i != j and not other.local]
    share = SAMPLINGS[config.views][-1] if config.views in SAMPLINGS else None
    return dict(zip(wanted, shared([chosen[i].local for i, _ in wanted], share)))


def through(network, views: list[Tensor]) -> Tensor:
    """The network's outputs (V B, D) for V views (B, 3, H, W), view after view; one pass per size.

    So BatchNorm sees crops of one size together, and crops of another size separately.
    """
    if len(views) == 1:
        return network(views[0])
    groups = (list(group) for _, group in groupby(views, key=lambda view: view.shape[-1]))
    return torch.cat([network(torch.cat(group)) for group in groups])


class OnePassPerSize(nn.Module):
    """A network that takes a list of V views (B, 3, H, W) and gives (V B, D)."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, views: list[Tensor]) -> Tensor:
        return through(self.network, views)


class Crops:
    """For `train.Pretraining`: a step sees several crops of every image."""

    def __init__(self, config, count: int, device: torch.device, **options):
        super().__init__(config, count, device, **options)
        self.crops = crops(config)
        self.augment = self.crops[0].augment  # for the bank's first pass
        self.network = OnePassPerSize(self.network)
        # Made once: a copy of Python's numbers makes a GPU wait.
        self.crop_weights = torch.tensor([crop.weight for crop in self.crops], device=device)  # (V,)

    def look(self, pixels: Tensor, index: Tensor) -> Batch:
        views = [crop.augment(pixels) for crop in self.crops]  # V of (B, 3, H, W)
        weight = self.crop_weights.repeat_interleave(len(index))  # (V B,)
        return Batch(views, index.repeat(len(views)), images=index, weight=weight)
