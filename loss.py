"""The two losses of arXiv 2404.19289: instance discrimination (NCE) and SqrtKL, self-distillation.

"NCE" is the papers' name; it is a full softmax, not noise-contrastive estimation.
Both losses take one matrix: the cosine similarities s (B, N) of the batch's embeddings z_i with the
bank's rows w_j, or (B, M) with M sampled rows. The gradient with respect to s stands as a comment
next to each loss, and a test compares it with autograd in float64 (tests/test_loss.py). From s
autograd reaches the encoder, through ds_ij/dz_i = w_j. It does not reach the bank: with
ds_ij/dw_j = z_i, `bank.MemoryBank.update` takes that step by hand.
"""

import torch.nn.functional as F
from torch import Tensor

DIRECTIONS = ("p||u", "u||p")


def nce(similarity: Tensor, target: Tensor, temperature: float, weight: Tensor | None = None) -> Tensor:
    """Non-parametric instance discrimination: every image is a class of its own.

    similarity (B, N) holds cosines. target is (B,) long, the column of each image's own row, or
    (B, N) shares that sum to 1 (CutMix). temperature is tau > 0. weight (B,) says how much each
    view counts (None: all alike). Returns the weighted mean over the batch, in nats:
    -1/B Σ_i log P_{i, y_i}. Raises ValueError for tau <= 0. Source: NPID (arXiv 1805.01978) eq. 2
    with a full softmax; "L_NCE" of arXiv 2404.19289.
    """
    _check_temperature(temperature)
    # P = softmax(s / tau), and t is the target as shares (one-hot for a column number):
    #     dL/ds_ij = (P_ij - t_ij) / (B tau)
    return _mean(F.cross_entropy(similarity / temperature, target, reduction="none"), weight)


def sqrt_kl(similarity: Tensor, temperature=1.0, direction="p||u", detach=True, weight: Tensor | None = None) -> Tensor:
    """SqrtKL: the divergence of the prediction P from u = sqrt(P) / Σ sqrt(P), its flattened copy.

    similarity (B, N) holds cosines. temperature is the T in P = softmax(s / T); the released code
    uses T = 1, not tau. direction is "p||u" for KL(P‖u) or "u||p" for KL(u‖P). detach holds u
    constant, like a teacher. weight (B,) says how much each view counts. Returns the weighted mean
    over the batch, in nats. Raises ValueError for T <= 0 or an unknown direction. Source:
    "L_SqrtKL" of arXiv 2404.19289.
    """
    _check_temperature(temperature)
    if direction not in DIRECTIONS:
        raise ValueError(f"direction is one of {', '.join(DIRECTIONS)}, not {direction!r}")
    a = similarity / temperature  # (B, N)
    log_p = F.log_softmax(a, dim=1)  # (B, N)
    # The square root of a softmax, normalised, is a softmax at twice the temperature.
    log_u = F.log_softmax(a / 2, dim=1)  # (B, N)
    if detach:
        log_u = log_u.detach()
    # Gradients for one view, with H(P) = -Σ_j P_j log P_j and Q = KL(u‖P):
    #     KL(P‖u), u constant:  dL/da_k = P_k (log P_k + H(P)) / 2   half the gradient of -H(P)
    #     KL(u‖P), u constant:  dL/da_k = P_k - u_k
    #     If u moves add (u_k - P_k) / 2 to the first, u_k (log u_k - log P_k - Q) / 2 to the other.
    # The batch mean divides these by B, and dL/ds = dL/da / T. Every column gets a gradient.
    first, second = (log_p, log_u) if direction == "p||u" else (log_u, log_p)
    return _mean((first.exp() * (first - second)).sum(1), weight)


def _mean(losses: Tensor, weight: Tensor | None) -> Tensor:  # (B,) -> ()
    return losses.mean() if weight is None else (weight * losses).sum() / weight.sum()


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"a temperature must be greater than 0, not {temperature}")
