"""The two losses of arXiv 2404.19289: instance discrimination (NCE) and self-distillation towards one's own square root.

Both read one matrix, the cosine similarities s (B, N) between the batch's embeddings z_i and the bank's rows w_j.
Beside each loss stands its gradient with respect to s; `tests/test_loss.py` compares every one with autograd in float64.
From s the gradient reaches the encoder through ds_ij/dz_i = w_j, and the bank through ds_ij/dw_j = z_i (see `bank.py`).
"""

import torch.nn.functional as F
from torch import Tensor

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
    # For another power q, the 1/2 of the first line is 1 - q and those of the last are q. The batch mean divides by B, and s = T a by T. No k is left out: every row is pushed in every step.
    if direction == "p||u":
        return (log_p.exp() * (log_p - log_u)).sum(1).mean()
    return (log_u.exp() * (log_u - log_p)).sum(1).mean()


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"a temperature must be greater than 0, not {temperature}")
