"""Muon: its steps equal torch.optim.Muon's up to bf16, and are orthogonalised."""

import copy

import pytest
import torch
from torch import nn

from plumbing.optimizer import Muon, orthogonalise, set_rate


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(20, 64, bias=False), nn.ReLU(), nn.Linear(64, 30, bias=False))


def test_a_step_is_that_of_torchs_muon_up_to_bf16():
    ours = network()
    torchs = copy.deepcopy(ours)
    optimizers = (
        Muon(ours.parameters(), 0.02, 0.6, 0.1),
        torch.optim.Muon(torchs.parameters(), lr=0.02, momentum=0.6, weight_decay=0.1, adjust_lr_fn="original"),
    )
    for _ in range(4):
        x = torch.randn(16, 20)
        for net, optimizer in zip((ours, torchs), optimizers):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    for p, q in zip(ours.parameters(), torchs.parameters()):
        assert (p - q).norm() < 0.02 * q.norm()
        assert (p - q).norm() > 0, "torch's is in bf16"


@pytest.mark.parametrize("shape", [(3, 8, 50), (2, 50, 8), (1, 16, 16)])
def test_orthogonalised_matrices_keep_their_directions_and_lose_their_lengths(shape):
    left, right = torch.randn(shape[0], shape[1], 6), torch.randn(shape[0], 6, shape[2])
    u, s, v = torch.linalg.svd(left @ right, full_matrices=False)
    x = torch.stack(orthogonalise(u[..., :6] * (1 + torch.arange(6)) @ v[:, :6]))
    in_basis = u[..., :6].mT @ x @ v[:, :6].mT  # (M, 6, 6)
    lengths = in_basis.diagonal(dim1=1, dim2=2)
    assert lengths.min() > 0.6 and lengths.max() < 1.3
    torch.testing.assert_close(in_basis, torch.diag_embed(lengths), rtol=0, atol=1e-3)


def test_a_convolution_moves_as_its_flattened_matrix_whatever_its_memory_format():
    conv = nn.Conv2d(3, 8, 3, bias=False)
    flat = nn.Parameter(conv.weight.detach().flatten(1).clone())
    channels_last = copy.deepcopy(conv).to(memory_format=torch.channels_last)
    gradient = torch.randn_like(conv.weight)
    conv.weight.grad, channels_last.weight.grad, flat.grad = gradient, gradient.clone(), gradient.flatten(1).clone()
    for parameter in (conv.weight, channels_last.weight, flat):
        Muon([parameter]).step()
    torch.testing.assert_close(conv.weight.flatten(1), flat)
    torch.testing.assert_close(channels_last.weight, conv.weight)


def test_biases_and_batchnorm_move_as_sgd_would_move_them_at_twice_the_rate():
    norm = nn.BatchNorm1d(4)
    other = copy.deepcopy(norm)
    muon, sgd = Muon(norm.parameters(), lr=0.05, weight_decay=0.3), torch.optim.SGD(other.parameters(), 0.1, 0.9)
    for _ in range(3):
        x = torch.randn(8, 4)
        for net, optimizer in ((norm, muon), (other, sgd)):
            optimizer.zero_grad()
            net(x).pow(3).sum().backward()
            optimizer.step()
    torch.testing.assert_close(norm.weight, other.weight)
    torch.testing.assert_close(norm.bias, other.bias)


def test_depthwise_filters_move_as_sgd_would_move_them_and_other_convolutions_do_not():
    net = nn.Sequential(nn.Conv2d(6, 6, 3, groups=6, bias=False), nn.Conv2d(6, 8, 1, bias=False))
    other = copy.deepcopy(net)
    muon, sgd = Muon(net.parameters(), lr=0.05, weight_decay=0.3), torch.optim.SGD(other.parameters(), 0.1, 0.9)
    x = torch.randn(8, 6, 5, 5)
    for network, optimizer in ((net, muon), (other, sgd)):
        network(x).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(net[0].weight, other[0].weight)
    assert (net[1].weight - other[1].weight).norm() > 0.1


def test_the_rate_of_a_group_is_its_factor_times_the_rate():
    optimizer = Muon(nn.Linear(4, 4).parameters())
    set_rate(optimizer, 0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]


def test_a_restored_optimiser_goes_on_to_the_last_bit():
    net = network()
    optimizer, x = Muon(net.parameters()), torch.randn(16, 20)

    def step(net, optimizer):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()

    step(net, optimizer)
    twin = copy.deepcopy(net)
    restored = Muon(twin.parameters())
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(net, optimizer), step(twin, restored)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), twin.parameters()))
