"""The memory bank of arXiv 2404.19289: one unit row w_j per image, how it starts and how it moves.

The bank is the classifier of instance discrimination: image i is class i, and row w_i is the weight
vector of class i. The optimiser does not train it. It starts at random (NPID) or from one forward
pass of the encoder as it is ("feature calibrate"). After each step it follows one of two rules:

    npid       w_y <- normalise(m w_y + (1 - m) z_y)                        the image's own row only
    corrected  w_k <- normalise(m w_k + (1 - m) Σ_i ([k = y_i] - P_k^(i)) z_i)        every row in P

The corrected rule is a gradient step. For one view dL_NCE/dw_k = (P_k - [k = y]) z / tau for every
k. Normalising leaves only the ratio (1 - m) / m: it stands for step size / tau. NPID's rule is the
same step without P. After `sample`, P runs over the M sampled rows, and only they move.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plumbing.devices import looking_is_free

RULES = ("corrected", "npid")


class MemoryBank(nn.Module):
    """N unit rows of D numbers: `weight` (N, D), a buffer and never a parameter.

    size is N, dim is D, momentum is m in [0, 1], rule is "corrected" or "npid", temperature is the
    tau of P in the corrected rule. The rows start at random; call `init_forward` for the paper's
    start. With window, the rows stand for the images of a window, which change: see `enter`. Raises
    ValueError for values outside these ranges.

    Looking at values stalls CUDA: there only `init_forward` looks, whether each row was filled.
    The caller guarantees the rest, which other devices check: a finite z, an index inside the bank
    and columns with every own row. On CUDA `sample` must not get an image twice.
    """

    weight: Tensor

    def __init__(self, size: int, dim: int, momentum=0.75, rule="corrected", temperature=0.1, window=False):
        super().__init__()
        if size < 1 or dim < 1:
            raise ValueError(f"a bank needs at least one row and one dimension, not size {size} and dim {dim}")
        if not 0 <= momentum <= 1:
            raise ValueError(f"the bank's momentum m lies in [0, 1], not {momentum}")
        if rule not in RULES:
            raise ValueError(f"the bank's rule is one of {', '.join(RULES)}, not {rule!r}")
        if not temperature > 0:
            raise ValueError(f"the bank's temperature must be greater than 0, not {temperature}")
        self.size, self.momentum, self.rule, self.temperature = size, momentum, rule, temperature
        self.register_buffer("weight", torch.empty(size, dim))
        # The image that each row stands for, first entered first. None: row i stands for image i.
        self.register_buffer("images", torch.full((size,), -1) if window else None)
        self.init_random()

    @torch.no_grad()
    def init_random(self, generator: torch.Generator | None = None) -> None:
        """Rows uniform on the unit sphere, as in NPID: the bank knows nothing about the images."""
        self.weight.normal_(generator=generator)
        self.weight.div_(self.weight.norm(dim=1, keepdim=True))

    @torch.no_grad()
    def enter(self, images: Tensor) -> None:
        """Images (E,) enter the window: random rows replace those of the E that entered first."""
        if self.images is not None:
            self.images.copy_(torch.cat([self.images[len(images) :], images.to(self.images.device)]))
            rows = torch.randn_like(self.weight[: len(images)])  # (E, D)
            self.weight.copy_(torch.cat([self.weight[len(images) :], F.normalize(rows, dim=1)]))

    @torch.no_grad()
    def init_forward(self, encoder: nn.Module, batches, images: Tensor | None = None) -> None:
        """The paper's "feature calibrate": w_i = z_i from one pass of the encoder as it is.

        batches yields (views (B, 3, H, W), index (B,) long) and covers the rows of images (E,), or
        all rows (None), exactly once; raises ValueError if not. The encoder runs in training mode
        without gradient. Its mode is restored; its BatchNorm statistics keep what they saw.
        """
        filled, wanted = torch.zeros(2, self.size, dtype=torch.long, device=self.weight.device)
        wanted[slice(None) if images is None else self.locate(images.to(filled.device))] = 1
        was_training = encoder.training
        encoder.train()
        try:
            for views, index in batches:
                z = F.normalize(encoder(views).float(), dim=1)  # (B, D)
                self._check(z, index)
                self.write(index, z)
                filled.index_add_(0, self.locate(index), torch.ones_like(index))
        finally:
            encoder.train(was_training)
        if not torch.equal(filled, wanted):
            row = int((filled != wanted).nonzero()[0])
            times = f"{int(filled[row])} times, not {int(wanted[row])}"
            raise ValueError(f"batches must cover every row once, but row {row} was filled {times}")

    def write(self, index: Tensor, z: Tensor) -> None:
        """Set the rows of the images index (B,) to z (B, D)."""
        self.weight[self.locate(index)] = z.to(self.weight.dtype)

    def similarity(self, z: Tensor, columns: Tensor | None = None) -> Tensor:
        """Cosine similarities s_ij = z_i · w_j: (B, N), or (B, M) for the M rows in columns.

        z (B, D) has unit rows, and gradient flows to it. The bank is a constant: call `update`
        after the backward pass, which still needs the rows as they were.
        """
        rows = self.weight if columns is None else self.weight.index_select(0, columns)  # (M, D)
        return z @ rows.to(z.dtype).T  # (B, M)

    @torch.no_grad()
    def sample(self, index: Tensor, negatives: int, generator: torch.Generator | None = None) -> Tensor:
        """Columns (M,) for a sampled softmax: the batch's own rows once each, then K others.

        No row is drawn twice, and no image meets its own row as a negative (in the original NPID
        code it can). generator lives on the bank's device. Raises ValueError if K is
        below 1 or there are fewer than K other rows.
        """
        own = self.locate(index)  # (B,)
        own = own.unique() if looking_is_free(own) else own.sort().values
        others = self.size - len(own)
        if not 0 < negatives <= others:
            raise ValueError(f"negatives K must lie in [1, {others}] (the bank's other rows), not {negatives}")
        keys = torch.rand(self.size, device=self.weight.device, generator=generator)  # (N,) in [0, 1)
        keys.index_fill_(0, own, 2.0)  # own rows sort behind every other row
        return torch.cat([own, keys.topk(negatives, largest=False).indices])  # (M,)

    def locate(self, index: Tensor, columns: Tensor | None = None) -> Tensor:
        """The column (B,) of each image's own row, which `nce` takes as target.

        Raises ValueError if an image is not in the window or its row not in columns.
        """
        rows = index if self.images is None else _places(self.images, index, "an image is not in the window")
        advice = "columns must contain the batch's own rows: draw them with bank.sample(index, K)"
        return rows if columns is None else _places(columns, rows, advice)

    @torch.no_grad()
    def update(self, z: Tensor, index: Tensor, similarity=None, columns=None, target=None, weight=None) -> None:
        """Move the bank after a step, in place and without gradient.

        z (B, D) are unit embeddings and index (B,) long their images. similarity (B, M) is what
        `similarity(z, columns)` gave before the step (None: computed now), columns (M,) the rows it
        was computed for (None: all), target what `nce` got (None: each image's own column), weight
        (B,) how much each view counts. Views of one image add up. The corrected rule moves the rows
        in columns. NPID's rule moves those in index and ignores similarity, columns and target, so
        also CutMix's shares. Raises ValueError if z or index has a wrong shape or, off CUDA, a
        bad value. Source: section "grad update" of arXiv 2404.19289 as we understand it.
        """
        z = z.detach().to(torch.promote_types(z.dtype, self.weight.dtype))
        self._check(z, index)
        columns, pull = self._pull(z, index, similarity, columns, target)
        if weight is not None:
            pull *= weight[:, None]
        # (M, D): the bank itself if all of it moves in its own precision, else a copy
        rows = (self.weight if columns is None else self.weight.index_select(0, columns)).to(z.dtype)

        # w_k <- normalise( m w_k + (1 - m) Σ_i ([k = y_i] - P_k^(i)) z_i )    for the M rows k in P
        _add_product(rows, pull.T, z, self.momentum)
        _normalise(rows, pull.T, z)
        if rows is not self.weight:
            self.weight[... if columns is None else columns] = rows.to(self.weight.dtype)

    def _pull(self, z, index, similarity=None, columns=None, target=None) -> tuple[Tensor | None, Tensor]:
        """The rows that move (M,) (None: all), and how much each z_i pulls each of them, (B, M)."""
        if self.rule == "npid":
            rows = self.locate(index)  # (M,) = (B,)
            return rows, (rows == rows[:, None]).to(z.dtype)  # [k = y_i]
        similarity = self.similarity(z, columns) if similarity is None else similarity.detach()
        target = self.locate(index, columns) if target is None else target
        pull = (similarity.to(z.dtype) / self.temperature).softmax(1).neg_()  # -P_k^(i)
        if target.ndim == 1:
            return columns, pull.scatter_add_(1, target[:, None], torch.ones_like(pull[:, :1]))  # + [k = y_i]
        return columns, pull.add_(target)

    def _check(self, z: Tensor, index: Tensor) -> None:
        dim = self.weight.shape[1]
        if z.ndim != 2 or z.shape[1] != dim or index.shape != z.shape[:1]:
            raise ValueError(f"expected z (B, {dim}) and index (B,), got {tuple(z.shape)} and {tuple(index.shape)}")
        if not looking_is_free(z):
            return
        if self.images is None and len(index) and not 0 <= int(index.min()) <= int(index.max()) < self.size:
            raise ValueError(f"index must lie in [0, {self.size - 1}], got {int(index.min())} to {int(index.max())}")
        if not torch.isfinite(z).all():
            raise ValueError("z holds a value that is not finite: the encoder has diverged")


def _places(values: Tensor, wanted: Tensor, problem: str) -> Tensor:
    """Where each of wanted (B,) stands in values (M,); ValueError(problem) if one is missing."""
    ordered, order = values.sort()
    place = order[torch.searchsorted(ordered, wanted).clamp(max=len(values) - 1)]  # (B,)
    if looking_is_free(wanted) and not torch.equal(values[place], wanted):
        raise ValueError(problem)
    return place


def _add_product(rows: Tensor, pull: Tensor, z: Tensor, m: float) -> None:
    """rows (M, D) <- m rows + (1 - m) pull z in place; pull is (M, B). A copy can take 400 MB."""
    m = max(m, 1e-12)  # at m = 0 a row that nothing pulls keeps its direction
    if torch.is_autocast_enabled(rows.device.type):
        rows.mul_(m).add_(pull @ z, alpha=1 - m)  # the product in bf16, the sum in float32
    else:
        rows.addmm_(pull, z, beta=m, alpha=1 - m)


def _normalise(rows: Tensor, pull: Tensor, z: Tensor) -> None:
    """Divide rows (M, D) by their lengths in place. Off CUDA a row that would be zero stays."""
    length = rows.norm(dim=1, keepdim=True)  # (M, 1)
    if looking_is_free(rows):
        zero = (length[:, 0] < 1e-14).nonzero()[:, 0]
        rows[zero] = -(pull[zero] @ z).to(rows.dtype)  # m w + (1 - m) Σ = 0, so -Σ has the direction of w
        length[zero] = rows[zero].norm(dim=1, keepdim=True)
    rows.div_(length.clamp_(min=1e-14))
