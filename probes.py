"""What frozen features are worth: features (N, F) of images, and the classifiers that read them (see eval_linear.py)."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from augment import Augment, plain
from images import Dataset, Images
from models import Encoder

STRENGTHS = (1e-1, 3e-2, 1e-2, 1e-3)  # L2 penalties a probe chooses from, by a tenth of its training features


# -------------------------------------------------------------------------------------------------------------- features


@torch.no_grad()
def extract(encoder: Encoder, images: Images, size: int, device, quiet: bool = True) -> Tensor:
    """Frozen features (N, F) float32 on the CPU: the backbone in evaluation mode on the whole image at `size`."""
    was_training = encoder.training
    encoder.eval()
    features = []
    with tqdm(total=len(images), desc="features", unit=" images", unit_scale=True, leave=False, disable=quiet) as bar:
        for pixels, index in images.batches(torch.arange(len(images)), 500, device):
            features.append(encoder.features(plain(pixels, size)).cpu())  # (B, F)
            bar.update(len(index))
    encoder.train(was_training)
    return torch.cat(features)


def raw_pixels(images: Images, size: int) -> Tensor:
    """The control without a network: normalised pixels at no more than 32 a side, flattened to (N, 3 * side * side)."""
    size, cpu = min(size, 32), torch.device("cpu")
    return torch.cat([plain(x, size).flatten(1) for x, _ in images.batches(torch.arange(len(images)), 500, cpu)])


@torch.no_grad()
def settle_batchnorm(encoder: Encoder, images: Images, size: int, device, count: int = 2000) -> None:
    """Give an untrained encoder's BatchNorm layers the statistics of the images, the only fair start for a control."""
    norms = [m for m in encoder.backbone.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over the batches
    encoder.train()
    for pixels, _ in images.batches(some(images, count), 250, device):
        encoder.features(plain(pixels, size))
    encoder.eval()
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum


def some(images: Images, count: int) -> Tensor:
    """Indices of at most `count` images, always the same; at random, since folders list one class after the other."""
    return torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]


# ---------------------------------------------------------------------------------------------------------------- probes


def knn(train: Tensor, labels: Tensor, test: Tensor, truth: Tensor, k: int = 200, temperature: float = 0.1) -> float:
    """Accuracy of the weighted vote of the k nearest training features (cosine, weights exp(s / T)), as in NPID."""
    train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    k, classes, right = min(k, len(train)), int(labels.max()) + 1, 0
    for part, part_truth in zip(test.split(1000), truth.split(1000)):
        nearest, index = (part @ train.T).topk(k)  # (b, k)
        votes = part.new_zeros(len(part), classes).scatter_add_(1, labels[index], (nearest / temperature).exp())
        right += int((votes.argmax(1) == part_truth).sum())
    return right / len(test)


def linear_probe(train: Tensor, labels: Tensor, test: Tensor, truth: Tensor) -> float:
    """Accuracy of logistic regression on standardised features (N, F), fitted with L-BFGS.

    The L2 strength is the one of STRENGTHS that does best on a tenth of the training features; the fit is then repeated
    on all of them. The test set chooses nothing.
    """
    mean, std = train.mean(0), train.std(0).clamp(min=1e-6)
    train, test = (train - mean) / std, (test - mean) / std
    classes = int(labels.max()) + 1
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    held, kept = order[: len(train) // 10], order[len(train) // 10 :]
    strength, head = STRENGTHS[2], None
    if len(held) >= 10:
        scores = {}
        for candidate in STRENGTHS:  # strongest first, each fit starting from the one before
            head = _fit(train[kept], labels[kept], classes, candidate, head)
            scores[candidate] = _accuracy(head, train[held], labels[held])
        strength = max(scores, key=scores.__getitem__)
    return _accuracy(_fit(train, labels, classes, strength, head), test, truth)


def _fit(x: Tensor, y: Tensor, classes: int, strength: float, start: nn.Linear | None = None) -> nn.Linear:
    """Minimise cross-entropy + strength / 2 ‖weight‖² over (x, y) from `start`, or from zero."""
    head = nn.Linear(x.shape[1], classes)
    if start is None:
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    else:
        head.load_state_dict(start.state_dict())
    solver = torch.optim.LBFGS(head.parameters(), max_iter=50, tolerance_change=1e-6, line_search_fn="strong_wolfe")

    def closure():
        solver.zero_grad()
        loss = F.cross_entropy(head(x), y) + strength / 2 * head.weight.square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    return head


@torch.no_grad()
def _accuracy(head: nn.Module, x: Tensor, y: Tensor) -> float:
    return (head(x).argmax(1) == y).float().mean().item()


def few_labels(train: Tensor, labels: Tensor, test: Tensor, truth: Tensor, share: float, draws: int = 5):
    """Mean and standard deviation of the linear probe over draws of `share` of the labels, at least one a class."""
    accuracies = []
    for draw in range(draws):
        chosen = draw_labels(labels, share, draw)
        accuracies.append(linear_probe(train[chosen], labels[chosen], test, truth))
    accuracies = torch.tensor(accuracies)
    return accuracies.mean().item(), accuracies.std().item()


def draw_labels(labels: Tensor, share: float, draw: int) -> Tensor:
    """Indices of `share` of each class of labels (N,), of one image at least; another draw gives others."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(draw))
    members = [order[labels[order] == c] for c in labels.unique()]
    return torch.cat([m[: max(1, round(share * len(m)))] for m in members])


def mixup(views: Tensor, labels: Tensor, classes: int, alpha: float) -> tuple[Tensor, Tensor]:
    """Mixed views share x + (1 - share) x_partner and their targets (B, classes), with the labels (B,) mixed alike.

    One share, of Beta(alpha, alpha), for the batch (arXiv 1710.09412). Cross-entropy is linear in its target, so that of
    the mixed target is the mixture of the two.
    """
    share = torch.distributions.Beta(alpha, alpha).sample().item()
    partner = torch.randperm(len(views), device=views.device)
    target = F.one_hot(labels, classes).to(views.dtype)  # (B, classes)
    return share * views + (1 - share) * views[partner], share * target + (1 - share) * target[partner]


def train_head(
    encoder: Encoder, dataset: Dataset, size: int, device, epochs: int, finetune: bool, seed: int = 0,
    alpha: float = 0.0, warmup: int = 0,
) -> float:  # fmt: skip
    """Train a linear classifier on augmented views (random crop and flip); with finetune the backbone too.

    SGD with momentum 0.9 and a cosine: learning rate 0.1, no weight decay for the head alone (backbone frozen, in
    evaluation mode); 0.03 and 5e-4 for fine-tuning. alpha is mixup's (0: off). For `warmup` epochs before, of fine-tuning
    alone, a ResNet's last stage and the classifier learn at 0.03 and the rest is frozen (S3L, arXiv 2103.13559).
    Returns the accuracy on the test images.
    """
    torch.manual_seed(seed)
    encoder = copy.deepcopy(encoder).to(device)
    classes = int(dataset.labelled.labels.max()) + 1
    norm = nn.BatchNorm1d(encoder.feature_dim, affine=False)  # standardises the features as `linear_probe` does
    head = nn.Sequential(norm, nn.Linear(encoder.feature_dim, classes)).to(device)
    parameters = [*head.parameters()] + ([*encoder.backbone.parameters()] if finetune else [])
    lr, decay = (0.03, 5e-4) if finetune else (0.1, 0.0)
    optimizer = torch.optim.SGD(parameters, lr, 0.9, weight_decay=decay)
    count, labels = len(dataset.labelled), dataset.labelled.labels.to(device)
    batch = min(128, count)
    per_epoch = count // batch
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * per_epoch)
    augment = Augment(size, jitter_p=0, gray_p=0)
    encoder.train(finetune)
    head.train()
    rest = [module for stage, module in encoder.backbone.named_children() if stage != "layer4"] if warmup else []
    name, total = "fine-tuning" if finetune else "linear, augmented", (warmup + epochs) * per_epoch * batch
    with tqdm(total=total, desc=name, unit=" images", unit_scale=True, leave=False) as bar:
        for epoch in range(warmup + epochs):
            for module in rest:  # in evaluation mode too: BatchNorm's statistics are part of what is frozen
                module.requires_grad_(epoch >= warmup).train(epoch >= warmup)
            for pixels, index in dataset.labelled.batches(torch.randperm(count)[: per_epoch * batch], batch, device):
                views, target = augment(pixels), labels[index]
                if alpha:
                    views, target = mixup(views, target, classes, alpha)
                with torch.set_grad_enabled(finetune):
                    features = encoder.features(views)  # (B, F)
                loss = F.cross_entropy(head(features), target)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if epoch >= warmup:
                    schedule.step()
                bar.update(batch)
    head.eval()
    features = extract(encoder, dataset.test, size, device).to(device)
    return _accuracy(head, features, dataset.test.labels.to(device))
