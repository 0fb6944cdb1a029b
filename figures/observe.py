"""What a run is watched for: its bank's spectrum, and which rows the gradient of a view reaches."""

import copy
from dataclasses import asdict

import torch
from torch import Tensor

from data import shuffled, windows
from eval_linear import knn_monitor
from loss import nce, sqrt_kl
from plumbing.features import random_images
from plumbing.files import Dataset
from plumbing.quality import perplexity
from train import Config, Pretraining

RANKS = (1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 91, 128, 181, 256, 362, 512, 724, 1024, 1448, 2048)


@torch.no_grad()
def spectrum(weight: Tensor) -> Tensor:
    """Shares (min(N, D),) of the bank's variance along its principal axes, largest first.

    The squared singular values of W (N, D) minus its mean row, divided by their sum. They are the
    eigenvalues of the Cov(W) in L_SqrtKL ≈ Var_j(s_j) / 8 = z' Cov(W) z / 8, which holds where P is
    nearly uniform.
    """
    centred = (weight - weight.mean(0)).double()
    gram = centred.T @ centred if len(weight) > weight.shape[1] else centred @ centred.T  # the smaller: far cheaper
    squared = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)
    return squared / squared.sum()


def reach(similarity: Tensor, target: Tensor, config: Config) -> tuple[float, float]:
    """How the gradient with respect to a view's similarities (N,) falls on rows of other images.

    Returns the share of the gradient that falls on them, and the number of them that it is spread
    over (perplexity), as means over the views of similarity (B, N). For L_NCE alone the share is
    exactly 1/2: the pushes P_k / tau add up to the pull (1 - P_y) / tau.
    """
    similarity = similarity.detach().double().requires_grad_()
    loss = nce(similarity, target, config.temperature)
    if config.lam:
        loss = loss + config.lam * sqrt_kl(similarity, config.kl_temperature)
    (gradient,) = torch.autograd.grad(loss, similarity)
    total = gradient.abs().sum(1)  # (B,)
    others = gradient.abs().scatter(1, target[:, None], 0.0)  # (B, N)
    pushed = others.sum(1)  # (B,)
    return (pushed / total).mean().item(), perplexity(others / pushed[:, None]).mean().item()


def fitted_temperature(z: Tensor, target: Tensor, rows: Tensor, config: Config) -> dict:
    """The tau' at which NCE alone has the gradient of NCE with SqrtKL; see docs/derivations.md, 10.

    z (B, D) are unit vectors of B views, rows (N, D) the bank's, target (B,) the views' own rows.
    Compared are the gradients that reach the encoder: those with respect to z, at a right angle to
    z. "tau" has the largest mean cosine over the views, among 61 values from a quarter of tau to
    twice tau. "tau_cosine" is that cosine, "tau_length" the ratio of lengths, and "tau_before" the
    cosine with NCE's gradient at tau itself.
    """
    both = _pull(z, target, rows, config.temperature, config)  # (B, D)

    def fit(tau: float) -> tuple[float, float, float]:
        alone = _pull(z, target, rows, tau)
        length = (both.norm(dim=1) / alone.norm(dim=1)).mean().item()
        return torch.cosine_similarity(both, alone).mean().item(), tau, length

    cosine, tau, length = max(fit(factor * config.temperature) for factor in torch.logspace(-2, 1, 61, base=2).tolist())
    before, *_ = fit(config.temperature)
    cosines = {"tau_cosine": round(cosine, 5), "tau_before": round(before, 5)}
    return {"tau": round(tau, 4), "tau_length": round(length, 3)} | cosines


def _pull(z: Tensor, target: Tensor, rows: Tensor, temperature: float, config: Config | None = None) -> Tensor:
    """The gradient (B, D) of NCE, with SqrtKL if config is given: what is at a right angle to z."""
    z = z.detach().float().requires_grad_()
    similarity = z @ rows.float().T  # (B, N)
    loss = nce(similarity, target, temperature)
    if config:
        loss = loss + config.lam * sqrt_kl(similarity, config.kl_temperature)
    (gradient,) = torch.autograd.grad(loss, z)
    return gradient - (gradient * z.detach()).sum(1, keepdim=True) * z.detach()


def last_pulls(config: Config, count: int, step: int) -> Tensor:
    """The steps (N,) done when each image last pulled its row, after `step` steps; -1: never.

    An image that enters the window pulls when its row is made by the forward pass.
    """
    last, batch, rows = torch.full((count,), -1), config.batch_size, config.rows(count)
    per_pass = rows // batch
    for number, images, entering in windows(count, rows, min(config.visits, config.epochs), config.seed):
        before = number * per_pass
        if before >= step:
            return last
        last[entering] = before
        order = shuffled(images, config.seed, "epoch", number)[: per_pass * batch].view(per_pass, batch)
        done = order[: step - before]
        last[done] = before + 1 + torch.arange(len(done))[:, None]


@torch.no_grad()
def ageing(run: Pretraining, dataset: Dataset, step: int, views: int = 512, bins: int = 8) -> dict:
    """How far rows are from their images' fresh embeddings, against the steps since the last pull.

    Returns "ageing", `bins` pairs of mean age and mean cosine, youngest first, and "two_views", the
    mean cosine of two fresh views of an image, which a row can hardly exceed.
    """
    config, encoder = run.config, copy.deepcopy(run.encoder).train()  # a copy: BatchNorm must not see these views
    last = last_pulls(config, len(dataset.train), step)
    known = (last >= 0).nonzero()[:, 0] if run.bank.images is None else run.bank.images.cpu()
    torch.manual_seed(0)
    index = known[torch.randperm(len(known))[:views]]
    z = [[], []]
    for pixels, _ in dataset.train.batches(index, min(config.batch_size, len(index)), run.device):
        for views_of in z:
            views_of.append(encoder(run.augment(pixels)).float())  # (B, D)
    first, second = map(torch.cat, z)
    rows = run.bank.weight[run.bank.locate(index.to(run.device))].float()
    cosine, age = (first * rows).sum(1).cpu(), step - last[index]
    order = age.argsort(stable=True)
    pairs = [
        [round(age[group].double().mean().item(), 1), round(cosine[group].mean().item(), 4)]
        for group in order.chunk(bins)
    ]
    return {"ageing": pairs, "two_views": round((first * second).sum(1).mean().item(), 4)}


class Watch:
    """The `watch` of `train`: returns the epoch's spectrum and reach.

    Every `looks` epochs it adds the kNN accuracy (k = 200) on all test images, which is far less
    noisy than the run's own look at 1 000 of them, how rows age, and the temperature that SqrtKL
    acts as.
    """

    def __init__(self, looks: int = 0, views: int = 256):
        self.looks, self.views = looks, views

    def __call__(self, run, dataset: Dataset, epoch: int) -> dict:
        due = self.looks and epoch % self.looks == 0
        row = self.bank(run, dataset, due) if isinstance(run, Pretraining) else {}
        if due and isinstance(run, Pretraining):
            step = epoch * (len(dataset.train) // run.config.batch_size)
            row |= ageing(run, dataset, step)
        if due and dataset.labelled and dataset.test:
            every = len(dataset.labelled), len(dataset.test)
            row["knn"] = knn_monitor(run.encoder, dataset, asdict(run.config), run.device, k=200, most=every)
        return row

    def bank(self, run: Pretraining, dataset: Dataset, due: bool = False) -> dict:
        index = random_images(dataset.train, self.views)
        if run.bank.images is not None:  # of the images in the window: those that entered last
            index = run.bank.images[-self.views :].cpu()
        pixels, index = next(dataset.train.batches(index, len(index), run.device))
        torch.manual_seed(0)  # the same views every time; the next training step seeds anew
        run.encoder.eval()
        with torch.no_grad():
            z = run.encoder(run.augment(pixels)).float()  # (B, D)
            similarity = run.bank.similarity(z)  # (B, N)
        run.encoder.train()
        own = run.bank.locate(index)
        shares = spectrum(run.bank.weight)
        row = dict(
            zip(
                ("reach_share", "reach_rows"),
                (round(x, 4) for x in reach(similarity, own, run.config)),
            )
        )
        if due and run.config.lam:
            row |= fitted_temperature(z[:64], own[:64], run.bank.weight, run.config)
        row["rank"] = round(perplexity(shares).item(), 2)
        row["spectrum"] = [float(f"{shares[r - 1]:.3g}") for r in RANKS if r <= len(shares)]
        row["variance"] = round(1 - run.bank.weight.mean(0).square().sum().item(), 4)
        return row
