"""View sampling, --views: how many crops of an image a step sees, at what scale and size, how altered, of what weight.

    single     one crop, as in arXiv 2404.19289
    twice      two of the same kind: what a second look at every image brings
    multicrop  2 global crops of scale .14 to 1 and 6 local ones of .05 to .14 at 96/224 of their size (SwAV, arXiv
               2006.09882); every crop, and every pair of crops of a two-branch method, has the same weight
    sslight    2 global crops of scale .3 to 1 and 6 local ones of .05 to .3 at 128/224 of their size; the global ones, or
               the pairs of them, have .4 of the weight, and the local ones .6 (SSLight, arXiv 2210.02808)

The last two blur the first global crop with probability 1, the second with .1 and local ones with .5, and solarise the second
with .2. On images of up to 64 pixels, where a blur leaves little to see, they do not, as is usual on CIFAR; --blur, if it
is not 0, is everybody's probability at any size.
"""

from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from augment import Augment
from config import Config
from models import SMALL, patch_of

# global crops, local crops, their ranges of scale, a local crop's share of the side, the global crops' share of the weight
RECIPES = {
    "multicrop": (2, 6, (0.14, 1.0), (0.05, 0.14), 96 / 224, None),
    "sslight": (2, 6, (0.3, 1.0), (0.05, 0.3), 128 / 224, 0.4),
}


@dataclass
class Crop:
    """One of the crops of every image: how it is made, and its weight; those of an image's crops sum to 1."""

    augment: Augment
    weight: float = 1.0
    local: bool = False


def crops(config: Config) -> list[Crop]:
    """The crops that config's --views asks for, global ones first."""
    plain = Augment(
        config.size, scale=(config.crop_min, 1.0), jitter=config.jitter_strengths(), jitter_p=config.jitter_p,
        gray_p=config.gray, blur_p=config.blur,
    )  # fmt: skip
    if config.views not in RECIPES:
        count = 2 if config.views == "twice" else 1
        return [Crop(plain, 1 / count) for _ in range(count)]
    whole, local, wide, narrow, share, weight = RECIPES[config.views]
    unit = patch_of(config.size) if config.arch == "vit_tiny" else 2
    small = max(1, round(config.size * share / unit)) * unit

    def made(p: float, **options) -> Augment:
        return replace(plain, blur_p=config.blur or (p if config.size > SMALL else 0.0), **options)

    kinds = [made((1.0, 0.1)[i], scale=wide, solarize_p=(0.0, 0.2)[i]) for i in range(whole)]
    kinds += [made(0.5, scale=narrow, size=small)] * local
    is_local = [False] * whole + [True] * local
    return [Crop(*each) for each in zip(kinds, shared(is_local, weight), is_local)]


def shared(local: list[bool], share: float | None) -> list[float]:
    """Weights that sum to 1: the same for all, or `share` among those that are not local and the rest among those that are."""
    if share is None:
        return [1 / len(local) for _ in local]
    return [(1 - share) / sum(local) if far else share / (len(local) - sum(local)) for far in local]


def pairs(config: Config) -> dict[tuple[int, int], float]:
    """The weights of a two-branch method's pairs (crop, global crop that it is compared with); they sum to 1.

    By count a local crop's pairs have 6/7 of the weight: 12 of 14.
    """
    chosen = crops(config)
    found = [(i, j) for i in range(len(chosen)) for j, other in enumerate(chosen) if i != j and not other.local]
    share = RECIPES[config.views][-1] if config.views in RECIPES else None
    return dict(zip(found, shared([chosen[i].local for i, _ in found], share)))


def through(network, views: list[Tensor]) -> Tensor:
    """The network's outputs (V B, D) for V views (B, 3, H, W), one view's below the other's; one forward pass a size.

    BatchNorm therefore sees crops of one size together, and those of another by themselves.
    """
    if len(views) == 1:
        return network(views[0])
    same = (list(some) for _, some in groupby(views, key=lambda view: view.shape[-1]))
    return torch.cat([network(torch.cat(some)) for some in same])
