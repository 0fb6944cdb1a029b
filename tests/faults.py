"""Faults to plant: a bank or a loss, wrong in one way. `figures/break_it.py` trains with some.

FAULTS lists them all, each with the check of test_exercises.py that has to catch it, and words that
the check's message has to contain.
"""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import test_exercises as right
import torch
import torch.nn.functional as F
from torch import nn

import loss as ours
from bank import MemoryBank
from lab.large_bank import streaming_loss


class AsWritten(MemoryBank):
    """Both rules as they are written, in pieces that a fault can replace. It passes every check."""

    def own(self, index, columns):  # [k = y_i]  (B, M)
        return (columns == index[:, None]).to(self.weight.dtype)

    def p(self, similarity):  # (B, M)
        return (similarity / self.temperature).softmax(1)

    def pull(self, own, p):  # (B, M)
        return own - p

    def total(self, pull, z):  # (M, D)
        return pull.T @ z

    def mix(self, rows, step):
        return self.momentum * rows + (1 - self.momentum) * step

    def unit(self, rows):
        return F.normalize(rows, dim=1)

    @torch.no_grad()
    def update(self, z, index, similarity=None, columns=None, target=None, weight=None):
        z = z.detach().to(self.weight.dtype)
        columns = torch.arange(self.size, device=z.device) if columns is None else columns  # (M,)
        similarity = self.similarity(z, columns) if similarity is None else similarity.to(z.dtype)
        pull = self.own(index, columns)
        if self.rule == "npid":
            columns, pull = columns[pull.any(0)], pull[:, pull.any(0)]
        else:
            pull = self.pull(pull, self.p(similarity))
        self.weight[columns] = self.unit(self.mix(self.weight[columns], self.total(pull, z)))


class NotNormalised(AsWritten):
    def unit(self, rows):
        return rows


class NoP(AsWritten):
    def pull(self, own, p):
        return own


class OwnInFull(AsWritten):
    def pull(self, own, p):
        return own - p * (1 - own)


class SignFlipped(AsWritten):
    def pull(self, own, p):
        return p - own


class PullsAll(AsWritten):
    def pull(self, own, p):
        return own * (1 - p) + (1 - own) * p


class NoTau(AsWritten):
    def p(self, similarity):
        return similarity.softmax(1)


class Mean(AsWritten):
    def total(self, pull, z):
        return pull.T @ z / len(z)


class SharesSwapped(AsWritten):
    def mix(self, rows, step):
        return (1 - self.momentum) * rows + self.momentum * step


class LastOneWins(AsWritten):
    def own(self, index, columns):
        own = super().own(index, columns)
        return own * (own.flip(0).cumsum(0).flip(0) == 1)


class AllRows(AsWritten):
    """The rule is ignored."""

    def update(self, *args, **options):
        rule, self.rule = self.rule, "corrected"
        super().update(*args, **options)
        self.rule = rule


class OneAfterTheOther(AsWritten):
    """P is computed anew for every view, from rows that earlier views have moved."""

    def update(self, z, index, similarity=None, columns=None, target=None, weight=None):
        for i in range(len(z)):
            super().update(z[i : i + 1], index[i : i + 1], None, columns)


class TauKept(AsWritten):
    """The gradient as it stands, with its 1 / tau."""

    def total(self, pull, z):
        return pull.T @ z / (self.temperature if self.rule == "corrected" else 1)


class TauAndMean(TauKept):
    def total(self, pull, z):
        return super().total(pull, z) / len(z)


class OnACopy(AsWritten):
    """Indexing with a tensor makes a copy, and the copy is normalised."""

    def update(self, z, index, similarity=None, columns=None, target=None, weight=None):
        rows = self.weight[index]
        rows.mul_(self.momentum).add_(z, alpha=1 - self.momentum)
        rows.div_(rows.norm(dim=1, keepdim=True))


class NotWrittenYet(AsWritten):
    """Exercise 1 is done, exercise 3 is not."""

    def update(self, z, index, **seen):
        if self.rule == "npid":
            super().update(z, index, **seen)


class SimilarityTakenForGranted(AsWritten):
    def update(self, z, index, similarity=None, **seen):
        p = (similarity / self.temperature).softmax(1)
        pull = self.pull(self.own(index, torch.arange(self.size)), p)
        self.weight.copy_(self.unit(self.mix(self.weight, self.total(pull, z))))


class StepLosesDuplicates(AsWritten):
    """step[index] += z, in either rule."""

    @torch.no_grad()
    def update(self, z, index, similarity=None, columns=None, target=None, weight=None):
        s = z @ self.weight.T if similarity is None else similarity
        step = -(s / self.temperature).softmax(1).T @ z if self.rule == "corrected" else torch.zeros_like(self.weight)
        step[index] += z
        rows = self.unit(self.mix(self.weight, step))
        self.weight[:] = torch.where((step != 0).any(1, keepdim=True), rows, self.weight)


class NpidWithAMinus(AsWritten):
    def mix(self, rows, step):
        return super().mix(rows, step if self.rule == "corrected" else -step)


class NpidMean(AsWritten):
    def total(self, pull, z):
        return pull.T @ z / (1 if self.rule == "corrected" else len(z))


class NoOldRow(AsWritten):
    def mix(self, rows, step):
        return step


class NoOneMinusM(AsWritten):
    def mix(self, rows, step):
        return self.momentum * rows + step


class NoM(AsWritten):
    def mix(self, rows, step):
        return rows + (1 - self.momentum) * step


class NoMomentum(AsWritten):
    def mix(self, rows, step):
        return rows + step


class SoftmaxOverTheBatch(AsWritten):
    def p(self, similarity):
        return (similarity / self.temperature).softmax(0)


class TauMultiplies(AsWritten):
    def p(self, similarity):
        return (similarity * self.temperature).softmax(1)


class ExpNotDivided(AsWritten):
    def p(self, similarity):
        return (similarity / self.temperature).exp()


class LogP(AsWritten):
    def p(self, similarity):
        return (similarity / self.temperature).log_softmax(1)


class CosinesForP(AsWritten):
    def p(self, similarity):
        return similarity


class MeanP(AsWritten):
    def p(self, similarity):
        return super().p(similarity).mean(0).expand_as(similarity)


class OwnRowsOnly(AsWritten):
    """1 - P for the own row, but no other row moves."""

    @torch.no_grad()
    def update(self, z, index, *args, **options):
        before = self.weight.clone()
        super().update(z, index, *args, **options)
        moved = torch.zeros(self.size, dtype=torch.bool).index_fill_(0, index, True)
        self.weight.copy_(torch.where(moved[:, None], self.weight, before))


class StepNormalised(AsWritten):
    def total(self, pull, z):
        return self.unit(super().total(pull, z))


class AllPulledMore(AsWritten):
    def pull(self, own, p):
        return own + p


class Float32(AsWritten):
    def update(self, z, index, *args, **options):
        super().update(z, index, *args, **options)
        self.weight = self.weight.float()


class Float32Rows(AsWritten):
    """Half of the arithmetic in float32: the assignment stops."""

    @torch.no_grad()
    def update(self, z, index, similarity=None, columns=None, target=None, weight=None):
        self.weight[index] = F.normalize(self.momentum * self.weight[index] + (1 - self.momentum) * z, dim=1).float()


class NotFinite(AsWritten):
    def unit(self, rows):
        return super().unit(rows) / 0.0


class WrongShape(AsWritten):
    """P.T is forgotten: the product does not fit."""

    def total(self, pull, z):
        return pull @ z


class AllRowsForColumns(AsWritten):
    """`similarity` (B, M) is taken for all rows."""

    def update(self, z, index, similarity=None, columns=None, target=None, weight=None):
        super().update(z, index, similarity, None, target)


class OtherRowsMoveToo(AsWritten):
    """The similarities of the sample are left aside."""

    def update(self, z, index, similarity=None, columns=None, target=None, weight=None):
        super().update(z, index, similarity if columns is None else None)


class OwnByImage(AsWritten):
    """`target` counts columns, and is taken for the images."""

    def update(self, z, index, similarity=None, columns=None, target=None, weight=None):
        super().update(z, index if target is None else target, similarity, columns)


class BankFirst(AsWritten):
    """The bank moves before the similarities are computed."""

    index = None

    def locate(self, index, columns=None):
        self.index = index
        return super().locate(index, columns)

    def similarity(self, z, columns=None):
        index, self.index = self.index, None
        if index is not None:
            super().update(z, index, columns=columns)
        return super().similarity(z, columns)

    def update(self, z, index, similarity=None, columns=None, target=None, weight=None):
        if similarity is None:
            super().update(z, index, similarity, columns)


class OwnAmongNegatives(AsWritten):
    """Negatives are drawn from all rows."""

    def sample(self, index, negatives, generator=None):
        return torch.cat([index.unique(), torch.randperm(self.size, generator=generator)[:negatives]])


class Parameter(AsWritten):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        weight = self.weight
        del self.weight
        self.weight = nn.Parameter(weight)


class RandomNotUnit(AsWritten):
    def init_random(self, generator=None):
        self.weight.data.normal_(generator=generator)


class ForwardByOrder(AsWritten):
    def init_forward(self, encoder, batches):
        batches, start = list(batches), 0
        for _views, index in batches:
            index.copy_(torch.arange(start, start := start + len(index)))
        super().init_forward(encoder, batches)


class ForwardInEval(AsWritten):
    @torch.no_grad()
    def init_forward(self, encoder, batches):
        encoder.eval()
        for views, index in batches:
            self.weight[index] = F.normalize(encoder(views), dim=1)


# -------------------------------------------------------------------------------------- the losses


def kl(log_p, log_q, mean=torch.mean):
    return mean((log_p.exp() * (log_p - log_q)).sum(1))


def nce_without_own(s, target, tau):
    own = s.gather(1, target[:, None])[:, 0] / tau
    return ((s / tau).scatter(1, target[:, None], -torch.inf).logsumexp(1) - own).mean()


def nce_over_the_batch(s, target, tau):
    return -(s / tau).log_softmax(0).gather(1, target[:, None]).mean()


def nce_of_a_softmax(s, target, tau):
    return F.cross_entropy((s / tau).softmax(1), target)


def nce_own_not_divided(s, target, tau):
    return ((s / tau).logsumexp(1) - s.gather(1, target[:, None])[:, 0]).mean()


def nce_without_return(s, target, tau):
    F.cross_entropy(s / tau, target)


def nce_as_a_float(s, target, tau):
    return F.cross_entropy(s / tau, target).item()


def nce_in_float32(s, target, tau):
    return F.cross_entropy(s.float() / tau, target)


def nce_per_view(s, target, tau):
    return F.cross_entropy(s / tau, target, reduction="none")


def nce_that_stops(s, target, tau):
    return F.cross_entropy(s / tau, target.float())


def nce_detached_p(s, target, tau):
    own = s.gather(1, target[:, None])[:, 0] / tau
    return ((s / tau).logsumexp(1).detach() - own).mean()


def u_not_normalised(s, t=1.0):
    log_p = (s / t).log_softmax(1)
    return kl(log_p, log_p.detach() / 2)


def u_sharper(s, t=1.0):
    return kl((s / t).log_softmax(1), (2 * s / t).log_softmax(1).detach())


def u_at_the_wrong_curvature(s, t=1.0):
    return kl((s / t).log_softmax(1), (s / t / 3).log_softmax(1).detach())


def p_held(s, t=1.0):
    return kl((s / t).log_softmax(1).detach(), (s / t / 2).log_softmax(1))


def sqrt_kl_summed(s, t=1.0):
    return ours.sqrt_kl(s, t) * len(s)


def second_order_only(s, t=1.0):
    return (s / t).var(1, unbiased=False).mean() / 8


def log_kl(s, t):
    return (s / t).log_softmax(1), (s / t / 2).log_softmax(1).detach()


def kl_reversed(s, t=1.0):
    log_p, log_u = log_kl(s, t)
    return kl(log_u, log_p)


def kl_of_torch(s, t=1.0):
    """The arguments are turned round, and the mean is over all elements."""
    log_p, log_u = log_kl(s, t)
    return F.kl_div(log_p, log_u.exp(), reduction="mean")


def kl_of_torch_summed(s, t=1.0):
    log_p, log_u = log_kl(s, t)
    return F.kl_div(log_p, log_u.exp(), reduction="sum")


def kl_of_torch_right(s, t=1.0, reduction="mean"):
    log_p, log_u = log_kl(s, t)
    return F.kl_div(log_u, log_p.exp(), reduction=reduction)


def cross_entropy_alone(s, t=1.0):
    log_p, log_u = log_kl(s, t)
    return -(log_p.exp() * log_u).sum(1).mean()


def entropy_alone(s, t=1.0):
    log_p, _ = log_kl(s, t)
    return -(log_p.exp() * log_p).sum(1).mean()


def kl_without_logs(s, t=1.0):
    log_p, log_u = log_kl(s, t)
    return (log_p.exp() * (log_p.exp() - log_u.exp())).sum(1).mean()


def by_hand(term, direction="p||u"):
    """sqrt_kl_gradient with `term` times what a moving u adds."""

    def wrong(s, t=1.0, direction=direction, detach=True):
        held = right.sqrt_kl_gradient(s, t, direction, True)
        return held if detach else held + term * (right.sqrt_kl_gradient(s, t, direction, False) - held)

    return wrong


def by_hand_other_sign(s, t=1.0, direction="p||u", detach=True):
    sign = -1 if direction == "u||p" else 1
    return sign * right.sqrt_kl_gradient(s, t, direction, detach)


def by_hand_other_direction(s, t=1.0, direction="p||u", detach=True):
    return right.sqrt_kl_gradient(s, t, "p||u", detach)


def by_hand_no_entropy(s, t=1.0):
    p = (s / t).softmax(1)
    return p * p.log() / 2 / (len(s) * t)


def direction_ignored(s, t=1.0, direction="p||u", detach=True):
    return ours.sqrt_kl(s, t, "p||u", detach)


def always_moving(s, t=1.0, direction="p||u", detach=True):
    return ours.sqrt_kl(s, t, direction, False)


def always_held(s, t=1.0, direction="p||u", detach=True):
    return ours.sqrt_kl(s, t, direction, True)


def chunked(z, weight, index, tau, chunk, log_sum):
    """NCE with autograd through a loop: log_sum makes the normaliser from the chunks' logits."""
    logits = [z @ rows.T / tau for rows in weight.split(chunk)]
    return (log_sum(logits) - (z * weight[index]).sum(1) / tau).mean()


def each_chunk_alone(z, weight, index, tau, lam=0.0, t=1.0, chunk=8192):
    return chunked(z, weight, index, tau, chunk, lambda logits: torch.stack([p.logsumexp(1) for p in logits]).mean(0))


def last_chunk_dropped(z, weight, index, tau, lam=0.0, t=1.0, chunk=8192):
    full = lambda logits: [p for p in logits if p.shape[1] == min(chunk, len(weight))]  # noqa: E731
    return chunked(z, weight, index, tau, chunk, lambda logits: torch.cat(full(logits), 1).logsumexp(1))


def only_the_pull(z, weight, index, tau, lam=0.0, t=1.0, chunk=8192):
    return chunked(z, weight, index, tau, chunk, lambda logits: torch.cat(logits, 1).logsumexp(1).detach())


def overflowing(z, weight, index, tau, lam=0.0, t=1.0, chunk=8192):
    return chunked(z, weight, index, tau, chunk, lambda logits: sum(p.exp().sum(1) for p in logits).log())


def kept_chunks(z, weight, index, tau, lam=0.0, t=1.0, chunk=8192):
    return chunked(
        z, weight, index, tau, chunk, lambda logits: torch.stack([p.logsumexp(1) for p in logits]).logsumexp(0)
    )


class FullMatrix(torch.autograd.Function):
    """The right value and gradient, by way of all similarities at once."""

    @staticmethod
    def forward(ctx, z, weight, index, tau):
        p = (z @ weight.T / tau).softmax(1)
        ctx.save_for_backward((p @ weight - weight[index]) / (len(z) * tau))
        return -p.gather(1, index[:, None]).log().mean()

    @staticmethod
    def backward(ctx, up):
        return up * ctx.saved_tensors[0], None, None, None


class ChunksOnCtx(torch.autograd.Function):
    """Chunk by chunk, but all chunks wait on ctx for the backward pass."""

    @staticmethod
    def forward(ctx, z, weight, index, tau, chunk):
        ctx.logits = [z @ rows.T / tau for rows in weight.split(chunk)]
        ctx.total = torch.stack([a.logsumexp(1) for a in ctx.logits]).logsumexp(0)
        ctx.chunks, ctx.own, ctx.scale = weight.split(chunk), weight[index], len(z) * tau
        return (ctx.total - (z * ctx.own).sum(1) / tau).mean()

    @staticmethod
    def backward(ctx, up):
        mean = sum((a - ctx.total[:, None]).exp() @ rows for a, rows in zip(ctx.logits, ctx.chunks))
        return up * (mean - ctx.own) / ctx.scale, None, None, None, None


class UpstreamIgnored(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, *args):
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            value = streaming_loss(z, *args)
            ctx.save_for_backward(*torch.autograd.grad(value, z))
        return value.detach()

    @staticmethod
    def backward(ctx, up):
        return ctx.saved_tensors[0], None, None, None, None, None, None


def full_matrix(z, weight, index, tau, lam=0.0, t=1.0, chunk=8192):
    return FullMatrix.apply(z, weight, index, tau)


def chunks_on_ctx(z, weight, index, tau, lam=0.0, t=1.0, chunk=8192):
    return ChunksOnCtx.apply(z, weight, index, tau, chunk)


def upstream_ignored(z, weight, index, tau, lam=0.0, t=1.0, chunk=8192):
    return UpstreamIgnored.apply(z, weight, index, tau, lam, t, chunk)


def the_first_maximum(z, weight, index, tau, lam=0.0, t=1.0, chunk=8192):
    def log_sum(logits):
        top = logits[0].amax(1, keepdim=True).detach()
        return sum((p - top).exp().sum(1) for p in logits).log() + top[:, 0]

    return chunked(z, weight, index, tau, chunk, log_sum)


def shared_temperature(z, weight, index, tau, lam=0.0, t=1.0, chunk=8192):
    return streaming_loss(z, weight, index, tau, lam, tau, chunk)


def scaled_gradient(factor):
    """streaming_loss whose gradient is `factor(tau, B)` times the right one."""

    def wrong(z, weight, index, tau, lam=0.0, t=1.0, chunk=8192):
        value = streaming_loss(z, weight, index, tau, lam, t, chunk)
        scaled = factor(tau, len(z)) * value
        return scaled + (value - scaled).detach()

    return wrong


def u_moves(z, weight, index, tau, lam=0.0, t=1.0, chunk=8192):
    return streaming_loss(z, weight, index, tau) + lam * ours.sqrt_kl(z @ weight.T, t, detach=False)


def pull_of_sqrt_kl_dropped(z, weight, index, tau, lam=0.0, t=1.0, chunk=8192):
    return streaming_loss(z, weight, index, tau) + lam * ours.sqrt_kl((z @ weight.T).detach(), t)


def lam_forgotten(z, weight, index, tau, lam=0.0, t=1.0, chunk=8192):
    return streaming_loss(z, weight, index, tau, 0.0, t, chunk)


# -------------------------------------------------------------------------- windows, Newton-Schulz


def sliding(order, size, visits, stride=None, keep=True, new=None):
    stride = stride or max(1, size // visits)
    for begin in range(0, len(order) - size + 1, stride):
        images = order[begin : begin + size]
        entering = images if not keep or not begin else images[size - stride :]
        yield images, entering if new is None else new(images, stride)


def nothing_new_at_first(order, size, visits):
    for number, (images, entering) in enumerate(right.windows(order, size, visits)):
        yield images, entering if number else entering[:0]


def one_pass_short(order, size, visits):
    yield from list(right.windows(order, size, visits))[:-1]


def newest_first(order, size, visits):
    for images, entering in right.windows(order, size, visits):
        yield images.flip(0), entering


def drawn_with_repeats(order, size, visits):
    for images, entering in right.windows(order, size, visits):
        yield images[torch.randint(len(images), (size,))], entering


def iterated(step, divide=torch.linalg.matrix_norm):
    def wrong(matrix, steps=5):
        x, iterates = matrix / divide(matrix), []
        for _ in range(steps + 1):
            iterates.append(x)
            x = step(x)
        return torch.stack(iterates)

    return wrong


QUINTIC = 3.4445, -4.7750, 2.0315


def elementwise(x):
    return QUINTIC[0] * x + QUINTIC[1] * x**3 + QUINTIC[2] * x**5


def without_transposes(x):
    return QUINTIC[0] * x + QUINTIC[1] * x @ x @ x + QUINTIC[2] * x @ x @ x @ x @ x


def cubic_alone(x):
    return QUINTIC[0] * x + QUINTIC[1] * x @ x.mT @ x


def quintic(x):
    return cubic_alone(x) + QUINTIC[2] * x @ x.mT @ x @ x.mT @ x


# ------------------------------------------------------------------------------------- all of them


@dataclass
class Fault:
    """wrong replaces `name` in a file; the check has to say the words."""

    name: str
    wrong: object
    check: str
    words: str

    @property
    def kind(self) -> str:
        return next(kind for kind, names in right.NAMES.items() if self.name in names)

    @property
    def file(self) -> SimpleNamespace:
        return SimpleNamespace(**{self.name: self.wrong})


def bank(wrong, check, words):
    return Fault("MemoryBank", wrong, check, words)


NPID, UNIT = "test_m_is_the_share_of_the_old_row", "test_rows_stay_unit_under_npids_rule"
STEP, OWN = "test_the_corrected_rule_is_a_gradient_step", "test_the_own_row_is_pulled_by_one_minus_p"
TWICE = "test_an_image_drawn_twice_adds_both_views"
SIGN = "test_other_rows_are_pushed_away_and_the_own_row_is_pulled"
SAMPLED = "test_sampled_rows_move_as_the_rule_says"
FORWARD = "test_forward_initialisation_fills_row_i_with_view_i"
BANKS = {
    "normalisation left out": bank(NotNormalised, UNIT, "normalise the rows"),
    "the same, seen in the corrected rule": bank(
        NotNormalised, "test_rows_stay_unit_under_the_corrected_rule", "normalise the rows"
    ),
    "P dropped": bank(NoP, "test_the_corrected_rule_moves_every_row", "P is dropped"),
    "own row pulled in full": bank(OwnInFull, OWN, "1 - P_y"),
    "no P for the own row": bank(OwnInFull, "test_the_pushes_add_up_to_the_pull", "own row is in the softmax"),
    "sign flipped": bank(SignFlipped, SIGN, "DOWN the gradient"),
    "others pulled": bank(PullsAll, SIGN, "pushed away from a view"),
    "others pulled, own row more": bank(AllPulledMore, SIGN, "pushed away from a view"),
    "tau forgotten": bank(NoTau, "test_p_has_the_temperature_tau", "P has the temperature tau"),
    "tau multiplies": bank(TauMultiplies, "test_p_has_the_temperature_tau", "do not multiply"),
    "mean for the sum": bank(Mean, "test_the_views_of_a_batch_add", "yours is their mean"),
    "1 / tau kept": bank(TauKept, OWN, "1/tau is absorbed"),
    "1 / tau kept, seen in the step": bank(TauKept, STEP, "1/tau is absorbed"),
    "1 / tau kept, and a mean": bank(TauAndMean, STEP, "1/tau is absorbed.*mean over the batch"),
    "m and 1 - m swapped": bank(SharesSwapped, NPID, "OLD row"),
    "swapped in the corrected rule": bank(SharesSwapped, STEP, "m and 1 - m are swapped"),
    "1 - m missing": bank(NoOneMinusM, STEP, "1 - m is missing"),
    "1 - m missing from NPID's rule": bank(NoOneMinusM, NPID, "1 - m is missing"),
    "m missing": bank(NoM, STEP, "m is missing"),
    "m missing from NPID's rule": bank(NoM, NPID, "m is missing"),
    "m and 1 - m missing": bank(NoMomentum, NPID, "m and 1 - m are missing"),
    "old row missing": bank(NoOldRow, NPID, "old row is missing"),
    "old row missing from the corrected rule": bank(NoOldRow, STEP, "old row is missing"),
    "the last of equal images wins": bank(LastOneWins, TWICE, "drawn twice"),
    "step[index] += z in NPID's rule": bank(StepLosesDuplicates, TWICE, "drawn twice"),
    "step[index] += z in the corrected rule": bank(
        StepLosesDuplicates, TWICE + "_to_the_corrected_rule", "drawn twice.*one of two equal indices"
    ),
    "an update of a copy": bank(OnACopy, "test_npid_moves_only_the_own_rows", "moved nothing: it changes a copy"),
    "similarity used where it is None": bank(SimilarityTakenForGranted, STEP, "None where the caller has none"),
    "the corrected rule not written yet": bank(NotWrittenYet, STEP, "the rule 'corrected' is not written yet"),
    "NPID with a minus": bank(NpidWithAMinus, NPID, "TOWARDS its view"),
    "NPID with a mean": bank(NpidMean, "test_an_image_drawn_twice_adds_both_views", "not a mean over the batch"),
    "rule not looked at": bank(AllRows, "test_npid_moves_only_the_own_rows", "look at self.rule"),
    "softmax over the batch": bank(SoftmaxOverTheBatch, STEP, "softmax over the batch"),
    "exp not divided by its sum": bank(ExpNotDivided, STEP, "not divided by its sum"),
    "log P for P": bank(LogP, STEP, "its logarithm"),
    "cosines for P": bank(CosinesForP, STEP, "the cosines themselves"),
    "one P for all views": bank(MeanP, STEP, "each view has its own P"),
    "own rows only": bank(OwnRowsOnly, "test_the_corrected_rule_moves_every_row", "every row moves"),
    "the step is normalised first": bank(StepNormalised, STEP, "normalise once, after the sum"),
    "rows in float32": bank(Float32, UNIT, "float64 in the checks"),
    "a float32 assignment": bank(Float32Rows, UNIT, "keep the dtype"),
    "rows not finite": bank(NotFinite, UNIT, "not finite"),
    "a product that does not fit": bank(
        WrongShape, "test_rows_stay_unit_under_the_corrected_rule", "stops with RuntimeError.*line"
    ),
    "one view after the other": bank(OneAfterTheOther, "test_p_is_the_one_the_loss_saw", "before any row"),
    "bank updated before the similarity": bank(BankFirst, "test_reading_the_bank_moves_nothing", "similarity first"),
    "own positive among the negatives": bank(
        OwnAmongNegatives, "test_the_positive_is_never_among_the_negatives", "never among the negatives"
    ),
    "gradient through the bank": bank(Parameter, "test_the_gradient_stops_at_the_bank", "stops at the bank"),
    "random rows of any length": bank(RandomNotUnit, "test_a_random_bank_has_unit_rows", "unit rows"),
    "forward initialisation by order": bank(ForwardByOrder, FORWARD, "by index"),
    "forward initialisation in eval mode": bank(ForwardInEval, FORWARD, "train mode"),
    "columns: taken for all rows": bank(AllRowsForColumns, SAMPLED, "speak of M rows of the N"),
    "columns: the other rows move, too": bank(OtherRowsMoveToo, SAMPLED, "so only they move"),
    "columns: target taken for images": bank(OwnByImage, SAMPLED, "which column is a view's own"),
}


def nce(wrong, check, words):
    return Fault("nce", wrong, check, words)


def nce_by_hand(factor, words):
    """nce_gradient, `factor(tau, B, N)` times the right one."""
    wrong = lambda s, y, tau: right.nce_gradient(s, y, tau) * factor(tau, *s.shape)  # noqa: E731
    return Fault("nce_gradient", wrong, "test_the_gradient_of_nce_by_hand", words)


VALUE, TAU, BACK = (
    "test_nce_is_minus_log_p_of_the_own_row", "test_nce_divides_by_tau", "test_the_gradient_of_nce_is_p_minus_one_hot",
)  # fmt: skip
NCES = {
    "NCE: tau forgotten": nce(lambda s, y, tau: ours.nce(s, y, 1.0), TAU, "no effect"),
    "NCE: tau multiplies": nce(lambda s, y, tau: ours.nce(s, y, 1 / tau), TAU, "multiplies the cosines by tau"),
    "NCE: own cosine not divided": nce(nce_own_not_divided, TAU, "the own cosine is not"),
    "NCE: sum for the mean": nce(lambda s, y, tau: len(s) * ours.nce(s, y, tau), VALUE, "yours is the sum"),
    "NCE: mean over all elements": nce(lambda s, y, tau: ours.nce(s, y, tau) / s.shape[1], VALUE, "B x N elements"),
    "NCE: sign": nce(lambda s, y, tau: -ours.nce(s, y, tau), VALUE, "the sign: L_NCE is a cost"),
    "NCE: own row left out of P": nce(nce_without_own, VALUE, "ALL rows"),
    "NCE: softmax over the batch": nce(nce_over_the_batch, VALUE, "yours is over the batch"),
    "NCE: cross_entropy of a softmax": nce(nce_of_a_softmax, VALUE, "takes logits, not a softmax"),
    "NCE: P without its logarithm": nce(
        lambda s, y, tau: -(s / tau).softmax(1).gather(1, y[:, None]).mean(), VALUE, "L_NCE has a logarithm"
    ),
    "NCE: in bits": nce(lambda s, y, tau: ours.nce(s, y, tau) / math.log(2), VALUE, "base 2"),
    "NCE: no return": nce(nce_without_return, VALUE, "return forgotten"),
    "NCE: .item()": nce(nce_as_a_float, VALUE, r"not a tensor.*\.item\(\)"),
    "NCE: float32": nce(nce_in_float32, VALUE, "returns float32 for float64"),
    "NCE: one loss per view": nce(nce_per_view, VALUE, "take the mean over the batch"),
    "NCE: an exception": nce(nce_that_stops, VALUE, r"stops with \w+: .*line \d+"),
    "NCE: detached": nce(lambda s, y, tau: ours.nce(s, y, tau).detach(), VALUE, "without a gradient"),
    "NCE: a log of zero": nce(lambda s, y, tau: ours.nce(s, y, tau) * torch.inf, VALUE, "not finite"),
    "NCE: only the pull has a gradient": nce(nce_detached_p, BACK, "P is missing"),
    "NCE by hand: 1 / tau forgotten": nce_by_hand(lambda tau, b, n: tau, "1 / tau, from the logits"),
    "NCE by hand: 1 / B forgotten": nce_by_hand(lambda tau, b, n: b, "1 / B, from the mean"),
    "NCE by hand: 1 / B and 1 / tau forgotten": nce_by_hand(lambda tau, b, n: tau * b, "1 / B .*1 / tau"),
    "NCE by hand: tau multiplies": nce_by_hand(lambda tau, b, n: tau**2, "tau divides"),
    "NCE by hand: 1 / (B N)": nce_by_hand(lambda tau, b, n: 1 / n, "B x N elements"),
    "NCE by hand: sign": nce_by_hand(lambda tau, b, n: -1, "the sign"),
    "NCE by hand: P alone": Fault(
        "nce_gradient",
        lambda s, y, tau: (s / tau).softmax(1) / (len(s) * tau),
        "test_the_gradient_of_nce_by_hand",
        "own row is missing",
    ),
    "NCE by hand: no return": Fault(
        "nce_gradient", lambda s, y, tau: None, "test_the_gradient_of_nce_by_hand", "return forgotten"
    ),
    "NCE by hand: summed over the batch": Fault(
        "nce_gradient",
        lambda s, y, tau: right.nce_gradient(s, y, tau).sum(0),
        "test_the_gradient_of_nce_by_hand",
        "one number for each element",
    ),
}


def sqrt_kl(wrong, check, words):
    return Fault("sqrt_kl", wrong, check, words)


def sqrt_kl_by_hand(wrong, words, check="test_the_gradient_of_sqrt_kl_by_hand"):
    return Fault("sqrt_kl_gradient", wrong, check, words)


ROOT, EIGHTH = (
    "test_u_is_the_softmax_at_twice_the_temperature", "test_near_uniform_sqrt_kl_is_an_eighth_of_the_variance",
)  # fmt: skip
HELD, OTHER = "test_u_is_held_constant", "test_the_other_direction_is_kl_u_p"
MOVES, TURNED = (
    "test_the_gradient_by_hand_has_the_term_of_a_moving_u", "test_the_gradient_by_hand_in_the_other_direction",
)  # fmt: skip
SQRT_KLS = {
    "SqrtKL: u not normalised": sqrt_kl(u_not_normalised, ROOT, "DIVIDED BY ITS SUM"),
    "SqrtKL: u sharper": sqrt_kl(u_sharper, ROOT, "at TWICE the temperature: yours is at half"),
    "SqrtKL: sum for the mean": sqrt_kl(sqrt_kl_summed, ROOT, "yours is the sum"),
    "SqrtKL: KL reversed": sqrt_kl(kl_reversed, ROOT, "not symmetric"),
    "SqrtKL: sign": sqrt_kl(lambda s, t=1.0: -ours.sqrt_kl(s, t), ROOT, "never below 0"),
    "SqrtKL: sign, reversed": sqrt_kl(lambda s, t=1.0: -kl_reversed(s, t), ROOT, "never below 0.*direction"),
    "SqrtKL: F.kl_div's mean": sqrt_kl(kl_of_torch_right, ROOT, "averaged over all B x N"),
    "SqrtKL: F.kl_div's mean, turned round": sqrt_kl(kl_of_torch, ROOT, "direction is the other one.*B x N"),
    "SqrtKL: F.kl_div's sum, turned round": sqrt_kl(kl_of_torch_summed, ROOT, "direction is the other one.*sum"),
    "SqrtKL: cross-entropy alone": sqrt_kl(cross_entropy_alone, ROOT, "MINUS an entropy"),
    "SqrtKL: entropy alone": sqrt_kl(entropy_alone, ROOT, "entropy alone"),
    "SqrtKL: logarithms forgotten": sqrt_kl(kl_without_logs, ROOT, "logarithms' difference"),
    "SqrtKL: .item()": sqrt_kl(lambda s, t=1.0: ours.sqrt_kl(s, t).item(), ROOT, r"not a tensor.*\.item\(\)"),
    "SqrtKL: float32": sqrt_kl(lambda s, t=1.0: ours.sqrt_kl(s.float(), t), ROOT, "returns float32"),
    "SqrtKL: no return": sqrt_kl(lambda s, t=1.0: None, ROOT, "return forgotten"),
    "SqrtKL: T forgotten": sqrt_kl(
        lambda s, t=1.0: ours.sqrt_kl(s), "test_sqrt_kl_divides_by_its_temperature", "no effect"
    ),
    "SqrtKL: T multiplies": sqrt_kl(
        lambda s, t=1.0: ours.sqrt_kl(s, 1 / t), "test_sqrt_kl_divides_by_its_temperature", "multiplies by T"
    ),
    "SqrtKL: stop-gradient forgotten": sqrt_kl(always_moving, HELD, "term of a u that moves"),
    "SqrtKL: P held in place of u": sqrt_kl(p_held, HELD, "P that is detached"),
    "SqrtKL: u always held": sqrt_kl(always_held, "test_u_may_move", "term of a moving u is missing"),
    "SqrtKL: direction ignored": sqrt_kl(direction_ignored, OTHER, "not symmetric"),
    "SqrtKL: other direction, u moving": sqrt_kl(always_moving, OTHER, "term of a u that moves"),
    "SqrtKL: third root": sqrt_kl(u_at_the_wrong_curvature, EIGHTH, "third root"),
    "SqrtKL: variance in its place": sqrt_kl(second_order_only, EIGHTH, "third central moment"),
    "SqrtKL by hand: 1/2 forgotten": sqrt_kl_by_hand(lambda s, t: 2 * right.sqrt_kl_gradient(s, t), "1/2, which u"),
    "SqrtKL by hand: 1 / B and 1 / T forgotten": sqrt_kl_by_hand(
        lambda s, t: len(s) * t * right.sqrt_kl_gradient(s, t), "1 / B .*1 / T"
    ),
    "SqrtKL by hand: 1 / T forgotten": sqrt_kl_by_hand(lambda s, t: t * right.sqrt_kl_gradient(s, t), "1 / T"),
    "SqrtKL by hand: sign": sqrt_kl_by_hand(lambda s, t: -right.sqrt_kl_gradient(s, t), "sign of the whole gradient"),
    "SqrtKL by hand: H(P) forgotten": sqrt_kl_by_hand(by_hand_no_entropy, r"H\(P\) is missing"),
    "SqrtKL by hand: u moves, where it is held": sqrt_kl_by_hand(
        lambda s, t: right.sqrt_kl_gradient(s, t, detach=False), "term of a u that moves"
    ),
    "SqrtKL by hand: moving u's term missing": sqrt_kl_by_hand(by_hand(0), "moving u is missing", MOVES),
    "SqrtKL by hand: half of the term": sqrt_kl_by_hand(by_hand(0.5), "there half", MOVES),
    "SqrtKL by hand: twice the term": sqrt_kl_by_hand(by_hand(2), "there twice", MOVES),
    "SqrtKL by hand: the term's sign": sqrt_kl_by_hand(by_hand(-1), "wrong sign", MOVES),
    "SqrtKL by hand: u||p's sign": sqrt_kl_by_hand(by_hand_other_sign, "sign of the whole gradient", TURNED),
    "SqrtKL by hand: direction ignored": sqrt_kl_by_hand(by_hand_other_direction, "direction is the other", TURNED),
    "SqrtKL by hand: u||p, moving u's sign": sqrt_kl_by_hand(by_hand(-1), "wrong sign", TURNED),
    "SqrtKL by hand: u||p, moving u missing": sqrt_kl_by_hand(by_hand(0), "moving u is missing", TURNED),
}


def stream(wrong, check, words):
    return Fault("streaming_loss", wrong, check, words)


SAME, GRADIENT, KEPT = (
    "test_streaming_nce_has_the_same_value", "test_streaming_has_the_same_gradient",
    "test_streaming_keeps_no_matrix_for_the_backward_pass",
)  # fmt: skip
TOO, OVERFLOW = "test_streaming_has_sqrt_kl_too", "test_streaming_does_not_overflow"
STREAMS = {
    "streaming: a softmax a chunk": stream(each_chunk_alone, SAME, "ONE normaliser"),
    "streaming: last chunk dropped": stream(last_chunk_dropped, SAME, "last short one"),
    "streaming: sum for the mean": stream(
        lambda z, *args, **options: len(z) * streaming_loss(z, *args, **options), SAME, "yours is the sum"
    ),
    "streaming: only the pull": stream(only_the_pull, GRADIENT, "only the pull"),
    "streaming: 1 / tau forgotten": stream(scaled_gradient(lambda tau, b: tau), GRADIENT, "1 / tau is missing"),
    "streaming: 1 / B forgotten": stream(scaled_gradient(lambda tau, b: b), GRADIENT, "1 / B is missing"),
    "streaming: sign of the gradient": stream(scaled_gradient(lambda tau, b: -1), GRADIENT, "the sign"),
    "streaming: upstream gradient ignored": stream(
        upstream_ignored, "test_streaming_heeds_the_upstream_gradient", "the upstream gradient"
    ),
    "streaming: overflow": stream(overflowing, OVERFLOW, "largest logit"),
    "streaming: the first chunk's maximum": stream(the_first_maximum, OVERFLOW, "first chunk's maximum"),
    "streaming: SqrtKL forgotten": stream(lam_forgotten, TOO, "lam > 0"),
    "streaming: T is tau": stream(shared_temperature, TOO, "T is not tau"),
    "streaming: u moves": stream(u_moves, TOO, "held constant"),
    "streaming: SqrtKL without gradient": stream(pull_of_sqrt_kl_dropped, TOO, "gradient of SqrtKL is missing"),
    "streaming: autograd keeps the chunks": stream(kept_chunks, KEPT, "autograd keeps"),
    "streaming: a full matrix in the forward pass": stream(full_matrix, KEPT, r"no \(B, N\) matrix is made"),
    "streaming: chunks kept on ctx": stream(chunks_on_ctx, KEPT, "list of chunks on ctx"),
}


def window(wrong, words):
    return Fault("windows", wrong, "test_windows_hold_the_images_that_ours_hold", words)


def newton(wrong, words):
    return Fault("newton_schulz", wrong, "test_newton_schulz_brings_all_singular_values_near_one", words)


NEW = {
    "windows: slides by one": window(lambda o, w, r: sliding(o, w, r, 1), "slides by W / r"),
    "windows: side by side": window(lambda o, w, r: sliding(o, w, r, w), "slides by W / r"),
    "windows: all enter": window(lambda o, w, r: sliding(o, w, r, keep=False), "not in the window before"),
    "windows: those that leave": window(lambda o, w, r: sliding(o, w, r, new=lambda i, n: i[:n]), "images that enter"),
    "windows: nothing enters at first": window(nothing_new_at_first, "in pass 0 all are new"),
    "windows: a pass too few": window(one_pass_short, "a cycle ends"),
    "windows: newest first": window(newest_first, "entered first"),
    "windows: images twice": window(drawn_with_repeats, "in a window twice"),
    "windows: no pairs": window(lambda o, w, r: (images for images, _ in sliding(o, w, r)), "yields pairs"),
    "windows: too small": window(lambda o, w, r: sliding(o, w // 2, r), "a window holds W"),
    "windows: nothing": window(lambda o, w, r: iter(()), "yields nothing"),
    "Newton-Schulz: elementwise powers": newton(iterated(elementwise), "products, X X'"),
    "Newton-Schulz: no transposes": newton(iterated(without_transposes), "multiplies X X X"),
    "Newton-Schulz: no fifth power": newton(iterated(cubic_alone), "fifth power is missing"),
    "Newton-Schulz: not divided": newton(iterated(quintic, lambda x: 1), "Frobenius norm"),
    "Newton-Schulz: the last iterate alone": newton(lambda x: right.newton_schulz(x)[-1], "six iterates"),
}
FAULTS = BANKS | NCES | SQRT_KLS | STREAMS | NEW
