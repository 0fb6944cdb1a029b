"""The batched operations compared with torchvision's, image by image, on equal parameters."""

import math
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as tv
from torchvision.transforms import RandomResizedCrop

from data import Augment, Batch, cutmix
from plumbing import image_ops
from plumbing.image_ops import gaussian_blur, normalize, random_crop, resized_crop, whole_image
from train import Config, Pretraining

BATCH = 4
STILL = dict(size=32, scale=(1, 1), ratio=(1, 1), jitter_p=0, gray_p=0, blur_p=0, flip_p=0)  # changes nothing


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def photos(batch=BATCH, side=32):
    """Noise with grey, black, white and saturated patches: the corners of colour conversions."""
    x = torch.rand(batch, 3, side, side)
    x[:, :, :4, :4] = 0.4
    x[:, :, :4, 4:8] = 0
    x[:, :, 4:8, :4] = 1
    x[:, :, 4:8, 4:8] = torch.tensor([1.0, 0, 0])[:, None, None]
    x[:, :, 8:12, :4] = torch.tensor([0.7, 0.7, 0.2])[:, None, None]  # two channels share the maximum
    return x


def bytes_of(batch, side=32):
    return torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8)


def denormalized(views):
    return views * torch.tensor(image_ops.STD)[:, None, None] + torch.tensor(image_ops.MEAN)[:, None, None]


def farthest_cdf(a, b):
    """The Kolmogorov-Smirnov distance of two samples."""
    at = torch.cat([a, b]).sort().values
    share = [torch.searchsorted(s.sort().values, at, right=True) / len(s) for s in (a, b)]
    return (share[0] - share[1]).abs().max().item()


# ---------------------------------------------------------------- single operations, as torchvision


@pytest.mark.parametrize(
    "name, factors",
    [
        ("adjust_brightness", [0.0, 0.6, 1.0, 1.7]),
        ("adjust_contrast", [0.0, 0.6, 1.0, 1.7]),
        ("adjust_saturation", [0.0, 0.6, 1.0, 1.7]),
        ("adjust_hue", [-0.5, -0.1, 0.0, 0.37]),
    ],
)
def test_colour_adjustments_equal_torchvision(name, factors):
    x = photos()
    ours = getattr(image_ops, name)(x, torch.tensor(factors))
    theirs = torch.stack([getattr(tv, name)(image, factor) for image, factor in zip(x, factors)])
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_rgb_to_grayscale_equals_torchvision():
    x = photos()
    torch.testing.assert_close(image_ops.rgb_to_grayscale(x), tv.rgb_to_grayscale(x, num_output_channels=3))


# top, left, height, width of each image of the batch, in images of 32 pixels
BOXES = [(0, 0, 32, 32), (3, 10, 20, 17), (31, 0, 1, 32), (5, 29, 27, 3)]


@pytest.mark.parametrize("size", [8, 17, 32, 50], ids=lambda size: f"to{size}")
@pytest.mark.parametrize("flips", [None, [False, True, False, True]], ids=["straight", "flipped"])
def test_resized_crop_equals_torchvision(size, flips):
    x = photos()
    flip = None if flips is None else torch.tensor(flips)
    ours = resized_crop(x, *torch.tensor(BOXES).float().unbind(1), size, flip=flip)
    for i, (top, left, height, width) in enumerate(BOXES):
        theirs = tv.resized_crop(x[i], top, left, height, width, [size, size], antialias=True)
        if flips and flips[i]:
            theirs = tv.horizontal_flip(theirs)
        torch.testing.assert_close(ours[i], theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", [5, 24])
def test_gaussian_blur_equals_torchvision(side):
    x, sigmas = torch.rand(BATCH, 3, side, side), [0.1, 0.5, 1.0, 1.3]
    ours = gaussian_blur(x, torch.tensor(sigmas))
    kernel = 2 * min(side - 1, math.ceil(3 * max(sigmas))) + 1
    for image, blurred, sigma in zip(x, ours, sigmas):
        theirs = tv.gaussian_blur(image, kernel_size=[kernel, kernel], sigma=[sigma, sigma])
        torch.testing.assert_close(blurred, theirs, atol=1e-5, rtol=0)


def test_gaussian_blur_is_close_to_a_kernel_without_end():
    x, sigma = torch.rand(1, 3, 48, 48), 2.0
    theirs = tv.gaussian_blur(x, kernel_size=[41, 41], sigma=[sigma, sigma])
    torch.testing.assert_close(gaussian_blur(x, torch.tensor([sigma])), theirs, atol=4e-3, rtol=0)


@pytest.mark.parametrize("size", [16, 32, 45])
def test_the_view_for_evaluation_is_torchvisions_resize_and_normalize(size):
    pixels = bytes_of(BATCH)
    theirs = tv.resize(pixels.float() / 255, [size, size], antialias=True)
    theirs = tv.normalize(theirs, list(image_ops.MEAN), list(image_ops.STD))
    ours = whole_image(pixels, size)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0, check_stride=False)
    assert ours.is_contiguous(memory_format=torch.channels_last)


# -------------------------------------------------------------------------------------------- boxes


@pytest.mark.parametrize("side", [8, 32, 97])
@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.01, 0.05)])
def test_crop_boxes_are_whole_pixels_inside_the_image(side, scale):
    boxes = torch.stack(random_crop(5000, side, scale, (3 / 4, 4 / 3)))  # (4, N)
    top, left, height, width = boxes
    assert torch.equal(boxes, boxes.round())
    assert top.min() >= 0 and left.min() >= 0 and height.min() >= 1 and width.min() >= 1
    assert (top + height).max() <= side and (left + width).max() <= side


def test_crop_area_and_aspect_stay_in_their_ranges_up_to_rounding():
    side, scale, ratio = 400, (0.2, 0.5), (0.6, 1.5)
    _, _, height, width = random_crop(5000, side, scale, ratio)
    assert ((height - 0.5) * (width - 0.5)).max() <= scale[1] * side**2
    assert ((height + 0.5) * (width + 0.5)).min() >= scale[0] * side**2
    assert ((width - 0.5) / (height + 0.5)).max() <= ratio[1]
    assert ((width + 0.5) / (height - 0.5)).min() >= ratio[0]


@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.08, 0.4)])
def test_crop_boxes_are_distributed_as_torchvisions(scale):
    side, ratio, count = 32, (3 / 4, 4 / 3), 3000
    image = torch.empty(3, side, side)
    theirs = [RandomResizedCrop.get_params(image, scale, ratio) for _ in range(count)]
    theirs = torch.tensor(theirs).float().unbind(1)
    ours = random_crop(20_000, side, scale, ratio)
    for measure in (
        lambda top, left, height, width: height * width,
        lambda top, left, height, width: width / height,
        lambda top, left, height, width: top,
        lambda top, left, height, width: left + width,
    ):
        assert farthest_cdf(measure(*ours), measure(*theirs)) < 0.035  # by chance less than once in 300


def test_a_crop_that_never_fits_is_the_whole_image():
    boxes = torch.stack(random_crop(50, 32, (1.0, 1.0), (0.5, 0.5)))
    assert torch.equal(boxes, torch.tensor([0.0, 0, 32, 32])[:, None].expand(4, 50))


# ------------------------------------------------------------------------------------------- CutMix


def numbered(batch, height=32, width=32):
    """Views of one value each, its place in the batch."""
    return torch.arange(batch).float()[:, None, None, None].expand(batch, 3, height, width)


def mix(views, alpha):
    batch = cutmix(Batch(views, torch.arange(len(views)) + 100), alpha)
    assert torch.equal(batch.index, torch.arange(len(views)) + 100), "the images stay what they were"
    return batch.views, batch.partner, batch.share


@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("height, width", [(32, 32), (9, 20)])
def test_cutmix_share_is_the_area_that_stays_an_images_own(alpha, height, width):
    mixed, partner, share = mix(numbered(64, height, width), alpha)
    own = mixed == torch.arange(64)[:, None, None, None]
    other = mixed == partner[:, None, None, None]
    assert (own | other).all()
    measured = own.float().mean((1, 2, 3))
    mixes = partner != torch.arange(64)
    torch.testing.assert_close(share[mixes], measured[mixes])
    assert mixes.sum() > 50 and partner.sort().values.tolist() == list(range(64))


def test_cutmix_moves_no_pixel():
    views = torch.rand(16, 3, 12, 12)
    mixed, partner, share = mix(views, 1.0)
    own, other = (mixed == views).all(1), (mixed == views[partner]).all(1)
    assert (own | other).all()
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    for i in range(16):
        if partner[i] != i:
            pasted = ~own[i]
            rows, columns = pasted.any(1), pasted.any(0)
            assert torch.equal(pasted, rows[:, None] & columns), "a box"
            assert pasted.sum() == round((1 - share[i].item()) * 144)


def test_cutmix_leaves_an_image_at_least_about_half_of_itself():
    share = torch.cat([mix(numbered(256), 1.0)[2] for _ in range(4)])
    largest = (32 * 0.5**0.5 + 0.5) / 32  # side of a box of half the area, rounded up
    assert 1 - largest**2 <= share.min() < 0.55 and 0.95 < share.max() <= 1


def test_the_target_after_cutmix_shares_one_among_the_own_row_and_the_partners():
    batch = Batch(numbered(6), torch.tensor([9, 4, 7, 0, 2, 5]))
    own = torch.tensor([3, 0, 1, 2, 5, 4])  # the columns of the own rows
    assert torch.equal(batch.target(own, 8), own)
    mixed = cutmix(batch, 1.0)
    target = mixed.target(own, 8)
    expected = torch.zeros(6, 8)
    for i in range(6):
        expected[i, own[i]] += mixed.share[i]
        expected[i, own[mixed.partner[i]]] += 1 - mixed.share[i]
    torch.testing.assert_close(target, expected)
    torch.testing.assert_close(target.sum(1), torch.ones(6))


def test_cutmix_with_a_larger_alpha_mixes_more():
    low, middle, high = (mix(numbered(2000, 16, 16), alpha)[2].mean() for alpha in (0.1, 1.0, 10.0))
    assert low > 0.93 and abs(middle - 0.75) < 0.02 and high < 0.65


# ------------------------------------------------------------------------------------------ Augment


@pytest.mark.parametrize("side, size", [(32, 32), (48, 20), (20, 48)])
def test_views_are_float_channels_last_and_of_the_size_asked_for(side, size):
    views = Augment(size, blur_p=0.5)(bytes_of(6, side))
    assert views.shape == (6, 3, size, size) and views.dtype == torch.float32
    assert views.is_contiguous(memory_format=torch.channels_last) and views.isfinite().all()


def test_the_same_seed_gives_the_same_views_and_another_does_not():
    pixels, views = bytes_of(8), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        views.append(Augment(blur_p=0.5)(pixels))
    assert torch.equal(views[0], views[1]) and not torch.equal(views[0], views[2])


@pytest.mark.parametrize(
    "options",
    [
        {"scale": (0.2, 1.0)},
        {"ratio": (3 / 4, 4 / 3), "scale": (0.3, 0.3)},
        {"jitter_p": 1, "jitter": (0.4, 0, 0, 0)},
        {"jitter_p": 1, "jitter": (0, 0.4, 0, 0)},
        {"jitter_p": 1, "jitter": (0, 0, 0.4, 0)},
        {"jitter_p": 1, "jitter": (0, 0, 0, 0.1)},
        {"blur_p": 1},
    ],
    ids=["crop", "aspect", "brightness", "contrast", "saturation", "hue", "blur"],
)
def test_identical_images_of_a_batch_draw_parameters_of_their_own(options):
    views = Augment(**(STILL | options))(bytes_of(1).expand(4, -1, -1, -1))
    for i in range(4):
        for j in range(i):
            assert not torch.allclose(views[i], views[j], atol=1e-3)


@pytest.mark.parametrize("option", ["flip_p", "gray_p", "blur_p", "jitter_p"])
def test_a_probability_of_a_half_reaches_about_half_of_the_images(option):
    pixels = bytes_of(1, 16).expand(400, -1, -1, -1)
    options = STILL | {option: 0.5, "blur_sigma": (1, 1), "size": 16}
    changed = (Augment(**options)(pixels) - whole_image(pixels, 16)).abs().amax((1, 2, 3)) > 1e-3
    assert abs(changed.float().mean() - 0.5) < 0.1  # four standard deviations


def test_with_every_probability_zero_the_view_is_the_one_for_evaluation():
    pixels = bytes_of(8)
    torch.testing.assert_close(Augment(**STILL)(pixels), whole_image(pixels, 32))


@pytest.mark.parametrize(
    "option, expected",
    [
        ("flip_p", lambda x: x.flip(3)),
        ("gray_p", image_ops.rgb_to_grayscale),
        ("blur_p", lambda x: gaussian_blur(x, torch.full((len(x),), 1.5))),
    ],
)
def test_a_probability_of_one_changes_every_image(option, expected):
    pixels = bytes_of(16)
    views = Augment(**(STILL | {option: 1, "blur_sigma": (1.5, 1.5)}))(pixels)
    torch.testing.assert_close(views, normalize(expected(pixels.float() / 255)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("probability", [0, 1])
def test_jitter_touches_all_images_or_none(probability):
    pixels = bytes_of(64)
    views = Augment(**(STILL | {"jitter_p": probability}))(pixels)
    changed = (views - whole_image(pixels, 32)).abs().amax((1, 2, 3)) > 1e-3
    assert changed.all() if probability else not changed.any()


def test_brightness_jitter_fills_its_range():
    pixels = torch.full((500, 3, 8, 8), 100, dtype=torch.uint8)
    views = Augment(**(STILL | {"size": 8, "jitter_p": 1, "jitter": (0.4, 0, 0, 0)}))(pixels)
    factor = denormalized(views).mean((1, 2, 3)) / (100 / 255)
    assert 0.6 - 1e-4 <= factor.min() < 0.62 and 1.38 < factor.max() <= 1.4 + 1e-4 and abs(factor.mean() - 1) < 0.04


def test_defaults_are_those_of_a_run():
    run = Pretraining(Config(device="cpu", dim=4, hidden=4), 10, torch.device("cpu"))
    for f in fields(Augment):
        assert getattr(Augment(), f.name) == getattr(run.augment, f.name), f.name


def test_views_stay_in_the_range_of_pixels():
    x = denormalized(Augment(jitter=(0.9, 0.9, 0.9, 0.5), jitter_p=1, blur_p=0.5)(bytes_of(64)))
    assert x.min() >= -1e-5 and x.max() <= 1 + 1e-5


@pytest.mark.parametrize("options", [{}, STILL, {"blur_p": 1.0, "solarize_p": 1.0, "jitter_p": 1.0}])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_augmenting_leaves_the_callers_images_as_they_are(options, dtype):
    x = photos().to(dtype)
    before = x.clone()
    Augment(**options)(x)
    whole_image(x, 32)
    assert torch.equal(x, before)


MEMORY = {  # float images as views of other memory, (B, 3, S, S)
    "slice": lambda x: torch.cat([x, x])[1 : 1 + len(x)],
    "window": lambda x: F.pad(x, (3, 3, 3, 3))[..., 3:-3, 3:-3],
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "mirrored axes": lambda x: x.transpose(2, 3),
    "grey, expanded": lambda x: x[:, :1].expand(-1, 3, -1, -1),
    "one image, expanded": lambda x: x[:1].expand(len(x), -1, -1, -1),
}
NEUTRAL = STILL | {"jitter": (0, 0, 0, 0), "jitter_p": 1}


@pytest.mark.parametrize("options", [STILL, NEUTRAL, {"blur_p": 1.0, "jitter_p": 1.0, "gray_p": 1.0}], ids=str)
@pytest.mark.parametrize("memory", MEMORY)
def test_views_of_float_images_share_no_memory_with_them(options, memory):
    """Whatever is done to the result, what the caller has stays."""
    x = MEMORY[memory](photos())
    before = x.clone()
    for result in (Augment(**options)(x), whole_image(x, 32), normalize(x)):
        result.zero_()
        assert torch.equal(x, before)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_a_neutral_adjustment_gives_a_tensor_of_its_own(name, memory):
    x = MEMORY[memory](photos())
    before, neutral = x.clone(), torch.full((BATCH,), float(name != "hue"))
    result = getattr(image_ops, f"adjust_{name}")(x, neutral)
    torch.testing.assert_close(result, before, atol=1e-5, rtol=0)
    result.zero_()
    assert torch.equal(x, before)
