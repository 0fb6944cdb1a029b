"""Features of whole images: those of a frozen backbone, and raw pixels as a control."""

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from plumbing.devices import pick_device, pick_precision
from plumbing.files import Dataset, Images
from plumbing.image_ops import whole_image
from plumbing.outputs import replacing
from plumbing.scores import another_range


@torch.no_grad()
def extract(encoder, images: Images, size: int, device, of: str = "") -> Tensor:
    """Frozen features (N, F) float32 on the CPU: the backbone evaluated on whole images.

    A progress bar says what they are the features `of`; none if that is empty.
    """
    was_training = encoder.training
    encoder.eval()
    features = []
    words = {"desc": f"features, {of}", "unit": " images", "unit_scale": True, "leave": False}
    with tqdm(total=len(images), disable=None if of else True, **words) as bar:
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


def ready(encoder, device, images: Images | None, size: int) -> None:
    """Move an encoder to the device to be evaluated there.

    An untrained one gets the BatchNorm statistics of the images; None: they are its own.
    """
    encoder.to(device, memory_format=torch.channels_last)
    encoder.precision = pick_precision("auto", device)
    if images:
        settle_batchnorm(encoder, images, size, device)


def random_images(images: Images, count: int) -> Tensor:
    """Numbers of at most `count` random images, always the same: folders list class after class."""
    return torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]


def eval_side(config: dict, images: Images) -> int:
    """The side of images in evaluation: the run's --eval-size, or their own, 1 to 4/3 of --size.

    A crop shows things larger than the whole image does; somewhat larger images in evaluation make
    up for it (FixRes, arXiv 1906.06423). A vision transformer knows one side only. Images that are
    reduced to be decoded have 8/7 of --size.
    """
    return side_of(config, images.side)


def side_of(config: dict, own: int) -> int:
    """The side in evaluation of images that are decoded to squares of side own."""
    size, asked = config["size"], config.get("eval_size", 0)
    if asked or config["arch"].startswith("vit"):
        return asked or size
    return min(max(own, size), round(size * 4 / 3))


def save_features(encoder, dataset: Dataset, checkpoint: dict, args) -> None:
    """Write the features of all images to args.features, as NumPy's `load` reads them.

    features is (N, F), paths (N,) and labels (N,): names of classes, "" where there is none. Rows
    are in the order of the paths. Images that are no files are called train/0, test/0 and so on.
    """
    device = pick_device(args.device)
    ready(encoder, device, None, 0)
    size = args.size or eval_side(checkpoint["config"], dataset.train)
    features, paths, labels = [], [], []
    for name, images in (("train", dataset.train), ("test", dataset.test)):
        if images:
            features.append(extract(encoder, images, size, device, name))
            paths += images.names() if images.paths else [f"{name}/{i}" for i in range(len(images))]
            known = images if images.labels is not None else dataset.labelled  # these come first, or are others
            own = known is images or (known and known.paths and known.paths == images.paths[: len(known)])
            numbers = known.labels.tolist() if own else []
            labels += [dataset.classes[c] for c in numbers] + [""] * (len(images) - len(numbers))
    order = sorted(range(len(paths)), key=paths.__getitem__)
    content = {"features": torch.cat(features)[order].numpy()}
    content |= {key: np.array(words)[order] for key, words in (("paths", paths), ("labels", labels))}
    with replacing(args.features, "--features") as place, open(place, "wb") as file:
        np.savez(file, **content)
    count, width = content["features"].shape
    print(f"{args.features}: {width} features, path and label of each of {count} images of {size} px; in Python:\n")
    print(f'import numpy as np\n\nfile = np.load("{args.features.name}")')
    print('file["features"], file["paths"], file["labels"]')
    for caution in another_range(checkpoint, dataset.train):
        print(caution)
