"""The memory bank of arXiv 2404.19289: one unit row w_j per image, how it starts and how it moves.

The bank is the classifier of instance discrimination: image i is class i, and row w_i is that class's weight vector. It
is not trained by the optimiser. It starts either at random (NPID) or from one forward pass of the untrained encoder
("feature calibrate"), and then follows one of two rules after each step:

    npid       w_y <- normalise(m w_y + (1 - m) z_y)                                         the image's own row alone
    corrected  w_k <- normalise(m w_k + (1 - m) Σ_i ([k = y_i] - P_k^(i)) z_i)               every row, k = 1 … N

The second is a gradient step. For one sample dL_NCE/dw_k = (P_k - [k = y]) z / tau, for every k and not only for k = y;
1/tau and the step size are absorbed in (1 - m). NPID's rule is what remains of it when P is dropped.

With several views v of an image in a step (--views), each of weight ω_v, Σ_v ω_v = 1, the sum over i becomes
Σ_v ω_v Σ_i ([k = y_i] - P_k^(v,i)) z_i^(v), and z_y in NPID's rule Σ_v ω_v z_y^(v): an image weighs 1 as before.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RULES = ("corrected", "npid")


class MemoryBank(nn.Module):
    """N unit rows of D numbers: `weight` (N, D), a buffer and never a parameter.

    size is N, dim is D, momentum is m in [0, 1], rule is "corrected" or "npid", temperature is the tau of P in the
    corrected rule, dtype is float32 or, in half the memory, bfloat16 (all arithmetic stays that of z). rows are those that
    are held here, if the bank is split over processes: `weight` is then (len(rows), D), and only `init_forward` and the
    streamed `update` can be used. Starts at random; call `init_forward` for the paper's start. Raises ValueError for
    values outside these ranges.

    To look at a value, the host has to wait until a GPU has computed it. With checks set to False no method but
    `init_forward` waits for the device, and what they promise to refuse is the caller's to avoid: the images of a batch
    are distinct rows of the bank, z is finite, and a row whose new value is the zero vector stays zero for a step.
    """

    weight: Tensor
    checks = True

    def __init__(
        self,
        size: int,
        dim: int,
        momentum: float = 0.5,
        rule: str = "corrected",
        temperature: float = 0.2,
        dtype: torch.dtype = torch.float32,
        rows: range | None = None,
    ):
        super().__init__()
        if size < 1 or dim < 1:
            raise ValueError(f"a bank needs at least one row and one dimension, not size {size} and dim {dim}")
        if not 0 <= momentum <= 1:
            raise ValueError(f"the bank's momentum m lies in [0, 1], not {momentum}")
        if rule not in RULES:
            raise ValueError(f"the bank's rule is one of {', '.join(RULES)}, not {rule!r}")
        if not temperature > 0:
            raise ValueError(f"the bank's temperature must be greater than 0, not {temperature}")
        self.momentum, self.rule, self.temperature = momentum, rule, temperature
        self.size, self.rows = size, rows if rows is not None else range(size)
        self.register_buffer("weight", torch.empty(len(self.rows), dim, dtype=dtype))
        self.init_random()

    # ------------------------------------------------------------------------------------------------ initialisation

    @torch.no_grad()
    def init_random(self, generator: torch.Generator | None = None) -> None:
        """Rows uniform on the unit sphere, as in NPID: the bank knows nothing of the images."""
        self.weight.normal_(generator=generator)
        self.weight.div_(self.weight.norm(dim=1, keepdim=True))  # in place: no second bank

    @torch.no_grad()
    def init_forward(self, encoder: nn.Module, batches) -> None:
        """The paper's "feature calibrate": w_i = z_i from one pass of the untrained encoder over views.

        batches yields (augmented views (B, 3, H, W), index (B,) long) and covers every row exactly once; ValueError if a
        row is filled twice or never. The encoder runs in train mode without gradient; its mode is restored afterwards,
        its BatchNorm statistics keep what they saw.
        """
        filled = torch.zeros(len(self.weight), dtype=torch.long, device=self.weight.device)
        was_training = encoder.training
        encoder.train()
        for views, index in batches:
            z = F.normalize(encoder(views).float(), dim=1)  # (B, D)
            self._check(z, index)
            place, here = self._here(index)
            self.weight[place] = z[here].to(self.weight.dtype)
            filled.index_add_(0, place, torch.ones_like(place))
        encoder.train(was_training)
        if (filled != 1).any():
            row = int((filled != 1).nonzero()[0])
            times = int(filled[row])
            raise ValueError(f"batches must cover every row once, but row {self.rows[row]} was filled {times} times")

    # ------------------------------------------------------------------------------------------------------- reading

    def similarity(self, z: Tensor, columns: Tensor | None = None) -> Tensor:
        """Cosine similarities s_ij = z_i · w_j: (B, N), or (B, len(columns)) for those rows alone; z (B, D) unit.

        Gradient flows to z. The bank is a constant here: call `update` after the backward pass, which still needs the
        rows as they were.
        """
        rows = self.weight if columns is None else self.weight.index_select(0, columns)  # (M, D)
        return z @ rows.to(z.dtype).T  # (B, M)

    @torch.no_grad()
    def sample(self, index: Tensor, negatives: int, generator: torch.Generator | None = None) -> Tensor:
        """Columns (M,) for a sampled softmax: the batch's own rows once each, then K others, none drawn twice.

        Drawn on the bank's device (where `generator` must live too), without a Python loop. The original NPID code draws
        negatives among all rows, so an image can meet its own row as a negative; here it cannot. Raises ValueError if
        fewer than K others exist.
        """
        own = self._distinct(index)
        others = len(self.weight) - len(own)
        if not 0 < negatives <= others:
            raise ValueError(f"negatives K must lie in [1, {others}] (the bank's other rows), not {negatives}")
        keys = torch.rand(len(self.weight), device=self.weight.device, generator=generator)  # (N,) in [0, 1)
        keys.index_fill_(0, own, 2.0)  # sorts behind every other row
        return torch.cat([own, keys.topk(negatives, largest=False).indices])  # (M,)

    def locate(self, index: Tensor, columns: Tensor | None = None) -> Tensor:
        """The column (B,) that holds each image's own row: the target of `loss.nce`. ValueError if one is missing."""
        if columns is None:
            return index
        ordered, order = columns.sort()  # searchsorted with a sorter would wait for the device to look through it
        place = torch.searchsorted(ordered, index).clamp(max=len(columns) - 1)
        target = order[place]  # (B,)
        if self.checks and not torch.equal(columns[target], index):
            raise ValueError("columns must contain the batch's own rows: draw them with bank.sample(index, K)")
        return target

    # ------------------------------------------------------------------------------------------------------ updating

    @torch.no_grad()
    def update(
        self,
        z: Tensor,
        index: Tensor,
        similarity: Tensor | None = None,
        columns: Tensor | None = None,
        target: Tensor | None = None,
        log_total: Tensor | None = None,
        chunk: int = 8192,
        omega: Tensor | None = None,
    ) -> None:
        """Move the bank after a step, in place and without gradient.

        z (B, D) unit embeddings; index (B,) long; similarity (B, M) what `similarity(z, columns)` gave before any
        update, recomputed if absent; columns (M,) the rows of a sampled softmax (rows outside it stay as they are);
        target (B, M) soft weights that replace [k = y_i] in the corrected rule (CutMix). log_total (B,), the
        log Σ_j exp(s_ij / tau) that `loss.streaming_losses` returns, stands in for similarity: the rows then move
        `chunk` at a time, and no (B, N) matrix is held. An index that occurs twice adds both of its views, as the sum over
        the batch says; omega (B,) are the ω of such views (absent: 1 each). A row whose new value would be the zero vector
        stays as it was. Under autocast the products are made in its type; the rows move in their own. Raises ValueError for
        a wrong shape, an index outside the bank or a non-finite z; the bank is then untouched. Source: section "grad
        update" of arXiv 2404.19289 in our reading; the released code has NPID's rule.
        """
        z = z.detach().to(torch.promote_types(z.dtype, self.weight.dtype))
        self._check(z, index)
        if self.rule == "npid":
            columns = self._distinct(self._here(index)[0])  # (M,) the batch's own rows, and no others
            parts = [(columns, (self.rows.start + columns[:, None] == index).to(z.dtype))]  # [k = y_i]  (M, B)
        elif log_total is not None:
            parts = self._pull_in_chunks(z, index, log_total, chunk)
        else:
            if similarity is None:
                similarity = self.similarity(z, columns)
            # -dL/ds, with 1/tau absorbed: [k = y_i] - P_k^(i). Then the chain rule through s_ik = z_i · w_k.
            pull = (similarity.detach().to(z.dtype) / self.temperature).softmax(1).neg_()  # (B, M)
            if target is None:
                own = self.locate(index, columns)[:, None]  # (B, 1)
                pull.scatter_add_(1, own, torch.ones_like(own, dtype=pull.dtype))
            else:
                pull += target
            parts = [(slice(None) if columns is None else columns, pull.T)]
        for place, pull in parts:
            whole = isinstance(place, slice)
            rows = (
                self.weight[place] if whole else self.weight.index_select(0, place)
            )  # (M, D) the bank itself, or a copy
            rows = rows.to(z.dtype)
            _move(rows, pull, z if omega is None else z * omega[:, None].to(z.dtype), self.momentum, self.checks)
            if self.weight.dtype != z.dtype:
                rows = _round(rows)
            if self.weight.dtype != z.dtype or not whole:
                self.weight[place] = rows

    def _pull_in_chunks(self, z: Tensor, index: Tensor, log_total: Tensor, chunk: int):
        """Yields a slice of C rows and its [k = y_i] - P_k^(i) (C, B), for one slice after the other."""
        for start in range(0, len(self.weight), chunk):
            rows = self.weight[start : start + chunk].to(z.dtype)  # (C, D)
            pull = (rows @ z.T / self.temperature - log_total).exp_().neg_()  # (C, B)
            place = index - self.rows.start - start  # outside [0, C) for images whose rows are not in this slice
            here = (place >= 0) & (place < len(rows))
            pull[place.clamp(0, len(rows) - 1), torch.arange(len(index), device=index.device)] += here.to(pull.dtype)
            yield slice(start, start + len(rows)), pull

    def _here(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the images (B,) have their rows here: their places in weight, and in the batch."""
        if len(self.rows) == self.size:
            return index, torch.arange(len(index), device=index.device)
        place = index - self.rows.start
        here = ((place >= 0) & (place < len(self.rows))).nonzero()[:, 0]
        return place[here], here

    def _distinct(self, index: Tensor) -> Tensor:
        """index, sorted, each once. How many that are has to be looked at, unless all are known to be distinct."""
        return index.unique() if self.checks else index.sort().values

    def _check(self, z: Tensor, index: Tensor) -> None:
        size, dim = self.size, self.weight.shape[1]
        if z.ndim != 2 or z.shape[1] != dim or index.shape != z.shape[:1]:
            raise ValueError(f"expected z (B, {dim}) and index (B,), got {tuple(z.shape)} and {tuple(index.shape)}")
        if not self.checks:
            return
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < size:
            raise ValueError(f"index must lie in [0, {size - 1}], got {int(index.min())} to {int(index.max())}")
        if not torch.isfinite(z).all():
            raise ValueError("z holds a value that is not finite: the encoder has diverged")


def _move(rows: Tensor, pull: Tensor, z: Tensor, m: float, checks: bool = True) -> Tensor:
    """normalise(m w_k + (1 - m) Σ_i pull_ki z_i) for rows (M, D), pull (M, B), z (B, D); in place, so no second bank."""
    m = max(m, 1e-12)  # at m = 0 a row that nothing pulls keeps its direction
    if torch.is_autocast_enabled(rows.device.type):
        rows.mul_(m).add_(pull @ z, alpha=1 - m)  # the product in bf16, the sum in float32
    else:
        rows.addmm_(pull, z, beta=m, alpha=1 - m)
    length = rows.norm(dim=1, keepdim=True)  # (M, 1)
    if not checks:
        return rows.div_(length.clamp_(min=1e-14))
    gone = (length[:, 0] < 1e-14).nonzero()[:, 0]
    if len(gone):  # m w + (1 - m) Σ is zero, so w points along -Σ: the row stays as it was
        rows[gone] = -(pull[gone] @ z)
        length[gone] = rows[gone].norm(dim=1, keepdim=True)
    return rows.div_(length)


def _round(x: Tensor) -> Tensor:
    """float32 to bfloat16, up or down at random in proportion to what is lost: small steps count, on average, in full.

    Rounding to the nearest would drop every step below 0.2 %, which is what most rows get in a large bank. bfloat16 is the
    upper half of a float32, so a random lower half is added and then cut off. Overwrites x.
    """
    bits = x.view(torch.int32)
    bits += torch.randint(2**16, bits.shape, dtype=torch.int32, device=x.device)
    return bits.bitwise_and_(-(2**16)).view(torch.float32).bfloat16()
