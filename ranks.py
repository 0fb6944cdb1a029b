"""More than one process: what `torchrun --nproc-per-node=N train.py …` adds to a step. With one process, nothing.

Every rank holds the whole bank and draws the same numbers, so all know the whole batch: its indices, views and negatives.
Each sends its part of the views through the network; DistributedDataParallel averages the gradients, BatchNorm sees the
whole batch, and z is gathered, so that every rank moves its bank alike. --batch-size is that of all ranks together: the
run is the one that a single process would make, but for rounding, and can be resumed with another number of ranks.

With --shard-bank a rank holds 1/ranks of the rows instead (`rows`). It then reads its rows with the z of the whole batch,
and the sums under the softmax are added over ranks (`loss._Mean.over_ranks`); a row is moved where it lies.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn

from images import UserError


def start(device: torch.device) -> torch.device:
    """Join the group that torchrun has made, if there is one; returns the device of this rank."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if count() > 1 and device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def first() -> bool:
    """Whether this is the rank that prints and writes."""
    return int(os.environ.get("RANK", 0)) == 0


def part(batch: int) -> slice:
    """The places of a batch whose views this rank sends through the network."""
    if count() == 1:
        return slice(None)
    if batch % count():
        raise UserError(f"--batch-size {batch} cannot be shared out evenly among {count()} processes")
    share = batch // count()
    return slice(dist.get_rank() * share, (dist.get_rank() + 1) * share)


def gather(x: Tensor | None) -> Tensor | None:
    """The parts (B / ranks, …) of all ranks in the order of the batch: (B, …). No gradient."""
    if count() == 1 or x is None:
        return x
    parts = [torch.empty_like(x) for _ in range(count())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def mean(x: Tensor) -> Tensor:
    """The mean over ranks, the same on each."""
    return total(x).div_(count())


def total(x: Tensor) -> Tensor:
    """The sum over ranks, the same on each, in the place of x."""
    if count() > 1:
        dist.all_reduce(x)
    return x


def largest(x: Tensor) -> Tensor:
    """The elementwise maximum over ranks, the same on each, in the place of x."""
    if count() > 1:
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x


def rows(size: int) -> range:
    """The rows of a bank of that size that this rank holds under --shard-bank."""
    share, rank = -(-size // count()), dist.get_rank() if count() > 1 else 0
    return range(min(size, rank * share), min(size, (rank + 1) * share))


def collect(weight: Tensor, size: int) -> Tensor | None:
    """The whole bank (size, D) on the CPU of the first rank, one rank's rows at a time; None on the others."""
    share, parts = -(-size // count()), []
    for rank in range(count()):
        part = weight.new_zeros(max(0, min(share, size - rank * share)), weight.shape[1])
        if rank == (dist.get_rank() if count() > 1 else 0):
            part = weight.clone()
        if count() > 1:
            dist.broadcast(part, rank)
        parts += [part.cpu()] if first() else []
    return torch.cat(parts) if first() else None


def any_of(flag: int, device: torch.device) -> int:
    """The largest flag of all ranks: a signal that one has seen stops all, after the same step."""
    if count() == 1:
        return flag
    shared = torch.tensor(flag, device=device)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return int(shared)


def wrap(encoder: nn.Module, device: torch.device) -> nn.Module:
    """The encoder for training: BatchNorm over all ranks, gradients averaged."""
    if count() == 1:
        return encoder
    if device.type == "cuda":
        encoder = nn.SyncBatchNorm.convert_sync_batchnorm(encoder)
        return nn.parallel.DistributedDataParallel(encoder, [device])
    for module in encoder.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.__class__ = _BatchNormOverRanks
    return nn.parallel.DistributedDataParallel(encoder)


class _Sum(torch.autograd.Function):
    """The sum over ranks. What reaches it from behind is summed as well: each rank's part acts on the losses of all."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad


class _BatchNormOverRanks(nn.modules.batchnorm._BatchNorm):
    """What nn.SyncBatchNorm is for CUDA: mean and variance of the whole batch, with their gradient. Equal parts."""

    def _check_input_dim(self, x):
        pass

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        over, shape = [0, *range(2, x.ndim)], [1, -1, *[1] * (x.ndim - 2)]
        centred = x.float()  # sums over the batch in float32, whatever the encoder computes in
        average = _Sum.apply(centred.mean(over)) / count()  # (C,)
        centred = centred - average.view(shape)
        variance = _Sum.apply(centred.square().mean(over)) / count()  # (C,)
        n = count() * x.numel() / x.shape[1]
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(average, self.momentum)
            self.running_var.lerp_(variance * n / (n - 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale.view(shape) + self.bias.view(shape)).to(x.dtype)
