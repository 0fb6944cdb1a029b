"""Muon: orthogonalised steps for weight matrices, SGD for all other parameters.

A step of SGD on a weight matrix has a few large singular values: the network moves in few
directions. Muon (K. Jordan et al. 2024; torch.optim.Muon) replaces the step U S V' by U V', so that
all directions of the gradient count alike. torch.optim.Muon multiplies in bf16. On a CPU without
bf16 that took 22 to 48 times as long as float32 (AMD Zen 3, 256 x 2304 and 512 x 512). This version
works in float32 on the Gram matrix. A test compares its steps with torch's.
"""

import torch
from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)  # a, b, c of a x + b x^3 + c x^5, as in torch.optim.Muon


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """About U V' for each of the matrices U S V' (M, R, C), by Newton-Schulz iterations.

    An iteration is X <- (a + b X X' + c (X X')^2) X. All its factors are polynomials of the Gram
    matrix G = X X' (M, R, R) and commute, so their product is built up on G and applied to X once.
    """
    a, b, c = QUINTIC
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]
    gram = x @ x.mT  # (M, R, R)
    product = None
    for i in range(steps):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor if product is None else product @ factor
        if i < steps - 1:
            gram = gram @ factor @ factor  # the Gram matrix of factor X
    x = product @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum for matrices, SGD with momentum for biases and BatchNorm.

    A convolution's weights are the matrix (out, in k k). A matrix of R rows and C columns moves at
    the rate lr max(1, R / C)^1/2 with decoupled weight decay (lr weight_decay per step), the other
    parameters at the rate 2 lr without weight decay.
    """

    def __init__(self, parameters, lr=0.05, momentum=0.6, weight_decay=0.0, sgd_momentum=0.9, steps=5):
        parameters = list(parameters)
        matrices = {"params": [p for p in parameters if p.ndim > 1], "momentum": momentum, "factor": 1.0}
        vectors = {"params": [p for p in parameters if p.ndim < 2], "momentum": sgd_momentum, "factor": 2.0}
        super().__init__([matrices, vectors], {"lr": lr, "weight_decay": weight_decay, "steps": steps})
        set_rate(self, lr)

    @torch.no_grad()
    def step(self) -> None:
        matrices, vectors = self.param_groups
        for p, buffer in self._buffers(vectors):
            p.sub_(buffer.mul_(vectors["momentum"]).add_(p.grad), alpha=vectors["lr"])
        shapes: dict[torch.Size, list] = {}
        for p, buffer in self._buffers(matrices):
            buffer.lerp_(p.grad, 1 - matrices["momentum"])
            shapes.setdefault(p.shape, []).append((p, p.grad.lerp(buffer, matrices["momentum"]).flatten(1)))
        for shape, pairs in shapes.items():  # matrices of one shape are orthogonalised together
            directions = orthogonalise(torch.stack([direction for _, direction in pairs]), matrices["steps"])
            rate = matrices["lr"] * max(1, directions.shape[1] / directions.shape[2]) ** 0.5
            for (p, _), direction in zip(pairs, directions):
                p.mul_(1 - matrices["lr"] * matrices["weight_decay"]).sub_(direction.view(shape), alpha=rate)

    def _buffers(self, group):
        """Parameters with a gradient, and their momentum buffers."""
        for p in group["params"]:
            if p.grad is not None:
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                yield p, state["momentum_buffer"]


def optimizer_of(config, parameters) -> torch.optim.Optimizer:
    """The optimiser that config asks for: --optimizer sgd or muon."""
    if config.optimizer == "muon":
        return Muon(parameters, config.lr, config.muon_momentum, config.weight_decay, config.sgd_momentum)
    return torch.optim.SGD(parameters, config.lr, config.sgd_momentum, weight_decay=config.weight_decay)


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group, times the group's own factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("factor", 1.0)
