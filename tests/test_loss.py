"""Every equation of loss.py, checked in float64 against autograd and against its definition."""

import pytest
import torch

from loss import nce, sqrt_kl, streaming_loss, streaming_losses

B, N = 6, 11


@pytest.fixture
def similarity():
    generator = torch.Generator().manual_seed(0)
    return (2 * torch.rand(B, N, generator=generator, dtype=torch.float64) - 1).requires_grad_()


def gradient(loss, similarity):
    return torch.autograd.grad(loss, similarity)[0]


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


@pytest.mark.parametrize("power", [0.5, 0.2, 1.0])
@pytest.mark.parametrize("detach", [True, False], ids=["u held", "u moving"])
@pytest.mark.parametrize("direction", ["p||u", "u||p"])
@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_sqrt_kl_gradient_has_the_closed_form_of_the_comments(similarity, temperature, direction, detach, power):
    p, u = softmax(similarity / temperature), softmax(power * similarity / temperature)
    entropy = -(p * p.log()).sum(1, keepdim=True)
    if direction == "p||u":
        row = (1 - power) * p * (p.log() + entropy)
        row = row if detach else row + power * (u - p)
    else:
        kl = (u * (u / p).log()).sum(1, keepdim=True)
        row = p - u
        row = row if detach else row + power * u * ((u / p).log() - kl)
    loss = sqrt_kl(similarity, temperature, direction, detach, power)
    torch.testing.assert_close(gradient(loss, similarity), row / (B * temperature), rtol=1e-9, atol=1e-14)


def test_nce_lets_go_of_the_other_rows_once_an_image_is_recognised_and_sqrt_kl_does_not():
    """The cure for infrequent updating: what reaches the rows k != y dies out with NCE as s_y grows, not with SqrtKL."""
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


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_must_be_positive(similarity, temperature):
    with pytest.raises(ValueError, match="greater than 0"):
        nce(similarity, torch.zeros(B, dtype=torch.long), temperature)
    with pytest.raises(ValueError, match="greater than 0"):
        sqrt_kl(similarity, temperature)


def test_an_unknown_direction_is_refused_with_the_known_ones(similarity):
    with pytest.raises(ValueError, match=r"p\|\|u, u\|\|p"):
        sqrt_kl(similarity, direction="u||u")


# ------------------------------------------------------------------------------------------------------------ streaming


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(1)
    z, weight = (torch.randn(n, 7, generator=generator, dtype=torch.float64) for n in (5, 41))
    index = torch.tensor([3, 40, 3, 0, 17])  # one image twice, the first row and the last
    return torch.nn.functional.normalize(z, dim=1).requires_grad_(), torch.nn.functional.normalize(weight, dim=1), index


@pytest.mark.parametrize("chunk", [1, 7, 41, 8192])
@pytest.mark.parametrize("tau, lam, t", [(0.07, 0.0, 1.0), (0.07, 20.0, 1.0), (0.2, 3.0, 0.2), (0.005, 1.0, 0.003)])
def test_streaming_equals_the_plain_path_in_value_and_gradient(rows, chunk, tau, lam, t):
    z, weight, index = rows
    similarity = z @ weight.T
    plain = nce(similarity, index, tau) + lam * sqrt_kl(similarity, t)
    streamed = streaming_loss(z, weight, index, tau, lam, t, chunk)
    torch.testing.assert_close(streamed, plain, rtol=1e-10, atol=1e-10)
    (expected,) = torch.autograd.grad(plain, z)
    (got,) = torch.autograd.grad(3 * streamed, z)
    torch.testing.assert_close(got, 3 * expected, rtol=1e-10, atol=1e-10)


def test_streaming_gives_both_losses_and_the_normaliser(rows):
    z, weight, index = rows
    similarity = z @ weight.T
    l_nce, l_kl, log_total = streaming_losses(z, weight, index, 0.1, 0.5, chunk=8)
    torch.testing.assert_close(l_nce, nce(similarity, index, 0.1))
    torch.testing.assert_close(l_kl, sqrt_kl(similarity, 0.5))
    torch.testing.assert_close(log_total, (similarity / 0.1).logsumexp(1))
    assert not log_total.requires_grad
    assert streaming_losses(z, weight, index, 0.1, None)[1] == 0


def test_streaming_holds_no_matrix_over_the_bank():
    z, weight = (torch.nn.functional.normalize(torch.randn(n, 4), dim=1) for n in (8, 5000))
    sizes = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            results = out if isinstance(out, (tuple, list)) else (out,)
            sizes.extend(x.numel() for x in results if isinstance(x, torch.Tensor) and x._base is None)
            return out

    with Recorder():
        streaming_loss(z.requires_grad_(), weight, torch.arange(8), 0.1, 1.0, chunk=100).backward()
    made = [size for size in sizes if size != weight.numel()]
    assert max(made) <= 8 * 100


@pytest.mark.parametrize("numbers", [(0.0, 1.0, 8), (0.1, 0.0, 8), (0.1, 1.0, 0)])
def test_streaming_refuses_what_is_not_positive(rows, numbers):
    tau, t, chunk = numbers
    with pytest.raises(ValueError):
        streaming_loss(*rows, tau, 1.0, t, chunk)
