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


def orthogonalise(matrices: list[Tensor], steps: int = 5) -> list[Tensor]:
    """About U V' for each of the matrices U S V' (R, C), by Newton-Schulz iterations.

    An iteration is X <- (a + b X X' + c (X X')^2) X. All its factors are polynomials of the Gram
    matrix G = X X' and commute, so their product is built up on G and applied to X once. Gram
    matrices of one size are multiplied together, because each call costs time.
    """
    wide = [x.mT if x.shape[0] > x.shape[1] else x for x in matrices]
    wide = [x / x.norm().clamp(min=1e-7) for x in wide]
    sizes: dict[int, list[int]] = {}
    for i, x in enumerate(wide):
        sizes.setdefault(len(x), []).append(i)
    for places in sizes.values():
        products = newton_schulz(torch.stack([wide[i] @ wide[i].mT for i in places]), steps)  # (M, R, R)
        for i, product in zip(places, products):
            wide[i] = product @ wide[i]
    return [x.mT if m.shape[0] > m.shape[1] else x for m, x in zip(matrices, wide)]


def newton_schulz(gram: Tensor, steps: int) -> Tensor:  # (M, R, R) -> (M, R, R)
    """The product of the factors of `steps` iterations, from the Gram matrices."""
    a, b, c = QUINTIC
    product = None
    for i in range(steps):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor if product is None else torch.bmm(product, factor)
        if i < steps - 1:
            gram = torch.bmm(torch.bmm(gram, factor), factor)  # the Gram matrix of factor X
    return product


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum for matrices, SGD with momentum for biases and BatchNorm.

    A convolution's weights are the matrix (out, in k k). A matrix of R rows and C columns moves at
    the rate lr max(1, R / C)^1/2 with decoupled weight decay (lr weight_decay per step), the other
    parameters at the rate 2 lr without weight decay. The filters of a depthwise convolution,
    (out, 1, k, k), are no matrix, because each filter has an input of its own: they move by SGD.
    """

    def __init__(self, parameters, lr=0.05, momentum=0.6, weight_decay=0.0, sgd_momentum=0.9, steps=5):
        parameters = list(parameters)
        matrices = {"params": [p for p in parameters if is_matrix(p)], "momentum": momentum, "factor": 1.0}
        vectors = {"params": [p for p in parameters if not is_matrix(p)], "momentum": sgd_momentum, "factor": 2.0}
        super().__init__([matrices, vectors], {"lr": lr, "weight_decay": weight_decay, "steps": steps})
        set_rate(self, lr)

    @torch.no_grad()
    def step(self) -> None:
        matrices, vectors = self.param_groups
        params, grads, buffers = self._moving(vectors)
        if params:  # a call for all of them: on a GPU each call costs time
            torch._foreach_mul_(buffers, vectors["momentum"])
            torch._foreach_add_(buffers, grads)
            torch._foreach_add_(params, buffers, alpha=-vectors["lr"])
        params, grads, buffers = self._moving(matrices)
        if params:
            torch._foreach_lerp_(buffers, grads, 1 - matrices["momentum"])
            nesterov = torch._foreach_lerp(grads, buffers, matrices["momentum"])
            directions = orthogonalise([g.flatten(1) for g in nesterov], matrices["steps"])
            directions = [d * max(1, d.shape[0] / d.shape[1]) ** 0.5 for d in directions]
            torch._foreach_mul_(params, 1 - matrices["lr"] * matrices["weight_decay"])
            torch._foreach_add_(params, [d.view(p.shape) for p, d in zip(params, directions)], alpha=-matrices["lr"])

    def _moving(self, group) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Parameters with a gradient, their gradients and their momentum buffers."""
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return params, [p.grad for p in params], [self.state[p]["momentum_buffer"] for p in params]


def is_matrix(parameter: Tensor) -> bool:
    """Whether Muon orthogonalises the parameter's steps."""
    depthwise = parameter.ndim == 4 and parameter.shape[1] == 1
    return parameter.ndim > 1 and not depthwise


def optimizer_of(config, parameters) -> torch.optim.Optimizer:
    """The optimiser that config asks for: --optimizer sgd or muon."""
    if config.optimizer == "muon":
        return Muon(parameters, config.lr, config.muon_momentum, config.weight_decay, config.sgd_momentum)
    return torch.optim.SGD(parameters, config.lr, config.sgd_momentum, weight_decay=config.weight_decay)


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group, times the group's own factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("factor", 1.0)
