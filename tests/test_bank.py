"""The memory bank: how it starts, what it shows, how it moves, and what it refuses."""

import copy
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bank import RULES, MemoryBank
from loss import nce
from train import Config

N, D, B = 20, 6, 5


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=1)


def bank_of(momentum=0.5, **options):
    bank = MemoryBank(N, D, momentum, **options)
    bank.weight.copy_(unit(N, D, seed=7))
    return bank


def assert_unit_rows(bank):
    torch.testing.assert_close(bank.weight.norm(dim=1), torch.ones(len(bank.weight)), rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------- initialisation


def test_random_rows_are_unit_repeatable_and_uniform_on_the_sphere():
    bank = MemoryBank(4000, 8)
    bank.init_random(torch.Generator().manual_seed(3))
    first = bank.weight.clone()
    assert_unit_rows(bank)
    assert first.mean(0).abs().max() < 0.03
    torch.testing.assert_close(first.T @ first / len(first), torch.eye(8) / 8, rtol=0, atol=0.02)
    bank.init_random(torch.Generator().manual_seed(3))
    assert torch.equal(bank.weight, first)


class Spy(nn.Module):
    """An encoder that notes in which mode and with which gradient setting it was called."""

    def __init__(self):
        super().__init__()
        self.layer, self.calls = nn.Linear(3 * 4, D), []

    def forward(self, x):
        self.calls.append((self.training, torch.is_grad_enabled()))
        return self.layer(x.flatten(1))


def batches_of(images, order, size=8):
    return [(images[i], i) for i in order.split(size)]


def test_forward_initialisation_is_one_pass_of_the_network_in_train_mode_without_gradient():
    bank, encoder, images = bank_of(), Spy().eval(), torch.randn(N, 3, 2, 2)
    bank.init_forward(encoder, batches_of(images, torch.randperm(N)))
    torch.testing.assert_close(bank.weight, F.normalize(encoder.layer(images.flatten(1)), dim=1).detach())
    assert encoder.calls == [(True, False)] * 3  # 20 images in batches of 8: each seen once
    assert not encoder.training, "the mode is restored"


def test_forward_initialisation_refuses_a_row_filled_twice_or_never():
    images = torch.randn(N, 3, 2, 2)
    with pytest.raises(ValueError, match="row 19 was filled 0 times"):
        bank_of().init_forward(Spy(), batches_of(images, torch.arange(N - 1)))
    with pytest.raises(ValueError, match="row 4 was filled 2 times"):
        bank_of().init_forward(Spy(), batches_of(images, torch.cat([torch.arange(N), torch.tensor([4])])))


def test_forward_initialisation_of_some_images_refuses_others_and_restores_the_mode():
    bank, encoder, images = MemoryBank(N, D, window=True), Spy().eval(), torch.randn(N, 3, 2, 2)
    bank.enter(torch.arange(N))
    bank.init_forward(encoder, batches_of(images, torch.arange(5)), torch.arange(5))
    with pytest.raises(ValueError, match="row 5 was filled 1 times, not 0"):
        bank.init_forward(encoder, batches_of(images, torch.arange(6)), torch.arange(5))
    with pytest.raises(ValueError, match="an image is not in the window"):
        bank.init_forward(encoder, [(images[:2], torch.tensor([0, N]))], torch.arange(2))
    assert not encoder.training, "the mode is restored after an error too"


# ------------------------------------------------------------------------------------------ reading


def test_similarity_is_the_cosine_with_every_row_or_with_the_named_ones():
    bank, z = bank_of(), unit(B, D)
    s = bank.similarity(z)
    torch.testing.assert_close(s, F.cosine_similarity(z[:, None], bank.weight[None], dim=2))
    columns = torch.tensor([5, 0, 19])
    torch.testing.assert_close(bank.similarity(z, columns), s[:, columns])


def test_gradient_flows_to_z_and_never_to_the_bank():
    bank, z = bank_of(), unit(B, D).requires_grad_()
    nce(bank.similarity(z), torch.arange(B), 0.2).backward()
    assert z.grad.abs().sum() > 0
    assert not bank.weight.requires_grad and not list(bank.parameters())


def test_negatives_are_k_others_none_of_them_the_batchs_own():
    bank, index = bank_of(), torch.tensor([3, 17, 3, 0])
    seen = torch.zeros(N)
    for _ in range(300):
        columns = bank.sample(index, 5)
        assert columns[:3].tolist() == [0, 3, 17]
        assert len(columns) == 8 and len(columns.unique()) == 8
        seen[columns[3:]] += 1
    assert seen[[0, 3, 17]].sum() == 0
    expected = 300 * 5 / 17
    assert ((seen[seen > 0] - expected).abs() < 5 * expected**0.5).all() and (seen > 0).sum() == 17


def test_sampling_repeats_with_the_same_generator():
    bank, index = bank_of(), torch.arange(4)
    first, again, other = (bank.sample(index, 5, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("negatives", [0, -1, N - 3])
def test_more_negatives_than_other_rows_are_refused(negatives):
    with pytest.raises(ValueError, match=r"\[1, 16\]"):
        bank_of().sample(torch.arange(4), negatives)
    assert len(bank_of().sample(torch.arange(4), N - 4)) == N


def test_locate_finds_each_images_own_column_and_misses_none_silently():
    bank, index = bank_of(), torch.tensor([9, 2, 9])
    columns = bank.sample(index, 6)
    assert torch.equal(columns[bank.locate(index, columns)], index)
    assert torch.equal(bank.locate(index), index)
    with pytest.raises(ValueError, match="own rows"):
        bank.locate(torch.tensor([9, 4]), torch.tensor([2, 9, 5]))


# ----------------------------------------------------------------------------------------- updating


def corrected_by_hand(w, z, index, m, tau):
    """The rule as it is written, one row and one sample at a time, in float64."""
    w, z = w.double(), z.double()
    new = torch.empty_like(w)
    p = (z @ w.T / tau).softmax(1)
    for k in range(len(w)):
        step = sum((float(k == index[i]) - p[i, k]) * z[i] for i in range(len(z)))
        row = m * w[k] + (1 - m) * step
        new[k] = row / row.norm()
    return new


@pytest.mark.parametrize("m", [0.25, 0.5, 0.9])
def test_the_corrected_rule_moves_every_row_as_written(m):
    bank, z, index = bank_of(momentum=m, temperature=0.1), unit(B, D), torch.tensor([4, 9, 0, 11, 19])
    before = bank.weight.clone()
    bank.update(z, index)
    torch.testing.assert_close(bank.weight.double(), corrected_by_hand(before, z, index, m, 0.1), rtol=1e-5, atol=1e-6)
    assert ((bank.weight - before).norm(dim=1) > 0).all()
    assert_unit_rows(bank)


def test_the_corrected_rule_is_a_gradient_step_on_nce():
    """The update goes along -tau B dL_NCE/dW, autograd's gradient if the bank were a parameter."""
    tau, m, index = 0.1, 0.5, torch.tensor([4, 9, 0, 11, 19])
    bank, z = bank_of(momentum=m, temperature=tau), unit(B, D)
    w = bank.weight.clone().requires_grad_()
    nce(z @ w.T, index, tau).backward()
    bank.update(z, index)
    torch.testing.assert_close(bank.weight, F.normalize(m * w - (1 - m) * tau * B * w.grad, dim=1).detach())


def test_a_row_is_pushed_away_from_views_of_other_images_and_pulled_to_its_own():
    bank, z = bank_of(momentum=0.5, temperature=0.2), unit(B, D)
    before = bank.similarity(z)
    index = before.argsort(1)[:, 0]  # the least similar row is the own one
    nearest = before.argmax(1)
    bank.update(z[:1], index[:1], before[:1])
    after = bank.similarity(z)
    assert after[0, index[0]] > before[0, index[0]] and after[0, nearest[0]] < before[0, nearest[0]]


@pytest.mark.parametrize("m, growth", [(3 / 4, 1.4), (1 / 2, 2.7), (1 / 4, 20)])
def test_pushes_of_parallel_views_turn_a_row_away_by_e_to_the_rho_in_an_epoch(m, growth):
    """Views along one direction, P uniform, and a row whose own image is not seen."""
    count, batch, rho = 10_000, 10, (1 - m) / m
    bank = MemoryBank(count, 2, m).double()
    bank.weight.copy_(F.normalize(torch.tensor([1.0, 0.01]).double(), dim=0).expand(count, 2))
    z, uniform = torch.tensor([[1.0, 0.0]]).double().expand(batch, 2), torch.zeros(batch, count).double()
    tangents = [0.01]
    for _ in range(count // batch):
        bank.update(z, torch.arange(1, 1 + batch), uniform)
        tangents.append(bank.weight[0, 1].item() / bank.weight[0, 0].item())
    assert tangents[1] / tangents[0] == pytest.approx(1 / (1 - rho * batch / count))
    assert tangents[-1] / tangents[0] == pytest.approx(growth, rel=0.02)


def test_npids_rule_moves_the_own_row_alone():
    bank, z, index = bank_of(rule="npid", momentum=0.5), unit(B, D), torch.tensor([4, 9, 0, 11, 19])
    before = bank.weight.clone()
    bank.update(z, index)
    expected = before.clone()
    expected[index] = F.normalize(0.5 * before[index] + 0.5 * z, dim=1)
    torch.testing.assert_close(bank.weight, expected)
    others = torch.ones(N, dtype=torch.bool)
    others[index] = False
    assert torch.equal(bank.weight[others], before[others])


@pytest.mark.parametrize("rule", ["corrected", "npid"])
def test_an_index_that_occurs_twice_adds_both_views(rule):
    bank, z, index = bank_of(rule=rule, temperature=0.1), unit(3, D), torch.tensor([8, 8, 2])
    before = bank.weight.clone()
    bank.update(z, index)
    if rule == "corrected":
        expected = corrected_by_hand(before, z, index, 0.5, 0.1).float()
    else:
        expected = before.clone()
        expected[8] = F.normalize(before[8] + z[0] + z[1], dim=0)
        expected[2] = F.normalize(before[2] + z[2], dim=0)
    torch.testing.assert_close(bank.weight, expected, rtol=1e-5, atol=1e-6)


def test_with_sampled_columns_p_is_over_them_and_the_other_rows_stay():
    bank, z, index = bank_of(temperature=0.1), unit(B, D), torch.tensor([4, 9, 0, 11, 19])
    before, columns = bank.weight.clone(), bank.sample(index, 7)
    bank.update(z, index, bank.similarity(z, columns), columns)
    own = (columns[None] == index[:, None]).long().argmax(1)
    expected = before.clone()
    expected[columns] = corrected_by_hand(before[columns], z, own, 0.5, 0.1).float()
    torch.testing.assert_close(bank.weight, expected, rtol=1e-5, atol=1e-6)
    others = torch.ones(N, dtype=torch.bool)
    others[columns] = False
    assert torch.equal(bank.weight[others], before[others])


def test_soft_targets_take_the_place_of_the_own_row():
    bank, z, index = bank_of(temperature=0.1), unit(B, D), torch.arange(B)
    before, soft = bank.weight.clone(), torch.zeros(B, N)
    soft[index, index], soft[index, index.roll(1)] = 0.7, 0.3
    bank.update(z, index, target=soft)
    p = (z @ before.T / 0.1).softmax(1)
    torch.testing.assert_close(bank.weight, F.normalize(0.5 * before + 0.5 * (soft - p).T @ z, dim=1))


@pytest.mark.parametrize("columns", [False, True], ids=["all rows", "sampled rows"])
@pytest.mark.parametrize("rule", ["corrected", "npid"])
def test_a_view_of_weight_two_counts_like_two_views(rule, columns):
    z, index, times = unit(B, D), torch.tensor([4, 9, 0, 11, 19]), torch.tensor([1, 3, 2, 1, 2])
    weighted, repeated = (bank_of(rule=rule, temperature=0.1).double() for _ in range(2))
    columns = weighted.sample(index, 7) if columns else None
    z = z.double()
    weighted.update(z, index, columns=columns, weight=times.double())
    repeated.update(z.repeat_interleave(times, 0), index.repeat_interleave(times), columns=columns)
    torch.testing.assert_close(weighted.weight, repeated.weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", ["corrected", "npid"])
def test_weights_that_sum_to_one_per_image_move_the_bank_like_the_mean_view(rule):
    """Several views of an image, each of weight ω: the image counts once, as before."""
    z, index, omega = unit(2 * B, D).double(), torch.arange(B).repeat(2), torch.tensor([0.25, 0.75]).double()
    several = bank_of(rule=rule, temperature=0.1).double()
    before, weight = several.weight.clone(), omega.repeat_interleave(B)
    p = (z @ before.T / 0.1).softmax(1) if rule == "corrected" else 0
    pull = (F.one_hot(index, N) - p) * weight[:, None]
    several.update(z, index, weight=weight)
    torch.testing.assert_close(several.weight, F.normalize(0.5 * before + 0.5 * pull.T @ z, dim=1), rtol=0, atol=1e-7)
    once, ones = (bank_of(rule=rule, temperature=0.1).double() for _ in range(2))
    once.update(z[:B], index[:B])
    ones.update(z[:B], index[:B], weight=torch.ones(B).double())
    assert torch.equal(once.weight, ones.weight)


@pytest.mark.parametrize("rule", ["corrected", "npid"])
def test_a_view_of_weight_zero_moves_nothing(rule):
    z, index = unit(B, D), torch.arange(B)
    one, other = bank_of(rule=rule), bank_of(rule=rule)
    weight = torch.tensor([1.0, 0, 1, 1, 0])
    one.update(z, index, weight=weight)
    other.update(z[weight > 0], index[weight > 0])
    torch.testing.assert_close(one.weight, other.weight)


def test_defaults_are_those_of_a_run():
    bank, defaults = MemoryBank(N, D), {f.name: f.default for f in fields(Config)}
    assert (bank.momentum, bank.rule) == (defaults["bank_momentum"], defaults["bank_update"])
    assert bank.temperature == defaults["temperature"]


def test_m_one_freezes_the_bank_and_m_zero_forgets_it():
    z, index = unit(B, D), torch.arange(B)
    frozen = bank_of(momentum=1.0)
    before = frozen.weight.clone()
    frozen.update(z, index)
    torch.testing.assert_close(frozen.weight, before)
    forgetful = bank_of(momentum=0.0, rule="npid")
    forgetful.update(z, index)
    torch.testing.assert_close(forgetful.weight[:B], z)


def test_a_row_that_would_become_zero_stays_as_it_was():
    bank = bank_of(momentum=0.5, rule="npid")
    before = bank.weight.clone()
    bank.update(-before[3:4], torch.tensor([3]))  # exactly opposite: m w + (1 - m) z = 0
    assert torch.equal(bank.weight, before)


def test_the_similarity_given_is_the_one_used_and_none_means_compute_it():
    z, index = unit(B, D), torch.arange(B)
    given, computed = bank_of(), bank_of()
    given.update(z, index, given.similarity(z))
    computed.update(z, index)
    assert torch.equal(given.weight, computed.weight)


def test_updating_leaves_no_trace_in_autograd():
    bank, z = bank_of(), unit(B, D).requires_grad_()
    bank.update(z, torch.arange(B), bank.similarity(z))
    assert bank.weight.grad_fn is None and not bank.weight.requires_grad


def test_a_batch_larger_than_the_bank_is_allowed_since_images_may_repeat():
    bank = MemoryBank(3, D, 0.5, temperature=0.1)
    before, z, index = bank.weight.clone(), unit(8, D), torch.arange(8) % 3
    bank.update(z, index)
    expected = corrected_by_hand(before, z, index, 0.5, 0.1).float()
    torch.testing.assert_close(bank.weight, expected, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------- half the memory


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("rule", ["corrected", "npid"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda z, i: (z, i + N - 2), r"index must lie in \[0, 19\]"),
        (lambda z, i: (z, i - 1), r"index must lie in \[0, 19\]"),
        (lambda z, i: (z * float("nan"), i), "not finite"),
        (lambda z, i: (z / 0, i), "not finite"),
        (lambda z, i: (z[:, :4], i), "expected z"),
        (lambda z, i: (z, i[:3]), "expected z"),
    ],
    ids=["index too large", "index negative", "nan", "infinite", "wrong dimension", "wrong batch"],
)
def test_bad_input_is_refused_and_leaves_the_bank_untouched(rule, spoil, message):
    bank = bank_of(rule=rule)
    before = bank.weight.clone()
    with pytest.raises(ValueError, match=message):
        bank.update(*spoil(unit(B, D), torch.arange(B)))
    assert torch.equal(bank.weight, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 1.5}, "momentum"),
        ({"momentum": -0.1}, "momentum"),
        ({"temperature": 0}, "temperature"),
        ({"rule": "simclr"}, "corrected, npid"),
        ({"size": 0}, "at least one row"),
        ({"dim": 0}, "one dimension"),
    ],
)
def test_a_bank_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MemoryBank(**{"size": N, "dim": D} | options)


def test_where_looking_at_values_costs_time_none_is_looked_at(monkeypatch):
    """What a GPU does, played on a CPU: the caller guarantees what is otherwise refused."""
    z, index = unit(B, D), torch.tensor([4, 9, 0, 11, 19])
    checked, trusted = bank_of(temperature=0.1), bank_of(temperature=0.1)
    checked.update(z, index)
    monkeypatch.setattr("bank.looking_is_free", lambda tensor: False)
    trusted.update(z, index)
    torch.testing.assert_close(trusted.weight, checked.weight)
    columns = trusted.sample(index, 6)
    assert torch.equal(columns[:B], index.sort().values) and len(columns.unique()) == B + 6
    trusted.locate(torch.tensor([3]), torch.tensor([2, 9, 5]))  # wrong, and not noticed
    trusted.update(z * float("nan"), index)
    assert trusted.weight.isnan().any()


def test_the_bank_is_saved_with_the_state():
    one, two = bank_of(), MemoryBank(N, D)
    two.load_state_dict(one.state_dict())
    assert torch.equal(one.weight, two.weight)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("columns", [None, torch.tensor([1, 2, 4, 0])])
@pytest.mark.parametrize(
    ("weight", "views"),
    [(torch.float32, torch.float64), (torch.float16, torch.float32), (torch.bfloat16, torch.float64)],
    ids=str,
)
def test_a_bank_and_views_of_any_precision_move_as_in_float32(rule, columns, weight, views):
    z, index = F.normalize(torch.randn(3, 8), dim=1), torch.tensor([1, 4, 2])
    bank = MemoryBank(6, 8, 0.5, rule)
    other = copy.deepcopy(bank).to(weight)
    bank.update(z, index, columns=columns)
    other.update(z.to(views), index, columns=columns)
    assert other.weight.dtype == weight
    torch.testing.assert_close(other.weight.float(), bank.weight, atol=2e-2, rtol=0)
    other.init_forward(nn.Identity(), [(torch.randn(6, 8), torch.arange(6))])
    assert other.weight.dtype == weight and torch.isfinite(other.weight.float()).all()
