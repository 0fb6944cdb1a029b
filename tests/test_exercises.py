"""The checks of EXERCISES.md, one for each idea: on our bank.py and loss.py, or on yours.

    .venv/bin/python -m pytest tests/test_exercises.py                                         ours
    .venv/bin/python -m pytest tests/test_exercises.py --bank my_bank.py --loss my_loss.py     yours

A check that fails says which idea is missed. What your file does not have is skipped. All is in
float64, so "equal" means equal to eight digits. `tests/lab/test_faults.py` shows that every planted
fault is caught by the check of its idea.
"""

import importlib
import importlib.util
import inspect
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import loss as ours
from lab.large_bank import streaming_loss

N, D, B = 24, 8, 3
WRITTEN_IN = {
    "MemoryBank": "1 and 3",
    "nce": 2,
    "nce_gradient": 2,
    "sqrt_kl": 5,
    "sqrt_kl_gradient": 5,
    "streaming_loss": 9,
}


def nce_gradient(similarity, target, temperature):
    """dL_NCE/ds (B, N), in closed form."""
    p = (similarity / temperature).softmax(1)
    return (p - F.one_hot(target, similarity.shape[1])) / (len(p) * temperature)


def sqrt_kl_gradient(similarity, temperature=1.0, direction="p||u", detach=True):
    """dL_SqrtKL/ds (B, N), in closed form."""
    p, u = (similarity / temperature).softmax(1), (similarity / (2 * temperature)).softmax(1)
    if direction == "p||u":
        entropy = -(p * p.log()).sum(1, keepdim=True)
        row = p * (p.log() + entropy) / 2 + (0 if detach else (u - p) / 2)
    else:
        kl = (u * (u / p).log()).sum(1, keepdim=True)
        row = p - u + (0 if detach else u * ((u / p).log() - kl) / 2)
    return row / (len(p) * temperature)


def opened(request, name):
    path = request.config.getoption(name)
    if not path:
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(f"my_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def bank(request):
    return opened(request, "bank")


@pytest.fixture
def loss(request):
    file = opened(request, "loss")
    if file is ours:  # has its gradients as comments; lab/ has the loss that streams
        elsewhere = dict(nce_gradient=nce_gradient, sqrt_kl_gradient=sqrt_kl_gradient, streaming_loss=streaming_loss)
        file = SimpleNamespace(**vars(ours), **elsewhere)
    return file


def need(file, name, option=None):
    """What the file calls `name`. Skips the check if it has none, or if it lacks the option."""
    if not hasattr(file, name):
        pytest.skip(f"your file has no {name} yet: exercise {WRITTEN_IN[name]} of EXERCISES.md")
    if option and option not in inspect.signature(getattr(file, name)).parameters:
        pytest.skip(f"your {name} does not take {option}= yet: exercise {WRITTEN_IN[name]} of EXERCISES.md")
    return getattr(file, name)


def require(holds, idea):
    if not holds:
        pytest.fail(idea, pytrace=False)


def equal(a, b):
    return bool(torch.allclose(torch.as_tensor(a), b, rtol=1e-8, atol=1e-11))


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1)


def bank_of(bank, rule="corrected", m=0.5, tau=0.1):
    table = need(bank, "MemoryBank")(N, D, momentum=m, rule=rule, temperature=tau).double()
    table.weight.data.copy_(unit(N, D, seed=7))
    return table


def moved(bank, z, index, similarity=None, **options):
    """The rows before and after one update: (N, D) each."""
    table = bank_of(bank, **options)
    before = table.weight.detach().clone()
    if similarity is None:
        table.update(z, index)
    else:
        table.update(z, index, similarity)
    return before, table.weight.detach()


def pulls(before, after, z):
    """How strongly each view pulls each row at m = 1/2.

    The c_ki (N, B) in w_k <- normalise(w_k + Σ_i c_ki z_i). A row's new direction lies in the span
    of its old one and the views, so its coordinates in this span give c, whatever its length.
    """
    frames = torch.cat([before[:, None], z.expand(len(before), *z.shape)], 1).mT  # (N, D, 1 + B)
    coordinates = torch.linalg.lstsq(frames, after[..., None]).solution[..., 0]  # (N, 1 + B)
    return coordinates[:, 1:] / coordinates[:, :1]


def one_view(own_cosine=0.0, seed=3):
    """A view z (1, D) of image 4 that has this cosine with row 4 and is random otherwise."""
    w = unit(N, D, seed=7)[4]
    other = unit(1, D, seed=seed)[0]
    side = F.normalize(other - (other @ w) * w, dim=0)
    return (own_cosine * w + (1 - own_cosine**2) ** 0.5 * side)[None], torch.tensor([4])


OTHERS = torch.arange(N) != 4

# ----------------------------------------------------------------------------- the bank: both rules


def test_rows_stay_unit(bank):
    for rule in ("npid", "corrected"):
        length = moved(bank, unit(B, D), torch.tensor([4, 9, 0]), rule=rule)[1].norm(dim=1)
        worst = length[(length - 1).abs().argmax()].item()
        require(
            equal(length, torch.ones_like(length)),
            f"normalise the rows: s = z · w is a cosine only while every w_k has length 1, and after one {rule} "
            f"update a row has length {worst:.3f}. A row that grows gets louder in every softmax, whatever it points "
            "at.",
        )


def test_npid_moves_only_the_own_rows(bank):
    before, after = moved(bank, unit(B, D), torch.tensor([4, 9, 0]), rule="npid")
    turned = (F.normalize(after, dim=1) - before).norm(dim=1) > 1e-9
    require(
        turned.nonzero()[:, 0].tolist() == [0, 4, 9],
        "only the own rows move under NPID's rule: a batch of images 4, 9 and 0 turned rows "
        f'{turned.nonzero()[:, 0].tolist()}. Look at `rule`: "npid" is w_y <- normalise(m w_y + (1 - m) z_y), and '
        "nothing else.",
    )


def test_m_is_the_share_of_the_old_row(bank):
    z, index = one_view()
    before, after = moved(bank, z, index, rule="npid", m=0.9)
    require(
        equal(F.normalize(after[4], dim=0), F.normalize(0.9 * before[4] + 0.1 * z[0], dim=0)),
        "m is the share of the OLD row: w_y <- normalise(m w_y + (1 - m) z_y), so at m = 0.9 the row is mostly its "
        f"old self. Its cosine with the old one is {F.cosine_similarity(after[4], before[4], dim=0):.3f} here, "
        "expected 0.994: is it m z + (1 - m) w?",
    )


def test_an_image_drawn_twice_adds_both_views(bank):
    z, index = unit(B, D), torch.tensor([8, 8, 2])
    before, after = moved(bank, z, index, rule="npid")
    require(
        equal(F.normalize(after[8], dim=0), F.normalize(before[8] + z[0] + z[1], dim=0)),
        "an image that is drawn twice adds both of its views: weight[index] = ... writes one after the other and the "
        "last one wins. Sum the views of equal indices first (index_add_, or a one-hot matrix times z).",
    )


# ------------------------------------------------------------------------- the bank: corrected rule


def test_the_corrected_rule_moves_every_row(bank):
    z, index = one_view()
    c = pulls(*moved(bank, z, index), z)[:, 0]
    still = (c.abs() < 1e-12).sum().item()
    require(
        still == 0,
        f"every row moves: dL/dw_k = (P_k - [k = y]) z / tau holds for every k, and {still} of {N} rows stayed where "
        "they were. Where P is dropped, NPID's rule remains.",
    )


def test_other_rows_are_pushed_away_and_the_own_row_is_pulled(bank):
    z, index = one_view()
    before, after = moved(bank, z, index)
    closer = F.cosine_similarity(after, z) - before @ z[0]
    require(
        closer[4] > 0,
        "the sign: the rule goes DOWN the gradient, by [k = y] - P_k. One update took the image's own row away from "
        "its view.",
    )
    require(
        (closer[OTHERS] < 1e-12).all(),
        "the sign: rows of other images are pushed away from a view, by -P_k z, and here some came closer to it.",
    )


def test_the_own_row_is_pulled_by_one_minus_p(bank):
    for cosine in (0.0, 0.5):
        z, index = one_view(cosine)
        before, after = moved(bank, z, index)
        p, c = (before @ z[0] / 0.1).softmax(0)[4].item(), pulls(before, after, z)[4, 0].item()
        require(
            abs(c - (1 - p)) < 0.05,
            f"the own row is pulled by 1 - P_y: an image that is recognised (P_y = {p:.2f}) has little left to pull, "
            f"{1 - p:.2f}, and yours pulls with {c:.2f}. The -P_k of the gradient is there for k = y too.",
        )


def test_the_pushes_add_up_to_the_pull(bank):
    z, index = one_view(0.5)
    c = pulls(*moved(bank, z, index), z)[:, 0]
    require(
        abs(c.sum()) < 1e-8 * c.abs().sum(),
        "the pushes add up to the pull, because P sums to 1 over the rows: the strengths [k = y] - P_k of one view "
        f"sum to 0, and yours sum to {c.sum():.3f} (pull {c[4]:.3f}, pushes {c[OTHERS].sum():.3f}). Over what is your "
        "softmax taken, and is it there for k = y?",
    )


def test_p_has_the_temperature_tau(bank):
    for tau in (0.1, 0.4):
        z, index = one_view()
        before, after = moved(bank, z, index, tau=tau)
        s, c = (before @ z[0])[OTHERS], pulls(before, after, z)[OTHERS, 0].abs().clamp(min=1e-300).log()
        slope = ((s - s.mean()) * (c - c.mean())).sum() / (s - s.mean()).square().sum()  # log c = s / T + const
        require(
            abs(slope * tau - 1) < 1e-4,
            "P is the softmax of s / tau, the P of the loss: yours is spread over the rows as if the temperature "
            f"were {1 / slope:.3g}, where tau is {tau}.",
        )


def test_the_views_of_a_batch_add(bank):
    z, index = unit(B, D), torch.tensor([4, 9, 0])
    together = pulls(*moved(bank, z, index), z)  # (N, B)
    alone = torch.cat([pulls(*moved(bank, z[i : i + 1], index[i : i + 1]), z[i : i + 1]) for i in range(B)], 1)
    ratio = (together.abs().sum() / alone.abs().sum()).item()
    require(
        equal(together, alone),
        f"the views of a batch add, Σ_i, each with the P it would have alone: {B} views at once pull {ratio:.2f} "
        f"times as strongly as they do one by one. ({1 / B:.2f} would be a mean over the batch; the loss is one, but "
        "the rule has absorbed the 1 / B.)",
    )


def test_p_is_the_one_the_loss_saw(bank):
    z, index = one_view()
    seen = torch.linspace(-0.4, 0.4, N, dtype=torch.float64)[None]  # as if the bank had been another one then
    c = pulls(*moved(bank, z, index, similarity=seen), z)[OTHERS, 0].abs().clamp(min=1e-300).log()
    fit = torch.corrcoef(torch.stack([c, seen[0, OTHERS]]))[0, 1]
    require(
        fit > 0.999,
        "P is the one the loss saw: it comes from the similarities of this step, before any row has moved. `update` "
        "was given them and made its own P; so rows that were moved for one view change the P of the next.",
    )


def test_the_corrected_rule_is_a_gradient_step(bank):
    z, index, m, tau = unit(B, D), torch.tensor([4, 9, 0]), 0.7, 0.1
    before, after = moved(bank, z, index, m=m, tau=tau)
    w = before.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(z @ w.T / tau, index), w)
    require(
        equal(after, F.normalize(m * before - (1 - m) * tau * B * gradient, dim=1)),
        "the corrected rule is a gradient step: normalise(m w_k - (1 - m) tau B dL_NCE/dw_k), with autograd's "
        "gradient for a bank that is a parameter. Yours differs; if every other check of the bank passes, look at m "
        "and at the order of sum and normalisation.",
    )


# --------------------------------------------------------------- the bank: what surrounds the rules


def test_reading_the_bank_moves_nothing(bank):
    table = bank_of(bank)
    before, index = table.weight.detach().clone(), torch.tensor([4, 9, 0])
    table.locate(index)
    table.similarity(unit(B, D))
    require(
        equal(table.weight.detach(), before),
        "similarity first, update afterwards: asking for the similarities has moved the bank. A row that was moved "
        "towards z has z in it, so z finds it whatever the image shows, and the loss falls without anything being "
        "learnt.",
    )


def test_the_positive_is_never_among_the_negatives(bank):
    table, index = bank_of(bank), torch.tensor([4, 9, 0])
    counts = torch.zeros(N, dtype=torch.long)
    for _ in range(50):
        counts += torch.bincount(table.sample(index, 8), minlength=N)
    require(
        (counts[index] == 50).all(),
        "the positive is never among the negatives: each image's own row belongs into the softmax once, as the right "
        "answer. Drawn again as a negative it is pushed away by its own view (rows 4, 9 and 0 came "
        f"{counts[index].tolist()} times in 50 draws).",
    )


def test_the_gradient_stops_at_the_bank(bank):
    table, z = bank_of(bank), unit(B, D).requires_grad_()
    similarity = table.similarity(z)
    F.cross_entropy(similarity / 0.1, torch.tensor([4, 9, 0])).backward()
    table.update(z, torch.tensor([4, 9, 0]))
    require(
        z.grad is not None and not table.weight.requires_grad and table.weight.grad is None,
        "the gradient stops at the bank: it is a constant for autograd and moves by its own rule. Here gradients "
        "reach it: a buffer, not a Parameter; @torch.no_grad() on update; z.detach().",
    )


def test_a_random_bank_has_unit_rows(bank):
    table = bank_of(bank)
    table.init_random()
    length = table.weight.detach().norm(dim=1)
    require(
        equal(length, torch.ones_like(length)),
        f"a bank starts with unit rows: after init_random they have lengths {length.min():.2f} to {length.max():.2f}.",
    )


class Spy(nn.Module):
    """An encoder that notes in which mode it is called."""

    def __init__(self):
        super().__init__()
        self.layer, self.modes = nn.Linear(12, D), []

    def forward(self, x):
        self.modes.append(self.training)
        return self.layer(x.flatten(1))


def test_forward_initialisation_fills_row_i_with_view_i(bank):
    table, encoder = bank_of(bank).float(), Spy()
    images, order = torch.randn(N, 3, 2, 2, generator=torch.Generator().manual_seed(1)), torch.arange(N).flip(0)
    table.init_forward(encoder, [(images[i], i) for i in order.split(7)])
    z = F.normalize(encoder.layer(images.flatten(1)), dim=1).detach()
    require(
        torch.allclose(table.weight, z, atol=1e-5),
        "forward initialisation fills row i with the unit embedding of image i: w_i = z_i, looked up by index and "
        "not by order.",
    )
    require(
        encoder.modes == [True] * 4,
        "forward initialisation runs the encoder in train mode, as the first step will: an untrained BatchNorm in "
        "eval mode has mean 0 and variance 1, and its features are others.",
    )


# --------------------------------------------------------------------------------------- the losses

TARGET = torch.tensor([3, 1, 4, 1, 5])


def cosines():
    generator = torch.Generator().manual_seed(0)
    return (2 * torch.rand(5, 11, generator=generator, dtype=torch.float64) - 1).requires_grad_()


def gradient(value, x):
    return torch.autograd.grad(value, x, retain_graph=True)[0]


def test_nce_is_minus_log_p_of_the_own_row(loss):
    s, nce = cosines(), need(loss, "nce")
    own = s[torch.arange(5), TARGET]
    got, expected = nce(s, TARGET, 1.0), (s.logsumexp(1) - own).mean()
    require(
        not equal(got, 5 * expected),
        "L_NCE is the mean over the batch, and yours the sum: its size depends on --batch-size.",
    )
    require(
        equal(got, expected),
        f"L_NCE is -log P_y, with P the softmax over ALL rows, the own one among them: expected {expected:.4f} at tau "
        f"= 1, got {got:.4f}.",
    )


def test_nce_divides_by_tau(loss):
    s, nce = cosines(), need(loss, "nce")
    require(
        equal(nce(s, TARGET, 0.3), nce(s / 0.3, TARGET, 1.0)) and not equal(nce(s, TARGET, 0.3), nce(s, TARGET, 1.0)),
        "L_NCE reads s / tau: cosines lie in [-1, 1], and only division by a small tau lets one row of thousands "
        "have most of P.",
    )


def test_the_gradient_of_nce_is_p_minus_one_hot(loss):
    s, nce = cosines(), need(loss, "nce")
    require(
        equal(gradient(nce(s, TARGET, 0.3), s), nce_gradient(s.detach(), TARGET, 0.3)),
        "dL_NCE/ds = (P - [j = y]) / (B tau): push every row by P, pull the own one by 1 - P. Autograd finds another "
        "gradient in your nce.",
    )


def test_the_gradient_of_nce_by_hand(loss):
    s = cosines()
    require(
        equal(need(loss, "nce_gradient")(s.detach(), TARGET, 0.3), gradient(ours.nce(s, TARGET, 0.3), s)),
        "dL_NCE/ds by hand: (P - [j = y]) / (B tau) is what autograd gets. Count the factors: 1 / B from the mean, 1 "
        "/ tau from the logits.",
    )


def kl(p, q):
    return (p * (p / q).log()).sum(1).mean()


def test_u_is_the_softmax_at_twice_the_temperature(loss):
    s, sqrt_kl = cosines(), need(loss, "sqrt_kl")
    p, u = s.softmax(1), (s / 2).softmax(1)
    require(
        equal(p.sqrt() / p.sqrt().sum(1, keepdim=True), u), "sqrt of a softmax is a softmax at twice the temperature"
    )
    got = sqrt_kl(s, 1.0)
    require(
        not equal(got, kl(p, p.sqrt())),
        "u is sqrt(P) DIVIDED BY ITS SUM: without the division KL is no distance between distributions, here "
        f"{got:.3f}, below 0.",
    )
    require(
        not equal(got, len(s) * kl(p, u)), "L_SqrtKL is the mean over the batch, and yours the sum over its images."
    )
    require(
        equal(got, kl(p, u)),
        "L_SqrtKL = KL(P‖u) with u = softmax(s / 2T): the square root of a softmax is a softmax at TWICE the "
        f"temperature, flatter than P. Expected {kl(p, u):.5f} at T = 1, got {got:.5f}.",
    )


def test_sqrt_kl_divides_by_its_temperature(loss):
    s, sqrt_kl = cosines(), need(loss, "sqrt_kl")
    require(
        equal(sqrt_kl(s, 0.3), sqrt_kl(s / 0.3, 1.0)) and not equal(sqrt_kl(s, 0.3), sqrt_kl(s, 1.0)),
        "L_SqrtKL reads s / T: its temperature has no effect, or not the effect of dividing the cosines by it.",
    )


def test_u_is_held_constant(loss):
    s, sqrt_kl = cosines(), need(loss, "sqrt_kl")
    got = gradient(sqrt_kl(s, 0.3), s)
    require(
        not equal(got, sqrt_kl_gradient(s.detach(), 0.3, detach=False)),
        "u is held constant (stop-gradient): it is the teacher. Your gradient has the term (u_k - P_k) / 2 of a u "
        "that moves; detach it.",
    )
    require(
        equal(got, sqrt_kl_gradient(s.detach(), 0.3)),
        "with u held, dL/da_k = P_k (log P_k + H(P)) / 2: autograd finds another gradient in your sqrt_kl. What "
        "carries the gradient is P; u does not.",
    )


def test_u_may_move(loss):
    s, sqrt_kl = cosines(), need(loss, "sqrt_kl", "detach")
    require(
        equal(gradient(sqrt_kl(s, 0.3, detach=False), s), sqrt_kl_gradient(s.detach(), 0.3, detach=False)),
        "letting u move (detach=False) adds (u_k - P_k) / 2 to the gradient, and in yours it does not.",
    )


def test_the_other_direction_is_kl_u_p(loss):
    s, sqrt_kl = cosines(), need(loss, "sqrt_kl", "direction")
    p, u, got = s.softmax(1), (s / 2).softmax(1), sqrt_kl(s, 1.0, direction="u||p")
    require(
        equal(got, kl(u, p)),
        f"the other direction is KL(u‖P) = Σ u (log u - log P): expected {kl(u, p):.5f}, got {got:.5f}. KL is not "
        "symmetric.",
    )
    require(
        equal(gradient(got, s), sqrt_kl_gradient(s.detach(), 1.0, "u||p")),
        "KL(u‖P) with u held has the gradient P_k - u_k, that of a cross-entropy with u as the target. Yours has "
        "another.",
    )


def test_near_uniform_sqrt_kl_is_an_eighth_of_the_variance(loss):
    sqrt_kl = need(loss, "sqrt_kl")
    a = -0.03 * torch.rand(4, 500, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).log()  # skewed
    variance, third = a.var(1, unbiased=False).mean(), (a - a.mean(1, keepdim=True)).pow(3).mean()
    ratio = (sqrt_kl(a, 1.0) / variance).item()
    require(
        abs(ratio - 0.125) < 0.02,
        f"near a uniform P, KL(P‖u) is Var_j(a_j) / 8: yours is {ratio:.3f} Var. With softmax(q a) for u it is (1 - "
        "q)² / 2 Var, and q is 1/2.",
    )
    require(
        abs(ratio - 0.125 - 5 / 48 * (third / variance).item()) < 0.001,
        f"the next term after Var / 8 is 5/48 of the third central moment: yours leaves {ratio - 0.125:.4f} Var.",
    )


def test_the_gradient_of_sqrt_kl_by_hand(loss):
    s, by_hand = cosines(), need(loss, "sqrt_kl_gradient")
    require(
        equal(by_hand(s.detach(), 0.3), gradient(ours.sqrt_kl(s, 0.3), s)),
        "dL_SqrtKL/ds by hand, u held: P_k (log P_k + H(P)) / 2, over B T. Autograd gets something else. The 1/2 is "
        "what u takes off, 1 / B comes from the mean and 1 / T from a = s / T.",
    )


# ---------------------------------------------------------------------------------------- streaming


def rows():
    return unit(B, 7).requires_grad_(), unit(41, 7, seed=1), torch.tensor([3, 40, 3])


def whole_bank(z, weight, index, tau, lam, t):
    s = z @ weight.T
    return ours.nce(s, index, tau) + lam * ours.sqrt_kl(s, t)


def test_streaming_nce_has_the_same_value(loss):
    streaming_loss, (z, weight, index) = need(loss, "streaming_loss"), rows()
    expected = whole_bank(z, weight, index, 0.1, 0.0, 1.0)
    whole, pieces = (streaming_loss(z, weight, index, 0.1, chunk=chunk) for chunk in (41, 8))
    require(equal(whole, expected), f"in one chunk streaming_loss is plain nce, {expected:.5f}; yours is {whole:.5f}.")
    require(
        equal(pieces, expected),
        "the chunks share ONE normaliser: sum the exponentials over all of them, the last short one too, then take "
        f"the log. Chunks of 8 give {pieces:.5f}, the whole bank {expected:.5f}.",
    )


def test_streaming_has_the_same_gradient(loss):
    streaming_loss, (z, weight, index) = need(loss, "streaming_loss"), rows()
    expected = gradient(whole_bank(z, weight, index, 0.1, 0.0, 1.0), z)
    require(
        equal(gradient(streaming_loss(z, weight, index, 0.1, chunk=8), z), expected),
        "the gradient streams too: dL_NCE/dz = (E_P[w] - w_y) / (B tau), the mean row under P less the own one. "
        "Yours has only part of it.",
    )


def test_streaming_has_sqrt_kl_too(loss):
    streaming_loss, (z, weight, index) = need(loss, "streaming_loss", "lam"), rows()
    for tau, lam, t in ((0.1, 20.0, 1.0), (0.2, 3.0, 0.2)):
        expected, got = (f(z, weight, index, tau, lam, t) for f in (whole_bank, streaming_loss))
        require(
            equal(got, expected),
            "SqrtKL streams: KL(P‖u) = E_P[a] / 2 - logsumexp(a) + logsumexp(a / 2), three sums that grow chunk by "
            "chunk, with a = s / T. Your value with lam > 0 is not nce + lam * sqrt_kl.",
        )
        moves = whole_bank(z, weight, index, tau, 0.0, t) + lam * ours.sqrt_kl(z @ weight.T, t, detach=False)
        require(
            not equal(gradient(got, z), gradient(moves, z)),
            "u is held constant when it streams, too: autograd through logsumexp(a / 2) lets it move, with the right "
            "value and another gradient.",
        )
        require(
            equal(gradient(got, z), gradient(expected, z)),
            "the gradient of SqrtKL streams: (E_P[a w] - E_P[a] E_P[w]) / (2 T B), half a covariance. Yours, with "
            "lam > 0, is another.",
        )


def test_streaming_does_not_overflow(loss):
    streaming_loss, (z, weight, index) = need(loss, "streaming_loss"), rows()
    z = z.detach().float()
    got, expected = (f(z, weight.float(), index, 0.005, 0.0, 1.0) for f in (streaming_loss, whole_bank))
    require(
        torch.allclose(got, expected, rtol=1e-3),
        "subtract the largest logit before exp: at tau = 0.005 logits reach 200 and exp(200) is no float32. Keep the "
        f"running maximum and scale the old sums when it grows. Expected {expected:.2f}, got {got:.2f}.",
    )


def test_streaming_keeps_no_matrix_for_the_backward_pass(loss):
    streaming_loss = need(loss, "streaming_loss")
    z, weight, index = unit(4, 7).requires_grad_(), unit(4000, 7, seed=1), torch.arange(4)
    kept = []

    def note(x):
        if x.untyped_storage().data_ptr() not in (weight.untyped_storage().data_ptr(), z.untyped_storage().data_ptr()):
            kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        streaming_loss(z, weight, index, 0.1, chunk=100).backward()
    require(
        sum(kept) < 4 * 4000 / 4,
        f"nothing of size B x N is kept: autograd saved {sum(kept)} numbers for the backward pass, where the matrix "
        f"has {4 * 4000}. Chunks in a loop are not enough, autograd keeps each one's exponentials: write the gradient "
        "yourself (autograd.Function), or checkpoint the chunks.",
    )
