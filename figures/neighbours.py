"""Nearest neighbours before and after training, in one picture: what the backbone finds alike.

    python figures/neighbours.py runs/shapes            writes runs/shapes/neighbours.png

Each row is a test image and the training images whose features are closest to its own (cosine), once with the untrained
encoder and once with the trained one. A frame in blue marks a neighbour of the same class; labels are used for nothing else.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import matplotlib

matplotlib.use("Agg")
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt

from eval_linear import eval_side, load_for
from eval_linear import parse as parse_eval
from images import Dataset, UserError
from models import pick_device
from probes import extract, settle_batchnorm, some
from runs import new_encoder, read_checkpoint

SAME, OTHER = "#0072b2", "#d55e00"  # colour-blind safe


def nearest(encoder, dataset: Dataset, queries: torch.Tensor, size: int, device, k: int) -> torch.Tensor:
    """Indices (Q, k) of the training images closest to the test images named by queries (Q,)."""
    train = F.normalize(extract(encoder, dataset.train, size, device), dim=1)
    test = F.normalize(extract(encoder, dataset.test.take(queries), size, device), dim=1)
    return (test @ train.T).topk(k).indices


def draw(checkpoint: dict, dataset: Dataset, path: Path, rows: int = 8, k: int = 6, images: int = 5000) -> None:
    config = checkpoint["config"]
    size, device = eval_side(config, dataset.test), pick_device()
    dataset.train = dataset.train.take(some(dataset.train, images))
    shuffled = torch.randperm(len(dataset.test), generator=torch.Generator().manual_seed(0))
    by_class = [shuffled[dataset.test.labels[shuffled] == c] for c in range(len(dataset.classes))]
    queries = torch.stack([members[0] for members in by_class if len(members)])[:rows]  # one of each class
    before, after = new_encoder(config).to(device), new_encoder(config).to(device)
    settle_batchnorm(before, dataset.train, size, device)
    after.load_state_dict(checkpoint["encoder"])
    found = [nearest(encoder, dataset, queries, size, device, k) for encoder in (before, after)]

    figure, axes = plt.subplots(
        len(queries), 2 * k + 2, figsize=(0.62 * (2 * k + 2), 0.62 * len(queries) + 0.7), squeeze=False
    )
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.axis("off")
    for r, query in enumerate(queries.tolist()):
        label = dataset.test.labels[query]
        show(axes[r, 0], dataset.test, query, "black")
        for half, neighbours in enumerate(found):
            for j, i in enumerate(neighbours[r].tolist()):
                same = dataset.train.labels is not None and dataset.train.labels[i] == label
                show(axes[r, 1 + half * (k + 1) + j], dataset.train, i, SAME if same else OTHER)
    share = [(dataset.train.labels[n] == dataset.test.labels[queries][:, None]).float().mean().item() for n in found]
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=0.94, wspace=0.08, hspace=0.08)
    axes[0, 0].set_title("image", fontsize=9)
    axes[0, 1].set_title(f"nearest, untrained: {share[0]:.0%} of the same class", fontsize=9, loc="left")
    axes[0, k + 2].set_title(f"nearest, trained: {share[1]:.0%} of the same class (blue)", fontsize=9, loc="left")
    figure.savefig(path, dpi=80)
    plt.close(figure)


def show(axis, images, i: int, colour: str) -> None:
    pixels = images.pixels[i] if images.pixels is not None else next(images.batches(torch.tensor([i]), 1, "cpu"))[0][0]
    axis.axis("on")
    axis.imshow(pixels.permute(1, 2, 0).cpu().numpy())
    for spine in axis.spines.values():
        spine.set(color=colour, linewidth=2)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", help="a run's folder")
    parser.add_argument("--out", type=Path, help="the picture [RUN/neighbours.png]")
    args = parser.parse_args(argv)
    try:
        checkpoint = read_checkpoint(args.run)
        dataset = load_for(checkpoint, parse_eval([args.run]))
        if dataset.test is None or dataset.train.labels is None:
            raise UserError(f"{args.run}: its images have no labels to mark neighbours by")
        home = Path(args.run) if Path(args.run).is_dir() else Path(args.run).parent
        place = args.out or home / "neighbours.png"
        draw(checkpoint, dataset, place)
    except UserError as error:
        print(f"neighbours.py: {error}", file=sys.stderr)
        return 2
    print(place)
    return 0


if __name__ == "__main__":
    sys.exit(main())
