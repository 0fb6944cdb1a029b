"""How good are features, judged without labels? Two figures from pictures that did not train.

    recovered   how often a second view finds its own picture among all pictures' first views
    rank        RankMe (arXiv 2210.02885), the effective rank: how many directions the features use

Both are read next to the same figures of the untrained encoder.
"""

import time

import torch
import torch.nn.functional as F
from torch import Tensor

from plumbing.devices import pick_device
from plumbing.evaluation import save_results
from plumbing.features import eval_side, extract, random_images, ready
from plumbing.files import Dataset, Images
from plumbing.scores import another_range, trained_on

FEWEST, MOST = 10, 1000  # pictures: fewer say nothing, and the similarities of so many take a moment
ALONE = "a second view finds its own picture"


def effective_rank(features: Tensor) -> float:
    """RankMe's figure for features (N, F): between 1 and min(N, F).

    exp of the entropy of the singular values' shares, which are summed to 1.
    """
    values = torch.linalg.svdvals(features.double())  # (min(N, F),)
    return perplexity(values / values.sum().clamp(min=1e-30)).item()


def perplexity(shares: Tensor) -> Tensor:
    """exp of the entropy along the last dimension: the number of equal shares as evenly spread."""
    return torch.special.entr(shares).sum(-1).exp()


def recovered(first: Tensor, second: Tensor) -> float:
    """The share of pictures whose second view's nearest first view is their own.

    first (N, F) and second (N, F) are features of two views of the same pictures; near means a
    large cosine.
    """
    nearest = (F.normalize(second, dim=1) @ F.normalize(first, dim=1).T).argmax(1)  # (N,)
    return (nearest == torch.arange(len(nearest))).double().mean().item()


@torch.no_grad()
def quality(encoder, images: Images, config: dict, augment, device, seed: int = 0) -> dict[str, float]:
    """{"recovered": ..., "rank": ...} of the encoder's backbone on at most 1 000 of the images.

    augment makes the views. The rank is measured on whole images, of the side that config, the
    run's settings, gives them. The draws follow from the seed and leave torch's generators as they
    were. Of fewer than 10 images there are no figures: {}.
    """
    if len(images) < FEWEST:
        return {}
    images = images.take(random_images(images, MOST))
    was_training = encoder.training
    encoder.eval()
    views: list[list[Tensor]] = [[], []]
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        for pixels, _ in images.batches(torch.arange(len(images)), 250, device):
            for features in views:
                features.append(encoder.features(augment(pixels)).cpu())  # (B, F)
    encoder.train(was_training)
    whole = extract(encoder, images, eval_side(config, images), device)  # (N, F)
    return {"recovered": recovered(*map(torch.cat, views)), "rank": effective_rank(whole)}


def said(row: dict) -> str:
    """What the last look of a run showed, for the line at its end."""
    if "knn" in row:
        return f", quick kNN {row['knn']:.1%} (k = 20 and 1 000 test images at most)"
    if "recovered" in row:
        return f", {ALONE} in {row['recovered']:.1%} of the cases, effective rank {row['rank']:.1f}"
    return ""


def judged(dataset: Dataset, more=None) -> bool:
    """Whether an evaluation has no labels, but pictures for the two figures.

    more is the evaluation's further figures, which may need labels.
    """
    labelled = dataset.labelled and dataset.test
    return not labelled and dataset.test and len(dataset.test) >= FEWEST and not getattr(more, "slow", more)


def report(trained, untrained, checkpoint: dict, dataset: Dataset, augment, args) -> None:
    """Print both figures of both encoders, and write them to --json."""
    started, device = time.perf_counter(), pick_device(args.device)
    dataset, images = dataset.to(device), dataset.test.to(device)
    config = checkpoint["config"] | ({"eval_size": args.size} if args.size else {})
    size, results = eval_side(config, images), {}
    for name, encoder in (("trained", trained), ("untrained", untrained)):
        ready(encoder, device, dataset.train if name == "untrained" else None, size)
        results[name] = quality(encoder, images, config, augment, device)
    notes = trained_on(checkpoint, images) + another_range(checkpoint, images)
    save_results(results, checkpoint, args, notes)  # before they are printed: the reader may be gone
    count, seconds = min(len(images), MOST), time.perf_counter() - started
    why = f" ({dataset.lacks})" if dataset.lacks else ""
    print(f"no labels{why}: judged by {count} pictures that did not train, {seconds:.0f} s")
    print(f"{'':<12}{'recovered, %':>20}{'effective rank':>20}")
    for name, row in results.items():
        print(f"{name:<12}{100 * row['recovered']:>20.1f}{row['rank']:>20.1f}")
    print(f"{'guessing':<12}{100 / count:>20.1f}")
    print(f"recovered: how often {ALONE} among {count}", *notes, sep="\n")
