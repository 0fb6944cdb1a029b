"""Near-duplicates: both bounds count, and what is said of them."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

import data
from plumbing import duplicates, shapes
from plumbing.duplicates import COSINE, DIFFERENCE, lines, near_duplicates, thumbnails
from plumbing.files import Images


def features_at(*angles):
    return torch.tensor([[3 * math.cos(a), 3 * math.sin(a)] for a in angles])


def test_features_and_pixels_both_have_to_be_alike():
    near, far = math.acos(COSINE) * 0.9, math.acos(COSINE) * 1.1
    flat = torch.full((4, 12), 0.5)
    pairs = near_duplicates(features_at(0, near, math.pi, math.pi + far), flat)
    assert [pair[:2] for pair in pairs] == [(0, 1)] and pairs[0][2] == pytest.approx(math.cos(near), abs=1e-5)
    for share, expected in ((0.9, [(0, 1)]), (1.1, [])):
        pixels = flat.clone()
        pixels[1] += share * DIFFERENCE
        assert [pair[:2] for pair in near_duplicates(features_at(0, near, math.pi, math.pi + far), pixels)] == expected


def test_every_pair_is_told_once_and_the_most_alike_first():
    pixels = torch.tensor([0.5, 0.52, 0.505])[:, None].expand(3, 12)
    pairs = near_duplicates(features_at(0, 0.01, 0.02), pixels)
    assert [pair[:2] for pair in pairs] == [(0, 2), (1, 2), (0, 1)]
    assert [pair[3] for pair in pairs] == pytest.approx([0.005, 0.015, 0.02], abs=1e-5)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_one_picture_has_no_duplicate_of_itself(count):
    assert len(near_duplicates(torch.ones(count, 4), torch.ones(count, 12))) == max(0, count - 1)


def test_blocks_change_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(50, 3, generator=generator)
    pixels = torch.rand(50, 12, generator=generator) * 0.1
    whole = near_duplicates(features, pixels)
    monkeypatch.setattr(duplicates, "BLOCK", 7)
    assert [pair[:2] for pair in near_duplicates(features, pixels)] == [pair[:2] for pair in whole] and len(whole) > 5


def test_a_picture_in_another_size_or_compression_is_nearly_equal_and_another_picture_is_not(tmp_path):
    drawn = [
        Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))) for image in shapes.draw(12, 3, size=60)[0]
    ]
    for i, image in enumerate(drawn):
        image.save(tmp_path / f"{i:02d}.png")
    drawn[0].save(tmp_path / "20.jpg", quality=60)
    drawn[1].resize((100, 100)).save(tmp_path / "21.png")
    images = data.load("folder", tmp_path).train
    pairs = near_duplicates(torch.ones(14, 2), thumbnails(images))
    names = [path.name for path in images.paths]
    assert {(names[i], names[j]) for i, j, *_ in pairs} == {("00.png", "20.jpg"), ("01.png", "21.png")}


def test_thumbnails_are_means_of_pixels_between_0_and_1():
    images = Images(torch.arange(2, dtype=torch.uint8)[:, None, None, None].expand(2, 3, 64, 64) * 255, side=64)
    small = thumbnails(images)
    assert small.shape == (2, 3 * 32 * 32) and small[0].max() == 0 and small[1].min() == 1


def test_the_bounds_the_number_and_the_first_pairs_are_said():
    names = [f"{i}.jpg" for i in range(60)]
    (none,) = lines([], names)
    assert none.startswith("near-duplicates among 60 pictures: none (cosine of features at least 0.95, pixels at 32 px")
    pairs = [(i, i + 1, 0.99, 0.0123) for i in range(25)]
    said = lines(pairs, names)
    assert ": 25 pairs (" in said[0] and said[1] == "  0.jpg = 1.jpg (cosine 0.990, 1.2%)"
    assert len(said) == 22 and said[-1] == "  …"
