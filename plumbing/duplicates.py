"""Pictures that a folder holds twice or nearly so, for instance in another size or compression.

Two pictures are near-duplicates if their features are nearly parallel and their pixels nearly
equal. Features alone call two different shoes alike, pixels alone two dark pictures.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from plumbing.files import Images

COSINE = 0.95  # of the features, at least
DIFFERENCE = 0.05  # of the pixels at 32 px, at most: root mean square, as a share of their range
NEAREST = 10  # of these of each picture the pixels are compared
BLOCK = 500  # pictures at a time


def near_duplicates(features: Tensor, pixels: Tensor) -> list[tuple[int, int, float, float]]:
    """(i, j, cosine, difference) of the near-duplicates, i < j, most alike first.

    features are (N, F), pixels (N, P) in [0, 1]. Of each picture, the ten with the nearest features
    are compared.
    """
    features, pairs = F.normalize(features, dim=1), {}
    for start in range(0, len(features), BLOCK):
        rows = features[start : start + BLOCK]  # (b, F)
        cosines = rows @ features.T  # (b, N)
        cosines[torch.arange(len(rows)), start + torch.arange(len(rows))] = -2  # not of itself
        nearest, index = cosines.topk(min(NEAREST, len(features)))  # (b, k)
        differences = (pixels[start : start + BLOCK, None] - pixels[index]).square().mean(2).sqrt()  # (b, k)
        for row, column in ((nearest >= COSINE) & (differences <= DIFFERENCE)).nonzero().tolist():
            i, j = sorted((start + row, index[row, column].item()))
            pairs[i, j] = nearest[row, column].item(), differences[row, column].item()
    return sorted(((*pair, *values) for pair, values in pairs.items()), key=lambda row: (row[3], row[:2]))


def thumbnails(images: Images) -> Tensor:
    """All images averaged to 32 px, (N, 3072) in [0, 1]."""
    batches = images.batches(torch.arange(len(images)), BLOCK, torch.device("cpu"))
    return torch.cat([F.adaptive_avg_pool2d(pixels.cpu().float() / 255, 32).flatten(1) for pixels, _ in batches])


def lines(pairs: list[tuple[int, int, float, float]], names: list[str], most: int = 20) -> list[str]:
    """What is said of the pairs: how many there are, by which bounds, and the first of them."""
    bounds = f"cosine of features at least {COSINE:g}, pixels at 32 px that differ by at most {DIFFERENCE:.0%}"
    if not pairs:
        return [f"near-duplicates among {len(names)} pictures: none ({bounds})"]
    said = [f"near-duplicates among {len(names)} pictures: {len(pairs)} pairs ({bounds})"]
    said += [f"  {names[i]} = {names[j]} (cosine {a:.3f}, {b:.1%})" for i, j, a, b in pairs[:most]]
    return said + ["  …"] * (len(pairs) > most)
