"""Several processes: `torchrun --nproc-per-node=N -m lab.train …` makes the run of a single one.

Every process draws the same numbers, so all know the whole batch: its indices, views and negatives.
Each sends its share of the views through the network. `Gathered` puts the outputs together again,
so that every process has the whole z, the whole loss, and moves its bank alike.
DistributedDataParallel averages the gradients; BatchNorm sees the whole batch. --batch-size counts
the images of all processes together. The run equals the run of a single process up to rounding, and
can be resumed with another number of processes.

With --shard-bank a process holds 1/N of the bank's rows (`rows`), and the sums under the softmax
are added over processes (lab/large_bank.py).
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn

from plumbing.command_line import UserError
from plumbing.runs import Journal, SignalCatcher

GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def grouped() -> bool:
    """Whether torchrun started this process as one of several."""
    return all(name in os.environ for name in GROUP) and os.environ["WORLD_SIZE"] != "1"


def start(device: torch.device) -> torch.device:
    """Join the group that torchrun has made, if there is one; returns this process's device."""
    present = [name for name in GROUP if name in os.environ]
    if present and not grouped() and {os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK", "0")} != {"0", "1"}:
        raise UserError(f"{' and '.join(present)} is set, but torchrun did not start this process: unset it")
    if grouped() and not dist.is_initialized():
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


def number() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def first() -> bool:
    """Whether this is the process that prints and writes."""
    return not grouped() or int(os.environ["RANK"]) == 0


def check_batch(batch: int) -> None:
    """Raises UserError unless the processes can share out a batch.

    Before `start`: a process that leaves while others join leaves them with an error of torch's.
    """
    processes = os.environ["WORLD_SIZE"] if grouped() else "1"
    if processes.isdigit() and int(processes) and batch % int(processes):
        raise UserError(f"--batch-size {batch} cannot be shared out evenly among {processes} processes")


def share_of(batch: int) -> slice:
    """The places of a batch whose views this process sends through the network."""
    share = batch // count()
    return slice(number() * share, (number() + 1) * share)


def total(x: Tensor) -> Tensor:
    """The sum over processes, in the place of x."""
    if count() > 1:
        dist.all_reduce(x)
    return x


def largest(x: Tensor) -> Tensor:
    """The elementwise maximum over processes, in the place of x."""
    if count() > 1:
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x


def rows(size: int) -> range:
    """The rows of a bank of that size that this process holds under --shard-bank."""
    share = -(-size // count())
    return range(min(size, number() * share), min(size, (number() + 1) * share))


def collect(weight: Tensor, size: int) -> Tensor | None:
    """The whole bank (size, D) on the CPU of the first process; None on the others."""
    share, shares = -(-size // count()), []
    for rank in range(count()):
        piece = weight.new_zeros(max(0, min(share, size - rank * share)), weight.shape[1])
        if rank == number():
            piece = weight.clone()
        if count() > 1:
            dist.broadcast(piece, rank)
        shares += [piece.cpu()] if first() else []
    return torch.cat(shares) if first() else None


class SharedStop(SignalCatcher):
    """A signal that one process has seen stops all of them, after the same step."""

    def __init__(self, device: torch.device):
        self.device, self.own = device, 0

    @property
    def signal(self) -> int:
        return int(largest(torch.tensor(self.own, device=self.device)))

    @signal.setter
    def signal(self, value: int) -> None:
        self.own = value


class QuietJournal(Journal):
    """The journal of all processes but the first: it counts, but evaluates and writes nothing."""

    quiet = True

    def epoch_ends(self, look) -> None:
        super().epoch_ends(dict)


class _Gather(torch.autograd.Function):
    """The shares (B / R, D) of all R processes as one (B, D).

    Every process computes the same loss of the whole batch. DistributedDataParallel averages the
    gradients of R processes, of which each has only its own share, so a share counts R times.
    """

    @staticmethod
    def forward(ctx, z):
        pieces = [torch.empty_like(z) for _ in range(count())]
        dist.all_gather(pieces, z.contiguous())
        ctx.size = len(z)
        return torch.cat(pieces)

    @staticmethod
    def backward(ctx, grad):
        return count() * grad[number() * ctx.size : (number() + 1) * ctx.size]


class Gathered:
    """A network for a whole batch, of which each process computes its share.

    Takes views (B, 3, H, W), or a list of V of them, and gives z (B, D), or (V B, D) view after
    view. The network is joined with that of the other processes at the first batch of training: the
    bank's first pass, which every process makes alone, is that of a single process.
    """

    def __init__(self, network: nn.Module, device: torch.device):
        self.network, self.device, self.joined = network, device, None

    def __call__(self, views: Tensor | list[Tensor]) -> Tensor:
        self.joined = self.joined or joined(self.network, self.device)
        if isinstance(views, Tensor):
            return _Gather.apply(self.joined(views[share_of(len(views))]))
        z = self.joined([view[share_of(len(view))] for view in views])  # (V B / R, D)
        z = _Gather.apply(z).unflatten(0, (count(), len(views), -1))  # (R, V, B / R, D)
        return z.transpose(0, 1).flatten(0, 2)


def joined(network: nn.Module, device: torch.device) -> nn.Module:
    """network with BatchNorm over all processes and averaged gradients."""
    if device.type == "cuda":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    else:
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.__class__ = _BatchNormOverRanks
    return nn.parallel.DistributedDataParallel(network)


class _Sum(torch.autograd.Function):
    """The sum over processes; gradients are summed too, since each share acts on the whole loss."""

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
    """nn.SyncBatchNorm for a CPU: mean and variance of the whole batch, with their gradient."""

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
