"""Nearest neighbours before and after training, in one picture: what the backbone finds alike.

    python figures/neighbours.py runs/shapes            writes runs/shapes/neighbours.png

Each row is a test image and the training images with the closest features (cosine), once for the
untrained encoder and once for the trained one. Without labels it is a picture that is kept aside,
or left out of the search. A blue frame marks a neighbour of the same class; labels serve no other
purpose. Pictures that are in a folder twice, or nearly so, are named.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import figures  # isort: skip  # noqa: F401  first: Ctrl-C while torch is imported
import matplotlib

matplotlib.use("Agg")
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from torch import Tensor

from data import DATASETS
from eval_linear import eval_side, load_for
from lab.backbones import encoder_of
from lab.train import LabConfig
from models import Encoder
from plumbing.command_line import Parser, UserError, command
from plumbing.devices import pick_device
from plumbing.duplicates import lines, near_duplicates, thumbnails
from plumbing.evaluation import evaluation_options
from plumbing.features import extract, random_images, settle_batchnorm
from plumbing.files import Dataset, say
from plumbing.fingerprints import check_same, fingerprint
from plumbing.outputs import output, replacing
from plumbing.runs import load_state, read_checkpoint

SAME, OTHER = "#0072b2", "#d55e00"  # colour-blind safe


def nearest(encoder, dataset: Dataset, queries: Tensor, size: int, device, k: int) -> Tensor:
    """Indices (Q, k) of the training images closest to the test images named by queries (Q,)."""
    train = F.normalize(extract(encoder, dataset.train, size, device), dim=1)
    test = F.normalize(extract(encoder, dataset.test.take(queries), size, device), dim=1)
    return (test @ train.T).topk(min(k, len(train))).indices


def encoders(checkpoint: dict, dataset: Dataset, size: int, device) -> list[Encoder]:
    """The run's encoder before its first step, with settled BatchNorm, and the checkpoint's."""
    before, after = (encoder_of(checkpoint["config"]).to(device) for _ in range(2))
    settle_batchnorm(before, dataset.train, size, device)
    load_state(after, checkpoint["encoder"], "the run's encoder")
    return [before, after]


def search(pair: list[Encoder], dataset: Dataset, size: int, device, rows: int = 8, k: int = 6, images: int = 5000):
    """Neighbours of at most `rows` test images, one per class, among at most `images` others.

    Returns the dataset with only these training images, the test images (Q,), and for each encoder
    the neighbours (Q, k) and the share of them that belong to the image's own class. Without labels
    the shares are None, and where no images are set aside the queries are training images.
    """
    if dataset.train.labels is None or not dataset.test:
        order = random_images(dataset.train, images + rows)
        rows = min(rows, len(order) // 2)
        asked = dataset.test if dataset.test else dataset.train.take(order[:rows])
        dataset = replace(dataset, train=dataset.train.take(order[rows:]), test=asked)
        queries = random_images(asked, rows)
        return dataset, queries, [nearest(encoder, dataset, queries, size, device, k) for encoder in pair], [None, None]
    dataset = replace(dataset, train=dataset.train.take(random_images(dataset.train, images)))
    shuffled = torch.randperm(len(dataset.test), generator=torch.Generator().manual_seed(0))
    by_class = [shuffled[dataset.test.labels[shuffled] == c] for c in range(len(dataset.classes))]
    queries = torch.stack([members[0] for members in by_class if len(members)])[:rows]  # one of each class
    hits = [nearest(encoder, dataset, queries, size, device, k) for encoder in pair]
    labels, own = dataset.train.labels, dataset.test.labels[queries][:, None]
    return dataset, queries, hits, [(labels[n] == own).float().mean().item() for n in hits]


def grid(rows: int, columns: int, top: float):
    """A figure of small square pictures with `top` inches above them, and axes (rows, columns)."""
    side = 0.62  # inches
    figure, axes = plt.subplots(rows, columns, figsize=(side * columns, side * rows + top), squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.axis("off")
    space = {"bottom": 0.01, "top": 0.99 - top / (side * rows + top), "wspace": 0.08, "hspace": 0.08}
    figure.subplots_adjust(left=0.01, right=0.99, **space)
    return figure, axes


def fill(axes, dataset: Dataset, queries: Tensor, hits: Tensor) -> None:
    """Show the neighbours (Q, k) of the test images (Q,) in axes (Q, k)."""
    for row, query, neighbours in zip(axes, queries.tolist(), hits.tolist()):
        for axis, i in zip(row, neighbours):
            if dataset.train.labels is None:
                colour = "white"
            else:
                colour = SAME if dataset.train.labels[i] == dataset.test.labels[query] else OTHER
            show(axis, dataset.train, i, colour)


def draw(checkpoint: dict, dataset: Dataset, path: Path, k: int = 6) -> None:
    size, device = eval_side(checkpoint["config"], dataset.test or dataset.train), pick_device()
    pair = encoders(checkpoint, dataset, size, device)
    name_duplicates(pair[1], dataset, size, device)
    dataset, queries, hits, share = search(pair, dataset, size, device, k=k)
    figure, axes = grid(len(queries), 2 * k + 2, 0.3)
    for axis, query in zip(axes[:, 0], queries.tolist()):
        show(axis, dataset.test, query, "black")
    fill(axes[:, 1 : k + 1], dataset, queries, hits[0])
    fill(axes[:, k + 2 :], dataset, queries, hits[1])
    axes[0, 0].set_title("image", fontsize=9)
    heads = zip(("untrained", "trained"), share, axes[0, [1, k + 2]], ("", " (blue; others orange)"))
    for name, own, axis, colours in heads:
        words = "" if own is None else f": {own:.0%} of the same class{colours}"
        axis.set_title(f"nearest, {name}{words}", fontsize=9, loc="left")
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)


def name_duplicates(encoder: Encoder, dataset: Dataset, size: int, device, most: int = 10_000) -> None:
    """Print the near-duplicates among at most `most` files of the dataset; others have no names."""
    features, pixels, names = [], [], []
    for images in (dataset.train, dataset.test):
        if images and images.paths and len(names) < most:
            images = images.take(random_images(images, most - len(names)))
            features.append(extract(encoder, images, size, device))
            pixels.append(thumbnails(images))
            names += images.names()
    if names:
        for line in lines(near_duplicates(torch.cat(features), torch.cat(pixels)), names):
            say(line)


def show(axis, images, i: int, colour: str) -> None:
    pixels = images.pixels[i] if images.pixels is not None else next(images.batches(torch.tensor([i]), 1, "cpu"))[0][0]
    axis.axis("on")
    axis.imshow(pixels.permute(1, 2, 0).cpu().numpy())
    for spine in axis.spines.values():
        spine.set(color=colour, linewidth=2, visible=True)


def load_images(run: str, checkpoint: dict, data_dir: str | None = None) -> Dataset:
    """The images of a run, as eval_linear.py loads them; data_dir is where they lie now.

    Raises UserError if they are others than those that it was trained on.
    """
    if data_dir and checkpoint["config"]["dataset"].startswith("shapes"):
        raise UserError("--data-dir means nothing for a run on drawn shapes: leave it out")
    config = checkpoint["config"] | ({"data_dir": data_dir} if data_dir else {})
    dataset = load_for(config, evaluation_options(Parser(), DATASETS).parse_args([run]))
    check_same(checkpoint.get("images"), fingerprint(dataset.train), run)
    return dataset


@command
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("run", help="a run's folder")
    parser.add_argument("--out", type=output, help="the picture [RUN/neighbours.png]")
    parser.add_argument("--data-dir", help="where the run's images lie now [as in the run]")
    args = parser.parse_args(argv)
    checkpoint = read_checkpoint(args.run, LabConfig)
    home = Path(args.run) if Path(args.run).is_dir() else Path(args.run).parent
    place = args.out or output(home / "neighbours.png")
    dataset = load_images(args.run, checkpoint, args.data_dir)
    with replacing(place, "the picture") as beside:
        draw(checkpoint, dataset, beside)
    print(place)


if __name__ == "__main__":
    sys.exit(main())
