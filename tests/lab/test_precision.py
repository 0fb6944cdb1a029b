"""torchmetrics gives the average precision that the code before it gave, on random detections."""

import precision_before as before
import pytest
import torch

from lab.detection import coco_metric, score


def boxes(generator, count, low, high):
    corner = low + (high - low - 10) * torch.rand(count, 2, generator=generator)
    return torch.cat([corner, corner + 4 + 6 * torch.rand(count, 2, generator=generator)], 1)


def masks(rows):
    y, x = torch.meshgrid(torch.arange(48), torch.arange(48), indexing="ij")
    x0, y0, x1, y1 = rows[:, :, None, None].unbind(1)
    return (x >= x0) & (x < x1) & (y >= y0) & (y < y1)


def scene(seed, ties, most):
    """At most three objects that share no pixel, as in drawn scenes, and detections around them."""
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(0, most + 1, (1,), generator=generator))
    rows = torch.cat([boxes(generator, 1, 16 * i, 16 * i + 16) for i in range(count)] or [torch.zeros(0, 4)])
    labels = torch.randint(1, 4, (count,), generator=generator)
    near = rows.repeat(3, 1) + torch.randn(3 * count, 4, generator=generator)
    detected = torch.cat([near, boxes(generator, seed % 4, 0, 48)])
    guesses = torch.randint(1, 4, (len(detected),), generator=generator)
    right = torch.rand(3 * count, generator=generator) < 0.8
    guesses[: 3 * count] = torch.where(right, labels.repeat(3), guesses[: 3 * count])
    scores = torch.rand(len(detected), generator=generator)
    scores = (5 * scores).round() / 5 if ties else scores
    crowd = torch.zeros(count, dtype=torch.bool)
    return (
        {"boxes": detected, "labels": guesses, "scores": scores, "masks": masks(detected)},
        {"boxes": rows, "labels": labels, "crowd": crowd, "masks": masks(rows).byte()},
    )


@pytest.mark.parametrize("most", [0, 3])
@pytest.mark.parametrize("ties", [False, True])
def test_equal_on_random_detections(ties, most):
    pairs = [scene(seed, ties, most) for seed in range(60)]
    assert score(pairs, coco_metric("segmentation")) == pytest.approx(before.score(pairs, 3), abs=1e-6)
