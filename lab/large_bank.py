"""Banks of millions of rows: losses and update in chunks, rows in bf16, rows split over processes.

`streaming_losses` has the values and gradients of `loss.nce` and `loss.sqrt_kl` without a (B, N)
matrix. `LargeBank` keeps its rows in bf16 or a share of them. `Streamed` plugs both into the step.
"""

import torch
from torch import Tensor

from bank import MemoryBank, _add_product, _normalise
from lab import ranks
from loss import _check_temperature


def streaming_loss(
    z: Tensor, weight: Tensor, index: Tensor, temperature: float, lam: float = 0.0, kl_temperature: float = 1.0,
    chunk: int = 8192,
) -> Tensor:  # fmt: skip
    """nce + lam * sqrt_kl over the whole bank, `chunk` rows at a time: same value, same gradient.

    z (B, D) holds unit embeddings, to which the gradient flows; weight (N, D) the bank's rows;
    index (B,) the images' own rows. SqrtKL is KL(P‖u) with u constant. Returns the mean over the
    batch, in nats. Raises ValueError for a temperature or a chunk that is not positive.
    """
    l_nce, l_kl, _ = streaming_losses(z, weight, index, temperature, kl_temperature if lam else None, chunk)
    return l_nce + lam * l_kl


def streaming_losses(
    z: Tensor, weight: Tensor, index: Tensor, temperature: float, kl_temperature: float | None, chunk: int = 8192,
    first: int | None = None, omega: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """L_NCE, L_SqrtKL (0 if kl_temperature is None) and log Σ_j exp(s_ij / tau) (B,).

    `LargeBank.update` takes the last. omega (B,) says how much each view counts (None: all alike).
    With first, weight is this process's share of the rows and first the number of its first row.
    """
    _check_temperature(temperature)
    _check_temperature(1.0 if kl_temperature is None else kl_temperature)
    if chunk < 1:
        raise ValueError(f"chunk must be at least one row, not {chunk}")
    share = torch.full_like(z[:, 0], 1 / len(z)) if omega is None else omega / omega.sum()  # (B,)
    return _Streaming.apply(z, weight, index, share.detach(), (temperature, kl_temperature, chunk, first))


class _Streaming(torch.autograd.Function):
    """Both losses and their gradients with respect to z, from one pass over the bank.

    With a = s / T and E the mean under P = softmax(a), everything is a mean under a softmax, and
    such a mean can be taken chunk by chunk:
        L_NCE    = logsumexp(a) - a_y                          dL_NCE/dz    = (E[w] - w_y) / tau
        KL(P‖u)  = E[a] / 2 - logsumexp(a) + logsumexp(a / 2)
        dKL(P‖u)/dz  = (E[a w] - E[a] E[w]) / (2 T)
    The last line is half the covariance of a and w under P, from P_k (a_k - E[a]) / 2 times w_k.
    """

    @staticmethod
    def forward(ctx, z, weight, index, share, settings):
        temperature, kl_temperature, chunk, first = settings
        own = _own_rows(z, weight, index, first)  # (B, D)  w_y
        nce_mean, kl_mean, root = _Mean(), _Mean(), _Mean()
        for rows in weight.split(chunk):  # (C, D)
            rows = rows.to(z.dtype)
            s = z @ rows.T  # (B, C)
            nce_mean.add(s / temperature, rows)
            if kl_temperature:
                a = s / kl_temperature
                kl_mean.add(a, rows, twice=True)
                root.add(a / 2)
        if first is not None:
            for mean in (nce_mean, kl_mean, root) if kl_temperature else (nce_mean,):
                mean.over_ranks()
        log_total = nce_mean.logsumexp()  # (B,)
        l_nce = (share * (log_total - (z * own).sum(1) / temperature)).sum()
        grad_nce = share[:, None] * (nce_mean.of_rows() - own) / temperature  # (B, D)
        l_kl, grad_kl = z.new_zeros(()), None
        if kl_temperature:
            e_a = kl_mean.of_logits()  # (B,)
            l_kl = (share * (e_a / 2 - kl_mean.logsumexp() + root.logsumexp())).sum()
            covariance = kl_mean.of_both() - e_a[:, None] * kl_mean.of_rows()  # (B, D)
            grad_kl = share[:, None] * covariance / (2 * kl_temperature)
        ctx.save_for_backward(grad_nce, grad_kl)
        ctx.mark_non_differentiable(log_total)
        return l_nce, l_kl, log_total

    @staticmethod
    def backward(ctx, up_nce, up_kl, _):
        grad_nce, grad_kl = ctx.saved_tensors
        grad = up_nce * grad_nce if grad_kl is None else up_nce * grad_nce + up_kl * grad_kl
        return grad, None, None, None, None


def _own_rows(z: Tensor, weight: Tensor, index: Tensor, first: int | None) -> Tensor:
    """w_y for every view (B, D), from the rows of this process and those of the others."""
    if first is None:
        return weight[index].to(z.dtype)
    place = index - first
    held = (place >= 0) & (place < len(weight))
    return ranks.total(weight[place.clamp(0, len(weight) - 1)].to(z.dtype) * held[:, None])


class _Mean:
    """Means under softmax(a), fed with chunks of logits a (B, C) and their rows w (C, D).

    Sums are relative to the largest logit so far, and scaled down when a larger one comes, so
    nothing overflows.
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
        """Join the sums of processes that were each fed with other rows."""
        top = ranks.largest(self.top.clone())
        scale = (self.top - top).exp()[:, None]
        self.top, self.sums = top, [ranks.total(x * scale) for x in self.sums]

    def logsumexp(self) -> Tensor:  # (B,)
        return self.top + self.sums[0][:, 0].log()

    def of_rows(self) -> Tensor:  # (B, D)  E[w]
        return self.sums[1] / self.sums[0]

    def of_logits(self) -> Tensor:  # (B,)  E[a]
        return (self.sums[2] / self.sums[0])[:, 0]

    def of_both(self) -> Tensor:  # (B, D)  E[a w]
        return self.sums[3] / self.sums[0]


class LargeBank(MemoryBank):
    """A memory bank whose rows may be bf16, and which may hold only `rows` of the N rows.

    weight is then (len(rows), D) in dtype. All arithmetic has the precision of z. With a share of
    the rows, the corrected rule needs log_total. Other arguments: `MemoryBank`.
    """

    def __init__(self, size, dim, momentum=0.75, rule="corrected", temperature=0.07, dtype=torch.float32, rows=None):
        self.rows, self.dtype = range(size) if rows is None else rows, dtype  # before `init_random` wants them
        super().__init__(size, dim, momentum, rule, temperature)

    @torch.no_grad()
    def init_random(self, generator: torch.Generator | None = None) -> None:
        """Rows uniform on the unit sphere, the same ones for any number of processes."""
        self.weight = self.weight.new_empty(len(self.rows), self.weight.shape[1], dtype=self.dtype)
        for index in torch.arange(self.size, device=self.weight.device).split(8192):
            rows = torch.empty(len(index), self.weight.shape[1], device=index.device).normal_(generator=generator)
            self.write(index, rows / rows.norm(dim=1, keepdim=True))

    def load_state_dict(self, state: dict, *args, **options):
        """From the rows of the whole bank, of which this process keeps its share."""
        weight = state["weight"]
        if len(weight) == self.size:
            weight = weight[self.rows.start : self.rows.stop]
        return super().load_state_dict({"weight": weight}, *args, **options)

    @torch.no_grad()
    def write(self, index: Tensor, z: Tensor) -> None:
        place = index - self.rows.start
        held = (place >= 0) & (place < len(self.rows))
        self.weight[place[held]] = z[held].to(self.weight.dtype)

    @torch.no_grad()
    def update(
        self, z, index, similarity=None, columns=None, target=None, weight=None, log_total=None, chunk=8192
    ) -> None:
        """Like `MemoryBank.update`; with log_total (B,), in chunks and without similarities."""
        whole = len(self.rows) == self.size
        if whole and self.weight.dtype == torch.float32 and (log_total is None or self.rule == "npid"):
            return super().update(z, index, similarity, columns, target, weight)
        z = z.detach().to(torch.promote_types(z.dtype, self.weight.dtype))
        self._check(z, index)
        for place, pull in self._pulls(z, index, (similarity, columns, target, log_total, chunk)):
            if weight is not None:
                pull = pull * weight
            rows = self.weight[place].to(z.dtype)  # (C, D)
            # w_k <- normalise( m w_k + (1 - m) Σ_i ([k = y_i] - P_k^(i)) z_i )    for rows in place
            _add_product(rows, pull, z, self.momentum)
            _normalise(rows, pull, z)
            if self.weight.dtype == torch.bfloat16:
                rows = rounded(rows.float())
            if self.weight.dtype != z.dtype or not isinstance(place, slice):
                self.weight[place] = rows.to(self.weight.dtype)

    def _pulls(self, z: Tensor, index: Tensor, seen: tuple):
        """Yields places of C rows in weight and their [k = y_i] - P_k^(i) (C, B)."""
        similarity, columns, target, log_total, chunk = seen
        if self.rule == "npid":
            place = index - self.rows.start
            if len(self.rows) < self.size:  # this process moves the rows that it holds
                place = place[(place >= 0) & (place < len(self.rows))]
            yield place, (self.rows.start + place[:, None] == index).to(z.dtype)
        elif log_total is None:
            columns, pull = self._pull(z, index, similarity, columns, target)
            yield slice(None) if columns is None else columns, pull.T
        else:
            for start in range(0, len(self.weight), chunk):
                rows = self.weight[start : start + chunk].to(z.dtype)  # (C, D)
                with torch.autocast(z.device.type, enabled=False):  # as log_total was computed: P sums to 1
                    pull = (rows @ z.T / self.temperature - log_total).exp_().neg_()  # (C, B)
                place = index - self.rows.start - start  # outside [0, C) if the row is not in this chunk
                held = (place >= 0) & (place < len(rows))
                column = torch.arange(len(index), device=index.device)
                pull[place.clamp(0, len(rows) - 1), column] += held.to(pull.dtype)
                yield slice(start, start + len(rows)), pull


def rounded(x: Tensor) -> Tensor:
    """float32 to bfloat16, up or down at random in proportion to what is lost. Overwrites x.

    Rounding to the nearest drops every step below 0.2 %, which is what most rows get in a large
    bank. bfloat16 is the upper half of a float32, so a random lower half is added and then cut off.
    """
    bits = x.view(torch.int32)
    bits += torch.randint(2**16, bits.shape, dtype=torch.int32, device=x.device)
    return bits.bitwise_and_(-(2**16)).view(torch.float32).bfloat16()


def large_bank(config, count: int) -> LargeBank:
    """The bank that config asks for: --bank-dtype, --shard-bank."""
    dtype = torch.bfloat16 if config.bank_dtype == "bf16" else torch.float32
    rows = ranks.rows(count) if config.shard_bank else None
    momentum, rule, temperature = config.bank_momentum, config.bank_update, config.temperature
    return LargeBank(count, config.dim, momentum, rule, temperature, dtype, rows)


class Streamed:
    """For `train.Pretraining`: losses and update read the bank in chunks, not as (B, N)."""

    def losses(self, z: Tensor, batch):
        c, bank = self.config, self.bank
        first = bank.rows.start if c.shard_bank else None
        t = c.kl_temperature if c.lam else None
        numbers = {"first": first, "omega": batch.weight}
        l_nce, l_kl, log_total = streaming_losses(z, bank.weight, batch.index, c.temperature, t, **numbers)
        return l_nce, l_kl, {"log_total": log_total}

    def state(self) -> dict:
        """A checkpoint holds the whole bank, for any number of processes to go on with."""
        state = super().state()
        if self.config.shard_bank:
            state["bank"]["weight"] = ranks.collect(self.bank.weight, self.bank.size)
        return state
