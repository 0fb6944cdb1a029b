"""The two losses of arXiv 2404.19289: instance discrimination (NCE) and self-distillation towards one's own square root.

Both read one matrix, the cosine similarities s (B, N) between the batch's embeddings z_i and the bank's rows w_j.
Beside each loss stands its gradient with respect to s; `tests/test_loss.py` compares every one with autograd in float64.
From s the gradient reaches the encoder through ds_ij/dz_i = w_j, and the bank through ds_ij/dw_j = z_i (see `bank.py`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import ranks

DIRECTIONS = ("p||u", "u||p")


def nce(similarity: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Non-parametric instance discrimination: every image is a class of its own.

    similarity (B, N) cosine; target (B,) long, the column of each image's own row, or (B, N) weights that sum to 1
    (CutMix); temperature is tau > 0. Returns the mean over the batch, in nats: -1/B Σ_i log P_{y_i}. Raises ValueError
    for tau <= 0. Source: NPID (arXiv 1805.01978) eq. 2 with a full softmax; "L_NCE" of arXiv 2404.19289.
    """
    _check_temperature(temperature)
    # P = softmax(s / tau) and t the target's weights (one-hot for an index):
    #     dL/ds_ij = (P_ij - t_ij) / (B tau)
    return F.cross_entropy(similarity / temperature, target)


def sqrt_kl(
    similarity: Tensor, temperature: float = 1.0, direction: str = "p||u", detach: bool = True, power: float = 0.5
) -> Tensor:
    """SqrtKL: the distance between the prediction P and u = sqrt(P) / Σ sqrt(P), its own flattened copy.

    similarity (B, N) cosine; temperature is the T in P = softmax(s / T) (the released code uses T = 1, not tau);
    direction "p||u" for KL(P‖u) or "u||p" for KL(u‖P); detach holds u constant, as a teacher; power is the exponent of P
    in u, 1/2 for the square root. Returns the mean over the batch, in nats. Raises ValueError for T <= 0 or another
    direction. Source: "L_SqrtKL" of arXiv 2404.19289.
    """
    _check_temperature(temperature)
    if direction not in DIRECTIONS:
        raise ValueError(f"direction is one of {', '.join(DIRECTIONS)}, not {direction!r}")
    a = similarity / temperature  # (B, N)
    log_p = F.log_softmax(a, dim=1)  # (B, N)
    log_u = F.log_softmax(power * a, dim=1)  # (B, N)  the square root of a softmax: a softmax at twice the temperature
    if detach:
        log_u = log_u.detach()
    # Gradients for one row, with H(P) = -Σ_j P_j log P_j, K = KL(u‖P) = Σ_j u_j (log u_j - log P_j), and power 1/2:
    #     KL(P‖u), u held:  dL/da_k = P_k (log P_k + H(P)) / 2      half the gradient of negative entropy
    #     KL(u‖P), u held:  dL/da_k = P_k - u_k
    #     Letting u move adds (u_k - P_k) / 2 to the first and u_k (log u_k - log P_k - K) / 2 to the second.
    # For another power q, the 1/2 of the first line is 1 - q and those of the last are q. The batch mean divides by B, and
    # s = T a by T. No k is left out: every row is pushed in every step.
    if direction == "p||u":
        return (log_p.exp() * (log_p - log_u)).sum(1).mean()
    return (log_u.exp() * (log_u - log_p)).sum(1).mean()


# ------------------------------------------------------------------------------------------- the same, without B x N


def streaming_loss(
    z: Tensor,
    weight: Tensor,
    index: Tensor,
    temperature: float,
    lam: float = 0.0,
    kl_temperature: float = 1.0,
    chunk: int = 8192,
) -> Tensor:
    """nce + lam * sqrt_kl over the whole bank, `chunk` rows at a time: the same value and gradient, no (B, N) matrix.

    z (B, D) unit embeddings, to which the gradient flows; weight (N, D) the bank's rows; index (B,) the images' own rows.
    SqrtKL is KL(P‖u) with u held constant. Returns the mean over the batch, in nats. Raises ValueError for a temperature
    or a chunk that is not positive.
    """
    l_nce, l_kl, _ = streaming_losses(z, weight, index, temperature, kl_temperature if lam else None, chunk)
    return l_nce + lam * l_kl


def streaming_losses(
    z: Tensor,
    weight: Tensor,
    index: Tensor,
    temperature: float,
    kl_temperature: float | None,
    chunk: int = 8192,
    first: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """L_NCE, L_SqrtKL (0 if kl_temperature is None) and log Σ_j exp(s_ij / tau) (B,), which `bank.update` can use.

    With first, weight is this rank's part of a bank that is split over ranks, and first the number of its first row; z and
    index are this rank's part of the batch, to which the losses belong, and log_total is that of the whole batch.
    """
    _check_temperature(temperature)
    _check_temperature(1.0 if kl_temperature is None else kl_temperature)
    if chunk < 1:
        raise ValueError(f"chunk must be at least one row, not {chunk}")
    return _Streaming.apply(z, weight, index, temperature, kl_temperature, chunk, first)


class _Streaming(torch.autograd.Function):
    """Both losses and their gradients with respect to z, from one pass over the bank.

    With a = s / T and E the mean under P = softmax(a), everything needed is a mean under a softmax, and such a mean can be
    taken chunk by chunk:
        L_NCE    = logsumexp(a) - a_y                             dL_NCE/dz    = (E[w] - w_y) / tau
        KL(P‖u)  = E[a] / 2 - logsumexp(a) + logsumexp(a / 2)     dKL(P‖u)/dz  = (E[a w] - E[a] E[w]) / (2 T)
    The last is half the covariance of a and w under P: P_k (log P_k + H(P)) / 2 = P_k (a_k - E[a]) / 2, summed over w_k.
    """

    @staticmethod
    def forward(ctx, z, weight, index, temperature, kl_temperature, chunk, first):
        split, batch, mine, kl = first is not None, len(z), slice(None), kl_temperature is not None
        if split:
            z, index = ranks.gather(z), ranks.gather(index)  # of the whole batch
            mine = ranks.part(len(z))
        own = _own_rows(z, weight, index, first)  # (B, D)  w_y
        nce_mean, kl_mean, root = _Mean(), _Mean(), _Mean()
        for rows in weight.split(chunk):  # (C, D)
            rows = rows.to(z.dtype)
            s = z @ rows.T  # (B, C)
            nce_mean.add(s / temperature, rows)
            if kl:
                a = s / kl_temperature
                kl_mean.add(a, rows, twice=True)
                root.add(a / 2)
        if split:
            for mean in (nce_mean, kl_mean, root) if kl else (nce_mean,):
                mean.over_ranks()
        l_nce = (nce_mean.logsumexp() - (z * own).sum(1) / temperature)[mine].mean()
        grad_nce = (nce_mean.of_rows() - own)[mine] / (temperature * batch)  # (B, D)
        l_kl, grad_kl = z.new_zeros(()), torch.zeros_like(z[mine]) if kl else None
        if kl:
            e_a = kl_mean.of_logits()  # (B,)
            l_kl = (e_a / 2 - kl_mean.logsumexp() + root.logsumexp())[mine].mean()
            covariance = kl_mean.of_both() - e_a[:, None] * kl_mean.of_rows()  # (B, D)
            grad_kl = covariance[mine] / (2 * kl_temperature * batch)
        ctx.save_for_backward(grad_nce, grad_kl)
        log_total = nce_mean.logsumexp()
        ctx.mark_non_differentiable(log_total)
        return l_nce, l_kl, log_total

    @staticmethod
    def backward(ctx, up_nce, up_kl, _):
        grad_nce, grad_kl = ctx.saved_tensors
        grad = up_nce * grad_nce if grad_kl is None else up_nce * grad_nce + up_kl * grad_kl
        return grad, None, None, None, None, None, None


def _own_rows(z: Tensor, weight: Tensor, index: Tensor, first: int | None) -> Tensor:
    """w_y for every image of the batch (B, D), from this rank's rows and, if the bank is split, from those of the others."""
    if first is None:
        return weight[index].to(z.dtype)
    here = (index >= first) & (index < first + len(weight))
    own = torch.zeros_like(z)
    own[here] = weight[index[here] - first].to(z.dtype)
    return ranks.total(own)


class _Mean:
    """Means under softmax(a), fed with chunks of logits a (B, C) and the rows w (C, D) that they belong to.

    Sums are held relative to the largest logit so far and scaled down when a larger one comes, so nothing overflows.
    """

    def __init__(self):
        self.top = self.sums = None

    def add(self, a: Tensor, rows: Tensor | None = None, twice: bool = False) -> None:
        top = a.amax(1) if self.top is None else torch.maximum(self.top, a.amax(1))  # (B,)
        p = (a - top[:, None]).exp()  # (B, C)
        sums = [p.sum(1, keepdim=True)]  # (B, 1)
        if rows is not None:
            sums.append(p @ rows)  # (B, D)
        if twice:
            p *= a
            sums += [p.sum(1, keepdim=True), p @ rows]
        if self.top is not None:
            scale = (self.top - top).exp()[:, None]
            sums = [new.addcmul_(old, scale) for new, old in zip(sums, self.sums)]
        self.top, self.sums = top, sums

    def over_ranks(self) -> None:
        """Join the sums of ranks that were each fed with other rows."""
        top = ranks.largest(self.top.clone())
        scale = (self.top - top).exp()[:, None]
        self.top, self.sums = top, [ranks.total(part * scale) for part in self.sums]

    def logsumexp(self) -> Tensor:  # (B,)
        return self.top + self.sums[0][:, 0].log()

    def of_rows(self) -> Tensor:  # (B, D)  E[w]
        return self.sums[1] / self.sums[0]

    def of_logits(self) -> Tensor:  # (B,)  E[a]
        return (self.sums[2] / self.sums[0])[:, 0]

    def of_both(self) -> Tensor:  # (B, D)  E[a w]
        return self.sums[3] / self.sums[0]


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"a temperature must be greater than 0, not {temperature}")
