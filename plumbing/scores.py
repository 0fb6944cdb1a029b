"""What accuracies mean: controls of the score itself, and reasons why a figure can mislead."""

import torch
from torch import Tensor

from plumbing.command_line import UserError
from plumbing.files import DEEP, Dataset, Images
from plumbing.fingerprints import among, twins


def check_labels(dataset: Dataset) -> None:
    """Raises UserError, with the reason, if there is nothing to evaluate with."""
    advice = "name labelled images with --data-dir, or --dataset cifar10 --data-dir DIR"
    if not dataset.labelled or not dataset.test:
        raise UserError(f"no labels to evaluate with: {dataset.lacks or 'the images have none'}; {advice}")
    if len(dataset.labelled.labels.unique()) < 2:
        only = dataset.classes[int(dataset.labelled.labels[0])]
        raise UserError(f"no labels to evaluate with: all training images are of one class, {only}; {advice}")


def neighbours(k: int, labels: Tensor) -> int:
    """The k of kNN for labels (N,): at most 2 n - 1, where n is the size of the smallest class.

    With more neighbours that class cannot win the vote, even if its images are the nearest ones.
    """
    counts = labels.bincount()
    return min(k, 2 * int(counts[counts > 0].min()) - 1)


def standardised(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Features (N, F) and (T, F) with the mean 0 and the deviation 1 of the training features.

    A column that is constant in training becomes 0. Test values are at most as far out as the
    farthest training value of any column: a column that is nearly constant in training has a tiny
    deviation, and would drown all others.
    """
    constant = train.amax(0) == train.amin(0)
    mean, scale = train.mean(0), torch.where(constant, 0, 1 / train.std(0, correction=min(1, len(train) - 1)))
    train, test = (train - mean) * scale, (test - mean) * scale
    return train, test.clamp(-train.abs().max(), train.abs().max())


def share_right(answers: Tensor, truth: Tensor) -> float:
    return (answers == truth).float().mean().item()


def figures(knn: Tensor, linear: Tensor, truth: Tensor) -> dict[str, float]:
    """Accuracies from which answers were right, bool (T,); balanced ones too if classes are not.

    The balanced accuracy is the mean over the classes of the test set.
    """
    counts, rights = truth.bincount(), {"knn": knn, "linear": linear}
    shares = {name: right.float().mean().item() for name, right in rights.items()}
    if counts.max() > 1.5 * counts[counts > 0].min():
        for name, right in rights.items():
            shares[f"{name}_balanced"] = (truth.bincount(right.double())[counts > 0] / counts[counts > 0]).mean().item()
    return shares


def majority(labels: Tensor, truth: Tensor) -> dict[str, float]:
    """What answering with the commonest training class always gets."""
    right = truth == labels.bincount().argmax()
    return figures(right, right, truth)


def trained_on(checkpoint: dict, test: Images) -> list[str]:
    """A line if the run was trained on some of its test images."""
    seen = int(among(checkpoint.get("images"), test).sum())
    return [f"caution: {seen} of the {len(test)} test images were trained on without labels"] * bool(seen)


def another_range(checkpoint: dict, images: Images) -> list[str]:
    """A line if pictures of more than 8 bits per value have another `Range` than in training."""
    before, now = checkpoint.get("span"), images.span
    if not before or not now or tuple(before) == (now.low, now.high):
        return []
    words = "{:g} to {:g} became 0 to 255 in training, {:g} to {:g} here".format(*before, now.low, now.high)
    return [f"caution: pictures of {DEEP}: {words}"]


def cautions(checkpoint: dict, dataset: Dataset) -> list[str]:
    """A line for each reason why the figures may not mean what they seem to."""
    train, test, lines = dataset.labelled, dataset.test, trained_on(checkpoint, dataset.test)
    known, asked = ({*images.labels.tolist()} for images in (train, test))
    for only, words in ((asked - known, "no training image"), (known - asked, "no test image")):
        if only:
            count = {c: int((train.labels == c).sum() + (test.labels == c).sum()) for c in sorted(only)}
            names = [f"{dataset.classes[c]} ({count[c]})" for c in count]
            several = ", ".join(names[:8]) + ", …" * (len(names) > 8)
            lines.append(f"caution: {len(names)} classes have {words}: {several}")
    pairs = twins(train, test)
    if pairs:
        named = ""
        if test.paths:
            named = ", for instance " + ", ".join(f"{test.names()[i]} = {train.names()[j]}" for i, j in pairs[:3])
        lines.append(f"caution: {len(pairs)} test images are identical to training images{named}")
    return lines + another_range(checkpoint, test)


def summary(dataset: Dataset, asked: int, seconds: float) -> str:
    """The line above the table: how many images, and which k the smallest class allows."""
    k, images = neighbours(asked, dataset.labelled.labels), f"{len(dataset.labelled)} labelled"
    why = f" (with {asked}, the smallest class could not win a vote)" if k < asked else ""
    return f"{images} and {len(dataset.test)} test images, k = {k}{why}, {seconds:.0f} s"
