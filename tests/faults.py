"""Faults to plant: a bank or a loss, wrong in one way. `figures/break_it.py` trains with some.

FAULTS lists them all, each with the check of test_exercises.py that has to catch it, and words that
the check's message has to contain.
"""

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


def u_moves(z, weight, index, tau, lam=0.0, t=1.0, chunk=8192):
    return streaming_loss(z, weight, index, tau) + lam * ours.sqrt_kl(z @ weight.T, t, detach=False)


def pull_of_sqrt_kl_dropped(z, weight, index, tau, lam=0.0, t=1.0, chunk=8192):
    return streaming_loss(z, weight, index, tau) + lam * ours.sqrt_kl((z @ weight.T).detach(), t)


def lam_forgotten(z, weight, index, tau, lam=0.0, t=1.0, chunk=8192):
    return streaming_loss(z, weight, index, tau, 0.0, t, chunk)


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
        return "bank" if self.name == "MemoryBank" else "loss"

    @property
    def file(self) -> SimpleNamespace:
        return SimpleNamespace(**{self.name: self.wrong})


FAULTS = {
    "normalisation left out": Fault("MemoryBank", NotNormalised, "test_rows_stay_unit", "normalise the rows"),
    "P dropped": Fault("MemoryBank", NoP, "test_the_corrected_rule_moves_every_row", "every row moves"),
    "own row pulled in full": Fault("MemoryBank", OwnInFull, "test_the_own_row_is_pulled_by_one_minus_p", "1 - P_y"),
    "no P for the own row": Fault("MemoryBank", OwnInFull, "test_the_pushes_add_up_to_the_pull", "add up to the pull"),
    "sign flipped": Fault(
        "MemoryBank", SignFlipped, "test_other_rows_are_pushed_away_and_the_own_row_is_pulled", "DOWN the gradient"
    ),
    "others pulled": Fault(
        "MemoryBank", PullsAll, "test_other_rows_are_pushed_away_and_the_own_row_is_pulled", "pushed away from a view"
    ),
    "tau forgotten": Fault(
        "MemoryBank", NoTau, "test_p_has_the_temperature_tau", r"temperature were 1, where tau is 0\.1"
    ),
    "mean for the sum": Fault("MemoryBank", Mean, "test_the_views_of_a_batch_add", r"pull 0\.33 times"),
    "m and 1 - m swapped": Fault("MemoryBank", SharesSwapped, "test_m_is_the_share_of_the_old_row", "OLD row"),
    "swapped in the corrected rule": Fault(
        "MemoryBank", SharesSwapped, "test_the_corrected_rule_is_a_gradient_step", "look at m"
    ),
    "the last of equal images wins": Fault(
        "MemoryBank", LastOneWins, "test_an_image_drawn_twice_adds_both_views", "drawn twice"
    ),
    "rule not looked at": Fault("MemoryBank", AllRows, "test_npid_moves_only_the_own_rows", "only the own rows"),
    "one view after the other": Fault(
        "MemoryBank", OneAfterTheOther, "test_p_is_the_one_the_loss_saw", "before any row"
    ),
    "bank updated before the similarity": Fault(
        "MemoryBank", BankFirst, "test_reading_the_bank_moves_nothing", "similarity first"
    ),
    "own positive among the negatives": Fault(
        "MemoryBank", OwnAmongNegatives, "test_the_positive_is_never_among_the_negatives", "never among the negatives"
    ),
    "gradient through the bank": Fault(
        "MemoryBank", Parameter, "test_the_gradient_stops_at_the_bank", "stops at the bank"
    ),
    "random rows of any length": Fault("MemoryBank", RandomNotUnit, "test_a_random_bank_has_unit_rows", "unit rows"),
    "forward initialisation by order": Fault(
        "MemoryBank", ForwardByOrder, "test_forward_initialisation_fills_row_i_with_view_i", "by index"
    ),
    "forward initialisation in eval mode": Fault(
        "MemoryBank", ForwardInEval, "test_forward_initialisation_fills_row_i_with_view_i", "train mode"
    ),
    "NCE: tau forgotten": Fault("nce", lambda s, y, tau: ours.nce(s, y, 1.0), "test_nce_divides_by_tau", "s / tau"),
    "NCE: sum for the mean": Fault(
        "nce",
        lambda s, y, tau: len(s) * ours.nce(s, y, tau),
        "test_nce_is_minus_log_p_of_the_own_row",
        "mean over the batch",
    ),
    "NCE: own row left out of P": Fault("nce", nce_without_own, "test_nce_is_minus_log_p_of_the_own_row", "ALL rows"),
    "NCE: only the pull has a gradient": Fault(
        "nce", nce_detached_p, "test_the_gradient_of_nce_is_p_minus_one_hot", "push every row"
    ),
    "NCE by hand: 1 / tau forgotten": Fault(
        "nce_gradient",
        lambda s, y, tau: right.nce_gradient(s, y, tau) * tau,
        "test_the_gradient_of_nce_by_hand",
        "1 / tau",
    ),
    "NCE by hand: 1 / B and 1 / tau forgotten": Fault(
        "nce_gradient",
        lambda s, y, tau: right.nce_gradient(s, y, tau) * tau * len(s),
        "test_the_gradient_of_nce_by_hand",
        "1 / B",
    ),
    "SqrtKL: u not normalised": Fault(
        "sqrt_kl", u_not_normalised, "test_u_is_the_softmax_at_twice_the_temperature", "DIVIDED BY ITS SUM"
    ),
    "SqrtKL: u sharper": Fault("sqrt_kl", u_sharper, "test_u_is_the_softmax_at_twice_the_temperature", "TWICE"),
    "SqrtKL: sum for the mean": Fault(
        "sqrt_kl", sqrt_kl_summed, "test_u_is_the_softmax_at_twice_the_temperature", "mean over the batch"
    ),
    "SqrtKL: T forgotten": Fault(
        "sqrt_kl", lambda s, t=1.0: ours.sqrt_kl(s), "test_sqrt_kl_divides_by_its_temperature", "no effect"
    ),
    "SqrtKL: stop-gradient forgotten": Fault("sqrt_kl", always_moving, "test_u_is_held_constant", "detach it"),
    "SqrtKL: P held in place of u": Fault("sqrt_kl", p_held, "test_u_is_held_constant", "u does not"),
    "SqrtKL: u always held": Fault("sqrt_kl", always_held, "test_u_may_move", "letting u move"),
    "SqrtKL: direction ignored": Fault(
        "sqrt_kl", direction_ignored, "test_the_other_direction_is_kl_u_p", "not symmetric"
    ),
    "SqrtKL: other direction, u moving": Fault(
        "sqrt_kl", always_moving, "test_the_other_direction_is_kl_u_p", "P_k - u_k"
    ),
    "SqrtKL: third root": Fault(
        "sqrt_kl", u_at_the_wrong_curvature, "test_near_uniform_sqrt_kl_is_an_eighth_of_the_variance", r"0\.2\d\d Var"
    ),
    "SqrtKL: variance in its place": Fault(
        "sqrt_kl", second_order_only, "test_near_uniform_sqrt_kl_is_an_eighth_of_the_variance", "third central moment"
    ),
    "SqrtKL by hand: 1/2 forgotten": Fault(
        "sqrt_kl_gradient", lambda s, t: 2 * right.sqrt_kl_gradient(s, t), "test_the_gradient_of_sqrt_kl_by_hand", "1/2"
    ),
    "SqrtKL by hand: 1 / B and 1 / T forgotten": Fault(
        "sqrt_kl_gradient",
        lambda s, t: len(s) * t * right.sqrt_kl_gradient(s, t),
        "test_the_gradient_of_sqrt_kl_by_hand",
        "1 / T",
    ),
    "streaming: a softmax a chunk": Fault(
        "streaming_loss", each_chunk_alone, "test_streaming_nce_has_the_same_value", "ONE normaliser"
    ),
    "streaming: last chunk dropped": Fault(
        "streaming_loss", last_chunk_dropped, "test_streaming_nce_has_the_same_value", "last short one"
    ),
    "streaming: only the pull": Fault(
        "streaming_loss", only_the_pull, "test_streaming_has_the_same_gradient", "gradient streams too"
    ),
    "streaming: overflow": Fault("streaming_loss", overflowing, "test_streaming_does_not_overflow", "largest logit"),
    "streaming: SqrtKL forgotten": Fault("streaming_loss", lam_forgotten, "test_streaming_has_sqrt_kl_too", "lam > 0"),
    "streaming: u moves": Fault("streaming_loss", u_moves, "test_streaming_has_sqrt_kl_too", "held constant"),
    "streaming: SqrtKL without gradient": Fault(
        "streaming_loss", pull_of_sqrt_kl_dropped, "test_streaming_has_sqrt_kl_too", "half a covariance"
    ),
    "streaming: autograd keeps the chunks": Fault(
        "streaming_loss", kept_chunks, "test_streaming_keeps_no_matrix_for_the_backward_pass", "autograd keeps"
    ),
}
