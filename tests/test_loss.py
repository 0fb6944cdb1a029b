"""Every equation of loss.py, checked in float64 against autograd and against its definition."""

import pytest
import torch

from loss import nce, sqrt_kl

B, N = 6, 11


@pytest.fixture
def similarity():
    generator = torch.Generator().manual_seed(0)
    return (2 * torch.rand(B, N, generator=generator, dtype=torch.float64) - 1).requires_grad_()


def gradient(loss, similarity):
    return torch.autograd.grad(loss, similarity, retain_graph=True)[0]


def softmax(a):
    return a.detach().exp() / a.detach().exp().sum(1, keepdim=True)


@pytest.mark.parametrize("tau", [0.07, 0.2, 1.0])
def test_nce_is_minus_the_log_probability_of_the_own_row(similarity, tau):
    target = torch.tensor([3, 1, 4, 1, 5, 9])
    p = softmax(similarity / tau)
    expected = -p[torch.arange(B), target].log().mean()
    torch.testing.assert_close(nce(similarity, target, tau), expected, rtol=1e-12, atol=0)


def test_nce_gradient_is_probability_minus_target(similarity):
    tau, target = 0.2, torch.tensor([3, 1, 4, 1, 5, 9])
    one_hot = torch.nn.functional.one_hot(target, N).double()
    closed_form = (softmax(similarity / tau) - one_hot) / (B * tau)
    torch.testing.assert_close(gradient(nce(similarity, target, tau), similarity), closed_form, rtol=1e-10, atol=1e-14)


def test_nce_with_soft_targets_is_the_mixture_of_both_losses_and_so_is_its_gradient(similarity):
    own, partner, share = torch.arange(B), torch.arange(B).roll(1), torch.linspace(0.5, 1, B, dtype=torch.float64)
    soft = torch.zeros(B, N, dtype=torch.float64)
    soft[own, own] += share
    soft[own, partner] += 1 - share
    log_p = softmax(similarity / 0.2).log()
    expected = -(share * log_p[own, own] + (1 - share) * log_p[own, partner]).mean()
    torch.testing.assert_close(nce(similarity, soft, 0.2), expected, rtol=1e-12, atol=0)
    closed_form = (softmax(similarity / 0.2) - soft) / (B * 0.2)
    torch.testing.assert_close(gradient(nce(similarity, soft, 0.2), similarity), closed_form, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_u_is_the_normalised_square_root_which_is_the_softmax_at_twice_the_temperature(similarity, temperature):
    p = softmax(similarity / temperature)
    u = p.sqrt() / p.sqrt().sum(1, keepdim=True)
    torch.testing.assert_close(u, softmax(similarity / (2 * temperature)), rtol=1e-12, atol=0)
    for direction, expected in (("p||u", p * (p / u).log()), ("u||p", u * (u / p).log())):
        value = sqrt_kl(similarity, temperature, direction)
        torch.testing.assert_close(value, expected.sum(1).mean(), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("detach", [True, False], ids=["u held", "u moving"])
@pytest.mark.parametrize("direction", ["p||u", "u||p"])
@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_sqrt_kl_gradient_has_the_closed_form_of_the_comments(similarity, temperature, direction, detach):
    p, u = softmax(similarity / temperature), softmax(similarity / (2 * temperature))
    entropy = -(p * p.log()).sum(1, keepdim=True)
    if direction == "p||u":
        row = p * (p.log() + entropy) / 2
        row = row if detach else row + (u - p) / 2
    else:
        kl = (u * (u / p).log()).sum(1, keepdim=True)
        row = p - u
        row = row if detach else row + u * ((u / p).log() - kl) / 2
    loss = sqrt_kl(similarity, temperature, direction, detach)
    torch.testing.assert_close(gradient(loss, similarity), row / (B * temperature), rtol=1e-9, atol=1e-14)


def test_nce_lets_go_of_the_other_rows_once_an_image_is_recognised_and_sqrt_kl_does_not():
    """The cure for infrequent updating: as s_y grows, only SqrtKL still pushes the other rows."""
    reach = {"nce": [], "sqrt_kl": []}
    for own in (0.4, 0.9):
        s = torch.linspace(-0.2, 0.2, 1000, dtype=torch.float64)[None].clone()
        s[0, 0] = own
        s.requires_grad_()
        for name, loss in (("nce", nce(s, torch.tensor([0]), 0.05)), ("sqrt_kl", sqrt_kl(s, 1.0))):
            reach[name].append(gradient(loss, s)[0, 1:].abs().sum().item())
    assert reach["nce"][1] < reach["nce"][0] / 1000
    assert reach["sqrt_kl"][1] > reach["sqrt_kl"][0] / 2


def test_sqrt_kl_in_terms_of_logsumexp_needs_no_second_matrix(similarity):
    a = similarity.detach() / 0.3
    mean_logit = (softmax(a) * a).sum(1)
    streamed = mean_logit / 2 - a.logsumexp(1) + (a / 2).logsumexp(1)
    torch.testing.assert_close(sqrt_kl(similarity, 0.3), streamed.mean(), rtol=1e-10, atol=1e-14)


def test_near_uniform_sqrt_kl_is_an_eighth_of_the_variance():
    """Second order: KL(P‖u) ≈ Var_j(a_j) / 8. The remainder falls with the cube of the logits."""
    direction = torch.randn(4, 500, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    error = []
    for scale in (0.1, 0.01):
        a = scale * direction
        second_order = a.var(1, unbiased=False).mean() / 8
        error.append(abs(sqrt_kl(a, 1.0) / second_order - 1).item())
    assert error[0] < 0.05 and error[1] < 0.01


def test_sqrt_kl_vanishes_for_a_uniform_prediction_only():
    assert sqrt_kl(torch.zeros(2, 7, dtype=torch.float64)).abs() < 1e-15
    assert sqrt_kl(torch.eye(2, 7, dtype=torch.float64)) > 1e-3


# ------------------------------------------------------------------------------------------ weights

TIMES = torch.tensor([1, 2, 1, 3, 1, 2])


def losses_of(similarity, target, weight=None):
    soft = torch.nn.functional.one_hot(target, N).double() * 0.7 + 0.3 / N
    yield nce(similarity, target, 0.2, weight)
    yield nce(similarity, soft, 0.2, weight)
    for direction in ("p||u", "u||p"):
        for detach in (True, False):
            yield sqrt_kl(similarity, 0.5, direction, detach, weight=weight)


def test_a_weight_counts_like_a_repeat_in_value_and_gradient(similarity):
    target = torch.tensor([3, 1, 4, 1, 5, 9])
    repeated = losses_of(similarity.repeat_interleave(TIMES, 0), target.repeat_interleave(TIMES))
    for weighted, expected in zip(losses_of(similarity, target, TIMES.double()), repeated, strict=True):
        torch.testing.assert_close(weighted, expected, rtol=1e-12, atol=0)
        got, wanted = gradient(weighted, similarity), gradient(expected, similarity)
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-14)


def test_equal_weights_of_any_size_give_the_plain_mean(similarity):
    target = torch.tensor([3, 1, 4, 1, 5, 9])
    for size in (0.25, 1.0, 7.0):
        same = losses_of(similarity, target, torch.full((B,), size, dtype=torch.float64))
        for weighted, expected in zip(same, losses_of(similarity, target), strict=True):
            torch.testing.assert_close(weighted, expected, rtol=1e-12, atol=0)


def test_groups_of_views_are_averaged_by_their_weights(similarity):
    """Two views per image with weights ω and 1 - ω: the loss is the same mixture of two batches."""
    target, omega = torch.tensor([3, 1, 4]), 0.3
    weight = torch.tensor([omega] * 3 + [1 - omega] * 3, dtype=torch.float64)
    both = losses_of(similarity, target.repeat(2), weight)
    first, second = losses_of(similarity[:3], target), losses_of(similarity[3:], target)
    for mixed, one, other in zip(both, first, second, strict=True):
        torch.testing.assert_close(mixed, omega * one + (1 - omega) * other, rtol=1e-12, atol=0)


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_must_be_positive(similarity, temperature):
    with pytest.raises(ValueError, match="greater than 0"):
        nce(similarity, torch.zeros(B, dtype=torch.long), temperature)
    with pytest.raises(ValueError, match="greater than 0"):
        sqrt_kl(similarity, temperature)


def test_an_unknown_direction_is_refused_with_the_known_ones(similarity):
    with pytest.raises(ValueError, match=r"p\|\|u, u\|\|p"):
        sqrt_kl(similarity, direction="u||u")


@pytest.mark.parametrize("detach, c", [(True, 2), (False, 4)])
@pytest.mark.parametrize("tau, lam, T", [(0.5, 8.0, 1.0), (0.4, 20.0, 1.5), (0.6, 2.0, 0.6), (0.2, 20.0, 1.0)])
def test_sqrt_kl_turns_the_gradient_to_that_of_a_lower_temperature(tau, lam, T, detach, c):
    """docs/derivations.md, section 10. Rows with unequal variances, so that Cov(W) z is not z."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.linspace(2, 0.1, 64, dtype=torch.float64)
    rows, z = (torch.randn(n, 64, generator=generator, dtype=torch.float64) * scales for n in (20_000, 1))
    rows, z = (torch.nn.functional.normalize(x, dim=1) for x in (rows, z))
    rows = torch.nn.functional.normalize(rows + 0.3, dim=1)  # a mean that is not zero
    z.requires_grad_()

    def pull(tau, lam=0.0):
        similarity = z @ rows.T
        loss = nce(similarity, torch.tensor([7]), tau) + lam * sqrt_kl(similarity, T, detach=detach)
        return torch.autograd.grad(loss, z)[0][0]

    both = pull(tau, lam)
    expected = 1 / (1 / tau + lam * tau / (c * T**2))
    candidates = torch.linspace(0.5, 1.6, 221, dtype=torch.float64) * expected
    cosines = torch.stack([torch.cosine_similarity(both, pull(t.item()), dim=0) for t in candidates])
    best = candidates[cosines.argmax()].item()
    assert best == pytest.approx(expected, rel=0.05)
    assert 1 - cosines.max() < 0.05 * (1 - torch.cosine_similarity(both, pull(tau), dim=0))
    assert (both.norm() / pull(expected).norm()).item() == pytest.approx(expected / tau, rel=0.05)


@pytest.mark.parametrize("tau", [0.5, 0.2, 0.07])
def test_sqrt_kl_at_nces_own_temperature_is_a_lower_one_for_any_p_and_a_small_weight(tau):
    """docs/derivations.md, section 10: what is left over is of second order in lambda."""
    generator = torch.Generator().manual_seed(0)
    rows, z = (torch.randn(n, 16, generator=generator, dtype=torch.float64) for n in (400, 32))
    rows = torch.nn.functional.normalize(rows, dim=1)
    z = torch.nn.functional.normalize(torch.nn.functional.normalize(z, dim=1) + 1.2 * rows[:32], dim=1).requires_grad_()

    def pull(tau, lam=0.0, factor=1.0):
        similarity = z @ rows.T
        loss = factor * nce(similarity, torch.arange(32), tau) + lam * sqrt_kl(similarity, tau)
        return torch.autograd.grad(loss, z)[0]

    left = []
    for lam in (0.02, 0.01, 1.0):
        lower = tau / (1 + lam / 2)
        both = pull(tau, lam)
        left.append(((both - pull(lower, factor=lower / tau)).norm() / (both - pull(tau)).norm()).item())
    assert left[0] < 0.02 and left[0] / left[1] == pytest.approx(2, rel=0.03)
    assert left[2] == pytest.approx({0.5: 0.04, 0.2: 0.16, 0.07: 0.42}[tau], abs=0.005), "as the page says"


def test_sqrt_kl_at_nces_own_temperature_is_a_confidence_penalty(similarity):
    p = torch.softmax(similarity / 0.1, dim=1)
    entropy = -(p * p.log()).sum(1).mean()
    penalty, ours = gradient(-0.5 * entropy, similarity), gradient(sqrt_kl(similarity, 0.1), similarity)
    torch.testing.assert_close(ours, penalty, rtol=1e-9, atol=1e-13)
